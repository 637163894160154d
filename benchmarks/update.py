"""What an update costs: whole logits and padding as given, against chunks, sorted rows and packed rows, in one run.

    taskset -c 0 python benchmarks/update.py                          # Qwen2 of 4 M parameters, three vocabularies
    taskset -c 0 python benchmarks/update.py --model <folder> --sequences 16 --prompt 64 --completion 32
    python benchmarks/update.py --device cuda --dtype bfloat16 --attention flash_attention_2 --model <folder>

Each variant makes the gradient of one optimizer step (forward and backward of the actor under the clipped surrogate)
from the same sequences, in turn, round after round; ratios are medians over rounds. Every gradient is compared with the
first variant's. Peak memory is that of a fresh process beyond the model and its gradients. The floor is 6 FLOPs per
parameter and real token of the trunk, per entry of the output matrix and action of the head, at the speed of a large
matrix product measured in the same run. On a CPU all but "wall" is process time: a busy neighbour stretches the wall's.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from rlhf.lm.batching import LayoutKind, micro_batches
from rlhf.lm.experience import Sequences
from rlhf.lm.linear import linear, speed_up
from rlhf.lm.logprobs import PolicyOutput, plain_output, policy_output
from rlhf.losses import clipped_surrogate_loss
from rlhf.masking import masked_mean


@dataclass(frozen=True)
class Args:
    """Time and memory of one optimizer step's gradient."""

    model: Path | None = None
    """Folder of a pretrained model; None: random Qwen2, hidden 256, 4 layers, 4 heads, 2 key-value heads."""
    vocabularies: tuple[int, ...] = (264, 50_000, 150_000)
    """Of the random models."""
    sequences: int = 64
    prompt: int = 32
    """Longest prompt, tokens."""
    completion: int = 64
    """Longest completion, tokens."""
    samples: int = 1
    """Completions of each prompt, one after the other; with more than 1, prompts are shared too."""
    micro_batch_tokens: int = 1024
    """The plain variant takes as many whole sequences as fit, in the order given."""
    entropy: bool = False
    """With an entropy bonus."""
    repeats: int = 7
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "sdpa"
    threads: int = 1


class Variant(NamedTuple):
    """Micro-batches and how they pass through the model."""

    parts: list[Tensor]
    output: Callable[..., PolicyOutput]
    layout: LayoutKind | None


def random_sequences(args: Args, *, ragged: bool, vocabulary: int) -> Sequences:
    """Ragged: prompts of a quarter to the whole length, completions of any length, uniformly."""
    generator = torch.Generator().manual_seed(0)
    count, prompt, completion = args.sequences, args.prompt, args.completion
    ids = torch.randint(vocabulary, (count, prompt + completion), generator=generator)
    low = (prompt // 4, 1) if ragged else (prompt, completion)
    before, after = (
        torch.randint(least, most + 1, (count, 1), generator=generator)
        for least, most in zip(low, (prompt, completion), strict=True)
    )
    before[0], after[0] = prompt, completion
    of_prompt = torch.arange(count) // args.samples * args.samples
    before, ids[:, :prompt] = before[of_prompt], ids[of_prompt, :prompt]
    action_mask = torch.arange(completion) < after
    attention_mask = torch.cat([torch.arange(prompt) >= prompt - before, action_mask], -1)
    return Sequences(ids, attention_mask, action_mask).to(torch.device(args.device))


def variants(args: Args, sequences: Sequences) -> dict[str, Variant]:
    per_part = max(1, args.micro_batch_tokens // sequences.attention_mask.shape[1])
    as_given = list(torch.arange(len(sequences), device=sequences.action_mask.device).split(per_part))
    by_length, by_sum = (
        micro_batches(sequences.lengths, tokens=args.micro_batch_tokens, packed=packed) for packed in (False, True)
    )
    found = {
        "plain": Variant(as_given, plain_output, None),
        "chunked": Variant(as_given, policy_output, "given"),
        "chunked, sorted": Variant(by_length, policy_output, "padded"),
        "chunked, packed": Variant(by_sum, policy_output, "packed"),
    }
    if args.samples > 1:
        by_prompt = micro_batches(
            sequences.lengths, tokens=args.micro_batch_tokens, packed=True, prompts=sequences.prompts()
        )
        found["chunked, shared"] = Variant(by_prompt, policy_output, "shared")
    return found


def step_gradient(model: PreTrainedModel, sequences: Sequences, variant: Variant, args: Args) -> None:
    """Gradient of the clipped surrogate with advantages of either sign, at ratio 1."""
    tokens = sequences.action_mask.sum()
    for rows in variant.parts:
        part = sequences[rows]
        options = {} if variant.layout is None else {"layout": variant.layout}
        inputs = (part.sequence_ids, part.attention_mask, part.action_mask)
        found = variant.output(model, *inputs, temperature=1.0, with_entropy=args.entropy, **options)
        advantages = (1.0 - 2.0 * (rows % 2))[:, None].expand_as(found.log_probs)
        loss = clipped_surrogate_loss(found.log_probs, found.log_probs.detach(), advantages, part.action_mask).loss
        if found.entropy is not None:
            loss = loss - 0.01 * found.entropy
        masked_mean(loss, part.action_mask, denominator=tokens).backward()


def load(args: Args, vocabulary: int | None) -> PreTrainedModel:
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    model: PreTrainedModel
    if vocabulary is None:
        model = AutoModelForCausalLM.from_pretrained(str(args.model), dtype=dtype, attn_implementation=args.attention)
    else:
        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attention)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    speed_up(model)
    return model.to(torch.device(args.device)).eval()  # type: ignore[arg-type]


def clock(device: str) -> tuple[float, float]:
    """Wall and process CPU time, seconds."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def peak_bytes(args: Args, vocabulary: int | None, ragged: bool, name: str) -> int:
    """Beyond model and gradients. In a process of its own, since freed memory stays with a process for a while."""
    torch.set_num_threads(args.threads)
    model = load(args, vocabulary)
    sequences = random_sequences(args, ragged=ragged, vocabulary=model.config.vocab_size)
    variant = variants(args, sequences)[name]
    small = replace(args, sequences=1, prompt=4, completion=4)
    warm = random_sequences(small, ragged=False, vocabulary=model.config.vocab_size)
    step_gradient(model, warm, Variant([torch.arange(1, device=args.device)], variant.output, variant.layout), args)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step_gradient(model, sequences, variant, args)
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError):  # Linux: the high-water mark starts again here
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    step_gradient(model, sequences, variant, args)
    return resident_peak() - before


def resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matrix_flops(args: Args) -> float:
    """FLOPs per second of a large matrix product, by the faster library."""
    size = 1024 if args.device == "cpu" else 8192
    a = torch.randn(size, size, device=args.device, dtype=getattr(torch, args.dtype))
    times = []
    for _ in range(10):
        started = clock(args.device)[1 if args.device == "cpu" else 0]
        linear(a, a)
        times.append(clock(args.device)[1 if args.device == "cpu" else 0] - started)
    return 2 * size**3 / statistics.median(times[2:])


def compare(args: Args, vocabulary: int | None, *, ragged: bool) -> None:
    """One table row per variant."""
    model = load(args, vocabulary)
    size = model.config.vocab_size
    sequences = random_sequences(args, ragged=ragged, vocabulary=size)
    parameters = sum(p.numel() for p in model.parameters())
    trunk = parameters - size * model.config.hidden_size * (1 if model.config.tie_word_embeddings else 2)
    tokens, actions = int(sequences.lengths.sum()), int(sequences.action_mask.sum())
    floor = 6 * (trunk * tokens + size * model.config.hidden_size * actions) / matrix_flops(args)
    chosen = variants(args, sequences)
    expected: list[Tensor] = []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(args.repeats + 1):
        for name, variant in chosen.items():
            model.zero_grad()
            started = clock(args.device)
            step_gradient(model, sequences, variant, args)
            seconds[name].append(tuple(b - a for a, b in zip(started, clock(args.device), strict=True)))  # type: ignore[arg-type]
            found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            expected = expected or found
            error = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True))
            assert error < (1e-4 if args.dtype == "float32" else 0.1), (name, error)
    context = multiprocessing.get_context("spawn")
    for name, variant in chosen.items():
        with context.Pool(1) as pool:
            peak = pool.apply(peak_bytes, (args, vocabulary, ragged, name))
        wall, cpu = (statistics.median(x[i] for x in seconds[name][1:]) for i in (0, 1))
        measured = 1 if args.device == "cpu" else 0
        spent = (wall, cpu)[measured]
        pairs = zip(seconds["plain"][1:], seconds[name][1:], strict=True)
        ratio = statistics.median(a[measured] / b[measured] for a, b in pairs)
        cells = [f"{size:,}", "ragged" if ragged else "fixed", name, str(len(variant.parts)), f"{tokens / spent:,.0f}"]
        cells += [f"{wall * 1e3:.0f}", f"{cpu * 1e3:.0f}", f"{ratio:.2f}", f"{peak / 2**20:.0f}"]
        print(f"| {' | '.join(cells)} | {spent / floor:.1f} |", flush=True)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    columns = ["vocabulary", "lengths", "variant", "micro-batches", "tokens/s", "wall, ms", "CPU, ms", "plain / it"]
    print(f"| {' | '.join([*columns, 'peak, MiB', 'times floor'])} |\n|{'---|' * 10}")
    for vocabulary in [None] if args.model else args.vocabularies:
        for ragged in (False, True):
            compare(args, vocabulary, ragged=ragged)


if __name__ == "__main__":
    main(tyro.cli(Args))
