"""Epochs over a fixed data set: what supervised fine-tuning and reward modelling share.

An optimizer step takes `batch_size` rows; each process takes every n-th of them, in micro-batches; the denominator is
counted over the whole step before the first backward, and gradients are summed: the step is the same however split.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from rlhf.checks import InputError, check_choice, check_range
from rlhf.lm.attention import positions
from rlhf.lm.checks import MAY_CHANGE, check_launch, check_vocabulary
from rlhf.lm.config import AdapterConfig, FitRunConfig, LRSchedule
from rlhf.lm.data import DataConfig
from rlhf.lm.hub import check_hub, push
from rlhf.lm.linear import speed_up
from rlhf.lm.lora import add_adapter, load_trained_state, merged, save_adapter, train_head, trained_state
from rlhf.lm.models import placed
from rlhf.lm.processes import default_accelerator
from rlhf.lm.update import sum_gradients
from rlhf.run import (
    LiveView,
    MetricsLog,
    Panel,
    RunFolder,
    check_creatable,
    check_resumable,
    check_tracker,
    generator_for,
    load_state,
    plot_metrics,
    read_json_lines,
    rng_state,
    save_checkpoint,
    set_rng_state,
    truncate_after,
)


class HasTokens(Protocol):
    """A row."""

    @property
    def tokens(self) -> int:
        """Of its longest sequence."""
        ...

    @property
    def parts(self) -> list[list[int]]:
        """All of them."""
        ...


R = TypeVar("R", bound=HasTokens)


@dataclass(frozen=True)
class FitConfig:
    """How the rows are used."""

    epochs: int = 1
    """Passes over the rows."""
    steps: int | None = None
    """Optimizer steps; None: as many as the epochs have, the last incomplete batch left out."""
    batch_size: int = 64
    """Rows per optimizer step, over all processes."""
    micro_batch_size: int = 16
    """Rows per forward, and backward, on each process: bounds memory, changes no gradient."""
    learning_rate: float = 1e-5
    """Peak learning rate (AdamW)."""
    lr_schedule: LRSchedule = "linear"
    """After the warm-up: constant, or down to 0 linearly or as a cosine."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; > 0, inf for never."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size"):
            check_range(name, getattr(self, name), low=1)
        if self.steps is not None:
            check_range("steps", self.steps, low=1)
        check_range("learning_rate", self.learning_rate, low=0, high_open=True)
        check_choice("lr_schedule", self.lr_schedule, get_args(LRSchedule))
        check_range("warmup_ratio", self.warmup_ratio, low=0, high=1, high_open=True)
        check_range("weight_decay", self.weight_decay, low=0, high_open=True)
        check_range("max_grad_norm", self.max_grad_norm, low=0, low_open=True)


@dataclass(frozen=True)
class SupervisedConfig:
    """A whole run."""

    source: DataConfig = field(default_factory=DataConfig)
    optimization: FitConfig = field(default_factory=FitConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    run: FitRunConfig = field(default_factory=FitRunConfig)

    def __post_init__(self) -> None:
        self.adapter.check_trunk()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for config.json."""
        config = asdict(self)
        config["run"]["run_dir"] = str(self.run.run_dir)
        del config["run"]["resume"]
        return config


# rows -> sums over their units, of any shape: "loss" [], which carries the gradient, and whatever is to be reported.
Objective = Callable[[PreTrainedModel, Sequence[R]], dict[str, Tensor]]


def per_unit(sums: dict[str, Tensor], units: int) -> dict[str, float]:
    """The means of what has one element."""
    return {name: float(x) / units for name, x in sums.items() if x.ndim == 0}


class SupervisedTrainer(Generic[R]):
    """Minimises an objective over rows; run folder, held-out evaluation, checkpoints and resume as in `Trainer`.

    The model stays in eval mode: no dropout.

    Args:
        config: the run.
        tokenizer: saved with the model.
        train, held_out: rows.
        units: how many units (tokens, pairs) a row counts for in the means.
        objective: sums over the units of some rows.
        make_model: builds the model; called once all checks have passed but those of the model.
        check_model: called with the model on its device, before anything is written; raises what is wrong with it.
        describe: sums, units -> metrics.
        trained_head: names under which a model may have a head that is trained beside adapters.
        panels, columns: what is drawn, what the terminal shows.
        accelerator: devices, processes and precision; accelerate's own default if None.
    Raises:
        InputError: something given is wrong; says what, what is allowed and what to do.
    """

    def __init__(
        self,
        config: SupervisedConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[R],
        held_out: Sequence[R],
        units: Callable[[R], int],
        objective: Objective[R],
        make_model: Callable[[], PreTrainedModel],
        panels: Sequence[Panel],
        columns: Sequence[str],
        trained_head: tuple[str, ...] = (),
        describe: Callable[[dict[str, Tensor], int], dict[str, float]] = per_unit,
        check_model: Callable[[PreTrainedModel], None] = lambda model: None,
        accelerator: Accelerator | None = None,
    ) -> None:
        run = config.run
        check_tracker(run.log_with)
        check_hub(run.push_to_hub)
        accelerator = default_accelerator(run) if accelerator is None else accelerator
        check_launch(accelerator)
        self.config, self.tokenizer, self.accelerator = config, tokenizer, accelerator
        self.train_rows, self.held_out, self.units, self.objective = (
            train,
            held_out[: run.eval_prompts],
            units,
            objective,
        )
        self.panels, self.columns, self.describe = panels, columns, describe
        self.held_out_sums: dict[str, Tensor] = {}
        self.folder = RunFolder(run.run_dir)
        self.steps = self._count_steps()
        if run.resume:
            checkpoint = check_resumable(self.folder, config.as_dict(), may_change=MAY_CHANGE)
        else:
            check_creatable(run.run_dir)
        set_seed(run.seed)
        self.model = placed(make_model(), accelerator.device).eval()
        self._check_lengths()
        with accelerator.autocast():
            check_model(self.model)
        if accelerator.num_processes > 1:
            broadcast([tensor.data for tensor in (*self.model.parameters(), *self.model.buffers())])
        if config.adapter.lora_rank:
            add_adapter(self.model, config.adapter)
            for name in trained_head:
                if hasattr(self.model, name):
                    train_head(self.model.get_submodule(name))
        speed_up(self.model)
        self._build_optimizer()
        self.step = 0
        if run.resume:
            self._restore(load_state(checkpoint))
        elif accelerator.is_main_process:
            RunFolder.create(run.run_dir, config.as_dict())
        accelerator.wait_for_everyone()

    def _check_lengths(self) -> None:
        check_vocabulary(self.model, [ids for row in (*self.train_rows, *self.held_out) for ids in row.parts])
        longest, limit = max(row.tokens for row in (*self.train_rows, *self.held_out)), positions(self.model.config)
        if limit is not None and longest > limit:
            raise InputError(
                f"the longest row has {longest} tokens, more than the model's {limit} positions: pass --max-tokens "
                f"{limit} or less"
            )

    def _count_steps(self) -> int:
        fit, rows = self.config.optimization, len(self.train_rows)
        if rows < fit.batch_size:
            raise InputError(
                f"there are {rows} training rows, fewer than batch_size = {fit.batch_size}: pass --batch-size {rows}"
            )
        return fit.steps or rows // fit.batch_size * fit.epochs

    def _build_optimizer(self) -> None:
        fit = self.config.optimization
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters, lr=fit.learning_rate, betas=(0.9, 0.95), weight_decay=fit.weight_decay, fused=True
        )
        self.scheduler = get_scheduler(
            fit.lr_schedule if fit.lr_schedule != "constant" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=int(fit.warmup_ratio * self.steps),
            num_training_steps=self.steps,
        )
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)

    def train(self) -> dict[str, float]:
        """Run to the end. Returns the held-out metrics of the last evaluation."""
        run, main = self.config.run, self.accelerator.is_main_process
        if run.log_with:
            flat = {f"{topic}.{name}": str(v) for topic, f in self.config.as_dict().items() for name, v in f.items()}
            self.accelerator.init_trackers("rlhf", config=flat)
        evaluation: dict[str, float] = {}
        with (
            LiveView(str(run.run_dir), self.steps, self.columns, start_step=self.step, enabled=main) as view,
            MetricsLog(self.folder.metrics, self.accelerator) as log,
        ):
            if self.step == 0:
                log.write(0, self.evaluate())
            while self.step < self.steps:
                metrics = self.train_step()
                if self._is_due(run.eval_every) or self.step == self.steps:
                    evaluation = self.evaluate()
                    metrics |= evaluation
                log.write(self.step, metrics)
                view.update(self.step, metrics)
                if self._is_due(run.checkpoint_every):
                    self.save_checkpoint()
        evaluation = evaluation or self.evaluate()
        self._finish()
        return evaluation

    def train_step(self) -> dict[str, float]:
        """One optimizer step: its metrics, per unit."""
        started = time.perf_counter()
        batch = self._batch()
        denominator = sum(map(self.units, batch))
        sums = self._sums(batch, lambda loss: self.accelerator.backward(loss / denominator))
        sum_gradients(self.parameters, self.accelerator)
        self.accelerator.unscale_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimization.max_grad_norm))
        if self.accelerator.scaler is None and not norm < float("inf"):
            raise InputError(
                f"the gradient is not finite (norm {norm}): training has diverged, lower the learning rate"
            )
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.describe(sums, denominator) | {
            "grad_norm": norm,
            "lr": rate,
            "time/step": time.perf_counter() - started,
        }

    def _batch(self) -> list[R]:
        """Rows of this step: every row once, in random order, before any a second time."""
        size = self.config.optimization.batch_size
        epoch, at = divmod(self.step, len(self.train_rows) // size)
        order = torch.randperm(len(self.train_rows), generator=generator_for(self.config.run.seed, "prompts", epoch))
        return [self.train_rows[i] for i in order[at * size : (at + 1) * size].tolist()]

    def _sums(self, rows: Sequence[R], on_loss: Callable[[Tensor], object] | None = None) -> dict[str, Tensor]:
        """The objective's sums over the rows of all processes; `on_loss` gets each micro-batch's loss."""
        accelerator, size = self.accelerator, self.config.optimization.micro_batch_size
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        sums: dict[str, Tensor] = {}
        for start in range(0, max(len(mine), 1), size):
            # A process without rows takes one, so that it knows what is summed, and counts it for nothing.
            part, weight = (mine[start : start + size], 1.0) if mine else (rows[:1], 0.0)
            with accelerator.autocast(), torch.set_grad_enabled(on_loss is not None):
                found = self.objective(self.model, part)
            if on_loss is not None:
                on_loss(found["loss"] * weight)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * weight
        flat = accelerator.reduce(torch.cat([x.flatten() for x in sums.values()]), reduction="sum").cpu()
        parts = flat.split([x.numel() for x in sums.values()])
        return {name: part.view(x.shape) for (name, x), part in zip(sums.items(), parts, strict=True)}

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out rows; their sums stay in `held_out_sums`."""
        self.held_out_sums = self._sums(self.held_out)
        found = self.describe(self.held_out_sums, sum(map(self.units, self.held_out)))
        return {f"held_out/{name}": x for name, x in found.items()}

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.steps)

    def save_checkpoint(self) -> None:
        """Everything that training needs to go on as if it had never stopped."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "model": trained_state(self.model),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "rng": rng_state(),
            }
            save_checkpoint(self.folder.checkpoints, self.step, state, keep=self.config.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        load_trained_state(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"])
        if self.accelerator.is_main_process:
            truncate_after(self.folder.metrics, self.step)

    def _finish(self) -> None:
        if self.accelerator.is_main_process:
            merged(self.model).save_pretrained(self.folder.final)
            if self.config.adapter.lora_rank:
                save_adapter(self.model, self.folder.final / "adapter")
                self.tokenizer.save_pretrained(self.folder.final / "adapter")
            self.tokenizer.save_pretrained(self.folder.final)
            rows = read_json_lines(self.folder.metrics)
            plot_metrics(rows, self.folder.plots / "metrics.png", self.panels, str(self.config.run.run_dir))
            print(f"model in {self.folder.final}, metrics in {self.folder.metrics}, plots in {self.folder.plots}")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:  # nobody waits for the upload
            push(self.folder.final, self.config.run.push_to_hub)
