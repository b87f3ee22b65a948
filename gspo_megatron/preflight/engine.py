"""Whether the rollout engine can be had: SGLang installed, its ports free, named servers there."""

from __future__ import annotations

from dataclasses import fields

import torch

from gspo_megatron.config import GenerationConfig, SftConfig, SGLangConfig, TrainConfig
from gspo_megatron.preflight.result import Problems


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


def unread_engine_settings(config: TrainConfig | SftConfig) -> list[str]:
    """Settings of the other engine that were given."""
    if config.rollout.engine == "embedded" and config.sglang != SGLangConfig():
        given = [f.name for f in fields(SGLangConfig) if getattr(config.sglang, f.name) != f.default]
        return [f'sglang.{given[0]} is not read with rollout.engine="embedded"; use "sglang", or leave [sglang] out']
    batch_size = config.rollout.batch_size
    if config.sglang.colocate and config.rollout.engine == "sglang" and not torch.cuda.is_available():
        return ["sglang.colocate saves no memory without GPUs"]
    if config.rollout.engine == "sglang" and batch_size != GenerationConfig.batch_size:
        return [f'rollout.batch_size={batch_size} is not read with rollout.engine="sglang"; see sglang.max_concurrent']
    return []


def check_engine(config: TrainConfig | SftConfig, problems: Problems) -> None:
    """What would keep the servers from starting or answering. Starts none; asks those that were named."""
    if config.rollout.engine != "sglang":
        return
    with problems.collect():
        if config.sglang.server_addresses:
            _ask_servers(config)
        else:
            _check_start(config)


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


def _ask_servers(config: TrainConfig | SftConfig) -> None:
    from gspo_megatron.rollout.sglang.address import ServerAddress, ServerError, not_reached
    from gspo_megatron.rollout.sglang.api_key import find_api_key
    from gspo_megatron.rollout.sglang.pool import ServerPool

    key = find_api_key(config.sglang)
    pool = ServerPool([ServerAddress(url, key) for url in config.sglang.server_addresses], config.sglang)
    try:
        answers = pool.on_all(lambda client: client.model_info())
    finally:
        pool.close()
    failed = [answer for answer in answers if isinstance(answer, ServerError)]
    if failed:
        raise not_reached(failed)
