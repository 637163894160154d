"""Demonstrations and preferences from files, folders and hub ids; `rlhf.lm.rows` says in which forms."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from rlhf.checks import InputError, brief, check_range
from rlhf.lm.config import SourceConfig
from rlhf.lm.rewards import RewardFunction, Row
from rlhf.lm.rows import Demonstration, Pair, Unusable, demonstration, is_rendered, pair, prompt_text
from rlhf.lm.tasks import Task

T = TypeVar("T")
NAMES = ("the training data", "the held-out data")
HELD_OUT_SPLITS = ("test", "validation", "eval")
_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class DataConfig:
    """What is trained on what."""

    model: str | None = None
    """Folder or hub id of a pretrained model."""
    data: str | None = None
    """A .jsonl, .json or .parquet file, a folder of them (train and test in the names of files or folders, or saved by
    datasets), or a hub id; None: rows are made up on the spot."""
    data_name: str | None = None
    """Which configuration of a hub data set."""
    train_split: str = "train"
    """The split to train on."""
    test_split: str | None = None
    """The held-out split; None: test, validation or eval if there is one that is not trained on, else rows taken from
    the training split."""
    held_out_rows: int = 256
    """How many rows to take from the training split where there is no other; at most a fifth of them."""
    max_tokens: int = 512
    """Longest row, prompt and answer together; longer ones are left out, and counted."""
    plain_text: bool = False
    """HH-RLHF's dialogues as they are written, even where the tokenizer has a chat template."""

    def __post_init__(self) -> None:
        check_range("held_out_rows", self.held_out_rows, low=1)
        check_range("max_tokens", self.max_tokens, low=2)
        if self.test_split == self.train_split:
            raise InputError(
                f"train_split and test_split are both {self.train_split!r}, and what is trained on cannot be held out: "
                "pass another --test-split, or none to hold out rows of the training split"
            )


def load_splits(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and held-out rows of `config.data`.

    Raises:
        InputError: nothing is there, it cannot be read, it lacks a split or has no rows.
    """
    assert config.data is not None
    path = Path(config.data).expanduser()
    is_local = path.exists() or config.data.startswith((".", "/", "~"))
    if is_local and not path.exists():
        raise InputError(
            f"data {config.data!r} does not exist: give a .jsonl, .json or .parquet file, a folder, a hub id"
        )
    try:
        loaded = _load_local(path, config.data_name) if is_local else load_dataset(config.data, config.data_name)
    except InputError:
        raise
    except Exception as error:  # datasets raises its own, pyarrow's, the network's and builtin errors alike
        raise InputError(
            f"the data at {config.data!r} could not be read ({brief(error)}): give a .jsonl, .json or .parquet file, a "
            "folder of them, or a hub id (--data-name for its configuration)"
        ) from error
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({config.train_split: loaded})
    for name in (config.train_split, config.test_split):
        if name is not None and name not in splits:
            raise InputError(
                f"{config.data!r} has no split {name!r} but {', '.join(splits)}: pass --train-split, --test-split"
            )
    train = splits[config.train_split]
    others = (name for name in HELD_OUT_SPLITS if name in splits and name != config.train_split)
    name = config.test_split or next(others, None)
    if name is None:
        if len(train) < 2:
            raise InputError(
                f"{config.data!r} has {len(train)} rows: there must be one to train on and one to hold out"
            )
        halves = train.train_test_split(test_size=max(min(config.held_out_rows, len(train) // 5), 1), seed=0)
        return halves["train"], halves["test"]
    if not len(train) or not len(splits[name]):
        raise InputError(
            f"{config.data!r} has {len(train)} training and {len(splits[name])} held-out rows: give some of both"
        )
    return train, splits[name]


def _load_local(path: Path, name: str | None) -> Dataset | DatasetDict:
    if path.is_file():
        return load_dataset(_format_of(path), data_files={"train": str(path)})
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return load_from_disk(str(path))
    files = [file for file in path.rglob("*") if file.suffix in _FILES and not file.name.startswith("dataset_info")]
    if not files:
        raise InputError(f"folder {path} holds no .jsonl, .json or .parquet file")
    if len({_format_of(file) for file in files}) > 1:
        raise InputError(f"folder {path} mixes JSON and parquet files: give one kind, or one file")
    return load_dataset(str(path), name)  # knows splits by the names of files and folders, or a dataset card


def _format_of(path: Path) -> str:
    if path.suffix not in _FILES:
        raise InputError(f"data file {path} must end in {', '.join(_FILES)}")
    return _FILES[path.suffix]


def tokenized(
    rows: Iterable[Row],
    convert: Callable[[Row], T],
    *,
    name: str,
    max_tokens: int | None = None,
    length: Callable[[T], int] = lambda x: 0,
) -> list[T]:
    """Each row converted; those that cannot serve are left out, and a line is printed that counts them by reason.

    Raises:
        InputError: a row has none of the known forms (names row and columns), or no row is left.
    """
    kept: list[T] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        try:
            found = convert(row)
            if max_tokens is not None and length(found) > max_tokens:
                raise Unusable(f"longer than max_tokens = {max_tokens}")
        except Unusable as reason:
            dropped[str(reason)] += 1
        except InputError as error:
            raise InputError(f"row {number} of {name}: {error}") from None
        else:
            kept.append(found)
    reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    if not kept:
        advice = "see to the data" if max_tokens is None else "raise --max-tokens or see to the data"
        raise InputError(f"no row of {name} is left of {dropped.total()}: {reasons}; {advice}")
    if dropped:
        print(f"{dropped.total()} of {dropped.total() + len(kept)} rows of {name} left out: {reasons}")
    return kept


def load_demonstrations(
    splits: tuple[Sequence[Row], Sequence[Row]] | tuple[Dataset, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Training and held-out demonstrations; see `tokenized`."""
    convert = partial(demonstration, tokenizer=tokenizer, plain_text=config.plain_text)
    return _both(convert, splits, config)


def load_pairs(
    splits: tuple[Sequence[Row], Sequence[Row]] | tuple[Dataset, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; see `tokenized`."""
    convert = partial(pair, tokenizer=tokenizer, plain_text=config.plain_text)
    return _both(convert, splits, config)


R = TypeVar("R", Demonstration, Pair)


def _both(
    convert: Callable[[Row], R], splits: tuple[Iterable[Any], Iterable[Any]], config: DataConfig
) -> tuple[list[R], list[R]]:
    one, two = (
        tokenized(rows, convert, max_tokens=config.max_tokens, name=name, length=lambda x: x.tokens)
        for rows, name in zip(splits, NAMES, strict=True)
    )
    return one, two


def load_prompt_task(source: SourceConfig, tokenizer: PreTrainedTokenizerBase, *, verifier: RewardFunction) -> Task:
    """The prompts of rows of any form, each once, as a task; `verifier` is reported on held-out ones as "score".

    What is held out is not trained on, whatever the splits say: rows of one prompt may lie on both sides.

    Raises:
        InputError: as `load_splits` and `prompt_text`; or every prompt is held out.
    """
    data = DataConfig(
        data=source.data,
        data_name=source.data_name,
        train_split=source.train_split,
        test_split=source.test_split,
        plain_text=source.plain_prompts,
    )
    convert = partial(prompt_text, tokenizer=tokenizer, plain_text=source.plain_prompts)
    splits = load_splits(data)
    train, held_out = (
        dict.fromkeys(tokenized(rows, convert, name=name)) for rows, name in zip(splits, NAMES, strict=True)
    )
    rest = [text for text in train if text not in held_out]
    if not rest:
        raise InputError(f"all {len(train)} prompts of the training data are held-out ones too: give others of either")
    # What a chat template has written holds its special tokens already.
    rendered = is_rendered(splits[0][0], tokenizer, plain_text=source.plain_prompts)
    train_rows, held_out_rows = ([{"prompt": text} for text in texts] for texts in (rest, held_out))
    return Task("preference", train_rows, held_out_rows, verifier, metric="score", add_special_tokens=not rendered)
