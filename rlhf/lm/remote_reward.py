"""A reward over HTTP: the judge runs somewhere else, in any language."""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from rlhf.checks import InputError, brief, check_range


class RemoteReward:
    """A reward function that asks a server.

    It posts {"prompts": [...], "completions": [...], "<column>": [...], ...} as JSON and expects {"scores": [...]}: a
    number for each completion, null where it does not apply, or a list of numbers, one per token. Each training process
    asks for its share of the completions, in one request.

    Args:
        url: http:// or https://.
        timeout: seconds that the server may stay silent.
        retries: further tries after no answer, an answer cut short, or one of status 429 or 5xx.
        wait: seconds before the first of them, doubled each time.
        headers: sent with each request, for instance {"Authorization": "Bearer ..."}.
        name: in metrics and errors.
    Raises:
        InputError: url or a number is wrong; on a call, no usable answer after all tries.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        wait: float = 1.0,
        headers: dict[str, str] | None = None,
        name: str = "remote_reward",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"url must begin with http:// or https://, got {url!r}")
        check_range("timeout", timeout, low=0, low_open=True, high_open=True)
        check_range("retries", retries, low=0)
        check_range("wait", wait, low=0, high_open=True)
        self.url, self.timeout, self.retries, self.wait, self.__name__ = url, timeout, retries, wait, name
        self._headers = {"Content-Type": "application/json", **(headers or {})}

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[Any]:
        try:
            body = json.dumps({"prompts": prompts, "completions": completions, **columns}).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"the rows cannot be sent as JSON ({brief(error)}): leave out such columns") from error
        answer = self._answer(body)
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError):
            scores = None
        if not isinstance(scores, list):
            raise InputError(f'{self.url} must answer {{"scores": [...]}} as JSON, got {answer[:200]!r}')
        return scores

    def _answer(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, data=body, headers=self._headers, method="POST")
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                failure = f"status {error.code} {error.read(200)!r}"
                if error.code != 429 and error.code < 500:
                    raise InputError(f"{self.url} refused the request: {failure}") from error
            except (OSError, http.client.HTTPException) as error:  # no connection, silence, an answer cut short
                failure = brief(error)
        raise InputError(
            f"{self.url} gave no answer in {self.retries + 1} tries of up to {self.timeout:g} s (the last: {failure}): "
            "is the server up, and quick enough? See timeout and retries"
        )
