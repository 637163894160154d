"""Reward functions and reward models: completions to scores. The verifiers are in `rlhf.lm.verifiers`."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checks import InputError, brief, check_range
from rlhf.lm.attention import positions
from rlhf.lm.trunk_reward import RewardOnTrunk
from rlhf.lm.verifiers import arguments_for, as_score, exact_answer, math_answer, name_of
from rlhf.rewards import combine_rewards

__all__ = ["RewardFunction", "RewardModel", "Row", "Scores", "exact_answer", "math_answer", "name_of", "score"]

# (prompts, completions, completion_ids, **columns) -> one verdict per completion, or an awaitable of them. All comes by
# name, and a function gets what it names: texts, the completions' tokens (lists of int), and every other column of the
# task's rows, one value per completion. A verdict is a number; None where the function does not apply; or a list of
# numbers, one per token.
RewardFunction = Callable[..., Any]

Row = dict[str, Any]


class Scores(NamedTuple):
    """The verdicts on B completions, float32."""

    total: Tensor  # [B] weighted sum of the verdicts on whole completions; 0 where none applies
    components: dict[str, Tensor]  # [B] by function, unweighted; per token: their sum; NaN where it does not apply
    token_rewards: Tensor  # [B, T] weighted verdicts on tokens, not in total; 0 past a completion's end

    @property
    def totals(self) -> Tensor:
        """[B]: verdicts on the whole and on tokens."""
        return self.total + self.token_rewards.sum(-1)


class _Verdicts(NamedTuple):
    scores: Tensor  # [B], NaN where the function does not apply
    per_token: Tensor | None  # [B, T] of a function that judges tokens


def score(
    functions: Sequence[RewardFunction],
    rows: Sequence[Row],
    completions: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> Scores:
    """Call each reward function on all completions, async ones at the same time.

    Args:
        functions: see `RewardFunction`.
        rows: [B] the row each completion answers; its "prompt" is passed as `prompts`, the rest as columns.
        completions: [B] texts.
        weights: one per function; all 1 if None.
        completion_ids: [B] the completions' tokens, end of sequence included.
    Raises:
        InputError: a function raises, returns another number of verdicts, or one that is not finite.
    """
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise InputError(f"there must be one weight per reward function, got {len(weights)} for {len(functions)}")
    for weight in weights:
        check_range("every reward weight", weight, low_open=True, high_open=True)
    names = [name_of(function) for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two reward functions are named {name!r}: give one of them another __name__")
    given = _arguments(rows, completions, completion_ids)
    returned = _awaited(names, [_called(function, given) for function in functions], given)
    lengths = None if completion_ids is None else [len(ids) for ids in completion_ids]
    verdicts = [_checked(name, x, completions, lengths) for name, x in zip(names, returned, strict=True)]
    # What is given token by token does not count among the verdicts on the whole.
    whole = torch.stack([x.scores if x.per_token is None else x.scores * torch.nan for x in verdicts], -1)
    total = combine_rewards(whole, weights).nan_to_num(nan=0.0)
    token_rewards = torch.zeros(len(rows), max(lengths or [0]))
    for verdict, weight in zip(verdicts, weights, strict=True):
        if verdict.per_token is not None:
            token_rewards += weight * verdict.per_token
    return Scores(total, {name: x.scores for name, x in zip(names, verdicts, strict=True)}, token_rewards)


def _arguments(
    rows: Sequence[Row], completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None
) -> dict[str, list[Any]]:
    names = rows[0].keys()
    for row in rows:
        if row.keys() != names:
            raise InputError(f"all rows must have the same columns, got {sorted(names)} and {sorted(row)}")
    ours: dict[str, list[Any]] = {"prompts": [row["prompt"] for row in rows], "completions": list(completions)}
    if completion_ids is not None:
        ours["completion_ids"] = [list(ids) for ids in completion_ids]
    taken = sorted(ours.keys() & names)
    if taken:
        raise InputError(f"reward functions get {', '.join(taken)} from the trainer: give that column another name")
    return ours | {key: [row[key] for row in rows] for key in names if key != "prompt"}


def _called(function: RewardFunction, given: dict[str, list[Any]]) -> Any:
    try:
        return function(**{name: list(values) for name, values in arguments_for(function, given).items()})
    except Exception as error:
        raise _failure(name_of(function), error, given) from error


def _awaited(names: Sequence[str], returned: Sequence[Any], given: dict[str, list[Any]]) -> list[Any]:
    """What async functions return, waited for all at once; the rest as it is."""
    waiting = {number: x for number, x in enumerate(returned) if inspect.isawaitable(x)}
    if not waiting:
        return list(returned)

    async def together() -> list[Any]:
        return await asyncio.gather(*waiting.values(), return_exceptions=True)

    results = asyncio.run_coroutine_threadsafe(together(), _event_loop()).result()
    found = dict(zip(waiting, results, strict=True))
    for number, result in found.items():
        if isinstance(result, BaseException):
            raise _failure(names[number], result, given) from result
    return [found.get(number, x) for number, x in enumerate(returned)]


@lru_cache(maxsize=1)
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for the whole run, so that a client which an async function keeps open stays usable; in a thread of its own,
    since a notebook has a loop running in ours."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def _failure(name: str, error: BaseException, given: dict[str, list[Any]]) -> InputError:
    if isinstance(error, InputError):  # says all there is to say
        return InputError(f"reward function {name!r}: {error}")
    call = ", ".join(f"{key}=[...]" for key in given)
    return InputError(
        f"reward function {name!r} raised {brief(error)}. It is called as {name}({call}), or with those of them that "
        "it names, and returns one number per completion"
    )


def _checked(name: str, returned: Any, completions: Sequence[str], lengths: list[int] | None) -> _Verdicts:
    values = _plain(returned)  # tensors, numpy arrays
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(
            f"reward function {name!r} returned {str(returned)[:80]}: it must return a list of numbers, one for each "
            "completion"
        )
    if len(values) != len(completions):
        raise InputError(f"reward function {name!r} returned {len(values)} scores for {len(completions)} completions")
    values = [_plain(value) for value in values]
    if lengths is not None and any(isinstance(value, list | tuple) for value in values):
        return _checked_per_token(name, values, completions, lengths)
    numbers = [torch.nan if x is None else _number(name, x, c) for x, c in zip(values, completions, strict=True)]
    return _Verdicts(torch.tensor(numbers), None)


def _checked_per_token(name: str, values: list[Any], completions: Sequence[str], lengths: list[int]) -> _Verdicts:
    per_token, scores = torch.zeros(len(values), max(lengths)), []
    for number, (value, completion, length) in enumerate(zip(values, completions, lengths, strict=True)):
        if value is not None and not (isinstance(value, list | tuple) and len(value) == length):
            raise InputError(
                f"reward function {name!r} returned {str(value)[:80]} for the completion {completion[:80]!r} of "
                f"{length} tokens: a function that judges tokens returns as many numbers as completion_ids has, for "
                "each completion, or None"
            )
        if value is not None:
            per_token[number, :length] = torch.tensor([_number(name, x, completion) for x in value])
        scores.append(torch.nan if value is None else float(per_token[number].sum()))
    return _Verdicts(torch.tensor(scores), per_token)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _number(name: str, value: Any, completion: str) -> float:
    try:
        return as_score(value)
    except ValueError:
        raise InputError(
            f"reward function {name!r} returned {value!r} for the completion {completion[:80]!r}: every score must "
            "be a finite number; return 0.0 for what cannot be judged, None where the function does not apply"
        ) from None


def added_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The first token that the tokenizer adds to every text, as text; "" if none. A text that begins with it already,
    as a chat template writes it, would have it twice."""
    adds = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if adds else ""


class RewardModel:
    """A sequence classifier with one label as a reward function: its score of prompt + completion.

    Texts are tokenized anew, so that model and tokenizer may be quite other than the actor's. A prompt's markup is not
    translated: where the reward model has a chat template of its own, let `render` build its text from the row.

    Args:
        model: e.g. AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1); or an adapter and a head
            on the actor's trunk.
        tokenizer: the model's own, with a pad token.
        batch_size: texts scored at once.
        render: (prompt, completion, **columns of the row) -> the text to score; their concatenation if None.
    Raises:
        InputError: several labels, no pad token, or a tokenizer with more tokens than the model knows.
    """

    __name__ = "reward_model"

    def __init__(
        self,
        model: PreTrainedModel | RewardOnTrunk,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        render: Callable[..., str] | None = None,
    ) -> None:
        if model.config.num_labels != 1:
            raise InputError(f"a reward model has num_labels=1, got {model.config.num_labels}")
        if tokenizer.pad_token_id is None:
            raise InputError(
                "the reward model's tokenizer has no pad token, without which the end of a text cannot be found in a "
                "batch: set tokenizer.pad_token to a token that texts do not hold"
            )
        known = model.config.get_text_config().vocab_size
        self._positions = positions(model.config)
        if len(tokenizer) > known:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens but the reward model knows {known}: give the model's own"
            )
        self.model = model.eval()
        self.model.config.pad_token_id = tokenizer.pad_token_id  # where the classifier looks for a text's last token
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.render = render
        self._bos = added_bos(tokenizer)

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        texts = [
            self._text(*pair, number, columns) for number, pair in enumerate(zip(prompts, completions, strict=True))
        ]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            # Padded on the right, tokens keep their positions: a score must not depend on the texts beside it.
            batch = self.tokenizer(part, padding=True, padding_side="right", return_tensors="pt")
            longest, limit = batch["input_ids"].shape[1], self._positions
            if limit is not None and longest > limit:
                raise InputError(
                    f"a text has {longest} of the reward model's tokens, and it knows {limit} positions: pass a "
                    "smaller --max-new-tokens, or let `render` shorten texts"
                )
            batch = {key: batch[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
            scores += self.model(**batch).logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt: str, completion: str, number: int, columns: dict[str, list[Any]]) -> str:
        if self.render is None:
            text = prompt + completion
        else:
            row = {name: values[number] for name, values in columns.items()}
            text = self.render(**arguments_for(self.render, {"prompt": prompt, "completion": completion, **row}))
        return text.removeprefix(self._bos)


def on_trunk(functions: Sequence[RewardFunction]) -> list[RewardOnTrunk]:
    """Those among them that score through the actor's trunk, each once."""
    found = [function.model for function in functions if isinstance(function, RewardModel)]
    return list({id(model): model for model in found if isinstance(model, RewardOnTrunk)}.values())


def whole_models(functions: Sequence[RewardFunction]) -> list[PreTrainedModel]:
    """The models of the others among them, with a trunk of their own, each once."""
    found = [function.model for function in functions if isinstance(function, RewardModel)]
    return list({id(model): model for model in found if isinstance(model, PreTrainedModel)}.values())
