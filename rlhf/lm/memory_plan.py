"""What a run will hold in memory, told before it does.

Weights, gradients and AdamW's moments are counted on twins of the models that have shapes but no storage (torch's meta
device), put together by the same functions as the real ones: these numbers are exact. Activations are what autograd
saves in a forward of such a twin over one micro-batch; the cache and the output head's arrays follow from the config.
Not counted: torch itself, what a backward pass needs for a moment, a quantised trunk's scales, fragments.
"""

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.checks import InputError, brief
from rlhf.lm.batching import CPU_TOKENS, GPU_TOKENS
from rlhf.lm.config import OptimizerKind, TrainerConfig
from rlhf.lm.critic import Critic, head_of
from rlhf.lm.generation.casts import cast_bytes
from rlhf.lm.generation.memory import SAMPLING_COPIES, free_bytes
from rlhf.lm.generation.slots import PACKED_STEPS
from rlhf.lm.head import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES, KEPT_BYTES, widened
from rlhf.lm.layers import wrap_layers
from rlhf.lm.linear import packed_bytes
from rlhf.lm.logprobs import trunk_of
from rlhf.lm.lora import CRITIC, add_adapter, using
from rlhf.lm.models import Roles, assemble_roles
from rlhf.run.atomic import written_aside

HEAD_ARRAYS = 3  # of a chunk's logits, at a time: logits, log-softmax and the gradient
SHORT_ROW = 8  # tokens; where attention saves nothing that grows with a row's square, rows' lengths do not matter
MOMENTS = 2  # of AdamW, each in the parameter's type
BLOCK, FROM = 256, 4096  # of bitsandbytes' AdamW: numbers that share a float32 scale; the least that it quantises


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one process's device."""

    actor: int  # weights, and with adapters those of all roles
    critic: int
    reference: int  # 0 where it is the actor without its adapter
    reward_models: int
    optimizer: int  # AdamW's moments
    cache: int  # while generating: keys, values, the arrays that a token is sampled from, copies of weights
    gradients: int  # while updating, as what follows
    activations: int | None  # saved for the backward pass of one micro-batch; None: the model could not be tried out
    head: int  # logits, their softmax and the output matrix's gradient
    slots: int  # completions generated at once
    micro_batch_tokens: int
    free: int = 0  # for the run on this device, as found when it began

    @property
    def held(self) -> int:
        """All the time."""
        return self.actor + self.critic + self.reference + self.reward_models + self.optimizer

    @property
    def updating(self) -> int:
        """While updating, beyond `held`."""
        return self.gradients + (self.activations or 0) + self.head

    @property
    def peak(self) -> int:
        return self.held + max(self.cache, self.updating)


def plan_memory(
    actor: PreTrainedModel,
    config: TrainerConfig,
    *,
    device: torch.device,
    longest_prompt: int,
    reward_models: Sequence[nn.Module] = (),
    num_processes: int = 1,
    autocast_dtype: torch.dtype | None = None,
) -> MemoryPlan:
    """Of training this actor, which may still be on any device; it is not changed.

    Args:
        device: where training will happen.
        longest_prompt: tokens.
        autocast_dtype: of forward passes in mixed precision.
    """
    sampling, optimization = config.sampling, config.optimization
    longest = longest_prompt + sampling.max_new_tokens
    share = -(-optimization.sequences_per_step // num_processes)
    roles = _twin_roles(actor, config)
    groups = roles.parameter_groups()
    trained = [p for group in groups for p in group]
    gradients = _bytes(trained)
    budget = optimization.micro_batch_tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
    tokens = min(max(budget, longest), longest * -(-share // optimization.minibatches))
    slots = min(sampling.generation_batch_size, share)
    reference = roles.reference is not None and roles.reference is not roles.actor
    dtype = autocast_dtype or actor.dtype
    cast = 0 if autocast_dtype is None else cast_bytes(actor, autocast_dtype)
    packed = packed_bytes(actor, dtype) if device.type == "cpu" and sampling.max_new_tokens >= PACKED_STEPS else 0
    return MemoryPlan(
        actor=_held_by(roles.actor),
        critic=0 if roles.critic is None else _held_by(roles.critic),
        reference=_held_by(roles.actor) if reference else 0,
        reward_models=sum(_held_by(model) for model in reward_models),
        optimizer=_moments_bytes(trained, optimization.optimizer),
        cache=slots * _cache_bytes(actor, longest, dtype) + cast + packed,
        gradients=gradients * (1 if num_processes == 1 else 3),  # one copy to send, one received
        activations=_saved_by(roles, tokens, longest, autocast_dtype, recompute=optimization.gradient_checkpointing),
        head=_head_bytes(actor, tokens * sampling.max_new_tokens // longest, device),
        slots=slots,
        micro_batch_tokens=tokens,
    )


def plan_run(
    actor: PreTrainedModel,
    config: TrainerConfig,
    accelerator: Accelerator,
    *,
    longest_prompt: int,
    reward_models: Sequence[nn.Module] = (),
) -> MemoryPlan | None:
    """`plan_memory` for the accelerator's device, checked against it. None, with a warning, for a model that has no
    twin.

    Raises:
        InputError: as `check_memory`, or as `assemble_roles`.
    """
    device = accelerator.device
    with accelerator.autocast():
        is_mixed = torch.is_autocast_enabled(device.type)
        autocast_dtype = torch.get_autocast_dtype(device.type) if is_mixed else None

    def plan(config: TrainerConfig) -> MemoryPlan:
        return plan_memory(
            actor,
            config,
            device=device,
            longest_prompt=longest_prompt,
            reward_models=reward_models,
            num_processes=accelerator.num_processes,
            autocast_dtype=autocast_dtype,
        )

    try:
        found = plan(config)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        warnings.warn(f"memory is not planned for {type(actor).__name__}: {brief(error)}", stacklevel=2)
        return None
    free, total = device_bytes(device, [actor, *reward_models])
    check_memory(found, config, plan, free=free, total=total)
    return replace(found, free=free)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _held_by(model: nn.Module) -> int:
    return _bytes([*model.parameters(), *model.buffers()])


def _moments_bytes(trained: Sequence[nn.Parameter], kind: OptimizerKind) -> int:
    if kind == "adamw":
        return sum(MOMENTS * p.nbytes + 4 for p in trained)  # 4: the count of steps
    small = sum(p.numel() for p in trained if p.numel() < FROM)
    blocks = [(p.numel(), -(-p.numel() // BLOCK)) for p in trained if p.numel() >= FROM]
    return MOMENTS * (4 * small + sum(numbers + 4 * scales for numbers, scales in blocks))


# -- twins without storage --------------------------------------------------------------------------------------------


def _twin_of(model: PreTrainedModel) -> PreTrainedModel:
    memo: dict[int, Any] = {id(x): torch.empty_like(x, device="meta") for x in model.buffers()}
    for x in model.parameters():
        twin = nn.Parameter(torch.empty_like(x, device="meta"), requires_grad=x.requires_grad)
        twin.__dict__.update(x.__dict__)  # what bitsandbytes' parameters carry, and peft asks them for
        memo[id(x)] = twin
    return copy.deepcopy(model, memo)


def _twin_roles(actor: PreTrainedModel, config: TrainerConfig) -> Roles:
    """As the trainer's. A critic that is loaded from elsewhere is taken to be of the actor's size."""
    algorithm, adapter = config.algorithm, config.adapter
    loaded = config.source.critic_from is not None and algorithm.critic == "separate" and adapter.lora_rank > 0
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the real ones are made
        roles = assemble_roles(
            _twin_of(actor),
            critic="none" if loaded else algorithm.critic,
            with_reference=algorithm.needs_reference,
            adapter=adapter,
        )
        if loaded:
            roles.critic = Critic.separate(_twin_of(actor))
            assert roles.critic.trunk is not None
            add_adapter(roles.critic.trunk, adapter)
            head_of(roles.critic.trunk).requires_grad_(True)
    return roles


def _saved_by(
    roles: Roles, tokens: int, longest: int, autocast_dtype: torch.dtype | None, *, recompute: bool
) -> int | None:
    """What the forward passes of actor and critic over one micro-batch save for the backward pass; with `recompute` the
    layers' inputs, and what one layer saves when it runs again."""
    if recompute:
        kept = _saved_by(roles, tokens, longest, autocast_dtype, recompute=False)
        trunks = roles.trunks()
        for trunk in trunks:
            wrap_layers(trunk, recompute=True, compiled=False)
        inputs = _saved_by(roles, tokens, longest, autocast_dtype, recompute=False)
        if kept is None or inputs is None:
            return None
        return inputs + (kept - inputs) // trunks[0].config.get_text_config().num_hidden_layers
    try:
        total = _saved_in_forward(trunk_of(roles.actor), tokens, longest, autocast_dtype)
        if roles.critic is not None and roles.critic.trunk is not None:
            total += _saved_in_forward(trunk_of(roles.critic.trunk), tokens, longest, autocast_dtype)
        elif roles.critic is not None and roles.critic.adapted is not None:
            with using(roles.actor, CRITIC):
                total += _saved_in_forward(trunk_of(roles.actor), tokens, longest, autocast_dtype)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None  # the model looks at its numbers, of which a twin has none
    return total


def _saved_in_forward(trunk: PreTrainedModel, tokens: int, longest: int, autocast_dtype: torch.dtype | None) -> int:
    config = trunk.config.get_text_config()
    if config._attn_implementation == "eager":  # keeps all attention weights
        length = longest
    else:
        config._attn_implementation = "sdpa"
        length = min(SHORT_ROW, longest)
    rows = -(-tokens // length)
    cast_weights = 0
    if autocast_dtype is not None:  # autocast has no say over twins
        trunk = trunk.to(autocast_dtype)  # type: ignore[arg-type]
        cast_weights = _bytes([p for p in trunk.parameters() if p.ndim > 1])
    weights = {p.untyped_storage()._cdata for p in trunk.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return x

    # A mask that is given, for one that is made would be looked at.
    ids, positions = torch.zeros(rows, length, dtype=torch.int64), torch.arange(length)[None]
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = trunk(
            input_ids=ids.to("meta"),
            position_ids=positions.to("meta"),
            attention_mask=mask.to("meta"),
            use_cache=False,
        )
    del output
    return cast_weights + sum(storage.nbytes() for storage in saved.values())


# -- what follows from sizes ------------------------------------------------------------------------------------------


def _cache_bytes(model: PreTrainedModel, columns: int, dtype: torch.dtype) -> int:
    """Of one completion."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kept_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    per_token = 2 * config.num_hidden_layers * kept_heads * dim * dtype.itemsize
    return columns * per_token + SAMPLING_COPIES * config.vocab_size


def _head_bytes(model: PreTrainedModel, actions: int, device: torch.device) -> int:
    """See `rlhf.lm.head`."""
    config = model.config.get_text_config()
    wide = widened(model.dtype).itemsize
    logits = actions * config.vocab_size * wide
    chunk = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    if logits > max(chunk, KEPT_BYTES):
        logits = chunk
    return HEAD_ARRAYS * logits + config.vocab_size * config.hidden_size * wide


# -- against the device -----------------------------------------------------------------------------------------------


def check_memory(
    plan: MemoryPlan, config: TrainerConfig, replan: Callable[[TrainerConfig], MemoryPlan], *, free: int, total: int
) -> None:
    """Say so where the run will not fit.

    Args:
        replan: the plan under another config, to say what an option would save.
        free: bytes that the run may take, what it has already loaded included. total: of the device.
    Raises:
        InputError: weights, gradients and moments alone are more than the device has.
    """
    needed = plan.held + plan.gradients
    if plan.peak <= free and needed <= total:
        return
    advice = "; ".join(_advice(plan, config, replan, free))
    advice = f"Options that help: {advice}." if advice else "No option of the trainer helps: take a smaller model."
    if needed > total:
        raise InputError(
            f"weights, gradients and optimizer take {_size(needed)}, and the device has {_size(total)} in all. {advice}"
        )
    warnings.warn(
        f"this run is planned at {_size(plan.peak)} and {_size(free)} of memory are free: it may be stopped for lack "
        f"of it. {advice}",
        stacklevel=3,
    )


def _advice(
    plan: MemoryPlan, config: TrainerConfig, replan: Callable[[TrainerConfig], MemoryPlan], free: int
) -> list[str]:
    """Options and what each would save by itself, the most first."""
    changed: dict[str, TrainerConfig] = {}
    if config.algorithm.critic == "separate" and config.source.critic_from is None:
        changed["--critic shared"] = replace(config, algorithm=replace(config.algorithm, critic="shared"))
    if config.adapter.lora_rank == 0:
        changed["--lora-rank 16"] = replace(config, adapter=replace(config.adapter, lora_rank=16))
    if not config.optimization.gradient_checkpointing and plan.activations is not None:
        changed["--gradient-checkpointing"] = replace(
            config, optimization=replace(config.optimization, gradient_checkpointing=True)
        )
    fewer = max(plan.micro_batch_tokens // 4, 1)
    changed[f"--micro-batch-tokens {fewer}"] = replace(
        config, optimization=replace(config.optimization, micro_batch_tokens=fewer)
    )
    fewer = max(plan.slots // 4, 1)
    changed[f"--generation-batch-size {fewer}"] = replace(
        config, sampling=replace(config.sampling, generation_batch_size=fewer)
    )
    found = []
    for option, other in changed.items():
        try:
            peak = replan(other).peak
        except InputError:  # an option that this model does not know
            continue
        if peak < plan.peak:
            fits = ", and then it fits" if peak <= free else ""
            found.append((plan.peak - peak, f"{option} saves {_size(plan.peak - peak)}{fits}"))
    return [text for _, text in sorted(found, reverse=True)]


def device_bytes(device: torch.device, loaded: Sequence[nn.Module]) -> tuple[int, int]:
    """(free, total): free counts the models that the run has put there already."""
    there = sum(_held_by(model) for model in loaded if next(model.parameters()).device.type == device.type)
    total = psutil.virtual_memory().total if device.type != "cuda" else torch.cuda.mem_get_info(device)[1]
    return free_bytes(device) + there, int(total)


def show_plan(plan: MemoryPlan) -> None:
    """One small table."""
    table = Table(title="memory planned for each process", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("actor", plan.actor),
        ("critic", plan.critic),
        ("reference", plan.reference),
        ("reward models", plan.reward_models),
        ("optimizer", plan.optimizer),
        (f"generating: cache of {plan.slots} completions", plan.cache),
        ("updating: gradients", plan.gradients),
        (f"updating: activations of {plan.micro_batch_tokens:,} tokens", plan.activations),
        ("updating: output head", plan.head),
    ]
    for name, size in rows:
        if size != 0:
            table.add_row(name, "not known" if size is None else _size(size))
    table.add_section()
    table.add_row("peak, beside Python and torch", _size(plan.peak))
    if plan.free:
        table.add_row("free for it", _size(plan.free))
    Console().print(table)


def write_plan(plan: MemoryPlan, path: Path) -> None:
    """Bytes, as JSON."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(asdict(plan) | {"peak": plan.peak}, indent=2) + "\n", encoding="utf-8")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
