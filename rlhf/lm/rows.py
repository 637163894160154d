"""One row of a data set, in the forms people have, to tokens: demonstrations, preferences, prompts.

Columns, as in TRL; each value is text, or a list of {"role", "content"} messages:

    prompt, completion            a demonstration
    messages                      a dialogue: every assistant turn is one
    text                          plain text: all of it but the first token
    prompt, chosen, rejected      a preference; also without `prompt`, where both dialogues begin alike
    chosen, rejected              Anthropic HH-RLHF's layout: two whole dialogues as one text each

A preference is a demonstration too: its chosen answer. Messages are rendered with the tokenizer's chat template.
"""

import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.checks import InputError
from rlhf.lm.rewards import Row, added_bos

Message = dict[str, Any]
Said = str | list[Message]  # what a column holds: text or messages

FORMS = "prompt + completion, messages, text, prompt + chosen + rejected, or chosen + rejected"
_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_ANSWER = "\n\nAssistant:"


class Demonstration(NamedTuple):
    """Tokens of a prompt (at least one) and of what follows; `learned`: which of the latter are to be learned."""

    prompt_ids: list[int]
    completion_ids: list[int]
    learned: list[bool]

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def parts(self) -> list[list[int]]:
        return [self.prompt_ids, self.completion_ids]


class Pair(NamedTuple):
    """Tokens of prompt and answer, the better and the worse; margin in score units."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float

    @property
    def tokens(self) -> int:
        return max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def parts(self) -> list[list[int]]:
        return [self.chosen_ids, self.rejected_ids]


class Unusable(Exception):
    """Why a row is left out."""


def unended(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Tokens of texts that something is to follow: without the end-of-sequence token that some tokenizers add to every
    text, after which a model has nothing more to say. A first token that the tokenizer adds and the text has written
    out is there once."""
    bos = added_bos(tokenizer) if add_special_tokens else ""
    texts = [text.removeprefix(bos) for text in texts]
    token_ids: list[list[int]] = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    end = [tokenizer.eos_token_id]
    if all(ids[-1:] == end for ids in token_ids):
        plain, whole = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (False, add_special_tokens))
        if whole[-1:] == end and plain[-1:] != end:
            return [ids[:-1] for ids in token_ids]
    return token_ids


def demonstration(row: Row, tokenizer: PreTrainedTokenizerBase, *, plain_text: bool = False) -> Demonstration:
    """A row of any known form as a demonstration. A completion ends with the end-of-sequence token.

    Raises:
        InputError: no known form, or messages and no chat template.
        Unusable: nothing is answered, or the answer is empty.
    """
    if row.get("text") is not None:
        ids = [*unended([_text(row, "text")], tokenizer)[0], tokenizer.eos_token_id]
        return Demonstration(ids[:1], ids[1:], [True] * (len(ids) - 1))
    if row.get("messages") is not None:
        messages = _messages(row, "messages")
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
        if not first:
            raise Unusable("without an assistant's turn that answers something")
        return _dialogue_demonstration(messages, first, tokenizer)
    column = "completion" if row.get("completion") is not None else "chosen"
    prompt, answer, _ = _split(row, tokenizer, column, plain_text)
    if isinstance(prompt, list):
        assert isinstance(answer, list)
        return _dialogue_demonstration([*prompt, *answer], len(prompt), tokenizer)
    assert isinstance(answer, str)
    if not answer.strip():
        raise Unusable("with an empty answer")
    prompt_ids = unended([prompt], tokenizer)[0]
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if not prompt_ids:  # a model needs a token to start from
        prompt_ids, ids = ids[:1], ids[1:]
    return Demonstration(prompt_ids, ids, [True] * len(ids))


def pair(row: Row, tokenizer: PreTrainedTokenizerBase, *, plain_text: bool = False) -> Pair:
    """A preference as the texts that `rlhf.lm.rewards.RewardModel` scores: prompt and answer, no end-of-sequence token.

    `margin` is read where the row has it.

    Raises:
        InputError: the row is no preference.
        Unusable: an answer is empty, or both are the same.
    """
    if row.get("chosen") is None or row.get("rejected") is None:
        raise InputError(f"a preference needs chosen and rejected, got columns {sorted(row)}")
    prompt, chosen, rejected = _split(row, tokenizer, "chosen", plain_text)
    texts = [_scored_text(prompt, answer, tokenizer) for answer in (chosen, rejected)]
    if texts[0] == texts[1]:
        raise Unusable("with two equal answers")
    margin = row.get("margin")
    if margin is not None and not isinstance(margin, int | float):
        raise InputError(f"margin must be a number, got {margin!r}")
    bos = added_bos(tokenizer)
    ids = tokenizer([text.removeprefix(bos) for text in texts])["input_ids"]
    return Pair(ids[0], ids[1], 0.0 if margin is None else float(margin))


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase, *, plain_text: bool = False) -> str:
    """The prompt of a row of any form, ready for the tokenizer.

    Raises:
        InputError: the row has none.
        Unusable: no turn stands before the answer.
    """
    if row.get("messages") is not None:
        messages = _messages(row, "messages")
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        if last == 0:
            raise Unusable("without an assistant's turn that answers something")
        return _rendered(messages[:last], tokenizer)
    if row.get("prompt") is not None and row.get("chosen") is None and row.get("completion") is None:
        return row["prompt"] if isinstance(row["prompt"], str) else _rendered(_messages(row, "prompt"), tokenizer)
    column = "completion" if row.get("completion") is not None else "chosen"
    prompt, *_ = _split(row, tokenizer, column, plain_text)
    return prompt if isinstance(prompt, str) else _rendered(prompt, tokenizer)


def is_rendered(row: Row, tokenizer: PreTrainedTokenizerBase, *, plain_text: bool = False) -> bool:
    """Whether the row's prompt is written by the chat template, special tokens included."""
    if tokenizer.chat_template is None:
        return False
    if any(isinstance(row.get(column), list) for column in ("prompt", "messages", "completion", "chosen")):
        return True
    return not plain_text and row.get("prompt") is None and _MARKER.match(str(row.get("chosen"))) is not None


# -- text and messages -------------------------------------------------------------------------------------------------


def _split(row: Row, tokenizer: PreTrainedTokenizerBase, column: str, plain_text: bool) -> tuple[Said, Said, Said]:
    """(prompt, answer, rejected answer), all text or all messages; the last is the answer again where there is none."""
    answer = row.get(column)
    rejected = answer if column == "completion" or row.get("rejected") is None else row["rejected"]
    if answer is None or (row.get("prompt") is None and rejected is answer):
        given, empty = (sorted(name for name, x in row.items() if (x is None) == none) for none in (False, True))
        missing = f" (nothing in {', '.join(empty)})" if empty else ""
        raise InputError(f"no known form, got columns {given}{missing}: there must be {FORMS}")
    if isinstance(answer, str) and isinstance(rejected, str):
        if row.get("prompt") is not None:
            return _text(row, "prompt"), answer, rejected
        texts = split_dialogues(answer, rejected)
        if _MARKER.match(texts[0]) and tokenizer.chat_template is not None and not plain_text:
            prompt = _turns(texts[0].removesuffix(_ANSWER))
            one, two = ([{"role": "assistant", "content": text.strip()}] for text in texts[1:])
            return prompt, one, two
        return texts
    chosen, other = (_messages({column: x}, column) for x in (answer, rejected))
    if isinstance(row.get("prompt"), list):
        return _messages(row, "prompt"), chosen, other
    shared = 0  # without a prompt, or with it as text beside whole dialogues: what both begin with
    while shared < min(len(chosen), len(other)) - 1 and _same(chosen[shared], other[shared]):
        shared += 1
    if shared == 0:
        raise InputError(
            f"{column} is a dialogue that shares no first turn with the other: give the prompt as messages"
        )
    return chosen[:shared], chosen[shared:], other[shared:]


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen answer, rejected answer) of two whole texts that begin alike.

    In HH-RLHF's layout, "\\n\\nHuman: ... \\n\\nAssistant: ...", the prompt ends with the marker of the last turn.
    Other texts part at the last white space that they share.
    """
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    if not _MARKER.match(chosen):
        cut = max(chosen.rfind(space, 0, shared) for space in " \n") + 1
        return chosen[:cut], chosen[cut:], rejected[cut:]
    cut = chosen.rfind(_ANSWER, 0, shared) + len(_ANSWER)
    answers = chosen[cut:], rejected[cut:]
    if cut < len(_ANSWER) or any(_MARKER.search(answer) for answer in answers):
        raise Unusable("whose dialogues part before the last answer")
    if not all(answer.strip() for answer in answers):
        raise Unusable("with an empty answer")
    return chosen[:cut], *answers


def _turns(dialogue: str) -> list[Message]:
    """Messages of a text in HH-RLHF's layout."""
    pieces = _MARKER.split(dialogue)[1:]  # role, text, role, text, ...
    return [
        {"role": _ROLES[role], "content": text.strip()} for role, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _dialogue_demonstration(messages: list[Message], first: int, tokenizer: PreTrainedTokenizerBase) -> Demonstration:
    """Every assistant turn from messages[first] on is learned, with the token that ends it; what is between is read.

    Each stretch is tokenized by itself, as it is when a model answers.
    """
    prompt = done = _rendered(messages[:first], tokenizer)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    learned: list[bool] = []
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        before, after = _rendered(messages[:i], tokenizer), _rendered(messages[: i + 1], tokenizer, answering=False)
        if not before.startswith(done) or not after.startswith(before):
            raise InputError(
                "the chat template writes earlier turns differently once later ones follow, so that its turns cannot "
                "be told apart: give rows of one turn, as prompt and completion"
            )
        read = tokenizer(before[len(done) :], add_special_tokens=False)["input_ids"] if i > first else []
        said = tokenizer(_ended(after[len(before) :], tokenizer), add_special_tokens=False)["input_ids"]
        ids += [*read, *said]
        learned += [False] * len(read) + [True] * len(said)
        done = before + _ended(after[len(before) :], tokenizer)
    if not any(message["role"] == "assistant" and str(message["content"]).strip() for message in messages[first:]):
        raise Unusable("with an empty answer")
    if ids[-1] != tokenizer.eos_token_id:
        ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
    last = len(learned) - learned[::-1].index(True)
    return Demonstration(prompt_ids, ids[:last], learned[:last])


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A rendered answer up to its end-of-sequence token, where the template writes one."""
    before, eos, _ = text.rpartition(str(tokenizer.eos_token))
    return before + eos if eos else text


def _scored_text(prompt: Said, answer: Said, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        if not answer.strip():
            raise Unusable("with an empty answer")
        return prompt + answer
    assert isinstance(answer, list)
    if not str(answer[-1].get("content", "")).strip():
        raise Unusable("with an empty answer")
    text = _rendered([*prompt, *answer], tokenizer, answering=False)
    before, eos, _ = text.rpartition(str(tokenizer.eos_token))
    asked = _rendered(prompt, tokenizer)
    return before if eos and len(before) > len(asked) else text  # completions are scored without the token


def _rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, answering: bool = True) -> str:
    if tokenizer.chat_template is None:
        raise InputError(
            f"messages need a chat template, which the tokenizer of {tokenizer.name_or_path!r} does not have: use an "
            "instruction-tuned model, or rows of text"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering))


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise InputError(f"{column} must be text as the other columns are, got {type(row[column]).__name__}")
    return str(row[column])


def _messages(row: Row, column: str) -> list[Message]:
    messages = row[column]
    is_dialogue = isinstance(messages, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    )
    if not is_dialogue or not messages:
        raise InputError(f'{column} must be a list of {{"role", "content"}} messages, got {str(messages)[:60]!r}')
    return list(messages)


def _same(one: Message, other: Message) -> bool:
    return (one["role"], one["content"]) == (other["role"], other["content"])
