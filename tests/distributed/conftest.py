from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """ranks(n): a pool of n processes, shared by all distributed tests."""
    pools: dict[int, RankPool] = {}
    yield lambda n: pools.setdefault(n, RankPool(n))
    for pool in pools.values():
        pool.close()
