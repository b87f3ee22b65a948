"""What the kernels promise beyond equalling their definition: accuracy, bitwise invariance, memory, composability."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_megatron.errors import UserError
from gspo_megatron.ops import linear_logprobs, sequence_mean, sequence_policy_loss, token_logprobs
from gspo_megatron.ops.native import extension, logprobs

CLIP = {"clip_low": 3e-4, "clip_high": 4e-4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    log_p = (logits.double() / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def row_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error of a gradient, relative to the norm of its row."""
    return float(((actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


# -- Accuracy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("std", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("columns", [1000, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_against_float64(columns: int, std: float, temperature: float, dtype: torch.dtype) -> None:
    """Half-precision logits are numbers like any other: what was lost by rounding them was lost before."""
    logits = (torch.randn(5, columns, generator=generator()) * std).to(dtype)
    targets = torch.randint(columns, (5,), generator=generator())
    targets[0] = logits[0].argmax()
    upstream = tuple(torch.randn(2, 5, generator=generator(1), dtype=torch.float64))
    a, b = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected, actual = exact(a, targets, temperature), token_logprobs(b, targets, temperature=temperature)
    error = (actual[0].double() - expected[0]).abs()
    assert (error <= 1e-6 + 2.5e-7 * expected[0].abs()).all()
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-6, atol=1e-6)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]  # of the gradient's dtype
    for i in range(2):  # each output alone, so that neither hides behind the other
        (expected_gradient,) = torch.autograd.grad(expected[i], a, upstream[i], retain_graph=True)
        (gradient,) = torch.autograd.grad(actual[i], b, upstream[i].float(), retain_graph=True)
        floor = 0.0 if dtype != torch.float16 else 6e-8 * math.sqrt(columns)  # its smallest number
        allowed = rounding + floor / float(expected_gradient.norm(dim=-1).min())
        assert row_error(gradient, expected_gradient) <= allowed


def test_an_almost_certain_token_keeps_the_digits_of_its_gradient() -> None:
    """1 - p is 4e-9 here: in float32 it would be 0."""
    logits = torch.zeros(1, 4096)
    logits[0, 7] = 27.6
    others = 4095 * torch.tensor(-logits[0, 7].double()).exp()
    leaf = logits.requires_grad_()
    logprob, _ = token_logprobs(leaf, torch.tensor([7]))
    (gradient,) = torch.autograd.grad(logprob.sum(), leaf)
    assert logprob.item() == pytest.approx(-torch.log1p(others).item(), rel=1e-6)
    expected = torch.full((4096,), -others.item() / 4095 / (1 + others.item()), dtype=torch.float64)
    expected[7] = others / (1 + others)
    assert row_error(gradient, expected[None]) <= 1e-6


@pytest.mark.parametrize("tokens", [1024, 32_768])
def test_log_s_from_logits_to_the_sequence(tokens: int) -> None:
    logits = torch.randn(tokens, 256, generator=generator()) * 3
    moved = logits + torch.randn(tokens, 256, generator=generator(1)) * 0.01
    targets = torch.randint(256, (tokens,), generator=generator(2))
    mask, cu = torch.ones(tokens, dtype=torch.bool), torch.tensor([0, tokens])
    new, old = token_logprobs(moved, targets)[0], token_logprobs(logits, targets)[0]
    _, stats = sequence_policy_loss(new, old, mask, cu, torch.ones(1), **CLIP)
    expected = (exact(moved, targets)[0] - exact(logits, targets)[0]).mean()
    assert abs(stats.log_ratio.item() - expected.item()) <= 1e-7


def test_linear_errors_against_float64() -> None:
    hidden = torch.randn(64, 96, generator=generator())
    weight = torch.randn(20_000, 96, generator=generator(1)) / 5
    targets = torch.randint(20_000, (64,), generator=generator(2))
    upstream = tuple(torch.randn(2, 64, generator=generator(3)))
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = exact(wide[0] @ wide[1].t(), targets)
    expected_gradients = torch.autograd.grad(expected, wide, tuple(x.double() for x in upstream))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    actual = linear_logprobs(leaves[0], leaves[1], targets)
    gradients = torch.autograd.grad(actual, leaves, upstream)
    # The logits of a float32 product are off by about 1e-6; the kernels add nothing to it.
    product = exact((hidden @ weight.t()).detach(), targets)[0]
    assert ((actual[0].double() - product).abs() <= 1e-6 + 2.5e-7 * product.abs()).all()
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=2.5e-7, atol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert float((gradient.double() - wanted).norm() / wanted.norm()) <= 1e-6


def test_linear_gradients_of_a_bfloat16_model_are_rounded_once() -> None:
    hidden = torch.randn(64, 96, generator=generator()).bfloat16()
    weight = (torch.randn(3000, 96, generator=generator(1)) / 5).bfloat16()
    targets = torch.randint(3000, (64,), generator=generator(2))
    upstream = torch.randn(64, generator=generator(3))
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.autograd.grad(exact(wide[0] @ wide[1].t(), targets)[0], wide, upstream.double())
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    gradients = torch.autograd.grad(linear_logprobs(leaves[0], leaves[1], targets)[0], leaves, upstream)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16 and row_error(gradient, wanted) <= 2**-8


# -- Bitwise invariance -------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def token_results(logits: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
    leaf = logits.clone().requires_grad_()
    outputs = token_logprobs(leaf, targets, temperature=0.9)
    return [*outputs, *torch.autograd.grad(outputs, leaf, tuple(upstream))]


@pytest.mark.parametrize("columns", [1000, 1003])  # the second starts most rows off the vector's alignment
def test_token_results_do_not_depend_on_place_threads_or_run(columns: int, threads: Callable[[int], None]) -> None:
    logits = torch.randn(33, columns, generator=generator()) * 3
    targets = torch.randint(columns, (33,), generator=generator())
    upstream = torch.randn(2, 33, generator=generator(1))
    threads(1)
    expected = token_results(logits, targets, upstream)
    order = torch.randperm(33, generator=generator(2))
    moved = token_results(logits[order], targets[order], upstream[:, order])
    alone = token_results(logits[5:6], targets[5:6], upstream[:, 5:6])
    threads(2)
    again = token_results(logits, targets, upstream)
    for a, b, c, d in zip(expected, moved, alone, again, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[5:6], c) and torch.equal(a, d)


def pack(order: list[int]) -> tuple[Tensor, ...]:
    """Log-probs, old log-probs, mask, cu_seqlens, advantages and weights of six sequences in some order."""
    lengths = [70, 1, 513, 32, 0, 257]
    parts = []
    for i in order:
        g = generator(i)
        old = -torch.rand(lengths[i], generator=g)
        new = old + torch.randn(lengths[i], generator=g) * 1e-2
        parts.append((new, old, torch.rand(lengths[i], generator=g) < 0.8, torch.rand(lengths[i], generator=g)))
    advantages = torch.tensor([0.4, -0.7, 1.3, -1.1, 0.2, 0.9])[order]
    cu = torch.tensor([0, *(lengths[i] for i in order)]).cumsum(0)
    new, old, mask, weights = (torch.cat(x) for x in zip(*parts, strict=True))
    return new, old, mask, cu, advantages, weights


def loss_results(order: list[int], level: Any) -> tuple[Tensor, dict[int, tuple[Tensor, ...]]]:
    new, old, mask, cu, advantages, weights = pack(order)
    new.requires_grad_()
    clip = CLIP if level == "sequence" else {"clip_low": 0.01, "clip_high": 0.01}
    loss, stats = sequence_policy_loss(new, old, mask, cu, advantages, level=level, weights=weights, **clip)
    (gradient,) = torch.autograd.grad(loss, new)
    spans = zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
    return loss.detach(), {
        i: (gradient[a:b], stats.clipped_tokens[a:b], stats.log_ratio[n], stats.clipped[n])
        for n, (i, (a, b)) in enumerate(zip(order, spans, strict=True))
    }


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_loss_does_not_depend_on_order_threads_or_run(level: str, threads: Callable[[int], None]) -> None:
    threads(1)
    loss, by_sequence = loss_results([0, 1, 2, 3, 4, 5], level)
    for count, order in ((1, [3, 5, 0, 2, 4, 1]), (2, [0, 1, 2, 3, 4, 5]), (2, [5, 4, 3, 2, 1, 0])):
        threads(count)
        other, others = loss_results(order, level)
        assert torch.equal(loss, other)
        for i, values in by_sequence.items():
            assert all(torch.equal(a, b) for a, b in zip(values, others[i], strict=True))


# -- Every instruction set ----------------------------------------------------------------------------------------

EACH_DTYPE = """
import math, sys, torch
from gspo_megatron import ops
from gspo_megatron.ops.native.extension import load
assert load().instruction_set() == sys.argv[1]
g = torch.Generator().manual_seed(0)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for columns in (1, 3, 16, 37, 2053):
        z = (torch.randn(4, columns, generator=g) * 8).to(dtype)
        z[1, columns // 2] = -math.inf
        t, up = torch.randint(columns, (4,), generator=g), torch.randn(2, 4, generator=g)
        results = []
        for wide, how in ((z.clone(), "native"), (z.double(), "reference")):
            leaf = wide.requires_grad_()
            out = ops.token_logprobs(leaf, t, temperature=1.3, implementation=how)
            results.append([*out, *torch.autograd.grad(out, leaf, tuple(up.to(out[0].dtype)))])
        rtol = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        for i, (a, b) in enumerate(zip(*results)):
            atol = 1e-6 if i < 2 and dtype != torch.float64 else (3e-8 if dtype == torch.float16 else rtol / 10)
            torch.testing.assert_close(a.double(), b, rtol=rtol if i == 2 else 1e-6, atol=atol, equal_nan=True)
n, cu = 300, torch.tensor([0, 7, 7, 150, 300])
for level in ("sequence", "token"):
    for dtype in (torch.float64, torch.float32):
        new, old = (-torch.rand(2, n, generator=g)).to(dtype)
        mask = torch.rand(n, generator=g) < 0.7
        adv = torch.tensor([1.0, -1.0, 0.5, -0.3])
        results = []
        for how in ("native", "reference"):
            leaf = new.double().requires_grad_() if how == "reference" else new.clone().requires_grad_()
            loss, stats = ops.sequence_policy_loss(leaf, old, mask, cu, adv, clip_low=0.05, clip_high=0.05,
                                                   level=level, implementation=how)
            (gradient,) = torch.autograd.grad(loss, leaf)
            results.append((loss.detach(), gradient, stats.log_ratio, stats.clipped_tokens))
        for a, b in zip(*results):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-7)
"""


def run_with(isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GSPO_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EACH_DTYPE, isa], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_each_instruction_set(isa: str) -> None:
    result = run_with(isa)
    if isa != "baseline" and "that this processor has" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_named() -> None:
    result = run_with("avx1024")
    assert result.returncode != 0 and "GSPO_CPU_ISA=avx1024" in result.stderr and "baseline" in result.stderr


# -- Linear log-probabilities -------------------------------------------------------------------------------------


def head(dtype: torch.dtype = torch.float64, tokens: int = 11) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    hidden = torch.randn(tokens, 6, generator=generator(), dtype=torch.float64).to(dtype)
    weight = torch.randn(21, 6, generator=generator(1), dtype=torch.float64).to(dtype)
    targets = torch.randint(19, (tokens,), generator=generator(2))
    upstream = torch.randn(2, tokens, generator=generator(3), dtype=torch.float64)
    return hidden, weight, targets, tuple(upstream if dtype == torch.float64 else upstream.float())


def linear_results(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Any, **settings: Any) -> list[Tensor]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    outputs = linear_logprobs(leaves[0], leaves[1], targets, vocab_size=19, temperature=0.8, **settings)
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize("elements", [1, 40, 10**6])
def test_chunks_of_the_vocabulary_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = linear_results(*head(), implementation="reference")
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", elements)
    for a, b in zip(linear_results(*head()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_loss_gradcheck(level: Any) -> None:
    mask, cu = torch.rand(12, generator=generator()) < 0.7, torch.tensor([0, 5, 5, 12])
    old = -torch.rand(12, generator=generator(1), dtype=torch.float64)
    advantages = torch.tensor([0.7, 1.0, -1.2], dtype=torch.float64)

    def total(logprobs: Tensor) -> Tensor:
        loss, _ = sequence_policy_loss(logprobs, old, mask, cu, advantages, clip_low=0.2, clip_high=0.2, level=level)
        return loss + sequence_mean(logprobs.square(), mask, cu)

    moved = old + 0.3 * torch.randn(12, generator=generator(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(total, moved.requires_grad_())


def test_linear_gradcheck() -> None:
    hidden, weight, targets, _ = head()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets, temperature=1.2, vocab_size=19),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("quiet", [[], [0, 3, 4, 10], list(range(11))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_skipping_rows_without_gradient_changes_no_gradient(quiet: list[int], dtype: torch.dtype) -> None:
    hidden, weight, targets, upstream = head(dtype)
    for part in upstream:
        part[quiet] = 0
    hidden[quiet] = math.nan
    expected = linear_results(hidden, weight, targets, upstream)
    actual = linear_results(hidden, weight, targets, upstream, skip_zero_rows=True)
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)
    assert torch.equal(actual[2][quiet], torch.zeros(len(quiet), 6, dtype=dtype))


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_where_it_is_wanted(dtype: torch.dtype, implementation: Any) -> None:
    hidden, weight, targets, upstream = head(dtype)
    exact_gradient = linear_results(hidden.double(), weight.double(), targets, tuple(x.double() for x in upstream))[3]
    total = torch.ones(21, 6)
    leaf = weight.clone().requires_grad_()
    for _ in range(2):
        outputs = linear_logprobs(
            hidden, leaf, targets, vocab_size=19, temperature=0.8, weight_grad=total, implementation=implementation
        )
        torch.autograd.backward(outputs, upstream)
    assert leaf.grad is None
    # In float32 also for a bfloat16 model, whose own gradient would be rounded to 2^-8.
    torch.testing.assert_close(total.double(), 1 + 2 * exact_gradient, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_nothing_of_the_size_of_the_logits_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, columns, size = 64, 512, 8
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", 64 * 32)
    hidden = torch.randn(tokens, size, requires_grad=True)
    weight = torch.randn(columns, size, requires_grad=True)
    with LargestTensor() as largest:
        outputs = logprobs._linear_logprobs._init_fn(
            hidden.detach(), weight.detach(), torch.zeros(tokens, dtype=torch.long), None, 1.0, 0, columns, 0, columns,
            "", "", False,
        )  # fmt: skip
        logprobs._linear_gradients._init_fn(
            hidden.detach(), weight.detach(), torch.zeros(tokens, dtype=torch.long), outputs[2], torch.ones(tokens),
            None, None, 1.0, 0, columns, "", True, True, False,
        )  # fmt: skip
    assert largest.numel == max(weight.numel(), 64 * 32) < tokens * columns / 7


# -- Where others broke -------------------------------------------------------------------------------------------


def test_rows_more_than_two_to_the_31_elements_apart() -> None:
    """Memory that is never touched costs nothing: two rows at the ends of 4 GB."""
    columns, apart = 1000, 2**31 + 8
    far = torch.empty(apart + columns, dtype=torch.bfloat16).as_strided((2, columns), (apart, 1))
    near = torch.randn(2, columns, generator=generator()).bfloat16()
    far.copy_(near)
    targets = torch.tensor([3, 999])
    expected = token_results(near, targets, torch.ones(2, 2))
    leaf = far.requires_grad_()
    outputs = token_logprobs(leaf, targets, temperature=0.9, inplace_backward=True)
    (gradient,) = torch.autograd.grad(outputs, leaf, (torch.ones(2), torch.ones(2)))
    for a, b in zip((*outputs, gradient), expected, strict=True):
        assert torch.equal(a, b)
    assert gradient.data_ptr() == far.data_ptr()


def test_logits_that_are_not_contiguous() -> None:
    logits = torch.randn(40, 6, generator=generator())
    targets = torch.randint(40, (6,), generator=generator())
    expected = token_results(logits.t().contiguous(), targets, torch.ones(2, 6))
    leaf = logits.clone().requires_grad_()
    outputs = token_logprobs(leaf.t(), targets, temperature=0.9)
    (gradient,) = torch.autograd.grad(outputs, leaf, (torch.ones(6), torch.ones(6)))
    for a, b in zip((*outputs, gradient.t()), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, 0x7F800000], ids=hex)
def test_a_bad_logit_shows(bits: int) -> None:
    """NaN of several payloads, that of CUDA among them, and infinity."""
    poison = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for place in (0, 500, 999):
        logits = torch.full((2, 1000), -math.inf)
        logits[0] = 0.0
        logits[:, place] = poison
        logprob, entropy = token_logprobs(logits, torch.tensor([1, 1]))
        assert logprob.isnan().all() and entropy.isnan().all()


def one_response(log_ratio: float, advantage: float, weight: float, implementation: Any) -> tuple[Tensor, Tensor]:
    old = torch.tensor([-100.0, -1.0])
    new = (old + log_ratio).requires_grad_()
    loss, _ = sequence_policy_loss(
        new,
        old,
        torch.tensor([True, False]),
        torch.tensor([0, 2]),
        torch.tensor([advantage]),
        weights=torch.tensor([weight, math.nan]),
        implementation=implementation,
        **CLIP,
    )
    return loss.detach(), torch.autograd.grad(loss, new)[0]


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "weight"), [(0.0, math.nan, 0.0), (95.0, -1.0, 1e-10), (0.1, 0.0, math.inf)]
)
def test_weights_meet_advantages_token_by_token(log_ratio: float, advantage: float, weight: float) -> None:
    results = [one_response(log_ratio, advantage, weight, name) for name in ("native", "reference")]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
    assert results[0][0].isnan() == math.isnan(advantage * weight)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_tokens_outside_the_sequences_and_odd_bytes_in_the_mask(implementation: Any) -> None:
    mask = torch.tensor([255, 2, 1, 0, 3], dtype=torch.uint8).view(torch.bool)
    new = torch.full((5,), -1.0, requires_grad=True)
    cu = torch.tensor([1, 4])
    loss, stats = sequence_policy_loss(
        new, new.detach(), mask, cu, torch.ones(1), implementation=implementation, **CLIP
    )
    mean = sequence_mean(new, mask, cu, implementation=implementation)
    gradient, of_mean = (torch.autograd.grad(x, new)[0].tolist() for x in (loss, mean))
    assert stats.num_response_tokens.tolist() == [2]
    assert gradient == [0.0, -0.5, -0.5, 0.0, 0.0] and of_mean == [0.0, 0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_a_second_derivative_is_refused(implementation: Any) -> None:
    new = torch.full((3,), -1.0, requires_grad=True)
    mask, cu = torch.ones(3, dtype=torch.bool), torch.tensor([0, 3])
    loss, _ = sequence_policy_loss(new, new.detach(), mask, cu, torch.ones(1), implementation=implementation, **CLIP)
    (gradient,) = torch.autograd.grad(loss**2, new, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), new)


# -- Composability ------------------------------------------------------------------------------------------------

ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    native = torch.ops.gspo_megatron
    z, t = torch.randn(4, 9, generator=generator()), torch.tensor([0, 3, 7, 2])
    rows = native.token_logprobs(z, t, 0.9, 0, 8, 0, 8, "", False)[2]
    hidden, weight = torch.randn(4, 3, generator=generator()), torch.randn(9, 3, generator=generator())
    mask, cu = torch.tensor([True, False, True, True]), torch.tensor([0, 1, 4])
    lp, old, up = torch.randn(3, 4, generator=generator(1)).unbind()
    columns, advantages = (0.9, 0, 8, 0, 8, ""), torch.tensor([1.0, -1.0])
    lp, old, up = lp.clone(), old.clone(), up.clone()
    return {
        "token_logprobs": (native.token_logprobs, (z.clone().requires_grad_(), t, *columns, False)),
        "logits_gradient": (native.logits_gradient, (z, t, rows, up, None, 0.9, 0, 8)),
        "logits_gradient_": (native.logits_gradient_, (z.clone(), t, rows, up, up, 0.9, 0, 8)),
        "linear_logprobs": (
            native.linear_logprobs,
            (hidden.clone().requires_grad_(), weight.clone().requires_grad_(), t, None, *columns, "", False),
        ),
        "linear_gradients": (
            native.linear_gradients,
            (hidden, weight, t, rows, up, None, torch.zeros(9, 3), 0.9, 0, 8, "", True, True, False),
        ),
        "sequence_policy_loss": (
            native.sequence_policy_loss,
            (lp.requires_grad_(), old, mask, cu, advantages, None, 0.2, 0.2, math.inf, 2, False, ""),
        ),
        "sequence_mean": (native.sequence_mean, (old.clone().requires_grad_(), mask, cu, 3, "")),
        "sequence_fill": (native.sequence_fill, (torch.rand(2).double(), mask, cu, old)),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name: str) -> None:
    operator, arguments = operator_calls()[name]
    torch.library.opcheck(operator, arguments, test_utils=ALL_CHECKS)


def test_compiles_without_a_graph_break() -> None:
    mask, cu = torch.tensor([True, False, True, True]), torch.tensor([0, 1, 4])
    targets = torch.tensor([0, 3, 7, 2])

    def loss(hidden: Tensor, weight: Tensor, logits: Tensor, old: Tensor) -> Tensor:
        first, entropy = linear_logprobs(hidden, weight, targets, vocab_size=8)
        second, _ = token_logprobs(logits, targets, temperature=0.7)
        policy, _ = sequence_policy_loss(first, old, mask, cu, torch.tensor([1.0, -1.0]), **CLIP)
        return policy - 0.1 * sequence_mean(entropy, mask, cu) + second.sum()

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [torch.randn(4, 3), torch.randn(9, 3), torch.randn(4, 9)]
        leaves = [torch.randn(x.shape, generator=generator(i)).requires_grad_() for i, x in enumerate(leaves)]
        value = function(*leaves, torch.full((4,), -2.0))
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    for a, b in zip(run(torch.compile(loss, fullgraph=True, backend="aot_eager")), run(loss), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sequences", [1, 3])
def test_compiles_for_any_size(sequences: int) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor, cu: Tensor, advantages: Tensor) -> Tensor:
        new, entropy = token_logprobs(logits, targets)
        policy, _ = sequence_policy_loss(new, new.detach(), mask, cu, advantages, **CLIP)
        return policy + sequence_mean(entropy, mask, cu)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (6, 9):
        logits = torch.randn(tokens, 7, generator=generator()).requires_grad_()
        arguments = (torch.zeros(tokens, dtype=torch.long), torch.ones(tokens, dtype=torch.bool))
        cu = torch.linspace(0, tokens, sequences + 1).long()
        values = [f(logits, *arguments, cu, torch.ones(sequences)) for f in (compiled, loss)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


# -- The extension ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_load() -> Iterator[None]:
    extension.load.cache_clear()
    yield
    extension.load.cache_clear()


def test_a_missing_extension_is_an_error(monkeypatch: pytest.MonkeyPatch, fresh_load: None) -> None:
    monkeypatch.delattr("gspo_megatron._C", raising=False)
    monkeypatch.setitem(sys.modules, "gspo_megatron._C", None)
    logits, targets = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"make setup.*kernels.implementation"):
        token_logprobs(logits, targets)
    token_logprobs(logits, targets, implementation="reference")


def test_devices_without_kernels_are_refused() -> None:
    if not extension.load().with_cuda:
        with pytest.raises(UserError, match=r"built without CUDA.*GSPO_CUDA=1"):
            extension.check_device(torch.device("cuda"))
    with pytest.raises(UserError, match="not on meta"):
        extension.check_device(torch.device("meta"))
