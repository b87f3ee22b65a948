"""A bare receiver: what one rank of a server does with weights, and nothing else.

It speaks as much of SGLang's HTTP as an update needs, so that the trainer's own engine and transport feed it. For each
bucket it receives the flat tensor by broadcast, cuts it and copies every tensor to its place, as SGLang does; it has no
scheduler and no model that computes. /expect announces all buckets of an update at once, so that no HTTP lies between
them; /plain the yardstick, one broadcast of one flat tensor in the same group; /arrived is answered after either.

    python tools/reshard/receiver.py MODEL_FOLDER PORT
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web
from torch.distributed.distributed_c10d import PrefixStore

from gspo_megatron.weights.families import load_fields
from gspo_megatron.weights.server_layout import server_parameters

TIMEOUT = timedelta(seconds=120)
CONTROL = ("pause_generation", "continue_generation", "flush_cache", "begin_weight_update", "end_weight_update")


def join_group(address: str, port: int, rank: int, world_size: int, name: str) -> tuple[dist.Store, Any]:
    """Join as a server's rank does (sglang: init_custom_process_group), without a default group."""
    store = dist.TCPStore(address, port, world_size, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
    prefixed = PrefixStore(f"{name}/", PrefixStore(name, store))
    return store, dist.ProcessGroupGloo(PrefixStore("cpu/", prefixed), rank, world_size, timeout=TIMEOUT)


class Receiver:
    """The parameters of one rank and the groups it is in."""

    def __init__(self, folder: str) -> None:
        family, fields = load_fields(folder)
        specs = [spec for spec in family.specs(fields) if not spec.load_only]
        self.folder = folder
        self.names = [parameter.name for parameter in server_parameters(specs)]
        self.parameters = {
            name: torch.zeros(shape, dtype=torch.bfloat16)
            for spec in specs
            for name, shape in zip(spec.hf, spec.hf_shapes, strict=True)
        }
        self.groups: dict[str, tuple[dist.Store, Any]] = {}
        self.plain = torch.zeros(sum(2 * p.numel() for p in self.parameters.values()), dtype=torch.uint8)
        self.version = "default"  # what the weights are called
        self.turn = asyncio.Lock()  # a server takes one bucket at a time

    def receive(self, body: dict[str, Any]) -> None:
        """One bucket."""
        sizes = [torch.Size(shape).numel() * 2 for shape in body["shapes"]]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        broadcast(self.groups[body["group_name"]][1], flat)
        for name, piece in zip(body["names"], flat.split(sizes), strict=True):
            target = self.parameters[name]
            target.copy_(piece.view(target.dtype).view(target.shape))

    def receive_all(self, buckets: list[dict[str, Any]]) -> None:
        """The buckets of an update, announced before."""
        for bucket in buckets:
            self.receive(bucket)

    def receive_plain(self, body: dict[str, Any]) -> None:
        """The yardstick, into memory that is in use already."""
        backend = self.groups[body["group_name"]][1]
        broadcast(backend, self.plain[: body["nbytes"]])
        backend.barrier().wait()

    def join(self, body: dict[str, Any]) -> None:
        """Become a member of the group."""
        where = (body["master_address"], body["master_port"], body["rank_offset"], body["world_size"])
        self.groups[body["group_name"]] = join_group(*where, body["group_name"])


def broadcast(backend: Any, flat: torch.Tensor) -> None:
    """From rank 0 of a group."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    backend.broadcast([flat], options).wait()


def application(receiver: Receiver) -> web.Application:
    """The HTTP side."""
    done = {"success": True, "message": ""}

    async def control(request: web.Request) -> web.Response:
        return web.json_response(done)

    async def name(request: web.Request) -> web.Response:
        receiver.version = (await request.json())["new_version"]
        return web.json_response(done)

    async def model(request: web.Request) -> web.Response:
        return web.json_response({"model_path": receiver.folder, "weight_version": receiver.version})

    async def server(request: web.Request) -> web.Response:
        return web.json_response({"tp_size": 1, "device": "cpu", "dtype": "bfloat16", "version": "bare receiver"})

    async def checksums(request: web.Request) -> web.Response:
        return web.json_response({"ranks": [{"checksums": dict.fromkeys(receiver.names, "")}]})

    async def join(request: web.Request) -> web.Response:
        await asyncio.to_thread(receiver.join, await request.json())
        return web.json_response(done)

    async def leave(request: web.Request) -> web.Response:
        receiver.groups.pop((await request.json())["group_name"])
        return web.json_response(done)

    async def update(request: web.Request) -> web.Response:
        body = await request.json()
        async with receiver.turn:
            await asyncio.to_thread(receiver.receive, body)
        return web.json_response(done)

    running: list[asyncio.Task[None]] = []

    async def plain(request: web.Request) -> web.Response:
        running.append(asyncio.create_task(asyncio.to_thread(receiver.receive_plain, await request.json())))
        return web.json_response(done)

    async def expect(request: web.Request) -> web.Response:
        running.append(asyncio.create_task(asyncio.to_thread(receiver.receive_all, await request.json())))
        return web.json_response(done)

    async def arrived(request: web.Request) -> web.Response:
        while running:
            await running.pop(0)
        return web.json_response(done)

    app = web.Application(client_max_size=2**28)
    app.add_routes([web.post(f"/{path}", control) for path in CONTROL])
    app.add_routes([web.post("/update_weight_version", name)])
    app.add_routes([web.get("/model_info", model), web.get("/server_info", server)])
    app.add_routes([web.post("/weights_checker", checksums), web.post("/plain", plain)])
    app.add_routes([web.post("/expect", expect), web.post("/arrived", arrived)])
    app.add_routes([web.post("/init_weights_update_group", join), web.post("/destroy_weights_update_group", leave)])
    app.add_routes([web.post("/update_weights_from_distributed", update)])
    return app


def main() -> None:
    folder, port = sys.argv[1:]
    torch.set_num_threads(1)
    web.run_app(application(Receiver(folder)), host="127.0.0.1", port=int(port), print=lambda line: None)


if __name__ == "__main__":
    main()
