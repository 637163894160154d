"""The critic: a value before each completion token, from a trunk of its own or the actor's."""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from rlhf.checks import InputError, brief
from rlhf.lm.batching import LayoutKind
from rlhf.lm.config import VALUE_HEAD, AdapterConfig
from rlhf.lm.head import widened
from rlhf.lm.logprobs import action_states, at_actions, trunk_of, widen
from rlhf.lm.lora import CRITIC, add_adapter, merged, using, without_quantization
from rlhf.lm.trunk_reward import is_adapter


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
