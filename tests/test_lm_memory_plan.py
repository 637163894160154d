"""What is planned against what is there: bytes of real tensors, counted one by one, and what autograd really saves."""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lm_trainer import make_config, make_trainer
from tiny import ARCHITECTURES, sequences_of, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.algorithm import AlgorithmConfig
from rlhf.checks import InputError
from rlhf.lm import linear, memory_plan
from rlhf.lm.config import AdapterConfig, OptimizationConfig, SamplingConfig, SourceConfig, TrainerConfig
from rlhf.lm.generation import SlotEngine
from rlhf.lm.layers import wrap_layers
from rlhf.lm.logprobs import action_states, trunk_of
from rlhf.lm.lora import CRITIC, using
from rlhf.lm.memory_plan import MemoryPlan, check_memory, plan_memory
from rlhf.lm.models import Roles, assemble_roles, load_actor
from rlhf.lm.optimizer import build_optimizer

real = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
CPU = torch.device("cpu")
PROMPT, NEW = 8, 24


def config_of(*, critic: str = "none", rank: int = 0, kl: float = 0.0, **optimization: Any) -> TrainerConfig:
    advantage = "group" if critic == "none" else "gae"
    return TrainerConfig(
        sampling=SamplingConfig(max_prompt_tokens=PROMPT, max_new_tokens=NEW, generation_batch_size=4),
        algorithm=AlgorithmConfig(advantage=advantage, critic=critic, kl_loss_coef=kl),  # type: ignore[arg-type]
        optimization=OptimizationConfig(**({"prompts_per_step": 4, "samples_per_prompt": 2} | optimization)),
        adapter=AdapterConfig(lora_rank=rank),
    )


def planned(actor: PreTrainedModel, config: TrainerConfig, **options: Any) -> MemoryPlan:
    return plan_memory(actor, config, device=CPU, longest_prompt=PROMPT, **options)


def distinct_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of the storages, each once, so that tied weights count once."""
    found = {x.data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None and x.numel()}
    return sum(found.values())


def all_bytes(*modules: torch.nn.Module | None) -> int:
    return distinct_bytes(x for m in modules if m is not None for x in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize("critic", ["none", "shared", "separate"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_weights_gradients_and_moments_are_planned_to_the_byte(critic: str, rank: int, kl: float) -> None:
    config = config_of(critic=critic, rank=rank, kl=kl)
    plan = planned(tiny_model(tie_word_embeddings=True), config)

    actor = tiny_model(tie_word_embeddings=True)
    needs_reference = config.algorithm.needs_reference
    roles = assemble_roles(
        actor, critic=config.algorithm.critic, with_reference=needs_reference, adapter=config.adapter
    )
    trained = [p for group in roles.parameter_groups() for p in group]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values()]

    assert plan.actor == all_bytes(roles.actor)
    assert plan.critic == all_bytes(roles.critic)
    assert plan.reference == (all_bytes(roles.reference) if kl and not rank else 0)
    assert plan.gradients == distinct_bytes(p.grad for p in trained)
    assert plan.optimizer == sum(x.nbytes for x in moments)


@real
def test_moments_in_eight_bits_are_planned_to_the_byte() -> None:
    plan = planned(tiny_model(intermediate_size=200), config_of(optimizer="adamw8bit"))
    trained = list(tiny_model(intermediate_size=200).parameters())
    assert min(p.numel() for p in trained) < 4096 < max(p.numel() for p in trained)
    optimizer = build_optimizer([trained], OptimizationConfig(optimizer="adamw8bit"))
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = ("state1", "state2", "absmax1", "absmax2")
    assert plan.optimizer == sum(
        state[name].nbytes for state in optimizer.state.values() for name in kept if name in state
    )


@real
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_trunk_is_planned_too(bits: Any, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = config_of(critic="separate", rank=4, kl=0.1)
    config = dataclasses.replace(config, adapter=AdapterConfig(lora_rank=4, load_in=bits))
    plan = planned(load_actor(str(tmp_path), adapter=config.adapter), config)
    actor = load_actor(str(tmp_path), adapter=config.adapter)
    roles = assemble_roles(actor, critic="separate", with_reference=True, adapter=config.adapter)
    assert plan.actor == sum(x.nbytes for x in (*roles.actor.parameters(), *roles.actor.buffers()))
    assert plan.gradients == sum(p.nbytes for group in roles.parameter_groups() for p in group)


def test_a_reward_model_counts_as_it_is() -> None:
    model = torch.nn.Linear(7, 3, dtype=torch.float64)
    plan = planned(tiny_model(), config_of(), reward_models=[model])
    assert plan.reward_models == 8 * (7 * 3 + 3)
    assert plan.held == planned(tiny_model(), config_of()).held + plan.reward_models


def saved_bytes(roles: Roles, rows: int) -> int:
    """What the forward passes of actor and critic save over `rows` full sequences, weights aside."""
    sequences = sequences_of(["1" * PROMPT] * rows, ["2" * NEW] * rows)
    args = (sequences.sequence_ids, sequences.attention_mask, sequences.action_mask)
    weights = {p.untyped_storage().data_ptr() for m in (roles.actor, roles.critic) if m for p in m.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return x

    layout: Any = "given" if roles.actor.config._attn_implementation == "eager" else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = [action_states(trunk_of(roles.actor), *args, layout=layout)]
        if roles.critic is not None and roles.critic.trunk is not None:
            kept.append(action_states(trunk_of(roles.critic.trunk), *args, layout=layout))
        elif roles.critic is not None and roles.critic.adapted is not None:
            with using(roles.actor, CRITIC):
                kept.append(action_states(trunk_of(roles.actor), *args, layout=layout))
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_planned_within_a_factor(architecture: str, dtype: torch.dtype) -> None:
    """Between 0.9 and 1.25 of what autograd saves: the plan does not know how attention's kernel saves."""
    model = tiny_model(architecture=architecture, dtype=dtype)
    plan = planned(model, config_of(micro_batch_tokens=4 * (PROMPT + NEW)))
    assert plan.micro_batch_tokens == 4 * (PROMPT + NEW)
    measured = saved_bytes(Roles(model, None, None), rows=4)
    assert plan.activations is not None
    assert 0.9 < plan.activations / measured < 1.25


def test_activations_of_adapters_and_of_a_critic_are_planned_too() -> None:
    choices: list[dict[str, Any]] = [{"critic": "separate"}, {"rank": 4}, {"critic": "separate", "rank": 4}]
    for options in choices:
        config = config_of(micro_batch_tokens=4 * (PROMPT + NEW), **options)
        plan = planned(tiny_model(), config)
        roles = assemble_roles(
            tiny_model(), critic=config.algorithm.critic, with_reference=False, adapter=config.adapter
        )
        assert plan.activations is not None
        assert 0.9 < plan.activations / saved_bytes(roles, rows=4) < 1.25


@pytest.mark.parametrize("rank", [0, 4])
def test_of_recomputed_layers_the_inputs_and_one_layer_are_planned(rank: int) -> None:
    """Between 0.9 and 1.25 of what the forward saves, and a layer saves of its own when it runs alone."""
    options: dict[str, Any] = {"rank": rank, "critic": "separate", "micro_batch_tokens": 4 * (PROMPT + NEW)}
    model = {"num_hidden_layers": 6}
    plan = planned(tiny_model(**model), config_of(**options, gradient_checkpointing=True))
    config = config_of(**options)
    roles = assemble_roles(tiny_model(**model), critic="separate", with_reference=False, adapter=config.adapter)
    all_layers = saved_bytes(roles, rows=4)
    for trunk in roles.trunks():
        wrap_layers(trunk, recompute=True, compiled=False)
    inputs = saved_bytes(roles, rows=4)
    assert plan.activations is not None
    assert inputs < all_layers / 3
    assert 0.9 < plan.activations / (inputs + (all_layers - inputs) / 6) < 1.25


def test_activations_grow_with_the_budget_up_to_the_minibatch() -> None:
    found = [
        planned(tiny_model(), config_of(minibatches=1, micro_batch_tokens=n)).activations
        for n in (1, PROMPT + NEW, 4 * (PROMPT + NEW), 8 * (PROMPT + NEW), 10**9)
    ]
    one, also_one, four, eight, all_of_them = (x or 0 for x in found)
    assert one == also_one > 0  # a sequence stands alone, whatever the budget
    assert four / one == pytest.approx(4, rel=0.02)  # positions and a mask are shared
    assert eight / one == pytest.approx(8, rel=0.02)
    assert all_of_them == eight  # 8 sequences in the step


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3", "mistral"])
def test_the_cache_is_what_the_engine_keeps(architecture: str) -> None:
    model = tiny_model(architecture=architecture, dtype=torch.bfloat16)
    engine = SlotEngine(model, eos_token_ids=set(), pad_token_id=0)
    per_token = sum(shape.bytes_per_token for shape in engine._layer_shapes(CPU))
    plan = planned(model, config_of())
    assert plan.slots == 4  # generation_batch_size, of 8 sequences
    sampling = 16 * model.config.get_text_config().vocab_size
    assert plan.cache == 4 * ((PROMPT + NEW) * per_token + sampling)


def test_weights_cast_for_generating_are_planned() -> None:
    """bfloat16's two bytes for each number of the linear layers; the cache itself is halved."""
    model, config = tiny_model(), config_of()
    plain, mixed = planned(model, config), planned(model, config, autocast_dtype=torch.bfloat16)
    linear = [p for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()]
    sampling = 4 * 16 * model.config.vocab_size
    assert mixed.cache - sampling == (plain.cache - sampling) / 2 + 2 * sum(p.numel() for p in linear)


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_matrices_laid_out_anew_for_generating_are_planned(
    autocast_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "has_bfloat16", lambda: True)
    monkeypatch.setattr(memory_plan, "PACKED_STEPS", NEW)
    model, config = tiny_model(), config_of()
    monkeypatch.setattr(linear, "PACKED_FROM", {})
    without = planned(model, config, autocast_dtype=autocast_dtype).cache
    monkeypatch.setattr(linear, "PACKED_FROM", {torch.float32: 1, torch.bfloat16: 1})
    numbers = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    found = planned(model, config, autocast_dtype=autocast_dtype).cache
    assert found - without == (4 if autocast_dtype is None else 2) * numbers
    monkeypatch.setattr(memory_plan, "PACKED_STEPS", NEW + 1)
    assert planned(model, config, autocast_dtype=autocast_dtype).cache == without


def test_processes_share_the_sequences_and_pay_for_sending_gradients() -> None:
    alone, shared = (planned(tiny_model(), config_of(), num_processes=n) for n in (1, 4))
    assert (alone.slots, shared.slots) == (4, 2)
    assert shared.gradients == 3 * alone.gradients
    assert shared.held == alone.held


def test_the_actor_is_left_as_it_was() -> None:
    actor = tiny_model()
    before = {name: (p.clone(), p.requires_grad, p.device) for name, p in actor.named_parameters()}
    planned(actor, config_of(critic="separate", rank=4, kl=0.1))
    after = dict(actor.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[n], p) and after[n].requires_grad == r for n, (p, r, _) in before.items())
    assert actor.config._attn_implementation == "sdpa"


def check(config: TrainerConfig, *, free: int, total: int) -> None:
    actor = tiny_model()
    check_memory(planned(actor, config), config, lambda c: planned(actor, c), free=free, total=total)


def test_what_fits_is_not_talked_about() -> None:
    config = config_of(critic="separate", kl=0.1)
    peak = planned(tiny_model(), config).peak
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(config, free=peak, total=peak)


def test_what_may_not_fit_is_told_with_options_that_save_what_is_said() -> None:
    config = config_of(critic="separate", kl=0.1)
    plan = planned(tiny_model(), config)
    shared = planned(tiny_model(), dataclasses.replace(config, algorithm=config_of(critic="shared", kl=0.1).algorithm))
    with pytest.warns(UserWarning, match="may be stopped for lack") as caught:
        check(config, free=shared.peak, total=10**9)
    text = str(caught[0].message)
    assert f"--critic shared saves {(plan.peak - shared.peak) / 2**20:.1f} MiB, and then it fits" in text
    assert "--lora-rank 16" in text
    assert "--gradient-checkpointing" in text
    assert "--micro-batch-tokens" in text
    saved = [float(x) for x in re.findall(r"saves ([\d.]+) MiB", text)]
    assert saved == sorted(saved, reverse=True)


def test_a_shared_critic_is_no_advice_where_the_critic_starts_from_a_model_of_its_own() -> None:
    config = dataclasses.replace(config_of(critic="separate", kl=0.1), source=SourceConfig(critic_from="m"))
    with pytest.warns(UserWarning, match="--gradient-checkpointing") as caught:
        check(config, free=0, total=10**9)
    assert "--critic shared" not in str(caught[0].message)


def test_an_option_that_a_model_does_not_know_is_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise InputError("no layers")

    monkeypatch.setattr(memory_plan, "wrap_layers", refused)
    with pytest.warns(UserWarning, match="--micro-batch-tokens") as caught:
        check(config_of(), free=0, total=10**9)
    assert "--gradient-checkpointing" not in str(caught[0].message)


def test_weights_alone_beyond_the_device_stop_the_run() -> None:
    config = config_of(critic="separate")
    plan = planned(tiny_model(), config)
    needed = plan.held + plan.gradients
    with pytest.raises(InputError, match="--critic shared"):
        check(config, free=needed - 1, total=needed - 1)
    with pytest.warns(UserWarning, match="may be stopped"):
        check(config, free=needed - 1, total=needed)


def test_a_run_shows_and_keeps_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(make_config(run))
    trainer.train()
    plan = json.loads((run / "memory_plan.json").read_text())
    assert plan["actor"] == all_bytes(trainer.roles.actor)
    assert plan["reference"] == all_bytes(trainer.roles.reference)
    states = trainer.learner.optimizer.state.values()
    assert plan["optimizer"] == sum(x.nbytes for state in states for x in state.values())
    assert "updating: activations of 72 tokens" in capsys.readouterr().out
