"""A model's decoder layers compiled, or computed a second time in the backward pass instead of kept."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.checks import InputError
from rlhf.lm import shared_prompts
from rlhf.lm.lora import adapter_in_use, adapter_layers, using
from rlhf.lm.shared_prompts import SharedRow, attending


def wrap_layers(model: PreTrainedModel, *, recompute: bool, compiled: bool) -> None:
    """Change how the layers run, in place; a copy of the model has the same.

    transformers' own switch, `gradient_checkpointing_enable`, works in training mode only, and roles stay in eval mode.

    Args:
        recompute: a forward whose gradient is wanted keeps the layers' inputs alone; the backward pass runs each layer
            again, with the same adapter and attention.
        compiled: through torch.compile, shapes left open. Generation calls the plain layers.
    Raises:
        InputError: transformers marks no layers of this model as fit for that.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(x) for layer in layers for x in layer.modules() if x is not layer}
    layers = [layer for layer in layers if id(layer) not in inner]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layers that transformers marks for gradient checkpointing: leave out "
            "--gradient-checkpointing and --compile"
        )
    run: Any = _plain
    if compiled:
        run = partial(_compiled, torch.compile(_plain, dynamic=True))
        opaque = torch.compiler.disable(shared_prompts.attention)
        AttentionInterface.register(shared_prompts.NAME, opaque)
    for layer in layers:
        layer.forward = partial(_recomputed, run, layer) if recompute else partial(run, layer)


def _plain(layer: nn.Module, *args: Any, **options: Any) -> Any:
    return type(layer).forward(layer, *args, **options)


def _compiled(function: Any, layer: nn.Module, *args: Any, **options: Any) -> Any:
    """Not while an engine generates, whose shapes change with every token."""
    generates = torch.is_inference_mode_enabled() or options.get("past_key_values") is not None
    return (_plain if generates else function)(layer, *args, **options)


def _recomputed(run: Any, layer: nn.Module, *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return run(layer, *args, **options)
    again = partial(_surroundings, layer, adapter_in_use(layer), shared_prompts.active())
    return checkpoint(
        partial(run, layer, **options),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn in eval mode
        context_fn=lambda: (nullcontext(), again()),
    )


@contextmanager
def _surroundings(layer: nn.Module, adapter: str | None, shared: tuple[nn.Module, SharedRow] | None) -> Iterator[None]:
    """What the layer saw the first time: by the backward pass these are gone."""
    with ExitStack() as stack:
        if adapter_layers(layer):
            stack.enter_context(using(layer, adapter))
        if shared is not None:
            stack.enter_context(attending(*shared))
        yield
