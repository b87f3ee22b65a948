"""Process groups and Megatron's parallel state."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from gspo_megatron.device import collective_backend, current_device, seed_everything
from gspo_megatron.groups import ProcessGroups
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy.cpu_adaptation import adapt


def initialize(layout: ParallelLayout, *, seed: int, timeout_s: float) -> ProcessGroups:
    """Join the job (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and build the groups of the layout.

    A collective that takes longer than `timeout_s` raises on every rank. Can be called again, for
    another layout, after Megatron's parallel state was destroyed.
    """
    adapt()
    device = current_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        # With device_id NCCL would make a communicator for every group of Megatron's, used or not: 8 GiB a rank.
        dist.init_process_group(collective_backend(device), timeout=timeout, **_store_of_this_attempt(timeout))
    assert dist.get_world_size() == layout.world_size, (dist.get_world_size(), layout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=timeout_s / 60,  # becomes a timedelta: fractions are exact
        create_gloo_process_groups=False,
    )
    seed_everything(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    groups = _collect(layout, timeout)
    if device.type == "cuda":
        _connect(groups, device)
    return groups


def collective_groups(groups: ProcessGroups) -> list[dist.ProcessGroup]:
    """The groups over which a training step has collectives at this rank: ours, and Megatron's for the exchange of
    tokens, the routers' losses, the gradient norm and embeddings that pipeline stages share."""
    megatron = (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_tensor_and_context_parallel_group(),
        parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        parallel_state.get_expert_tensor_and_model_parallel_group(),
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        parallel_state.get_intra_distributed_optimizer_instance_group(),
        parallel_state.get_embedding_group(check_initialized=False),
    )
    found = [g for g in (*vars(groups).values(), *megatron) if isinstance(g, dist.ProcessGroup) and g.size() > 1]
    return list({id(g): g for g in found}.values())


def _connect(groups: ProcessGroups, device: torch.device) -> None:
    """Have NCCL make the communicators of collectives while memory is free, not amid the first step. Those of
    neighbours in an interleaved pipeline, which send without batching, are made when they first send."""
    for group in collective_groups(groups):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.synchronize(device)


def _store_of_this_attempt(timeout: timedelta) -> dict[str, Any]:
    """Where ranks that torchrun has started meet. It keeps one store for all its restarts, in which gloo would find
    the addresses of ranks that have ended, and wait for them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, world_size, is_master=False, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": world_size}


def _collect(layout: ParallelLayout, timeout: timedelta) -> ProcessGroups:
    """This rank's groups; the ranks are checked against the layout's arithmetic."""
    rank = dist.get_rank()
    replica = None
    for data in range(layout.data):
        group = dist.new_group(layout.replica_ranks(data), timeout=timeout)
        if layout.coordinates(rank).data == data:
            replica = group
    assert replica is not None and dist.group.WORLD is not None
    groups = ProcessGroups(
        layout=layout,
        rank=rank,
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        edp=parallel_state.get_expert_data_parallel_group(),
        replica=replica,
        world=dist.group.WORLD,
    )
    place = layout.coordinates(rank)
    ours = (place.tensor, place.pipeline, place.data, place.expert, place.expert_tensor, place.expert_data)
    theirs = tuple(g.rank() for g in (groups.tp, groups.pp, groups.dp, groups.ep, groups.etp, groups.edp))
    assert ours == theirs, f"rank {rank}: layout says {ours}, Megatron-Core says {theirs}"
    return groups


def shutdown() -> None:
    """Leave the job, dropping every group."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
