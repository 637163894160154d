"""Rollout engines side by side: tokens per second, memory, time to the first completion.

    python benchmarks/rollout.py                                     # a random 4M-parameter Qwen2, fixed length
    python benchmarks/rollout.py --group 8 --lengths natural
    python benchmarks/rollout.py --model <folder> --dtype bfloat16 --batches 32 --max-new-tokens 64

All engines run in one process, in turn, `repeats` times; ratios are taken within a turn and their median is shown. They
sample at temperature 1 from the whole vocabulary. No token ends a completion: each request has its length, the same for
every engine, so that all make the same number of tokens. `fixed`: all max_new_tokens. `natural`: drawn from a lognormal
with median max_new_tokens / 8 and sigma 1, cut off at max_new_tokens, as answers of a language model are (a few long
ones, most much shorter); an engine learns of the end when it is there, as with an end-of-sequence token.

Engines: slots and transformers are ours; generate (dynamic cache) and generate-static are model.generate;
generate_batch, transformers' continuous batching, takes a minute to start on a CPU and is measured only when asked for;
vllm where it is installed. Prompts have between a quarter of prompt_tokens and all of them, with --no-ragged all of
them; --group g asks g completions of each.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rlhf.lm.generation import Engine, SlotEngine, TransformersEngine

Generate = Callable[["Work"], int]  # makes the completions, returns how many tokens


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: str = "qwen2-4m"
    """A random Qwen2 of 4M parameters, one of Qwen2.5-0.5B's shape (qwen2-0.5b), or a folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    engines: tuple[str, ...] = ("slots", "transformers", "generate", "generate-static", "vllm")
    batches: tuple[int, ...] = (64,)
    """Completions per call."""
    group: int = 1
    """Completions of each prompt."""
    prompt_tokens: int = 64
    ragged: bool = True
    """Prompts of a quarter of prompt_tokens to all of them."""
    max_new_tokens: int = 128
    lengths: Literal["fixed", "natural"] = "fixed"
    max_slots: int = 1024
    threads: int = 1
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Work:
    """One call's requests."""

    prompts: list[list[int]]
    limits: Tensor  # [B] tokens wanted
    ids: Tensor = field(repr=False)  # [B, P] left-padded
    mask: Tensor = field(repr=False)


def load(options: Options) -> PreTrainedModel:
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    if options.model == "qwen2-4m":
        config = Qwen2Config(
            vocab_size=264, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    elif options.model == "qwen2-0.5b":
        config = Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.to(options.device).eval()


def draw_work(options: Options, batch: int, vocabulary: int) -> Work:
    generator = torch.Generator().manual_seed(options.seed)
    prompts: list[list[int]] = []
    while len(prompts) < batch:
        low = max(1, options.prompt_tokens // 4) if options.ragged else options.prompt_tokens
        length = int(torch.randint(low, options.prompt_tokens + 1, (), generator=generator))
        prompts += [torch.randint(3, vocabulary, (length,), generator=generator).tolist()] * options.group
    prompts = prompts[:batch]
    limits = torch.full((batch,), options.max_new_tokens)
    if options.lengths == "natural":
        drawn = torch.exp(torch.randn(batch, generator=generator)) * options.max_new_tokens / 8
        limits = drawn.ceil().long().clamp(1, options.max_new_tokens)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=options.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=options.device)
    return Work(prompts, limits, ids, mask.bool())


def ours(engine: Engine) -> Generate:
    def generate(work: Work) -> int:
        seeds = torch.arange(len(work.prompts))
        found = engine.generate(work.ids, work.mask, max_new_tokens=work.limits, temperature=1.0, seeds=seeds)
        return int(found.action_mask.sum())

    return generate


class AtLimit(StoppingCriteria):
    """Each row ends at its own length."""

    def __init__(self, work: Work) -> None:
        self.ends = work.limits.to(work.ids.device) + work.ids.shape[1]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


def theirs(model: PreTrainedModel, cache: str) -> Generate:
    def generate(work: Work) -> int:
        longest = int(work.limits.max())
        found = cast(Any, model).generate(
            work.ids, attention_mask=work.mask.long(), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=longest, pad_token_id=0, stopping_criteria=StoppingCriteriaList([AtLimit(work)]),
            cache_implementation=cache, disable_compile=model.device.type == "cpu",
        )  # fmt: skip
        assert found.shape == (len(work.prompts), work.ids.shape[1] + longest)
        return int(work.limits.sum())

    return generate


def their_batches(model: PreTrainedModel) -> Generate:
    """Continuous batching; it takes one length for all requests, so natural ones go in order of length classes."""
    from transformers import GenerationConfig

    def generate(work: Work) -> int:
        if int(work.limits.min()) < int(work.limits.max()):
            raise NotImplementedError("generate_batch has one length for all requests")
        config = GenerationConfig(
            max_new_tokens=int(work.limits.max()), do_sample=True, top_k=0, temperature=1.0, eos_token_id=-1,
            pad_token_id=0,
        )  # fmt: skip
        found = cast(Any, model).generate_batch(inputs=work.prompts, generation_config=config, progress_bar=False)
        return sum(len(output.generated_tokens) for output in found.values())

    return generate


def vllm_engine(options: Options) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(model=options.model, dtype=options.dtype, enable_prefix_caching=False, seed=options.seed)

    def generate(work: Work) -> int:
        wanted = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True) for n in work.limits.tolist()]
        found = llm.generate([{"prompt_token_ids": p} for p in work.prompts], wanted, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in found)

    return generate


def build(name: str, model: PreTrainedModel, options: Options) -> Generate:
    if name == "slots":
        return ours(SlotEngine(model, eos_token_ids=set(), pad_token_id=0, max_slots=options.max_slots))
    if name == "slots-compiled":
        engine = SlotEngine(model, eos_token_ids=set(), pad_token_id=0, max_slots=options.max_slots, compile_step=True)
        return ours(engine)
    if name == "transformers":
        return ours(TransformersEngine(model, eos_token_ids=set(), pad_token_id=0, batch_size=options.max_slots))
    if name == "generate":
        return theirs(model, "dynamic")
    if name == "generate-static":
        return theirs(model, "static")
    if name == "generate_batch":
        return their_batches(model)
    if name == "vllm":
        return vllm_engine(options)
    raise SystemExit(f"no engine {name!r}")


class PeakMemory:
    """MB above what was held at the start: of the device, or of this process (Linux)."""

    def __init__(self, device: str) -> None:
        self.on_cuda = device.startswith("cuda")
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = psutil.Process().memory_info().rss

    def read(self) -> float:
        if self.on_cuda:
            return (torch.cuda.max_memory_allocated() - self.before) / 1e6
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return max(0.0, peak * 1024 - self.before) / 1e6


@dataclass
class Measured:
    start_up: float  # s, building and completing one token of one prompt
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    megabytes: float = 0.0
    tokens: int = 0


def measure(options: Options, model: PreTrainedModel, batch: int) -> dict[str, Measured]:
    work = draw_work(options, batch, model.config.get_text_config().vocab_size)
    first = Work(work.prompts[:1], torch.ones(1, dtype=torch.int64), work.ids[:1], work.mask[:1])
    running: dict[str, Generate] = {}
    found: dict[str, Measured] = {}
    for name in options.engines:
        started = time.perf_counter()
        try:
            running[name] = build(name, model, options)
            running[name](first)
            found[name] = Measured(time.perf_counter() - started)
            running[name](work)
        except Exception as error:  # a peer that is not installed or does not work here is named, not measured
            print(f"{name}: not measured ({type(error).__name__}: {str(error)[:100]})")
            running.pop(name, None)
            found.pop(name, None)
    for _ in range(options.repeats):
        for name, generate in running.items():
            memory = PeakMemory(options.device)
            started, started_cpu = time.perf_counter(), time.process_time()
            found[name].tokens = generate(work)
            if options.device != "cpu":
                torch.cuda.synchronize()
            found[name].seconds.append(time.perf_counter() - started)
            found[name].cpu_seconds.append(time.process_time() - started_cpu)
            found[name].megabytes = max(found[name].megabytes, memory.read())
    return found


def report(options: Options, batch: int, found: dict[str, Measured]) -> None:
    print(
        f"\n{options.model}, {options.dtype}, {options.device}, {options.threads} thread(s): {batch} completions in "
        f"groups of {options.group}, {options.lengths} length, at most {options.max_new_tokens} new tokens, prompts of "
        f"{'up to ' if options.ragged else ''}{options.prompt_tokens}\n"
    )
    print(
        "| engine | tokens/s | times generate | CPU s | CPU, times generate | peak memory, MB | first completion, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, m in found.items():
        base = found.get("generate")
        wall = cpu = "-"
        if base is not None:
            wall = f"{statistics.median(b / a for a, b in zip(m.seconds, base.seconds, strict=True)):.2f}"
            cpu = f"{statistics.median(b / a for a, b in zip(m.cpu_seconds, base.cpu_seconds, strict=True)):.2f}"
        seconds, cpu_seconds = statistics.median(m.seconds), statistics.median(m.cpu_seconds)
        rate = m.tokens / seconds
        print(f"| {name} | {rate:,.0f} | {wall} | {cpu_seconds:.2f} | {cpu} | {m.megabytes:.0f} | {m.start_up:.2f} |")


def main(options: Options) -> None:
    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(options.threads)
    model = load(options)
    for batch in options.batches:
        report(options, batch, measure(options, model, batch))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
