"""What can be set about a Pong run, with the ranges checked; and the two presets."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf.checks import InputError, check_choice, check_range

Preset = Literal["fast", "v5"]
Advantage = Literal["episode", "mc", "td", "gae"]
PolicyLoss = Literal["reinforce", "clip", "kl"]
Precision = Literal["auto", "float32", "bfloat16"]
LRSchedule = Literal["linear", "geometric"]


@dataclass(frozen=True)
class GameConfig:
    """The game and what the agent sees of it."""

    game: str = "pong"
    """ROM name in snake case, as ale-py spells it: pong, breakout, ms_pacman."""
    frame_skip: int = 4
    """Emulated frames per agent step, all with the same action."""
    repeat_action_probability: float = 0.0
    """Sticky actions: chance that a frame repeats the previous frame's action instead."""
    actions: tuple[int, ...] = ()
    """Positions in the game's minimal action set that the agent may use; empty: all of it."""
    frame_height: int = 84
    """Rows that the screen's 210 are resized to (area average)."""
    frame_width: int = 84
    """Columns that the screen's 160 are resized to."""
    crop_top: int = 0
    """First row kept of those `frame_height`."""
    crop_bottom: int | None = None
    """Row after the last one kept; None: all."""
    stack: int = 4
    """Frames that make one observation."""
    max_pool: bool = True
    """Pixelwise maximum of the last two emulated frames, for games whose sprites flicker."""
    subtract_background: bool = False
    """Subtract each pixel's median over a few random steps: what moves is all that is left."""
    pixel_unit: float = 255.0
    """Grey levels that the network sees as 1."""
    reward_ends_credit: bool = False
    """A reward ends the credit: what happens after it is no merit of what happened before. True of Pong's points."""
    noop_max: int = 30
    """Episodes start after fewer than this many frames without action, drawn at random (FIRE is pressed first)."""
    max_frames_per_episode: int = 108_000
    """Emulated frames after which an episode is truncated: half an hour."""

    def __post_init__(self) -> None:
        check_range("frame_skip", self.frame_skip, low=1)
        check_range("repeat_action_probability", self.repeat_action_probability, low=0, high=1, high_open=True)
        for name in ("frame_height", "frame_width"):
            check_range(name, getattr(self, name), low=8, high=210)
        bottom = self.frame_height if self.crop_bottom is None else self.crop_bottom
        if not 0 <= self.crop_top < bottom <= self.frame_height:
            raise InputError(
                f"crop_top={self.crop_top}, crop_bottom={bottom} must satisfy "
                f"0 <= crop_top < crop_bottom <= frame_height={self.frame_height}"
            )
        check_range("stack", self.stack, low=1)
        check_range("pixel_unit", self.pixel_unit, low=0, low_open=True)
        check_range("noop_max", self.noop_max, low=0)
        check_range("max_frames_per_episode", self.max_frames_per_episode, low=self.frame_skip, high=10**7)
        if len(set(self.actions)) != len(self.actions) or any(action < 0 for action in self.actions):
            raise InputError(f"actions must be distinct and >= 0, got {self.actions}")

    @property
    def rows(self) -> slice:
        """The rows of the resized frame that are kept."""
        return slice(self.crop_top, self.frame_height if self.crop_bottom is None else self.crop_bottom)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(rows, columns) of one frame as the agent sees it."""
        return self.rows.stop - self.rows.start, self.frame_width


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantages and losses; each is a function of the core."""

    advantage: Advantage = "gae"
    """episode: the whole episode's return; mc: reward-to-go; td: one-step TD target; each minus the value. gae: between
    mc and td."""
    baseline: bool = True
    """False: no critic, nothing is subtracted, and steps whose return is not known yet are left out (episode, mc)."""
    loss: PolicyLoss = "clip"
    """reinforce: log-prob times advantage; clip: PPO's clipped surrogate; kl: PPO's adaptive KL penalty."""
    gamma: float = 0.99
    """Discount per agent step."""
    final_gamma: float | None = None
    """The discount rises or falls linearly to this; None: stays."""
    gae_lambda: float = 0.95
    clip: float = 0.2
    """Half-width of the ratio's interval (loss clip)."""
    kl_coef: float = 1.0
    """First coefficient of the penalty (loss kl); doubled or halved towards kl_target."""
    kl_target: float = 0.01
    """Nats per update (loss kl)."""
    value_coef: float = 0.5
    """Weight of 0.5 * squared error."""
    entropy_coef: float = 0.01
    final_entropy_coef: float = 0.001
    """The coefficient falls linearly to this."""
    normalize_advantages: bool = True
    """Whiten over each rollout."""

    def __post_init__(self) -> None:
        check_choice("advantage", self.advantage, get_args(Advantage))
        check_choice("loss", self.loss, get_args(PolicyLoss))
        check_range("gamma", self.gamma, low=0, high=1)
        if self.final_gamma is not None:
            check_range("final_gamma", self.final_gamma, low=0, high=1)
        check_range("gae_lambda", self.gae_lambda, low=0, high=1)
        check_range("clip", self.clip, low=0, high=1, low_open=True, high_open=True)
        for name in ("kl_coef", "kl_target"):
            check_range(name, getattr(self, name), low=0, low_open=True)
        for name in ("value_coef", "entropy_coef", "final_entropy_coef"):
            check_range(name, getattr(self, name), low=0)
        if not self.baseline and self.advantage in ("td", "gae"):
            raise InputError(f"advantage={self.advantage!r} is made of values: it needs baseline=True")


@dataclass(frozen=True)
class NetworkConfig:
    """Two or more convolutions and one hidden layer, shared by actor and critic."""

    channels: tuple[int, ...] = (32, 64, 64)
    kernels: tuple[tuple[int, int], ...] = ((8, 8), (4, 4), (3, 3))
    """(rows, columns) of each."""
    strides: tuple[tuple[int, int], ...] = ((4, 4), (2, 2), (1, 1))
    """(down, across) of each."""
    hidden: int = 512

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.kernels) == len(self.strides) >= 1:
            raise InputError(
                f"channels, kernels and strides need one entry per convolution, got {len(self.channels)}, "
                f"{len(self.kernels)} and {len(self.strides)}"
            )
        pairs = {"kernels": self.kernels, "strides": self.strides}
        sizes = {name: tuple(size for pair in value for size in pair) for name, value in pairs.items()}
        for name, values in (sizes | {"channels": self.channels, "hidden": (self.hidden,)}).items():
            for value in values:
                check_range(name, value, low=1)


@dataclass(frozen=True)
class OptimizationConfig:
    """How much is collected, and how it is learned from."""

    total_steps: int = 10_000_000
    """Agent steps of the whole run, over all environments; rounded up to whole rollouts."""
    envs: int = 16
    """Environments stepped together; even, since one half emulates while actions are chosen for the other."""
    rollout_steps: int = 128
    """Steps per environment between updates."""
    epochs: int | None = None
    """Passes over each rollout; None: 1 for loss reinforce (its gradient holds for fresh data only), otherwise 2."""
    minibatch_size: int = 256
    """Steps per optimizer step."""
    learning_rate: float = 2.5e-4
    final_learning_rate: float = 0.0
    """What the rate falls to."""
    lr_schedule: LRSchedule = "linear"
    """linear: by the same amount every rollout; geometric: by the same factor, to a final rate above 0."""
    adam_epsilon: float = 1e-5
    max_grad_norm: float = 0.5

    def __post_init__(self) -> None:
        for name in ("total_steps", "rollout_steps", "minibatch_size"):
            check_range(name, getattr(self, name), low=1)
        if self.envs < 2 or self.envs % 2:
            raise InputError(f"envs must be an even number, at least 2, got {self.envs}")
        if self.epochs is not None:
            check_range("epochs", self.epochs, low=1)
        if self.steps_per_rollout % self.minibatch_size:
            raise InputError(
                f"minibatch_size must divide envs * rollout_steps = {self.steps_per_rollout}, got {self.minibatch_size}"
            )
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            check_range(name, getattr(self, name), low=0, low_open=True)
        check_choice("lr_schedule", self.lr_schedule, get_args(LRSchedule))
        check_range("final_learning_rate", self.final_learning_rate, low=0)
        if self.lr_schedule == "geometric" and self.final_learning_rate == 0:
            raise InputError(
                "final_learning_rate = 0, which no rate that falls by a factor reaches: give one above 0, or pass "
                "--lr-schedule linear"
            )

    @property
    def steps_per_rollout(self) -> int:
        return self.envs * self.rollout_steps

    @property
    def rollouts(self) -> int:
        """Rollouts of the whole run."""
        return -(-self.total_steps // self.steps_per_rollout)


@dataclass(frozen=True)
class RunConfig:
    """Where the run goes and on what it runs."""

    run_dir: Path = Path("runs/pong")
    seed: int = 0
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint, exactly."""
    checkpoint_every: int = 50
    """Rollouts between checkpoints; 0: only at the end."""
    eval_episodes: int = 100
    """Fresh episodes that the final policy is scored on; 0: none."""
    device: str = "auto"
    """auto: cuda if there is one."""
    precision: Precision = "auto"
    """Of the convolutions and matrix products; weights stay float32. auto: bfloat16 where the device computes in it."""
    threads: int | None = None
    """Cores to use, for the emulator as for torch; None: all that this process may use. A resumed run keeps the number
    that it was started with, since torch's sums depend on it in their last bits."""
    log_with: str | None = None
    """A tracker that accelerate knows (tensorboard, wandb, ...), beside metrics.jsonl."""

    def __post_init__(self) -> None:
        check_range("seed", self.seed, low=0, high=2**63 - 1)
        check_range("checkpoint_every", self.checkpoint_every, low=0)
        check_range("eval_episodes", self.eval_episodes, low=0)
        check_choice("precision", self.precision, get_args(Precision))
        if self.threads is not None:
            check_range("threads", self.threads, low=1)


@dataclass(frozen=True)
class PongConfig:
    """One run."""

    game: GameConfig = field(default_factory=GameConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_range("rollout_steps", self.optimization.rollout_steps, low=self.game.stack)

    @property
    def epochs(self) -> int:
        if self.optimization.epochs is not None:
            return self.optimization.epochs
        return 1 if self.algorithm.loss == "reinforce" else 2

    def as_dict(self) -> dict[str, Any]:
        """JSON's types, for config.json; `resume` is how a run was continued, not what it is, and left out."""
        config = json.loads(json.dumps(asdict(self), default=str))
        del config["run"]["resume"]
        return dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "PongConfig":
        """The inverse of `as_dict`.

        Raises:
            InputError: a topic or option that this version does not know, or a value out of range.
        """
        topics: dict[str, Any] = {field.name: field.default_factory for field in fields(cls)}
        try:
            parts = {name: topics[name](**_with_tuples(options)) for name, options in config.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"config.json is not that of a Pong run of this version ({error!r})") from error
        run_dir = Path(parts["run"].run_dir) if "run" in parts else RunConfig.run_dir
        return cls(**parts | {"run": replace(parts.get("run", RunConfig()), run_dir=run_dir)})


def _with_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples."""

    def convert(value: Any) -> Any:
        return tuple(convert(item) for item in value) if isinstance(value, list) else value

    return {name: convert(value) for name, value in options.items()}


def preset(name: Preset, game: str = "pong") -> PongConfig:
    """A preset's options for a game.

    fast: no sticky actions; for Pong the three actions that matter, the field alone at 80x80, and a point ends the
    credit. Scores are not comparable with the literature's.
    v5: the protocol of ALE/Pong-v5 with 84x84 grey frames: sticky actions 0.25, the full minimal action set.
    """
    check_choice("preset", name, get_args(Preset))
    is_pong = game == "pong"
    # Advantages are whitened to 1, but values of points are off by a tenth or so: without more weight the critic, and
    # with it all credit at a distance, learns last.
    algorithm = AlgorithmConfig(gae_lambda=0.9, value_coef=10.0)
    if is_pong:
        # A miss follows the stroke at once, a won point 20 steps later: a short horizon first teaches to return balls,
        # a longer one then to attack.
        algorithm = replace(algorithm, gamma=0.97, final_gamma=0.99)
    network = NetworkConfig(channels=(16, 32), kernels=((8, 8), (4, 4)), strides=((4, 4), (2, 2)), hidden=256)
    shared = GameConfig(game=game, subtract_background=is_pong, pixel_unit=32.0 if is_pong else 255.0)
    shared = replace(shared, reward_ends_credit=is_pong)
    if name == "v5":
        return PongConfig(
            game=replace(shared, repeat_action_probability=0.25),
            algorithm=algorithm,
            network=network,
            optimization=OptimizationConfig(total_steps=7_500_000, learning_rate=1e-3, final_learning_rate=1e-5),
        )
    fast = replace(shared, frame_height=105, frame_width=80)
    if is_pong:
        # NOOP, RIGHT (up), LEFT (down), whose FIRE variants do the same; the field without score board and borders.
        fast = replace(fast, actions=(0, 2, 3), crop_top=17, crop_bottom=97, max_pool=False)
    return PongConfig(
        game=fast,
        algorithm=algorithm,
        network=network,
        optimization=OptimizationConfig(total_steps=1_100_000, learning_rate=1e-3, final_learning_rate=2e-5),
    )
