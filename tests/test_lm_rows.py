"""Rows of data sets in the forms people have: what is prompt, what is answer, what is learned."""

from typing import Any

import pytest
import torch
from tiny import encode, tiny_config
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf.checks import InputError
from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.rewards import RewardModel
from rlhf.lm.rows import Demonstration, Pair, Unusable, demonstration, is_rendered, pair, prompt_text, split_dialogues
from rlhf.lm.tasks import tokenize_prompts

CHAT = (
    "{% for m in messages %}{{ '?' if m['role'] == 'user' else '=' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}+{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
"""Users' turns after "?", the assistant's between "=" and the end-of-sequence token; "+" after it."""


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def chat() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def with_bos() -> PreTrainedTokenizerFast:
    """As Llama 3's: the template writes the first token, and the tokenizer adds it to every text. Here it is "?"."""
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "?"
    tokenizer.chat_template = "{{ bos_token }}" + CHAT.replace("'?'", "'+'")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="? $A", special_tokens=[("?", tokenizer.bos_token_id)]
    )
    return tokenizer


def ids(text: str) -> list[int]:
    """Tokens of a text in which "$" is the end-of-sequence token."""
    eos = build_tokenizer().eos_token_id
    return [eos if character == "$" else encode([character])[0][0] for character in text]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shown(found: Demonstration) -> tuple[list[int], list[int], list[int]]:
    """Prompt, completion, and the learned part of the completion."""
    learned = [token for token, yes in zip(found.completion_ids, found.learned, strict=True) if yes]
    return found.prompt_ids, found.completion_ids, learned


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+2=", "completion": "3"},
        {"prompt": "1+2=", "chosen": "3", "rejected": "4"},
        {"prompt": "1+2=", "chosen": "3", "rejected": None, "completion": None},
    ],
)
def test_text_is_prompt_completion_and_an_end(row: dict[str, Any], plain: PreTrainedTokenizerFast) -> None:
    assert shown(demonstration(row, plain)) == (ids("1+2="), ids("3$"), ids("3$"))


def test_all_of_a_text_but_its_first_token_is_learned(plain: PreTrainedTokenizerFast) -> None:
    assert shown(demonstration({"text": "123"}, plain)) == (ids("1"), ids("23$"), ids("23$"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("1")], "completion": [assistant("2")]},
        {"messages": [user("1"), assistant("2")]},
        {"prompt": [user("1")], "chosen": [assistant("2")], "rejected": [assistant("3")]},
        {"chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("3")]},
        {"prompt": "1", "chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("3")]},
    ],
)
def test_messages_are_rendered_with_the_chat_template(row: dict[str, Any], chat: PreTrainedTokenizerFast) -> None:
    """The turn ends with its end-of-sequence token: what the template writes after that is no part of the answer."""
    assert shown(demonstration(row, chat)) == (ids("?1="), ids("2$"), ids("2$"))


def test_every_answer_of_a_dialogue_is_learned_and_nothing_between_them(chat: PreTrainedTokenizerFast) -> None:
    row = {"messages": [user("1"), assistant("2"), user("3"), assistant("4"), user("5")]}
    assert shown(demonstration(row, chat)) == (ids("?1="), ids("2$+?3=4$"), ids("2$4$"))


def test_a_template_without_an_end_gets_one(plain: PreTrainedTokenizerFast) -> None:
    plain.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    with pytest.raises(InputError, match="writes earlier turns differently"):
        demonstration({"messages": [user("1"), assistant("2")]}, plain)
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    assert shown(demonstration({"messages": [user("1"), assistant("2")]}, plain))[2] == ids("2=$")


DIALOGUE = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (" 45", " 67"),
        (" 45", " 46"),  # answers that begin alike
        (" 45", " 4"),  # one the beginning of the other
        (" \n\n4", " \n\n5"),  # paragraphs
        (" Human: 4", " Assistant: 5"),  # names that are no markers
    ],
)
def test_two_dialogues_part_after_the_last_marker(chosen: str, rejected: str) -> None:
    assert split_dialogues(DIALOGUE + chosen, DIALOGUE + rejected) == (DIALOGUE, chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (DIALOGUE + " 4", DIALOGUE, "empty answer"),
        (DIALOGUE + " \n", DIALOGUE + " 4", "empty answer"),
        (DIALOGUE + " 4\n\nHuman: 5\n\nAssistant: 6", DIALOGUE + " 7", "part before the last answer"),
        (DIALOGUE + " 4", DIALOGUE + " 4\n\nHuman: 5", "part before the last answer"),
        (DIALOGUE + " 4\n\nAssistant: 5", DIALOGUE + " 6", "part before the last answer"),
        ("\n\nHuman: 1\n\nAssistant: 2", "\n\nHuman: 3\n\nAssistant: 4", "part before the last answer"),
        ("\n\nHuman: 1", "\n\nHuman: 2", "part before the last answer"),
    ],
)
def test_dialogues_that_do_not_share_all_but_the_last_answer_are_left_out(
    chosen: str, rejected: str, reason: str
) -> None:
    with pytest.raises(Unusable, match=reason):
        split_dialogues(chosen, rejected)


def test_other_texts_part_at_the_last_space_that_they_share() -> None:
    assert split_dialogues("what is 12 then", "what is 13 then") == ("what is ", "12 then", "13 then")
    assert split_dialogues("one", "two") == ("", "one", "two")


def test_hh_dialogues_go_through_a_chat_template_where_there_is_one(
    chat: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast
) -> None:
    row = {"chosen": DIALOGUE + " 4", "rejected": DIALOGUE + " 5"}
    assert prompt_text(row, chat) == f"?1=2{chat.eos_token}+?3="
    assert shown(demonstration(row, chat))[1] == ids("4$")
    assert prompt_text(row, plain) == prompt_text(row, chat, plain_text=True) == DIALOGUE


def test_a_pair_is_what_the_reward_model_scores_later(chat: PreTrainedTokenizerFast) -> None:
    """Prompt and answer without the end-of-sequence token: completions come as text, which does not have it."""
    text = pair({"prompt": "1+2=", "chosen": "3", "rejected": "45", "margin": 2}, chat)
    assert text == Pair(ids("1+2=3"), ids("1+2=45"), 2.0)
    messages = {"prompt": [user("1")], "chosen": [assistant("2")], "rejected": [assistant("3")]}
    assert pair(messages, chat) == Pair(ids("?1=2"), ids("?1=3"), 0.0)
    dialogues = {"chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("3")]}
    assert pair(dialogues, chat) == Pair(ids("?1=2"), ids("?1=3"), 0.0)


@pytest.mark.parametrize(
    ("row", "prompt", "text"),
    [
        ({"prompt": [user("1")], "chosen": [assistant("2")], "rejected": [assistant("3")]}, "?+1=", "?+1=2"),
        ({"prompt": "1=", "chosen": "2", "rejected": "3"}, "1=", "?1=2"),
        ({"prompt": "?1=", "chosen": "2", "rejected": "3"}, "?1=", "?1=2"),
    ],
    ids=["written by the template", "added by the tokenizer", "written in the row"],
)
def test_a_first_token_that_tokenizers_add_is_there_once(
    row: dict[str, Any], prompt: str, text: str, with_bos: PreTrainedTokenizerFast
) -> None:
    """In what the reward model learns, in what it scores later, in what the actor reads and was fine-tuned on."""
    assert prompt_text(row, with_bos) == prompt
    assert pair(row, with_bos).chosen_ids == ids(text)
    scored: list[list[int]] = []
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1))
    model.register_forward_pre_hook(
        lambda _, args, inputs: scored.append(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    RewardModel(model, with_bos)([prompt], ["2"])
    assert scored == [ids(text)]
    asked = text.removesuffix("2")
    assert demonstration(row, with_bos).prompt_ids == ids(asked)
    rendered = is_rendered(row, with_bos)
    _, read = tokenize_prompts([{"prompt": prompt}], with_bos, max_prompt_tokens=9, add_special_tokens=not rendered)
    assert read == [ids(asked)]


def test_a_whole_text_with_its_first_token_written_has_it_once(with_bos: PreTrainedTokenizerFast) -> None:
    for text in ("?12", "12"):
        assert shown(demonstration({"text": text}, with_bos)) == (ids("?"), ids("12$"), ids("12$"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1", "chosen": "2", "rejected": "2"},
        {"prompt": "1", "chosen": "2", "rejected": " "},
        {"prompt": [user("1")], "chosen": [assistant("")], "rejected": [assistant("2")]},
    ],
)
def test_a_pair_without_two_answers_is_left_out(row: dict[str, Any], chat: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Unusable):
        pair(row, chat)


def test_prompts_of_every_form(chat: PreTrainedTokenizerFast) -> None:
    assert prompt_text({"prompt": "1+2="}, chat) == "1+2="
    assert prompt_text({"prompt": [user("1")]}, chat) == "?1="
    assert prompt_text({"prompt": "1+", "completion": "2"}, chat) == "1+"
    assert prompt_text({"messages": [user("1"), assistant("2")]}, chat) == "?1="
    assert prompt_text({"messages": [user("1")]}, chat) == "?1="


@pytest.mark.parametrize("more", [[], [user("2")]])
def test_a_dialogue_that_the_assistant_opens_asks_nothing(
    more: list[dict[str, str]], chat: PreTrainedTokenizerFast
) -> None:
    for read in (demonstration, prompt_text):
        with pytest.raises(Unusable, match="without an assistant's turn that answers something"):
            read({"messages": [assistant("1"), *more]}, chat)


def test_a_prompt_is_rendered_where_its_text_is_not_the_rows(
    chat: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast
) -> None:
    """What the chat template wrote holds its special tokens; other prompts get them from the tokenizer."""
    rows: list[dict[str, Any]] = [
        {"prompt": "1+2="},
        {"prompt": "1+", "chosen": "2", "rejected": "3"},
        {"chosen": "1 2", "rejected": "1 3"},
        {"prompt": [user("1")]},
        {"messages": [user("1"), assistant("2")]},
        {"chosen": DIALOGUE + " 4", "rejected": DIALOGUE + " 5"},
        {"prompt": "1", "chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("3")]},
    ]
    for row, rendered in zip(rows, [False] * 3 + [True] * 4, strict=True):
        assert is_rendered(row, chat) == rendered
        assert prompt_text(row, chat).startswith("?") == rendered
        assert not is_rendered(row, plain)
    assert not is_rendered(rows[5], chat, plain_text=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1"}, "no known form, got columns ['question']"),
        ({"prompt": "1"}, "no known form"),
        ({"chosen": "1 2"}, "no known form"),
        ({"prompt": ["1"], "completion": "2"}, "prompt must be text as the other columns are, got list"),
        ({"prompt": "1", "completion": ["2"]}, 'must be a list of {"role", "content"} messages'),
        ({"messages": "1"}, 'messages must be a list of {"role", "content"} messages'),
        ({"text": 3}, "text must be text"),
        ({"prompt": "1", "completion": None}, "got columns ['prompt'] (nothing in completion): there must be"),
        ({"chosen": [assistant("1")], "rejected": [assistant("2")]}, "shares no first turn"),
    ],
)
def test_what_is_no_demonstration_is_one_error_that_says_what_was_given(
    row: dict[str, Any], message: str, chat: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError) as caught:
        demonstration(row, chat)
    assert message in str(caught.value)


def test_messages_need_a_chat_template(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="chat template"):
        demonstration({"messages": [user("1"), assistant("2")]}, plain)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1", "completion": "2"}, "needs chosen and rejected"),
        ({"prompt": "1", "chosen": "2", "rejected": "3", "margin": "much"}, "margin must be a number"),
    ],
)
def test_what_is_no_preference_is_an_error(row: dict[str, Any], message: str, plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=message):
        pair(row, plain)
