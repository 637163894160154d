"""A reward model as an adapter on the actor's trunk: it scores as the merged one, and disturbs nobody."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from test_lm_lora import LORA, logits, predictions, stir
from test_lm_trainer import files_of, make_config, make_trainer
from tiny import encode, tiny_model, tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.config import AdapterConfig, RunConfig
from rlhf.lm.critic import Critic
from rlhf.lm.lora import add_adapter, save_adapter
from rlhf.lm.models import assemble_roles, load_actor, load_reward_model, new_reward_model
from rlhf.lm.reward_modeling import PairFitConfig, RewardModelingConfig, reward_model_trainer
from rlhf.lm.rewards import RewardModel
from rlhf.lm.rows import Pair
from rlhf.lm.trunk_reward import RewardOnTrunk

TEXTS = (["1+2=", "12345+678=", "9", "1+"], ["3", "12", "4567", "1"])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A trunk, and the final/ folder of a reward model trained on it with adapters."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(architecture=request.param).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    pairs = [Pair(*encode([f"1={i}", f"1={j}"]), 0.0) for i in range(6) for j in range(i)]
    config = RewardModelingConfig(
        optimization=PairFitConfig(epochs=3, batch_size=5, learning_rate=3e-2),
        adapter=LORA,
        run=RunConfig(run_dir=folder / "run", eval_every=0),
    )
    base = str(folder / "base")
    reward_model_trainer(
        config, tokenizer=tokenizer, train=pairs, held_out=pairs, make_model=lambda: new_reward_model(base, tokenizer)
    ).train()
    return base, folder / "run" / "final"


def adapted(base: str, critic: str = "separate") -> Any:
    roles = assemble_roles(load_actor(base), critic=critic, with_reference=True, adapter=LORA)
    stir(roles.actor)
    return roles


def on_trunk(base: str, final: Path, actor: PreTrainedModel) -> RewardModel:
    scorer = RewardOnTrunk(str(final / "adapter"), base)
    scorer.attach(actor)
    return RewardModel(scorer, tokenizer)


def test_it_scores_as_the_merged_model_does(trained: tuple[str, Path]) -> None:
    """On the actor's trunk, as a model of its own through our loader, and through peft's: float32, 1e-5."""
    base, final = trained
    merged = RewardModel(load_reward_model(str(final), tokenizer), tokenizer)(*TEXTS)
    assert max(merged) - min(merged) > 0.1
    assert on_trunk(base, final, adapted(base).actor)(*TEXTS) == pytest.approx(merged, abs=1e-5)
    alone = load_reward_model(str(final / "adapter"), tokenizer)
    assert RewardModel(alone, tokenizer)(*TEXTS) == pytest.approx(merged, abs=1e-5)

    through = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    through = PeftModelForSequenceClassification.from_pretrained(through, str(final / "adapter"))
    assert json.loads((final / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    through.config.pad_token_id = tokenizer.pad_token_id
    assert RewardModel(through, tokenizer)(*TEXTS) == pytest.approx(merged, abs=1e-5)


@pytest.mark.parametrize("critic", ["separate", "shared", "none"])
def test_the_other_roles_do_not_notice(trained: tuple[str, Path], critic: str) -> None:
    """Log-probs, values, what is trained, and gradients are those without it, before and after it scores."""
    base, final = trained
    plain, roles = adapted(base, critic), adapted(base, critic)
    names = [name for name, p in roles.actor.named_parameters() if p.requires_grad]
    reward = on_trunk(base, final, roles.actor)
    reward(*TEXTS)
    assert [name for name, p in roles.actor.named_parameters() if p.requires_grad] == names
    for found, expected in zip(predictions(roles), predictions(plain), strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for model in (roles.actor, plain.actor):
        model(torch.tensor(encode(["12+34="]))).logits.square().sum().backward()
    for name, parameter in plain.actor.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(roles.actor.get_parameter(name).grad, parameter.grad, rtol=0, atol=0)


def test_the_trunk_exists_once(trained: tuple[str, Path]) -> None:
    """Beside the trunk: three adapters of the same shape, the critic's head, the reward's head."""
    base, final = trained
    trunk = sum(p.numel() for p in load_actor(base).parameters())
    roles = adapted(base)
    one_adapter = sum(p.numel() for name, p in roles.actor.named_parameters() if ".lora_" in name) // 2
    on_trunk(base, final, roles.actor)
    assert sum(p.numel() for p in roles.actor.parameters()) == trunk + 3 * one_adapter


def test_a_run_trains_on_it_and_resumes(trained: tuple[str, Path], tmp_path: Path) -> None:
    base, final = trained
    merged = RewardModel(load_reward_model(str(final), tokenizer), tokenizer)
    options: dict[str, Any] = {"adapter": {"lora_rank": 4}, "optimization": {"steps": 4}, "run": {"eval_every": 0}}

    def trainer(name: str, **run: Any) -> Any:
        reward = RewardModel(RewardOnTrunk(str(final / "adapter"), base), tokenizer)
        config = make_config(tmp_path / name, **options | {"run": {**options["run"], **run}})
        return make_trainer(config, make_actor=lambda: load_actor(base), reward_functions=[reward])

    whole = trainer("whole")
    whole.train()
    rows, samples = files_of(tmp_path / "whole")
    for row in samples:
        (expected,) = merged([row["prompt"]], [row["completion"]])
        assert row["score"] == pytest.approx(expected, abs=1e-4)
    saved = load_file(tmp_path / "whole" / "final" / "adapter" / "adapter_model.safetensors")
    trained_names = [name for name, p in whole.roles.actor.named_parameters() if p.requires_grad]
    assert len(saved) == len([name for name in trained_names if ".critic." not in name]), "the actor's adapter alone"
    assert rows[-1]["kl/sequence"] != 0
    cut = trainer("cut")
    for _ in range(2):
        cut.train_step()
    cut.save_checkpoint()
    resumed = trainer("cut", resume=True)
    for row in rows[3:]:
        metrics = resumed.train_step()[0]
        assert metrics["reward/mean"] == pytest.approx(row["reward/mean"], rel=1e-4, abs=1e-4)


def test_another_trunk_is_refused(trained: tuple[str, Path], tmp_path: Path) -> None:
    """Weights that are others, even a little; and without a fingerprint, another name."""
    base, final = trained
    other = load_actor(base)
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "mlp" in name and p.ndim == 2).mul_(1.02)
    add_adapter(other, LORA)
    scorer = RewardOnTrunk(str(final / "adapter"), base)
    with pytest.raises(InputError, match=rf"an adapter on other weights.*pass --model {base}"):
        scorer.attach(other)
    with pytest.raises(InputError, match="all of the actor's weights are trained: pass --lora-rank"):
        scorer.attach(load_actor(base))
    half = load_actor(base, dtype=torch.bfloat16)
    add_adapter(half, LORA)
    scorer.attach(half)  # the same trunk in another type

    for file in (final / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    unmarked = RewardOnTrunk(str(tmp_path), base)
    unmarked.attach(adapted(base).actor)
    tiny_model().save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"and the actor is .*elsewhere"):
        RewardOnTrunk(str(tmp_path), str(tmp_path / "elsewhere")).attach(adapted(base).actor)


def test_what_is_no_reward_adapter(trained: tuple[str, Path], tmp_path: Path) -> None:
    base, final = trained
    actor = load_actor(base)
    add_adapter(actor, LORA)
    save_adapter(actor, tmp_path / "policy")
    for load in (lambda f: RewardOnTrunk(f, base), lambda f: load_reward_model(f, tokenizer)):
        with pytest.raises(InputError, match="no score head with one label"):
            load(str(tmp_path / "policy"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text((final / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(InputError, match="cannot be read"):
        RewardOnTrunk(str(tmp_path / "broken"), base)
    with pytest.raises(InputError, match=r"no critic starts from .*adapter without a trunk"):
        Critic.from_pretrained(str(final / "adapter"), actor)
    with pytest.raises(InputError, match="scores nothing before the trainer"):
        RewardModel(RewardOnTrunk(str(final / "adapter"), base), tokenizer)(*TEXTS)


def test_a_half_trunk_trains_float32_adapters() -> None:
    """bfloat16 weights that stay as they are; adapters, heads and what they sum to are float32."""
    for critic in ("separate", "shared"):
        actor = tiny_model(dtype=torch.bfloat16)
        before = logits(actor).clone()
        roles = assemble_roles(
            actor, critic=critic, with_reference=True, adapter=AdapterConfig(lora_rank=4, dtype="bfloat16")
        )
        assert {p.dtype for group in roles.parameter_groups() for p in group} == {torch.float32}
        assert {p.dtype for p in roles.actor.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert torch.equal(logits(actor), before), "a new adapter changes nothing"
        found = predictions(roles)
        assert found.values.dtype == torch.float32
        assert torch.equal(found.ref_log_probs, found.log_probs)
