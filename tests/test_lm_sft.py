"""Supervised fine-tuning: transformers' own loss, however rows are padded, packed, split over micro-batches."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import ARCHITECTURES, encode, tiny_model, tokenizer
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, OPTConfig, PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.config import RunConfig
from rlhf.lm.rows import Demonstration
from rlhf.lm.sft import SFTConfig, SFTFitConfig, packed_objective, padded_objective, sft_trainer
from rlhf.lm.supervised import SupervisedTrainer
from rlhf.run import read_json_lines, without_timings

PAD = tokenizer.pad_token_id


def row(prompt: str, completion: str, learned: str | None = None) -> Demonstration:
    """`learned` has a "1" for each learned token of the completion; all if None."""
    mask = [True] * len(completion) if learned is None else [x == "1" for x in learned]
    return Demonstration(*encode([prompt, completion]), mask)


ROWS = [row("1+2=", "3"), row("12345+678=", "130231", "110011"), row("9", "8765")]


def transformers_loss(model: PreTrainedModel, rows: list[Demonstration]) -> torch.Tensor:
    """The model's own: labels of -100 where nothing is learned; prompt and completion padded on the right."""
    width = max(r.tokens for r in rows)
    ids, labels, mask = [], [], []
    for r in rows:
        rest = width - r.tokens
        learned = [token if yes else -100 for token, yes in zip(r.completion_ids, r.learned, strict=True)]
        ids.append(r.prompt_ids + r.completion_ids + [PAD] * rest)
        labels.append([-100] * len(r.prompt_ids) + learned + [-100] * rest)
        mask.append([1] * r.tokens + [0] * rest)
    return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss


def learned(rows: list[Demonstration]) -> int:
    return sum(sum(r.learned) for r in rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pack", [False, True])
def test_the_loss_is_transformers_own(architecture: str, pack: bool) -> None:
    model = tiny_model(architecture=architecture, dtype=torch.float64)
    found = packed_objective(model, ROWS) if pack else padded_objective(model, ROWS, pad_token_id=PAD)
    loss = found["loss"] / learned(ROWS)
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    expected = transformers_loss(model, ROWS)
    expected.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0, atol=1e-5)  # theirs is computed in float32
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_what_is_not_learned_has_no_part_in_the_loss() -> None:
    model = tiny_model(dtype=torch.float64)
    one = padded_objective(model, [row("12", "345", "100")], pad_token_id=PAD)["loss"]
    other = padded_objective(model, [row("12", "399", "100")], pad_token_id=PAD)["loss"]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def config(folder: Path, **changes: object) -> SFTConfig:
    fit = SFTFitConfig(epochs=2, batch_size=8, micro_batch_size=8, learning_rate=1e-3)
    run = RunConfig(run_dir=folder, eval_every=2, checkpoint_every=2)
    return SFTConfig(optimization=dataclasses.replace(fit, **changes), run=run)


DATA = [row(f"{i}+{i}=", str(2 * i)) for i in range(30)]


def trainer(
    folder: Path, resume: bool = False, dtype: torch.dtype = torch.float32, **changes: object
) -> SupervisedTrainer:
    made = config(folder, **changes)
    made = dataclasses.replace(made, run=dataclasses.replace(made.run, resume=resume))
    return sft_trainer(
        made, tokenizer=tokenizer, train=DATA[:24], held_out=DATA[24:], make_model=lambda: tiny_model(dtype=dtype)
    )


@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"micro_batch_size": 1, "pack": True}, {"pack": True}])
def test_a_step_is_the_same_however_its_rows_are_laid_out(changes: dict[str, object], tmp_path: Path) -> None:
    one = trainer(tmp_path / "one", dtype=torch.float64)
    other = trainer(tmp_path / "other", dtype=torch.float64, **changes)
    for _ in range(3):
        assert one.train_step()["loss"] == pytest.approx(other.train_step()["loss"], abs=1e-8)
    weights = other.model.state_dict()
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-7)


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_tokens(tmp_path: Path) -> None:
    """Of transformers' own mean, on rows of unequal length in unequal micro-batches."""
    run = trainer(tmp_path / "run", dtype=torch.float64, micro_batch_size=3)
    model = tiny_model(dtype=torch.float64)
    transformers_loss(model, run._batch()).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    assert run.train_step()["grad_norm"] == pytest.approx(squares**0.5, rel=1e-5)


def test_a_run_learns_resumes_exactly_and_leaves_a_model(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    last = whole.train()
    rows = read_json_lines(tmp_path / "whole" / "metrics.jsonl")
    assert last["held_out/loss"] < rows[0]["held_out/loss"]
    cut = trainer(tmp_path / "cut")
    for _ in range(3):  # the checkpoint is that of step 2
        cut.train_step()
        if cut.step == 2:
            cut.save_checkpoint()
    trainer(tmp_path / "cut", resume=True).train()
    resumed = read_json_lines(tmp_path / "cut" / "metrics.jsonl")
    assert without_timings(resumed) == without_timings(rows)[3:]
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "whole" / "plots" / "metrics.png").exists()


def test_a_fresh_process_reproduces_the_models_logits(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", steps=1)
    run.train()
    ids = encode(["12+34=46"])
    code = (
        "import sys, json, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])(['12+34=46'], return_tensors='pt').input_ids; "
        "print(json.dumps(model(ids).logits.tolist()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run" / "final")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = torch.tensor(json.loads(result.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, run.model(torch.tensor(ids)).logits.detach(), rtol=0, atol=1e-5)


def test_every_row_comes_once_before_any_twice(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    seen = []
    for run.step in range(6):
        seen += [tuple(r.prompt_ids) for r in run._batch()]
    for epoch in (seen[:24], seen[24:]):
        assert sorted(epoch) == sorted(tuple(r.prompt_ids) for r in DATA[:24])
    assert seen[:24] != seen[24:]
    assert run.steps == 6


def test_too_few_rows_are_an_error_before_a_model_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="24 training rows, fewer than batch_size = 99"):
        trainer(tmp_path / "run", batch_size=99)
    assert not (tmp_path / "run").exists()


def test_a_row_longer_than_the_model_is_an_error_before_a_folder_is_made(tmp_path: Path) -> None:
    def with_positions(count: int) -> SupervisedTrainer:
        return sft_trainer(
            config(tmp_path / str(count)),
            tokenizer=tokenizer,
            train=DATA[:24],
            held_out=DATA[24:],
            make_model=lambda: tiny_model(architecture="gpt2", n_positions=count),
        )

    longest = max(demonstration.tokens for demonstration in DATA)
    with pytest.raises(InputError, match=f"longest row has {longest} tokens.*pass --max-tokens {longest - 1} or less"):
        with_positions(longest - 1)
    assert not (tmp_path / str(longest - 1)).exists()
    with_positions(longest).train()
    assert (tmp_path / str(longest) / "final").is_dir()


UNPACKABLE = {
    "bloom": BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=2, initializer_range=0.4),
    "opt": OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    ),
    "mamba": MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPACKABLE)
def test_a_model_that_would_mix_packed_rows_is_refused_before_a_folder_is_made(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNPACKABLE[name]).eval()
    packed, plain = packed_objective(model, ROWS), padded_objective(model, ROWS, pad_token_id=PAD)
    assert abs(float(packed["loss"] - plain["loss"])) > 1e-3, "it does mix them"

    def made(pack: bool) -> SupervisedTrainer:
        return sft_trainer(
            config(tmp_path / "run", pack=pack), tokenizer=tokenizer, train=DATA[:24], held_out=DATA[24:],
            make_model=lambda: model,
        )  # fmt: skip

    with pytest.raises(InputError, match=f"{type(model).__name__} does not tell rows apart.*leave out --pack"):
        made(pack=True)
    assert not (tmp_path / "run").exists()
    made(pack=False).train_step()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Nine rows a step, of which one process takes five and the other four, in micro-batches of at most three."""
    trainer(tmp_path / "alone", batch_size=9, micro_batch_size=3).train()
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_lm_sft as t\n"
        "run = t.trainer(Path(sys.argv[2]), batch_size=9, micro_batch_size=3)\n"
        "assert run.accelerator.num_processes == 2\n"
        "run.train()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(Path(__file__).parent), str(tmp_path / "together")]
    subprocess.run([*launch, *arguments], check=True, env=environment, timeout=300)
    one, two = (without_timings(read_json_lines(tmp_path / x / "metrics.jsonl")) for x in ("alone", "together"))
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
