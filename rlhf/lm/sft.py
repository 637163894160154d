"""Supervised fine-tuning on demonstrations, completion tokens only.

`sft_trainer` trains on a data set with a run folder; `fine_tune` is the bare loop, for who makes batches on the spot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from rlhf.checks import InputError
from rlhf.lm.experience import Sequences
from rlhf.lm.logprobs import can_pack, check_layouts, policy_output, trunk_of, widen
from rlhf.lm.rows import Demonstration
from rlhf.lm.supervised import FitConfig, SupervisedConfig, SupervisedTrainer
from rlhf.lm.tasks import pad_left
from rlhf.reduce import count, token_mean
from rlhf.run import Panel

PANELS = (
    Panel("Negative log-likelihood (nats per token)", (("loss", "training"), ("held_out/loss", "held out"))),
    Panel("Gradient norm before clipping", (("grad_norm", "norm"),)),
)


@dataclass(frozen=True)
class SFTFitConfig(FitConfig):
    """How the demonstrations are used."""

    pack: bool = False
    """Lay the rows of a micro-batch end to end instead of padding them; changes no number but by rounding. Models that
    would mix the rows are refused."""


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """A whole run."""

    optimization: SFTFitConfig = field(default_factory=SFTFitConfig)


def sft_trainer(
    config: SFTConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Demonstration],
    held_out: Sequence[Demonstration],
    make_model: Callable[[], PreTrainedModel],
    accelerator: Accelerator | None = None,
) -> SupervisedTrainer[Demonstration]:
    """A `SupervisedTrainer` that maximises the mean log-likelihood of all learned tokens of a step's rows."""
    pad_token_id = int(tokenizer.pad_token_id)
    pack = config.optimization.pack
    objective = packed_objective if pack else partial(padded_objective, pad_token_id=pad_token_id)
    return SupervisedTrainer(
        config, tokenizer=tokenizer, train=train, held_out=held_out, units=lambda row: sum(row.learned),
        objective=objective, make_model=make_model, panels=PANELS, columns=("loss", "held_out/loss", "lr"),
        check_model=check_packs if pack else check_layouts, accelerator=accelerator,
    )  # fmt: skip


def check_packs(model: PreTrainedModel) -> None:
    """Rows laid end to end do not mix in this model.

    Raises:
        InputError: they do.
    """
    if not can_pack(trunk_of(model)):
        raise InputError(
            f"{type(model).__name__} does not tell rows apart that are laid end to end (its attention or its recurrent "
            "state goes on where positions start anew), so that each would be learned as what follows another: leave "
            "out --pack"
        )


def padded_objective(model: PreTrainedModel, rows: Sequence[Demonstration], *, pad_token_id: int) -> dict[str, Tensor]:
    """{"loss": [] nats, summed over the rows' learned tokens}."""
    batch = padded(rows, pad_token_id=pad_token_id).to(model.device)
    output = policy_output(model, batch.sequence_ids, batch.attention_mask, batch.action_mask, temperature=1.0)
    return {"loss": -output.log_probs.sum()}


def packed_objective(model: PreTrainedModel, rows: Sequence[Demonstration]) -> dict[str, Tensor]:
    """As `padded_objective`, the rows in one long one: positions start anew with each, and none sees another.

    transformers makes the attention mask from the positions. Each row's first token follows another row, and is not
    learned, since a prompt has at least one token.
    """
    ids = [token for row in rows for token in row.prompt_ids + row.completion_ids]
    positions = [i for row in rows for i in range(row.tokens)]
    learned = [x for row in rows for x in [False] * len(row.prompt_ids) + row.learned]
    one = torch.tensor([ids, positions, learned], device=model.device)
    logits = model(input_ids=one[:1], position_ids=one[1:2], use_cache=False).logits[0, :-1]
    chosen = one[2, 1:].bool()
    return {"loss": cross_entropy(widen(logits[chosen]), one[0, 1:][chosen], reduction="sum")}


def padded(rows: Sequence[Demonstration], *, pad_token_id: int) -> Sequences:
    """Prompts padded on the left, completions on the right; the action mask marks the learned tokens."""
    ids, mask = pad_left(
        [row.prompt_ids for row in rows], width=max(len(row.prompt_ids) for row in rows), pad_token_id=pad_token_id
    )
    length = max(len(row.completion_ids) for row in rows)
    rest = [length - len(row.completion_ids) for row in rows]
    completions = torch.tensor([row.completion_ids + [pad_token_id] * n for row, n in zip(rows, rest, strict=True)])
    read = torch.tensor([[True] * len(row.completion_ids) + [False] * n for row, n in zip(rows, rest, strict=True)])
    learned = torch.tensor([row.learned + [False] * n for row, n in zip(rows, rest, strict=True)])
    return Sequences(torch.cat([ids, completions], -1), torch.cat([mask, read], -1), learned)


def fine_tune(
    model: PreTrainedModel,
    demonstrations: Callable[[int], Sequences],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Maximise the demonstrations' log-likelihood in place: AdamW, linear decay to 0, one batch per step.

    Args:
        demonstrations: step -> the batch of that step; its action_mask marks the tokens to learn.
        on_step: called with (step, loss in nats per token) after each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    for step in range(steps):
        loss = negative_log_likelihood(model, demonstrations(step).to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1, loss.item())
    model.eval()


def negative_log_likelihood(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """Mean over the batch's action tokens of -log pi(token | before), nats."""
    output = policy_output(model, batch.sequence_ids, batch.attention_mask, batch.action_mask, temperature=1.0)
    return token_mean(-output.log_probs, batch.action_mask, denominator=count(batch.action_mask, how="token_mean"))
