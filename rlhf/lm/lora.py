"""Low-rank adapters through peft: one frozen trunk, and small trained matrices beside it for each role.

The actor is the trunk with the adapter ACTOR, the reference the trunk with none, a separate critic the trunk with
CRITIC. The model stays the transformers class that it was; which adapter a forward pass sees is said by `using`.
Source: Hu et al. 2021 (LoRA), arXiv:2106.09685.
"""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.checks import InputError, brief
from rlhf.lm.config import AdapterConfig
from rlhf.lm.logprobs import trunk_of, widen

ACTOR, CRITIC = "default", "critic"  # peft loads what is called "default" without being asked
HEADS = ["lm_head", "score", "classifier"]
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRUNK = "trunk"  # key of the trunk's fingerprint in that file's metadata


def add_adapter(model: PreTrainedModel, config: AdapterConfig, name: str = ACTOR) -> None:
    """Freeze the model and lay a new adapter, zero in effect, beside its layers, in place. Adapters stay trainable.

    Raises:
        InputError: no layer has such a name.
    """
    targets: str | list[str] = config.lora_targets
    if targets != "all-linear":
        targets = [target.strip() for target in config.lora_targets.split(",")]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        exclude_modules=HEADS,
        base_model_name_or_path=model.config.name_or_path or None,
    )
    try:
        inject_adapter_in_model(lora, model, adapter_name=name)
    except ValueError as error:
        raise InputError(f"--lora-targets {config.lora_targets}: {brief(error)}") from error
    for layer in adapter_layers(model):
        layer.set_adapter(ACTOR)
    for parameter_name, parameter in model.named_parameters():
        is_adapter = ".lora_" in parameter_name
        parameter.requires_grad_(is_adapter)
        if is_adapter:  # peft gives them the trunk's type; a step of 1e-4 is lost on a bfloat16 weight
            parameter.data = widen(parameter.data)
    model.eval()


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers that have adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_in_use(module: nn.Module) -> str | None:
    """The name for `using` of what a forward pass of this module sees now."""
    layers = adapter_layers(module)
    return None if not layers or layers[0].disable_adapters else layers[0].active_adapters[0]


@contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """Forward passes inside see this adapter, or with None the trunk alone; ACTOR again afterwards."""
    layers = adapter_layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # peft's switches change it
    try:
        for layer in layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter(ACTOR)
        for parameter in trained:
            parameter.requires_grad_(True)


def train_head(head: nn.Module) -> None:
    """Train it beside the adapters, in float32 whatever the trunk computes in."""
    for parameter in head.parameters():
        parameter.data = widen(parameter.data)
        parameter.requires_grad_(True)
    head.register_forward_pre_hook(_widened_input)


def _widened_input(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(widen(x) for x in args)


@torch.no_grad()
def merged(model: PreTrainedModel, name: str = ACTOR) -> PreTrainedModel:
    """A copy whose weights have the adapter added to them, without adapters: a plain transformers model, not quantised
    either. The model itself where it has no adapters."""
    if not adapter_layers(model):
        return model
    plain = _copied(model)
    if isinstance(plain.get_input_embeddings(), BaseTunerLayer):
        _untie(plain)
    for path, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if is_quantised(base):
                lora: Any = module
                delta = lora.get_delta_weight(name) if name in lora.lora_A else 0.0
                base = _dequantised(base, model.dtype, delta)
            else:
                module.merge(adapter_names=[name])
            plain.set_submodule(path, base)
    for path, module in list(plain.named_modules()):
        if is_quantised(module):
            plain.set_submodule(path, _dequantised(module, model.dtype))
    without_quantization(plain.config)
    return _without_peft(plain)


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy, in the processor's memory: the device's may be full. (Quantised, it stays where it is.)"""
    if any(is_quantised(module) for module in model.modules()):
        return copy.deepcopy(model)
    tensors = (*model.parameters(), *model.buffers())
    copies = {id(x): x.detach().to("cpu", copy=True).requires_grad_(x.requires_grad) for x in tensors}
    for x in model.parameters():
        copies[id(x)] = nn.Parameter(copies[id(x)], requires_grad=x.requires_grad)
    return copy.deepcopy(model, copies)


def _untie(model: PreTrainedModel) -> None:
    """A weight of its own for the head: an adapter on the embeddings was no part of it."""
    head: Any = model.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without adapters, its weights as they are. The model itself where it has none."""
    if not adapter_layers(model):
        return model
    plain = _copied(model)
    for path, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            plain.set_submodule(path, module.get_base_layer())
    return _without_peft(plain)


def _without_peft(plain: PreTrainedModel) -> PreTrainedModel:
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in plain.__dict__:
            delattr(plain, name)
    return plain


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes."""
    return type(module).__name__ in ("Linear8bitLt", "Linear4bit")


def with_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose layers of 4 bits pass gradients on in eval mode too, in which ours stay: bitsandbytes 0.50 would
    repack them for inference on CPUs with AVX512-BF16, in their first forward, and gradients end there unnoticed."""
    for module in model.modules():
        if is_quantised(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def _dequantised(layer: Any, dtype: torch.dtype, delta: Tensor | float = 0.0) -> nn.Linear:
    weight = dequantize_module_weight(layer)
    bias: Tensor | None = layer.bias
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=dtype)
    plain.requires_grad_(False)
    plain.weight.copy_(weight + delta)
    if bias is not None:
        plain.bias.copy_(bias)
    return plain


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, which no longer says that its model is quantised."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def save_adapter(model: PreTrainedModel, folder: Path, name: str = ACTOR) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft and transformers load them onto the trunk; a trained
    head beside the adapter (a sequence classifier's) goes into both."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name)
    config: Any = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    heads = [head for head in HEADS if any(p.requires_grad for p in _parameters_of(model, head).values())]
    if heads:
        config.task_type, config.modules_to_save = TaskType.SEQ_CLS, heads
        state |= {key: value for head in heads for key, value in _parameters_of(model, head).items()}
    tensors = {f"base_model.model.{key}": value.detach().contiguous() for key, value in state.items()}
    mark = trunk_fingerprint(model)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"} | ({TRUNK: mark} if mark else {}))
    config.save_pretrained(str(folder))


def _parameters_of(model: PreTrainedModel, head: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith(f"{head}.") and ".lora_" not in name}


def trunk_fingerprint(model: PreTrainedModel) -> str | None:
    """Of the weights under heads and adapters: some of each, as bfloat16 has them, so that either type has the same.
    None where they are quantised."""
    if any(is_quantised(module) for module in model.modules()):
        return None
    digest = hashlib.sha256()
    for name, parameter in sorted(trunk_of(model).named_parameters()):
        if ".lora_" not in name:
            flat = parameter.detach().flatten()
            picked = flat[:: max(1, len(flat) // 1024)].to(torch.bfloat16).cpu().contiguous()
            digest.update(f"{name.replace('.base_layer', '')} {list(parameter.shape)}".encode())
            digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state without the frozen parameters, which are in the file that the model came from."""
    named = model.named_parameters(remove_duplicate=False)  # tied weights have two names in the state
    kept = {name for name, parameter in named if parameter.requires_grad}
    kept |= {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name in kept}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `trained_state`."""
    expected = trained_state(model).keys()
    if state.keys() != expected:
        raise InputError(
            f"the checkpoint is of another model: {sorted(state.keys() ^ expected)[0]} is on one side only"
        )
    model.load_state_dict(state, strict=False)
