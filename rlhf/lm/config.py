"""Everything a run can be told, grouped by topic. Each field is documented, each range checked where it is set."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf.algorithm import AlgorithmConfig
from rlhf.checks import InputError, check_choice, check_range
from rlhf.lm.generation.protocol import Truncation
from rlhf.presets import PRESETS, PresetName

LRSchedule = Literal["constant", "linear", "cosine"]
EngineKind = Literal["slots", "transformers"]
TrunkType = Literal["float32", "bfloat16"]
Bits = Literal["8bit", "4bit"]
OptimizerKind = Literal["adamw", "adamw8bit"]
VALUE_HEAD = "value_head.safetensors"  # the file of a critic that is a head on the actor's trunk


def check_used(options: Any, used: Collection[str], *, by: str) -> None:
    """No option is set that would do nothing.

    Args:
        options: a dataclass; what differs from its class's defaults is set.
        used: names of fields. by: who uses them, for the message.
    Raises:
        InputError: one is.
    """
    for option in fields(options):
        value = getattr(options, option.name)
        if value != option.default and option.name not in used:
            flag = f"--{option.name.replace('_', '-')}"
            raise InputError(f"{flag} {value!r} does nothing in {by}: leave it out")


@dataclass(frozen=True)
class SourceConfig:
    """What is trained on what: read by the recipes, kept in the run's config.json."""

    model: str | None = None
    """Folder or hub id of a pretrained model; None (arithmetic alone): a small one is made and taught on the spot."""
    task: str = "arithmetic"
    """arithmetic, gsm8k or reasoning_gym; preference: the one task of recipes/ppo_preference.py."""
    data: str | None = None
    """gsm8k: a folder with train.jsonl and test.jsonl, or a hub id; reasoning_gym: one of its tasks, such as lcm;
    preference: a .jsonl, .json or .parquet file, a folder of them, or a hub id; None: prompts made up on the spot."""
    data_name: str | None = None
    """Which configuration of a hub data set (preference, as the two below)."""
    train_split: str = "train"
    """The split whose prompts are trained on."""
    test_split: str | None = None
    """The split of held-out prompts; None: test, validation or eval, else rows of the training split."""
    task_options: tuple[str, ...] = ()
    """For reasoning_gym: the task's own options, name=value ..., such as max_value=12; size: entries to train on."""
    partial_credit: bool = False
    """For reasoning_gym: the task's whole score in [0, 1] is the reward, not full marks alone."""
    instruction: str | None = None
    """What follows the question in a prompt (gsm8k, reasoning_gym); None: the task's own."""
    reward_model: str | None = None
    """Folder or hub id of a sequence classifier with one label; or the folder of an adapter that is one, which with a
    lora_rank is laid on the actor's trunk (recipes/ppo_preference.py)."""
    critic_from: str | None = None
    """Where the critic starts: a reward model (critic separate), or the critic/ folder of a run with such a critic;
    None: the actor's trunk under a head of zeros."""
    plain_prompts: bool = False
    """Ask in plain text: for pretrained models without a chat template; preference: HH-RLHF's dialogues as they are
    written, even where there is one."""
    drop_long_prompts: bool = False
    """Leave out prompts longer than max_prompt_tokens instead of stopping."""
    verifier_workers: int = 2
    """Processes that check answers (gsm8k, reasoning_gym), for each training process; 0: none, it does so itself, and
    the three options below are not to be set."""
    verifier_timeout: float = 5.0
    """Seconds for one answer in a worker, which is killed then; > 0."""
    verifier_memory_mb: int = 1024
    """MiB by which a worker may grow on an answer (Linux only)."""
    verifier_strict: bool = False
    """Stop on an answer that a worker cannot check (time, memory, crash, error) instead of scoring it 0."""

    def __post_init__(self) -> None:
        if self.model is None and self.task in ("gsm8k", "reasoning_gym"):
            raise InputError(f"task {self.task!r} needs a pretrained model: pass --model <folder or hub id>")
        check_range("verifier_workers", self.verifier_workers, low=0)
        check_range("verifier_timeout", self.verifier_timeout, low=0, low_open=True, high_open=True)
        check_range("verifier_memory_mb", self.verifier_memory_mb, low=1)
        if self.verifier_workers == 0:
            of_workers = {"verifier_timeout", "verifier_memory_mb", "verifier_strict"}
            check_used(self, {x.name for x in fields(self)} - of_workers, by="a run with --verifier-workers 0")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn."""

    max_prompt_tokens: int = 512
    """Longest prompt accepted, in tokens; a longer one stops the run before it starts, unless dropped."""
    max_new_tokens: int = 256
    """Longest completion, in tokens, end-of-sequence token included."""
    temperature: float = 1.0
    """Logits are divided by it, when sampling and when training; > 0."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: among all. Training sees the whole distribution, and so does the
    importance ratio: sampler/log_prob_gap compares with the untruncated log-probs."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens that together have this probability; 0 < top_p <= 1, 1: among all."""
    min_p: float = 0.0
    """Sample among tokens at least this fraction as likely as the most likely one; 0 <= min_p <= 1, 0: among all."""
    engine: EngineKind = "slots"
    """slots: continuous batching over a slot cache, prompts read once for their group; transformers: the plain engine,
    for models whose attention cannot be replaced."""
    cuda_graphs: bool = True
    """On CUDA, the slot engine runs each decoding step as one CUDA graph, where the model allows it."""
    generation_batch_size: int = 256
    """Sequences generated at once on each process, at most: bounds memory, changes no result."""

    def __post_init__(self) -> None:
        check_range("max_prompt_tokens", self.max_prompt_tokens, low=1)
        check_range("max_new_tokens", self.max_new_tokens, low=1)
        check_range("temperature", self.temperature, low=0, low_open=True, high_open=True)
        _ = self.truncation  # checks its ranges
        check_choice("engine", self.engine, get_args(EngineKind))
        check_range("generation_batch_size", self.generation_batch_size, low=1)

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class OptimizationConfig:
    """How much data is collected and how it is used."""

    steps: int = 100
    """Rounds of collecting completions and updating on them."""
    prompts_per_step: int = 32
    """Prompts per round, over all processes."""
    samples_per_prompt: int = 4
    """Completions of each prompt: the group size."""
    epochs: int = 2
    """Passes over each round's completions."""
    minibatches: int = 2
    """Optimizer steps per pass."""
    micro_batch_tokens: int | None = None
    """Tokens (prompt, completion and padding; a shared prompt's once) per forward and backward on each process, but at
    least one sequence: bounds memory, changes no gradient. None: 1,024 on a CPU, 8,192 on a GPU."""
    share_prompts: bool = True
    """Compute a prompt once for those of its completions that are in one micro-batch, where that saves a tenth of the
    tokens or more and the model's attention allows it: the same results to rounding. False: once for each."""
    gradient_checkpointing: bool = False
    """Keep each decoder layer's input alone and compute the layer again in the backward pass: less memory for a third
    more arithmetic, the same gradient."""
    compile: bool = False
    """Run the decoder layers of update and predictions through torch.compile: slow to start, the same results to
    rounding."""
    optimizer: OptimizerKind = "adamw"
    """adamw: torch's, fused; adamw8bit: bitsandbytes', which keeps its two moments in 8 bits each (to be installed)."""
    learning_rate: float = 1e-6
    """Peak learning rate (AdamW)."""
    critic_learning_rate: float | None = None
    """The critic's; None: the actor's."""
    lr_schedule: LRSchedule = "linear"
    """After the warm-up: constant, or down to 0 linearly or as a cosine."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = 0.9
    """AdamW's first beta, 0 <= beta < 1."""
    adam_beta2: float = 0.95
    """AdamW's second beta, 0 <= beta < 1."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon, > 0; 1e-5 in OpenAI's PPO."""
    critic_warmup_steps: int = 0
    """Rounds at the start in which the critic alone learns; the actor's learning rate is 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, actor and critic each on its own; > 0, inf for never."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "samples_per_prompt", "epochs", "minibatches"):
            check_range(name, getattr(self, name), low=1)
        if self.micro_batch_tokens is not None:
            check_range("micro_batch_tokens", self.micro_batch_tokens, low=1)
        check_range("learning_rate", self.learning_rate, low=0, high_open=True)
        if self.critic_learning_rate is not None:
            check_range("critic_learning_rate", self.critic_learning_rate, low=0, high_open=True)
        check_choice("optimizer", self.optimizer, get_args(OptimizerKind))
        check_choice("lr_schedule", self.lr_schedule, get_args(LRSchedule))
        check_range("warmup_steps", self.warmup_steps, low=0)
        for name in ("adam_beta1", "adam_beta2"):
            check_range(name, getattr(self, name), low=0, high=1, high_open=True)
        check_range("adam_epsilon", self.adam_epsilon, low=0, low_open=True)
        check_range("critic_warmup_steps", self.critic_warmup_steps, low=0)
        check_range("weight_decay", self.weight_decay, low=0, high_open=True)
        check_range("max_grad_norm", self.max_grad_norm, low=0, low_open=True)
        if self.warmup_steps >= self.optimizer_steps:
            raise InputError(
                f"warmup_steps = {self.warmup_steps} is not shorter than the run: steps * epochs * minibatches = "
                f"{self.optimizer_steps} optimizer steps; pass a smaller --warmup-steps"
            )
        if self.sequences_per_step % self.minibatches:
            raise InputError(
                f"prompts_per_step * samples_per_prompt = {self.prompts_per_step} * {self.samples_per_prompt} = "
                f"{self.sequences_per_step} sequences do not divide into minibatches = {self.minibatches} equal parts"
            )

    @property
    def sequences_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def optimizer_steps(self) -> int:
        return self.steps * self.epochs * self.minibatches


@dataclass(frozen=True)
class FitRunConfig:
    """Where a run goes and what it leaves there."""

    run_dir: Path = Path("runs/run")
    """Folder for config, metrics.jsonl, samples of completions, plots, checkpoints and the final model."""
    seed: int = 0
    """Of everything random: weights, data order, completions."""
    resume: bool = False
    """Continue the run in run_dir from its last checkpoint, exactly."""
    eval_every: int = 20
    """Steps between evaluations on held-out prompts; 0: only before and after training."""
    eval_prompts: int = 256
    """Held-out prompts per evaluation, at most as many as there are."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0: none."""
    keep_checkpoints: int = 2
    """Checkpoints kept, newest first."""
    log_with: str | None = None
    """One of accelerate's trackers (tensorboard, wandb, ...), beside metrics.jsonl."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub, owner/name, that the final model and tokenizer are uploaded to."""

    def __post_init__(self) -> None:
        for name in ("seed", "eval_every", "checkpoint_every"):
            check_range(name, getattr(self, name), low=0)
        check_range("eval_prompts", self.eval_prompts, low=1)
        check_range("keep_checkpoints", self.keep_checkpoints, low=1)


@dataclass(frozen=True)
class RunConfig(FitRunConfig):
    """Where a run goes and what it leaves there, where completions are sampled."""

    samples_per_log: int = 4
    """Completions written to samples.jsonl each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("samples_per_log", self.samples_per_log, low=0)


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters instead of all weights."""

    lora_rank: int = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    lora_alpha: int = 32
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: str = "all-linear"
    """Names of the layers that get one, separated by commas; all-linear: every linear layer of the trunk."""
    dtype: TrunkType = "float32"
    """Of the frozen trunk's weights and of what it computes; adapters and heads stay float32."""

    load_in: Bits | None = None
    """Quantise the frozen trunk with bitsandbytes, computing in dtype: 8bit (LLM.int8), 4bit (NF4, as in QLoRA)."""

    def __post_init__(self) -> None:
        check_range("lora_rank", self.lora_rank, low=0)
        check_range("lora_alpha", self.lora_alpha, low=1)
        check_choice("dtype", self.dtype, get_args(TrunkType))
        if self.load_in is not None:
            check_choice("load_in", self.load_in, get_args(Bits))

    def check_trunk(self) -> None:
        """What is loaded in few bits is not trained, and options of adapters are for adapters.

        Raises:
            InputError: it would be, there are none, or bitsandbytes is missing.
        """
        if self.load_in is not None and not self.lora_rank:
            raise InputError(
                f"load_in={self.load_in!r} freezes all weights: pass --lora-rank too, for adapters to train"
            )
        if self.load_in is not None and find_spec("bitsandbytes") is None:
            raise InputError(f"load_in={self.load_in!r} needs a package that is not there: pip install bitsandbytes")
        if self.dtype != "float32" and not self.lora_rank:
            raise InputError(
                f"dtype={self.dtype!r} is for a frozen trunk: pass --lora-rank too, or launch with accelerate's "
                "--mixed_precision bf16, which keeps the trained weights in float32"
            )
        if not self.lora_rank:
            check_used(self, {"lora_rank", "dtype", "load_in"}, by="a run without --lora-rank")

    def check_made(self) -> None:
        """For a model that is made on the spot, not loaded.

        Raises:
            InputError: an option says how to load it.
        """
        check_used(self, {"lora_rank", "lora_alpha", "lora_targets"}, by="this recipe without --model")


@dataclass(frozen=True)
class TrainerConfig:
    """A whole run."""

    source: SourceConfig = field(default_factory=SourceConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.adapter.check_trunk()
        if self.algorithm.compares_samples and self.optimization.samples_per_prompt < 2:
            raise InputError(
                f"advantage={self.algorithm.advantage!r} compares samples of one prompt: samples_per_prompt must be at "
                "least 2"
            )
        self._check_critic()
        if self.algorithm.kl_target is not None:
            check_range("kl_horizon", self.algorithm.kl_horizon, low=self.optimization.sequences_per_step)

    def _check_critic(self) -> None:
        kind, source, optimization = self.algorithm.critic, self.source.critic_from, self.optimization
        if kind == "none" and source is not None:
            raise InputError(f"critic_from = {source!r}, but critic='none': leave one of them out")
        if kind == "none" and optimization.critic_warmup_steps:
            raise InputError("critic_warmup_steps, but critic='none': there is none to warm up")
        if kind == "none" and optimization.critic_learning_rate is not None:
            raise InputError(
                f"critic_learning_rate = {optimization.critic_learning_rate}, but critic='none': there is none to "
                "train, leave one of them out"
            )
        if source is not None and (kind == "shared") != (Path(source) / VALUE_HEAD).is_file():
            holds, other = ("no value head alone", "separate") if kind == "shared" else ("a value head alone", "shared")
            raise InputError(
                f"critic={kind!r} cannot start from {source!r}, which holds {holds} ({VALUE_HEAD}): pass --critic-from "
                f"None, or --critic {other}"
            )

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the actor has to pass over the completions before the update. (The one place where this is decided.)

        Where a round is one optimizer step, the actor has not moved when the step's own forward sees the completions:
        `old_log_probs` are its log-probs, detached, the ratio is 1, and entropy, KL and the gap to the sampler are
        reported from it. The forward of its own stays where something needs it earlier: KL in the reward, a critic that
        reads the actor's states; or where the update leaves completions out that those metrics are about.
        """
        one_step = self.optimization.epochs == 1 and self.optimization.minibatches == 1
        early = self.algorithm.kl_reward_coef > 0 or self.algorithm.critic == "shared"
        return not one_step or early or not self.algorithm.train_on_truncated

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for config.json; `resume` is how a run was continued, not what it is, and left out."""
        config = asdict(self)
        config["run"]["run_dir"] = str(self.run.run_dir)
        config["source"]["task_options"] = list(self.source.task_options)
        del config["run"]["resume"]
        return config


def with_preset(config: TrainerConfig, name: PresetName) -> TrainerConfig:
    """The config with the preset's algorithm. A round keeps its number of sequences, in groups of 8 where they are
    compared and there were none; what is on-policy makes one optimizer step of each round; without a critic, there is
    no learning rate of its own."""
    preset, optimization = PRESETS[name], config.optimization
    if preset.algorithm.compares_samples and optimization.samples_per_prompt == 1:
        prompts = max(optimization.prompts_per_step // 8, 1)
        optimization = replace(optimization, prompts_per_step=prompts, samples_per_prompt=8)
    if preset.on_policy:
        optimization = replace(optimization, epochs=1, minibatches=1)
    if preset.algorithm.critic == "none":
        optimization = replace(optimization, critic_learning_rate=None)
    return replace(config, algorithm=preset.algorithm, optimization=optimization)
