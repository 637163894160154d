"""Log-probs, entropy and KL in chunks against whole logits under plain autograd: values, gradients, memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.checks import InputError
from rlhf.kl import exact_kl
from rlhf.lm import head as head_module
from rlhf.lm.head import Head, token_terms
from rlhf.losses import categorical_entropy

N, H, V = 23, 6, 37
ROW = V * 8  # bytes of one token's float64 logits


def inputs(dtype: torch.dtype = torch.float64, *, count: int = N, vocabulary: int = V, bias: bool = True) -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(count, H).requires_grad_(),
        "weight": draw(vocabulary, H).requires_grad_(),
        "bias": draw(vocabulary).requires_grad_() if bias else None,
        "token_ids": torch.randint(vocabulary, (count,), generator=generator),
        "reference": (draw(count, H + 1), draw(vocabulary, H + 1)),
        "directions": draw(3, count),  # of the gradient in log-probs, entropy and KL
    }


def whole_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float
) -> Tensor:
    x = torch.nn.functional.linear(hidden, weight, bias)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature


def plain(given: dict, *, softcap: float | None = None, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs, entropy and KL from whole logits, by the core's own functions."""
    logits = whole_logits(given["hidden"], given["weight"], given["bias"], softcap, temperature)
    ref_logits = whole_logits(*given["reference"], None, softcap, temperature)
    mask = torch.ones(len(logits), dtype=torch.bool)
    log_probs = logits.log_softmax(-1).gather(-1, given["token_ids"][:, None]).squeeze(-1)
    return [log_probs, categorical_entropy(logits, mask), exact_kl(logits, ref_logits, mask)]


def chunked(given: dict, *, softcap: float | None = None, **options: Any) -> list[Tensor]:
    ref_hidden, ref_weight = given["reference"]
    terms = token_terms(
        given["hidden"],
        Head(given["weight"], given["bias"], softcap),
        given["token_ids"],
        with_entropy=True,
        reference=(ref_hidden, Head(ref_weight, None, softcap)),
        **options,
    )
    return list(terms)


def gradients(given: dict, terms: list[Tensor]) -> list[Tensor]:
    leaves = [x for x in (given["hidden"], given["weight"], given["bias"]) if x is not None]
    return list(
        torch.autograd.grad(
            sum((d * x).sum() for d, x in zip(given["directions"], terms, strict=True)), leaves, retain_graph=True
        )
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_bytes", [1, 5 * ROW, N * ROW, None])
def test_values_and_gradients_are_the_plain_ones(
    bias: bool, softcap: float | None, temperature: float, chunk_bytes: int | None
) -> None:
    given = inputs(bias=bias)
    options: dict[str, Any] = {"softcap": softcap, "temperature": temperature}
    expected, found = plain(given, **options), chunked(given, chunk_bytes=chunk_bytes, **options)
    pairs = [*zip(found, expected, strict=True)]
    pairs += zip(gradients(given, found), gradients(given, expected), strict=True)
    for x, y in pairs:
        assert y.detach().abs().max() > 0.1
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", [4 * ROW, None])
@pytest.mark.parametrize("which", [0, 1])
def test_each_term_has_its_own_gradient(which: int, chunk_bytes: int | None) -> None:
    """Without reference and with the other output unused, in several chunks and in one that is kept."""
    given = inputs()
    head = Head(given["weight"], given["bias"])
    terms = token_terms(given["hidden"], head, given["token_ids"], with_entropy=True, chunk_bytes=chunk_bytes)
    leaves = [given["hidden"], given["weight"], given["bias"]]
    direction = given["directions"][which]
    found = torch.autograd.grad((direction * terms[which]).sum(), leaves)
    expected = torch.autograd.grad((direction * plain(given)[which]).sum(), leaves)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_gradients_are_the_slopes_of_the_values() -> None:
    given = inputs(count=4, vocabulary=5)
    leaves = (given["hidden"], given["weight"], given["bias"])

    def terms(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = given | dict(zip(("hidden", "weight", "bias"), tensors, strict=True))
        return tuple(chunked(changed, softcap=2.0, temperature=0.7, chunk_bytes=80))

    assert torch.autograd.gradcheck(terms, leaves)


@pytest.mark.parametrize(("chunk_bytes", "words_at_once"), [(5 * V * 4, 1024), (5 * V * 4, 10), (None, 1024)])
def test_bfloat16_errs_no_more_than_the_plain_computation(
    chunk_bytes: int | None, words_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distance to float64 on the same bfloat16 numbers; the sum over chunks is where it could be larger."""
    monkeypatch.setattr(head_module, "WORDS_AT_ONCE", words_at_once)
    given = inputs(torch.bfloat16, count=400)
    exact = {
        k: v.double().detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }
    exact["reference"] = tuple(x.double() for x in given["reference"])
    truth, as_plain, ours = plain(exact), plain(given), chunked(given, chunk_bytes=chunk_bytes)
    assert all(x.dtype == torch.float32 for x in ours)
    rows = zip(
        [*truth, *gradients(exact, truth)],
        [*as_plain, *gradients(given, as_plain)],
        [*ours, *gradients(given, ours)],
        strict=True,
    )
    for right, theirs, found in rows:
        error, allowed = (found.double() - right).norm(), (theirs.double() - right).norm()
        assert error <= 1.05 * allowed, (error, allowed)


def test_gradients_of_the_head_add_up_in_float32() -> None:
    """1,000 equal contributions of one token a chunk: a bfloat16 sum would stop growing at 256."""
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    terms = token_terms(hidden, Head(weight), torch.zeros(1000, dtype=torch.int64), chunk_bytes=1)
    terms.log_probs.sum().backward()
    assert weight.grad.flatten().tolist() == [500.0, -500.0]


def test_autocast_computes_as_it_does_in_the_plain_path() -> None:
    given, wide = inputs(torch.float32), inputs(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found, untouched = plain(given), chunked(given), chunked(wide)
        found_small = chunked(given, chunk_bytes=6 * V * 4)
    exact = plain(given)
    assert not torch.equal(exact[0], expected[0])
    for terms in (found, found_small):
        for x, y in zip(terms, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        for x, y in zip(gradients(given, terms), gradients(given, expected), strict=True):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x, y, rtol=0, atol=2e-2 * float(y.abs().max()))
    for x, y in zip(untouched, plain(wide), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


class LargestLogits(TorchDispatchMode):
    """Most tokens for which any operation returned a number per word."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and self.vocabulary in x.shape[-2:] and not {H, H + 1} & set(x.shape):
                self.rows = max(self.rows, x.numel() // self.vocabulary)
        return out


def test_no_array_is_larger_than_a_chunk_forward_or_backward() -> None:
    given, saved = inputs(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with LargestLogits(V) as seen, hooks:
        gradients(given, chunked(given, chunk_bytes=4 * ROW, temperature=0.7))
    assert seen.rows == 4
    assert max(x.numel() for x in saved) < 4 * V + V * (H + 1)
    with LargestLogits(V) as seen:
        gradients(given, plain(given))
    assert seen.rows == N, "so the check above can fail"


def test_what_needs_no_gradient_gets_none_and_costs_none() -> None:
    given = inputs()
    head = Head(given["weight"].detach(), None)
    token_terms(given["hidden"], head, given["token_ids"]).log_probs.sum().backward()
    assert given["hidden"].grad is not None
    with torch.no_grad():
        assert not any(x.requires_grad for x in chunked(given))


@pytest.mark.parametrize("chunk_bytes", [3 * ROW, None])
def test_limits(chunk_bytes: int | None) -> None:
    given = inputs()
    token_ids, hidden = given["token_ids"], given["hidden"]
    flat = token_terms(hidden, Head(torch.zeros(V, H).double()), token_ids, with_entropy=True, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(flat.log_probs, torch.full_like(flat.log_probs, -math.log(V)))
    torch.testing.assert_close(flat.entropy, torch.full_like(flat.entropy, math.log(V)))
    own = Head(given["weight"])
    same = token_terms(hidden, own, token_ids, reference=(hidden.detach(), own), chunk_bytes=chunk_bytes)
    assert same.kl.eq(0).all()
    (gradient,) = torch.autograd.grad(same.kl.sum(), [hidden])
    assert gradient.abs().max() < 1e-14
    cold = token_terms(hidden, own, token_ids, temperature=1e-9, with_entropy=True, chunk_bytes=chunk_bytes)
    assert cold.entropy.detach().abs().max() < 1e-9


def test_no_tokens_have_zero_gradients() -> None:
    given = inputs(count=0)
    found = chunked(given)
    assert [x.shape for x in found] == [(0,)] * 3
    assert all(x.eq(0).all() for x in gradients(given, found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(N, H + 1)}, r"hidden \[23, 7\], head.weight \[37, 6\]"),
        ({"token_ids": torch.zeros(N, 1)}, r"token_ids \[23, 1\]"),
        ({"reference": (torch.zeros(N, H), torch.zeros(V + 1, H))}, r"reference head.weight \[38, 6\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chunked(inputs() | changes)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf])
def test_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        chunked(inputs(), temperature=temperature)
