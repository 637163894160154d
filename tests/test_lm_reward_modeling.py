"""Reward models: the loss, calibration in closed form, and that one learns, is saved, and becomes a critic."""

import math
from pathlib import Path

import pytest
import torch
from tiny import encode, sequences_of, tiny_model, tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.config import RunConfig
from rlhf.lm.critic import Critic, head_of
from rlhf.lm.models import load_reward_model, new_reward_model
from rlhf.lm.reward_modeling import (
    PairFitConfig,
    RewardModelingConfig,
    expected_calibration_error,
    pair_objective,
    reliability,
    reward_model_trainer,
    scores,
)
from rlhf.lm.rewards import RewardModel
from rlhf.lm.rows import Pair
from rlhf.preference_losses import bradley_terry_loss
from rlhf.run import read_json_lines

PAD = tokenizer.pad_token_id


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal language model's folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(base: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return new_reward_model(base, tokenizer).eval()


def pairs_of(*texts: tuple[str, str]) -> list[Pair]:
    return [Pair(*encode(both), 0.5 * i) for i, both in enumerate(texts)]


PAIRS = pairs_of(("1+1=2", "1+1=30"), ("12+3=15", "12+3=1"), ("7", "8888"))


def test_a_score_is_that_of_the_text_alone_and_what_ppo_will_see(model: PreTrainedModel) -> None:
    texts = ["1+1=2", "12345+1=12346", "7"]
    found = scores(model, encode(texts), pad_token_id=PAD)
    alone = torch.cat([scores(model, encode([text]), pad_token_id=PAD) for text in texts])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    in_ppo = RewardModel(model, tokenizer)(["1+1=", "12345+1=", ""], ["2", "12346", "7"])
    torch.testing.assert_close(found, torch.tensor(in_ppo), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("center_coef", "use_margins"), [(0.0, False), (0.01, True)])
def test_the_training_loss_is_the_cores(model: PreTrainedModel, center_coef: float, use_margins: bool) -> None:
    """Whose numbers are TRL's: tests/test_golden.py."""
    found = pair_objective(model, PAIRS, pad_token_id=PAD, center_coef=center_coef, use_margins=use_margins)
    chosen, rejected = (
        torch.stack([scores(model, [getattr(p, name)], pad_token_id=PAD)[0] for p in PAIRS])
        for name in ("chosen_ids", "rejected_ids")
    )
    margin = torch.tensor([0.0, 0.5, 1.0]) if use_margins else None
    expected = bradley_terry_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    torch.testing.assert_close(found["loss"], expected.sum(), rtol=0, atol=1e-5)
    assert found["accuracy"] == (chosen > rejected).sum()
    torch.testing.assert_close(found["lead"], (chosen - rejected).sum(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_with_label_smoothing_the_best_lead_is_finite(smoothing: float) -> None:
    """(1 - e) log sigmoid(h) + e log sigmoid(-h) is largest at h = logit(1 - e); h is the lead less the margin."""

    class Fixed(torch.nn.Module):
        device = "cpu"

        def __init__(self, lead: float) -> None:
            super().__init__()
            self.lead = torch.nn.Parameter(torch.tensor(lead, dtype=torch.float64))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
            logits = torch.stack([self.lead / 2, -self.lead / 2])[:, None]
            return type("Output", (), {"logits": logits})

    def slope(lead: float) -> float:
        model = Fixed(lead)
        pair_objective(model, [Pair([1], [2], 0.7)], pad_token_id=0, label_smoothing=smoothing)["loss"].backward()
        return float(model.lead.grad)

    best = logit(1 - smoothing) + 0.7
    assert slope(best) == pytest.approx(0, abs=1e-6)
    assert slope(best - 0.1) < 0 < slope(best + 0.1)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_the_calibration_error_in_closed_form() -> None:
    """Of 10 predictions of 0.8, r true ones: |0.8 - r / 10|, whichever side they were on."""
    for right in range(11):
        lead = torch.tensor([logit(0.8)] * right + [-logit(0.8)] * (10 - right))
        assert expected_calibration_error(reliability(lead)) == pytest.approx(abs(0.8 - right / 10), abs=1e-6)


def test_bins_add_up_over_batches_and_errors_do_not_cancel_between_them() -> None:
    sure, unsure = torch.tensor([logit(0.92)] * 10), torch.tensor([-logit(0.57)] * 10)
    bins = reliability(sure) + reliability(unsure)
    assert torch.equal(bins, reliability(torch.cat([sure, unsure])))
    assert bins[0].sum() == 20
    assert expected_calibration_error(bins) == pytest.approx((0.08 + 0.57) / 2, abs=1e-6)


def test_a_judge_who_knows_the_odds_is_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    lead = 3 * torch.randn(100_000, generator=generator).abs()
    came_true = torch.rand(len(lead), generator=generator) < torch.sigmoid(lead)
    signed = torch.where(came_true, lead, -lead)
    assert expected_calibration_error(reliability(signed)) < 0.005
    assert expected_calibration_error(reliability(3 * signed)) > 0.05  # too sure


def test_certainty_and_indifference_have_their_bins() -> None:
    bins = reliability(torch.tensor([0.0, 1e4]))
    assert bins[0].tolist() == [1, *[0] * 8, 1]
    assert expected_calibration_error(bins) == 0.0


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The larger last digit is the better answer: 45 pairs, of which 15 held out."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    pairs = [Pair(*encode([f"1={i}", f"1={j}"]), 0.0) for i in range(10) for j in range(i)]
    fit = PairFitConfig(epochs=20, batch_size=10, micro_batch_size=5, learning_rate=3e-3)
    config = RewardModelingConfig(optimization=fit, run=RunConfig(run_dir=folder, eval_every=0))
    trainer = reward_model_trainer(
        config,
        tokenizer=tokenizer,
        train=[p for i, p in enumerate(pairs) if i % 3],
        held_out=pairs[::3],
        make_model=lambda: new_reward_model(base, tokenizer),
    )
    found = trainer.train()
    assert found["held_out/accuracy"] > 0.8
    return folder


def test_a_reward_model_learns_an_order_and_starts_a_critic(trained: Path, tmp_path: Path) -> None:
    rows = read_json_lines(trained / "metrics.jsonl")
    assert rows[0]["held_out/accuracy"] < rows[-1]["held_out/accuracy"]
    assert rows[-1]["held_out/calibration_error"] < 0.5
    saved = load_reward_model(str(trained / "final"), tokenizer)
    texts = encode(["1=2", "1=9"])
    assert scores(saved, texts, pad_token_id=PAD).diff() > 0

    # The critic made from it says after each token what the reward model says of the text up to there.
    critic = Critic.from_pretrained(str(trained / "final"), tiny_model())
    batch = sequences_of(["1="], ["290"])
    values = critic(batch.sequence_ids, batch.attention_mask, batch.action_mask, None)[0]
    prefixes = scores(saved, encode(["1=", "1=2", "1=29"]), pad_token_id=PAD)
    torch.testing.assert_close(values, prefixes, rtol=0, atol=1e-5)

    # And comes back from its own folder, bias included.
    with torch.no_grad():
        head_of(critic.trunk).bias.fill_(0.5)
    critic.save_pretrained(tmp_path / "critic")
    again = Critic.from_pretrained(str(tmp_path / "critic"), tiny_model())
    found = again(batch.sequence_ids, batch.attention_mask, batch.action_mask, None)[0]
    torch.testing.assert_close(found, values + 0.5, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_critic_takes_a_reward_models_head_whatever_its_name(architecture: str, tmp_path: Path) -> None:
    """gpt2's sequence classifier calls it score, its token classifier classifier."""
    tiny_model(architecture=architecture).save_pretrained(tmp_path / "base")
    model = new_reward_model(str(tmp_path / "base"), tokenizer).eval()
    model.save_pretrained(tmp_path / "reward_model")
    critic = Critic.from_pretrained(str(tmp_path / "reward_model"), tiny_model(architecture=architecture))
    batch = sequences_of(["1="], ["290"])
    values = critic(batch.sequence_ids, batch.attention_mask, batch.action_mask, None)[0]
    expected = scores(model, encode(["1=", "1=2", "1=29"]), pad_token_id=PAD)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


def test_a_new_head_is_small_and_a_trained_one_is_kept(base: str, trained: Path) -> None:
    head: Tensor = head_of(new_reward_model(base, tokenizer)).weight
    assert 0.5 * 33**-0.5 < float(head.detach().std()) < 1.5 * 33**-0.5
    kept = head_of(new_reward_model(str(trained / "final"), tokenizer)).weight
    model = AutoModelForSequenceClassification.from_pretrained(trained / "final")
    assert torch.equal(kept, model.score.weight)


def test_a_language_model_is_no_reward_model(base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no reward model: it has no trained head"):
        load_reward_model(base, tokenizer)
    with pytest.raises(InputError, match="no reward model could be loaded"):
        load_reward_model(str(tmp_path / "nowhere"), tokenizer)


def test_a_shared_critics_head_comes_back(tmp_path: Path) -> None:
    actor = tiny_model()
    critic = Critic.shared(actor)
    torch.nn.init.normal_(critic.head.weight)
    critic.save_pretrained(tmp_path / "critic")
    again = Critic.from_pretrained(str(tmp_path / "critic"), actor)
    assert again.trunk is None
    assert torch.equal(again.head.weight, critic.head.weight)
    with pytest.raises(InputError, match="no critic could be made from"):
        Critic.from_pretrained(str(tmp_path / "critic"), tiny_model(hidden_size=64))
    with pytest.raises(InputError, match="no critic could be made from"):
        Critic.from_pretrained(str(tmp_path / "nowhere"), actor)
