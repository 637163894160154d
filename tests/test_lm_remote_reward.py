"""A reward from a server: what is sent, what may come back, and what happens when it does not."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf.checks import InputError
from rlhf.lm.remote_reward import RemoteReward
from rlhf.lm.rewards import score

Reply = tuple[int, bytes] | None  # status and body; None: hang up


class Server:
    """Answers with the replies in turn, the last one for ever; keeps what it was asked."""

    def __init__(self, *replies: Reply | Callable[[], Reply]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                server.headers.append(dict(self.headers))
                reply = replies[min(len(server.asked), len(replies)) - 1]
                reply = reply() if callable(reply) else reply
                if reply is None:
                    self.connection.close()
                    return
                self.send_response(reply[0])
                self.send_header("Content-Length", str(len(reply[1])))
                self.end_headers()
                self.wfile.write(reply[1])

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._http.server_port}/score"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(*replies: Any) -> Server:
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def scores(*values: Any) -> Reply:
    return 200, json.dumps({"scores": values}).encode()


ROWS = [{"prompt": "a", "answer": "1", "level": 3}, {"prompt": "b", "answer": "ü", "level": None}]


def test_prompts_completions_and_columns_are_sent_and_scores_come_back(serve: Callable[..., Server]) -> None:
    server = serve(scores(0.5, None))
    reward = RemoteReward(server.url, headers={"Authorization": "Bearer x"})
    found = score([reward], ROWS, ["c", "d"], completion_ids=[[1, 2], [3]], weights=[4.0])
    assert found.total.tolist() == [2.0, 0.0]
    assert found.components["remote_reward"].isnan().tolist() == [False, True]
    (asked,) = server.asked
    assert asked == {
        "prompts": ["a", "b"],
        "completions": ["c", "d"],
        "completion_ids": [[1, 2], [3]],
        "answer": ["1", "ü"],
        "level": [3, None],
    }
    assert server.headers[0]["Content-Type"] == "application/json"
    assert server.headers[0]["Authorization"] == "Bearer x"


def test_scores_may_be_per_token(serve: Callable[..., Server]) -> None:
    reward = RemoteReward(serve(scores([1, 2], [3])).url)
    assert score([reward], ROWS, ["c", "d"], completion_ids=[[1, 2], [3]]).token_rewards.tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize("failure", [(500, b"busy"), (503, b""), (429, b"slow down"), None], ids=str)
def test_a_passing_failure_is_tried_again(serve: Callable[..., Server], failure: Reply) -> None:
    server = serve(failure, failure, scores(1, 2))
    assert RemoteReward(server.url, retries=2, wait=0)(["a"] * 2, ["b"] * 2) == [1, 2]
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]


@pytest.mark.parametrize(
    ("failure", "problem"),
    [((500, b"out of memory"), "status 500 b'out of memory'"), (None, "RemoteDisconnected|ConnectionReset")],
    ids=["500", "hang up"],
)
def test_after_the_last_try_the_error_says_what_came(
    serve: Callable[..., Server], failure: Reply, problem: str
) -> None:
    server = serve(failure)
    with pytest.raises(InputError, match=f"{server.url} gave no answer in 3 tries .*the last: ({problem})"):
        RemoteReward(server.url, retries=2, wait=0)(["a"], ["b"])
    assert len(server.asked) == 3


def test_a_refusal_is_not_tried_again(serve: Callable[..., Server]) -> None:
    server = serve((400, b"no column gold"))
    with pytest.raises(InputError, match="refused the request: status 400 b'no column gold'"):
        RemoteReward(server.url, wait=0)(["a"], ["b"])
    assert len(server.asked) == 1


def test_a_silent_server_is_given_up(serve: Callable[..., Server]) -> None:
    release = threading.Event()
    server = serve(lambda: release.wait(30) and None)
    with pytest.raises(InputError, match=r"no answer in 1 tries of up to 0\.3 s \(the last: .*imed"):
        RemoteReward(server.url, timeout=0.3, retries=0)(["a"], ["b"])
    release.set()


def test_nobody_there(serve: Callable[..., Server]) -> None:
    server = serve(scores(1))
    server.close()
    with pytest.raises(InputError, match=r"gave no answer in 2 tries .*refused.*is the server up"):
        RemoteReward(server.url, retries=1, wait=0)(["a"], ["b"])


@pytest.mark.parametrize("body", [b"1.0", b"", b'{"score": [1]}', b'{"scores": 1}', b"\xff", b"[1]"])
def test_an_answer_of_another_form_is_shown(serve: Callable[..., Server], body: bytes) -> None:
    with pytest.raises(InputError, match=r'must answer \{"scores": \[...\]\} as JSON, got b'):
        RemoteReward(serve((200, body)).url)(["a"], ["b"])


@pytest.mark.parametrize(
    ("values", "problem"), [([1], "returned 1 scores for 2"), ([1, "2"], "returned '2'"), ([1, float("nan")], "nan")]
)
def test_what_is_no_score_is_refused_as_of_any_function(
    serve: Callable[..., Server], values: list[Any], problem: str
) -> None:
    with pytest.raises(InputError, match=f"'safety' .*{problem}"):
        score([RemoteReward(serve(scores(*values)).url, name="safety")], ROWS, ["c", "d"])


def test_bad_arguments() -> None:
    for options, problem in (
        ({"url": "localhost:8000"}, "url must begin with http"),
        ({"timeout": 0}, "timeout must be in"),
        ({"retries": -1}, "retries must be in"),
        ({"wait": float("nan")}, "wait must be in"),
    ):
        with pytest.raises(InputError, match=problem):
            RemoteReward(**{"url": "http://x", **options})
    with pytest.raises(InputError, match=r"cannot be sent as JSON .*set"):
        RemoteReward("http://x")(["a"], ["b"], tags=[{"s"}])
