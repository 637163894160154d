"""Adapters: one frozen trunk for every role, and what is exported says the same in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_lm_trainer import files_of, make_config, make_trainer
from tiny import ARCHITECTURES, encode, sequences_of, tiny_model, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.config import AdapterConfig, RunConfig
from rlhf.lm.critic import Critic
from rlhf.lm.experience import predict
from rlhf.lm.lora import CRITIC, add_adapter, merged, save_adapter, trained_state, using
from rlhf.lm.models import Roles, assemble_roles, load_actor, load_reward_model, new_reward_model
from rlhf.lm.reward_modeling import PairFitConfig, RewardModelingConfig, reward_model_trainer, scores
from rlhf.lm.rows import Pair
from rlhf.lm.trainer import Trainer
from rlhf.run import load_state, without_timings

LORA = AdapterConfig(lora_rank=4, lora_alpha=8)
IDS = torch.tensor(encode(["12+34=46"]))
BATCH = sequences_of(["1+2=", "12345+678=", "9"], ["3", "12", "4567"])


def stir(model: PreTrainedModel) -> PreTrainedModel:
    """Adapters that do something: a new one's effect is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits.detach()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_adapter_changes_nothing_and_off_it_is_the_trunk(architecture: str) -> None:
    model = tiny_model(architecture=architecture)
    before = logits(model)
    add_adapter(model, LORA)
    assert torch.equal(logits(model), before)
    stir(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with using(model, None):
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before, atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_it_says_the_same_without_adapters(architecture: str) -> None:
    model = tiny_model(architecture=architecture)
    names = set(model.state_dict())
    add_adapter(model, LORA)
    plain = merged(stir(model))
    assert set(plain.state_dict()) == names
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_into_tied_embeddings_the_head_keeps_its_own_weight(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    add_adapter(model, AdapterConfig(lora_rank=2, lora_targets="embed_tokens, q_proj"))
    plain = merged(stir(model))
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-4)
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_actor(str(tmp_path))), logits(model), rtol=0, atol=1e-4)
    assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("targets", ["q_proj", "q_proj, v_proj"])
def test_adapters_sit_where_they_are_told_to(targets: str) -> None:
    model = tiny_model()
    add_adapter(model, AdapterConfig(lora_rank=2, lora_targets=targets))
    found = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {target.strip() for target in targets.split(",")}


def test_targets_that_are_not_there_are_one_error() -> None:
    with pytest.raises(InputError, match="--lora-targets nonsense"):
        add_adapter(tiny_model(), AdapterConfig(lora_rank=2, lora_targets="nonsense"))


@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_every_role_stands_on_one_trunk(critic: str) -> None:
    """Two roles' worth of adapters and a head are trained; nothing else is, and nothing exists twice."""
    actor = tiny_model()
    trunk = sum(p.numel() for p in actor.parameters())
    roles = assemble_roles(actor, critic=critic, with_reference=True, adapter=LORA)
    assert roles.reference is roles.actor
    everything = {id(p): p for role in (roles.actor, roles.critic) if role is not None for p in role.parameters()}
    trained = [p for group in roles.parameter_groups() for p in group]
    assert len({id(p) for p in trained}) == len(trained)
    assert sum(p.numel() for p in everything.values()) == trunk + sum(p.numel() for p in trained)
    assert sum(p.numel() for p in trained) < trunk
    assert len(roles.parameter_groups()) == (1 if critic == "none" else 2)


def predictions(roles: Roles) -> tuple[Tensor, ...]:
    return predict(roles, BATCH, temperature=1.0, micro_batch_tokens=None, autocast=torch.no_grad)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_each_role_sees_its_own_adapter(critic: str) -> None:
    """Against four separate models: plain for the reference, merged for the actor, merged for the critic."""
    base = tiny_model(dtype=torch.float64)
    roles = assemble_roles(tiny_model(dtype=torch.float64), critic=critic, with_reference=True, adapter=LORA)
    torch.testing.assert_close(predictions(roles).ref_log_probs, predictions(roles).log_probs, rtol=0, atol=0)
    stir(roles.actor)
    torch.nn.init.normal_(roles.critic.head.weight)
    found = predictions(roles)
    plain = merged(roles.actor)
    own = merged(roles.actor, CRITIC) if critic == "separate" else plain
    expected = predictions(Roles(plain, None, base))
    values = predictions(Roles(own, Critic(None, roles.critic.head), None)).values
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.ref_log_probs, expected.ref_log_probs, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.values, values, rtol=0, atol=1e-8)


def test_gradients_reach_the_roles_they_belong_to() -> None:
    roles = assemble_roles(tiny_model(dtype=torch.float64), critic="separate", with_reference=True, adapter=LORA)
    stir(roles.actor)
    torch.nn.init.normal_(roles.critic.head.weight)
    actor, critic = roles.parameter_groups()
    args = (BATCH.sequence_ids, BATCH.attention_mask, BATCH.action_mask)
    loss = roles.actor(BATCH.sequence_ids).logits.sum()
    value = roles.critic(*args, None).sum()  # after the actor's forward, before its backward, as in an update
    value.backward()
    assert all(p.grad is not None for p in critic)
    assert all(p.grad is None for p in actor)
    loss.backward()
    assert all(p.grad is not None for p in actor)
    assert all(p.grad is None for p in roles.actor.parameters() if not p.requires_grad)


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
folder, base, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
whole = AutoModelForCausalLM.from_pretrained(folder)
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder + "/adapter")
through = AutoModelForCausalLM.from_pretrained(base)
through.load_adapter(folder + "/adapter")
print(json.dumps([model(ids).logits.tolist() for model in (whole, adapted, through)]))
"""


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_run_trains_resumes_and_exports(critic: str, tmp_path: Path) -> None:
    """Checkpoints hold adapters alone; a fresh process finds the same logits in the merged model, and in the adapter
    loaded by peft and by transformers; the critic comes back as any other."""
    options = {"adapter": {"lora_rank": 4}, "algorithm": {"critic": critic}, "optimization": {"steps": 4}}
    whole = make_trainer(make_config(tmp_path / "whole", **options))
    base = logits(whole.roles.actor)
    whole.train()
    rows = files_of(tmp_path / "whole")[0]
    assert rows[1]["kl/sequence"] == 0
    assert rows[-1]["kl/sequence"] != 0

    state = load_state(tmp_path / "whole" / "checkpoints" / "step-000004")
    assert all(".lora_" in name for name in state["actor"])
    torch.testing.assert_close(logits(load_actor(str(tmp_path / "whole" / "initial"))), base, rtol=0, atol=1e-5)
    cut = make_trainer(make_config(tmp_path / "cut", **options))
    for _ in range(2):
        cut.train_step()
    cut.save_checkpoint()
    resumed = make_trainer(make_config(tmp_path / "cut", **{**options, "run": {"resume": True}}))
    for row in rows[3:]:
        (metrics,) = without_timings([resumed.train_step()[0]])
        assert metrics == pytest.approx({name: row[name] for name in metrics}, rel=1e-4, abs=1e-4)

    if critic == "separate":  # the actor's files are the same with either
        check_in_a_fresh_process(whole, tmp_path)
    actor = load_actor(str(tmp_path / "whole" / "final"))
    saved = Critic.from_pretrained(str(tmp_path / "whole" / "final" / "critic"), actor)
    expected = predictions(whole.roles).values
    torch.testing.assert_close(predictions(Roles(actor, saved, None)).values, expected, rtol=0, atol=1e-4)


def check_in_a_fresh_process(whole: Trainer, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "whole" / "final"), str(tmp_path / "whole" / "initial"), json.dumps(IDS.tolist())]
    result = subprocess.run([sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, check=True)
    for found in json.loads(result.stdout.splitlines()[-1]):
        torch.testing.assert_close(torch.tensor(found), logits(whole.roles.actor), rtol=0, atol=1e-4)


def test_a_reward_model_trains_an_adapter_and_its_head(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    pairs = [Pair(*encode([f"1={i}", f"1={j}"]), 0.0) for i in range(6) for j in range(i)]
    config = RewardModelingConfig(
        optimization=PairFitConfig(epochs=3, batch_size=5, learning_rate=1e-2),
        adapter=LORA,
        run=RunConfig(run_dir=tmp_path / "run", eval_every=0),
    )
    trainer = reward_model_trainer(
        config, tokenizer=tokenizer, train=pairs, held_out=pairs,
        make_model=lambda: new_reward_model(str(tmp_path / "base"), tokenizer),
    )  # fmt: skip
    assert {"score.weight"} == {name for name in trained_state(trainer.model) if ".lora_" not in name}
    first = trainer.evaluate()["held_out/loss"]
    assert trainer.train()["held_out/loss"] < first
    saved = load_reward_model(str(tmp_path / "run" / "final"), tokenizer)
    texts = encode(["1=2", "1=5"])
    expected = scores(trainer.model, texts, pad_token_id=tokenizer.pad_token_id)
    torch.testing.assert_close(scores(saved, texts, pad_token_id=tokenizer.pad_token_id), expected, rtol=0, atol=1e-4)

    # And a critic that starts from it has a trunk, and an adapter, of its own.
    roles = assemble_roles(
        tiny_model(), critic="separate", with_reference=True, critic_from=str(tmp_path / "run" / "final"), adapter=LORA
    )
    assert roles.critic.trunk is not None
    names = [name for name, p in roles.critic.named_parameters() if p.requires_grad]
    assert all(".lora_" in name or "score" in name for name in names)
    assert any("score" in name for name in names)


def test_the_adapter_is_small_and_names_its_trunk(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    add_adapter(model, LORA)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(tmp_path / "base"))
