"""token_logprobs and linear_logprobs on one rank, against torch's own log-softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gspo_megatron import ops
from gspo_megatron.ops import linear_logprobs, reference, token_logprobs

pytestmark = pytest.mark.usefixtures("each_implementation")


def definition(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    log_p = (logits.double()[:, :vocab_size] / temperature).log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


def inputs(
    tokens: int, columns: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, valid: int | None = None
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * 3).to(dtype)
    return logits, torch.randint(valid or columns, (tokens,), generator=generator)


def gradients(outputs: tuple[Tensor, Tensor], upstream: tuple[Tensor, Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, upstream)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("vocab_size", [None, 11])
@pytest.mark.parametrize("inplace", [False, True])
def test_value_and_gradient_equal_log_softmax(temperature: float, vocab_size: int | None, inplace: bool) -> None:
    logits, targets = inputs(6, 13, valid=vocab_size)
    upstream = (torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64))  # grad_output is not 1
    a = logits.clone().requires_grad_()
    expected = definition(a, targets, temperature=temperature, vocab_size=vocab_size)
    (expected_gradient,) = gradients(expected, upstream, a)

    b = logits.clone().requires_grad_()
    actual = token_logprobs(b, targets, temperature=temperature, vocab_size=vocab_size, inplace_backward=inplace)
    (gradient,) = gradients(actual, upstream, b)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-13)
    if vocab_size is not None:
        assert torch.equal(gradient[:, vocab_size:], torch.zeros(6, 13 - vocab_size, dtype=torch.float64))


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone_has_its_gradient(which: int) -> None:
    logits, targets = inputs(5, 7)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(definition(a, targets)[which].sum(), a)
    (actual,) = torch.autograd.grad(token_logprobs(b, targets)[which].sum(), b)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_finite_differences_of_logprob_and_entropy() -> None:
    logits, targets = inputs(4, 6)
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, targets, temperature=1.3, vocab_size=6), logits.requires_grad_()
    )


def test_padded_columns_are_outside_the_softmax_whatever_they_hold() -> None:
    logits, targets = inputs(3, 8, valid=5)
    for filler in (1e9, -math.inf, math.inf, math.nan):
        padded = logits.clone()
        padded[:, 5:] = filler
        padded.requires_grad_()
        logprobs, entropy = token_logprobs(padded, targets, vocab_size=5)
        expected, expected_entropy = definition(logits, targets, vocab_size=5)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-13)
        (logprobs.sum() + entropy.sum()).backward()
        assert padded.grad is not None
        assert torch.equal(padded.grad[:, 5:], torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_float32_or_better(dtype: torch.dtype) -> None:
    logits, targets = inputs(64, 1000, dtype=dtype)
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs(leaf, targets)
    expected, expected_entropy = definition(logits, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - expected).abs().max() < 4e-6  # |logprob| is about 15: a few units in the last place
    assert (entropy - expected_entropy).abs().max() < 4e-6
    logprobs.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype


def test_minus_infinity_is_a_token_that_cannot_occur() -> None:
    logits, targets = inputs(4, 6)
    logits[:, 2] = -math.inf
    targets[:] = torch.tensor([0, 1, 3, 2])  # the last one cannot occur
    kept = [0, 1, 3, 4, 5]
    expected, expected_entropy = definition(logits[:3][:, kept], torch.tensor([0, 1, 2]))
    leaf = logits.requires_grad_()
    logprobs, entropy = token_logprobs(leaf, targets)
    torch.testing.assert_close(logprobs[:3], expected, rtol=0, atol=1e-13)
    assert logprobs[3] == -math.inf
    torch.testing.assert_close(entropy[:3], expected_entropy, rtol=0, atol=1e-13)
    (logprobs[:3].sum() + entropy.sum()).backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert torch.equal(leaf.grad[:, 2], torch.zeros(4, dtype=torch.float64))


def test_a_row_of_minus_infinity_gives_no_nan() -> None:
    logits, targets = inputs(3, 4)
    logits[1] = -math.inf
    leaf = logits.requires_grad_()
    logprobs, entropy = token_logprobs(leaf, targets)
    assert logprobs[1] == -math.inf and entropy[1] == 0
    (logprobs[[0, 2]].sum() + entropy.sum()).backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_of_tokens_without_gradient_do_not_leak(inplace: bool) -> None:
    logits, targets = inputs(4, 5)
    logits[1], logits[2, 3] = math.nan, math.inf
    leaf = logits.requires_grad_()
    logprobs, entropy = token_logprobs(leaf, targets, inplace_backward=inplace)
    used = torch.tensor([True, False, False, True])
    (gradient,) = torch.autograd.grad((logprobs[used] + entropy[used]).sum(), leaf)
    assert torch.equal(gradient[1:3], torch.zeros(2, 5, dtype=torch.float64))
    assert gradient.isfinite().all() and gradient[0].abs().sum() > 0


def test_a_logprob_is_never_positive_and_an_entropy_never_negative() -> None:
    """Fused log-probs above 0 made rewards collapse elsewhere (verl #2656)."""
    logits, _ = inputs(512, 33, dtype=torch.float32)
    logits[:256] *= 40  # nearly deterministic
    logits[256:300] = 7.3
    logprobs, entropy = token_logprobs(logits, logits.argmax(-1), temperature=0.3)
    assert (logprobs <= 0).all() and (entropy >= 0).all()


@pytest.mark.parametrize("target", [-100, -1, 5, 7, 9])
def test_a_target_outside_the_vocabulary_shows(target: int) -> None:
    logits, targets = inputs(2, 8, valid=5)
    targets[1] = target
    leaf = logits.requires_grad_()
    logprobs, entropy = token_logprobs(leaf, targets, vocab_size=5)
    assert logprobs[0].isfinite() and logprobs[1].isnan() and entropy.isfinite().all()
    torch.where(torch.tensor([True, False]), logprobs, 0.0).sum().backward()  # harmless once masked
    assert leaf.grad is not None and torch.equal(leaf.grad[1], torch.zeros(8, dtype=torch.float64))


def test_inplace_backward_writes_over_the_logits_and_a_second_backward_raises() -> None:
    logits, targets = inputs(3, 6)
    leaf = logits.clone().requires_grad_()
    produced = leaf * 1.0
    logprobs, _ = token_logprobs(produced, targets, inplace_backward=True)
    (expected,) = torch.autograd.grad(definition(leaf, targets)[0].sum(), leaf)
    (gradient,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(produced.detach(), expected, rtol=0, atol=1e-13)
    with pytest.raises(RuntimeError, match="inplace"):
        logprobs.sum().backward()


def test_without_inplace_backward_the_logits_stay_and_backward_repeats() -> None:
    logits, targets = inputs(3, 6)
    leaf = logits.clone().requires_grad_()
    logprobs, _ = token_logprobs(leaf, targets)
    (first,) = torch.autograd.grad(logprobs.sum(), leaf, retain_graph=True)
    (second,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert torch.equal(first, second) and torch.equal(leaf.detach(), logits)


def test_more_than_65536_tokens() -> None:
    """A grid dimension of 16 bits broke others here (Liger #1294); the last row must be right."""
    logits, targets = inputs(70_000, 3, dtype=torch.float32)
    leaf = logits.clone().requires_grad_()
    logprobs, _ = token_logprobs(leaf, targets)
    torch.testing.assert_close(logprobs.double(), definition(logits, targets)[0], rtol=0, atol=2e-6)
    logprobs[-1].backward()
    assert leaf.grad is not None and leaf.grad[-1].abs().sum() > 0


@pytest.mark.parametrize("elements", [1, 7, 1000])
def test_blocks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = inputs(9, 5)
    hidden, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (logits, hidden, weight)]
        logprobs, entropy = token_logprobs(leaves[0], targets)
        linear = linear_logprobs(leaves[1], leaves[2], targets)
        total = (logprobs + 2 * entropy + linear[0] - linear[1]).sum()
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    expected = run()
    monkeypatch.setitem(reference._STATISTICS_ELEMENTS, "cpu", elements)
    monkeypatch.setitem(reference._PRODUCT_ELEMENTS, "cpu", elements)
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab_size", [None, 9])
def test_linear_equals_the_product_and_log_softmax(temperature: float, vocab_size: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size or 12, (7,), generator=generator)
    upstream = (torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64))
    a = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = definition(a[0] @ a[1].t(), targets, temperature=temperature, vocab_size=vocab_size)
    b = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    actual = linear_logprobs(b[0], b[1], targets, temperature=temperature, vocab_size=vocab_size)
    for x, y in zip(
        (*actual, *gradients(actual, upstream, *b)), (*expected, *gradients(expected, upstream, *a)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_linear_keeps_float32_logits_of_bfloat16_operands() -> None:
    """Logits rounded to bfloat16 are off by up to 0.03 here; float32 ones by rounding of the sum alone."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(64, 256, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(100, 256, generator=generator) * 0.5).bfloat16().requires_grad_()
    targets = torch.randint(100, (64,), generator=generator)
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    expected, expected_entropy = definition(hidden.detach().double() @ weight.detach().double().t(), targets)
    assert logprobs.dtype == torch.float32
    assert (logprobs - expected).abs().max() < 3e-5
    assert (entropy - expected_entropy).abs().max() < 3e-5
    rounded, _ = definition(hidden.detach() @ weight.detach().t(), targets)
    assert (rounded - expected).abs().max() > 1e-2  # the case can tell
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_linear_with_frozen_hidden_or_weight() -> None:
    hidden, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    targets = torch.tensor([0, 5, 2])
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(linear_logprobs(both[0], both[1], targets)[0].sum(), both)
    (only_hidden,) = torch.autograd.grad(linear_logprobs(both[0], weight, targets)[0].sum(), both[0])
    (only_weight,) = torch.autograd.grad(linear_logprobs(hidden, both[1], targets)[0].sum(), both[1])
    assert torch.equal(only_hidden, expected[0]) and torch.equal(only_weight, expected[1])


def test_linear_with_a_tied_weight_adds_to_the_embedding_gradient() -> None:
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.tensor([1, 3, 3]), torch.tensor([3, 3, 0])
    (actual,) = torch.autograd.grad(linear_logprobs(weight[tokens].tanh(), weight, targets)[0].sum(), weight)
    (expected,) = torch.autograd.grad(definition(weight[tokens].tanh() @ weight.t(), targets)[0].sum(), weight)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_nan_hidden_states_of_tokens_without_gradient_do_not_reach_the_weight() -> None:
    hidden = torch.randn(3, 4, dtype=torch.float64)
    hidden[1] = math.nan
    hidden.requires_grad_()
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    logprobs, _ = linear_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    logprobs[[0, 2]].sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
    assert hidden.grad is not None and torch.equal(hidden.grad[1], torch.zeros(4, dtype=torch.float64))


def test_no_tokens() -> None:
    logits = torch.randn(0, 5, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.zeros(0, dtype=torch.long))
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    linear, _ = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    (logprobs.sum() + entropy.sum() + linear.sum()).backward()
    assert logprobs.shape == entropy.shape == linear.shape == (0,)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(5, 4))


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values: an .item() or a branch on a tensor raises."""
    with FakeTensorMode():
        logits, targets = torch.randn(4, 6, requires_grad=True), torch.zeros(4, dtype=torch.long)
        hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
        outputs = (*token_logprobs(logits, targets, vocab_size=5), *linear_logprobs(hidden, weight, targets))
        torch.stack(outputs).sum().backward()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 6),
    columns=st.integers(1, 9),
    padding=st.integers(0, 4),
    temperature=st.floats(0.2, 5.0),
    seed=st.integers(0, 10_000),
)
def test_any_shape(tokens: int, columns: int, padding: int, temperature: float, seed: int) -> None:
    logits, targets = inputs(tokens, columns + padding, seed=seed, valid=columns)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = definition(a, targets, temperature=temperature, vocab_size=columns)
    actual = token_logprobs(b, targets, temperature=temperature, vocab_size=columns)
    upstream = (torch.linspace(-1, 2, tokens).double(), torch.linspace(1, -2, tokens).double())
    for x, y in zip(
        (*actual, *gradients(actual, upstream, b)), (*expected, *gradients(expected, upstream, a)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


BAD_CALLS = {
    "targets has shape": lambda z, t: token_logprobs(z, t[:-1]),
    "targets has dtype": lambda z, t: token_logprobs(z, t.float()),
    "logits has shape": lambda z, t: token_logprobs(z[None], t),
    "logits has dtype": lambda z, t: token_logprobs(z.long(), t),
    "temperature=0": lambda z, t: token_logprobs(z, t, temperature=0.0),
    "temperature=inf": lambda z, t: token_logprobs(z, t, temperature=math.inf),
    "temperature=1e-320": lambda z, t: token_logprobs(z, t, temperature=1e-320),
    "weight_grad has dtype": lambda z, t: linear_logprobs(z, z, t, weight_grad=torch.zeros(3, 4)),
    "weight_grad has shape": lambda z, t: linear_logprobs(z, z, t, weight_grad=torch.zeros(2, 4)),
    'implementation="nativ"': lambda z, t: ops.token_logprobs(z, t, implementation="nativ"),
    "vocab_size=0": lambda z, t: token_logprobs(z, t, vocab_size=0),
    "vocab_start=-1": lambda z, t: token_logprobs(z, t, vocab_start=-1),
    "pass the group": lambda z, t: token_logprobs(z, t, vocab_start=8, vocab_size=8),
    "last sizes must agree": lambda z, t: linear_logprobs(z, z[:, :2], t),
    "weight has dtype": lambda z, t: linear_logprobs(z, z.float(), t),
    "no column": lambda z, t: linear_logprobs(z, z[:0], t),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments(message: str) -> None:
    logits, targets = inputs(3, 4)
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message](logits, targets)
