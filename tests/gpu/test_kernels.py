"""The native operations on a CUDA device: the CPU's results, at every size, on any stream, without waiting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.ops import linear_logprobs, reference, sequence_mean, sequence_policy_loss, token_logprobs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PRODUCT = 1e-5  # of a norm: products in float32 that add in another order
MIB = 2**20


def random(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def targets_of(rows: int, columns: int) -> Tensor:
    return torch.arange(rows) * 7919 % columns


def run(operation: Callable[..., Any], device: str, leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Results and gradients of operation(*leaves), on the CPU."""
    inputs = [x.to(device).requires_grad_() for x in leaves]
    results = list(operation(*inputs))
    gradients = torch.autograd.grad(results, inputs, [g.to(device) for g in upstream])
    return [x.detach().cpu() for x in (*results, *gradients)]


def relative_norm(ours: Tensor, truth: Tensor) -> float:
    """Of the worst row."""
    difference = (ours.double() - truth.double()).norm(dim=-1)
    return float((difference / truth.double().norm(dim=-1).clamp(min=1e-3)).max())


# -- Log-probabilities of logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "padding"), [(1, 1, 0), (37, 1001, 7), (5, 50_257, 0), (8, 151_936, 64)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_the_cpus(
    dtype: torch.dtype, rows: int, columns: int, padding: int, temperature: float
) -> None:
    logits = random(rows, columns + padding, dtype=dtype, scale=3.0)
    logits[:, columns:] = NAN  # padding is not read
    upstream = list(random(2, rows, dtype=reference.statistics_dtype(logits), seed=1))

    def operation(x: Tensor) -> tuple[Tensor, Tensor]:
        targets = targets_of(rows, columns).to(x.device)
        return token_logprobs(x, targets, temperature=temperature, vocab_size=columns)

    ours, theirs = run(operation, DEVICE, [logits], upstream), run(operation, "cpu", [logits], upstream)
    exact = dtype == torch.float64
    for x, y in zip(ours[:2], theirs[:2], strict=True):
        assert ((x - y).abs() <= (1e-13 if exact else 1e-6) + 5e-7 * y.abs()).all()
    # Half precision: both round a float32 gradient, now and then to two sides.
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    assert relative_norm(ours[2], theirs[2]) <= tolerance
    assert torch.equal(ours[2][:, columns:], torch.zeros(rows, padding, dtype=dtype))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_float32_errors_against_float64(scale: float) -> None:
    """The GPU's fast exponential is not the CPU's: its error is measured where the vocabulary is largest."""
    logits, targets = random(64, 151_936, dtype=torch.float32, scale=scale), targets_of(64, 151_936)
    upstream = list(random(2, 64, dtype=torch.float32, seed=1))
    ours = run(lambda x: token_logprobs(x, targets.to(x.device)), DEVICE, [logits], upstream)
    truth = run(
        lambda x: reference.token_logprobs(x, targets), "cpu", [logits.double()], [g.double() for g in upstream]
    )
    for x, y in zip(ours[:2], truth[:2], strict=True):
        assert ((x - y).abs() <= 1e-6 + 2.5e-7 * y.abs()).all()
    assert relative_norm(ours[2], truth[2]) <= 1e-6


def test_logits_that_are_not_finite() -> None:
    for columns in (40, 20_000):
        logits = random(9, columns, dtype=torch.float32, scale=3.0)
        logits[0, ::2] = -INF
        logits[1, : columns // 2] = -INF
        logits[2], logits[3] = -INF, -INF  # certain, impossible
        logits[2, 5] = 1.0
        logits[4, :-1] = torch.finfo(torch.float32).min
        logits[5, 7], logits[6, 7], logits[7, 3] = NAN, NAN, INF
        logits[6, :7] = -INF
        logits[8] = torch.finfo(torch.float32).min
        targets = torch.tensor([1, columns - 1, 5, 0, columns - 1, 0, 0, 3, 9])
        upstream = list(random(2, 9, dtype=torch.float32, seed=1))

        def operation(x: Tensor, targets: Tensor = targets) -> tuple[Tensor, Tensor]:
            return token_logprobs(x, targets.to(x.device))

        ours, theirs = run(operation, DEVICE, [logits], upstream), run(operation, "cpu", [logits], upstream)
        for bad in (5, 6, 7):
            assert all(x[bad].isnan().any() for x in ours)
        good = [0, 1, 2, 3, 4, 8]
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x[good], y[good], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_nan_in_a_row_without_gradient_stays_there(inplace: bool) -> None:
    logits = random(6, 5000, dtype=torch.bfloat16).to(DEVICE)
    logits[1::2] = NAN
    targets, upstream = targets_of(6, 5000).to(DEVICE), random(6, dtype=torch.float32).to(DEVICE)
    upstream[1::2] = 0.0
    leaf = logits.requires_grad_()
    logprobs, _ = token_logprobs(leaf * 1, targets, inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(logprobs, leaf, upstream)
    assert torch.equal(gradient[1::2], torch.zeros_like(gradient[1::2]))
    assert torch.isfinite(gradient).all() and (gradient[::2] != 0).any(1).all()


@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, 4096), (torch.float32, 32_768)], ids=str)
def test_a_row_has_one_result_wherever_it_lies(dtype: torch.dtype, columns: int) -> None:
    """In memory that allows 16-byte loads or not, first or last."""
    row, upstream = random(1, columns, dtype=dtype, scale=3.0).to(DEVICE), torch.tensor([0.7], device=DEVICE)
    results = []
    for rows, offset in [(1, 0), (999, 0), (3, 1), (50, 5)]:
        logits = torch.zeros(rows, columns + 8, dtype=dtype, device=DEVICE)[:, offset : offset + columns]
        logits.copy_(row.expand(rows, -1))
        leaf = logits.requires_grad_()
        outputs = token_logprobs(leaf, torch.full((rows,), 3, device=DEVICE))
        (gradient,) = torch.autograd.grad(outputs, leaf, [upstream.expand(rows)] * 2)
        results += [(outputs[0][i], outputs[1][i], gradient[i]) for i in (0, rows - 1)]
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


@pytest.fixture
def big() -> Iterator[Tensor]:
    rows, columns = 70_000, 40_000  # more than 65,535 rows and more than 2^31 elements
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * rows * columns:
        pytest.skip(f"needs {3 * rows * columns / 1e9:.0f} GB of free GPU memory, there are {free / 1e9:.0f}")
    generator = torch.Generator(DEVICE).manual_seed(0)
    yield torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
    torch.cuda.empty_cache()


def test_more_than_two_to_the_31_logits(big: Tensor) -> None:
    rows, columns = big.shape
    chosen = [0, 1, 53_686, 53_687, 53_688, 65_535, 65_536, rows - 1]  # 2^31 / 40,000 = 53,687.09
    kept, targets = big[chosen].cpu(), targets_of(rows, columns)
    upstream = random(2, rows, dtype=torch.float32, seed=1)

    def operation(x: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(x, targets[chosen])

    expected = run(operation, "cpu", [kept], list(upstream[:, chosen]))
    leaf = big.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = token_logprobs(leaf, targets.to(DEVICE), inplace_backward=True)
    (gradient,) = torch.autograd.grad(outputs, leaf, list(upstream.to(DEVICE)))
    assert torch.cuda.max_memory_allocated() - before <= 32 * MIB  # the logits are 5.2 GiB
    assert gradient.data_ptr() == big.data_ptr()
    for x, y in zip(outputs, expected[:2], strict=True):
        assert (x[chosen].detach().cpu() - y).abs().max() <= 5e-6
    assert relative_norm(gradient[chosen].cpu(), expected[2]) <= torch.finfo(torch.bfloat16).eps


# -- Log-probabilities of hidden states ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "vocab_size"), [(1003, None), (5000, 4801)])
def test_linear_logprobs_equal_the_cpus(dtype: torch.dtype, columns: int, vocab_size: int | None) -> None:
    tokens, size = 70, 96
    hidden = random(tokens, size, dtype=dtype)
    weight = random(columns, size, dtype=dtype, scale=2 * size**-0.5, seed=2)
    upstream = list(random(2, tokens, dtype=reference.statistics_dtype(hidden), seed=1))

    def operation(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        targets = targets_of(tokens, vocab_size or columns).to(x.device)
        return linear_logprobs(x, w, targets, temperature=0.9, vocab_size=vocab_size)

    ours, theirs = run(operation, DEVICE, [hidden, weight], upstream), run(operation, "cpu", [hidden, weight], upstream)
    exact, half = dtype == torch.float64, dtype == torch.bfloat16
    for x, y in zip(ours[:2], theirs[:2], strict=True):
        assert (x - y).abs().max() <= (1e-12 if exact else 1e-5)
    for x, y in zip(ours[2:], theirs[2:], strict=True):
        tolerance = 1e-12 if exact else torch.finfo(dtype).eps if half else PRODUCT
        assert (x.double() - y.double()).norm() <= tolerance * y.double().norm()


@pytest.mark.parametrize("skip_zero_rows", [False, True])
def test_linear_logprobs_add_to_the_weights_gradient(skip_zero_rows: bool) -> None:
    hidden = random(64, 128, dtype=torch.bfloat16).to(DEVICE).requires_grad_()
    weight = random(3000, 128, dtype=torch.bfloat16, scale=0.1, seed=2).to(DEVICE).requires_grad_()
    targets, upstream = targets_of(64, 3000).to(DEVICE), random(64, dtype=torch.float32, seed=1).to(DEVICE)
    upstream[::3] = 0.0
    main_grad = torch.ones(3000, 128, device=DEVICE)
    logprobs, _ = linear_logprobs(hidden, weight, targets, weight_grad=main_grad, skip_zero_rows=skip_zero_rows)
    logprobs.backward(upstream)
    leaf = weight.detach().float().requires_grad_()
    plain, _ = linear_logprobs(hidden.detach().float(), leaf, targets)
    (expected,) = torch.autograd.grad(plain, leaf, upstream)
    assert weight.grad is None and hidden.grad is not None
    assert ((main_grad - 1) - expected).norm() <= 2**-7 * expected.norm()
    assert torch.equal(hidden.grad[::3], torch.zeros_like(hidden.grad[::3]))


def test_linear_logprobs_never_hold_the_logits() -> None:
    tokens, size, columns = 32_768, 2048, 151_936
    free, _ = torch.cuda.mem_get_info()
    if free < 8e9:
        pytest.skip(f"needs 8 GB of free GPU memory, there are {free / 1e9:.0f}")
    hidden = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(columns, size, device=DEVICE, dtype=torch.bfloat16) * 0.02).requires_grad_()
    targets = targets_of(tokens, columns).to(DEVICE)
    gradients = 2 * (hidden.numel() + weight.numel())  # bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, _ = linear_logprobs(hidden, weight, targets)
    logprobs.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before - gradients
    assert extra <= 1.5e9, f"{extra / 1e9:.2f} GB; the float32 logits would be {4 * tokens * columns / 1e9:.0f} GB"


# -- Packed sequences ---------------------------------------------------------------------------------------------


def pack(lengths: list[int], dtype: torch.dtype, *, behind: int = 9) -> dict[str, Tensor]:
    tokens, sequences = sum(lengths) + behind, len(lengths)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(3)) < 0.7
    old = -random(tokens, dtype=dtype, seed=4).abs()
    shift = (torch.arange(sequences) % 5 - 2).repeat_interleave(torch.tensor(lengths))  # off the clip, to both sides
    values = {
        "logprobs": old + 3e-4 * random(tokens, dtype=dtype, seed=6),
        "old_logprobs": old,
        "token_advantages": random(tokens, dtype=dtype, seed=7),
        "weights": random(tokens, dtype=dtype, seed=8).abs(),
    }
    values["logprobs"][: tokens - behind] += (8e-4 * shift).to(dtype)
    for each in values.values():
        each[~mask] = NAN
        each[tokens - behind :] = NAN
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    advantages = random(sequences, dtype=dtype, seed=9).abs() * (1 - 2 * (torch.arange(sequences) % 2))
    return {**values, "mask": mask, "cu_seqlens": cu_seqlens, "sequence_advantages": advantages}


LENGTHS = [1, 0, 700, 3, 256, 0, 40, 5000]


def policy_loss(p: dict[str, Tensor], logprobs: Tensor, per_token: bool, weighted: bool, **settings: Any) -> Any:
    p = {name: values.to(logprobs.device) for name, values in p.items()}
    advantages = p["token_advantages" if per_token else "sequence_advantages"]
    return sequence_policy_loss(
        logprobs, p["old_logprobs"], p["mask"], p["cu_seqlens"], advantages, clip_low=3e-4, clip_high=4e-4,
        weights=p["weights"] if weighted else None, num_sequences=11, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dual_clip", [None, 1.0005])
def test_policy_loss_equals_the_cpus(
    dtype: torch.dtype, level: str, per_token: bool, weighted: bool, dual_clip: float | None
) -> None:
    p, stats = pack(LENGTHS, dtype), []

    def operation(x: Tensor) -> tuple[Tensor]:
        loss, found = policy_loss(p, x, per_token, weighted, level=level, dual_clip=dual_clip)
        stats.append(found)
        return (loss,)

    upstream = [torch.tensor(0.7, dtype=dtype)]
    ours, theirs = run(operation, DEVICE, [p["logprobs"]], upstream), run(operation, "cpu", [p["logprobs"]], upstream)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0], theirs[0], rtol=8 * epsilon, atol=epsilon * 1e-2)
    torch.testing.assert_close(ours[1], theirs[1], rtol=8 * epsilon, atol=epsilon * 1e-6)
    torch.testing.assert_close(stats[0].log_ratio.cpu(), stats[1].log_ratio, rtol=epsilon, atol=1e-17)
    for name in ("clipped", "clipped_tokens", "num_response_tokens"):
        assert torch.equal(getattr(stats[0], name).cpu(), getattr(stats[1], name)), name
    assert stats[1].clipped.any() and not stats[1].clipped.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sequence_mean_equals_the_cpus(dtype: torch.dtype) -> None:
    p = pack(LENGTHS, dtype)

    def operation(x: Tensor) -> tuple[Tensor]:
        return (sequence_mean(x, p["mask"].to(x.device), p["cu_seqlens"].to(x.device), num_sequences=11),)

    ours, theirs = (run(operation, d, [p["logprobs"]], [torch.tensor(0.3, dtype=dtype)]) for d in (DEVICE, "cpu"))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_more_sequences_than_a_grid_once_had() -> None:
    lengths = [3] * 70_000
    p = pack(lengths, torch.float64)
    ours, theirs = (policy_loss(p, p["logprobs"].to(d), False, False) for d in (DEVICE, "cpu"))
    torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=1e-12, atol=0)
    assert torch.equal(ours[1].clipped_tokens.cpu(), theirs[1].clipped_tokens)
    torch.testing.assert_close(ours[1].log_ratio.cpu(), theirs[1].log_ratio, rtol=1e-14, atol=1e-18)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_order_of_sequences_changes_no_bit(level: str) -> None:
    lengths = [300, 1, 17, 0, 256, 64, 700, 33, 5, 90]
    p = pack(lengths, torch.float32, behind=0)
    loss, stats = policy_loss(p, p["logprobs"].to(DEVICE), False, False, level=level)
    for seed in range(5):
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        moved = torch.cat([torch.arange(*p["cu_seqlens"][i : i + 2].tolist()) for i in order.tolist()])
        other = {name: values[moved] for name, values in p.items() if values.numel() == moved.numel()}
        other["cu_seqlens"] = torch.tensor([0, *[lengths[i] for i in order.tolist()]]).cumsum(0)
        other["sequence_advantages"] = p["sequence_advantages"][order]
        loss_2, stats_2 = policy_loss(other, other["logprobs"].to(DEVICE), False, False, level=level)
        assert torch.equal(loss_2, loss)
        assert torch.equal(stats_2.log_ratio.cpu(), stats.log_ratio.cpu()[order])


# -- Streams, graphs, waiting, repeating --------------------------------------------------------------------------


class Step:
    """Every operation, forward and backward, from tensors that stay where they are."""

    def __init__(self) -> None:
        p = {name: values.to(DEVICE) for name, values in pack([70, 0, 26], torch.float32, behind=4).items()}
        self.pack = p
        self.targets = targets_of(100, 4001).to(DEVICE)
        self.leaves = {
            "logits": random(100, 4001, dtype=torch.bfloat16, scale=3.0).to(DEVICE),
            "hidden": random(100, 64, dtype=torch.bfloat16, seed=1).to(DEVICE),
            "weight": random(4001, 64, dtype=torch.bfloat16, scale=0.2, seed=2).to(DEVICE),
        }

    def fill(self, seed: int) -> None:
        for values in self.leaves.values():
            values.copy_(random(*values.shape, dtype=values.dtype, scale=0.3, seed=seed))

    def __call__(self) -> list[Tensor]:
        p, leaves = self.pack, {name: values.detach().requires_grad_() for name, values in self.leaves.items()}
        logprobs, entropy = token_logprobs(leaves["logits"], self.targets)
        others, _ = linear_logprobs(leaves["hidden"], leaves["weight"], self.targets)
        loss, stats = sequence_policy_loss(
            logprobs, others.detach(), p["mask"], p["cu_seqlens"], p["sequence_advantages"], clip_low=0.2,
            clip_high=0.27,
        )  # fmt: skip
        bonus = sequence_mean(entropy + others, p["mask"], p["cu_seqlens"])
        total = loss + 0.01 * bonus
        return [total.detach(), stats.log_ratio, *torch.autograd.grad(total, list(leaves.values()))]


def test_run_against_run_is_bitwise_equal() -> None:
    step = Step()
    first = step()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(step(), first, strict=True))


def test_nothing_waits_for_the_device() -> None:
    step = Step()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stream_other_than_the_default_one() -> None:
    """The inputs come late, on that stream: a kernel on another one would read what was there before."""
    step, stream = Step(), torch.cuda.Stream()
    step.fill(21)
    expected = step()
    new = {name: values.clone() for name, values in step.leaves.items()}
    step.fill(22)
    step()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # cycles: a quarter of a second
        for name, values in step.leaves.items():
            values.copy_(new[name])
        results = step()
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_a_cuda_graph_replays_with_new_inputs() -> None:
    step, graph, stream = Step(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (31, 32):
        step.fill(seed)
        expected = step()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))
    assert torch.isfinite(captured[0]) and captured[0] != 0
