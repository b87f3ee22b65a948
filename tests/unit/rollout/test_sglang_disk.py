"""Weights through a folder: what servers find there, and what stays of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from fake_sglang_server import FakeServer

from gspo_megatron.config import SGLangConfig
from gspo_megatron.rollout.sglang.address import ServerError
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.transports.disk import DiskTransport
from gspo_megatron.types import NamedTensor
from gspo_megatron.weights.gather import FlatBucket

PLAN: Any = SimpleNamespace(specs=[])
COMPANIONS = ["config.json", "tokenizer.json"]


class DiskServer(FakeServer):
    """Calls its model by the folder that it has loaded, as SGLang does."""

    def __init__(self) -> None:
        super().__init__()
        self.model_path = ""
        self.found: list[list[str]] = []  # at each update
        self.refuses = False
        self.answers["/update_weights_from_disk"] = self._load
        self.answers["/weights_checker"] = lambda _: web.json_response({"success": True, "ranks": [{"checksums": {}}]})

    def _load(self, body: Any) -> web.Response:
        self.found.append(names(Path(body["model_path"])))
        if not self.refuses:
            self.model_path = body["model_path"]
        return web.json_response({"success": not self.refuses, "message": "said no"})


def test_the_same_version_can_be_handed_over_twice(pool: ServerPool, model: Path, servers: list[DiskServer]) -> None:
    transport = transport_of(pool, model, servers_stay=True)
    for _ in range(2):
        update(transport, 1)
    assert [len(server.found) for server in servers] == [2, 2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def servers() -> Iterator[list[DiskServer]]:
    made = [DiskServer(), DiskServer()]
    yield made
    for server in made:
        server.close()


@pytest.fixture
def pool(servers: list[DiskServer]) -> Iterator[ServerPool]:
    pool = ServerPool([server.address for server in servers], SGLangConfig(update_timeout_s=5.0))
    yield pool
    pool.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in COMPANIONS:
        (folder / name).write_text(json.dumps({"from": name}))
    (folder / "notes.txt").touch()
    return folder


def transport_of(pool: ServerPool, model: Path, *, servers_stay: bool) -> DiskTransport:
    folder = model.parent / "weights" / "run"
    return DiskTransport(pool, rank=0, folder=folder, companions_from=model, timeout_s=5.0, servers_stay=servers_stay)


def update(transport: DiskTransport, version: int) -> None:
    transport.begin(version, None, sends=True)
    flat = torch.zeros(8, dtype=torch.uint8)
    transport.send(FlatBucket(flat, [NamedTensor("a", flat.view(torch.float32))]))
    transport.finish(PLAN)


def test_config_and_tokenizer_stay_where_servers_say_that_their_model_is(
    pool: ServerPool, servers: list[DiskServer], model: Path
) -> None:
    transport = transport_of(pool, model, servers_stay=True)
    for version in range(2):
        update(transport, version)
    transport.close()
    weights = ["model-00000-00000.safetensors", "model.safetensors.index.json"]
    for server in servers:
        assert server.found == [sorted(COMPANIONS + weights)] * 2
        assert names(Path(server.model_path)) == COMPANIONS
    assert names(transport.folder) == [Path(servers[0].model_path).name], "earlier ones are gone"
    assert json.loads((Path(servers[0].model_path) / "config.json").read_text()) == {"from": "config.json"}


def test_both_names_stay_until_no_server_is_called_by_the_older_one(
    pool: ServerPool, servers: list[DiskServer], model: Path
) -> None:
    transport = transport_of(pool, model, servers_stay=True)
    update(transport, 0)
    servers[1].refuses = True
    with pytest.raises(ServerError, match="said no"):
        update(transport, 1)
    assert servers[0].model_path != servers[1].model_path
    assert [names(Path(server.model_path)) for server in servers] == [COMPANIONS] * 2
    servers[1].refuses = False
    transport.reset()
    update(transport, 1)
    assert servers[0].model_path == servers[1].model_path and len(names(transport.folder)) == 1


def test_nothing_stays_where_the_servers_end_with_the_run(pool: ServerPool, model: Path) -> None:
    transport = transport_of(pool, model, servers_stay=False)
    update(transport, 0)
    assert names(transport.folder) == []
    transport.close()
    assert not (model.parent / "weights").exists()
