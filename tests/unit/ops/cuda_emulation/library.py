"""The CUDA sources compiled for the CPU, called with torch tensors: csrc/launchers.h in ctypes."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = Path(__file__).parents[4] / "csrc"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_P, _I, _L, _D, _B = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_bool
Matrix = _structure("Matrix", data=_P, dtype=_I, rows=_L, columns=_L, stride=_L)
ShardArguments = _structure("Shard", start=_L, width=_L, inverse_temperature=_D)
Statistics = _structure("Statistics", max=_P, sum_exp=_P, sum_x_exp=_P, target=_P)
Rows = _structure("Rows", shift=_P, log_sum=_P, mean=_P)
Pack = _structure("Pack", num_tokens=_L, num_sequences=_L, response_mask=_P, cu_seqlens=_P)
LogitsStats = _structure("LogitsStats", logits=Matrix, targets=_P, shard=ShardArguments, accumulate=_B, out=Statistics)
MergeStats = _structure("MergeStats", num_rows=_L, targets=_P, shard=ShardArguments, local=Statistics, max=_P, sums=_P)
FinishStats = _structure(
    "FinishStats", num_rows=_L, targets=_P, first_target=_L, end_target=_L, max=_P, sums=_P, dtype=_I, logprobs=_P,
    entropy=_P, rows=Rows,
)  # fmt: skip
LogitsBackward = _structure(
    "LogitsBackward", logits=Matrix, out=Matrix, targets=_P, shard=ShardArguments, rows=Rows, grad_dtype=_I,
    grad_logprobs=_P, grad_entropy=_P,
)  # fmt: skip
SequenceSums = _structure("SequenceSums", pack=Pack, dtype=_I, values=_P, subtrahend=_P, sums=_P, num_tokens=_P)
SequenceFill = _structure("SequenceFill", pack=Pack, scale=_P, dtype=_I, out=_P)
PolicyLoss = _structure(
    "PolicyLoss", pack=Pack, dtype=_I, logprobs=_P, old_logprobs=_P, advantages=_P, advantage_per_token=_B, weights=_P,
    token_level=_B, clip_low=_D, clip_high=_D, dual_clip=_D, num_global=_D, sums=_P, sums_are_given=_B, gradient=_P,
    terms=_P, loss=_P, log_ratio=_P, clipped_tokens=_P, num_clipped=_P, num_response_tokens=_P,
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """The columns of the softmax in one matrix of logits."""

    start: int
    width: int
    temperature: float = 1.0

    def arguments(self) -> ctypes.Structure:
        return ShardArguments(self.start, self.width, 1 / self.temperature)


def _address(values: Tensor | None) -> int | None:
    assert values is None or values.is_contiguous()
    return None if values is None else values.data_ptr()


def _matrix(values: Tensor) -> ctypes.Structure:
    return Matrix(values.data_ptr(), DTYPES[values.dtype], *values.shape, values.stride(0))


def _statistics(values: Tensor) -> ctypes.Structure:
    return Statistics(*(_address(row) for row in values))


def _pack(response_mask: Tensor, cu_seqlens: Tensor) -> ctypes.Structure:
    return Pack(response_mask.numel(), cu_seqlens.numel() - 1, _address(response_mask), _address(cu_seqlens))


def build(folder: Path) -> Library:
    """Compile csrc/cuda with g++ into the folder."""
    path = folder / "emulated.so"
    sources = [HERE / "operations.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, "-I", HERE, "-I", CSRC, "-o", path, "-x", "c++", *sources], check=True)
    return Library(ctypes.CDLL(str(path)))


class Library:
    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions

    def call(self, name: str, arguments: ctypes.Structure) -> None:
        function = getattr(self._functions, name)
        function.restype = ctypes.c_char_p
        message = function(ctypes.byref(arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    def logits_stats(
        self, logits: Tensor, targets: Tensor, columns: Columns, *, into: Tensor | None = None
    ) -> Tensor:  # [4, T]
        out = torch.full((4, logits.shape[0]), math.nan, dtype=torch.float64) if into is None else into
        arguments = LogitsStats(
            _matrix(logits), _address(targets), columns.arguments(), into is not None, _statistics(out)
        )
        self.call("logits_stats", arguments)
        return out

    def merge_stats(self, local: Tensor, targets: Tensor, columns: Columns, maximum: Tensor) -> Tensor:  # [3, T]
        sums = torch.full((3, targets.numel()), math.nan, dtype=torch.float64)
        arguments = MergeStats(
            targets.numel(),
            _address(targets),
            columns.arguments(),
            _statistics(local),
            _address(maximum),
            _address(sums),
        )
        self.call("merge_stats", arguments)
        return sums

    def finish_stats(
        self, sums: Tensor, targets: Tensor, maximum: Tensor, end_target: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [T], entropies [T], and what backward needs [3, T]."""
        logprobs, entropy = torch.empty(2, targets.numel(), dtype=dtype)
        rows = torch.empty_like(sums)
        arguments = FinishStats(
            targets.numel(), _address(targets), 0, end_target, _address(maximum), _address(sums), DTYPES[dtype],
            _address(logprobs), _address(entropy), Rows(*(_address(row) for row in rows)),
        )  # fmt: skip
        self.call("finish_stats", arguments)
        return logprobs, entropy, rows

    def logits_backward(
        self,
        out: Tensor,
        logits: Tensor,
        targets: Tensor,
        columns: Columns,
        rows: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        arguments = LogitsBackward(
            _matrix(logits), _matrix(out), _address(targets), columns.arguments(),
            Rows(*(_address(row) for row in rows)), DTYPES[grad_logprobs.dtype], _address(grad_logprobs),
            _address(grad_entropy),
        )  # fmt: skip
        self.call("logits_backward", arguments)

    def sequence_sums(
        self, values: Tensor, subtrahend: Tensor | None, response_mask: Tensor, cu_seqlens: Tensor
    ) -> Tensor:  # [2, S]
        sums = torch.full((2, cu_seqlens.numel() - 1), math.nan, dtype=torch.float64)
        arguments = SequenceSums(
            _pack(response_mask, cu_seqlens), DTYPES[values.dtype], _address(values), _address(subtrahend),
            _address(sums[0]), _address(sums[1]),
        )  # fmt: skip
        self.call("sequence_sums", arguments)
        return sums

    def sequence_fill(
        self, scale: Tensor, response_mask: Tensor, cu_seqlens: Tensor, dtype: torch.dtype
    ) -> Tensor:  # [T]
        out = torch.full(response_mask.shape, math.nan, dtype=dtype)
        pack = _pack(response_mask, cu_seqlens)
        self.call("sequence_fill", SequenceFill(pack, _address(scale), DTYPES[dtype], _address(out)))
        return out

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        response_mask: Tensor,
        cu_seqlens: Tensor,
        advantages: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None = None,
        num_sequences: int | None = None,
        level: str = "sequence",
        weights: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Arguments as in `ops.sequence_policy_loss`; sums [2, S] as if other ranks had added to them."""
        tokens, sequences = logprobs.numel(), cu_seqlens.numel() - 1
        out = {
            "sums": torch.full((2, sequences), math.nan, dtype=torch.float64) if sums is None else sums,
            "gradient": torch.full((tokens,), math.nan, dtype=logprobs.dtype),
            "terms": torch.full((sequences,), math.nan, dtype=torch.float64),
            "loss": torch.full((), math.nan, dtype=torch.float64),
            "log_ratio": torch.full((sequences,), math.nan, dtype=logprobs.dtype),
            "clipped_tokens": torch.ones(tokens, dtype=torch.bool),
            "num_clipped": torch.full((sequences,), -1),
            "num_response_tokens": torch.full((sequences,), -1),
        }
        arguments = PolicyLoss(
            pack=_pack(response_mask, cu_seqlens),
            dtype=DTYPES[logprobs.dtype],
            logprobs=_address(logprobs),
            old_logprobs=_address(old_logprobs),
            advantages=_address(advantages),
            advantage_per_token=advantages.numel() != sequences,
            weights=_address(weights),
            token_level=level == "token",
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=math.inf if dual_clip is None else dual_clip,
            num_global=sequences if num_sequences is None else num_sequences,
            sums_are_given=sums is not None,
            **{name: _address(values) for name, values in out.items()},
        )
        self.call("policy_loss", arguments)
        return out
