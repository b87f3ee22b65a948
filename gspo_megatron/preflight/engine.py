"""Whether the rollout engine can be had: SGLang installed, its ports free, named servers there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gspo_megatron.config import GenerationConfig, SftConfig, SGLangConfig, TrainConfig
from gspo_megatron.errors import UserError
from gspo_megatron.preflight.result import Problems

if TYPE_CHECKING:
    from gspo_megatron.rollout.sglang.address import ServerError
    from gspo_megatron.rollout.sglang.client import ServerClient


def describe_engine(config: TrainConfig | SftConfig) -> str:
    """The engine in words."""
    sglang = config.sglang
    if config.rollout.engine == "embedded":
        return "embedded, not SGLang"
    if sglang.server_addresses:
        where = " and ".join(sglang.server_addresses)
    else:
        count = f"{sglang.servers} server{'s' if sglang.servers > 1 else ''}"
        where = f"{count} of TP{sglang.tensor} started on this machine"
    return f"SGLang, {where}; weights over {sglang.transport}, checksums {sglang.check}"


def unread_engine_settings(config: TrainConfig | SftConfig, *, here: bool = True) -> list[str]:
    """Settings of the other engine that were given, or that do nothing `here`."""
    if config.rollout.engine == "embedded" and config.sglang != SGLangConfig():
        given = [f.name for f in fields(SGLangConfig) if getattr(config.sglang, f.name) != f.default]
        return [f'sglang.{given[0]} is not read with rollout.engine="embedded"; use "sglang", or leave [sglang] out']
    batch_size = config.rollout.batch_size
    if here and config.sglang.colocate and config.rollout.engine == "sglang" and not torch.cuda.is_available():
        return ["sglang.colocate saves no memory without GPUs"]
    if config.rollout.engine == "sglang" and batch_size != GenerationConfig.batch_size:
        return [f'rollout.batch_size={batch_size} is not read with rollout.engine="sglang"; see sglang.max_concurrent']
    return []


def check_engine(config: TrainConfig | SftConfig, problems: Problems, *, here: bool = True) -> None:
    """What would keep the servers from starting or answering. Starts none; asks those that were named, unless the run
    is not to start `here`."""
    if config.rollout.engine != "sglang":
        return
    sglang = config.sglang
    if not here:
        with problems.collect():
            check_server_options(sglang, config.model.path)
        return
    with problems.collect():
        if sglang.server_addresses:
            _check_servers(sglang)
        else:
            _check_start(config)
    with problems.collect():
        if sglang.router:
            _check_router(sglang)


def check_server_options(sglang: SGLangConfig, model_folder: str) -> None:
    """Raise UserError for arguments and degrees that no machine could serve the model with."""
    from gspo_megatron.rollout.sglang.command import check_model, split_arguments

    split_arguments(sglang)
    check_model(sglang, Path(model_folder))


def _check_start(config: TrainConfig | SftConfig) -> None:
    from gspo_megatron.rollout.sglang.api_key import find_api_key
    from gspo_megatron.rollout.sglang.command import check_servers, first_server_gpu
    from gspo_megatron.rollout.sglang.server import check_port

    sglang = config.sglang
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    check_servers(sglang, model_folder=config.model.path, gpus=gpus, first_gpu=first_server_gpu(config))
    find_api_key(sglang)
    for i in range(sglang.servers if sglang.port else 0):
        check_port(sglang.host, sglang.port + i)


def _check_servers(sglang: SGLangConfig) -> None:
    from gspo_megatron.rollout.sglang.address import not_reached

    failed = _ask(sglang, sglang.server_addresses, lambda client: client.model_info())
    if failed:
        raise not_reached(failed)


def _check_router(sglang: SGLangConfig) -> None:
    from gspo_megatron.rollout.sglang.address import not_reached

    if not sglang.server_addresses:
        raise UserError(
            f"sglang.router={sglang.router} does not know the servers that are started here; start them with `serve`, "
            "name them in sglang.addresses and to the router, or leave sglang.router out"
        )
    # It answers 503 when it takes all servers for ill, as it does those that a killed run has left paused.
    failed = [e for e in _ask(sglang, [sglang.router], lambda client: client.health_generate()) if e.status != 503]
    if failed:
        raise not_reached(failed, remedy="start the router, correct sglang.router, or leave it out")


def _ask(
    sglang: SGLangConfig, urls: Sequence[str], call: Callable[[ServerClient], Awaitable[object]]
) -> list[ServerError]:
    """Make the call at every address; what failed."""
    from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError
    from gspo_megatron.rollout.sglang.api_key import find_api_key
    from gspo_megatron.rollout.sglang.pool import ServerPool

    key = find_api_key(sglang)
    pool = ServerPool([ServerAddress(url.rstrip("/"), key) for url in urls], sglang)
    try:
        answers = pool.on_all(call)
    finally:
        pool.close()
    return [answer for answer in answers if isinstance(answer, ServerError)]
