"""Weights in autocast's type, cast once for a whole generation.

In inference mode autocast keeps no cast weight: for each token it reads every float32 matrix, writes it in half
precision and reads that. The copies made here are read alone, and are the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.lm.attention import evaluating
from rlhf.lm.generation.memory import is_out_of_memory
from rlhf.lm.linear import LINEAR

CAST_SHARE = 0.25  # of free memory that copies may take


def cast_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What copies of this type take, once for each parameter."""
    return dtype.itemsize * sum(p.numel() for p in {parameter for _, _, parameter in _castable(model)})


class CastWeights:
    """Copies of a model's matrices and biases, at addresses that stay from one use to the next."""

    def __init__(self) -> None:
        self._copies: dict[nn.Parameter, nn.Parameter] = {}

    @property
    def held_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    def clear(self) -> None:
        self._copies = {}

    @contextmanager
    def in_place(self, model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
        """Within: linear layers have copies of their present float32 weights; in inference mode. Where memory runs out,
        they have what they had."""
        places = _castable(model)  # entries of linear layers: an embedding that is tied to one keeps its weight
        try:
            self._copies = {parameter: self._copy(parameter, dtype) for _, _, parameter in places}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._copies, places = {}, []
        try:
            for layer, name, parameter in places:
                layer._parameters[name] = self._copies[parameter]
            yield
        finally:
            for layer, name, parameter in places:
                layer._parameters[name] = parameter

    def _copy(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        copy = self._copies.get(parameter)
        if copy is None or (copy.dtype, copy.device, copy.shape) != (dtype, parameter.device, parameter.shape):
            return nn.Parameter(parameter.to(dtype), requires_grad=False)
        copy.copy_(parameter)
        return copy


@torch.inference_mode()
def casts_change_nothing(model: nn.Module, dtype: torch.dtype, token_ids: Tensor) -> bool:
    """Whether the model's logits, under autocast of this type, are bit for bit the same with copies: not where layers
    switch autocast off, or do more with a weight than multiply by it. token_ids: [1, L] int64."""
    with evaluating(model):
        expected = model(input_ids=token_ids, use_cache=False).logits
        try:
            with CastWeights().in_place(model, dtype):
                return torch.equal(model(input_ids=token_ids, use_cache=False).logits, expected)
        except RuntimeError:  # types that do not go together
            return False


def _castable(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(layer, name, parameter): what autocast casts in every forward, but for layers of a kind of their own."""
    return [
        (layer, name, parameter)
        for layer in model.modules()
        if type(layer) in (*LINEAR, Conv1D)
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    ]
