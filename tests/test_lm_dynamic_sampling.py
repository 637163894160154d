"""Which completions a round is made of: refilled groups, greedy baselines, overlong and truncated completions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lm_trainer import digits_of, files_of, make_config, make_trainer

from rlhf.lm.dynamic_sampling import Batch, has_signal, join, refill
from rlhf.lm.experience import Experience, build_experience
from rlhf.lm.rollout import Sampler, collect
from rlhf.lm.trainer import Trainer
from rlhf.run import read_json_lines


def batch(scores: list[float], *, prompt: int = 2, length: int = 3) -> Batch:
    """Rows whose tokens are their score, so that a row can be told by any of its columns."""
    rows, total = len(scores), torch.tensor(scores)
    return Batch(
        total.long()[:, None].repeat(1, prompt + length),
        torch.ones(rows, prompt + length, dtype=torch.bool),
        torch.ones(rows, length, dtype=torch.bool),
        total[:, None].repeat(1, length),
        total[:, None].repeat(1, length),
        torch.zeros(rows, length),
        torch.ones(rows, dtype=torch.bool),
        total,
        total[:, None],
        total,
        total,
        torch.ones(rows, dtype=torch.bool),
    )


def test_a_group_of_equal_scores_has_no_signal() -> None:
    assert has_signal(torch.tensor([1.0, 1.0, 0.1, 0.1, 0.0, 1.0]), 2).tolist() == [False, False, True]
    assert not has_signal(torch.tensor([1.0, 2.0]), 1).any()


def test_groups_with_signal_come_first_in_their_order_and_those_without_fill_up() -> None:
    batches = [batch([1, 1, 2, 3, 4, 4]), batch([5, 6, 7, 7, 8, 8])]
    assert refill(batches, samples_per_prompt=2).scores.tolist() == [2, 3, 5, 6, 1, 1]
    assert refill([batches[0], batch([1, 2, 3, 4, 5, 6])], samples_per_prompt=2).scores.tolist() == [2, 3, 1, 2, 3, 4]


def test_joining_pads_prompts_on_the_left_and_completions_on_the_right() -> None:
    joined = join([batch([1, 2], prompt=2, length=3), batch([3], prompt=4, length=1)])
    assert joined.attention_mask.int().tolist() == [[0, 0, 1, 1, 1, 1, 1]] * 2 + [[1, 1, 1, 1, 1, 0, 0]]
    assert joined.action_mask.int().tolist() == [[1, 1, 1]] * 2 + [[1, 0, 0]]
    for rows in (joined.sequence_ids, joined.sampler_log_probs, joined.untruncated_log_probs):
        assert [row[row != 0].unique().tolist() for row in rows] == [[1], [2], [3]]
    assert joined.scores.tolist() == [1, 2, 3]
    assert len(joined.sequences) == 3


GROUP = {"advantage": "group", "critic": "none", "kl_reward_coef": 0.0, "kl_target": None}


class Stingy:
    """A reward that tells samples apart only for prompts whose first digit is one of `generous`."""

    __name__ = "stingy"

    def __init__(self, generous: str) -> None:
        self.generous, self.calls = generous, 0

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self.calls += 1
        return [float(i) if p[0] in self.generous else 0.5 for i, p in enumerate(prompts)]


def trainer_with(tmp_path: Path, reward: Any, algorithm: dict[str, Any], **changes: dict[str, Any]) -> Trainer:
    config = make_config(tmp_path / "run", algorithm={**GROUP, **algorithm}, **changes)
    return make_trainer(config, reward_functions=[reward])


def collected(trainer: Trainer, first_draw: int = 0) -> Any:
    return collect(
        trainer.sampler, trainer.roles, trainer.train_prompts, trainer.reward_functions, trainer.config,
        reward_weights=None, first_draw=first_draw,
    )  # fmt: skip


def test_rewards_per_token_are_signal_too_and_are_joined_padded() -> None:
    equal, other = batch([1.0, 1.0]), batch([2.0, 2.0], length=5)
    token_rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 5])
    refilled = refill([equal, other._replace(token_rewards=token_rewards)], samples_per_prompt=2)
    assert refilled.totals.tolist() == [3.0, 2.0]
    assert torch.equal(refilled.token_rewards, token_rewards)
    joined = refill([other._replace(token_rewards=token_rewards), equal], samples_per_prompt=1)
    assert joined.token_rewards.shape == (2, 5)


def test_draws_go_on_until_enough_groups_have_signal(tmp_path: Path) -> None:
    reward = Stingy("123")
    rollout = collected(trainer_with(tmp_path, reward, {"refill_rounds": 20}))
    assert 1 < rollout.draws < 21
    assert reward.calls == 1 + rollout.draws, "one call checks the reward function beforehand"
    assert has_signal(rollout.batch.scores, 2).all()
    assert len(rollout.batch.scores) == 16
    assert 0.3 < rollout.without_signal < 0.9
    assert rollout.tokens > int(rollout.batch.action_mask.sum())


def test_draws_are_bounded_and_the_round_stays_whole(tmp_path: Path) -> None:
    rollout = collected(trainer_with(tmp_path, Stingy(""), {"refill_rounds": 3}))
    assert rollout.draws == 4
    assert rollout.without_signal == 1.0
    assert len(rollout.batch.scores) == 16


def test_without_need_nothing_is_refilled(tmp_path: Path) -> None:
    plain = collected(trainer_with(tmp_path / "a", Stingy("123456789"), {}))
    ready = collected(trainer_with(tmp_path / "b", Stingy("123456789"), {"refill_rounds": 5}))
    assert ready.draws == plain.draws == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.batch, ready.batch, strict=True))


def test_prompts_go_on_after_the_last_draw_also_when_resumed(tmp_path: Path) -> None:
    """A run with refills, cut at a checkpoint and resumed, ends as the uninterrupted one."""
    runs = {}
    for name, stop in (("whole", None), ("cut", 4)):
        config = make_config(tmp_path / name, algorithm={**GROUP, "refill_rounds": 2})
        trainer = make_trainer(config, reward_functions=[Stingy("12345")])
        if stop is None:
            trainer.train()
        else:
            interrupt_at(trainer, stop)
            config = make_config(tmp_path / name, algorithm={**GROUP, "refill_rounds": 2}, run={"resume": True})
            make_trainer(config, reward_functions=[Stingy("12345")]).train()
        runs[name] = files_of(tmp_path / name)
    assert runs["whole"] == runs["cut"]
    draws = [row["groups/draws"] for row in read_json_lines(tmp_path / "whole" / "metrics.jsonl") if "tokens" in row]
    assert max(draws) > 1


def interrupt_at(trainer: Trainer, step: int) -> None:
    train_step = trainer.train_step

    def until() -> Any:
        if trainer.step == step:
            raise KeyboardInterrupt
        return train_step()

    trainer.train_step = until  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_the_greedy_baseline_is_the_greedy_completions_own_score(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, digits_of, {"advantage": "greedy_baseline", "reduction": "token_mean"})
    rollout = collected(trainer)
    prompts = [row["prompt"] for row, *_ in rollout.texts]
    assert prompts[::2] == prompts[1::2]
    indices = [next(i for i, r in enumerate(trainer.train_prompts.rows) if r["prompt"] == p) for p in prompts[::2]]
    *_, answers = trainer.sampler.complete(trainer.train_prompts, indices, width=4, seeds=None)
    expected = torch.tensor(digits_of(answers)).repeat_interleave(2)
    assert torch.equal(rollout.batch.greedy_scores, expected)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Experience]:
    """What the trainer's rounds are made into from now on."""
    seen: list[Experience] = []

    def build(*args: Any, **options: Any) -> Experience:
        seen.append(build_experience(*args, **options))
        return seen[-1]

    monkeypatch.setattr("rlhf.lm.trainer.build_experience", build)
    return seen


@pytest.mark.parametrize(
    "shaping",
    [
        {},
        {"normalize_scores": True},
        {"score_clip": 0.7},
        {"missing_eos_penalty": 1.0},
        {"overlong_buffer": 0.4, "overlong_scale": 3.0},
    ],
    ids=str,
)
def test_a_sample_that_is_the_greedy_completion_has_no_advantage(
    tmp_path: Path, shaping: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However scores are shaped: next to temperature 0 every sample is that completion."""
    seen = recorded(monkeypatch)
    options = {"advantage": "greedy_baseline", "reduction": "token_mean", **shaping}
    for temperature in (1e-6, 1.0):
        trainer = trainer_with(tmp_path / str(temperature), digits_of, options, sampling={"temperature": temperature})
        metrics, _ = trainer.train_step()
        assert metrics["reward/std"] > 0
    assert seen[0].advantages.eq(0).all()
    assert seen[1].advantages.ne(0).any()


def test_the_overlong_penalty_is_part_of_the_score_and_shown_by_name(tmp_path: Path) -> None:
    penalized = {"overlong_buffer": 0.4, "overlong_scale": 3.0}
    rollout = collected(trainer_with(tmp_path, digits_of, penalized, sampling={"temperature": 5.0}))
    lengths = rollout.batch.action_mask.sum(-1)
    penalty = -3.0 * (lengths - 3).clamp(min=0) / 2  # limit 5, buffer 2
    assert rollout.reward_names == ["digits_of", "overlong"]
    torch.testing.assert_close(rollout.batch.components[:, 1], penalty)
    torch.testing.assert_close(rollout.batch.scores, rollout.batch.components.sum(-1))
    assert penalty.unique().numel() > 1


def test_truncated_completions_are_left_out_of_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all are, nothing changes; by default everything is trained on."""
    complete = Sampler.complete

    def cut_off(*args: Any, **options: Any) -> Any:
        sequences, completions, texts = complete(*args, **options)
        return sequences, completions._replace(is_finished=torch.zeros_like(completions.is_finished)), texts

    monkeypatch.setattr(Sampler, "complete", cut_off)
    for train_on_truncated in (True, False):
        options = {"train_on_truncated": train_on_truncated}
        trainer = trainer_with(tmp_path / str(train_on_truncated), digits_of, options)
        before = {name: x.clone() for name, x in trainer.roles.actor.state_dict().items()}
        metrics, _ = trainer.train_step()
        assert metrics["completion/finished"] == 0.0
        changed = any(not torch.equal(x, before[name]) for name, x in trainer.roles.actor.state_dict().items())
        assert changed == train_on_truncated


def test_the_critic_is_judged_on_what_it_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions that are left out do not count as perfectly predicted."""
    complete, seen = Sampler.complete, recorded(monkeypatch)

    def half_cut_off(*args: Any, **options: Any) -> Any:
        sequences, completions, texts = complete(*args, **options)
        is_finished = torch.arange(len(texts)) % 2 == 0
        return sequences, completions._replace(is_finished=is_finished), texts

    monkeypatch.setattr(Sampler, "complete", half_cut_off)
    config = make_config(tmp_path, algorithm={"train_on_truncated": False})
    metrics, _ = make_trainer(config).train_step()
    mask = seen[0].sequences.action_mask
    assert mask.any(-1).tolist() == [True, False] * (len(mask) // 2)
    assert seen[0].old_values is not None
    assert seen[0].returns is not None
    values, returns = seen[0].old_values[mask], seen[0].returns[mask]
    expected = 1 - (returns - values).var() / returns.var()
    assert metrics["value/explained_variance"] == pytest.approx(float(expected), abs=1e-6)
    assert metrics["value/mean"] == pytest.approx(float(values.mean()), abs=1e-6)
    assert metrics["reward/shaped"] == pytest.approx(float(seen[0].rewards[mask].sum() / (len(mask) / 2)), abs=1e-6)
