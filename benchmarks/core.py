"""The core's estimators and losses against the forms in which other libraries publish them.

Results are compared, then timed in turn in one process, as ratios; then the peak of memory of each of our functions.
Inputs are [256, 4096] float32, right-padded. The peers' forms (`peer_forms.py`) are written anew from their formulas,
each the way its library computes it: loops stay loops, masks stay floats.

python benchmarks/core.py [--threads 2] [--grow-heap] [--device cuda] [--only gae]
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import tyro
from peer_forms import (
    Results,
    clipped_value,
    dpo,
    entropy,
    gae_batch_first,
    gae_time_first,
    group_loop,
    k3,
    scan_loop,
    surrogate,
    whitened,
)
from torch import Tensor

from rlhf import advantages, group_advantages, kl, losses, masking, policy_losses, preference_losses
from rlhf.reduce import token_mean
from rlhf.scan import reverse_linear_scan

B, T, GROUP = 256, 4096, 8
UNIT = 4 * B * T  # bytes of one input


class Contest(NamedTuple):
    """Two ways to the same results; where `of` is given, the first is a loss to be differentiated by it."""

    name: str
    peer: str
    ours: Callable[[], Results]
    theirs: Callable[[], Results]
    of: Results = ()


class Batch:
    """Random inputs; masked slots hold finite numbers, for the peers' forms multiply by the mask."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device)

        lengths = torch.randint(T // 2, T + 1, (B, 1), generator=generator).to(device)
        self.mask = torch.arange(T, device=device) < lengths
        self.float_mask = self.mask.float()
        self.count = self.mask.sum()
        self.rewards, self.values = normal(B, T) * self.float_mask, normal(B, T) * self.float_mask
        self.advantages, self.returns = normal(B, T), normal(B, T)
        self.old_values = self.values + normal(B, T, scale=0.2)
        self.old = -normal(B, T).abs()
        self.log_probs = (self.old + normal(B, T, scale=0.2)).requires_grad_()
        self.rejected = (self.old + normal(B, T, scale=0.2)).requires_grad_()
        self.predictions = (self.values + normal(B, T, scale=0.2)).requires_grad_()
        self.logits = normal(B, T).requires_grad_()
        self.scores = normal(B)
        self.group_ids = torch.arange(B, device=device) // GROUP
        self.decay = torch.rand(B, T, generator=generator).to(device)


# ---- Ours and theirs -------------------------------------------------------------------------------------------------


def contests(b: Batch) -> Iterator[Contest]:
    """Those with a peer's form."""
    m, fm = b.mask, b.float_mask
    row_major = (b.rewards.T.contiguous(), b.values.T.contiguous())

    def ours_gae() -> Results:
        return advantages.gae(b.rewards, b.values, m, gamma=0.99, gae_lambda=0.95)

    yield Contest(
        "gae", "TRL, OpenRLHF: loop on [B, T]", ours_gae, lambda: gae_batch_first(b.rewards, b.values, 0.99, 0.95)
    )
    yield Contest(
        "gae", "CleanRL, SB3: loop on [T, N]", ours_gae,
        lambda: tuple(x.T for x in gae_time_first(*row_major, 0.99, 0.95)),
    )  # fmt: skip
    yield Contest(
        "reverse_linear_scan", "loop", lambda: (reverse_linear_scan(b.rewards, b.decay),),
        lambda: scan_loop(b.rewards, b.decay),
    )  # fmt: skip
    yield Contest(
        "masked_whiten", "TRL, verl", lambda: (masking.masked_whiten(b.rewards, m),), lambda: whitened(b.rewards, fm)
    )
    yield Contest(
        f"group_normalized_advantages [{B}]", "verl: loop",
        lambda: (group_advantages.group_normalized_advantages(b.scores, b.group_ids),),
        lambda: group_loop(b.scores, b.group_ids),
    )  # fmt: skip

    yield from contests_with_gradient(b)


def contests_with_gradient(b: Batch) -> Iterator[Contest]:
    """Those that are differentiated."""
    m, fm = b.mask, b.float_mask

    def ours_surrogate() -> Results:
        terms = losses.clipped_surrogate_loss(b.log_probs, b.old, b.advantages, m)
        clip_fraction = terms.is_clipped.sum() / b.count
        return token_mean(terms.loss, m, denominator=b.count), clip_fraction

    def ours_dpo() -> Results:
        of = [masking.masked_sum(x, m, dim=-1) for x in (b.log_probs, b.rejected, b.old, b.old)]
        return (preference_losses.dpo_loss(*of, beta=0.1).loss.mean(),)

    def ours_value() -> Results:
        terms = losses.value_loss(b.predictions, b.returns, m, old_values=b.old_values, value_clip=0.2)
        return (token_mean(terms.loss, m, denominator=b.count),)

    def ours_k3() -> Results:
        return (token_mean(kl.kl_estimate(b.log_probs, b.old, m, estimator="k3"), m, denominator=b.count),)

    rows = m[:, 0]
    yield Contest(
        "clipped_surrogate_loss", "TRL, verl", ours_surrogate,
        lambda: surrogate(b.log_probs, b.old, b.advantages, fm), (b.log_probs,),
    )  # fmt: skip
    yield Contest(
        "value_loss, clipped", "TRL, verl", ours_value,
        lambda: clipped_value(b.predictions, b.old_values, b.returns, fm), (b.predictions,),
    )  # fmt: skip
    yield Contest("kl_estimate, k3", "TRL, verl", ours_k3, lambda: k3(b.log_probs, b.old, fm), (b.log_probs,))
    yield Contest(
        "categorical_entropy", "TRL, verl", lambda: (losses.categorical_entropy(b.logits, rows).mean(),),
        lambda: entropy(b.logits), (b.logits,),
    )  # fmt: skip
    yield Contest(
        "dpo_loss of masked_sum", "TRL", ours_dpo, lambda: dpo(b.log_probs, b.rejected, b.old, fm),
        (b.log_probs, b.rejected),
    )  # fmt: skip


Call = Callable[[], Tensor | Results]


def without_gradient(b: Batch) -> dict[str, Call]:
    m = b.mask
    return {
        "reverse_linear_scan": lambda: reverse_linear_scan(b.rewards, b.decay),
        "monte_carlo_returns": lambda: advantages.monte_carlo_returns(b.rewards, m),
        "episode_returns": lambda: advantages.episode_returns(b.rewards, m),
        "td0_returns": lambda: advantages.td0_returns(b.rewards, b.values, m),
        "n_step_returns, n = 5": lambda: advantages.n_step_returns(b.rewards, b.values, m, n=5),
        "td_lambda_returns": lambda: advantages.td_lambda_returns(b.rewards, b.values, m, td_lambda=0.95),
        "gae": lambda: advantages.gae(b.rewards, b.values, m),
        "vtrace": lambda: advantages.vtrace(b.rewards, b.values, b.log_probs, b.old, m),
        "reinforce_plus_plus_advantages": lambda: advantages.reinforce_plus_plus_advantages(b.rewards, m),
        "masked_whiten": lambda: masking.masked_whiten(b.rewards, m),
        "sampler_importance_weights": lambda: policy_losses.sampler_importance_weights(
            b.log_probs, b.old, m, level="token", mode="mask", high=2.0
        ),
        "token_covariance": lambda: policy_losses.token_covariance(b.log_probs, b.advantages, m),
    }


def with_gradient(b: Batch) -> dict[str, tuple[Call, Tensor]]:
    """Each with what it is differentiated by."""
    m, rows = b.mask, b.mask[:, 0]
    policy = (b.log_probs, b.old, b.advantages, m)
    calls: dict[str, Call] = {
        "reinforce_loss": lambda: losses.reinforce_loss(b.log_probs, b.advantages, m),
        "importance_weighted_loss": lambda: losses.importance_weighted_loss(*policy),
        "clipped_surrogate_loss": lambda: losses.clipped_surrogate_loss(*policy),
        "clipped_surrogate_loss, dual clip": lambda: losses.clipped_surrogate_loss(*policy, dual_clip=3.0),
        "kl_penalized_surrogate_loss": lambda: losses.kl_penalized_surrogate_loss(*policy, kl_coef=0.1),
        "gspo_loss": lambda: policy_losses.gspo_loss(*policy),
        "cispo_loss": lambda: policy_losses.cispo_loss(*policy, clip_high=4.0),
        "sapo_loss": lambda: policy_losses.sapo_loss(*policy),
        "kl_estimate, k3": lambda: kl.kl_estimate(b.log_probs, b.old, m, estimator="k3"),
    }
    values: dict[str, Call] = {
        "value_loss": lambda: losses.value_loss(b.predictions, b.returns, m),
        "value_loss, clipped": lambda: losses.value_loss(
            b.predictions, b.returns, m, old_values=b.old_values, value_clip=0.2
        ),
    }
    logits: dict[str, Call] = {
        "categorical_entropy": lambda: losses.categorical_entropy(b.logits, rows),
        "exact_kl": lambda: kl.exact_kl(b.logits, b.advantages, rows),
    }
    groups = ((calls, b.log_probs), (values, b.predictions), (logits, b.logits))
    return {name: (call, of) for group, of in groups for name, call in group.items()}


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Seconds(NamedTuple):
    wall: float
    cpu: float


def forward(function: Call) -> Callable[[], Results]:
    def run() -> Results:
        with torch.no_grad():
            results = function()
        return (results,) if isinstance(results, Tensor) else results

    return run


def forward_and_backward(function: Call, of: Results) -> Callable[[], Results]:
    """What a training step does; the gradients and, detached, the results."""

    def run() -> Results:
        results = function()
        results = (results,) if isinstance(results, Tensor) else results
        return (*torch.autograd.grad(results[0].sum(), of), *(x.detach() for x in results))

    return run


def timed(function: Callable[[], Results], device: str) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    results = function()
    if device != "cpu":
        torch.cuda.synchronize()
    found = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
    del results
    return found


def temporaries(function: Callable[[], Results], device: str) -> tuple[float, float]:
    """Peak of what was allocated at a time less the results, and the results; in units of one input."""
    function()
    gc.collect()
    if device == "cpu":
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            results = function()
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = function()
        peak = torch.cuda.max_memory_allocated() - before
    kept = sum(x.untyped_storage().nbytes() for x in results)
    return (peak - kept) / UNIT, kept / UNIT


def race(contest: Contest, backward: bool, mask: Tensor, device: str, repeats: int) -> str:
    """One row: results checked, then times of alternating runs."""
    functions = [
        forward_and_backward(each, contest.of) if backward else forward(each) for each in (contest.ours, contest.theirs)
    ]
    for ours, theirs in zip(*(function() for function in functions), strict=True):
        # What the peers leave in masked slots is nobody's business; a logit has none.
        where = mask if ours.shape == mask.shape and not backward else torch.ones_like(ours, dtype=torch.bool)
        torch.testing.assert_close(ours[where], theirs[where], rtol=2e-4, atol=2e-5)
    rounds = [[timed(function, device) for function in functions] for _ in range(repeats)]
    pairs = [
        tuple(of([each[side][part] for each in rounds]) for side in (0, 1))
        for of, part in ((min, 0), (statistics.median, 0), (statistics.median, 1))
    ]
    times = [f"{1e3 * ours:.2f} / {1e3 * theirs:.2f}" for ours, theirs in pairs]
    ratios = [f"{theirs / ours:.1f}" for ours, theirs in pairs]
    return " | ".join([contest.name + (", backward too" if backward else ""), contest.peer, *times, *ratios])


def floor(b: Batch, device: str, repeats: int) -> str:
    """Milliseconds to copy one input into memory that is there already: what any pass over it takes."""
    target = torch.empty_like(b.rewards)
    best = min(timed(lambda: (target.copy_(b.rewards),), device).wall for _ in range(10 * repeats))
    return f"Copying one input: {1e3 * best:.3f} ms, {2 * UNIT / best / 1e9:.0f} GB/s read and written."


def main(
    device: str = "cpu", threads: int = 1, repeats: int = 11, grow_heap: bool = False, only: str | None = None
) -> None:
    """Args:
    device: cpu or cuda.
    threads: of torch on the CPU.
    repeats: alternating runs of each pair.
    grow_heap: allocate and free 24 MiB first. glibc then keeps freed buffers of 4 MiB, as in any process that has held
        larger tensors; else it returns them to the system, and each new one is paged in afresh.
    only: part of a name.
    """
    torch.set_num_threads(threads)
    if grow_heap:
        torch.empty(24 * 2**20, dtype=torch.uint8).fill_(0)
    b = Batch(device)
    print(floor(b, device, repeats))
    print("Times in ms, ours / theirs; ratios theirs / ours.\n")
    heads = [
        "function",
        "peer's form",
        "best wall",
        "median wall",
        "median CPU",
        "ratio of best",
        "of median",
        "of CPU",
    ]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for contest in contests(b):
        for backward in (False, True)[: 2 if contest.of else 1]:
            if only is None or only in contest.name:
                print(f"| {race(contest, backward, b.mask, device, repeats)} |", flush=True)
    print("\nMemory in units of one input (4 MiB): temporaries at the peak + results.\n")
    print("| function | forward | forward and backward |\n|---|---|---|")
    rows = [(name, call, ()) for name, call in without_gradient(b).items()]
    for name, call, of in [*rows, *((name, call, (of,)) for name, (call, of) in with_gradient(b).items())]:
        runs = [forward(call), *([forward_and_backward(call, of)] if of else [])]
        if only is None or only in name:
            cells = ["{:.1f} + {:.1f}".format(*temporaries(run, device)) for run in runs]
            print(f"| {name} | {' | '.join([*cells, '-'][:2])} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
