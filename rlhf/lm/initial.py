"""A run's first actor in its folder: the reference, and what a resumed run starts from."""

import json
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.lm.lora import bare
from rlhf.lm.models import load_actor
from rlhf.run import CheckpointError

INITIAL = "initial"  # in the run folder
_ORIGIN = "origin.json"


class Origin(NamedTuple):
    """What a saved model does not say of itself."""

    name: str  # folder or hub id that it came from, or empty
    attention: str  # attn_implementation
    frozen: list[str]  # parameters that are not trained


def origin_of(actor: PreTrainedModel) -> Origin:
    """Of an actor as it was made, before adapters."""
    frozen = [name for name, parameter in actor.named_parameters() if not parameter.requires_grad]
    return Origin(actor.config.name_or_path or "", actor.config._attn_implementation or "eager", frozen)


def save_initial(actor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: Origin, run: Path) -> None:
    """The actor without adapters and as it was loaded, quantised or not, with its origin."""
    folder = run / INITIAL
    bare(actor).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / _ORIGIN).write_text(json.dumps(origin._asdict(), indent=1))


def load_initial(run: Path) -> tuple[PreTrainedModel, Origin]:
    """The inverse of `save_initial`.

    Raises:
        CheckpointError: the folder is not whole.
    """
    folder = run / INITIAL
    try:
        origin = Origin(**json.loads((folder / _ORIGIN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} does not hold the run's first actor ({error}): start a new run") from error
    actor = load_actor(str(folder), dtype="auto", attention=origin.attention)
    actor.config.name_or_path = origin.name
    for name, parameter in actor.named_parameters():
        if name in origin.frozen:
            parameter.requires_grad_(False)
    return actor, origin
