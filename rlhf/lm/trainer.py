"""The trainer: collect, update, evaluate, save."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.kl import adapt_kl_coef_proportionally
from rlhf.lm import checks
from rlhf.lm.checks import check_actor, check_arguments, check_other_models, check_processes, check_rewards
from rlhf.lm.config import TrainerConfig
from rlhf.lm.dynamic_sampling import Batch
from rlhf.lm.evaluation import HeldOut
from rlhf.lm.experience import Experience, build_experience, sequence_kl
from rlhf.lm.generation import Engine, build_engine
from rlhf.lm.hub import check_hub, push
from rlhf.lm.initial import load_initial, origin_of, save_initial
from rlhf.lm.layers import wrap_layers
from rlhf.lm.linear import speed_up
from rlhf.lm.logprobs import check_layouts
from rlhf.lm.lora import load_trained_state, merged, save_adapter, trained_state
from rlhf.lm.memory_plan import plan_run, show_plan, write_plan
from rlhf.lm.models import assemble_roles, check_tokenizer, end_token_ids, placed
from rlhf.lm.optimizer import build_learner, check_optimizer
from rlhf.lm.processes import default_accelerator
from rlhf.lm.report import collection_metrics, draw_plots, live_columns, sample_rows, verifier_counts
from rlhf.lm.rewards import RewardFunction, RewardModel, on_trunk, whole_models
from rlhf.lm.rollout import PromptSet, Sampler, collect
from rlhf.lm.tasks import Task
from rlhf.lm.update import ActorRecord, update
from rlhf.lm.verifier_pool import running
from rlhf.rewards import Moments, shape_scores
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
    rng_state,
    save_checkpoint,
    set_rng_state,
    truncate_after,
)


class Trainer:
    """Trains an actor on a task by PPO or GRPO, as the config says.

    Everything that can be wrong with the arguments is checked here, before a model is built or a file written.

    Args:
        config: the run.
        tokenizer: the actor's; without a pad token it gets the end-of-sequence token as one.
        task: prompts, held-out prompts and their verifier.
        make_actor: builds the starting actor; called once all checks have passed, and not at all on resume.
        reward_functions: what is trained for; the task's verifier if None. A `RewardModel` is one too.
        reward_weights: one per reward function; all 1 if None.
        make_engine: actor -> rollout engine; the config's if None.
        accelerator: devices, processes and precision; accelerate's own default if None.
    Raises:
        InputError: something given is wrong; says what, what is allowed and what to do.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        make_actor: Callable[[], PreTrainedModel],
        reward_functions: Sequence[RewardFunction] | None = None,
        reward_weights: Sequence[float] | None = None,
        make_engine: Callable[[PreTrainedModel], Engine] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        run = config.run
        check_tracker(run.log_with)
        check_hub(run.push_to_hub)
        accelerator = default_accelerator(config.run) if accelerator is None else accelerator
        check_arguments(tokenizer, make_actor, reward_functions)
        self.config, self.tokenizer, self.accelerator, self.task = config, tokenizer, accelerator, task
        self.reward_functions = [task.verifier] if reward_functions is None else list(reward_functions)
        self.judges = [*self.reward_functions, task.verifier]
        self.reward_weights = reward_weights
        check_tokenizer(tokenizer)
        check_processes(config, accelerator)
        check_optimizer(config.optimization)
        scorers = on_trunk(self.judges)
        if not scorers:
            check_rewards(self.reward_functions, reward_weights, task, tokenizer)
        for function in self.judges:
            if isinstance(function, RewardModel):
                function.model.to(accelerator.device)
        self.train_prompts, held_out_prompts = (
            PromptSet.of(rows, tokenizer, task, config) for rows in (task.train, task.held_out)
        )
        self.folder = RunFolder(run.run_dir)
        if run.resume:
            self._checkpoint = check_resumable(self.folder, config.as_dict(), may_change=checks.MAY_CHANGE)
        else:
            check_creatable(run.run_dir)
        self._build_models(held_out_prompts, make_actor, make_engine)
        self.held_out = HeldOut(self.sampler, held_out_prompts, task, count=run.eval_prompts, seed=run.seed)
        for scorer in scorers:
            scorer.attach(self.roles.actor)
        if scorers:  # they could not be asked before
            check_rewards(self.reward_functions, reward_weights, task, tokenizer)
        self.step, self.tokens, self.draws, self.kl_coef = 0, 0, 0, config.algorithm.kl_reward_coef
        self.moments = Moments()
        self.first_evaluation: dict[str, float] | None = None
        if run.resume:
            self._restore()
        else:
            self._begin()

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _build_models(
        self,
        held_out_prompts: PromptSet,
        make_actor: Callable[[], PreTrainedModel],
        make_engine: Callable[[PreTrainedModel], Engine] | None,
    ) -> None:
        config, accelerator = self.config, self.accelerator
        token_ids = [*self.train_prompts.token_ids, *held_out_prompts.token_ids]
        longest = max(map(len, token_ids))
        check_other_models(config, self.judges, self.tokenizer, longest)
        if config.run.resume:
            actor, self._origin = load_initial(self.folder.path)
        else:
            actor = make_actor()
            check_actor(actor, token_ids, config.sampling)
            self._origin = origin_of(actor)
        self.memory_plan = plan_run(
            actor, config, accelerator, longest_prompt=longest, reward_models=whole_models(self.judges)
        )
        actor = placed(actor, accelerator.device)
        if accelerator.num_processes > 1:  # before critic and reference are made from it
            broadcast([tensor.data for tensor in (*actor.parameters(), *actor.buffers())])
        set_seed(config.run.seed)  # for what draws from global generators: new layers, users' reward functions
        self.roles = assemble_roles(
            actor,
            critic=config.algorithm.critic,
            with_reference=config.algorithm.needs_reference,
            critic_from=config.source.critic_from,
            adapter=config.adapter,
        )
        speed_up(*self.roles.trunks(), *whole_models(self.judges))
        with accelerator.autocast():
            check_layouts(self.roles.actor)
        self.learner = build_learner(self.roles, config.optimization, accelerator)
        eos_token_ids = end_token_ids(self.roles.actor, self.tokenizer)
        engine = (
            make_engine(self.roles.actor)
            if make_engine is not None
            else build_engine(
                config.sampling.engine,
                self.roles.actor,
                eos_token_ids=eos_token_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                at_once=config.sampling.generation_batch_size,
                use_graphs=config.sampling.cuda_graphs,
                autocast=accelerator.autocast,
            )
        )
        self.sampler = Sampler(engine, self.tokenizer, config.sampling, accelerator)
        recompute, compiled = config.optimization.gradient_checkpointing, config.optimization.compile
        for trunk in self.roles.trunks() if recompute or compiled else []:  # now that the engine has tried the model
            wrap_layers(trunk, recompute=recompute, compiled=compiled)

    def _begin(self) -> None:
        """Create the run folder, now that nothing can be wrong any more; from here on the run can be resumed."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            RunFolder.create(self.folder.path, self.config.as_dict())
            if self.config.run.checkpoint_every > 0:
                save_initial(self.roles.actor, self.tokenizer, self._origin, self.folder.path)
        if self.config.run.checkpoint_every > 0:
            self.save_checkpoint()
        self.accelerator.wait_for_everyone()

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run to the end. Returns the held-out accuracies before (`initial/...`) and after (`final/...`)."""
        config, main = self.config, self.accelerator.is_main_process
        start = self.step
        if config.run.log_with:
            flat = {f"{topic}.{name}": str(v) for topic, f in config.as_dict().items() for name, v in f.items()}
            self.accelerator.init_trackers("rlhf", config=flat)
        title = str(config.run.run_dir)
        if main and self.memory_plan is not None:
            show_plan(self.memory_plan)
            write_plan(self.memory_plan, self.folder.path / "memory_plan.json")
        with (
            LiveView(
                title, config.optimization.steps, live_columns(self.task), start_step=self.step, enabled=main
            ) as view,
            MetricsLog(self.folder.metrics, self.accelerator) as metrics_log,
            JsonLines(self.folder.samples) if main else nullcontext() as samples_log,
            running(self.judges),
        ):
            if config.run.resume:
                view.say(f"resuming at step {self.step:,} of {config.optimization.steps:,}")
            if self.step == 0:
                view.say(f"evaluating on {self.held_out.count} held-out prompts before training")
                evaluation = self._evaluate(view)
                self.first_evaluation = {name: x for name, x in evaluation.items() if not name.startswith("time/")}
                metrics_log.write(0, evaluation | verifier_counts(self.judges, self.accelerator))
            while self.step < config.optimization.steps:
                metrics, samples = self.train_step()
                if self._is_due(config.run.eval_every) or self.step == config.optimization.steps:
                    evaluation = self._evaluate(view)
                    metrics |= evaluation
                metrics |= verifier_counts(self.judges, self.accelerator)
                metrics_log.write(self.step, metrics)
                if samples_log is not None:
                    for sample in samples:
                        samples_log.write(sample)
                view.update(self.step, metrics)
                if self._is_due(config.run.checkpoint_every):
                    self.save_checkpoint()
            last = self.held_out.evaluate() if self.step == start else evaluation
        return self._finish(last)

    def train_step(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Collect one round and update on it: metrics, and the samples worth keeping."""
        config = self.config
        started = time.perf_counter()
        rollout = collect(
            self.sampler,
            self.roles,
            self.train_prompts,
            self.reward_functions,
            config,
            reward_weights=self.reward_weights,
            first_draw=self.draws,
        )
        self.draws += rollout.draws
        batch, weights = rollout.batch, self.reward_weights or [1.0] * len(self.reward_functions)
        scores, greedy_scores = self._shaped(batch)
        experience = build_experience(
            batch.sequences,
            scores,
            rollout.group_ids,
            rollout.predictions,
            config.algorithm,
            kl_reward_coef=self.kl_coef,
            sampler_log_probs=batch.sampler_log_probs,
            token_rewards=batch.token_rewards,
            greedy_scores=greedy_scores,
            components=batch.components,
            weights=[*weights, *[1.0] * (len(rollout.reward_names) - len(weights))],
            is_finished=batch.is_finished,
        )
        settings = {"kl/coef": self.kl_coef, "lr": self.learner.scheduler.get_last_lr()[0]}
        collected = time.perf_counter()
        record = ActorRecord(experience) if experience.old_log_probs is None else None
        of_update = self._update(experience, record)
        if record is not None:
            rollout = replace(rollout, predictions=record.complete(rollout.predictions, self.accelerator))
        ended = time.perf_counter()
        metrics = collection_metrics(rollout, experience) | settings | of_update

        self._adapt_kl_coef(sequence_kl(rollout.predictions, batch.action_mask))
        self.step += 1
        self.tokens += rollout.tokens
        metrics |= {
            "tokens": self.tokens,
            "time/collect": collected - started,
            "time/update": ended - collected,
            "time/tokens_per_second": rollout.tokens / (ended - started),
        }
        return metrics, sample_rows(rollout.texts, self.step, config.run.samples_per_log)

    def _shaped(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] the scores as the algorithm wants them, and what the greedy completions get, treated alike; the run's
        statistics include the scores from now on."""
        algorithm, scores, baselines = self.config.algorithm, batch.scores, batch.greedy_scores
        if algorithm.shapes_scores:
            self.moments = self.moments.including(scores)
            shape = partial(
                shape_scores, moments=self.moments if algorithm.normalize_scores else None,
                clip=algorithm.score_clip, missing_eos_penalty=algorithm.missing_eos_penalty,
            )  # fmt: skip
            scores, baselines = shape(scores, batch.is_finished), shape(baselines, batch.greedy_is_finished)
        return scores, baselines + batch.greedy_token_rewards

    def _update(self, experience: Experience, record: ActorRecord | None) -> dict[str, float]:
        def order(epoch: int) -> torch.Tensor:
            generator = generator_for(self.config.run.seed, "minibatches", self.step, epoch)
            return torch.randperm(len(experience), generator=generator)

        return update(self.learner, experience, self.config, self.accelerator, minibatch_order=order, record=record)

    def _adapt_kl_coef(self, observed: float) -> None:
        algorithm = self.config.algorithm
        if algorithm.kl_target is not None:
            self.kl_coef = adapt_kl_coef_proportionally(
                self.kl_coef,
                observed,
                target_kl=algorithm.kl_target,
                horizon=algorithm.kl_horizon,
                num_samples=self.config.optimization.sequences_per_step,
            )

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.optimization.steps)

    def _evaluate(self, view: LiveView) -> dict[str, float]:
        started = time.perf_counter()
        found = self.held_out.evaluate()
        greedy, sampled = (self.held_out.as_text(found[f"{self.task.metric}/{name}"]) for name in ("greedy", "sampled"))
        view.say(f"step {self.step}: held-out {self.task.metric} {greedy} greedy, {sampled} sampled")
        return found | {"time/evaluate": time.perf_counter() - started}

    # -- files ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Everything that training needs to go on as if it had never stopped; the reference is in `initial/`."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder.checkpoints, self.step, self._state(), keep=self.config.run.keep_checkpoints)

    def _state(self) -> dict[str, Any]:
        critic, scaler = self.roles.critic, self.accelerator.scaler
        return {
            "step": self.step,
            "tokens": self.tokens,
            "draws": self.draws,
            "kl_coef": self.kl_coef,
            "moments": asdict(self.moments),
            "first_evaluation": self.first_evaluation,
            "actor": trained_state(self.roles.actor),
            "critic": None if critic is None else trained_state(critic),
            "optimizer": self.learner.optimizer.state_dict(),
            "scheduler": self.learner.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": rng_state(),
        }

    def _restore(self) -> None:
        state = load_state(self._checkpoint)
        self.step, self.tokens, self.draws = state["step"], state["tokens"], state["draws"]
        self.kl_coef = state["kl_coef"]
        self.moments = Moments(**state["moments"])
        self.first_evaluation = state["first_evaluation"]
        load_trained_state(self.roles.actor, state["actor"])
        if self.roles.critic is not None:
            load_trained_state(self.roles.critic, state["critic"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.learner.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"])
        if self.accelerator.is_main_process:
            for path in (self.folder.metrics, self.folder.samples):
                truncate_after(path, self.step if self.step > 0 else -1)  # step 0 starts with its evaluation again
        self.accelerator.wait_for_everyone()

    def _finish(self, last: dict[str, float]) -> dict[str, float]:
        """Final model and plots; says where everything is."""
        assert self.first_evaluation is not None
        summary = {
            f"{moment}/{name}": evaluation[f"{self.task.metric}/{name}"]
            for moment, evaluation in (("initial", self.first_evaluation), ("final", last))
            for name in ("greedy", "sampled")
        }
        if self.accelerator.is_main_process:
            merged(self.roles.actor).save_pretrained(self.folder.final)
            self.tokenizer.save_pretrained(self.folder.final)
            if self.config.adapter.lora_rank:
                save_adapter(self.roles.actor, self.folder.final / "adapter")
            if self.roles.critic is not None:
                self.roles.critic.save_pretrained(self.folder.final / "critic")
            draw_plots(self.folder, self.task)
            text = {name: self.held_out.as_text(x) for name, x in summary.items()}
            print(
                f"held-out {self.task.metric}, greedy: {text['initial/greedy']} -> {text['final/greedy']}; "
                f"sampled: {text['initial/sampled']} -> {text['final/sampled']}\n"
                f"model in {self.folder.final}, metrics in {self.folder.metrics}, samples in {self.folder.samples}, "
                f"plots in {self.folder.plots}"
            )
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:  # nobody waits for the upload
            push(self.folder.final, self.config.run.push_to_hub)
        return summary
