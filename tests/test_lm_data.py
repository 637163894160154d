"""Data sets from files, folders and hub ids: what is read, what is held out, what is left out and said."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tiny import tokenizer

from rlhf.checks import InputError
from rlhf.lm.config import SourceConfig
from rlhf.lm.data import DataConfig, load_demonstrations, load_pairs, load_prompt_task, load_splits

ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(20)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_file_is_split_in_two(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, ROWS)
    train, held_out = load_splits(DataConfig(data=str(tmp_path / name), held_out_rows=3))
    assert (len(train), len(held_out)) == (17, 3)
    assert sorted(row["prompt"] for row in [*train, *held_out]) == sorted(row["prompt"] for row in ROWS)
    again, _ = load_splits(DataConfig(data=str(tmp_path / name), held_out_rows=3))
    assert list(again) == list(train)


def test_at_most_a_fifth_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    assert len(load_splits(DataConfig(data=str(tmp_path / "rows.jsonl")))[1]) == 4


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train.parquet", "validation.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.json", "eval.json"),
        ("train.jsonl", "val.jsonl"),
        ("training.jsonl", "dev.jsonl"),
        ("train/0000.parquet", "test/0000.parquet"),
    ],
)
def test_a_folders_files_are_splits_by_their_names(names: tuple[str, str], tmp_path: Path) -> None:
    write(tmp_path / names[0], ROWS[:15])
    write(tmp_path / names[1], ROWS[15:])
    for name in ("dataset_info.json", "dataset_infos.json"):  # as in a clone of a hub data set
        (tmp_path / name).write_text("{}")
    train, held_out = load_splits(DataConfig(data=str(tmp_path)))
    assert (list(train), list(held_out)) == (ROWS[:15], ROWS[15:])


def test_splits_saved_by_datasets_and_splits_by_name(tmp_path: Path) -> None:
    parts = {"train_sft": Dataset.from_list(ROWS[:15]), "test_sft": Dataset.from_list(ROWS[15:])}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(data=str(tmp_path / "saved"), train_split="train_sft", test_split="test_sft")
    train, held_out = load_splits(config)
    assert (list(train), list(held_out)) == (ROWS[:15], ROWS[15:])
    with pytest.raises(InputError, match="no split 'train' but train_sft, test_sft"):
        load_splits(DataConfig(data=str(tmp_path / "saved")))


@pytest.mark.parametrize(
    ("names", "train_split", "sizes"),
    [
        (("train", "test"), "test", (16, 4)),  # none is left: rows of its own
        (("train", "test", "validation"), "test", (20, 1)),
        (("train", "validation"), "validation", (16, 4)),
        (("test", "validation"), "validation", (20, 1)),
    ],
)
def test_a_split_that_is_trained_on_is_not_held_out(
    names: tuple[str, ...], train_split: str, sizes: tuple[int, int], tmp_path: Path
) -> None:
    """The split that is trained on has 20 rows, the others one."""
    for name in names:
        write(tmp_path / f"{name}.jsonl", ROWS if name == train_split else [{"prompt": "1", "completion": "2"}])
    train, held_out = load_splits(DataConfig(data=str(tmp_path), train_split=train_split))
    assert (len(train), len(held_out)) == sizes
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    with pytest.raises(InputError, match=f"train_split and test_split are both '{train_split}'.*another --test-split"):
        DataConfig(data=str(tmp_path), train_split=train_split, test_split=train_split)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere.jsonl", "does not exist"),
        ("rows.csv", "must end in .jsonl, .json, .parquet"),
        ("broken.jsonl", "could not be read"),
        ("nothing.jsonl", "could not be read (it is empty"),
        ("empty", "holds no .jsonl, .json or .parquet file"),
        ("mixed", "mixes JSON and parquet"),
        ("nobody-has/these-rows", "could not be read"),
        ("one.jsonl", "has 1 rows"),
    ],
)
def test_what_cannot_be_read_is_one_error(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("prompt,completion\n1,2\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    (tmp_path / "nothing.jsonl").write_text("")
    write(tmp_path / "one.jsonl", ROWS[:1])
    write(tmp_path / "mixed" / "a.jsonl", ROWS)
    write(tmp_path / "mixed" / "b.parquet", ROWS)
    with pytest.raises(InputError) as caught:
        load_splits(DataConfig(data=path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_counted_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    long = {"prompt": "1" * 30, "completion": "2"}
    empty = {"prompt": "1", "completion": ""}
    train, held_out = load_demonstrations(([*ROWS, long, empty, long], ROWS), tokenizer, DataConfig(max_tokens=16))
    assert (len(train), len(held_out)) == (20, 20)
    assert capsys.readouterr().out == (
        "3 of 23 rows of the training data left out: 2 longer than max_tokens = 16; 1 with an empty answer\n"
    )


def test_the_longest_row_that_fits_is_kept() -> None:
    pairs = [{"prompt": "1+1=", "chosen": "2", "rejected": "34"}] * 2
    assert len(load_pairs((pairs, pairs), tokenizer, DataConfig(max_tokens=6))[0]) == 2
    with pytest.raises(InputError, match=r"no row of the training data is left of 2: 2 longer than max_tokens = 5"):
        load_pairs((pairs, pairs), tokenizer, DataConfig(max_tokens=5))


def test_a_wrong_row_is_named() -> None:
    with pytest.raises(InputError, match=r"row 2 of the held-out data: no known form, got columns \['question'\]"):
        load_demonstrations((ROWS, [ROWS[0], {"question": "1"}]), tokenizer, DataConfig())


def test_each_prompt_comes_once(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": "1+1=", "chosen": "2", "rejected": str(i)} for i in range(3, 6)])
    write(tmp_path / "test.jsonl", [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}])
    task = load_prompt_task(SourceConfig(model="m", data=str(tmp_path)), tokenizer, verifier=len)
    assert (task.train, task.held_out) == ([{"prompt": "1+1="}], [{"prompt": "2+2="}])
    assert task.metric == "score"
    assert task.add_special_tokens


def test_a_prompt_that_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    """Four rows of each prompt, split by row."""
    rows = [{"prompt": f"{i}+1=", "chosen": "2", "rejected": str(k)} for i in range(1, 10) for k in range(3, 7)]
    write(tmp_path / "rows.jsonl", rows)
    source = SourceConfig(model="m", data=str(tmp_path / "rows.jsonl"))
    task = load_prompt_task(source, tokenizer, verifier=len)
    train, held_out = ({row["prompt"] for row in part} for part in (task.train, task.held_out))
    assert train | held_out == {row["prompt"] for row in rows}
    assert not train & held_out
    write(tmp_path / "rows.jsonl", rows[:4])
    with pytest.raises(InputError, match="all 1 prompts of the training data are held-out ones too"):
        load_prompt_task(source, tokenizer, verifier=len)


def test_prompts_of_splits_by_name(tmp_path: Path) -> None:
    for name, prompt in (("train_prefs", "1+1="), ("test_prefs", "2+2=")):
        write(tmp_path / "data" / f"{name}-00000-of-00001.parquet", [{"prompt": prompt}])
    source = SourceConfig(model="m", data=str(tmp_path), train_split="train_prefs", test_split="test_prefs")
    task = load_prompt_task(source, tokenizer, verifier=len)
    assert (task.train, task.held_out) == ([{"prompt": "1+1="}], [{"prompt": "2+2="}])
