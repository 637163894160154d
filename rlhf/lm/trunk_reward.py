"""A reward model that is an adapter and a head on the actor's own frozen trunk: a third role without a third trunk.

The folder is what recipes/reward_model.py --lora-rank leaves in final/adapter: peft's layout of a sequence classifier
with its head among the `modules_to_save`.
"""

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, PeftModelForSequenceClassification, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checks import InputError, brief
from rlhf.lm.logprobs import trunk_of, widen
from rlhf.lm.lora import ADAPTER_WEIGHTS, HEADS, TRUNK, adapter_layers, trunk_fingerprint, using

REWARD = "reward"  # the adapter's name on the actor
_WHERE = "give the final/adapter folder of a recipes/reward_model.py run with --lora-rank, or a merged reward model"


def is_adapter(model: str) -> bool:
    """Whether the folder holds an adapter and not a whole model."""
    return (Path(model) / "adapter_config.json").is_file()


class RewardOnTrunk:
    """What `RewardModel` takes for a sequence classifier: the actor's trunk seen through the reward's adapter, under
    the reward's head. `attach` gives it the actor; the trainer does so.

    Args:
        folder: the adapter's.
        actor: folder or hub id of the actor, whose configuration the classifier shares.
    Raises:
        InputError: the folder holds no adapter of a sequence classifier with one label.
    """

    def __init__(self, folder: str, actor: str) -> None:
        self.folder, self.actor_name = folder, actor
        try:
            self.config: Any = AutoConfig.from_pretrained(actor, num_labels=1)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"no configuration of the actor {actor!r} could be loaded ({brief(error)})") from error
        self._lora, self._tensors, self._head, self._trunk_mark = _read(folder)
        self._actor: PreTrainedModel | None = None

    @property
    def device(self) -> torch.device:
        return self._attached().device

    def eval(self) -> "RewardOnTrunk":
        return self

    def to(self, device: torch.device) -> "RewardOnTrunk":
        """It is where the actor is."""
        return self

    def attach(self, actor: PreTrainedModel) -> None:
        """Lay the adapter beside the actor's own, frozen.

        Raises:
            InputError: the actor's weights are no frozen trunk, or not the trunk that the adapter was trained on.
        """
        if not adapter_layers(actor):
            raise InputError(
                f"the reward model {self.folder!r} is an adapter on the actor's frozen trunk, and all of the actor's "
                "weights are trained: pass --lora-rank"
            )
        self._check_trunk(actor)
        trained = [parameter for parameter in actor.parameters() if parameter.requires_grad]
        try:
            inject_adapter_in_model(self._lora, actor, adapter_name=REWARD)
            result: Any = set_peft_model_state_dict(actor, self._tensors, adapter_name=REWARD)
        except (ValueError, RuntimeError, KeyError) as error:
            raise InputError(
                f"the adapter in {self.folder!r} does not fit the actor ({brief(error)}): {_WHERE}"
            ) from error
        missing = [name for name in result.missing_keys if f".{REWARD}." in name]
        alone = [*missing, *result.unexpected_keys]
        if alone:
            raise InputError(
                f"the adapter in {self.folder!r} does not fit the actor: {alone[0]} is on one side only; {_WHERE}"
            )
        for name, parameter in actor.named_parameters():
            if f".{REWARD}." in name:
                parameter.data = widen(parameter.data)
        self._actor = actor
        with using(actor, None):  # leaves the actor's own adapter switched on
            pass
        for parameter in actor.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._head = self._head.to(actor.device)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """logits [B, 1]: the head on the state of each text's last token; texts are padded on the right."""
        actor = self._attached()
        with using(actor, REWARD):
            states = trunk_of(actor)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        last = attention_mask.sum(-1) - 1
        rows = torch.arange(len(last), device=last.device)
        return SimpleNamespace(logits=self._head(states.last_hidden_state[rows, last].to(self._head.weight.dtype)))

    def _attached(self) -> PreTrainedModel:
        if self._actor is None:
            raise InputError(
                "a reward model on the actor's trunk scores nothing before the trainer has built the actor"
            )
        return self._actor

    def _check_trunk(self, actor: PreTrainedModel) -> None:
        """By the fingerprint that our adapters carry; of others, by the name of what they were trained on."""
        advice = (
            f"pass --model {self._lora.base_model_name_or_path}, which it was trained on, or its merged reward model, "
            "which has a trunk of its own"
        )
        mark = trunk_fingerprint(actor)
        if self._trunk_mark is not None and mark is not None:
            if self._trunk_mark != mark:
                raise InputError(
                    f"the reward model {self.folder!r} is an adapter on other weights than those of the actor "
                    f"{self.actor_name!r}: {advice}"
                )
        elif str(self._lora.base_model_name_or_path) != self.actor_name:
            raise InputError(
                f"the reward model {self.folder!r} is an adapter on {self._lora.base_model_name_or_path!r}, and the "
                f"actor is {self.actor_name!r}: {advice}"
            )


def merged_reward_model(folder: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The adapter as a model of its own: loaded onto its trunk through peft, and merged.

    Raises:
        InputError: it, or the trunk that it names, cannot be loaded.
    """
    _read(folder)  # it has a head
    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        trunk = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an old way
            found = PeftModelForSequenceClassification.from_pretrained(trunk, folder)
        plain = found.merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(
            f"no reward model could be loaded from the adapter in {folder!r} ({brief(error)}): {_WHERE}"
        ) from error
    assert isinstance(plain, PreTrainedModel)
    plain.config.pad_token_id = tokenizer.pad_token_id
    return plain


def _read(folder: str) -> tuple[Any, dict[str, Tensor], nn.Linear, str | None]:
    """The adapter's configuration, its tensors without the head's, the head, and the fingerprint of its trunk."""
    try:
        config = PeftConfig.from_pretrained(folder)
        with safe_open(Path(folder) / ADAPTER_WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            mark = (file.metadata() or {}).get(TRUNK)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"the adapter in {folder!r} cannot be read ({brief(error)}): {_WHERE}") from error
    of_head = {
        name: value for name, value in tensors.items() if name.removeprefix("base_model.model.").split(".")[0] in HEADS
    }
    weights = [value for name, value in of_head.items() if name.endswith(".weight")]
    if len(weights) != 1 or len(weights[0]) != 1:
        raise InputError(f"the adapter in {folder!r} has no score head with one label: {_WHERE}")
    biases = [value for name, value in of_head.items() if name.endswith(".bias")]
    head = nn.Linear(weights[0].shape[1], 1, bias=bool(biases)).requires_grad_(False)
    head.weight.copy_(weights[0])
    if biases:
        head.bias.copy_(biases[0])
    on_trunk = copy.deepcopy(config)
    on_trunk.modules_to_save = None
    on_trunk.inference_mode = True
    return on_trunk, {name: value for name, value in tensors.items() if name not in of_head}, head, mark
