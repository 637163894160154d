"""Rewards, advantages and statistics of one round."""

import torch

from rlhf.algorithm import AlgorithmConfig
from rlhf.lm.experience import Predictions, Sequences, build_experience, sequence_kl
from rlhf.masking import explained_variance

MASK = torch.tensor([[True, True, True], [True, False, False]])
IDS = torch.tensor([[3, 4, 5, 1], [3, 1, 0, 0]])
SEQUENCES = Sequences(IDS, torch.cat([torch.ones(2, 1, dtype=torch.bool), MASK], -1), MASK)


def predictions(values: torch.Tensor | None = None) -> Predictions:
    log_probs = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, 0.0, 0.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5], [-3.0, 0.0, 0.0]])
    return Predictions(log_probs, torch.ones(2, 3), reference, values)


def test_score_stands_on_the_last_action_and_kl_on_each() -> None:
    experience = build_experience(
        SEQUENCES, torch.tensor([1.0, 10.0]), torch.tensor([0, 1]), predictions(), AlgorithmConfig(), kl_reward_coef=0.1
    )
    expected = torch.tensor([[-0.05, 0.1, 1.0], [10.0 - 0.2, 0.0, 0.0]])
    torch.testing.assert_close(experience.rewards, expected)


def test_rewards_per_token_add_to_kl_and_score_and_padding_is_ignored() -> None:
    experience = build_experience(
        SEQUENCES, torch.tensor([1.0, 10.0]), torch.tensor([0, 1]), predictions(), AlgorithmConfig(),
        kl_reward_coef=0.1, token_rewards=torch.tensor([[1.0, 2.0, 3.0], [4.0, torch.nan, 5.0]]),
    )  # fmt: skip
    expected = torch.tensor([[1 - 0.05, 2 + 0.1, 3 + 1.0], [4 + 10.0 - 0.2, 0.0, 0.0]])
    torch.testing.assert_close(experience.rewards, expected)
    assert experience.advantages.isfinite().all()


def test_sequence_kl_is_the_mean_summed_log_ratio() -> None:
    assert sequence_kl(predictions(), MASK) == ((0.5 - 1.0 + 0.0) + 2.0) / 2


def test_lambda_one_without_a_critic_is_the_return_of_the_whole_completion() -> None:
    config = AlgorithmConfig(critic="none", gae_lambda=1.0, gamma=0.5, whiten_advantages=False)
    experience = build_experience(
        SEQUENCES, torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), predictions(), config, kl_reward_coef=0.0
    )
    torch.testing.assert_close(experience.advantages, torch.tensor([[0.25, 0.5, 1.0], [3.0, 0.0, 0.0]]))
    assert experience.returns is None


def test_perfect_critic_has_no_advantage_and_explains_all_variance() -> None:
    config = AlgorithmConfig(whiten_advantages=False)
    values = torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    experience = build_experience(
        SEQUENCES, torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), predictions(values), config, kl_reward_coef=0.0
    )
    torch.testing.assert_close(experience.advantages, torch.zeros(2, 3))
    assert experience.returns is not None
    torch.testing.assert_close(experience.returns, values)
    assert explained_variance(values, experience.returns, MASK) == 1.0


def test_whitened_advantages_have_mean_zero_and_unit_variance_over_all_tokens() -> None:
    experience = build_experience(
        SEQUENCES,
        torch.tensor([1.0, 3.0]),
        torch.tensor([0, 1]),
        predictions(torch.zeros(2, 3)),
        AlgorithmConfig(),
        kl_reward_coef=0.3,
    )
    kept = experience.advantages[MASK]
    torch.testing.assert_close(kept.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(kept.var(), torch.tensor(1.0))


def test_group_advantage_is_one_number_per_sequence_and_zero_without_signal() -> None:
    config = AlgorithmConfig(advantage="group", critic="none")
    mask = MASK.repeat(2, 1)
    sequences = Sequences(IDS.repeat(2, 1), SEQUENCES.attention_mask.repeat(2, 1), mask)
    found = Predictions(torch.zeros(4, 3), torch.zeros(4, 3), None, None)
    scores, groups = torch.tensor([0.0, 1.0, 0.1, 0.1]), torch.tensor([0, 0, 1, 1])
    experience = build_experience(sequences, scores, groups, found, config, kl_reward_coef=0.0)
    half = 0.5**0.5
    expected = torch.tensor([[-half] * 3, [half, 0.0, 0.0], [0.0] * 3, [0.0] * 3])
    torch.testing.assert_close(experience.advantages, expected)
    assert not experience.advantages[2:].any()


def test_without_a_sequences_actions_there_is_nothing_to_learn_from_it_after_them_either() -> None:
    config = AlgorithmConfig(convention="trl", train_on_truncated=False)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    sequences = Sequences(IDS, torch.cat([torch.ones(2, 1, dtype=torch.bool), mask], -1), mask)
    found = Predictions(torch.zeros(2, 3), torch.zeros(2, 3), None, torch.ones(2, 3))
    finished = torch.tensor([True, False])
    experience = build_experience(
        sequences, torch.rand(2), torch.arange(2), found, config, kl_reward_coef=0.0, is_finished=finished
    )
    assert experience.returns is not None
    assert experience.sequences.valued.tolist() == [[True] * 3, [False] * 3]
    assert experience.returns.ne(0).tolist() == [[True] * 3, [False] * 3]
