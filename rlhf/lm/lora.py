"""Low-rank adapters through peft: one frozen trunk, and small trained matrices beside it for each role.

The actor is the trunk with the adapter ACTOR, the reference the trunk with none, a separate critic the trunk with
CRITIC. The model stays the transformers class that it was; which adapter a forward pass sees is said by `using`.
Source: Hu et al. 2021 (LoRA), arXiv:2106.09685.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.checks import InputError, brief
from rlhf.lm.config import AdapterConfig

ACTOR, CRITIC = "default", "critic"  # peft loads what is called "default" without being asked
HEADS = ["lm_head", "score", "classifier"]


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
        parameter.requires_grad_(".lora_" in parameter_name)
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


def merged(model: PreTrainedModel, name: str = ACTOR) -> PreTrainedModel:
    """A copy whose weights have the adapter added to them, without adapters: a plain transformers model. The model
    itself where it has no adapters."""
    if not adapter_layers(model):
        return model
    plain = copy.deepcopy(model)
    for path, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(adapter_names=[name])
            plain.set_submodule(path, module.get_base_layer())
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def save_adapter(model: PreTrainedModel, folder: Path, name: str = ACTOR) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft and transformers load them onto the trunk."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name)
    tensors = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state without the frozen parameters, which are in the file that the model came from."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `trained_state`."""
    model.load_state_dict({**model.state_dict(), **state})
