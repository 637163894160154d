"""The roles: actor, critic, reference (reward models are in `rlhf.lm.rewards`), and how they are loaded and saved."""

import copy
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.algorithm import CriticKind
from rlhf.checks import InputError, brief
from rlhf.lm.batching import LayoutKind
from rlhf.lm.config import AdapterConfig
from rlhf.lm.head import widened
from rlhf.lm.logprobs import action_states, at_actions, trunk_of, widen
from rlhf.lm.lora import CRITIC, HEADS, add_adapter, merged, using, with_gradients, without_quantization
from rlhf.lm.trunk_reward import is_adapter, merged_reward_model

VALUE_HEAD = "value_head.safetensors"


def head_of(classifier: PreTrainedModel) -> nn.Linear:
    """The last layer of a token or sequence classifier."""
    head = classifier.score if hasattr(classifier, "score") else classifier.classifier
    assert isinstance(head, nn.Linear)
    return head


def _take_head(trunk: PreTrainedModel, model: str) -> None:
    """Give a token classifier the head of the sequence classifier that its trunk came from."""
    source = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=trunk.dtype)
    ours, theirs = head_of(trunk), head_of(source)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
        if ours.bias is not None:
            ours.bias.copy_(theirs.bias if theirs.bias is not None else torch.zeros_like(ours.bias))


class Critic(nn.Module):
    """V(s) before each completion token.

    With a trunk of its own it is a transformers token classifier with one label, so that it loads anywhere; without
    one it is a linear head: on the actor's last hidden states, or on those of the actor's trunk with an adapter of the
    critic's own (`adapted`, which is the actor and no part of this module).
    """

    def __init__(
        self, trunk: PreTrainedModel | None, head: nn.Linear | None, adapted: PreTrainedModel | None = None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self._adapted = (adapted,)  # in a tuple, so that it is not registered

    @property
    def adapted(self) -> PreTrainedModel | None:
        return self._adapted[0]

    @classmethod
    def separate(cls, actor: PreTrainedModel) -> "Critic":
        """A copy of the actor's trunk under a head of zeros: V starts at 0."""
        trunk = _token_classifier(actor)
        trunk.base_model.load_state_dict(actor.base_model.state_dict())
        classifier = head_of(trunk)
        nn.init.zeros_(classifier.weight)
        if classifier.bias is not None:
            nn.init.zeros_(classifier.bias)
        return cls(trunk.eval(), None)

    @classmethod
    def from_pretrained(cls, model: str, actor: PreTrainedModel) -> "Critic":
        """A critic that starts from a reward model, or from what `save_pretrained` wrote.

        Args:
            model: folder or hub id of a sequence or token classifier with one label, or a folder with
                value_head.safetensors, which becomes a head on the actor's trunk.
            actor: decides dtype and, for a head, its width.
        Raises:
            InputError: it cannot be loaded or does not fit.
        """
        head_file = Path(model) / VALUE_HEAD
        if is_adapter(model):
            raise InputError(
                f"no critic starts from {model!r}, an adapter without a trunk: pass the merged model in the folder "
                "above it, or --critic-from None, for a critic on the actor's trunk"
            )
        try:
            if head_file.is_file():
                critic = cls.shared(actor)
                assert critic.head is not None
                critic.head.load_state_dict(load_file(head_file))
                return critic
            dtype = widened(actor.dtype)
            trunk = AutoModelForTokenClassification.from_pretrained(model, num_labels=1, dtype=dtype)
            architecture = next(iter(AutoConfig.from_pretrained(model).architectures or []), "")
            if "SequenceClassification" in architecture:  # the same head without a bias, of which nothing is known
                _take_head(trunk, model)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"no critic could be made from {model!r}: give a reward model with one label, or the critic/ folder of "
                f"a run ({brief(error)})"
            ) from error
        return cls(trunk.eval(), None)

    @classmethod
    def on_adapter(cls, actor: PreTrainedModel, adapter: AdapterConfig) -> "Critic":
        """A head of zeros on the actor's frozen trunk with an adapter of the critic's own."""
        add_adapter(actor, adapter, CRITIC)
        return cls(None, cls.shared(actor).head, adapted=actor)

    @classmethod
    def shared(cls, actor: PreTrainedModel) -> "Critic":
        """A head of zeros on the actor's own hidden states."""
        size = actor.config.get_text_config().hidden_size
        head = nn.Linear(size, 1, dtype=widened(actor.dtype))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(None, head)

    def forward(
        self,
        sequence_ids: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor,
        actor_hidden: Tensor | None,
        *,
        layout: LayoutKind | None = None,
    ) -> Tensor:
        """[B, T] values of the states in which the last T tokens were chosen, at least float32; 0 in masked slots."""
        args = (sequence_ids, attention_mask, action_mask)
        if self.trunk is not None:
            head, hidden = head_of(self.trunk), action_states(trunk_of(self.trunk), *args, layout=layout)
        else:
            assert self.head is not None
            head = self.head
            if self.adapted is not None:
                with using(self.adapted, CRITIC):
                    hidden = action_states(trunk_of(self.adapted), *args, layout=layout)
            else:
                assert actor_hidden is not None
                hidden = actor_hidden[action_mask]
        # Not in autocast's type: an advantage is a difference of values that are closer than bfloat16's steps.
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else widen(head.bias)
            values = nn.functional.linear(widen(hidden), widen(head.weight), bias)
        return at_actions(values.squeeze(-1), action_mask)

    def save_pretrained(self, folder: Path) -> None:
        """A transformers token classifier, or `value_head.safetensors` (weight [1, H], bias [1])."""
        if self.trunk is not None:
            merged(self.trunk).save_pretrained(folder)
        elif self.adapted is not None:
            assert self.head is not None
            classifier = _token_classifier(self.adapted)
            classifier.base_model.load_state_dict(merged(self.adapted, CRITIC).base_model.state_dict())
            head_of(classifier).load_state_dict(self.head.state_dict(), strict=False)
            classifier.save_pretrained(folder)
        elif self.head is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, folder / VALUE_HEAD)


def _token_classifier(actor: PreTrainedModel) -> PreTrainedModel:
    """Of the actor's architecture, with one label and random weights."""
    config = without_quantization(copy.deepcopy(actor.config))
    config.num_labels = 1
    try:
        return AutoModelForTokenClassification.from_config(config, dtype=actor.dtype)
    except ValueError as error:
        raise InputError(
            f"transformers has no token classifier for {type(actor).__name__}, so no critic with a trunk of its "
            "own: use critic='shared', or critic='none' with advantage='group'"
        ) from error


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
                f"{'a value head alone' if critic.trunk is None else 'a whole model'}: pass the other --critic"
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"no tokenizer could be loaded from {model!r}: give a folder with tokenizer.json (save_pretrained writes "
            f"it) or the id of a hub model that has one. ({brief(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {model!r} has no eos_token, so completions would never end: set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


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
    model: str, *, dtype: torch.dtype | Literal["auto"] = torch.float32, adapter: AdapterConfig | None = None
) -> PreTrainedModel:
    """Causal language model of a hub id or folder.

    Args:
        adapter: says how its trunk is loaded, instead of dtype.
    Raises:
        InputError: it cannot be loaded.
    """
    options = {"dtype": dtype} if adapter is None else loading(adapter)
    try:
        return with_gradients(AutoModelForCausalLM.from_pretrained(model, **options))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"no causal language model could be loaded from {model!r}: give a folder with config.json and "
            f"model.safetensors, or a hub id. ({brief(error)})"
        ) from error


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
