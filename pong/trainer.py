"""The training loop: collect, update, save, evaluate; the same for PPO and for the plain policy gradient."""

import os
import time
from collections import deque
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from pong.config import PongConfig, Precision
from pong.env import AtariEnvs
from pong.evaluation import evaluate
from pong.learning import Learner, estimate
from pong.network import ActorCritic
from pong.report import LIVE_COLUMNS, draw_plots, write_evaluation
from pong.rollout import Collector, Episode
from rlhf.checks import InputError
from rlhf.run import (
    JsonLines,
    LiveView,
    MetricsLog,
    RunFolder,
    check_creatable,
    check_resumable,
    check_tracker,
    generator_for,
    load_state,
    save_checkpoint,
    save_state,
    truncate_after,
)

# What a resumed run may change.
MAY_CHANGE = {"run_dir", "checkpoint_every", "eval_episodes", "threads", "log_with"}
_BACKGROUND_STEPS = 16  # random steps per environment whose median frame is the background
_GROUPS = 2  # one emulates while actions are chosen for the other
_WINDOW = 100  # episodes that the score is averaged over


class PongTrainer:
    """One run. Everything that can be wrong is checked here, before a file is written.

    Raises:
        InputError: something in the config is wrong; says what, what is allowed and what to do.
    """

    def __init__(self, config: PongConfig) -> None:
        self.config, run = config, config.run
        check_tracker(run.log_with)
        self.device = choose_device(run.device)
        self.folder = RunFolder(run.run_dir)
        state: dict[str, Any] | None = None
        if run.resume:
            state = load_state(check_resumable(self.folder, config.as_dict(), may_change=MAY_CHANGE))
        else:
            check_creatable(run.run_dir)
        # What this machine decides, a resumed run keeps: the last bits depend on it.
        self.threads = run.threads or (cores() if state is None else state["threads"])
        self.precision = choose_precision(run.precision, self.device) if state is None else state["precision"]

        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # exact, and float32 is that
        torch.manual_seed(run.seed)
        half = config.optimization.envs // _GROUPS
        groups = [
            AtariEnvs(config.game, seed=(run.seed, 0, index), count=half, threads=self.threads)
            for index in range(_GROUPS)
        ]
        self.network = build_network(config, actions=len(groups[0].action_names)).to(self.device)
        self.network.precision = getattr(torch, self.precision)
        self.collector = Collector(
            groups, self.network, steps=config.optimization.rollout_steps, stack=config.game.stack
        )
        self.learner = Learner(
            self.network,
            config.algorithm,
            epochs=config.epochs,
            minibatch_size=config.optimization.minibatch_size,
            adam_epsilon=config.optimization.adam_epsilon,
            max_grad_norm=config.optimization.max_grad_norm,
        )
        self.rollouts, self.episodes = 0, 0
        self._started = psutil.Process().create_time()  # of the clock: start-up counts
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        if state is not None:
            self._restore(state)
        else:
            self._begin()

    @property
    def steps(self) -> int:
        """Agent steps taken so far."""
        return self.rollouts * self.config.optimization.steps_per_rollout

    @property
    def elapsed(self) -> float:
        """Seconds since the process started, and before it was resumed."""
        return time.time() - self._started

    def train(self) -> dict[str, Any]:
        """Run to the end and evaluate; the evaluation's summary."""
        config, folder = self.config, self.folder
        accelerator = self._start_tracker()
        total = config.optimization.rollouts
        with (
            LiveView(
                str(folder.path),
                total * config.optimization.steps_per_rollout,
                LIVE_COLUMNS,
                start_step=self.steps,
            ) as view,
            MetricsLog(folder.metrics, accelerator) as metrics_log,
            JsonLines(folder.samples) as episode_log,
        ):
            while self.rollouts < total:
                metrics, episodes = self.train_step()
                metrics_log.write(self.steps, metrics)
                for episode in episodes:
                    episode_log.write({"step": self.steps, **episode._asdict()})
                view.update(self.steps, metrics)
                every = config.run.checkpoint_every
                if self.rollouts == total or (every > 0 and self.rollouts % every == 0):
                    self.save_checkpoint()
        self.collector.close()
        save_state(folder.final, {"network": dict(self.network.state_dict()), "precision": self.precision})
        draw_plots(folder, f"{config.game.game}: {config.algorithm.advantage}, {config.algorithm.loss}")
        summary = self._evaluate()
        if accelerator is not None:
            accelerator.end_training()
        print(
            f"policy in {folder.final}, metrics in {folder.metrics}, episodes in {folder.samples}, "
            f"plots in {folder.plots}\nwatch it: python -m pong.play {folder.path}"
        )
        return summary

    def _start_tracker(self) -> Accelerator | None:
        name = self.config.run.log_with
        if name is None:
            return None
        accelerator = Accelerator(cpu=self.device.type == "cpu", log_with=name, project_dir=self.folder.path)
        topics = self.config.as_dict().items()
        flat = {f"{topic}.{option}": str(value) for topic, part in topics for option, value in part.items()}
        accelerator.init_trackers("pong", config=flat)
        return accelerator

    def train_step(self) -> tuple[dict[str, Any], list[Episode]]:
        """Collect one rollout and update on it: metrics, and the episodes that ended."""
        config, seed = self.config, self.config.run.seed
        started = time.perf_counter()
        torch.set_num_threads(1)  # the emulators have the other cores
        rollout = self.collector.collect(generator_for(seed, "actions", self.rollouts + 1))
        collected = time.perf_counter()
        torch.set_num_threads(self.threads)
        learning_rate, entropy_coef, gamma = self._scheduled()
        ends = config.game.reward_ends_credit
        targets = estimate(rollout, config.algorithm, reward_ends_credit=ends, gamma=gamma)
        metrics: dict[str, Any] = self.learner.update(
            rollout,
            targets,
            learning_rate=learning_rate,
            entropy_coef=entropy_coef,
            generator=generator_for(seed, "minibatches", self.rollouts),
        )
        ended = time.perf_counter()

        self.rollouts += 1
        self.episodes += len(rollout.episodes)
        self.recent.extend(episode.score for episode in rollout.episodes)
        metrics |= {
            "score/mean_100": sum(self.recent) / len(self.recent) if self.recent else None,
            "score/mean": _mean([episode.score for episode in rollout.episodes]),
            "episode/steps": _mean([episode.steps for episode in rollout.episodes]),
            "episodes": self.episodes,
            "lr": learning_rate,
            "entropy_coef": entropy_coef,
            "gamma": gamma,
            "time/collect": collected - started,
            "time/update": ended - collected,
            "time/elapsed": self.elapsed,
            "time/steps_per_second": config.optimization.steps_per_rollout / (ended - started),
        }
        return metrics, rollout.episodes

    def _scheduled(self) -> tuple[float, float, float]:
        """Learning rate, entropy coefficient and discount; linear over the run, the first perhaps geometric."""
        optimization, algorithm = self.config.optimization, self.config.algorithm
        share = self.rollouts / optimization.rollouts

        def between(first: float, final: float) -> float:
            return first + share * (final - first)

        rate, final_rate = optimization.learning_rate, optimization.final_learning_rate
        is_geometric = optimization.lr_schedule == "geometric"
        final_gamma = algorithm.gamma if algorithm.final_gamma is None else algorithm.final_gamma
        return (
            rate * (final_rate / rate) ** share if is_geometric else between(rate, final_rate),
            between(algorithm.entropy_coef, algorithm.final_entropy_coef),
            between(algorithm.gamma, final_gamma),
        )

    def _evaluate(self) -> dict[str, Any]:
        count = self.config.run.eval_episodes
        if count == 0:
            return {}
        torch.set_num_threads(1)
        with LiveView("evaluation", count, ("mean_score",)) as view:
            found = evaluate(
                self.network,
                self.config.game,
                episodes=count,
                seed=self.config.run.seed,
                threads=self.threads,
                on_progress=lambda done, mean: view.update(done, {"mean_score": mean}),
            )
        return write_evaluation(self.folder, found, "evaluation.json")

    # -- files ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The first frames, and the run folder now that nothing can be wrong any more."""
        self.collector.reset()
        if self.config.game.subtract_background:
            generator = generator_for(self.config.run.seed, "actions", 0)
            steps = min(_BACKGROUND_STEPS, self.config.optimization.rollout_steps)
            self.network.background.copy_(self.collector.measure_background(steps, generator))
        RunFolder.create(self.folder.path, self.config.as_dict())
        self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Everything that training needs to go on as if it had never stopped."""
        save_checkpoint(
            self.folder.checkpoints,
            self.steps,
            {
                "network": dict(self.network.state_dict()),
                "learner": self.learner.state(),
                "collector": self.collector.state(),
                "threads": self.threads,
                "precision": self.precision,
                "rollouts": self.rollouts,
                "episodes": self.episodes,
                "elapsed": self.elapsed,
                "recent": list(self.recent),
            },
            keep=2,
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load(state["network"])
        self.learner.restore(state["learner"])
        self.rollouts, self.episodes = state["rollouts"], state["episodes"]
        self._started -= state["elapsed"]
        self.recent.extend(state["recent"])
        print(f"resuming at step {self.steps:,}: playing the emulators to where they were")
        self.collector.restore(state["collector"])
        for path in (self.folder.metrics, self.folder.samples):
            truncate_after(path, self.steps)


def build_network(config: PongConfig, *, actions: int) -> ActorCritic:
    """The config's network, freshly initialised."""
    game = config.game
    return ActorCritic(
        config.network,
        stack=game.stack,
        frame_shape=game.frame_shape,
        actions=actions,
        pixel_unit=game.pixel_unit,
    )


def choose_device(name: str) -> torch.device:
    """auto: cuda if there is one.

    Raises:
        InputError: torch does not know the device, cannot use it here, or computes nothing on it.
    """
    if name == "meta":
        raise InputError("device='meta' holds no numbers: try auto or cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0]}): try auto or cpu"
        ) from error


def choose_precision(name: Precision, device: torch.device) -> str:
    """auto: bfloat16 where the device has instructions for it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch that we allow
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mean(values: list[float] | list[int]) -> float | None:
    return sum(values) / len(values) if values else None
