"""Reward models from preferences: Bradley-Terry, with accuracy and calibration on held-out pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checks import check_range
from rlhf.lm.logprobs import widen
from rlhf.lm.rows import Pair
from rlhf.lm.supervised import FitConfig, SupervisedConfig, SupervisedTrainer, per_unit
from rlhf.preference_losses import bradley_terry_loss
from rlhf.run import Panel

BINS = 10
PANELS = (
    Panel("Loss (nats per pair)", (("loss", "training"), ("held_out/loss", "held out"))),
    Panel(
        "Share of pairs the right way round", (("accuracy", "training"), ("held_out/accuracy", "held out")), (0.4, 1)
    ),
    Panel("Lead of the chosen answer (score units)", (("lead", "training"), ("held_out/lead", "held out"))),
    Panel("Expected calibration error", (("held_out/calibration_error", "held out"),)),
)


@dataclass(frozen=True)
class PairFitConfig(FitConfig):
    """How the pairs are used."""

    center_coef: float = 0.01
    """Weight of (chosen + rejected)^2, which holds scores around 0; 0.01 in its source (arXiv:2312.09244)."""
    label_smoothing: float = 0.0
    """Probability that a label is the wrong way round, 0 <= label_smoothing < 0.5: scores then stay finite."""
    use_margins: bool = True
    """Demand the lead that a row's `margin` says, score units; rows without the column have margin 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("center_coef", self.center_coef, low=0, high_open=True)
        check_range("label_smoothing", self.label_smoothing, low=0, high=0.5, high_open=True)


@dataclass(frozen=True)
class RewardModelingConfig(SupervisedConfig):
    """A whole run."""

    optimization: PairFitConfig = field(default_factory=PairFitConfig)


def reward_model_trainer(
    config: RewardModelingConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    make_model: Callable[[], PreTrainedModel],
    accelerator: Accelerator | None = None,
) -> SupervisedTrainer[Pair]:
    """A `SupervisedTrainer` that minimises the mean of `rlhf.preference_losses.bradley_terry_loss` over pairs."""
    objective = partial(
        pair_objective,
        pad_token_id=int(tokenizer.pad_token_id),
        center_coef=config.optimization.center_coef,
        label_smoothing=config.optimization.label_smoothing,
        use_margins=config.optimization.use_margins,
    )
    return SupervisedTrainer(
        config, tokenizer=tokenizer, train=train, held_out=held_out, units=lambda row: 1, objective=objective,
        make_model=make_model, panels=PANELS, columns=("loss", "accuracy", "held_out/accuracy", "lr"),
        describe=describe, trained_head=("score", "classifier"), accelerator=accelerator,
    )  # fmt: skip


def pair_objective(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    pad_token_id: int,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    use_margins: bool = True,
) -> dict[str, Tensor]:
    """Sums over pairs: loss (nats), accuracy, lead and score (score units), and `reliability` [3, BINS].

    Source of label smoothing here: Wang et al. 2024 (Secrets of RLHF II), arXiv:2401.06080, section 2.
    """
    chosen, rejected = scores(
        model, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs], pad_token_id=pad_token_id
    ).chunk(2)
    margin = torch.tensor([p.margin for p in pairs], device=chosen.device) if use_margins else torch.zeros_like(chosen)
    loss = bradley_terry_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    if label_smoothing:
        other_way = bradley_terry_loss(rejected, chosen, margin=-margin, center_coef=center_coef)
        loss = (1 - label_smoothing) * loss + label_smoothing * other_way
    lead = (chosen - rejected).detach()
    return {
        "loss": loss.sum(),
        "accuracy": (lead > 0).sum(),
        "lead": lead.sum(),
        "score": (chosen + rejected).detach().sum() / 2,
        "reliability": reliability(lead),
    }


def scores(model: PreTrainedModel, token_ids: Sequence[list[int]], *, pad_token_id: int) -> Tensor:
    """[B] scores of texts by a sequence classifier with one label, at least float32; padded on the right."""
    width = max(map(len, token_ids))
    ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in token_ids], device=model.device)
    lengths = torch.tensor([len(row) for row in token_ids], device=model.device)
    mask = torch.arange(width, device=model.device) < lengths[:, None]
    return widen(model(input_ids=ids, attention_mask=mask.long()).logits[:, 0])


def reliability(lead: Tensor) -> Tensor:
    """Predictions by how sure they are: [3, BINS] pairs, sum of predicted probabilities, sum of those that came true.

    What is predicted is the likelier outcome, with probability sigmoid(|lead|) under Bradley-Terry; bins divide
    [1/2, 1] evenly. A lead of 0 counts as half right.

    Args:
        lead: [N] float, score of the chosen answer minus that of the rejected.
    """
    sure = torch.sigmoid(lead.double().abs())
    right = torch.where(lead == 0, 0.5, (lead > 0).double())
    bins = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    rows = torch.stack([torch.ones_like(sure), sure, right])
    return torch.zeros(3, BINS, dtype=torch.float64, device=lead.device).index_add_(1, bins, rows)


def expected_calibration_error(bins: Tensor) -> float:
    """Mean over pairs of |predicted - observed| share of their bin; 0 to 0.5.

    Args:
        bins: [3, BINS] as `reliability` returns, sums of several calls included.
    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    pairs, predicted, right = bins
    return float((predicted - right).abs().sum() / pairs.sum())


def describe(sums: dict[str, Tensor], pairs: int) -> dict[str, float]:
    """Metrics per pair, and the calibration error."""
    return per_unit(sums, pairs) | {"calibration_error": expected_calibration_error(sums["reliability"])}


def plot_reliability(bins: Tensor, path: Path, title: str) -> None:
    """Predicted against observed probability of the likelier answer, and how many pairs stand behind each point."""
    from matplotlib.figure import Figure  # slow to load, and only plots need it

    pairs, predicted, right = bins[:, bins[0] > 0].tolist()
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="#D9D9D9", linewidth=1)
    x = [p / n for p, n in zip(predicted, pairs, strict=True)]
    y = [r / n for r, n in zip(right, pairs, strict=True)]
    axes.scatter(x, y, s=[20 + 400 * n / sum(pairs) for n in pairs], color="#0072B2", alpha=0.8)
    error = expected_calibration_error(bins)
    axes.set(xlabel="predicted probability", ylabel="observed share", title=f"{title}: calibration error {error:.3f}")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
