"""Weights from every training layout to real servers of TP1 and TP2, over every transport.

After an update a server must hold, parameter by parameter, what a server of the same layout holds that loaded the same
weights from a Hugging Face folder which transformers wrote; and its log-probabilities must be the trainer's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.rollout.sglang.client import ServerClient, open_session
from gspo_megatron.rollout.sglang.manager import ServerManager
from tests.distributed.rank_pool import RankPool
from tests.system.sglang_setup import sglang_python, write_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

LAYOUTS: dict[str, dict[str, int]] = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"data": 2, "expert": 2},
    "TP2xEP2": {"tensor": 2, "expert": 2},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
    "PP2xVPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "ETP2": {"tensor": 2, "expert_tensor": 2},
    "DP2": {"data": 2},
    "one rank": {},
}
TRANSPORTS = ("distributed", "tensor", "disk")
# What is not slow: four layouts over the first transport, and each other transport from one of them.
IN_CI = ("TP2xEP2", "PP2xVPP2", "DP2", "one rank")
CELLS = [
    pytest.param(layout, transport, id=f"{name}-{transport}", marks=[pytest.mark.slow] if is_slow else [])
    for name, layout in LAYOUTS.items()
    for transport in TRANSPORTS
    for is_slow in [name not in IN_CI if transport == TRANSPORTS[0] else name != "TP2xEP2"]
]
BUCKET_MB = 1  # the model has 1.6 MB: several buckets, several senders


def size(layout: dict[str, int]) -> int:
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)


def ask(address: ServerAddress, call: Callable[[ServerClient], Any]) -> Any:
    async def run() -> Any:
        async with open_session() as session:
            return await call(ServerClient(address, session, request_timeout_s=120, update_timeout_s=120))

    return asyncio.run(run())


def checksums(address: ServerAddress) -> list[dict[str, str]]:
    return [rank["checksums"] for rank in ask(address, lambda client: client.checksums([]))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The weights that servers start with, and those that are trained."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, seed=i, layers=4) for i, name in enumerate(("start", "trained"))}


def started(model: Path, logs: Path, **settings: Any) -> ServerManager:
    return ServerManager(SGLangConfig(python=str(sglang_python()), **settings), model, "float32", logs)


@pytest.fixture(scope="module")
def fresh(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    """By TP: checksums of a server that loaded the trained weights from their folder."""
    found = {}
    for tensor in (1, 2):
        with started(models["trained"], tmp_path_factory.mktemp("logs"), tensor=tensor) as manager:
            [address] = manager.start()
            found[tensor] = checksums(address)
    return found


@pytest.fixture(scope="module")
def servers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, ServerAddress]]:
    """By TP: a server that starts with other weights."""
    with (
        started(models["start"], tmp_path_factory.mktemp("logs"), tensor=1) as one,
        started(models["start"], tmp_path_factory.mktemp("logs"), tensor=2) as two,
    ):
        yield {1: one.start()[0], 2: two.start()[0]}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    pools = {n: RankPool(n) for n in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


class Stage:
    """Servers, models and ranks of one test."""

    def __init__(
        self,
        models: dict[str, Path],
        fresh: dict[int, list[dict[str, str]]],
        servers: dict[int, ServerAddress],
        pools: dict[int, RankPool],
        folder: Path,
    ) -> None:
        self.models, self.fresh, self.servers, self.pools, self.folder = models, fresh, servers, pools, folder

    def reset(self) -> None:
        """Give the servers the weights that they started with, from disk, and make sure that they have them."""
        for tensor, address in self.servers.items():
            ask(address, lambda client: client.resume())
            ask(address, lambda client: client.update_from_disk(str(self.models["start"]), 0))
            pairs = list(zip(checksums(address), self.fresh[tensor], strict=True))
            assert len(pairs) == tensor
            for now, trained in pairs:
                assert now.keys() == trained.keys()
                assert all(now[name] != trained[name] for name in now)

    def update(self, layout: dict[str, int], transport: str, sabotage: str = "", **settings: Any) -> list[Any]:
        sglang = {
            "addresses": ",".join(a.url for a in self.servers.values()),
            "transport": transport,
            "bucket_mb": BUCKET_MB,
            "check": "full",
            "probe_prompts": 2,  # the more tokens, the likelier one for which two experts are a tie in float32
            "update_timeout_s": 30.0,
            "retries": 0,
        } | settings
        return self.pools[size(layout)].run(
            "tests.system.update_cases:update",
            layout=layout,
            folder=str(self.models["trained"]),
            run_folder=str(self.folder),
            sglang=sglang,
            sabotage=sabotage,
        )


@pytest.fixture
def stage(
    models: dict[str, Path],
    fresh: dict[int, list[dict[str, str]]],
    servers: dict[int, ServerAddress],
    pools: dict[int, RankPool],
    tmp_path: Path,
) -> Stage:
    made = Stage(models, fresh, servers, pools, tmp_path)
    made.reset()
    return made


@pytest.mark.parametrize(("layout", "transport"), CELLS)
def test_servers_hold_the_trainers_weights_and_say_what_it_says(
    stage: Stage, layout: dict[str, int], transport: str
) -> None:
    results = stage.update(layout, transport)
    for tensor, address in stage.servers.items():
        assert checksums(address) == stage.fresh[tensor], f"TP{tensor}"
        # The run's own name, and the number.
        assert re.fullmatch("[0-9a-f]{8}-0", ask(address, lambda client: client.model_info())["weight_version"])
    assert results[0]["steps"] > 1
    assert len({r["probe"] for r in results}) == 1, "every rank knows the same gap"
    assert results[0]["probe"] <= 1e-5
    if transport != "tensor":
        assert sum(r["sent_bytes"] for r in results) == results[0]["num_bytes"], "each tensor is sent once"
    assert not list(stage.folder.glob("weights/**/*.safetensors")), "no weights stay on disk"


@pytest.mark.parametrize("layout", ["EP2", "one rank"])
def test_a_wrong_mapping_is_seen_by_the_probe_and_by_a_fresh_server(stage: Stage, layout: str) -> None:
    """Two experts swapped, and the trainer's own checksums left out."""
    results = stage.update(LAYOUTS[layout], "distributed", sabotage="mapping", check="off")
    assert results[0]["probe"] > 1e-3
    for tensor, address in stage.servers.items():
        for now, expected in zip(checksums(address), stage.fresh[tensor], strict=True):
            wrong = {name for name in now if now[name] != expected[name]}
            assert wrong == {"model.layers.0.mlp.experts.w2_weight"}


def test_a_wrong_mapping_is_seen_by_the_trainers_checksums(stage: Stage) -> None:
    """They place an expert by its number, whatever name it is sent under."""
    with pytest.raises(AssertionError, match=r"1 of 39 parameters are not the trainer's: \S+0\.mlp\.experts\.w2"):
        stage.update(LAYOUTS["EP2"], "distributed", sabotage="mapping")


@pytest.mark.parametrize(
    "transport", [t if t == TRANSPORTS[0] else pytest.param(t, marks=pytest.mark.slow) for t in TRANSPORTS]
)
def test_a_bit_flipped_on_the_way_fails_the_update_and_leaves_the_servers_paused(stage: Stage, transport: str) -> None:
    with pytest.raises(AssertionError, match=r"failed 1 times.*parameters are not the trainer's"):
        stage.update(LAYOUTS["EP2"], transport, sabotage="buffer")

    async def generates(client: ServerClient) -> bool:
        request = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}}
        try:
            await asyncio.wait_for(client.generate(request), 2)
        except TimeoutError:
            return False
        return True

    assert [ask(address, generates) for address in stage.servers.values()] == [False, False]


@pytest.mark.slow
def test_weights_are_converted_to_the_servers_dtype(
    models: dict[str, Path], pools: dict[int, RankPool], tmp_path: Path
) -> None:
    """float32 masters to a bfloat16 server: what a server has that loaded the folder in bfloat16."""
    with started(models["trained"], tmp_path / "fresh", dtype="bfloat16") as manager:
        expected = checksums(manager.start()[0])
    with started(models["start"], tmp_path / "updated", dtype="bfloat16") as manager:
        [address] = manager.start()
        assert checksums(address) != expected
        pools[2].run(
            "tests.system.update_cases:update",
            layout=LAYOUTS["TP2xEP2"],
            folder=str(models["trained"]),
            run_folder=str(tmp_path),
            sglang={"addresses": address.url, "check": "full", "retries": 0},
        )
        assert checksums(address) == expected
