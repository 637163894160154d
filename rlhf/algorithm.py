"""An algorithm as data. `rlhf.presets` names combinations, `rlhf.objective` does what the data says."""

from dataclasses import dataclass
from typing import Literal, get_args

from rlhf.checks import InputError, check_choice, check_range
from rlhf.conventions import CONVENTIONS, Convention
from rlhf.kl import KLEstimator
from rlhf.policy_losses import WeightMode
from rlhf.reduce import Reduction

Advantage = Literal[
    "gae", "reward_to_go", "greedy_baseline", "group", "leave_one_out", "length_weighted", "mean_normalized",
    "best_of_group", "decoupled",
]  # fmt: skip
PolicyLoss = Literal["clip", "reinforce", "importance", "gspo", "cispo", "sapo"]
SamplerWeight = Literal["none", "token", "sequence", "sequence_mean"]
CriticKind = Literal["separate", "shared", "none"]
ConventionName = Literal[
    "ours", "cleanrl", "stable_baselines3", "torchrl", "rlax", "prime_rl", "openrlhf", "nemo_rl", "verl", "trl"
]
OF_GROUPS = ("group", "leave_one_out", "length_weighted", "mean_normalized", "best_of_group", "decoupled")


@dataclass(frozen=True)
class AlgorithmConfig:
    """What is estimated and what is minimised. The defaults are PPO's."""

    advantage: Advantage = "gae"
    """gae: from rewards and the critic's values; reward_to_go: the rewards to come; greedy_baseline: that minus the
    score of the prompt's greedy completion; the others compare the samples of one prompt, see rlhf.group_advantages
    (decoupled: for each reward function by itself)."""
    critic: CriticKind = "separate"
    """separate: a trunk of its own, copied from the actor; shared: a value head on the actor's trunk; none: V = 0."""
    gamma: float = 1.0
    """Discount per token, 0 to 1 (gae, reward_to_go, greedy_baseline)."""
    gae_lambda: float = 0.95
    """0 (TD) to 1 (Monte Carlo)."""
    divide_by_std: bool = True
    """Divide by the std of the group's scores (group, leave_one_out, best_of_group, decoupled)."""
    center_in_groups: bool = False
    """Subtract the group's mean from each score first (reward_to_go)."""
    whiten_advantages: bool | None = None
    """Shift and scale the step's advantages to mean 0 and variance 1 over all of its tokens. None: for gae,
    reward_to_go and decoupled, as their authors do."""
    policy_loss: PolicyLoss = "clip"
    """clip: PPO's clipped surrogate; reinforce: log-prob times advantage; importance: ratio times advantage, unclipped;
    gspo: one ratio per sequence; cispo: REINFORCE under a clipped weight; sapo: a soft gate."""
    clip_low: float | None = 0.2
    """The ratio is clipped below 1 - clip_low; 0 < clip_low < 1. None: not at all (cispo only)."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high; > 0."""
    dual_clip: float | None = None
    """Bounds the ratio of actions with a negative advantage too; > 1 (clip, gspo)."""
    gate_temperature_positive: float = 1.0
    """How narrow sapo's gate is where the advantage is positive; > 0."""
    gate_temperature_negative: float = 1.05
    """And elsewhere; > 0."""
    sampler_weight: SamplerWeight = "none"
    """Weigh the policy loss by actor's over sampler's probability, of each token, of each sequence, or its geometric
    mean over the sequence: for rollout engines whose probabilities are not quite the actor's."""
    sampler_weight_mode: WeightMode = "truncate"
    """truncate: weights are held within their bounds; mask: those outside are 0."""
    sampler_weight_high: float = 2.0
    """Upper bound of those weights; >= 1, inf for none."""
    sampler_weight_low: float | None = None
    """Their lower bound, between 0 and 1; None: 0."""
    value_clip: float | None = 0.2
    """Half-width of the interval around the old values, reward units; None does not clip."""
    value_coef: float = 0.5
    """Weight of the value loss, 0.5 * squared error; >= 0. (With a critic of its own, only Adam's epsilon sees it.)"""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, reward units per nat; >= 0."""
    kl_reward_coef: float = 0.0
    """Weight of KL to the reference in the reward (k1 per token, no gradient); >= 0."""
    kl_loss_coef: float = 0.0
    """Weight of KL to the reference in the loss; >= 0."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of the KL in the loss: k2 has the KL's gradient, k3 is GRPO's, k1 has none; see rlhf.kl."""
    kl_straight_through: bool = False
    """The estimator's value with k2's gradient."""
    kl_target: float | None = None
    """Nats per sequence: kl_reward_coef adapts to keep KL there; None keeps the coefficient fixed."""
    kl_horizon: float = 10_000
    """Sequences over which the adaptive coefficient reacts; at least those of one step."""
    overlong_buffer: float = 0.0
    """Completions that come within this share of max_new_tokens of the limit lose score, in a straight line; 0: none
    does."""
    overlong_scale: float = 1.0
    """What a completion at the limit loses, score units; >= 0."""
    normalize_scores: bool = False
    """Shift and scale scores by the mean and std of all scores of the run so far."""
    score_clip: float | None = None
    """Scores (after normalisation) are held within +- this; > 0. None: they are not."""
    missing_eos_penalty: float = 0.0
    """What a completion cut off at the limit loses, score units (after normalisation and clipping); >= 0."""
    whiten_rewards: bool = False
    """Scale per-token rewards, KL included, to variance 1 over the step's tokens; their mean stays (gae)."""
    train_on_truncated: bool = True
    """False: completions cut off at the limit are left out of the loss. Their scores still count in their groups."""
    refill_rounds: int = 0
    """Dynamic sampling: up to this many more rounds of prompts replace groups whose scores are all equal."""
    reduction: Reduction = "token_mean"
    """How per-token losses become one number: token_mean, sequence_mean, sequence_sum or fixed_length
    (max_new_tokens)."""
    convention: ConventionName = "ours"
    """Whose epsilons, clamps, degrees of freedom and masks, where programs differ: see rlhf.conventions."""

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            check_choice(name, getattr(self, name), options)
        for name in ("gamma", "gae_lambda"):
            check_range(name, getattr(self, name), low=0, high=1)
        if self.clip_low is not None:
            check_range("clip_low", self.clip_low, low=0, high=1, low_open=True, high_open=True)
        elif self.policy_loss != "cispo":
            raise InputError(f"clip_low=None clips nothing below, which only policy_loss='cispo' allows, got "
                             f"{self.policy_loss!r}: give a clip_low between 0 and 1")  # fmt: skip
        if self.dual_clip is not None:
            check_range("dual_clip", self.dual_clip, low=1, low_open=True)
            if self.policy_loss not in ("clip", "gspo"):
                raise InputError(f"dual_clip belongs to policy_loss='clip' or 'gspo', got {self.policy_loss!r}")
        for name in ("clip_high", "gate_temperature_positive", "gate_temperature_negative", "value_clip",
                     "kl_target", "kl_horizon", "score_clip"):  # fmt: skip
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low=0, low_open=True, high_open=True)
        check_range("sampler_weight_high", self.sampler_weight_high, low=1)
        if self.sampler_weight_low is not None:
            check_range("sampler_weight_low", self.sampler_weight_low, low=0, high=1)
        for name in ("value_coef", "entropy_coef", "kl_reward_coef", "kl_loss_coef", "overlong_scale",
                     "missing_eos_penalty"):  # fmt: skip
            check_range(name, getattr(self, name), low=0, high_open=True)
        check_range("overlong_buffer", self.overlong_buffer, low=0, high=1)
        check_range("refill_rounds", self.refill_rounds, low=0)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.kl_target is not None and self.kl_reward_coef == 0:
            raise InputError("kl_target adapts kl_reward_coef, which is 0 and would stay so: give it a value > 0")
        if self.advantage != "gae" and self.critic != "none":
            raise InputError(
                f"advantage={self.advantage!r} has no use for a critic: set critic='none', got {self.critic!r}"
            )
        if self.numbers.terminal_reward == "slot_after" and self.critic == "shared":
            raise InputError(
                f"convention={self.convention!r} wants a value one slot after the last action, which critic='shared', "
                "reading the actor's states at its actions, cannot give: set critic='separate'"
            )
        if self.advantage == "decoupled" and self.kl_reward_coef > 0:
            raise InputError("advantage='decoupled' normalises each reward function by itself, and KL is none: use "
                             "kl_loss_coef instead of kl_reward_coef")  # fmt: skip
        if self.advantage == "decoupled" and self.shapes_scores:
            raise InputError("advantage='decoupled' normalises each reward function by itself: leave out "
                             "normalize_scores, score_clip and missing_eos_penalty")  # fmt: skip
        if self.whiten_rewards and self.advantage != "gae":
            raise InputError(f"whiten_rewards belongs to advantage='gae', got {self.advantage!r}")
        if self.center_in_groups and self.advantage != "reward_to_go":
            raise InputError(f"center_in_groups belongs to advantage='reward_to_go', got {self.advantage!r}")
        if self.refill_rounds and not self.compares_samples:
            raise InputError(
                f"refill_rounds replaces groups without signal, but advantage={self.advantage!r} does not compare the "
                "samples of a prompt: set refill_rounds=0"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether KL to the reference enters the reward or the loss."""
        return self.kl_reward_coef > 0 or self.kl_loss_coef > 0

    @property
    def shapes_scores(self) -> bool:
        """Whether scores are changed before they become rewards: see `rlhf.rewards.shape_scores`."""
        return self.normalize_scores or self.score_clip is not None or self.missing_eos_penalty > 0

    @property
    def compares_samples(self) -> bool:
        """Whether advantages need several samples of each prompt."""
        return self.advantage in OF_GROUPS or self.center_in_groups

    @property
    def numbers(self) -> Convention:
        """The convention itself."""
        return CONVENTIONS[self.convention]

    @property
    def whitens(self) -> bool:
        """`whiten_advantages`, decided."""
        default = self.advantage in ("gae", "reward_to_go", "decoupled")
        return default if self.whiten_advantages is None else self.whiten_advantages


_CHOICES: dict[str, tuple[str, ...]] = {
    "advantage": get_args(Advantage),
    "critic": get_args(CriticKind),
    "policy_loss": get_args(PolicyLoss),
    "sampler_weight": get_args(SamplerWeight),
    "sampler_weight_mode": get_args(WeightMode),
    "kl_estimator": get_args(KLEstimator),
    "reduction": get_args(Reduction),
    "convention": get_args(ConventionName),
}
