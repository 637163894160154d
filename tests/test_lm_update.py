"""One optimizer step is the same however it is cut: micro-batches, processes, and whatever the padding holds."""

import dataclasses
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny import exact_norms, tiny_model

from rlhf.algorithm import AlgorithmConfig
from rlhf.lm import logprobs
from rlhf.lm.config import OptimizationConfig, SamplingConfig, TrainerConfig
from rlhf.lm.experience import (
    Experience,
    Predictions,
    Sequences,
    build_experience,
    plan_micro_batches,
    predict,
    with_value_mask,
)
from rlhf.lm.models import Roles, assemble_roles
from rlhf.lm.update import (
    ActorRecord,
    Denominators,
    Learner,
    denominators,
    my_micro_batches,
    optimizer_step,
    surrogate_objective,
    update,
)

ALGORITHMS = {
    "ppo": AlgorithmConfig(kl_reward_coef=0.1, entropy_coef=0.01),
    "ppo, TRL's slot after the last action": AlgorithmConfig(kl_reward_coef=0.1, convention="trl"),
    "ppo, shared critic, KL loss": AlgorithmConfig(critic="shared", kl_loss_coef=0.1, reduction="sequence_mean"),
    "grpo": AlgorithmConfig(advantage="group", critic="none", kl_loss_coef=0.1, reduction="sequence_mean"),
    "dr. grpo": AlgorithmConfig(advantage="group", critic="none", reduction="fixed_length"),
}


def config_for(algorithm: AlgorithmConfig, micro_batch_tokens: int = 640) -> TrainerConfig:
    return TrainerConfig(
        sampling=SamplingConfig(max_new_tokens=6, temperature=0.8),
        algorithm=algorithm,
        optimization=OptimizationConfig(
            prompts_per_step=6,
            samples_per_prompt=2,
            minibatches=2,
            micro_batch_tokens=micro_batch_tokens,
            learning_rate=1e-2,
        ),
    )


def make_roles(algorithm: AlgorithmConfig) -> Roles:
    """Float64 roles in which reference and critic differ from the actor and from their starting point."""
    actor = tiny_model(seed=1, dtype=torch.float64)
    roles = assemble_roles(actor, critic=algorithm.critic, with_reference=algorithm.needs_reference)
    generator = torch.Generator().manual_seed(0)
    for module in (roles.reference, roles.critic):
        for parameter in module.parameters() if module is not None else ():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return roles


def make_sequences(samples: int = 1) -> Sequences:
    """12 sequences: prompts of 1 to 4 tokens, each for so many sequences in a row, completions of 1 to 6."""
    generator = torch.Generator().manual_seed(3)
    prompt, completion = 4, 6
    ids = torch.randint(2, 15, (12, prompt + completion), generator=generator)
    starts = torch.randint(0, prompt, (12, 1), generator=generator)
    of_prompt = torch.arange(12) // samples * samples
    starts, ids[:, :prompt] = starts[of_prompt], ids[of_prompt, :prompt]
    lengths = torch.randint(1, completion + 1, (12, 1), generator=generator)
    action_mask = torch.arange(completion) < lengths
    return Sequences(ids, torch.cat([torch.arange(prompt) >= starts, action_mask], -1), action_mask)


def make_experience(roles: Roles, config: TrainerConfig, samples: int = 1) -> Experience:
    """Experience of a policy a little different from the actor, so that ratios are not 1 and some are clipped."""
    sequences = with_value_mask(make_sequences(samples), config.algorithm)
    found = predict(roles, sequences, temperature=0.8, micro_batch_tokens=50, autocast=Accelerator().autocast)
    generator = torch.Generator().manual_seed(4)
    noise = 0.2 * torch.randn(found.log_probs.shape, generator=generator, dtype=torch.float64)
    found = found._replace(log_probs=torch.where(sequences.action_mask, found.log_probs + noise, 0.0))
    scores = torch.rand(12, generator=generator, dtype=torch.float64)
    groups = torch.arange(6).repeat_interleave(2)
    return build_experience(
        sequences, scores, groups, found, config.algorithm, kl_reward_coef=config.algorithm.kl_reward_coef
    )


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    modules = {"actor": roles.actor, "critic": roles.critic}
    return {
        f"{role}.{name}": parameter.grad.clone()
        for role, module in modules.items()
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def accumulated(
    roles: Roles, experience: Experience, config: TrainerConfig, parts: list[torch.Tensor], layout: str | None = None
) -> dict:
    """Gradient summed over the parts, divided by the whole's denominator."""
    for group in roles.parameter_groups():
        for parameter in group:
            parameter.grad = None
    sequences = experience.sequences
    shared = denominators(config.algorithm, sequences.action_mask, sequences.valued)
    for part in parts:
        loss, _ = surrogate_objective(roles, experience[part], config, shared, layout=layout)
        loss.backward()
    return gradients(roles)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [3, 1, 8]])
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str, sizes: list[int]) -> None:
    config = config_for(ALGORITHMS[name])
    roles = make_roles(config.algorithm)
    experience = make_experience(roles, config)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    whole = accumulated(roles, experience, config, [torch.arange(12)])
    split = accumulated(roles, experience, config, list(order.split(sizes)))
    assert whole.keys() == split.keys()
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for key, gradient in whole.items():
        torch.testing.assert_close(split[key], gradient, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("kind", ["given", "packed"])
def test_packed_and_padded_rows_give_the_same_gradient(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every role's forward: the padded rows that a CPU chooses, one packed row, and the batch as it came."""
    config = config_for(ALGORITHMS[name])
    roles = make_roles(config.algorithm)
    experience = make_experience(roles, config)
    padded = accumulated(roles, experience, config, [torch.arange(12)])
    monkeypatch.setattr(logprobs, "layout_for", lambda trunk: kind)
    other_experience = make_experience(roles, config)
    other = accumulated(roles, other_experience, config, list(torch.arange(12).split(5)))
    torch.testing.assert_close(other_experience.advantages, experience.advantages, rtol=0, atol=1e-10)
    for key, gradient in padded.items():
        torch.testing.assert_close(other[key], gradient, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_an_optimizer_step_evenly(processes: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is some process's, once; no process has more than one sequence more, or longer sequences."""
    config = config_for(ALGORITHMS["grpo"], micro_batch_tokens=20)
    roles = make_roles(config.algorithm)
    experience = make_experience(roles, config)
    monkeypatch.setattr(logprobs, "layout_for", lambda trunk: kind)
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(2))[:11]
    lengths, shares = experience.sequences.lengths, []
    for process in range(processes):
        accelerator = SimpleNamespace(process_index=process, num_processes=processes, autocast=nullcontext)
        parts, _ = my_micro_batches(roles, experience, rows, config, accelerator)
        costs = [lengths[p].sum() if kind == "packed" else len(p) * lengths[p].max() for p in parts]
        assert max(costs) <= 20
        shares.append(torch.cat(parts))
    assert sorted(torch.cat(shares).tolist()) == sorted(rows.tolist())
    tokens = [int(lengths[share].sum()) for share in shares]
    assert max(tokens) - min(tokens) <= int(lengths.max())


def test_a_process_may_be_left_without_a_sequence() -> None:
    """One prompt's completions go to one process, and one sequence to one; the others have no micro-batch."""
    config = config_for(ALGORITHMS["grpo"])
    roles = make_roles(config.algorithm)
    experience = make_experience(roles, config, samples=3)
    for rows in (torch.tensor([0, 1, 2]), torch.tensor([7])):
        shares = []
        for process in range(2):
            accelerator = SimpleNamespace(process_index=process, num_processes=2, autocast=nullcontext)
            parts, _ = my_micro_batches(roles, experience, rows, config, accelerator)
            shares.append(sorted(i for part in parts for i in part.tolist()))
        assert shares == [rows.tolist(), []]


@pytest.mark.parametrize("tokens", [1, 23, 10_000])
def test_predictions_stand_where_their_sequences_do(tokens: int) -> None:
    roles = make_roles(ALGORITHMS["ppo"])
    sequences = make_sequences()
    found = predict(roles, sequences, temperature=0.8, micro_batch_tokens=tokens, autocast=nullcontext)
    for row in range(12):
        one = sequences[torch.tensor([row])]
        alone = predict(roles, one, temperature=0.8, micro_batch_tokens=tokens, autocast=nullcontext)
        for x, y in zip(found, alone, strict=True):
            torch.testing.assert_close(x[row, : y.shape[1]], y[0], rtol=0, atol=1e-10)
            assert x[row, y.shape[1] :].eq(0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("tokens", [14, 25, 10_000])
def test_shared_prompts_have_the_gradient_of_prompts_computed_for_each_sample(name: str, tokens: int) -> None:
    """Through every role's forward, whatever the budget cuts."""
    shared = config_for(ALGORITHMS[name], tokens)
    unshared = dataclasses.replace(shared, optimization=dataclasses.replace(shared.optimization, share_prompts=False))
    roles, found = make_roles(shared.algorithm), {}
    experience = make_experience(roles, unshared, samples=4)
    for config in (shared, unshared):
        parts, layout = my_micro_batches(roles, experience, torch.arange(12), config, Accelerator())
        with exact_norms():
            found[layout] = accumulated(roles, experience, config, parts, layout)
    assert found.keys() == {"shared", None}
    assert max(g.abs().max() for g in found[None].values()) > 1e-3
    for key, gradient in found[None].items():
        torch.testing.assert_close(found["shared"][key], gradient, rtol=0, atol=1e-10, msg=key)


def test_shared_prompts_have_the_predictions_of_prompts_computed_for_each_sample() -> None:
    roles, sequences = make_roles(ALGORITHMS["ppo"]), make_sequences(samples=4)
    found = [
        predict(roles, sequences, temperature=0.8, micro_batch_tokens=30, autocast=nullcontext, share_prompts=share)
        for share in (True, False)
    ]
    assert plan_micro_batches(roles, sequences, tokens=30, share=True, autocast=nullcontext).layout == "shared"
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_prompts_are_shared_where_that_saves_a_tenth() -> None:
    roles = make_roles(ALGORITHMS["ppo"])

    def layout(sequences: Sequences, tokens: int = 1000) -> str | None:
        return plan_micro_batches(roles, sequences, tokens=tokens, share=True, autocast=nullcontext).layout

    assert layout(make_sequences(samples=4)) == "shared"
    assert layout(make_sequences(samples=4), tokens=10) is None, "the budget leaves no two completions together"
    assert layout(make_sequences(samples=1)) is None
    ids, mask = torch.arange(2, 14).remainder(13).expand(2, 12), torch.ones(2, 12, dtype=torch.bool)
    assert layout(Sequences(ids, mask, mask[:, 2:])) is None, "2 of 24 tokens"
    assert layout(Sequences(ids, mask, mask[:, 3:])) == "shared", "3 of 24"


ON_POLICY = {
    "ppo": AlgorithmConfig(entropy_coef=0.01),
    "grpo": AlgorithmConfig(advantage="group", critic="none", kl_loss_coef=0.1, reduction="sequence_mean"),
    "gspo": AlgorithmConfig(advantage="group", critic="none", policy_loss="gspo"),
    "cispo": AlgorithmConfig(advantage="group", critic="none", policy_loss="cispo", clip_low=None),
    "sapo": AlgorithmConfig(advantage="group", critic="none", policy_loss="sapo"),
    "reinforce": AlgorithmConfig(advantage="leave_one_out", critic="none", policy_loss="reinforce"),
    "importance": AlgorithmConfig(
        advantage="group", critic="none", policy_loss="importance", sampler_weight="sequence_mean"
    ),
}


@pytest.mark.parametrize("name", ON_POLICY)
@pytest.mark.parametrize("tokens", [30, 10_000])
@pytest.mark.parametrize("samples", [1, 3])
def test_one_step_on_its_own_log_probs_is_the_step_on_predicted_ones_bit_for_bit(
    name: str, tokens: int, samples: int
) -> None:
    """Weights, metrics and what is recorded for the round's metrics; with prompts shared and without."""
    base, found = config_for(ON_POLICY[name], tokens), []
    config = dataclasses.replace(base, optimization=dataclasses.replace(base.optimization, epochs=1, minibatches=1))
    assert not config.needs_old_log_probs
    noise = 0.1 * torch.randn(12, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for with_actor in (True, False):
        roles, sequences = make_roles(config.algorithm), make_sequences(samples)
        options = {"temperature": 0.8, "micro_batch_tokens": tokens, "autocast": nullcontext}
        everything = predict(roles, sequences, **options)
        predictions = predict(roles, sequences, **options, with_actor=with_actor)
        experience = build_experience(
            sequences, torch.arange(12, dtype=torch.float64) % 5, torch.arange(12) // 3, predictions, config.algorithm,
            kl_reward_coef=0.0, sampler_log_probs=everything.log_probs + noise,
        )  # fmt: skip
        groups = roles.parameter_groups()
        optimizer = torch.optim.SGD([{"params": g} for g in groups], lr=0.1)
        learner = Learner(roles, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))
        record, heights = ActorRecord(experience), []
        roles.actor.model.register_forward_hook(lambda _, args, out, seen=heights: seen.append(len(out[0])))
        order, accelerator = torch.arange(12), Accelerator()
        metrics = update(learner, experience, config, accelerator, minibatch_order=lambda _, x=order: x, record=record)
        assert {1} == {*heights} if samples == 3 else max(heights) > 1, "shared prompts are one row"
        recorded = record.complete(predictions, accelerator)
        assert torch.equal(recorded.log_probs, everything.log_probs)
        assert torch.equal(recorded.entropy, everything.entropy)
        found.append((metrics, [p for group in groups for p in group]))
    assert metrics["ratio/clip_fraction"] == metrics["ratio/approx_kl"] == 0
    assert found[0][0] == found[1][0]
    assert all(torch.equal(x, y) for x, y in zip(found[0][1], found[1][1], strict=True))
    untrained = make_roles(config.algorithm).parameter_groups()
    assert not torch.equal(found[0][1][0], untrained[0][0])


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr. grpo"])
def test_without_the_actor_each_role_passes_over_a_micro_batch_once(name: str) -> None:
    roles, sequences = make_roles(ALGORITHMS[name]), make_sequences()
    options = {"temperature": 0.8, "micro_batch_tokens": 40, "autocast": nullcontext}
    whole = predict(roles, sequences, **options)
    trunks = {
        "actor": roles.actor.model,
        "reference": None if roles.reference is None else roles.reference.model,
        "critic": None if roles.critic is None else roles.critic.trunk.model,
    }
    shapes: dict[str, list[torch.Size]] = {role: [] for role in trunks}
    for role, trunk in trunks.items():
        if trunk is not None:
            trunk.register_forward_hook(lambda _, args, out, role=role: shapes[role].append(out[0].shape))
    found = predict(roles, sequences, **options, with_actor=False)
    assert shapes["actor"] == []
    assert found.log_probs is None
    assert found.entropy is None
    parts = len(plan_micro_batches(roles, sequences, tokens=40, share=True, autocast=nullcontext).parts)
    assert parts > 1
    for role, x, y in (
        ("reference", found.ref_log_probs, whole.ref_log_probs), ("critic", found.values, whole.values)
    ):  # fmt: skip
        assert len(shapes[role]) == (0 if trunks[role] is None else parts)
        assert (x is None and y is None) or torch.equal(x, y)
    assert not shapes["critic"] or shapes["critic"] == shapes["reference"], "the same micro-batches, laid out alike"


def test_clipping_and_a_changed_policy_are_part_of_the_split_test() -> None:
    config = config_for(ALGORITHMS["ppo"])
    roles = make_roles(config.algorithm)
    experience = make_experience(roles, config)
    one = Denominators(torch.tensor(1.0), torch.tensor(1.0))
    _, terms = surrogate_objective(roles, experience, config, one)
    assert 0 < float(terms["ratio/clip_fraction"]) < int(experience.sequences.action_mask.sum())


def test_shares_of_clipped_tokens_are_at_most_one() -> None:
    """Returns below every value and old values far above: every value is clipped, in the slot after the last action
    too. Each share is of the tokens that its loss is about."""
    config = config_for(ALGORITHMS["ppo, TRL's slot after the last action"])
    roles = make_roles(config.algorithm)
    experience = make_experience(roles, config)
    valued = experience.sequences.valued
    assert int(valued.sum()) > int(experience.sequences.action_mask.sum())
    far = dict(old_values=torch.where(valued, 50.0, 0.0), returns=torch.where(valued, -50.0, 0.0))
    experience = dataclasses.replace(experience, **far)
    optimizer = torch.optim.SGD([{"params": g} for g in roles.parameter_groups()], lr=0.0)
    learner = Learner(roles, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0))
    metrics = update(learner, experience, config, Accelerator(), minibatch_order=lambda _: torch.arange(12))
    assert metrics["value/clip_fraction"] == 1.0
    assert 0 < metrics["ratio/clip_fraction"] < 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_garbage_in_padding_changes_nothing(name: str) -> None:
    """Token ids of the padding, and NaN in every masked slot of the experience: the same gradient, bit for bit."""
    config = config_for(ALGORITHMS[name])
    roles = make_roles(config.algorithm)
    experience = make_experience(roles, config)
    before = experience.sequences

    def poisoned(name: str) -> torch.Tensor | None:
        x: torch.Tensor | None = getattr(experience, name)
        mask = before.valued if name in ("old_values", "returns") else before.action_mask
        return None if x is None else torch.where(mask, x, torch.nan)

    sequences = dataclasses.replace(
        experience.sequences,
        sequence_ids=torch.where(experience.sequences.attention_mask, experience.sequences.sequence_ids, 7),
    )
    other = Experience(
        sequences,
        **{field.name: poisoned(field.name) for field in dataclasses.fields(experience) if field.name != "sequences"},
    )
    rows = [torch.arange(12)]
    clean, dirty = accumulated(roles, experience, config, rows), accumulated(roles, other, config, rows)
    for key, gradient in clean.items():
        assert torch.equal(dirty[key], gradient), key


def run_update(algorithm: AlgorithmConfig, micro_batch_tokens: int) -> dict[str, torch.Tensor | float]:
    """A whole update on the fixed experience: metrics, last gradients and weights after it. Any number of processes."""
    accelerator = Accelerator()
    config = config_for(algorithm, micro_batch_tokens)
    roles = make_roles(algorithm)
    experience = make_experience(roles, config, samples=3)
    assert my_micro_batches(roles, experience, torch.arange(12), config, accelerator).layout == "shared"
    groups = roles.parameter_groups()
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD([{"params": g} for g in groups], lr=0.1))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, factor=1.0)
    learner = Learner(roles, optimizer, scheduler)
    with exact_norms():
        first = optimizer_step_gradients(learner, experience, config, accelerator)
        metrics = update(
            learner,
            experience,
            config,
            accelerator,
            minibatch_order=lambda epoch: torch.randperm(12, generator=torch.Generator().manual_seed(epoch)),
        )
    weights = {f"weight.{i}": p.detach().clone() for i, p in enumerate(p for group in groups for p in group)}
    return {**first, **metrics, **weights}


def optimizer_step_gradients(learner: Learner, experience: Experience, config: TrainerConfig, accelerator: Accelerator):
    """The summed, clipped gradient of one step on all rows but one (an uneven split), caught before it is zeroed."""
    caught: dict[str, torch.Tensor] = {}
    handle = learner.optimizer.optimizer.register_step_pre_hook(
        lambda *_: caught.update({f"gradient.{k}": g for k, g in gradients(learner.roles).items()})
    )
    record = ActorRecord(experience)
    optimizer_step(learner, experience, torch.arange(11), config, accelerator, record)
    handle.remove()
    found = record.complete(Predictions(None, None, None, None), accelerator)
    return caught | {"log_probs": found.log_probs, "entropy": found.entropy}


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_two_processes_update_as_one(name: str, tmp_path: Path) -> None:
    """Loss, gradient and weights of two processes equal those of one, given the same experience, to 1e-10."""
    alone = run_update(ALGORITHMS[name], micro_batch_tokens=50)
    script = """
import sys
import torch
from accelerate import Accelerator
sys.path.insert(0, sys.argv[1])
import test_lm_update as tests
result = tests.run_update(tests.ALGORITHMS[sys.argv[2]], micro_batch_tokens=24)
assert Accelerator().num_processes == 2
torch.save(result, f"{sys.argv[3]}/{Accelerator().process_index}.pt")
Accelerator().end_training()
"""
    (tmp_path / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(tmp_path / "script.py"), str(Path(__file__).parent), name, str(tmp_path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *arguments], check=True, env=environment, timeout=300)
    for rank in (0, 1):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(
                torch.as_tensor(together[key]), torch.as_tensor(value), rtol=0, atol=1e-10, msg=f"{rank} {key}"
            )


def plain_objective(roles: Roles, experience: Experience, config: TrainerConfig) -> torch.Tensor:
    """The objective written out: every sequence by itself, without padding, token by token."""
    algorithm, sequences = config.algorithm, experience.sequences
    policy_losses, value_losses = [], []
    for row in range(len(experience)):
        used = sequences.attention_mask[row]
        length = int(sequences.action_mask[row].sum())
        ids = sequences.sequence_ids[row][used].unsqueeze(0)
        output = roles.actor(ids, output_hidden_states=True)
        log_pi = (output.logits[0, -length - 1 : -1] / config.sampling.temperature).log_softmax(-1)
        log_probs = log_pi.gather(-1, ids[0, -length:, None]).squeeze(-1)
        advantages, old = experience.advantages[row, :length], experience.old_log_probs[row, :length]
        ratio = (log_probs - old).exp()
        bounded = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        loss = -torch.minimum(ratio * advantages, bounded * advantages)
        loss = loss - algorithm.entropy_coef * -(log_pi.exp() * log_pi).sum(-1)
        if algorithm.kl_loss_coef > 0:
            gap = experience.ref_log_probs[row, :length] - log_probs
            loss = loss + algorithm.kl_loss_coef * (gap.exp() - 1 - gap)
        policy_losses.append(loss)
        if roles.critic is not None:
            trunk, head = roles.critic.trunk, roles.critic.head
            every_value = trunk(ids).logits[0, :, 0] if trunk else head(output.hidden_states[-1])[0, :, 0]
            # One slot further by TRL's convention, but for completions as long as the longest.
            further = algorithm.convention == "trl" and length < sequences.action_mask.shape[1]
            values, reach = every_value[-length - 1 :][: length + further], slice(length + further)
            old_values = experience.old_values[row, reach]
            near = old_values + (values - old_values).clamp(-algorithm.value_clip, algorithm.value_clip)
            errors = torch.stack([values, near]) - experience.returns[row, reach]
            value_losses.append(algorithm.value_coef * 0.5 * errors.square().amax(0))
    means = [mean_written_out(x, config) for x in (policy_losses, value_losses) if x]
    return torch.stack(means).sum()


def mean_written_out(rows: list[torch.Tensor], config: TrainerConfig) -> torch.Tensor:
    if config.algorithm.reduction == "token_mean":
        return torch.cat(rows).mean()
    if config.algorithm.reduction == "sequence_mean":
        return torch.stack([row.mean() for row in rows]).mean()
    return torch.stack([row.sum() for row in rows]).mean() / config.sampling.max_new_tokens


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_objective_is_the_one_written_out(name: str) -> None:
    config = config_for(ALGORITHMS[name])
    roles = make_roles(config.algorithm)
    experience = make_experience(roles, config)
    found = accumulated(roles, experience, config, [torch.arange(12)])
    for group in roles.parameter_groups():
        for parameter in group:
            parameter.grad = None
    plain_objective(roles, experience, config).backward()
    for key, gradient in gradients(roles).items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-10, msg=key)


def test_every_epoch_has_its_own_order_and_every_minibatch_its_step() -> None:
    config = config_for(ALGORITHMS["grpo"])
    roles = make_roles(config.algorithm)
    accelerator = Accelerator()
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(roles.actor.parameters(), lr=0.0))
    steps: list[int] = []
    optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    epochs: list[int] = []

    def order(epoch: int) -> torch.Tensor:
        epochs.append(epoch)
        return torch.arange(12)

    learner = Learner(roles, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, factor=1.0))
    update(learner, make_experience(roles, config), config, accelerator, minibatch_order=order)
    assert epochs == [0, 1]
    assert len(steps) == 4
