"""Stand-in for the package `sgl_kernel` (on PyPI: sglang-kernel), whose wheels hold CUDA binaries only.

SGLang's CPU path imports it all the same. The one function that this path calls is here, in plain torch; every other
name can be imported, and raises when it is called. SGLang takes its kernels for Intel AMX where
`torch.ops.sgl_kernel.convert_weight_packed` exists; here no such operation is registered, so it stays on plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor

__version__ = "0+cpu_stand_in"


def assign_req_to_token_pool_cpu(
    request_indices: Tensor,  # [requests] rows of the table
    request_to_token: Tensor,  # [rows, positions] cache slot of each token of a request
    starts: Tensor,  # [requests] first new position
    ends: Tensor,  # [requests] one past the last new position
    slots: Tensor,  # [sum(ends - starts)] cache slots of the new tokens, request by request
    max_positions: int,  # the table's width, which the table itself says too
) -> None:
    """Enter the cache slots of each request's new tokens into the table."""
    first = 0
    for row, start, end in zip(request_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
        request_to_token[row, start:end] = slots[first : first + end - start]
        first += end - start


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU stand-in: this model or option needs SGLang on a GPU")

    missing.__name__ = name
    return missing
