"""TRL's last PPO with a critic, trl.experimental.ppo of TRL 1.12, as a contestant of step_vs_trl.py."""

import copy
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from step_contestants import (
    Clock,
    Lengths,
    LengthTable,
    Options,
    Turns,
    load_model,
    load_tokenizer,
    prompt_texts,
    resident,
    with_ends,
)
from torch import Tensor, nn
from trl_contestant import generate_to_ends, settings_of_all


def their_ppo_step(options: Options, lengths: Lengths, folder: Path, connection: Connection) -> None:
    """As our PPO: one epoch of one minibatch, a critic and a reference with a trunk of their own, KL in the reward."""
    sys.path.insert(0, str(options.trl_ppo))  # before the other TRL
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found, unused-ignore]

    from rlhf.presets import PRESETS

    ours = PRESETS["ppo"].algorithm
    clock, table = Clock(options.device), LengthTable(options, lengths)
    turns = Turns(connection, clock, table, resident(options.device))
    at_once = min(16, options.sequences)
    config = PPOConfig(
        **settings_of_all(options),
        total_episodes=10_000 * options.sequences,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=options.sequences // at_once,
        local_rollout_forward_batch_size=options.sequences,
        num_ppo_epochs=1,
        num_mini_batches=1,
        num_sample_generations=0,
        response_length=options.max_new_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=ours.kl_reward_coef,
        kl_estimator="k1",
        gamma=ours.gamma,
        lam=ours.gae_lambda,
        vf_coef=ours.value_coef,
        gradient_checkpointing=False,
    )
    tokenizer = load_tokenizer(folder)
    texts = [text for text in prompt_texts(options, lengths) for _ in range(options.samples_per_prompt)]
    policy = load_model(options, folder)
    waiting = {"on_train_begin": lambda self, *a, **k: turns.wait(), "on_step_end": lambda self, *a, **k: turns.wait()}
    trainer: Any = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=copy.deepcopy(policy),
        reward_model=NoReward(),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=policy.dtype),
        train_dataset=Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts]),
        callbacks=[type("Waiting", (TrainerCallback,), waiting)()],
    )
    schedule_generate(trainer, clock, table)
    accumulate = trainer.accelerator.accumulate

    def first_update(*models: Any) -> Any:
        if "collect" not in clock.parts:  # all that came before
            assert turns.began is not None
            clock.parts["collect"] = [now - began for now, began in zip(clock.now(), turns.began, strict=True)]
        return accumulate(*models)

    trainer.accelerator.accumulate = first_update
    trainer.train()


class NoReward(nn.Module):
    """Where TRL wants a reward model: a score for nothing."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = lambda input_ids, **_: SimpleNamespace(hidden_states=[input_ids[..., None].float()])

    def score(self, hidden: Tensor) -> Tensor:
        return hidden / 300


def schedule_generate(trainer: Any, clock: Clock, table: LengthTable) -> None:
    """model.generate, each row of its own length; here it gives logits too."""
    tokenizer, policy = trainer.processing_class, trainer.model.policy
    inner = policy.generate

    def generate(**inputs: Any) -> Any:
        policy.generation_config.eos_token_id = None
        found, limits = generate_to_ends(inner, clock, table, inputs)
        prompts = inputs["input_ids"]
        new = found.sequences[:, prompts.shape[1] :]
        new = torch.where(new == tokenizer.pad_token_id, 1, new)
        completions = with_ends(new, limits, tokenizer.eos_token_id, ended=table.lengths == "natural")
        found.sequences = torch.cat([prompts, completions], -1)
        return found

    policy.generate = generate
