"""Trunks in 8 and 4 bits: what bitsandbytes is told and, where it is installed, whole runs."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lm_lora import IDS, logits, stir
from test_lm_trainer import files_of, make_config, make_trainer
from tiny import tiny_model, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf.checks import InputError
from rlhf.lm import config as config_module
from rlhf.lm.config import AdapterConfig, RunConfig, TrainerConfig
from rlhf.lm.lora import add_adapter, bare, is_quantised, merged
from rlhf.lm.models import load_actor, new_reward_model
from rlhf.lm.reward_modeling import PairFitConfig, RewardModelingConfig, reward_model_trainer, scores
from rlhf.lm.rewards import RewardModel
from rlhf.lm.rows import Pair
from rlhf.lm.trunk_reward import RewardOnTrunk

real = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
BITS = ["4bit", "8bit"]


def adapter(bits: Any, **options: Any) -> AdapterConfig:
    return AdapterConfig(**{"lora_rank": 4, "load_in": bits} | options)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_pretrained_is_told(bits: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(
        "rlhf.lm.models.AutoModelForCausalLM.from_pretrained",
        lambda model, **options: told.update(options) or (tiny_model(), {"missing_keys": set()}),
    )
    load_actor("somewhere", adapter=adapter(bits, dtype=dtype))
    quantization = told["quantization_config"]
    assert isinstance(quantization, BitsAndBytesConfig)
    assert (quantization.load_in_4bit, quantization.load_in_8bit) == (bits == "4bit", bits == "8bit")
    assert told["dtype"] == getattr(torch, dtype)
    if bits == "4bit":
        assert (quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant) == ("nf4", True)
        assert quantization.bnb_4bit_compute_dtype == getattr(torch, dtype)
    assert {"lm_head", "score"} <= set(quantization.llm_int8_skip_modules)
    told.clear()
    load_actor("somewhere", adapter=AdapterConfig())
    assert told == {"dtype": torch.float32, "output_loading_info": True}


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_trunk_needs_adapters_and_the_package(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"load_in='{bits}' freezes all weights: pass --lora-rank"):
        TrainerConfig(adapter=adapter(bits, lora_rank=0))
    with pytest.raises(InputError, match="dtype='bfloat16' is for a frozen trunk: pass --lora-rank"):
        RewardModelingConfig(adapter=AdapterConfig(dtype="bfloat16"))
    with pytest.raises(InputError, match="--lora-alpha 8 does nothing in a run without --lora-rank"):
        RewardModelingConfig(adapter=AdapterConfig(lora_alpha=8))
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        RewardModelingConfig(adapter=adapter(bits))


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_model(hidden_size=64, intermediate_size=128, initializer_range=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@real
@pytest.mark.parametrize("bits", BITS)
def test_merged_is_the_dequantised_trunk_and_its_adapter(bits: str, base: str) -> None:
    model = load_actor(base, adapter=adapter(bits)).eval()
    assert sum(is_quantised(module) for module in model.modules()) == 14, "seven linear layers in each of two"
    plain = logits(model)
    assert not torch.equal(plain, logits(load_actor(base))), "it is not what it was"
    add_adapter(model, adapter(bits))
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    stir(model)
    whole = merged(model)
    assert not any(is_quantised(module) for module in whole.modules())
    scale = float(logits(model).std())  # 8 bits round the layers' inputs as well: noise that the merged model has not
    assert (logits(whole) - logits(model)).abs().max() < (1e-4 if bits == "4bit" else 0.3) * scale
    torch.testing.assert_close(logits(bare(model)), plain, rtol=0, atol=0)


@real
@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_dequantised_trunk(bits: str, base: str) -> None:
    """They pass through quantised layers, in eval mode too, to the adapters of the first layer."""
    model = load_actor(base, adapter=adapter(bits)).eval()
    add_adapter(model, adapter(bits))
    plain = merged(model)
    add_adapter(plain, adapter(None))
    for one in (model, plain):
        stir(one)
        one(IDS).logits.log_softmax(-1)[..., 5].sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            found = model.get_parameter(name).grad
            assert (found - parameter.grad).norm() < (1e-4 if bits == "4bit" else 0.3) * parameter.grad.norm(), name


@real
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_run_trains_resumes_and_exports(bits: str, critic: str, base: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "adapter": {"lora_rank": 4, "load_in": bits},
        "algorithm": {"critic": critic},
        "optimization": {"steps": 3, "prompts_per_step": 4},
        "run": {"eval_every": 0, "eval_prompts": 4, "checkpoint_every": 1},
    }

    def trainer(name: str, **run: Any) -> Any:
        config = make_config(tmp_path / name, **options | {"run": {**options["run"], **run}})
        return make_trainer(config, make_actor=lambda: load_actor(base, adapter=config.adapter))

    whole = trainer("whole")
    whole.train()
    rows = files_of(tmp_path / "whole")[0]
    assert rows[1]["kl/sequence"] == 0
    assert rows[-1]["kl/sequence"] != 0
    # The engine and the update see one policy; 8 bits round what goes into each layer as well.
    assert max(row["sampler/log_prob_gap"] for row in rows[1:]) < (1e-3 if bits == "4bit" else 0.5)
    cut = trainer("cut")
    cut.train_step()
    cut.save_checkpoint()
    resumed = trainer("cut", resume=True)
    for row in rows[2:]:
        metrics = resumed.train_step()[0]
        assert metrics["reward/mean"] == pytest.approx(row["reward/mean"], abs=1e-4)
        assert metrics["kl/sequence"] == pytest.approx(row["kl/sequence"], abs=1e-3)

    final = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final")
    assert not any(is_quantised(module) for module in final.modules())
    actor = logits(whole.roles.actor)
    assert (final(IDS).logits - actor).abs().max() < (1e-3 if bits == "4bit" else 0.3) * actor.std()
    again = load_actor(base, adapter=adapter(bits))
    again.load_adapter(str(tmp_path / "whole" / "final" / "adapter"))
    torch.testing.assert_close(logits(again), actor, rtol=0, atol=1e-4)


@real
def test_a_reward_model_trains_on_four_bits(base: str, tmp_path: Path) -> None:
    """And on a bfloat16 trunk, under a float32 head."""
    ids = tokenizer([f"1={i}" for i in range(6)], add_special_tokens=False)["input_ids"]
    pairs = [Pair(ids[i], ids[j], 0.0) for i in range(6) for j in range(i)]
    for number, lora in enumerate((adapter("4bit"), adapter(None, dtype="bfloat16"))):
        trainer = reward_model_trainer(
            RewardModelingConfig(
                optimization=PairFitConfig(epochs=3, batch_size=5, learning_rate=1e-2),
                adapter=lora,
                run=RunConfig(run_dir=tmp_path / str(number), eval_every=0),
            ),
            tokenizer=tokenizer,
            train=pairs,
            held_out=pairs,
            make_model=lambda lora=lora: new_reward_model(base, tokenizer, adapter=lora),  # type: ignore[misc]
        )
        assert {p.dtype for p in trainer.parameters} == {torch.float32}
        first = trainer.evaluate()["held_out/loss"]
        assert trainer.train()["held_out/loss"] < first
        actor = load_actor(base, adapter=lora)
        add_adapter(actor, replace(lora, lora_rank=2))
        scorer = RewardOnTrunk(str(tmp_path / str(number) / "final" / "adapter"), base)
        scorer.attach(actor)  # on a trunk of the same few bits, it scores as it did in training
        found = RewardModel(scorer, tokenizer)(["1=2", "1=5"], ["", ""])
        texts = tokenizer(["1=2", "1=5"], add_special_tokens=False)["input_ids"]
        expected = scores(trainer.model, texts, pad_token_id=tokenizer.pad_token_id).tolist()
        assert found == pytest.approx(expected, abs=1e-4 if lora.load_in else 0.02)
