"""A training state as two files without code in them: tensors.safetensors, and state.json for all the rest.

In state.json a dict is {"dict": [[key, value], ...]}, a tuple {"tuple": [...]}, a tensor {"tensor": name} and a
float that JSON has no word for {"float": "nan"}. Every dict of the user's is wrapped, so none of its keys can be
taken for one of these marks.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.checks import InputError
from rlhf.run.atomic import written_aside

_TENSORS = "tensors.safetensors"
_TREE = "state.json"
_FORMAT = 1
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
_ALLOWED = "dict (str or int keys), list, tuple, torch.Tensor, int, float, str, bool or None"


class CheckpointError(InputError):
    """A checkpoint's file is missing or damaged; the message names the file."""


class _FoundTensors:
    """The tensors met on the way through a state, each under the name of the place where it was met first."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._name_of: dict[tuple[object, ...], str] = {}

    def name(self, tensor: Tensor, path: str) -> str:
        """The tensor's name in the file; tensors that are the same memory in the same shape get one name."""
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg())
        if memory not in self._name_of:
            self._name_of[memory] = name = self._unused(path)
            self.by_name[name] = tensor
        return self._name_of[memory]

    def _unused(self, path: str) -> str:
        """`path`, numbered if two places read alike ({"a.b": x} and {"a": {"b": y}}) or safetensors reserves it."""
        wanted = path.encode("utf-8", "backslashreplace").decode()
        name, count = wanted, 1
        while name in self.by_name or name in ("", "__metadata__"):
            count += 1
            name = f"{wanted}#{count}"
        return name


def save_state(folder: Path | str, state: object) -> None:
    """Write `state` to `folder`, made if it is not there; `load_state` returns it exactly.

    Each file is replaced as a whole, the pair is not: `save_checkpoint` is for where a kill must not matter.

    Args:
        folder: where tensors.safetensors and state.json go.
        state: nested dict (str or int keys), list, tuple, torch.Tensor, int, float, str, bool, None. Subclasses come
            back as these: an OrderedDict as a dict, a Parameter as a tensor without gradient. Tensors may be on any
            device, in any layout of strides, and share memory: the same view met twice is saved once.
    Raises:
        TypeError: anything else; names its path in the tree. Nothing has been written then.
    """
    folder = Path(folder)
    found = _FoundTensors()
    tree = json.dumps({"format": _FORMAT, "state": _encoded(state, "", found)}, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / _TREE) as aside:
        aside.write_text(tree, encoding="utf-8")
    with written_aside(folder / _TENSORS) as aside:
        save_file(_writable(found.by_name), aside)
        shutil.copymode(folder / _TREE, aside)  # safetensors lets nobody but the owner read its files


def load_state(folder: Path | str, device: torch.device | str = "cpu") -> Any:
    """The state that `save_state` wrote to `folder`. Runs no code from it: there is no pickle in a checkpoint.

    Args:
        folder: holds tensors.safetensors and state.json.
        device: where all tensors go. Tensors that were one memory when saved are one tensor object.
    Raises:
        CheckpointError: a file is missing or damaged; names it.
    """
    folder = Path(folder)
    tree = _read_tree(folder / _TREE)
    tensors = {name: tensor.to(device) for name, tensor in _read_tensors(folder / _TENSORS).items()}
    try:
        return _decoded(tree["state"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{folder / _TREE} is damaged or does not belong to {_TENSORS} beside it ({error!r})"
        raise CheckpointError(
            f"{reason}: move that checkpoint's folder away, and --resume goes on from the one before"
        ) from error


def _encoded(value: object, path: str, found: _FoundTensors) -> Any:
    """`value` in strict JSON, tensors as names; `path` says where it is: keys and indices with dots between."""
    if isinstance(value, Tensor):
        _check_tensor(value, path)
        return {"tensor": found.name(value, path)}
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, list):
        return [_encoded(item, _joined(path, index), found) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item, _joined(path, index), found) for index, item in enumerate(value)]}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                where = path or "the state"
                raise TypeError(f"{where}: a dict's keys must be str or int, got {type(key).__name__} {key!r}")
        return {"dict": [[key, _encoded(item, _joined(path, key), found)] for key, item in value.items()]}
    raise TypeError(f"{path or 'the state'}: cannot save {type(value).__name__}; allowed: {_ALLOWED}")


def _joined(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def _check_tensor(tensor: Tensor, path: str) -> None:
    where = path or "the state"
    # Other subclasses (sharded or quantised tensors) keep their content elsewhere than in their own memory.
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"{where}: cannot save {type(tensor).__name__}; convert it to a plain tensor first")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{where}: cannot save a tensor of {tensor.layout}, {tensor.dtype} on {tensor.device}; "
            "it must be dense, have content and be of a real type"
        )


def _writable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: contiguous, in CPU memory, and no two in the same storage."""
    writable: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous().resolve_neg()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        writable[name] = plain
    return writable


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: move that checkpoint's folder away, and --resume goes on from the one before"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): move that checkpoint's folder away, and --resume goes on from the one before"
        ) from error
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of format {_FORMAT}, the one this version reads")
    return tree


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: move that checkpoint's folder away, and --resume goes on from the one before"
        ) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): move that checkpoint's folder away, and --resume goes on from the one before"
        ) from error


def _decoded(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_encoded`. Raises KeyError, TypeError or ValueError on what `_encoded` never writes."""
    match node:
        case list():
            return [_decoded(item, tensors) for item in node]
        case {"dict": pairs}:
            return {key: _decoded(item, tensors) for key, item in pairs}
        case {"tuple": items}:
            return tuple(_decoded(item, tensors) for item in items)
        case {"tensor": name}:
            return tensors[name]
        case {"float": text}:
            return float(text)
        case dict():
            raise KeyError(*node)
        case _:
            return node
