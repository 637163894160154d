"""The embedded model: a tokenizer that loses nothing, and a teacher whose mistakes have a closed form."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import padded_prompts, tokenizer
from transformers import AutoTokenizer

from rlhf.lm.embedded import build_model, build_taught_model, encode_demonstrations, sum_forgetting_carries
from rlhf.lm.generation import TransformersEngine
from rlhf.lm.rewards import exact_answer
from rlhf.lm.sft import negative_log_likelihood
from rlhf.lm.tasks import Task, addition_row

NEVER, ALWAYS = [False] * 8, [True] * 8


@given(st.text("0123456789+=", min_size=1))
def test_tokens_and_text_are_one_to_one(text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, 0, 0], skip_special_tokens=True) == text


def test_the_vocabulary_is_digits_signs_and_special_tokens() -> None:
    assert len(tokenizer) == 15
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer("1a2")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer.padding_side == "left"


def test_the_tokenizer_is_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    batch = ["12+345=", "7"]
    assert loaded(batch, padding=True)["input_ids"] == tokenizer(batch, padding=True)["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert (loaded.padding_side, loaded.chat_template) == ("left", None)
    assert loaded.decode(loaded("12+3=")["input_ids"]) == "12+3="


def test_the_model_is_a_function_of_its_seed() -> None:
    one, same, other = (build_model(seed, tokenizer).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)


def test_the_model_is_as_large_as_its_docstring_says() -> None:
    assert build_model(0, tokenizer).config.vocab_size == len(tokenizer)
    thousands = sum(p.numel() for p in build_model(0, tokenizer).parameters()) // 1000
    assert f" {thousands} thousand parameters" in build_model.__doc__


@given(a=st.integers(100, 999), b=st.integers(100, 999))
def test_never_forgetting_is_the_true_sum(a: int, b: int) -> None:
    row = addition_row(a, b)
    assert sum_forgetting_carries(row["prompt"], NEVER) == row["answer"]


@given(a=st.integers(100, 999), b=st.integers(100, 999))
def test_always_forgetting_is_the_sum_digit_by_digit(a: int, b: int) -> None:
    digits = [str((int(x) + int(y)) % 10) for x, y in zip(str(a)[::-1], str(b)[::-1], strict=True)]
    assert sum_forgetting_carries(f"{a}+{b}=", ALWAYS) == "".join(digits)


@given(a=st.integers(100, 999), b=st.integers(100, 999))
def test_each_forgotten_carry_is_worth_a_power_of_ten(a: int, b: int) -> None:
    """A sum without the carry out of digit i is smaller by 10^(i+1), if there was one."""
    for forgets in itertools.product([False, True], repeat=3):
        answer = int(sum_forgetting_carries(f"{a}+{b}=", [*forgets])[::-1])
        lost, carry = 0, 0
        for i in range(3):
            carry = (a // 10**i % 10 + b // 10**i % 10 + carry) // 10
            if carry and forgets[i]:
                lost, carry = lost + 10 ** (i + 1), 0
        assert answer == a + b - lost


def test_the_docstrings_own_example() -> None:
    assert sum_forgetting_carries("107+95=", NEVER) == "202"


def test_demonstrations_mark_the_answer_and_its_end() -> None:
    rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "12+99=", "answer": "111"}]
    batch = encode_demonstrations(rows, tokenizer)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    shown = [tokenizer.convert_ids_to_tokens(ids) for ids in batch.sequence_ids.tolist()]
    assert shown == [
        ["<pad>", "<pad>", *"1+2=", "3", "<eos>", "<pad>", "<pad>"],
        [*"12+99=", *"111", "<eos>"],
    ]
    assert batch.action_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.attention_mask.tolist() == [[False] * 2 + [True] * 6 + [False] * 2, [True] * 10]
    assert pad != end


def test_only_the_answer_is_learnt() -> None:
    """The loss is the mean over answer tokens: a prompt's own likelihood does not enter it."""
    model = build_model(0, tokenizer)
    rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "12+99=", "answer": "111"}]
    with torch.no_grad():
        found = negative_log_likelihood(model, encode_demonstrations(rows, tokenizer))
        total, count = 0.0, 0
        for row in rows:
            prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "answer"))
            answer = [*answer, tokenizer.eos_token_id]
            log_probs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total -= float(log_probs[torch.arange(len(answer)), answer].sum())
            count += len(answer)
    assert float(found) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(("forget_carry", "right"), [(0.0, "1111"), (1.0, "100")])
def test_the_pupil_learns_what_it_is_shown(forget_carry: float, right: str) -> None:
    rows = [{"prompt": "112+999=", "answer": "not shown"}]
    task = Task("one sum", rows, rows, exact_answer)
    model = build_taught_model(
        0, tokenizer, task, forget_carry=forget_carry, steps=40, batch_size=4, learning_rate=1e-2
    )
    assert not model.training
    engine = TransformersEngine(model, eos_token_ids={tokenizer.eos_token_id}, pad_token_id=tokenizer.pad_token_id)
    found = engine.generate(*padded_prompts(["112+999="]), max_new_tokens=5, temperature=1.0, seeds=None)
    assert tokenizer.decode(found.token_ids[0], skip_special_tokens=True) == right
    assert found.is_finished.all()
