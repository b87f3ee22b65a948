"""Both implementations of the operations under the same tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from gspo_megatron import ops

OPERATIONS = ("token_logprobs", "linear_logprobs", "sequence_policy_loss", "sequence_mean")


@pytest.fixture(scope="module", params=["native", "reference"])
def each_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module once with each implementation behind the operations that it imported by name."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            if hasattr(request.module, name):
                bound = partial(getattr(ops, name), implementation=request.param)
                patch.setattr(request.module, name, bound)
        yield request.param
