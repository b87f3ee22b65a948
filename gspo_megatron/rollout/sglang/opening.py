"""From a config to an engine over servers, on every rank: start or find them, see what they serve, choose the way."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch.distributed as dist

from gspo_megatron.config import SftConfig, TrainConfig
from gspo_megatron.device import current_device
from gspo_megatron.errors import UserError
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError, not_reached
from gspo_megatron.rollout.sglang.api_key import find_api_key
from gspo_megatron.rollout.sglang.command import first_server_gpu, split_arguments
from gspo_megatron.rollout.sglang.engine import SGLangEngine
from gspo_megatron.rollout.sglang.generation import check_routes, check_sampling
from gspo_megatron.rollout.sglang.manager import ServerManager
from gspo_megatron.rollout.sglang.pool import ServerPool
from gspo_megatron.rollout.sglang.served_model import ServedModel, check_same_model, read_served_model
from gspo_megatron.rollout.sglang.transports.base import Feed, Meetings, Transport, Turns
from gspo_megatron.rollout.sglang.transports.disk import DiskTransport
from gspo_megatron.rollout.sglang.transports.distributed import DistributedTransport
from gspo_megatron.rollout.sglang.transports.tensor import TensorTransport
from gspo_megatron.rollout.sglang.weight_check import WeightCheck
from gspo_megatron.weights.families import load_fields
from gspo_megatron.weights.server_layout import ServerParameter, server_parameters

_SLACK_S = 60.0  # that ranks wait for one another beyond what its own steps may take
_MOST_CALLS = 4  # of sglang.update_timeout_s each, that one rank makes while others wait for it


@contextlib.contextmanager
def open_sglang(
    config: TrainConfig | SftConfig, groups: ProcessGroups, *, stop_token_ids: tuple[int, ...]
) -> Iterator[SGLangEngine]:
    """The engine of this rank. Collective; servers that are started here end with the context.

    `stop_token_ids` end a response.

    Raises:
        UserError: servers can't be started or reached, or serve another model.
    """
    sglang = config.sglang
    if groups.layout.world_size > 1 and sglang.update_timeout_s >= config.parallel.timeout_s:
        raise UserError(
            f"sglang.update_timeout_s={sglang.update_timeout_s:g} must be below parallel.timeout_s="
            f"{config.parallel.timeout_s:g}, in which ranks wait for one that waits for a server; raise the latter"
        )
    family, fields = load_fields(config.model.path)
    parameters = server_parameters([s for s in family.specs(fields) if not s.load_only])
    start_s = sglang.start_timeout_s * (sglang.retries + 1) + _SLACK_S
    store = _open_store(groups, start_s)
    with contextlib.ExitStack() as stack:
        manager = None
        if groups.rank == 0:
            found, manager = _find_servers(config, stack)
            store.set("servers", "ready")
        store.wait(["servers"])
        # Not through the store: it answers whoever reaches its port, and a key is among what is passed on.
        passed_on: list[Any] = [(found, secrets.token_hex(4)) if groups.rank == 0 else None]
        dist.broadcast_object_list(passed_on, src=0, group=groups.world)
        addresses: list[ServerAddress] = passed_on[0][0]
        run: str = passed_on[0][1]
        layout = groups.layout
        pool = ServerPool(
            addresses,
            sglang,
            share=layout.data,
            first=groups.coordinates.data * len(addresses) // layout.data,
            run=run,
            fields=fields,
        )
        stack.callback(pool.close)
        shared: list[Any] = [None]
        if groups.rank == 0:
            shared = [_look_at_servers(config, pool, parameters, stop_token_ids)]
        dist.broadcast_object_list(shared, src=0, group=groups.world)
        served: list[ServedModel] = shared[0]
        feeds = _feeds(config, groups, addresses)
        transport = _transport(config, groups, pool, served, run=run)
        # A sender that gives up has the time to say so itself.
        turns = Turns(dist.PrefixStore("turns", store), sglang.update_timeout_s + _SLACK_S)
        # At one meeting a server may have been waited for in vain, and then started again.
        meetings = Meetings(
            dist.PrefixStore("meetings", store), layout.world_size, start_s + _MOST_CALLS * sglang.update_timeout_s
        )
        engine = SGLangEngine(
            sglang, groups, pool, served, feeds, transport, turns, meetings, WeightCheck(sglang.check, parameters),
            num_experts=fields.num_experts, manager=manager,
        )  # fmt: skip
        stack.push(lambda kind, *_: engine.close(failed=kind is not None))
        yield engine


def _open_store(groups: ProcessGroups, timeout_s: float) -> dist.Store:
    """A store at rank 0 for all ranks."""
    timeout = timedelta(seconds=timeout_s)
    if groups.layout.world_size == 1:
        store: dist.Store = dist.HashStore()
        store.set_timeout(timeout)
        return store
    port: list[Any] = [None]
    if groups.rank == 0:
        store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = [store.port]
    dist.broadcast_object_list(port, src=0, group=groups.world)
    if groups.rank != 0:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port[0], is_master=False, timeout=timeout)
    return store


def _find_servers(
    config: TrainConfig | SftConfig, stack: contextlib.ExitStack
) -> tuple[list[ServerAddress], ServerManager | None]:
    """Rank 0: the servers that were named, or new ones."""
    sglang = config.sglang
    if sglang.server_addresses:
        key = find_api_key(sglang)
        return [ServerAddress(url, key) for url in sglang.server_addresses], None
    manager = ServerManager(
        sglang,
        config.model.path,
        config.model.dtype,
        Path(config.run.folder) / "servers",
        first_gpu=first_server_gpu(config),
        random_weights=True,  # they are sent the trainer's before they are used
    )
    stack.enter_context(manager)
    return manager.start(), manager


def _look_at_servers(
    config: TrainConfig | SftConfig,
    pool: ServerPool,
    parameters: Sequence[ServerParameter],
    stop_token_ids: tuple[int, ...],
) -> list[ServedModel]:
    """Rank 0: what the servers serve, before anything is sent to them."""
    models = pool.on_all(lambda c: c.model_info())
    infos = pool.on_all(lambda c: c.server_info())
    failed = [a for a in models if isinstance(a, ServerError)] or [a for a in infos if isinstance(a, ServerError)]
    if failed:
        raise not_reached(failed)
    served = []
    for client, model, info in zip(pool.clients, models, infos, strict=True):
        assert isinstance(model, dict) and isinstance(info, dict)
        served.append(read_served_model(client.address, model, info))
        _check_sampling(config, model, info, stop_token_ids)
        if config.sglang.routed_experts:
            check_routes(client.address.url, info)
    for one, model, ranks in zip(served, models, pool.on_all(lambda c: c.checksums([])), strict=True):
        assert isinstance(model, dict)
        if isinstance(ranks, ServerError):
            raise ranks
        names, folder = ranks[0]["checksums"], Path(config.model.path)
        check_same_model(one, model, names, parameters, folder, transport=config.sglang.transport)
    if len({s.dtype for s in served}) > 1:
        said = ", ".join(f"{s.address.url} {str(s.dtype).removeprefix('torch.')}" for s in served)
        raise UserError(f"the servers' weights have different dtypes ({said}); start all with the same --dtype")
    return served


def _check_sampling(
    config: TrainConfig | SftConfig, model: dict[str, Any], info: dict[str, Any], stop_token_ids: tuple[int, ...]
) -> None:
    is_ours = not config.sglang.server_addresses
    check_sampling(
        stop_token_ids,
        preferred=model.get("preferred_sampling_params"),
        server_info=info,
        arguments=split_arguments(config.sglang) if is_ours else (),
        environment=os.environ if is_ours else None,
    )


def _feeds(config: TrainConfig | SftConfig, groups: ProcessGroups, addresses: Sequence[ServerAddress]) -> list[Feed]:
    """All servers from all ranks; through memory, each server from the ranks on its machine."""
    everyone = tuple(range(groups.layout.world_size))
    if config.sglang.transport != "tensor":
        return [Feed(everyone, tuple(addresses))]
    here: list[Any] = [None] * len(everyone)
    dist.all_gather_object(here, [_is_here(a) for a in addresses], group=groups.world)
    ranks_of = {a: tuple(r for r in everyone if here[r][i]) for i, a in enumerate(addresses)}
    for address, ranks in ranks_of.items():
        if not ranks:
            raise UserError(
                f'sglang.transport="tensor" shares memory on one machine, but no training rank runs on that of '
                f'{address.url}; use "distributed"'
            )
    return [
        Feed(ranks, tuple(a for a in addresses if ranks_of[a] == ranks)) for ranks in dict.fromkeys(ranks_of.values())
    ]


def _is_here(address: ServerAddress) -> bool:
    """Whether a server's address is one of this machine."""
    host = urlsplit(address.url).hostname or ""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {a.address.split("%")[0] for of_one in psutil.net_if_addrs().values() for a in of_one}
    return bool(found & own)


def _transport(
    config: TrainConfig | SftConfig,
    groups: ProcessGroups,
    pool: ServerPool,
    served: Sequence[ServedModel],
    *,
    run: str,
) -> Transport:
    """`run`: as in the names of its weights."""
    sglang = config.sglang
    ranks_of = {s.address: s.layout.tensor for s in served}
    if sglang.transport == "distributed":
        on_gpu = {s.on_gpu for s in served}
        device = current_device()
        if on_gpu != {device.type == "cuda"}:
            raise UserError(
                'sglang.transport="distributed" needs servers and trainer both on GPUs or both on CPUs; use "disk"'
            )
        return DistributedTransport(
            pool,
            device=device,
            timeout_s=sglang.update_timeout_s,
            ranks_of=ranks_of,
            master_address=sglang.master_address,
        )
    if sglang.transport == "tensor":
        return TensorTransport(pool, timeout_s=sglang.update_timeout_s, ranks_of=ranks_of)
    # A folder of its own: in one that another run uses, or left when it was killed, its weights would be loaded too.
    folder = Path(sglang.update_folder or Path(config.run.folder) / "weights") / run
    return DiskTransport(
        pool,
        rank=groups.rank,
        folder=folder,
        companions_from=Path(config.model.path),
        timeout_s=sglang.update_timeout_s,
        servers_stay=bool(sglang.server_addresses),
    )
