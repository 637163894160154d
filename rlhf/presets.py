"""Named algorithms, each one small piece of data that the trainer reads: `--preset NAME` in the recipes.

`print(PRESETS["grpo"])` shows one; `docs/algorithms.md` has them all in one table. What is not an algorithm but
a habit of one program (epsilons, clamps, degrees of freedom) is in `rlhf.conventions`.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlhf.algorithm import AlgorithmConfig


@dataclass(frozen=True)
class Preset:
    """An algorithm and where it comes from."""

    algorithm: AlgorithmConfig
    source: str
    """Authors, year, arXiv number."""
    on_policy: bool = False
    """Its gradient holds only for completions of the very policy it changes: one optimizer step per round."""

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the defaults of AlgorithmConfig, which are PPO's without KL."""
        ours, default = asdict(self.algorithm), asdict(AlgorithmConfig())
        return {name: value for name, value in ours.items() if value != default[name]}

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.changes.items())
        return f"AlgorithmConfig({options}){', on-policy' if self.on_policy else ''}; {self.source}"


PresetName = Literal[
    "ppo", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "remax", "rloo", "grpo", "dr_grpo", "dapo", "gspo",
    "cispo", "sapo", "opo", "maxrl", "pass_at_k", "gdpo",
]  # fmt: skip

PRESETS: dict[PresetName, Preset] = {
    "ppo": Preset(
        AlgorithmConfig(kl_reward_coef=0.01),
        "Schulman et al. 2017, arXiv:1707.06347; KL in the reward: Ziegler et al. 2019, arXiv:1909.08593",
    ),
    "reinforce": Preset(
        AlgorithmConfig(advantage="reward_to_go", critic="none", policy_loss="reinforce", kl_reward_coef=0.01),
        "Williams 1992",
        on_policy=True,
    ),
    "reinforce_pp": Preset(
        AlgorithmConfig(advantage="reward_to_go", critic="none", kl_reward_coef=0.01),
        "Hu et al. 2025, arXiv:2501.03262",
    ),
    "reinforce_pp_baseline": Preset(
        AlgorithmConfig(
            advantage="reward_to_go", critic="none", center_in_groups=True, kl_loss_coef=0.01, kl_estimator="k2"
        ),
        "Hu et al. 2025, arXiv:2501.03262",
    ),
    "remax": Preset(
        AlgorithmConfig(advantage="greedy_baseline", critic="none", kl_reward_coef=0.01, reduction="sequence_sum"),
        "Li et al. 2023, arXiv:2310.10505",
    ),
    "rloo": Preset(
        AlgorithmConfig(
            advantage="leave_one_out", critic="none", divide_by_std=False, kl_reward_coef=0.05, reduction="sequence_sum"
        ),
        "Ahmadian et al. 2024, arXiv:2402.14740",
    ),
    "grpo": Preset(
        AlgorithmConfig(advantage="group", critic="none", kl_loss_coef=0.04, reduction="sequence_mean"),
        "Shao et al. 2024, arXiv:2402.03300",
    ),
    "dr_grpo": Preset(
        AlgorithmConfig(advantage="group", critic="none", divide_by_std=False, reduction="fixed_length"),
        "Liu et al. 2025, arXiv:2503.20783",
    ),
    "dapo": Preset(
        AlgorithmConfig(
            advantage="group",
            critic="none",
            clip_high=0.28,
            overlong_buffer=0.2,
            refill_rounds=3,
        ),
        "Yu et al. 2025, arXiv:2503.14476",
    ),
    "gspo": Preset(
        AlgorithmConfig(
            advantage="group",
            critic="none",
            policy_loss="gspo",
            clip_low=3e-4,
            clip_high=4e-4,
            reduction="sequence_mean",
        ),
        "Zheng et al. 2025, arXiv:2507.18071",
    ),
    "cispo": Preset(
        AlgorithmConfig(advantage="group", critic="none", policy_loss="cispo", clip_low=None, clip_high=4.0),
        "MiniMax 2025, arXiv:2506.13585",
    ),
    "sapo": Preset(
        AlgorithmConfig(advantage="group", critic="none", policy_loss="sapo", reduction="sequence_mean"),
        "Gao et al. 2025, arXiv:2511.20347",
    ),
    "opo": Preset(
        AlgorithmConfig(advantage="length_weighted", critic="none"),
        "Hao et al. 2025, arXiv:2505.23585",
    ),
    "maxrl": Preset(
        AlgorithmConfig(advantage="mean_normalized", critic="none"),
        "Tajwar et al. 2026, arXiv:2602.02710",
    ),
    "pass_at_k": Preset(
        AlgorithmConfig(advantage="best_of_group", critic="none", divide_by_std=False),
        "Tang et al. 2025, arXiv:2503.19595",
    ),
    "gdpo": Preset(
        AlgorithmConfig(advantage="decoupled", critic="none"),
        "Liu et al. 2026, arXiv:2601.05242",
    ),
}
