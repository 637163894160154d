"""The upload at a run's end, with the hub's client replaced: who is asked, what is sent, what a failure costs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_lm_trainer import make_config, make_trainer
from tiny import encode, tiny_model, tokenizer
from transformers import AutoModelForCausalLM

from rlhf.checks import InputError
from rlhf.lm import hub
from rlhf.lm.config import RunConfig
from rlhf.lm.hub import check_hub, push
from rlhf.lm.models import new_reward_model
from rlhf.lm.reward_modeling import PairFitConfig, RewardModelingConfig, reward_model_trainer
from rlhf.lm.rows import Pair


class Hub:
    """What `HfApi` is asked for; `broken` names what raises."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: set[str] = set()

    def called(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))
        if name == self.broken:
            raise ConnectionError("the line is down\nfor today")

    def whoami(self) -> dict[str, str]:
        self.called("whoami")
        return {"name": "somebody"}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.called("create_repo", repo_id=repo_id, **options)
        return SimpleNamespace(repo_id=f"somebody/{repo_id.split('/')[-1]}")

    def upload_folder(self, folder_path: Path, **options: Any) -> None:
        self.called("upload_folder", **options)
        self.files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: found)
    return found


def short(run: Path, **options: Any) -> Any:
    steps = {"steps": 1, "prompts_per_step": 4}
    return make_config(run, optimization=steps, run={"eval_prompts": 2, "checkpoint_every": 0, **options})


def test_a_run_uploads_its_final_folder(api: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(short(tmp_path / "run", push_to_hub="somebody/adder"))
    assert [name for name, _ in api.calls] == ["whoami"], "before anything is trained"
    trainer.train()
    names = [name for name, _ in api.calls]
    assert names == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1] == {"repo_id": "somebody/adder", "private": True, "exist_ok": True}
    assert api.calls[2][1]["repo_id"] == "somebody/adder"
    assert api.calls[2][1]["ignore_patterns"] == ["critic/*"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= api.files
    assert "uploaded to" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["create_repo", "upload_folder"])
def test_a_failed_upload_loses_nothing(
    api: Hub, broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.broken = broken
    run = tmp_path / "run"
    summary = make_trainer(short(run, push_to_hub="somebody/adder")).train()
    assert "final/greedy" in summary
    AutoModelForCausalLM.from_pretrained(run / "final")
    said = capsys.readouterr().out.splitlines()[-1]
    assert "the upload to somebody/adder failed (ConnectionError: the line is down" in said
    assert f"the model is in {run / 'final'}; try again with `hf upload somebody/adder {run / 'final'}" in said


def test_without_a_login_nothing_begins(api: Hub, tmp_path: Path) -> None:
    api.broken = "whoami"
    with pytest.raises(InputError, match=r"--push-to-hub somebody/adder: .*the line is down.*hf auth login") as caught:
        make_trainer(short(tmp_path / "run", push_to_hub="somebody/adder"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_real_client_without_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match="log in with `hf auth login`, or set HF_TOKEN"):
        check_hub("somebody/adder")
    with pytest.raises(InputError, match="not a repository's name"):
        check_hub("some body/adder/3")


def test_nothing_is_asked_where_nothing_is_pushed(api: Hub, tmp_path: Path) -> None:
    check_hub(None)
    push(tmp_path, None)
    make_trainer(short(tmp_path / "run")).train()
    assert api.calls == []
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["push_to_hub"] is None


def test_the_supervised_recipes_upload_too(api: Hub, tmp_path: Path) -> None:
    pairs = [Pair(*encode([f"1={i}", f"1={j}"]), 0.0) for i in range(4) for j in range(i)]
    config = RewardModelingConfig(
        optimization=PairFitConfig(steps=1, batch_size=4),
        run=RunConfig(run_dir=tmp_path / "run", eval_every=0, push_to_hub="somebody/judge"),
    )
    tiny_model().save_pretrained(tmp_path / "base")
    reward_model_trainer(
        config, tokenizer=tokenizer, train=pairs, held_out=pairs,
        make_model=lambda: new_reward_model(str(tmp_path / "base"), tokenizer),
    ).train()  # fmt: skip
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert {"model.safetensors", "tokenizer.json"} <= api.files
