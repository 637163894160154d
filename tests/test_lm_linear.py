"""Linear layers through oneDNN: the same numbers and gradients, only where asked, and no trace afterwards.

Whatever the processor, the tests take oneDNN for the faster one, and the smallest product for worth it.
"""

import copy
import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from test_lm_sft import trainer as sft_run
from test_lm_trainer import make_config, make_trainer
from tiny import padded_prompts, sequences_of, tiny_model, tokenizer
from torch import Tensor, nn

from rlhf.lm import linear as module
from rlhf.lm.generation import SlotEngine, slots
from rlhf.lm.head import Head, token_terms
from rlhf.lm.linear import FastLinear, linear, packed, packed_bytes, sped_up, speed_up
from rlhf.lm.logprobs import policy_output

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what oneDNN is asked for."""
    asked: list[tuple[int, ...]] = []
    multiplied = module._multiplied

    def counted(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        asked.append((*rows.flatten(0, -2).shape, len(weight)) if rows.dim() > 1 else (1, *rows.shape, len(weight)))
        return multiplied(rows, weight, bias)

    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "WORTH", 1)
    monkeypatch.setattr(module, "STEADY_FROM", 1)
    monkeypatch.setattr(module, "_multiplied", counted)
    return asked


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class OtherKind(Tensor):
    """As quantised and distributed weights are."""


def gradients(function: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the inputs' gradients of a weighted sum of it."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad((out * drawn(*out.shape, seed=9).to(dtype)).sum(), leaves)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (7,), (64,), (3, 5), (2, 3, 40), ()])
@pytest.mark.parametrize(("width", "out"), [(33, 17), (256, 128), (64, 1)])
def test_values_and_gradients_are_those_of_torch(
    rows: tuple[int, ...], width: int, out: int, bias: bool, calls: list[Any]
) -> None:
    inputs = [drawn(*rows, width, seed=1), drawn(out, width, seed=2), *([drawn(out, seed=3)] if bias else [])]
    exact = gradients(F.linear, inputs, torch.float64)
    theirs = gradients(F.linear, inputs, torch.float32)
    ours = gradients(linear, inputs, torch.float32)
    assert len(calls) == 3
    for name, a, b, c in zip(("out", "x", "weight", "bias"), ours, theirs, exact, strict=False):
        assert a.shape == c.shape
        error, torchs = (float((x.double() - c).detach().abs().max()) for x in (a, b))
        assert error <= 4 * torchs + 1e-6 * float(c.detach().abs().max()), name


def test_strides_do_not_matter() -> None:
    x, weight = drawn(6, 40, 5)[:, ::2].transpose(1, 2), drawn(20, 12, seed=1).T  # [6, 5, 20], [12, 20]
    exact = gradients(F.linear, [x, weight], torch.float64)
    for a, c in zip(gradients(linear, [x, weight], torch.float32), exact, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)
    spread = torch.ones(1, 1).expand(4, 20)  # a gradient of one repeated number, as `sum` makes
    torch.testing.assert_close(linear(spread, weight.float()), F.linear(spread, weight.float()))
    a, b = (weight.float().clone().requires_grad_() for _ in range(2))
    linear(x.float(), a).sum().backward()
    F.linear(x.float(), b).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, b.grad)


def test_few_different_numbers_of_rows_are_asked_for(calls: list[Any]) -> None:
    """Each would stay in memory as a program of its own."""
    weight = drawn(3, 4).float().requires_grad_()
    for rows in range(1, 300):
        x = drawn(rows, 4).float().requires_grad_()
        linear(x, weight).sum().backward()
        torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(rows, -1))
    assert {count for count, *_ in calls[::3]} == {*range(1, 9), 16, 24, 32, 48, *range(64, 321, 32)}
    assert len(set(calls)) <= 3 * (8 + 4 + 9)


def test_only_wanted_gradients_are_computed(calls: list[Any]) -> None:
    x, weight, bias = drawn(8, 4).float(), drawn(3, 4).float(), drawn(3).float()
    linear(x.requires_grad_(), weight, bias).sum().backward()
    assert x.grad is not None
    assert calls == [(8, 4, 3), (8, 3, 4)]  # the product, and the gradient of x
    calls.clear()
    linear(x.detach(), weight, bias.requires_grad_()).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [8, 8, 8]
    assert calls == [(8, 4, 3)]
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad


def test_what_is_not_worth_it_or_not_float32_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    x, weight = drawn(8, 4), drawn(3, 4)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), weight.float()).dtype == torch.bfloat16
    assert linear(x.float().to("meta"), weight.float().to("meta")).shape == (8, 3)
    assert torch.equal(linear(x.float(), weight.float().as_subclass(OtherKind)), F.linear(x.float(), weight.float()))
    assert linear(x[:0].float(), weight.float()).shape == (0, 3)
    monkeypatch.setattr(module, "WORTH", 8 * 4 * 3 + 1)
    linear(x.float(), weight.float())
    assert not calls
    monkeypatch.setattr(module, "WORTH", 8 * 4 * 3)
    linear(x.float(), weight.float())
    assert len(calls) == 1
    with torch.inference_mode():  # whatever the number of rows
        monkeypatch.setattr(module, "STEADY_FROM", 13)
        linear(x.float(), weight.float())
        assert len(calls) == 1
        monkeypatch.setattr(module, "STEADY_FROM", 12)
        linear(x[:1].float(), weight.float())
        assert len(calls) == 2
        assert linear(x[:0].float(), weight.float()).shape == (0, 3)


def test_what_onednn_would_read_wrongly_is_left_to_torch(calls: list[Any]) -> None:
    x, weight = drawn(8, 4).float(), drawn(3, 4).float()
    for bias in (drawn(6).float()[::2], torch.ones(1).expand(3), torch.ones(1), drawn(8, 3).float()):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight[0]), F.linear(x, weight[0]))
    wrong: list[tuple[Tensor, ...]] = [(x[:, :3], weight), (x.bfloat16(), weight), (x, weight, torch.ones(3).double())]
    for inputs in wrong:
        with pytest.raises(RuntimeError, match=r"shape|dtype|type"):
            linear(*inputs)
    assert not calls
    overlapping = drawn(20).float().unfold(0, 4, 2)
    a, b = (weight.clone().requires_grad_() for _ in range(2))
    linear(overlapping, a).sum().backward()
    F.linear(overlapping, b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert calls


def test_only_what_the_gradients_need_is_kept() -> None:
    x, weight, bias = drawn(8, 4).float(), drawn(3, 4).float(), drawn(3).float()

    def kept(*wanted: int) -> list[tuple[int, ...]]:
        inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
        saved = linear(*inputs).grad_fn.saved_tensors
        return [tuple(t.shape) for t in saved if t is not None]

    assert kept(0) == [(3, 4)]
    assert kept(1) == [(8, 4)]
    assert kept(2) == []
    assert kept(0, 1, 2) == [(8, 4), (3, 4)]


def test_compiled_layers_share_one_graph_and_choose_for_themselves(calls: list[Any]) -> None:
    graphs = []

    def backend(graph: Any, _inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    speed_up(model)
    torch._dynamo.reset()

    @torch.compile(backend=backend, fullgraph=True)
    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    with torch.no_grad():
        x = drawn(5, 4).float()
        for layer in model:
            x = run(layer, x)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert not calls


def test_a_dropped_copy_is_freed_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    speed_up(model)
    gc.disable()
    try:
        twin = copy.deepcopy(model)
        weight = weakref.ref(twin[0].weight)
        del twin
        assert weight() is None
    finally:
        gc.enable()


def test_layers_of_a_copy_use_the_copy_s_weights(calls: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    names = list(model.state_dict())
    assert len(speed_up(model)) == 2
    assert speed_up(model) == []
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = drawn(5, 4).float()
    assert twin(x).abs().max() == 0
    assert model(x).abs().max() > 0
    assert len(calls) == 4


def test_within_a_block_the_layers_are_fast_and_afterwards_as_before(calls: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    speed_up(model[0])

    def fail() -> None:
        with sped_up(model):
            model(drawn(5, 4).float())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(calls) == 2
    assert [type(layer) is FastLinear for layer in model] == [True, False]


def test_nothing_changes_on_other_processors(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: False)
    model = nn.Linear(4, 3)
    assert speed_up(model) == []
    assert type(model) is nn.Linear
    linear(drawn(5, 4).float(), model.weight)
    assert not calls


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [
        ("AVX512", "vendor_id\t: AuthenticAMD\n", True),
        ("AVX2", "vendor_id\t: AuthenticAMD\n", False),
        ("AVX512", "vendor_id\t: GenuineIntel\n", False),
        ("AVX512", "", False),
    ],
)
def test_the_processor_is_known_by_name(
    monkeypatch: pytest.MonkeyPatch, capability: str, vendor: str, expected: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(module, "_vendor", lambda: vendor)
    assert module.onednn_is_faster.__wrapped__() is expected


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_a_model_s_log_probs_and_gradients_stay(architecture: str, calls: list[Any]) -> None:
    plain = tiny_model(architecture=architecture)
    fast = copy.deepcopy(plain)
    speed_up(fast)
    batch = sequences_of(["1+2=", "12+34=1"], ["3", "46"])
    found = []
    for model in (plain, fast):
        out = policy_output(model, batch.sequence_ids, batch.attention_mask, batch.action_mask, temperature=1.0)
        out.log_probs.sum().backward()
        found.append([out.log_probs, *(p.grad for p in model.parameters())])
    assert calls
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.detach().abs().max()) + 1e-7)


def test_adapters_and_the_layers_under_them(calls: list[Any]) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    ids, mask = padded_prompts(["1+2=", "12+34="])
    before = model(input_ids=ids, attention_mask=mask).logits
    assert len(speed_up(model)) == len(linears)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before, rtol=1e-4, atol=1e-4)
    assert len(calls) == len(linears)


def test_the_engine_generates_through_it_and_leaves_the_model_as_it_was(calls: list[Any]) -> None:
    model = tiny_model(architecture="qwen2")
    ids, mask = padded_prompts(["1+2=", "12+34=", "9"])
    engine = SlotEngine(model, eos_token_ids={tokenizer.eos_token_id}, pad_token_id=tokenizer.pad_token_id)
    calls.clear()
    made = engine.generate(ids, mask, max_new_tokens=6, temperature=1.0, seeds=None)
    assert calls
    assert not any(type(m) is FastLinear for m in model.modules())
    theirs = model.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=6, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )[:, ids.shape[1] :]  # fmt: skip
    assert made.token_ids.tolist() == theirs[:, : made.token_ids.shape[1]].tolist()


def test_the_head_s_products_go_through_it(calls: list[Any]) -> None:
    hidden, weight, ids = drawn(9, 6), drawn(11, 6, seed=1), torch.arange(9)

    def log_probs(h: Tensor, w: Tensor) -> Tensor:
        return token_terms(h, Head(w), ids).log_probs

    exact = gradients(log_probs, [hidden, weight], torch.float64)
    assert not calls
    found = gradients(log_probs, [hidden, weight], torch.float32)
    assert len(calls) == 3
    for a, c in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)


# -- laid out once --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed as large ones are."""
    monkeypatch.setitem(module.PACKED_FROM, torch.float32, 1)


def is_packed(layer: nn.Module) -> bool:
    return getattr(layer.__dict__.get("forward"), "func", None) is module._forward_packed


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_make_the_same_numbers(rows: int, bias: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not module.has_bfloat16():
        pytest.skip("a processor without bfloat16")
    layer = nn.Linear(96, 40, bias=bias).to(dtype)
    x = drawn(rows, 96).to(dtype)
    with torch.inference_mode():
        expected = layer(x)
        with packed(layer):
            assert is_packed(layer)
            found = layer(x)
            with pytest.raises(RuntimeError, match="dtype"):
                layer(x.double())
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_layers")
def test_packed_copies_go_and_what_was_there_comes_back() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    speed_up(model[0])
    model[2].forward = hooked = partial(nn.Linear.forward, model[2])  # somebody else's, which is left alone

    def fail() -> None:
        with packed(model):
            assert [is_packed(layer) for layer in model] == [True, True, False]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(map(is_packed, model))
    assert ["forward" in layer.__dict__ for layer in model] == [False, False, True]
    assert type(model[0]) is FastLinear
    assert model[2].forward is hooked
    assert packed_bytes(model, torch.float32) == 4 * (48 + 24 + 8)
    with torch.no_grad():
        x = drawn(3, 8).float()
        with packed(model):
            model(x)
        model[0].weight.zero_()
        model[0].bias.zero_()
        with packed(model[0]):
            assert model[0](x).abs().max() == 0  # the weights of now


@pytest.mark.usefixtures("small_layers")
def test_where_memory_runs_out_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    made: list[partial[Tensor]] = []

    def second_fails(*args: Any) -> partial[Tensor]:
        if made:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        made.append(partial(*args))
        return made[0]

    monkeypatch.setattr(module, "partial", second_fails)
    with torch.inference_mode(), packed(model):
        assert not any(map(is_packed, model))
        assert model(drawn(3, 8).float()).shape == (3, 4)


@pytest.mark.usefixtures("small_layers")
def test_a_weight_that_a_hook_makes_is_not_packed() -> None:
    layer = nn.Linear(8, 6)
    layer.register_forward_pre_hook(lambda *args: None)
    with packed(layer):
        assert not is_packed(layer)


@pytest.mark.usefixtures("small_layers")
def test_what_does_not_gain_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 6)

    def gains() -> bool:
        return module._is_packable(layer) and packed_bytes(layer, layer.weight.dtype) > 0

    assert gains()
    with torch.autocast("cpu", torch.bfloat16):  # which casts the matrix in every product
        assert not gains()
    with monkeypatch.context() as patch:
        patch.setitem(module.PACKED_FROM, torch.float32, 49)
        assert not gains()
        patch.setitem(module.PACKED_FROM, torch.float32, 48)
        assert gains()
        patch.setattr(module, "onednn_is_faster", lambda: False)
        assert not gains()
    layer = layer.bfloat16()
    monkeypatch.setattr(module, "has_bfloat16", lambda: True)
    assert gains()
    monkeypatch.setattr(module, "has_bfloat16", lambda: False)
    assert not gains()
    for dtype in (torch.float16, torch.float64):
        layer = layer.to(dtype)
        assert not gains()
        assert packed_bytes(layer, dtype) == 0


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_the_engine_packs_where_completions_are_long_and_there_is_room(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture=architecture)
    ids, mask = padded_prompts(["1+2=", "12+34=", "9"])
    engine = SlotEngine(model, eos_token_ids={tokenizer.eos_token_id}, pad_token_id=tokenizer.pad_token_id)
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    seen: list[bool] = []
    forward = module._forward_packed

    def counted(layer: nn.Linear, layout: Tensor, x: Tensor) -> Tensor:
        seen.append(True)
        return forward(layer, layout, x)

    monkeypatch.setattr(module, "_forward_packed", counted)

    def made(tokens: int) -> tuple[list[list[int]], bool]:
        seen.clear()
        found = engine.generate(ids, mask, max_new_tokens=tokens, temperature=1.0, seeds=None)
        assert not any("forward" in layer.__dict__ for layer in layers)
        return found.token_ids.tolist(), bool(seen)

    def expected(tokens: int) -> list[list[int]]:
        whole = model.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=tokens, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return whole[:, ids.shape[1] :].tolist()

    assert made(slots.PACKED_STEPS) == (expected(slots.PACKED_STEPS), True)
    assert made(slots.PACKED_STEPS - 1) == (expected(slots.PACKED_STEPS - 1), False)
    with torch.no_grad():
        for parameter in model.parameters():  # as an optimizer does
            parameter.mul_(0.7)
    assert made(slots.PACKED_STEPS) == (expected(slots.PACKED_STEPS), True)
    monkeypatch.setattr(slots, "PACKED_SHARE", 0.0)
    assert made(slots.PACKED_STEPS) == (expected(slots.PACKED_STEPS), False)


@pytest.mark.usefixtures("small_layers")
@pytest.mark.skipif(not module.has_bfloat16(), reason="a processor without bfloat16")
def test_under_autocast_the_cast_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    ids, mask = padded_prompts(["1+2=", "12+34=", "9"])
    made = []
    for steps in (16, 1000):  # packed; not
        monkeypatch.setattr(slots, "PACKED_STEPS", steps)
        engine = SlotEngine(
            model,
            eos_token_ids={tokenizer.eos_token_id},
            pad_token_id=tokenizer.pad_token_id,
            autocast=lambda: torch.autocast("cpu", torch.bfloat16),
        )
        seeds = torch.arange(len(ids))
        made.append(engine.generate(ids, mask, max_new_tokens=16, temperature=1.0, seeds=seeds))
    assert torch.equal(made[0].token_ids, made[1].token_ids)
    assert torch.equal(made[0].sampler_log_probs, made[1].sampler_log_probs)


# -- who uses it ----------------------------------------------------------------------------------------------------


def linears_of(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, nn.Linear)}


def test_the_trainer_s_roles_and_reward_models_are_fast(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path / "run"))
    for trunk in trainer.roles.trunks():
        assert linears_of(trunk.get_submodule("layers")) == {FastLinear}


def test_a_fine_tuned_model_is_fast(tmp_path: Path) -> None:
    assert linears_of(sft_run(tmp_path / "run").model) == {FastLinear}
