"""TRL's GRPOTrainer as a contestant of step_vs_trl.py, with the settings that are told there."""

import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from step_contestants import (
    Clock,
    Lengths,
    LengthTable,
    Options,
    Turns,
    distinct_characters,
    kept_tokens,
    load_model,
    load_tokenizer,
    prompt_texts,
    resident,
    with_ends,
)
from torch import Tensor


def settings_of_all(options: Options) -> dict[str, Any]:
    """What either of TRL's trainers is told."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": options.device == "cpu",
        "bf16": False,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": options.seed,
    }


def their_step(options: Options, lengths: Lengths, name: str, folder: Path, connection: Connection) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock, table = Clock(options.device), LengthTable(options, lengths)
    turns = Turns(connection, clock, table, resident(options.device))
    at_once = min(16, options.sequences) if name == "trl-small" else options.sequences
    vllm = name == "trl-vllm"
    config = GRPOConfig(
        **settings_of_all(options),
        max_steps=10_000,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=options.sequences // at_once,
        num_generations=options.samples_per_prompt,
        max_completion_length=options.max_new_tokens,
        num_iterations=1,
        gradient_checkpointing=name == "trl-checkpointing",
        loss_type="grpo",
        beta=options.kl,
        scale_rewards="group",
        mask_truncated_completions=False,
        shuffle_dataset=False,
        max_grad_norm=1.0,
        use_transformers_continuous_batching=name == "trl-continuous",
        use_vllm=vllm,
        vllm_mode="colocate",
        vllm_importance_sampling_correction=False,
        generation_kwargs={"ignore_eos": True} if vllm else None,
    )
    callback = type("Waiting", (TrainerCallback,), {"on_step_begin": lambda self, *a, **k: turns.wait()})()
    trainer: Any = GRPOTrainer(
        model=load_model(options, folder),
        args=config,
        reward_funcs=cast(Any, distinct_characters),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompt_texts(options, lengths)] * 1000),
        processing_class=load_tokenizer(folder),
        callbacks=[callback],
    )
    trainer._generate_and_score_completions = clock.timed("collect", trainer._generate_and_score_completions)
    if vllm:
        trainer.vllm_generation.generate = clock.timed("generate", trainer.vllm_generation.generate)
        all_equal = [options.max_new_tokens] * options.sequences
        clock.count([[0] * options.prompt_tokens] * options.sequences, all_equal)
    elif name == "trl-continuous":
        schedule_batches(trainer, clock, table)
    else:
        schedule_generate(trainer, clock, table)
    trainer.train()


def schedule_generate(trainer: Any, clock: Clock, table: LengthTable) -> None:
    """model.generate, each row of its own length."""
    model, eos = trainer.model, trainer.processing_class.eos_token_id
    inner = model.generate

    def generate(input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        generation_config.eos_token_id = None
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "generation_config": generation_config}
        found, limits = generate_to_ends(inner, clock, table, inputs)
        completions = with_ends(found[:, input_ids.shape[1] :], limits, eos, ended=table.lengths == "natural")
        return torch.cat([input_ids, completions], -1)

    model.generate = generate


def generate_to_ends(
    generate: Callable[..., Any], clock: Clock, table: LengthTable, inputs: dict[str, Any]
) -> tuple[Any, Tensor]:
    """What model.generate gives for these inputs, until all rows have the table's lengths; and those lengths, [B]."""
    from transformers import StoppingCriteriaList

    prompts = kept_tokens(inputs["input_ids"], inputs["attention_mask"])
    wanted, width = table.of(prompts), inputs["input_ids"].shape[1]
    limits = torch.tensor(wanted, device=inputs["input_ids"].device)
    ends = limits + width
    criteria = [lambda ids, scores, **_: ids.shape[1] >= ends] if table.lengths == "natural" else []
    inputs["generation_config"].max_new_tokens = max(wanted)
    with clock.part("generate"):
        found = generate(**inputs, stopping_criteria=StoppingCriteriaList(criteria))
    clock.count(prompts, wanted)
    assert getattr(found, "sequences", found).shape[1] == width + max(wanted)
    return found, limits


def schedule_batches(trainer: Any, clock: Clock, table: LengthTable) -> None:
    """model.generate_batch, each request of its own length."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    model, eos = trainer.model, trainer.processing_class.eos_token_id
    inner, add = model.generate_batch, ContinuousBatchingManager.add_request
    wanted: list[int] = []

    def add_request(self: Any, input_ids: list[int], request_id: str, **settings: Any) -> Any:
        settings |= {"max_new_tokens": wanted[int(request_id.removeprefix("req_"))], "eos_token_id": -1}
        return add(self, input_ids, request_id, **settings)

    def generate_batch(prompts: list[list[int]], **settings: Any) -> Any:
        wanted[:] = table.of(prompts)
        with clock.part("generate"):
            found = inner(prompts, **settings)
        clock.count(prompts, [len(output.generated_tokens) for output in found.values()])
        for output in found.values():
            tokens = [1 if token == eos else token for token in output.generated_tokens]
            output.generated_tokens = [*tokens[:-1], eos] if table.lengths == "natural" else tokens
        return found

    cast(Any, ContinuousBatchingManager).add_request = add_request
    model.generate_batch = generate_batch
