"""Tasks: the arithmetic is right, held-out problems stay out, and faulty data is one error that says what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tokenizer
from tokenizers import processors

from rlhf.checks import InputError
from rlhf.lm.config import SourceConfig
from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.rewards import Row, exact_answer, name_of
from rlhf.lm.rows import demonstration
from rlhf.lm.tasks import Task, addition_row, arithmetic, gsm8k, load_task, pad_left, tokenize_prompts
from rlhf.lm.verifier_pool import VerifierPool

QUESTION = {"question": "How many are 1 and 1?", "answer": "One more than 1.\n#### 1,002"}
PROBLEMS = [
    QUESTION,
    {"question": "And 2 and 2?", "answer": "2 + 2 = <<2+2=4>>4 #### no, #### -4 "},
]


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def folder_with(path: Path, train: Any, test: Any = PROBLEMS) -> str:
    """train.jsonl and test.jsonl; rows as lists, or a file's whole text or bytes."""
    for name, rows in (("train", train), ("test", test)):
        if rows is None:
            continue
        content = rows if isinstance(rows, str | bytes) else "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def with_template(bos: str = "") -> Any:
    chatty = build_tokenizer()
    chatty.chat_template = (
        bos + "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return chatty


# -- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "prompt", "answer"),
    [(107, 95, "107+95=", "202"), (123, 456, "123+456=", "975"), (999, 1, "999+1=", "0001"), (0, 0, "0+0=", "0")],
)
def test_an_addition_row_has_its_answer_units_first(a: int, b: int, prompt: str, answer: str) -> None:
    assert addition_row(a, b) == {"prompt": prompt, "answer": answer}


@pytest.fixture(scope="module")
def sums() -> Task:
    return arithmetic()


def test_every_sum_is_right_and_of_the_size_promised(sums: Task) -> None:
    assert (len(sums.train), len(sums.held_out)) == (20_000, 512)
    for row in (*sums.train, *sums.held_out):
        a, b = row["prompt"].removesuffix("=").split("+")
        assert len(a) == len(b) == 3
        assert "0" not in (a[0], b[0])
        assert int(row["answer"][::-1]) == int(a) + int(b)
        assert not row["answer"].endswith("0")


def test_held_out_sums_are_never_trained_on(sums: Task) -> None:
    train, held_out = ({row["prompt"] for row in rows} for rows in (sums.train, sums.held_out))
    assert (len(train), len(held_out)) == (20_000, 512), "none occurs twice"
    assert not train & held_out


def test_problems_are_the_same_whatever_the_seed(sums: Task) -> None:
    torch.manual_seed(12345)
    assert arithmetic() == sums
    assert load_task(SourceConfig(), tokenizer) == sums
    assert sums.verifier is exact_answer


def test_digits_are_uniform(sums: Task) -> None:
    first = torch.tensor([int(row["prompt"][:3]) for row in sums.train])
    second = torch.tensor([int(row["prompt"][4:7]) for row in sums.train])
    for numbers in (first, second):  # uniform on 100..999: mean 549.5, standard deviation 259.8
        assert abs(float(numbers.double().mean()) - 549.5) < 5 * 259.8 / 20_000**0.5
        assert (int(numbers.min()), int(numbers.max())) == (100, 999)
    assert abs(float(torch.corrcoef(torch.stack([first, second]).double())[0, 1])) < 5 / 20_000**0.5


def test_smaller_arithmetic() -> None:
    task = arithmetic(digits=1, train=60, held_out=21)
    prompts = [row["prompt"] for row in (*task.train, *task.held_out)]
    assert sorted(prompts) == sorted(f"{a}+{b}=" for a in range(1, 10) for b in range(1, 10))


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="81"):
        arithmetic(digits=1, train=100, held_out=21)


# -- gsm8k ----------------------------------------------------------------------------------------------------------


def test_gsm8k_in_plain_text(tmp_path: Path) -> None:
    data = folder_with(tmp_path, PROBLEMS, [QUESTION])
    task = load_task(SourceConfig(model="m", task="gsm8k", data=data, plain_prompts=True), tokenizer)
    assert [row["answer"] for row in task.train] == ["1002", "-4"], "the number after the last ####, without commas"
    assert [row["prompt"] for row in task.train] == [f"Question: {row['question']}\nAnswer:" for row in PROBLEMS]
    assert [row["answer"] for row in task.held_out] == ["1002"]
    assert isinstance(task.verifier, VerifierPool)
    assert name_of(task.verifier) == "math_answer"
    assert task.verifier(["?"] * 2, ["it is 1,002", "\\boxed{4}"], answer=["1002", "-4"]) == [1.0, 0.0]


def test_gsm8k_through_the_chat_template(tmp_path: Path) -> None:
    prompt = gsm8k(folder_with(tmp_path, PROBLEMS), with_template()).train[0]["prompt"]
    assert prompt.startswith(f"[user] {QUESTION['question']}\n")
    assert "\\boxed{" in prompt
    assert prompt.endswith("\n[assistant]")
    assert prompt.count("[user]") == 1


def starting(tokenizer: Any) -> Any:
    """Makes it put "?" before every text unless told to add no special tokens, as Llama's does with its <s>."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="? $A", special_tokens=[("?", tokenizer.unk_token_id)]
    )
    return tokenizer


def test_a_start_token_that_the_template_writes_is_not_added_again(tmp_path: Path) -> None:
    chatty = starting(with_template(bos="?"))
    task = gsm8k(folder_with(tmp_path, [{"question": "1", "answer": "#### 1"}]), chatty)
    _, (ids,) = tokenize_prompts(task.train, chatty, max_prompt_tokens=1000, add_special_tokens=task.add_special_tokens)
    assert len(ids) == len(task.train[0]["prompt"]), "one token per character"
    assert ids[:2] == chatty.convert_tokens_to_ids(["?", "["])


def test_a_plain_prompt_gets_the_start_token_the_model_was_trained_with() -> None:
    plain = starting(build_tokenizer())
    assert tokenize_prompts([{"prompt": "1+1="}], plain, max_prompt_tokens=9)[1] == [plain("1+1=")["input_ids"]]


def test_a_prompt_does_not_end_the_sequence() -> None:
    """With a tokenizer that ends every text."""
    ending = build_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {ending.eos_token}", special_tokens=[(ending.eos_token, ending.eos_token_id)]
    )
    assert ending("1+1=")["input_ids"][-1] == ending.eos_token_id
    assert tokenize_prompts([{"prompt": "1+1="}], ending, max_prompt_tokens=9)[1] == [[6, 3, 6, 4]]
    with_end = demonstration({"prompt": "1+1=", "completion": "2"}, ending)
    assert with_end == demonstration({"prompt": "1+1=", "completion": "2"}, tokenizer)
    assert demonstration({"text": "1+1=2"}, ending) == demonstration({"text": "1+1=2"}, tokenizer)


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (None, r"train\.jsonl does not exist.*folder with train\.jsonl and test\.jsonl"),
        ('{"question": "a', "could not be read.*one JSON object"),
        (json.dumps(QUESTION) + "\n[1, 2]\n", "could not be read.*one JSON object"),
        ("", r"no rows|could not be read"),
        (b'{"question": "\xff\xfe", "answer": "#### 1"}', "could not be read"),
        ([{"question": "a"}, QUESTION], "row 1 of train has no text in column 'answer'"),
        ([QUESTION, {"answer": "#### 1"}], "row 2 of train has no text in column 'question'"),
        ([QUESTION, {"question": "a", "answer": None}], "row 2 of train has no text in column 'answer', got None"),
        ([QUESTION, {"question": "a", "answer": "so it is 3"}], "row 2 of train.*'#### <number>', got 'so it is 3'"),
        ([QUESTION, {"question": "a", "answer": "so it is ####"}], "row 2 of train.*'#### <number>'"),
    ],
    ids=["missing", "broken", "no object", "empty", "no utf-8", "no answer", "no question", "null", "no ####", "blank"],
)
def test_faulty_data_is_one_error_that_says_where(tmp_path: Path, train: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        gsm8k(folder_with(tmp_path, train), tokenizer, plain_prompts=True)
    assert "\n" not in str(caught.value)


def test_a_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    data = folder_with(tmp_path, [{"question": "a"}], [{"question": "b"}])
    with pytest.raises(InputError, match="row 1 of train has no text in column 'answer'"):
        gsm8k(data, tokenizer, plain_prompts=True)


def test_a_missing_test_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"test\.jsonl does not exist"):
        gsm8k(folder_with(tmp_path, PROBLEMS, None), tokenizer, plain_prompts=True)


@pytest.mark.parametrize("data", ["nobody-has/this-data", "./nowhere", "/nowhere"])
def test_data_that_is_nowhere(data: str) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl and test\.jsonl") as caught:
        gsm8k(data, tokenizer, plain_prompts=True)
    assert data.removeprefix("./") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("chess", None, "unknown task 'chess': choose one of arithmetic, gsm8k, reasoning_gym"),
        ("gsm8k", None, "needs --data"),
        ("gsm8k", "anywhere", "no chat template.*--plain-prompts"),
        ("arithmetic", "anywhere", "takes no data, got 'anywhere'"),
    ],
)
def test_load_task_refuses(name: str, data: str | None, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_task(SourceConfig(model="m", task=name, data=data), tokenizer)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("arithmetic", {"instruction": "Think."}),
        ("arithmetic", {"plain_prompts": True}),
        ("arithmetic", {"verifier_timeout": 1.0}),
        ("gsm8k", {"partial_credit": True}),
        ("gsm8k", {"reward_model": "somewhere"}),
        ("reasoning_gym", {"train_split": "test"}),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(task: str, options: dict[str, Any]) -> None:
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(InputError, match=f"{flag} .* does nothing in task '{task}'"):
        load_task(SourceConfig(model="m", task=task, **options), tokenizer)


# -- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_up_to_the_limit_pass() -> None:
    rows = [{"prompt": "1+1="}, {"prompt": "12+12="}]
    assert tokenize_prompts(rows, tokenizer, max_prompt_tokens=6)[1] == [[6, 3, 6, 4], [6, 7, 3, 6, 7, 4]]


def test_a_long_prompt_says_what_to_pass() -> None:
    rows = [{"prompt": "1+1="}, {"prompt": "12+123="}, {"prompt": "12+12="}]
    with pytest.raises(
        InputError,
        match=r"2 of 3 prompts .*_tokens = 5; .*row 2, has 7 .*--max-prompt-tokens 7, or --drop-long-prompts",
    ):
        tokenize_prompts(rows, tokenizer, max_prompt_tokens=5)
    kept, token_ids = tokenize_prompts(rows, tokenizer, max_prompt_tokens=5, drop_long=True)
    assert kept == rows[:1]
    assert list(map(len, token_ids)) == [4]
    with pytest.raises(InputError, match=r"3 of 3.*without them none is left"):
        tokenize_prompts(rows, tokenizer, max_prompt_tokens=3, drop_long=True)
    assert tokenize_prompts(rows, tokenizer, max_prompt_tokens=7)[0] == rows


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="row 2 has an empty prompt"):
        tokenize_prompts([{"prompt": "1"}, {"prompt": ""}], tokenizer, max_prompt_tokens=5)


@pytest.mark.parametrize("row", [{"prompt": [{"role": "user", "content": "1+1="}]}, {"prompt": 3}, {"question": "1"}])
def test_a_prompt_that_is_no_text_is_refused(row: Row) -> None:
    with pytest.raises(InputError, match=r"row 2 must have a column prompt with text, got .*apply_chat_template"):
        tokenize_prompts([{"prompt": "1"}, row], tokenizer, max_prompt_tokens=5)


def test_pad_left_puts_each_row_at_the_right_end() -> None:
    ids, mask = pad_left([[5, 6], [7], []], width=3, pad_token_id=9)
    assert ids.tolist() == [[9, 5, 6], [9, 9, 7], [9, 9, 9]]
    assert mask.tolist() == [[False, True, True], [False, False, True], [False] * 3]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_a_pad_token_in_the_prompt_is_not_padding() -> None:
    assert pad_left([[9, 5]], width=3, pad_token_id=9)[1].tolist() == [[False, True, True]]
