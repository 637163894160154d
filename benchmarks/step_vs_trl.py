"""One whole training step, ours and TRL's: rollout, rewards, log-probs, update and logging, in turn, in one run.

    python benchmarks/step_vs_trl.py                                  # random 4 M Qwen2; one and two threads
    python benchmarks/step_vs_trl.py --model <folder> --dtype bfloat16 --prompts 2 --max-new-tokens 32
    python benchmarks/step_vs_trl.py --model qwen2-0.5b --dtype bfloat16 --device cuda --prompts 32 \\
        --prompt-tokens 128 --max-new-tokens 256 --contestants ours-grpo ours-ppo trl trl-continuous trl-vllm

Needs TRL 1.16 (pip install trl==1.16.0). Each contestant lives in a fresh process of its own, which loads the same
weights from one folder and waits; the parent lets them make one step each, in turn, round after round, so only one runs
at a time. A step lasts from one permission to the moment the trainer would begin the next one: nothing a trainer does
besides is left out. Ratios are taken within a round; their median is shown, against the fastest TRL.

Lengths are the same for all, and checked. `fixed`: all max_new_tokens. `natural`: drawn anew for each round, prompt and
sample from a lognormal with median max_new_tokens / 8 and sigma 1, cut off at max_new_tokens; a completion's last token
is then the end-of-sequence token, and no earlier one is. A row's end is told to our engine and to generate_batch as its
own max_new_tokens, to model.generate by a stopping criterion in place of its own; none of them looks ahead at it. vLLM
under TRL takes one length for all, so it is measured at fixed length alone.

Peak memory is a process's largest resident size, and how much of it came after the imports (on CUDA: torch's peak).
--page writes the tables between the page's markers.
"""

import json
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor

Lengths = Literal["fixed", "natural"]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: str = "qwen2-4m"
    """A random Qwen2 (qwen2-4m, or qwen2-0.5b of Qwen2.5-0.5B's shape), or a folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights, everywhere; no autocast on top."""
    device: Literal["cpu", "cuda"] = "cpu"
    contestants: tuple[str, ...] = ("ours-grpo", "ours-ppo", "trl", "trl-small", "trl-checkpointing")
    """ours-grpo and ours-ppo: rlhf.lm.trainer.Trainer under the preset; trl: GRPOTrainer, the whole batch in one
    forward and backward; trl-small: 16 sequences at a time; trl-checkpointing: its default; trl-continuous:
    transformers' continuous batching; trl-vllm: vLLM in the same process (CUDA)."""
    prompts: int = 8
    samples_per_prompt: int = 8
    prompt_tokens: int = 32
    """Exactly with random models, where lengths are natural a quarter of it to all of it; about with others."""
    max_new_tokens: int = 64
    lengths: tuple[Lengths, ...] = ("fixed", "natural")
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 5
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


EQUALISED = """
- weights (one folder, one dtype, no autocast: TRL's `bf16=False`), eager execution, sdpa attention, dropout off;
- prompts, in groups of {samples}; one round is one optimizer step (`num_iterations=1`, `steps_per_generation` =
  `gradient_accumulation_steps`; our epochs=1, minibatches=1), so both skip nothing and repeat nothing;
- lengths, as above; `mask_truncated_completions=False`, our train_on_truncated=True;
- sampling: temperature 1, whole vocabulary (`top_k=0`, `top_p=1`, `min_p=None`, `repetition_penalty=1`);
- GRPO's loss: `loss_type="grpo"` (mean of sequence means), clip 0.2, `beta` = our kl_loss_coef = {kl},
  `scale_rewards="group"`, no entropy bonus (TRL's entropies are a metric, as ours are);
- AdamW with betas 0.9 and 0.95, epsilon 1e-8, weight decay 0, learning rate {rate} without warm-up or decay, gradient
  norm clipped at 1; the implementation of AdamW is each program's default;
- one cheap reward function of the text; metrics logged at every step (`logging_steps=1`), no checkpoints, no progress
  bar, no tracker, no evaluation;
- `gradient_checkpointing`: off, but for trl-checkpointing. TRL's default is on.

Not equalised: TRL pads to the longest of the batch and takes `per_device_train_batch_size` sequences at a time; we cut
micro-batches by tokens, sorted by length. On-policy, TRL takes the update's own log-probs as the old ones; we compute
what our trainer computes. Our PPO has a critic and a reference on top, TRL's GRPO has neither."""


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
    sizes: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    if options.model == "qwen2-0.5b":
        sizes = {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2,
        }  # fmt: skip
    torch.manual_seed(options.seed)
    config = Qwen2Config(
        **sizes,
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
    words = "the of and to in is was for on are as with his they at be this from have or by one had not".split()
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


def our_step(options: Options, lengths: Lengths, name: str, folder: Path, connection: Connection) -> None:
    import rlhf.lm.trainer as module
    from rlhf.lm.config import OptimizationConfig, RunConfig, SamplingConfig, TrainerConfig
    from rlhf.lm.generation import SlotEngine
    from rlhf.lm.tasks import Task
    from rlhf.presets import PRESETS

    clock, table = Clock(options.device), LengthTable(options, lengths)
    turns = Turns(connection, clock, table, resident(options.device))
    tokenizer = load_tokenizer(folder)
    eos = tokenizer.eos_token_id

    class Scheduled:
        """The slot engine, each request of its own length."""

        def __init__(self, actor: Any) -> None:
            slots = options.sequences
            self.inner = SlotEngine(actor, eos_token_ids=set(), pad_token_id=tokenizer.pad_token_id, max_slots=slots)

        def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, *, max_new_tokens: Any, **settings: Any) -> Any:
            rows = zip(prompt_ids.tolist(), prompt_mask.tolist(), strict=True)
            prompts = [[token for token, kept in zip(*row, strict=True) if kept] for row in rows]
            wanted = table.of(prompts)
            limits = torch.tensor(wanted, device=prompt_ids.device)
            with clock.part("generate"):
                found = self.inner.generate(prompt_ids, prompt_mask, max_new_tokens=limits, **settings)
            clock.count(prompts, wanted)
            ended = lengths == "natural"
            tokens = with_ends(found.token_ids, limits, eos, ended=ended)
            tokens = torch.where(found.action_mask, tokens, tokenizer.pad_token_id)
            return found._replace(token_ids=tokens, is_finished=torch.full_like(found.is_finished, ended))

    algorithm = PRESETS["ppo"].algorithm
    if name == "ours-grpo":
        algorithm = replace(PRESETS["grpo"].algorithm, kl_loss_coef=options.kl)
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
    cast(Any, module).collect = clock.timed("collect", module.collect)
    trainer = module.Trainer(
        config,
        tokenizer=tokenizer,
        task=Task("step", rows, rows[:1], distinct_characters, metric="score"),
        make_actor=lambda: load_model(options, folder),
        make_engine=Scheduled,
    )
    step = trainer.train_step

    def train_step() -> Any:
        turns.wait()
        return step()

    cast(Any, trainer).train_step = train_step  # train() logs, shows and writes after each
    trainer.train()


def their_step(options: Options, lengths: Lengths, name: str, folder: Path, connection: Connection) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock, table = Clock(options.device), LengthTable(options, lengths)
    turns = Turns(connection, clock, table, resident(options.device))
    at_once = min(16, options.sequences) if name == "trl-small" else options.sequences
    vllm = name == "trl-vllm"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=options.device == "cpu",
        max_steps=10_000,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=options.sequences // at_once,
        num_generations=options.samples_per_prompt,
        max_completion_length=options.max_new_tokens,
        num_iterations=1,
        gradient_checkpointing=name == "trl-checkpointing",
        bf16=False,
        loss_type="grpo",
        beta=options.kl,
        scale_rewards="group",
        mask_truncated_completions=False,
        shuffle_dataset=False,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_transformers_continuous_batching=name == "trl-continuous",
        use_vllm=vllm,
        vllm_mode="colocate",
        vllm_importance_sampling_correction=False,
        generation_kwargs={"ignore_eos": True} if vllm else None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=options.seed,
    )
    callback = type("Waiting", (TrainerCallback,), {"on_step_begin": lambda self, *a, **k: turns.wait()})()
    trainer: Any = GRPOTrainer(
        model=load_model(options, folder),
        args=config,
        reward_funcs=distinct_characters,
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
    from transformers import StoppingCriteriaList

    model, eos = trainer.model, trainer.processing_class.eos_token_id
    inner = model.generate

    def generate(input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        pairs = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        prompts = [[token for token, kept in zip(*row, strict=True) if kept] for row in pairs]
        wanted = table.of(prompts)
        limits = torch.tensor(wanted, device=input_ids.device)
        width, natural = input_ids.shape[1], table.lengths == "natural"
        generation_config.eos_token_id = None
        generation_config.max_new_tokens = max(wanted)
        ends = limits + width
        criteria = [lambda ids, scores, **_: ids.shape[1] >= ends] if natural else []
        with clock.part("generate"):
            found = inner(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=generation_config,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        clock.count(prompts, wanted)
        assert found.shape[1] == width + max(wanted)
        completions = with_ends(found[:, width:], limits, eos, ended=natural)
        return torch.cat([input_ids, completions], -1)

    model.generate = generate


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


def child(
    options: Options, threads: int, lengths: Lengths, name: str, folder: Path, log: Path, connection: Connection
) -> None:
    """A contestant's life; what it prints goes to the log."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    try:
        run = our_step if name.startswith("ours") else their_step
        run(options, lengths, name, folder, connection)
    except Exception:
        connection.send(traceback.format_exc())
        raise


# ---- The contest -----------------------------------------------------------------------------------------------------

Records = dict[str, list[dict[str, Any]]]


def contest(options: Options, threads: int, lengths: Lengths, folder: Path) -> Records:
    """Steps of every contestant, by round; those that fail are named and left out."""
    context = multiprocessing.get_context("spawn")
    running: dict[str, tuple[Any, Connection]] = {}
    records: Records = {}
    log = folder / "log.txt"

    def turn(name: str) -> None:
        """One step of this contestant, or its start."""
        process, connection = running[name]
        try:
            if name in records:
                connection.send("go")
            found = connection.recv()
        except (EOFError, BrokenPipeError):
            found = f"ended by itself, exit code {process.exitcode}"
        if isinstance(found, dict):
            records[name].append(found)
        elif found == "ready":
            records[name] = []
        else:
            print(f"{name}: not measured ({str(found).strip().splitlines()[-1][:200]})", flush=True)
            process.kill()
            records.pop(name, None)
            running.pop(name)

    try:
        for name in options.contestants:
            if name == "trl-vllm" and (find_spec("vllm") is None or lengths == "natural"):
                print(f"{name}: not measured (no vllm here, or lengths vary)")
                continue
            ours, theirs = context.Pipe()
            args = (options, threads, lengths, name, folder, log, theirs)
            process = context.Process(target=child, args=args, daemon=True)
            process.start()
            theirs.close()
            running[name] = (process, ours)
            turn(name)
        for _ in range(options.rounds + 1):
            for name in list(running):
                turn(name)
    finally:
        for process, connection in running.values():
            try:
                connection.send("stop")
            except (BrokenPipeError, OSError):
                process.kill()
            process.join()
    check_equal_work(records)
    return {name: steps[1:] for name, steps in records.items()}


def check_equal_work(records: Records) -> None:
    """Every contestant made as many tokens in every round."""
    counted = {
        name: [(step["completion tokens"], step["prompt tokens"]) for step in steps] for name, steps in records.items()
    }
    assert len({json.dumps(counts) for counts in counted.values()}) <= 1, counted


HEADS = [
    "threads", "lengths", "contestant", "completion tokens/s", "TRL / it", "CPU, TRL / it", "step, s", "CPU, s",
    "generate, CPU s", "update, CPU s", "update tokens/s", "by CPU", "peak, MiB", "after imports, MiB",
]  # fmt: skip


def table(records: Records, threads: int, lengths: Lengths) -> list[str]:
    """Rows of the table; medians over rounds, ratios within rounds."""

    def median(name: str, part: str, index: int) -> float:
        return statistics.median(step.get(part, [0.0, 0.0])[index] for step in records[name])

    peers = [name for name in records if name.startswith("trl")]
    best = min(peers, key=lambda name: median(name, "step", 0), default=None)
    rows = []
    for name, steps in records.items():
        ratios = ["-", "-"]
        if best is not None:
            ratios = [
                f"{statistics.median(b['step'][i] / a['step'][i] for a, b in zip(steps, records[best], strict=True)):.2f}"
                for i in (0, 1)
            ]
        tokens = statistics.median(step["completion tokens"] for step in steps)
        real = statistics.median(step["completion tokens"] + step["prompt tokens"] for step in steps)
        update = [median(name, "step", i) - median(name, "collect", i) for i in (0, 1)]
        peak = max(step["peak"] for step in steps)
        cells = [str(threads), lengths, f"{name}{' (fastest TRL)' if name == best else ''}"]
        cells += [f"{tokens / median(name, 'step', 0):,.0f}", *ratios]
        cells += [f"{median(name, 'step', i):.3f}" for i in (0, 1)]
        cells += [f"{median(name, 'generate', 1):.3f}", f"{update[1]:.3f}"]
        cells += [f"{real / x:,.0f}" for x in update]
        cells += [f"{x / 2**20:,.0f}" for x in (peak, peak - steps[0]["imports"])]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def write_into_page(page: Path, name: str, lines: list[str]) -> None:
    """Between the page's lines <!-- name --> and <!-- end -->."""
    text = page.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert pattern.search(text), f"{page} has no <!-- {name} --> ... <!-- end -->"
    page.write_text(pattern.sub(lambda m: m[1] + "\n".join(["", *lines, ""]) + "\n" + m[2], text))


def main(options: Options) -> None:
    folder = Path(tempfile.mkdtemp())
    if options.model.startswith("qwen2-"):
        save_model(options, folder)
    else:
        (folder / "model").symlink_to(Path(options.model).resolve())
        folder = folder / "model"
    lines = [
        f"{options.model}, {options.dtype}, {options.device}: {options.prompts} prompts x {options.samples_per_prompt} "
        f"samples, prompts of {options.prompt_tokens} tokens, at most {options.max_new_tokens} new ones; medians of "
        f"{options.rounds} rounds; TRL {version('trl')}, transformers {version('transformers')}, torch "
        f"{torch.__version__}.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
    ]
    print("\n".join(lines), flush=True)
    for threads in options.threads:
        for lengths in options.lengths:
            rows = table(contest(options, threads, lengths, folder), threads, lengths)
            print("\n".join(rows), flush=True)
            lines += rows
    equal = EQUALISED.format(samples=options.samples_per_prompt, kl=options.kl, rate=options.learning_rate)
    print(f"\nEqualised:\n{equal}")
    if options.page is not None:
        write_into_page(options.page, "step_vs_trl", [*lines, "", "Equalised:", *equal.splitlines()])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
