"""From token sequences to log-probs, entropies and hidden states, at sampling temperature."""

import warnings
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.attention import evaluating, hides_windows
from rlhf.lm.batching import LayoutKind, lay_out
from rlhf.lm.head import Head, token_terms, widened
from rlhf.lm.linear import LINEAR
from rlhf.lm.shared_prompts import attending
from rlhf.losses import categorical_entropy


class PolicyOutput(NamedTuple):
    """What one forward of the actor says about each completion token."""

    log_probs: Tensor  # [B, T] nats, float32 (or float64), 0 in masked slots
    entropy: Tensor | None  # [B, T] nats, 0 in masked slots, if asked for
    hidden: Tensor | None  # [B, T, H] last hidden state before each token was chosen, 0 in masked slots, if asked for


def policy_output(
    model: PreTrainedModel,
    sequence_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    *,
    temperature: float,
    with_entropy: bool = False,
    with_hidden: bool = False,
    layout: LayoutKind | None = None,
) -> PolicyOutput:
    """log pi(token | before) of the last T tokens of each sequence.

    The trunk runs once, without padding where its attention allows (`layout_for`); logits exist for actions only, some
    at a time (`rlhf.lm.head`). A model whose logits are more than softcap(head(hidden)) goes through `plain_output`;
    a warning says so.

    Args:
        model: a causal language model.
        sequence_ids: [B, P + T] int64: prompts and completions; in the recipes' case left- and right-padded.
        attention_mask: [B, P + T] bool: tokens, not padding.
        action_mask: [B, T] bool; each action has a token of its sequence before it.
        temperature: logits are divided by it.
        with_entropy: also return the entropy.
        with_hidden: also return the hidden states that the value head of a shared critic reads.
        layout: how the tokens lie in the forward, which changes results by rounding only; None chooses.
    Raises:
        InputError: as `check_layouts`.
    """
    args = (sequence_ids, attention_mask, action_mask)
    head = output_head(model)
    if head is None:
        check_layouts(model)
        return plain_output(model, *args, temperature=temperature, with_entropy=with_entropy, with_hidden=with_hidden)
    hidden = action_states(trunk_of(model), *args, layout=layout)
    tokens = sequence_ids[:, -action_mask.shape[-1] :][action_mask]
    terms = token_terms(hidden, head, tokens, temperature=temperature, with_entropy=with_entropy)
    return PolicyOutput(
        at_actions(terms.log_probs, action_mask),
        None if terms.entropy is None else at_actions(terms.entropy, action_mask),
        at_actions(hidden, action_mask) if with_hidden else None,
    )


def plain_output(
    model: PreTrainedModel,
    sequence_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    *,
    temperature: float,
    with_entropy: bool = False,
    with_hidden: bool = False,
) -> PolicyOutput:
    """`policy_output` from the model's own logits, [B, T + 1, vocabulary] at once: for any model, with any head."""
    length = action_mask.shape[-1]
    output = model(
        input_ids=sequence_ids,
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        logits_to_keep=length + 1,
        output_hidden_states=with_hidden,
        use_cache=False,
    )
    logits = widen(output.logits[:, -length - 1 : -1])
    logits = logits if temperature == 1 else logits / temperature
    tokens = sequence_ids[:, -length:]
    chosen = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    hidden = output.hidden_states[-1][:, -length - 1 : -1] if with_hidden else None
    entropy = categorical_entropy(logits, action_mask) if with_entropy else None
    return PolicyOutput(torch.where(action_mask, chosen, 0.0), entropy, hidden)


def action_states(
    trunk: PreTrainedModel,
    sequence_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    *,
    layout: LayoutKind | None = None,
) -> Tensor:
    """[N, H]: a trunk's last hidden state before each of the N actions, in the order of action_mask's True slots.

    Args:
        trunk: a model without head; see `policy_output` for the others.
    """
    kind = layout_for(trunk) if layout is None else layout
    laid_out = lay_out(sequence_ids, attention_mask, action_mask, kind)
    with nullcontext() if laid_out.shared is None else attending(trunk, laid_out.shared):
        output = trunk(
            input_ids=laid_out.input_ids,
            attention_mask=laid_out.attention_mask,
            position_ids=laid_out.position_ids,
            use_cache=False,
        )
    return output.last_hidden_state.flatten(0, 1)[laid_out.states]


def at_actions(x: Tensor, action_mask: Tensor) -> Tensor:
    """[N, ...], one per action -> [B, T, ...], 0 in masked slots."""
    mask = action_mask.view(*action_mask.shape, *(1 for _ in x.shape[1:]))
    return x.new_zeros(*action_mask.shape, *x.shape[1:]).masked_scatter(mask, x)


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model under the head, adapters included; the model itself where it has no such part."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # peft's wrapper
        inner = inner.get_base_model()
    return inner.base_model


def packs(model: PreTrainedModel) -> bool:
    """Whether `policy_output` packs sequences, so that a micro-batch has no padding."""
    return output_head(model) is not None and layout_for(trunk_of(model)) == "packed"


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, L] int64: each row counts from its first unmasked token, so that left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def widen(logits: Tensor) -> Tensor:
    """At least float32: a bfloat16 log-softmax has two digits."""
    return logits.to(widened(logits.dtype))


# -- what a model allows: found out once, by trying -------------------------------------------------------------------

_layouts: WeakKeyDictionary[nn.Module, tuple[str, LayoutKind]] = WeakKeyDictionary()
_shares_prompts: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_has_plain_head: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_ignores_padding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def layout_for(trunk: PreTrainedModel) -> LayoutKind:
    """How a trunk is given its tokens: the first of these that gives each sequence the states that it has alone.

    packed, on a GPU with flash attention or FlexAttention, whose work then is that of the sequences alone (with sdpa
    and eager, whose mask is dense, it would grow with the square of the row); padded, for all that is causal; given.

    Raises:
        InputError: none does.
    """
    implementation = str(trunk.config.get_text_config()._attn_implementation)
    if trunk not in _layouts or _layouts[trunk][0] != implementation:
        is_worth_it = trunk.device.type != "cpu" and ("flash" in implementation or implementation == "flex_attention")
        kinds: list[LayoutKind] = ["packed", "padded", "given"] if is_worth_it else ["padded", "given"]
        kind = next((kind for kind in kinds if _keeps_states(trunk, kind)), None)
        if kind is None:
            raise _unsupported(trunk, "the padding or the sequences beside it in a batch")
        _layouts[trunk] = (implementation, kind)
    return _layouts[trunk][1]


def check_layouts(model: PreTrainedModel) -> None:
    """What `policy_output` says of a sequence is what the model says of it alone, in some layout.

    Raises:
        InputError: it is not.
    """
    if output_head(model) is not None:
        layout_for(trunk_of(model))
        return
    if model not in _ignores_padding:  # `plain_output` pads on the left
        _ignores_padding[model] = _keeps_states(trunk_of(model), "given")
    if not _ignores_padding[model]:
        raise _unsupported(model, "the padding before it, and its logits are not those of its output matrix alone")


def _unsupported(model: PreTrainedModel, reason: str) -> InputError:
    return InputError(
        f"{type(model).__name__} is not supported: what it says of a sequence depends on {reason}; take another model"
    )


def can_pack(trunk: PreTrainedModel) -> bool:
    """Whether sequences laid end to end in one row, told apart by their positions alone, have the states that each has
    alone. Not where attention or a recurrent state knows no positions."""
    return _keeps_states(trunk, "packed")


def can_share_prompts(trunk: PreTrainedModel) -> bool:
    """Whether the layout "shared" gives each sequence the states that it has alone; a warning says if not."""
    if trunk not in _shares_prompts:
        types = getattr(trunk.config.get_text_config(), "layer_types", None) or ()
        known = trunk._supports_attention_backend and {*types} <= {"full_attention", "sliding_attention"}
        with suppress(InputError):  # of the attention function
            known = known and not hides_windows(trunk) and _keeps_states(trunk, "shared")
            _shares_prompts[trunk] = known
        if not _shares_prompts.setdefault(trunk, False):
            warnings.warn(
                f"the attention of {type(trunk).__name__} is more than causal attention in windows, so a prompt is "
                "computed once for each of its samples",
                stacklevel=3,
            )
    return _shares_prompts[trunk]


def output_head(model: PreTrainedModel) -> Head | None:
    """The matrix that makes the model's logits, with a LoRA adapter added in; None where that is not all there is."""
    head = _linear_head(model)
    if head is not None and model not in _has_plain_head:
        _has_plain_head[model] = _makes_the_logits(model, head)
        if not _has_plain_head[model]:
            warnings.warn(
                f"the logits of {type(model).__name__} are not those of its output matrix alone, so log-probs are "
                "computed from all logits at once, which takes more memory",
                stacklevel=3,
            )
    return head if head is not None and _has_plain_head[model] else None


def _linear_head(model: PreTrainedModel) -> Head | None:
    module: Any = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if isinstance(module, nn.Linear) and type(module) in LINEAR:
        return Head(module.weight, module.bias, softcap)
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Linear) or type(base) not in LINEAR or not hasattr(module, "get_delta_weight"):
        return None
    weight = base.weight  # a peft LoRA layer
    active = [] if module.merged or module.disable_adapters else module.active_adapters
    for adapter in (name for name in active if name in module.lora_A):
        has_dropout = module.training and not isinstance(module.lora_dropout[adapter], nn.Identity)
        if has_dropout or module.lora_B[adapter].bias is not None or adapter in module.lora_variant:
            return None
        weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return Head(weight, base.bias, softcap)


@torch.no_grad()
def _makes_the_logits(model: PreTrainedModel, head: Head) -> bool:
    """Whether softcap(head(trunk(tokens))) are the logits of the model, to rounding."""
    trunk = trunk_of(model)
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _args: object, output: object) -> None:
        caught.extend(x for x in [getattr(output, "last_hidden_state", None)] if x is not None)

    ids, mask, _ = _probe(model.device, len(head.weight))
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position_ids(mask), "use_cache": False}
    with evaluating(model):
        handle = trunk.register_forward_hook(catch)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
        if not caught:
            return False
        expected = nn.functional.linear(caught[0], head.weight, head.bias)
        if head.softcap is not None:
            expected = head.softcap * torch.tanh(expected / head.softcap)
        again = trunk(**inputs).last_hidden_state
    tolerance = 8 * torch.finfo(logits.dtype).eps
    pairs = ((expected, logits), (again, caught[0]))
    return all(x.shape == y.shape and _is_close(x[mask], y[mask], tolerance) for x, y in pairs)


@torch.no_grad()
def _keeps_states(trunk: PreTrainedModel, kind: LayoutKind) -> bool:
    """Whether this layout gives the states that each sequence has alone, without padding, to rounding."""
    weight = next(trunk.parameters())
    embeddings: Any = trunk.get_input_embeddings()
    probe = _probe(weight.device, len(embeddings.weight))
    with evaluating(trunk):
        alone = [action_states(trunk, *(x[row : row + 1] for x in probe), layout="padded") for row in range(3)]
        found = action_states(trunk, *probe, layout=kind)
    is_half = weight.dtype.itemsize < 4 or torch.is_autocast_enabled(weight.device.type)
    return _is_close(found, torch.cat(alone), 0.1 if is_half else 3e-3)


def _probe(device: torch.device, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three sequences of 4, 6 and 7 tokens, two of them with one prompt: ids and attention mask [3, 7], action mask
    [3, 3]."""
    ids = torch.arange(14, device=device).view(2, 7) % vocabulary
    ids = torch.cat([ids, ids[1:, [0, 1, 2, 3, 5, 6, 4]]])
    mask = torch.ones(3, 7, dtype=torch.bool, device=device)
    mask[0, :2] = mask[:2, 6] = False
    return ids, mask, mask[:, 4:]


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Measured by the largest number."""
    return bool((found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max())
