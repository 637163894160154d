"""What the contestants of step_vs_trl.py have in common, each in its own process: one model, one set of prompts and one
table of lengths; and our trainer among them. TRL's are in trl_contestant.py and trl_ppo_contestant.py.
"""

import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

Lengths = Literal["fixed", "natural"]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: str = "qwen2-4m"
    """A random Qwen2 (qwen2-1m, -4m, -16m, or qwen2-0.5b of Qwen2.5-0.5B's shape), or a folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights, everywhere; no autocast on top."""
    device: Literal["cpu", "cuda"] = "cpu"
    contestants: tuple[str, ...] = ("ours-grpo", "ours-ppo", "trl", "trl-small", "trl-checkpointing")
    """ours-grpo and ours-ppo: rlhf.lm.trainer.Trainer under the preset; trl: GRPOTrainer, the whole batch in one
    forward and backward; trl-small: 16 sequences at a time; trl-checkpointing: its default; trl-continuous:
    transformers' continuous batching; trl-vllm: vLLM in the same process (CUDA); trl-ppo: see there."""
    trl_ppo: Path | None = None
    """Folder with TRL 1.12, the last with a PPO that has a critic (pip install trl==1.12.0 --no-deps --target
    <folder>), for the contestant trl-ppo: 16 sequences at a time, without gradient checkpointing."""
    prompts: int = 8
    samples_per_prompt: int = 8
    prompt_tokens: int = 32
    """Exactly with random models, where lengths are natural a quarter of it to all of it; about with others."""
    max_new_tokens: int = 64
    lengths: tuple[Lengths, ...] = ("fixed", "natural")
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 4
    """Steps of each contestant that count; one comes before them."""
    kl: float = 0.0
    """Weight of KL to the reference in GRPO's loss, on both sides; 0: no reference. PPO keeps its preset's."""
    learning_rate: float = 1e-6
    page: Path | None = None
    """A Markdown page: the tables are written between its lines <!-- step_vs_trl --> and <!-- end -->."""
    seed: int = 0

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples_per_prompt


HALF_B: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
SIZES: dict[str, dict[str, Any]] = {
    f"qwen2-{name}": {
        "vocab_size": 264, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }
    for name, hidden in (("1m", 128), ("4m", 256), ("16m", 512))
} | {"qwen2-0.5b": HALF_B | {"num_attention_heads": 14, "num_key_value_heads": 2}}  # fmt: skip


# ---- The same model, prompts, lengths and reward for all -------------------------------------------------------------


def save_model(options: Options, folder: Path) -> None:
    """A random Qwen2 with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(options.seed)
    config = Qwen2Config(
        **SIZES[options.model],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(options: Options, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # not the end token: that has to be told apart
    return tokenizer


def prompt_texts(options: Options, lengths: Lengths) -> list[str]:
    draw = random.Random(options.seed)
    counts = [
        draw.randint(max(1, options.prompt_tokens // 4), options.prompt_tokens)
        if lengths == "natural"
        else options.prompt_tokens
        for _ in range(options.prompts)
    ]
    if options.model.startswith("qwen2-"):  # a character is a token
        return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=count)) for count in counts]
    words = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "are", "as", "with", "they", "at", "be", "this")
    return [" ".join(draw.choices(words, k=count)) for count in counts]


def distinct_characters(completions: list[str], **columns: Any) -> list[float]:
    """The reward: what share of a text's characters is new in it."""
    return [len(set(text)) / (1 + len(text)) for text in completions]


class LengthTable:
    """Tokens for each request of a round: by round, rank of the prompt among the round's prompts, and sample."""

    def __init__(self, options: Options, lengths: Lengths) -> None:
        self.options, self.lengths, self.round = options, lengths, 0

    def of(self, prompts: list[list[int]]) -> list[int]:
        limit = self.options.max_new_tokens
        if self.lengths == "fixed":
            return [limit] * len(prompts)
        rank = {prompt: i for i, prompt in enumerate(sorted({tuple(p) for p in prompts}))}
        seen = [0] * len(rank)
        found = []
        for prompt in prompts:
            i = rank[tuple(prompt)]
            draw = random.Random(f"{self.options.seed} {self.round} {i} {seen[i]}")
            seen[i] += 1
            found.append(max(1, min(limit, round(limit / 8 * 2.718281828 ** draw.gauss(0, 1) + 0.5))))
        return found


def kept_tokens(ids: Tensor, mask: Tensor) -> list[list[int]]:
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return [[token for token, kept in zip(*row, strict=True) if kept] for row in rows]


def with_ends(tokens: Tensor, limits: Tensor, eos: int, *, ended: bool) -> Tensor:
    """[B, T]: the end token where a row's limit is, if it ended, and nowhere else; token 1 in place of others."""
    tokens = torch.where(tokens == eos, 1, tokens)
    return tokens.scatter(1, limits[:, None] - 1, eos) if ended else tokens


# ---- A contestant in its process -------------------------------------------------------------------------------------


@dataclass
class Clock:
    """What a step took, by part: {part: [wall seconds, process CPU seconds]}; and what it did."""

    device: str
    parts: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = self.now()
        yield
        ended, cpu_ended = self.now()
        spent = self.parts.setdefault(name, [0.0, 0.0])
        spent[0] += ended - wall
        spent[1] += cpu_ended - cpu

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run

    def count(self, prompts: list[list[int]], limits: list[int]) -> None:
        self.counts = {"completion tokens": sum(limits), "prompt tokens": sum(map(len, prompts))}


class Turns:
    """Each call of `wait` ends a step and holds the process until it may make the next one."""

    def __init__(self, connection: Connection, clock: Clock, table: LengthTable, resident: int) -> None:
        self.connection, self.clock, self.table, self.resident = connection, clock, table, resident
        self.began: tuple[float, float] | None = None

    def wait(self, *_: Any, **__: Any) -> None:
        now = self.clock.now()
        if self.began is not None:
            step = [b - a for a, b in zip(self.began, now, strict=True)]
            record = {"step": step, **self.clock.parts, **self.clock.counts, **memory(self.clock.device)}
            self.connection.send(record | {"imports": self.resident})
            self.table.round += 1
        else:
            self.connection.send("ready")
        if self.connection.recv() == "stop":
            os._exit(0)
        self.clock.parts.clear()
        self.began = self.clock.now()


def memory(device: str) -> dict[str, int]:
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated()}
    lines = Path("/proc/self/status").read_text().splitlines()
    return {"peak": next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))}


def resident(device: str) -> int:
    import psutil

    return 0 if device == "cuda" else int(psutil.Process().memory_info().rss)


def build_ours(
    options: Options, lengths: Lengths, algorithm: Any, folder: Path, clock: Clock, table: LengthTable
) -> Any:
    """Our trainer, whose engine gives each request the table's length; the clock times its generating."""
    from rlhf.lm.config import OptimizationConfig, RunConfig, SamplingConfig, TrainerConfig
    from rlhf.lm.generation import SlotEngine
    from rlhf.lm.tasks import Task
    from rlhf.lm.trainer import Trainer

    tokenizer = load_tokenizer(folder)

    class Scheduled:
        def __init__(self, actor: Any) -> None:
            pad = tokenizer.pad_token_id
            self.inner = SlotEngine(actor, eos_token_ids=set(), pad_token_id=pad, max_slots=options.sequences)

        def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: Any, **settings: Any) -> Any:
            prompts = kept_tokens(prompt_ids, prompt_mask)
            wanted = table.of(prompts)
            limits = torch.tensor(wanted, device=prompt_ids.device)
            with clock.part("generate"):
                found = self.inner.generate(prompt_ids, prompt_mask, max_new_tokens=limits, **settings)
            clock.count(prompts, wanted)
            ended = lengths == "natural"
            tokens = with_ends(found.token_ids, limits, tokenizer.eos_token_id, ended=ended)
            tokens = torch.where(found.action_mask, tokens, tokenizer.pad_token_id)
            return found._replace(token_ids=tokens, is_finished=torch.full_like(found.is_finished, ended))

    rows = [{"prompt": text} for text in prompt_texts(options, lengths)]
    config = TrainerConfig(
        sampling=SamplingConfig(max_prompt_tokens=4 * options.prompt_tokens, max_new_tokens=options.max_new_tokens),
        algorithm=algorithm,
        optimization=OptimizationConfig(
            steps=10_000, prompts_per_step=options.prompts, samples_per_prompt=options.samples_per_prompt, epochs=1,
            minibatches=1, learning_rate=options.learning_rate, lr_schedule="constant",
        ),
        run=RunConfig(
            run_dir=Path(tempfile.mkdtemp()) / "run", seed=options.seed, eval_every=0, eval_prompts=1,
            checkpoint_every=0,
        ),
    )  # fmt: skip
    return Trainer(
        config,
        tokenizer=tokenizer,
        task=Task("step", rows, rows[:1], distinct_characters, metric="score"),
        make_actor=lambda: load_model(options, folder),
        make_engine=Scheduled,
    )


def algorithm_of(name: str, kl: float) -> Any:
    """ours-grpo or ours-ppo."""
    from rlhf.presets import PRESETS

    if name == "ours-grpo":
        return replace(PRESETS["grpo"].algorithm, kl_loss_coef=kl)
    return PRESETS["ppo"].algorithm


def our_step(options: Options, lengths: Lengths, name: str, folder: Path, connection: Connection) -> None:
    import rlhf.lm.trainer as module

    clock, table = Clock(options.device), LengthTable(options, lengths)
    turns = Turns(connection, clock, table, resident(options.device))
    cast(Any, module).collect = clock.timed("collect", module.collect)
    trainer = build_ours(options, lengths, algorithm_of(name, options.kl), folder, clock, table)
    step = trainer.train_step

    def train_step() -> Any:
        turns.wait()
        return step()

    trainer.train_step = train_step  # train() logs, shows and writes after each
    trainer.train()


def child(
    options: Options, threads: int, lengths: Lengths, name: str, folder: Path, log: Path, connection: Connection
) -> None:
    """A contestant's life; what it prints goes to the log."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    try:
        if name.startswith("ours"):
            our_step(options, lengths, name, folder, connection)
        elif name == "trl-ppo":
            from trl_ppo_contestant import their_ppo_step

            their_ppo_step(options, lengths, folder, connection)
        else:
            from trl_contestant import their_step  # TRL need not be installed to import this

            their_step(options, lengths, name, folder, connection)
    except Exception:
        connection.send(traceback.format_exc())
        raise
