"""The logic of the CUDA kernels, their own sources run on the CPU, against the definition in float64.

What only a GPU shows (speed, the fast exponential, memory order) is in tests/gpu/test_kernels.py.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.ops import reference
from tests.unit.ops.cuda_emulation.library import Columns, Library, build

INF, NAN = math.inf, math.nan
CLIP: dict[str, Any] = {"clip_low": 3e-4, "clip_high": 4e-4}
# Columns: fewer than a 16-byte load, more than one, and rows long enough for a whole block (32 KiB).
WIDTHS = {
    torch.float64: [1, 13, 301, 4099],
    torch.float32: [3, 70, 1030, 8203],
    torch.bfloat16: [5, 261, 2055, 16405],
    torch.float16: [7, 2300, 16400],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return build(tmp_path_factory.mktemp("emulation"))


def logits_of(rows: int, columns: int, dtype: torch.dtype, *, padding: int = 0, seed: int = 0) -> Tensor:
    """[rows, columns + padding]; NaN in the padding, which must not be read."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns + padding, generator=generator, dtype=torch.float64) * 3).to(dtype)
    logits[:, columns:] = NAN
    return logits


def targets_of(rows: int, columns: int) -> Tensor:
    return torch.arange(rows) * 7919 % columns


def forward(
    library: Library, logits: Tensor, targets: Tensor, columns: Columns, *, stats: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    stats = library.logits_stats(logits, targets, columns) if stats is None else stats
    sums = library.merge_stats(stats, targets, columns, stats[0].contiguous())
    dtype = reference.statistics_dtype(logits)
    return library.finish_stats(sums, targets, stats[0].contiguous(), columns.start + columns.width, dtype)


def upstream(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, rows, generator=generator, dtype=dtype))  # type: ignore[return-value]


def definition(
    logits: Tensor, targets: Tensor, columns: Columns, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and gradient in float64."""
    leaf = logits.double().nan_to_num(nan=0.0, posinf=INF, neginf=-INF).requires_grad_()
    logprobs, entropy = reference.token_logprobs(
        leaf, targets, temperature=columns.temperature, vocab_size=columns.width
    )
    outputs = [(logprobs, grad_logprobs), *([] if grad_entropy is None else [(entropy, grad_entropy)])]
    (gradient,) = torch.autograd.grad([o for o, _ in outputs], leaf, [g.double() for _, g in outputs])
    return logprobs.detach(), entropy.detach(), gradient


@pytest.mark.parametrize(("dtype", "width"), [(d, w) for d, widths in WIDTHS.items() for w in widths], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_equal_the_definition(library: Library, dtype: torch.dtype, width: int, temperature: float) -> None:
    rows, padding = (3 if width > 2000 else 19), 3
    columns = Columns(0, width, temperature)
    logits, targets = logits_of(rows, width, dtype, padding=padding), targets_of(rows, width)
    grads = upstream(rows, reference.statistics_dtype(logits))
    expected = definition(logits, targets, columns, *grads)
    logprobs, entropy, row_values = forward(library, logits, targets, columns)
    exact = dtype == torch.float64
    assert (logprobs - expected[0]).abs().max() <= (1e-13 if exact else 2e-6)
    assert (entropy - expected[1]).abs().max() <= (1e-13 if exact else 2e-6)
    assert logprobs.max() <= 0

    epsilon = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    smallest = 1e-15 if exact else 1e-8  # of the definition's own 1 - p; of float16, and of terms that cancel
    for grad_entropy in (grads[1], None):
        gradient = definition(logits, targets, columns, grads[0], grad_entropy)[2]
        out = torch.full_like(logits, NAN)
        library.logits_backward(out, logits, targets, columns, row_values, grads[0], grad_entropy)
        norm = gradient.norm(dim=1)
        assert ((out.double() - gradient).norm(dim=1) <= epsilon * norm + smallest).all()
        assert torch.equal(out[:, width:], torch.zeros(rows, padding, dtype=dtype))
        inplace = logits.clone()
        library.logits_backward(inplace, inplace, targets, columns, row_values, grads[0], grad_entropy)
        assert torch.equal(inplace, out)


@pytest.mark.parametrize("width", [70, 8203])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_in_half_precision_of_float32_logits(library: Library, dtype: torch.dtype, width: int) -> None:
    columns = Columns(0, width)
    logits, targets = logits_of(4, width, torch.float32), targets_of(4, width)
    grads = upstream(4, torch.float32)
    *_, rows = forward(library, logits, targets, columns)
    whole, half = torch.empty_like(logits), torch.empty_like(logits, dtype=dtype)
    library.logits_backward(whole, logits, targets, columns, rows, *grads)
    library.logits_backward(half, logits, targets, columns, rows, *grads)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, targets[:, None], False)
    assert torch.equal(half[others], whole.to(dtype)[others])
    at_target = half[~others].float(), whole[~others]  # rounded from float64
    assert ((at_target[0] - at_target[1]).abs() <= torch.finfo(dtype).eps * at_target[1].abs()).all()


def test_other_pairs_of_dtypes_are_refused(library: Library) -> None:
    logits, targets, columns = logits_of(1, 8, torch.bfloat16), targets_of(1, 8), Columns(0, 8)
    grads, rows = upstream(1, torch.float32), torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="logits_backward: the gradient must have"):
        library.logits_backward(logits.float(), logits, targets, columns, rows, *grads)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 520), (torch.bfloat16, 16408), (torch.float32, 1024)])
def test_a_row_has_one_result_wherever_it_lies(library: Library, dtype: torch.dtype, width: int) -> None:
    """Aligned or not, first row or last, in a matrix with gaps between its rows or without."""
    columns, rows = Columns(0, width), 37 if width < 2000 else 5
    data, target = logits_of(1, width, dtype), targets_of(1, width)
    grads = [g[:1].expand(rows).contiguous() for g in upstream(1, torch.float32)]
    results = []
    for offset, stride in [(0, width), (0, width + 16), (3, width), (0, width + 1)]:
        memory = torch.full((rows * stride + offset + 16,), NAN, dtype=dtype)
        logits = torch.as_strided(memory, (rows, width), (stride, 1), offset)
        logits.copy_(data.expand(rows, width))
        targets = target.expand(rows).contiguous()
        stats = library.logits_stats(logits, targets, columns)
        logprobs, entropy, row_values = forward(library, logits, targets, columns, stats=stats)
        before = memory.clone()
        library.logits_backward(logits, logits, targets, columns, row_values, *grads)
        gradient = logits.clone()
        logits.copy_(data.expand(rows, width))
        assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8)), "wrote outside its rows"
        results += [(*stats[:, i], logprobs[i], entropy[i], gradient[i]) for i in (0, 1, rows - 1)]
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("width", [40, 8300])
def test_logits_that_are_not_finite(library: Library, width: int) -> None:
    low = torch.finfo(torch.float32).min
    logits = logits_of(9, width, torch.float32)
    logits[0, ::2] = -INF
    logits[1, : width // 2] = -INF  # whole batches without a column above -inf
    logits[2] = -INF
    logits[2, 5] = 1.0  # certain
    logits[3] = -INF  # impossible
    logits[4, :-1] = low  # what masked logits are often set to
    logits[5, 7] = NAN
    logits[6] = -INF
    logits[6, 7] = NAN
    logits[7, 3] = INF
    logits[8] = low
    targets = torch.tensor([1, width - 1, 5, 0, width - 1, 0, 0, 3, 9])
    columns = Columns(0, width)
    grads = upstream(9, torch.float32)
    logprobs, entropy, rows = forward(library, logits, targets, columns)
    gradient = torch.empty_like(logits)
    library.logits_backward(gradient, logits, targets, columns, rows, *grads)
    for bad in (5, 6, 7):
        assert logprobs[bad].isnan() and entropy[bad].isnan() and gradient[bad].isnan().any()
    good = [0, 1, 2, 3, 4, 8]
    expected = definition(logits[good], targets[good], columns, grads[0][good], grads[1][good])
    torch.testing.assert_close(logprobs[good].double(), expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy[good].double(), expected[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient[good].double(), expected[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_gradient_are_zero_whatever_they_hold(library: Library, dtype: torch.dtype) -> None:
    width = 30
    logits, targets = logits_of(6, width, dtype, padding=2), targets_of(6, width)
    logits[1::2] = NAN
    grads = tuple(g.index_fill(0, torch.tensor([1, 3, 5]), 0.0) for g in upstream(6, torch.float32))
    *_, rows = forward(library, logits, targets, Columns(0, width))
    library.logits_backward(logits, logits, targets, Columns(0, width), rows, *grads)
    assert torch.equal(logits[1::2], torch.zeros(3, width + 2, dtype=dtype))
    assert torch.isfinite(logits).all() and (logits[::2, :width] != 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_almost_certain_token_keeps_the_digits_of_one_minus_p(library: Library, dtype: torch.dtype) -> None:
    """Terms of 1e-11 beside the maximum's 1 are lost if they meet it in float32."""
    width = 300
    logits, targets = torch.full((2, width), -1.5, dtype=dtype), torch.tensor([123, 123])
    logits[:, 123] = 24.0
    grads = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.5])
    columns = Columns(0, width)
    logprobs, _, rows = forward(library, logits, targets, columns)
    expected = definition(logits, targets, columns, *grads)
    assert (logprobs / expected[0] - 1).abs().max() <= 1e-6
    gradient = torch.empty_like(logits)
    library.logits_backward(gradient, logits, targets, columns, rows, *grads)
    assert (gradient.double() / expected[2] - 1).abs().max() <= (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("ends", [[100, 200, 300], [64, 128, 192, 256, 300], [299, 300]], ids=str)
@pytest.mark.parametrize("as_ranks", [False, True])
def test_parts_of_the_vocabulary_equal_the_whole(library: Library, ends: list[int], as_ranks: bool) -> None:
    """Chunks merged into one [4, T], or ranks whose sums are added; with a part of -inf and one of padding."""
    width, rows, temperature = 300, 11, 1.3
    logits, targets = logits_of(rows, width, torch.float64), targets_of(rows, width)
    logits[:, : ends[0]] = -INF
    logits[3] = -INF
    targets[5] = width + 3  # belongs to nobody
    columns = Columns(0, width, temperature)
    whole = forward(library, logits, targets, columns)
    parts = [
        (logits[:, a:b].contiguous(), Columns(a, b - a, temperature)) for a, b in zip([0, *ends], ends, strict=False)
    ]
    parts.append((torch.full((rows, 9), NAN, dtype=torch.float64), Columns(width, 0, temperature)))
    if as_ranks:
        local = [library.logits_stats(part, targets, c) for part, c in parts]
        maximum = torch.stack([s[0] for s in local]).amax(0)
        sums = torch.stack(
            [library.merge_stats(s, targets, c, maximum) for s, (_, c) in zip(local, parts, strict=True)]
        ).sum(0)
        merged = library.finish_stats(sums, targets, maximum, width, torch.float64)
    else:
        stats = library.logits_stats(parts[0][0], targets, parts[0][1])
        for part, c in parts[1:]:
            library.logits_stats(part, targets, c, into=stats)
        merged = forward(library, logits, targets, columns, stats=stats)
    assert whole[0][5].isnan() and whole[0][3] == -INF and whole[1][3] == 0
    for x, y in zip(merged, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12, equal_nan=True)
    grads = upstream(rows, torch.float64)
    gradient = torch.empty_like(logits)
    library.logits_backward(gradient, logits, targets, columns, whole[2], *grads)
    for part, c in parts[:-1]:
        out = torch.empty_like(part)
        library.logits_backward(out, part, targets, c, merged[2], *grads)
        torch.testing.assert_close(out, gradient[:, c.start : c.start + c.width], rtol=0, atol=1e-12)


def test_rows_more_than_two_to_the_31_apart(library: Library) -> None:
    stride, width = 2**31 + 8, 24
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which mmap names from Python 3.13 on
    with mmap.mmap(-1, 2 * (stride + width), flags=flags) as memory:
        flat = torch.frombuffer(memory, dtype=torch.bfloat16)
        logits = torch.as_strided(flat, (2, width), (stride, 1))
        logits.copy_(logits_of(2, width, torch.bfloat16))
        targets, grads = targets_of(2, width), upstream(2, torch.float32)
        columns = Columns(0, width)
        logprobs, _, rows = forward(library, logits, targets, columns)
        expected = definition(logits, targets, columns, *grads)
        assert (logprobs - expected[0]).abs().max() <= 2e-6
        library.logits_backward(logits, logits, targets, columns, rows, *grads)
        assert (logits.double() - expected[2]).norm() <= 2**-8 * expected[2].norm()
        del flat, logits  # views of the memory that is about to be unmapped


# -- Packed sequences ---------------------------------------------------------------------------------------------

LENGTHS = [1, 0, 700, 3, 256, 0, 40]


class Pack:
    def __init__(self, dtype: torch.dtype, lengths: list[int], *, behind: int = 9, spread: float = 4e-4) -> None:
        generator = torch.Generator().manual_seed(2)
        tokens = sum(lengths) + behind
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        self.mask = torch.rand(tokens, generator=generator) < 0.6
        self.mask[0] = False  # the first sequence has no response token
        self.old = -torch.rand(tokens, generator=generator, dtype=dtype)
        self.logprobs = self.old + spread * torch.randn(tokens, generator=generator, dtype=dtype)
        for i, length in enumerate(lengths):  # whole sequences off the clip, in both directions
            start = int(self.cu_seqlens[i])
            self.logprobs[start : start + length] += 2 * spread * (i % 5 - 2)
        self.token_advantages = torch.randn(tokens, generator=generator, dtype=dtype)
        self.advantages = torch.rand(len(lengths), generator=generator, dtype=dtype) + 0.1
        self.advantages[1::2] *= -1
        self.weights = torch.rand(tokens, generator=generator, dtype=dtype)
        self.weights[::5] = 0.0

    def with_nan_under_mask(self) -> Pack:
        for values in (self.logprobs, self.old, self.token_advantages, self.weights):
            values[~self.mask] = NAN
            values[int(self.cu_seqlens[-1]) :] = NAN
        return self


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_fill(library: Library, dtype: torch.dtype) -> None:
    p = Pack(dtype, LENGTHS).with_nan_under_mask()
    sums = library.sequence_sums(p.logprobs, p.old, p.mask, p.cu_seqlens)
    alone = library.sequence_sums(p.logprobs, None, p.mask, p.cu_seqlens)
    scale = torch.randn(len(LENGTHS), dtype=torch.float64)
    filled = library.sequence_fill(scale, p.mask, p.cu_seqlens, dtype)
    expected = torch.zeros_like(filled)
    for i in range(len(LENGTHS)):
        tokens = torch.arange(*p.cu_seqlens[i : i + 2].tolist())
        tokens = tokens[p.mask[tokens]]
        difference = p.logprobs[tokens].double() - p.old[tokens].double()
        torch.testing.assert_close(sums[:, i], torch.tensor([difference.sum(), tokens.numel()]), rtol=0, atol=1e-13)
        torch.testing.assert_close(alone[0, i], p.logprobs[tokens].double().sum(), rtol=1e-14, atol=0)
        expected[tokens] = scale[i].to(dtype)
    assert torch.equal(filled, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dual_clip", [None, 1.0005])
def test_policy_loss_equals_the_definition(
    library: Library, dtype: torch.dtype, level: str, per_token: bool, weighted: bool, dual_clip: float | None
) -> None:
    p = Pack(dtype, LENGTHS).with_nan_under_mask()
    chosen: dict[str, Any] = {
        **CLIP,
        "level": level,
        "dual_clip": dual_clip,
        "num_sequences": 11,
        "weights": p.weights if weighted else None,
    }
    inputs = (p.old, p.mask, p.cu_seqlens, p.token_advantages if per_token else p.advantages)
    leaf = p.logprobs.double().requires_grad_()
    wide: dict[str, Any] = {k: v.double() if isinstance(v, Tensor) else v for k, v in chosen.items()}
    loss, stats = reference.sequence_policy_loss(leaf, *inputs, **wide)
    (gradient,) = torch.autograd.grad(loss, leaf)
    result = library.policy_loss(p.logprobs, *inputs, **chosen)
    epsilon = 1e-14 if dtype == torch.float64 else 1e-7
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result["gradient"].double(), gradient, rtol=epsilon, atol=1e-17)
    torch.testing.assert_close(result["log_ratio"].double(), stats.log_ratio, rtol=epsilon, atol=1e-17)
    assert torch.equal(result["clipped_tokens"], stats.clipped_tokens) and 0 < stats.clipped_tokens.sum() < 500
    assert torch.equal(result["num_clipped"] > 0, stats.clipped)
    assert torch.equal(result["num_response_tokens"], stats.num_response_tokens)
    sums = library.sequence_sums(p.logprobs, p.old, p.mask, p.cu_seqlens)
    assert torch.equal(result["sums"], sums)
    again = library.policy_loss(p.logprobs, *inputs, **chosen, sums=sums)
    assert all(torch.equal(again[name], values) for name, values in result.items())


@pytest.mark.parametrize("side", [0, 1, -1])
def test_a_ratio_at_the_bound_keeps_its_gradient(library: Library, side: int) -> None:
    """Within the resolution of log s on either side of log1p(±clip)."""
    bounds = torch.tensor([math.log1p(CLIP["clip_high"]), math.log1p(-CLIP["clip_low"])], dtype=torch.float64)
    logprobs = bounds if side == 0 else torch.nextafter(bounds, torch.full_like(bounds, side * INF))
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    result = library.policy_loss(
        logprobs,
        torch.zeros(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.bool),
        torch.arange(3),
        advantages,
        **CLIP,
    )
    expected = {0: [False, False], 1: [True, False], -1: [False, True]}[side]
    assert result["clipped_tokens"].tolist() == expected and (result["gradient"] == 0).tolist() == expected


def test_ratios_that_are_not_finite(library: Library) -> None:
    """An infinite ratio counts for nothing without an advantage; with one, and a NaN always, it shows."""
    logprobs = torch.tensor([800.0, 800.0, NAN, 0.1], dtype=torch.float64)
    arguments = (torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool), torch.arange(5))
    idle = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    result = library.policy_loss(logprobs, *arguments, idle, **CLIP)
    assert result["gradient"].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert result["loss"] == pytest.approx(-2 * (1 + CLIP["clip_high"]) / 4, rel=1e-15)
    for advantage, expected in [(-1.0, INF), (1.0, NAN)]:
        result = library.policy_loss(logprobs, *arguments, torch.full((4,), advantage, dtype=torch.float64), **CLIP)
        assert math.isnan(result["loss"]) and result["gradient"][2].isnan()
        assert result["gradient"][0] == (INF if expected == INF else 0.0)
    logprobs[2] = 0.0
    result = library.policy_loss(logprobs, *arguments, torch.full((4,), -1.0, dtype=torch.float64), **CLIP)
    assert result["loss"] == INF


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_order_and_place_of_sequences_change_no_bit(library: Library, level: str) -> None:
    lengths = [300, 1, 17, 0, 256, 64, 700, 33, 5, 90]
    p = Pack(torch.float32, lengths, spread=0.3)
    first = library.policy_loss(
        p.logprobs, p.old, p.mask, p.cu_seqlens, p.advantages, clip_low=0.2, clip_high=0.27, level=level
    )
    plain = {float(first["terms"][torch.randperm(10)].sum()) for _ in range(20)}
    assert len(plain) > 1, "the terms' plain sum depends on the order"
    for seed in range(5):
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
        moved = torch.cat([torch.arange(*p.cu_seqlens[i : i + 2].tolist()) for i in order.tolist()])
        cu_seqlens = torch.tensor([0, *[lengths[i] for i in order.tolist()]]).cumsum(0)
        result = library.policy_loss(
            p.logprobs[moved], p.old[moved], p.mask[moved], cu_seqlens, p.advantages[order], clip_low=0.2,
            clip_high=0.27, level=level,
        )  # fmt: skip
        assert torch.equal(result["loss"], first["loss"])
        assert torch.equal(result["gradient"], first["gradient"][moved])
        assert torch.equal(result["log_ratio"], first["log_ratio"][order])
    torch.testing.assert_close(first["loss"], first["terms"].sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1.0, 1e300])
def test_the_loss_keeps_its_digits_at_any_scale(library: Library, scale: float) -> None:
    advantages = torch.randn(50, dtype=torch.float64) * scale
    zeros, mask = torch.zeros(50, dtype=torch.float64), torch.ones(50, dtype=torch.bool)
    result = library.policy_loss(zeros, zeros, mask, torch.arange(51), advantages, **CLIP)
    assert result["loss"].item() == pytest.approx(-math.fsum(advantages.tolist()) / 50, rel=1e-12)


def test_offsets_outside_the_pack_are_clamped(library: Library) -> None:
    p = Pack(torch.float64, [10, 10, 10], behind=0)
    good = library.policy_loss(p.logprobs, p.old, p.mask, p.cu_seqlens, p.advantages, **CLIP)
    bad_offsets = torch.tensor([-5, 10, 20, 2**40])
    bad = library.policy_loss(p.logprobs, p.old, p.mask, bad_offsets, p.advantages, **CLIP)
    assert all(torch.equal(bad[name], values) for name, values in good.items())
    backwards = torch.tensor([0, 20, 10, 30])
    library.policy_loss(p.logprobs, p.old, p.mask, backwards, p.advantages, **CLIP)  # stays inside its memory
    filled = library.sequence_fill(torch.ones(3, dtype=torch.float64), p.mask, bad_offsets, torch.float64)
    assert torch.equal(filled, p.mask.double())


def test_nothing_to_do(library: Library) -> None:
    none = torch.zeros(0, dtype=torch.float64)
    mask, start = torch.zeros(0, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    assert library.policy_loss(none, none, mask, start, none, **CLIP, num_sequences=4)["loss"] == 0
    assert library.sequence_sums(none, None, mask, start).numel() == 0
    only_padding = library.policy_loss(
        torch.full((5,), NAN), torch.zeros(5), torch.ones(5, dtype=torch.bool), start, torch.zeros(0), **CLIP,
        num_sequences=4,
    )  # fmt: skip
    assert only_padding["loss"] == 0 and not only_padding["clipped_tokens"].any()
    assert torch.equal(only_padding["gradient"], torch.zeros(5))
    empty = library.policy_loss(none, none, mask, torch.zeros(4, dtype=torch.int64), torch.ones(3).double(), **CLIP)
    assert empty["loss"] == 0 and empty["log_ratio"].tolist() == [0.0, 0.0, 0.0]
    no_rows = torch.zeros(0, 8)
    assert library.logits_stats(no_rows, start[:0], Columns(0, 8)).shape == (4, 0)
