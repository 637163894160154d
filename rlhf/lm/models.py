"""The roles: actor, critic, reference (reward models are in `rlhf.lm.rewards`), and how they are loaded."""

import copy
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.algorithm import CriticKind
from rlhf.checks import InputError, brief
from rlhf.lm.config import AdapterConfig
from rlhf.lm.critic import Critic, head_of
from rlhf.lm.logprobs import trunk_of
from rlhf.lm.lora import CRITIC, HEADS, add_adapter, using, with_gradients
from rlhf.lm.trunk_reward import is_adapter, merged_reward_model


@dataclass
class Roles:
    """The models a trainer holds. None: not needed by the algorithm. With adapters the reference is the actor itself,
    to be asked inside `as_reference`."""

    actor: PreTrainedModel
    critic: Critic | None
    reference: PreTrainedModel | None

    @property
    def critic_reads_actor(self) -> bool:
        """Whether the critic is a head on the actor's hidden states, which the actor's forward then has to return."""
        return self.critic is not None and self.critic.trunk is None and self.critic.adapted is None

    def trunks(self) -> list[PreTrainedModel]:
        """The models under the heads, each once."""
        models = [self.actor, self.reference, None if self.critic is None else self.critic.trunk]
        return list({id(model): trunk_of(model) for model in models if model is not None}.values())

    def as_reference(self) -> AbstractContextManager[None]:
        """Inside it, what `reference` says is the reference's."""
        return using(self.actor, None) if self.reference is self.actor else nullcontext()

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Trained parameters: the actor's, then the critic's own. Each is clipped and has a learning rate by itself."""
        actor = {name: p for name, p in self.actor.named_parameters() if p.requires_grad}
        critic = [] if self.critic is None else [p for p in self.critic.parameters() if p.requires_grad]
        if self.critic is not None and self.critic.adapted is not None:
            critic += [actor.pop(name) for name in list(actor) if f".{CRITIC}." in name]
        return [group for group in (list(actor.values()), critic) if group]


def assemble_roles(
    actor: PreTrainedModel,
    *,
    critic: CriticKind,
    with_reference: bool,
    critic_from: str | None = None,
    adapter: AdapterConfig | None = None,
) -> Roles:
    """The actor, and on its device the critic and the frozen reference made from it.

    Args:
        critic_from: folder or hub id that the critic starts from, see `Critic.from_pretrained`; None: the actor.
        adapter: with a lora_rank, the actor's weights are frozen and adapters trained; its trunk serves the reference
            too, and a separate critic unless that starts from a model of its own.

    All stay in eval mode for good: dropout would make the ratio differ from 1 before the first update.
    """
    actor = actor.eval()
    if adapter is None or not adapter.lora_rank:
        reference = copy.deepcopy(actor).requires_grad_(False) if with_reference else None
        return Roles(actor, _assembled_critic(actor, critic, critic_from, None), reference)
    add_adapter(actor, adapter)
    return Roles(actor, _assembled_critic(actor, critic, critic_from, adapter), actor if with_reference else None)


def _assembled_critic(
    actor: PreTrainedModel, kind: CriticKind, critic_from: str | None, adapter: AdapterConfig | None
) -> Critic | None:
    if kind == "none":
        return None
    if critic_from is not None:
        critic = Critic.from_pretrained(critic_from, actor)
        if (kind == "shared") != (critic.trunk is None):
            raise InputError(
                f"critic={kind!r} cannot start from {critic_from!r}, which holds "
                f"{'a value head alone' if critic.trunk is None else 'a whole model'}: pass --critic-from None, or the "
                "other --critic"
            )
        if adapter is not None and critic.trunk is not None:
            add_adapter(critic.trunk, adapter)
            head_of(critic.trunk).requires_grad_(True)
    elif kind == "shared":
        critic = Critic.shared(actor)
    else:
        critic = Critic.separate(actor) if adapter is None else Critic.on_adapter(actor, adapter)
    return critic.to(actor.device)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a hub id or folder, padding on the left.

    Raises:
        InputError: there is none, or it has no end-of-sequence token.
    """
    check_exists(model, "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"no tokenizer could be loaded from {model!r}: give a folder with tokenizer.json (save_pretrained writes "
            f"it) or the id of a hub model that has one. ({brief(error)})"
        ) from error
    check_tokenizer(tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


def check_exists(model: str, files: str) -> None:
    """
    Raises:
        InputError: what is written as a folder is none.
    """
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise InputError(f"there is no folder {model!r}: give one with {files}, or a hub id")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """It ends texts; and where it does not pad them, from now on it does so with the token that ends them.

    Raises:
        InputError: it has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no eos_token, so completions would never end: set one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def loading(adapter: AdapterConfig) -> dict[str, Any]:
    """What `from_pretrained` is told of the trunk: its type, and bitsandbytes' settings where it is quantised.

    4 bits as in Dettmers et al. 2023 (QLoRA), arXiv:2305.14314: NormalFloat, with the constants quantised too. Heads
    keep their type.
    """
    dtype: torch.dtype = getattr(torch, adapter.dtype)
    if adapter.load_in is None:
        return {"dtype": dtype}
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # 8bit: a warning at every product
    quantization = BitsAndBytesConfig(
        load_in_8bit=adapter.load_in == "8bit",
        load_in_4bit=adapter.load_in == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=HEADS,
    )
    return {"dtype": dtype, "quantization_config": quantization}


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """On the device; a quantised model is loaded there and must not be moved."""
    if device == torch.device("cuda"):  # accelerate's name for it where there is one process
        device = torch.device("cuda", torch.cuda.current_device())
    return model if model.device == device else model.to(device)  # type: ignore[arg-type]


def load_actor(
    model: str,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    adapter: AdapterConfig | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Causal language model of a hub id or folder.

    Args:
        adapter: says how its trunk is loaded, instead of dtype.
        attention: attn_implementation; transformers' choice if None.
    Raises:
        InputError: it cannot be loaded, or not whole: some other model.
    """
    check_exists(model, "config.json and model.safetensors")
    options: dict[str, Any] = {"dtype": dtype} if adapter is None else loading(adapter)
    options |= {} if attention is None else {"attn_implementation": attention}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"no causal language model could be loaded from {model!r}: give a folder with config.json and "
            f"model.safetensors, or a hub id. ({brief(error)})"
        ) from error
    found, info = loaded
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise InputError(
            f"{model!r} is no whole causal language model: it has no weights for {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}, which would be random"
        )
    return with_gradients(found)


def new_reward_model(
    model: str, tokenizer: PreTrainedTokenizerBase, *, adapter: AdapterConfig | None = None
) -> PreTrainedModel:
    """A sequence classifier with one label on the trunk of a pretrained model, to be trained.

    A new head's weights are normal with std 1 / sqrt(hidden size + 1): Stiennon et al. 2020, arXiv:2009.01325.

    Args:
        adapter: says how the trunk is loaded; float32 if None.
    Raises:
        InputError: it cannot be loaded.
    """
    found, has_head = _sequence_classifier(model, tokenizer, AdapterConfig() if adapter is None else adapter)
    if not has_head:
        head = head_of(found)
        nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return found


def load_reward_model(model: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Sequence classifier with one label of a hub id or folder, which may hold a whole model or an adapter of one.

    Args:
        tokenizer: its padding token is where the classifier looks for a text's end.
    Raises:
        InputError: it cannot be loaded, or has no head: some other model.
    """
    if is_adapter(model):
        return merged_reward_model(model, tokenizer)
    found, has_head = _sequence_classifier(model, tokenizer, AdapterConfig())
    if not has_head:
        raise InputError(
            f"{model!r} is no reward model: it has no trained head with one label; recipes/reward_model.py trains one"
        )
    return found


def _sequence_classifier(
    model: str, tokenizer: PreTrainedTokenizerBase, adapter: AdapterConfig
) -> tuple[PreTrainedModel, bool]:
    """The classifier, and whether its head came with it."""
    try:
        found, info = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, output_loading_info=True, **loading(adapter)
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"no reward model could be loaded from {model!r}: give a folder with config.json and model.safetensors, or "
            f"a hub id. ({brief(error)})"
        ) from error
    found.config.pad_token_id = tokenizer.pad_token_id
    return with_gradients(found), not any(
        name.endswith(("score.weight", "classifier.weight")) for name in info["missing_keys"]
    )


def end_token_ids(actor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a completion: the tokenizer's and those of the model's generation config."""
    configured = actor.generation_config.eos_token_id if actor.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}
