"""Nodes, ranks and servers of a job, and what is refused, computed without SLURM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config import (
    CheckpointConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SGLangConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.errors import UserError
from gspo_megatron.slurm.plan import Component, JobPlan, Run, Servers, plan_job
from gspo_megatron.slurm.request import JobRequest


def run(
    parallel: dict[str, int], folder: str = "runs/a", engine: str = "embedded", saves: int = 1, **sglang: Any
) -> Run:
    config = TrainConfig(
        run=RunConfig(folder=folder),
        model=ModelConfig(path="unused"),
        task=TaskConfig(name="reasoning_gym"),
        parallel=ParallelConfig(**parallel),
        rollout=RolloutConfig(engine=engine),  # type: ignore[arg-type]
        sglang=SGLangConfig(**sglang),
        checkpoint=CheckpointConfig(every=saves),
    )
    return Run(Path("train.toml"), (), config)


def refusal(runs: list[Run], request: JobRequest, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        plan_job(runs, request, **options)
    return str(caught.value)


def served(parallel: dict[str, int], **sglang: Any) -> Run:
    return run(parallel, engine="sglang", **({"api_key_file": "key"} | sglang))


def plan(one: Run, request: JobRequest) -> JobPlan:
    return plan_job([one], request)


TP4_DP8 = {"tensor": 4, "data": 8}


def test_one_rank_a_gpu() -> None:
    made = plan(run(TP4_DP8), JobRequest(nodes=4, cpus_per_rank=12, partition="a"))
    assert made.trainers == Component(nodes=4, tasks_per_node=8, gpus_per_node=8, cpus_per_task=12, partition="a")
    assert (made.ranks, made.servers, made.server_component, made.name) == (32, None, None, "a")
    assert "4 nodes, 8 ranks on each, one a GPU; TP4 × DP8, 32 ranks" in made.describe()


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 8), (2, 4), (8, 1)])
def test_ranks_on_cpus_are_shared_out(nodes: int, ranks: int) -> None:
    made = plan(run({"data": 8}), JobRequest(nodes=nodes, gpus_per_node=0))
    assert (made.trainers.tasks_per_node, made.trainers.gpus_per_node) == (ranks, 0)


@pytest.mark.parametrize(
    ("parallel", "nodes", "gpus", "remedies"),
    [
        (TP4_DP8, 2, 8, "use --nodes 4 or --gpus-per-node 16 or --parallel.data 4"),
        (TP4_DP8, 3, 8, "use --nodes 4 or --parallel.data 6"),
        ({"tensor": 4, "data": 8, "expert": 16}, 2, 8, "use --nodes 4 or --gpus-per-node 16 or --parallel.data 4"),
        ({"tensor": 4, "data": 8, "expert": 32}, 2, 8, "use --nodes 4 or --gpus-per-node 16"),
        ({"tensor": 4}, 1, 8, "use --gpus-per-node 4 or --parallel.data 2"),
        ({"tensor": 3, "data": 5}, 1, 7, "use other [parallel] degrees"),
    ],
)
def test_nodes_that_do_not_match_the_layout(parallel: dict[str, int], nodes: int, gpus: int, remedies: str) -> None:
    message = refusal([run(parallel)], JobRequest(nodes=nodes, gpus_per_node=gpus))
    assert message.startswith(f"--nodes {nodes} × --gpus-per-node {gpus} make {nodes * gpus} GPUs, one a rank")
    assert message.endswith(remedies) or (remedies.startswith("use other") and "--gpus-per-node 15" in message)


def test_cpu_nodes_must_divide_the_ranks() -> None:
    message = refusal([run({"data": 4})], JobRequest(nodes=3, gpus_per_node=0))
    assert message.startswith("--nodes 3 must divide the 4 ranks") and message.endswith("use 1, 2, 4")


def test_tensor_parallelism_over_nodes_is_warned_about() -> None:
    [warning] = plan(run({"tensor": 16}), JobRequest(nodes=2)).warnings
    assert warning.startswith("parallel.tensor=16 spreads over nodes of 8 ranks")
    assert plan(run({"tensor": 8, "data": 2}), JobRequest(nodes=2)).warnings == ()


def test_a_run_that_saves_only_when_it_is_told_to_is_warned_about() -> None:
    [warning] = plan(run(TP4_DP8, saves=0), JobRequest(nodes=4)).warnings
    assert warning.startswith("checkpoint.every=0 saves only when the job is told to")


# ---------------------------------------------------------------------------------------------------------------------
# Servers
# ---------------------------------------------------------------------------------------------------------------------


def test_the_only_node_s_first_rank_starts_its_servers_itself() -> None:
    made = plan(served({"data": 4}, servers=2, tensor=2), JobRequest(nodes=1))
    assert (made.servers, made.trainers.tasks_per_node) == (None, 4)
    made = plan(served({"data": 8}, servers=2, tensor=2, colocate=True, transport="tensor"), JobRequest(nodes=1))
    assert (made.servers, made.trainers.tasks_per_node) == (None, 8)
    message = refusal([served({"data": 8}, servers=2, tensor=2)], JobRequest(nodes=1))
    assert "make 4 GPUs beside 4 of the servers, one a rank" in message
    assert message.endswith("use --nodes 2 or --gpus-per-node 12 or --parallel.data 4")


def test_servers_on_nodes_of_their_own() -> None:
    request = JobRequest(nodes=4, server_nodes=2, server_gpus_per_node=4, server_partition="b", partition="a")
    made = plan(served(TP4_DP8, tensor=2, port=31000), request)
    assert made.servers == Servers(nodes=2, per_node=2, port=31000, apart=True)
    assert made.server_component == Component(2, 1, 4, 0, "b")
    cores = plan(served(TP4_DP8, tensor=2, port=31000), replace(request, cpus_per_rank=12)).server_component
    assert cores == Component(2, 1, 4, 48, "b")
    assert "2 nodes × 2 of TP2 on nodes of their own, from port 31000" in made.describe()
    assert plan(served(TP4_DP8, tensor=8), replace(request, server_gpus_per_node=8)).servers == Servers(
        2, 1, 30000, apart=True
    )


def test_servers_on_the_nodes_that_train() -> None:
    made = plan(served(TP4_DP8, tensor=4, colocate=True, transport="tensor"), JobRequest(nodes=4))
    assert (made.servers, made.server_component) == (Servers(4, 2, 30000, apart=False), None)
    on_cpus = plan(served({"data": 2}, servers=3), JobRequest(nodes=2, gpus_per_node=0))
    assert on_cpus.servers == Servers(2, 3, 30000, apart=False)


def test_servers_elsewhere_need_nothing_of_the_job() -> None:
    assert plan(served(TP4_DP8, addresses="http://a:1"), JobRequest(nodes=4)).servers is None


@pytest.mark.parametrize(
    ("sglang", "request_", "expected"),
    [
        ({"api_key_file": ""}, JobRequest(nodes=4, server_nodes=1), "openssl rand -hex 32 > FILE), where all nodes"),
        ({}, JobRequest(nodes=4), "set sglang.colocate=true, or give servers nodes of their own by --server-nodes"),
        (
            {"colocate": True, "transport": "tensor"},
            JobRequest(nodes=4, server_nodes=1),
            "but sglang.colocate=true has them share the trainer's GPUs; leave one out",
        ),
        ({"transport": "tensor"}, JobRequest(nodes=4, server_nodes=1), 'use "distributed", or "disk" with a folder'),
        ({"addresses": "http://a:1"}, JobRequest(nodes=4, server_nodes=1), "both say where servers are"),
        ({"tensor": 3}, JobRequest(nodes=4, server_nodes=1), "must divide the 8 GPUs of a node"),
        ({"servers": 8}, JobRequest(nodes=1), "leaves no GPU beside 8 of the servers for training"),
    ],
)
def test_servers_that_cannot_be(sglang: dict[str, Any], request_: JobRequest, expected: str) -> None:
    assert expected in refusal([served(TP4_DP8, **sglang)], request_)


def test_nodes_for_servers_that_nobody_uses() -> None:
    assert 'rollout.engine="embedded" uses none' in refusal([run(TP4_DP8)], JobRequest(nodes=4, server_nodes=1))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


def test_an_array_of_runs() -> None:
    runs = [run(TP4_DP8), run({"data": 32}, folder="runs/b")]
    made = plan_job(runs, JobRequest(nodes=4, array_limit=1), is_array=True)
    assert made.is_array and made.runs == tuple(runs)
    assert "2 runs, 1 at one time" in made.describe()


def test_array_lines_that_do_not_go_together() -> None:
    request = JobRequest(nodes=4)
    message = refusal([run(TP4_DP8), run(TP4_DP8, folder="runs/./a")], request, is_array=True)
    assert "array lines 1 and 2 both write to run.folder=runs/a; give each its own" in message
    message = refusal([run(TP4_DP8), run({"data": 8}, folder="runs/b")], request, is_array=True)
    assert message.startswith("array line 2: --nodes 4 × --gpus-per-node 8 make 32 GPUs")
    message = refusal([served(TP4_DP8)], JobRequest(nodes=4, server_nodes=1), is_array=True)
    assert "SLURM makes no arrays of heterogeneous jobs" in message
    on_cpus = JobRequest(nodes=1, gpus_per_node=0)
    message = refusal([run({"data": 2}), run({"data": 4}, folder="runs/b")], on_cpus, is_array=True)
    assert message.startswith("array line 2 needs other nodes or servers than line 1")


@pytest.mark.parametrize("folder", ["runs/%j", "runs/50%", "runs\\a"])
def test_a_folder_whose_name_srun_would_change(folder: str) -> None:
    message = refusal([run({}, folder=folder)], JobRequest(nodes=1, gpus_per_node=1))
    character = "%" if "%" in folder else "\\"
    assert message.startswith(f"run.folder={folder} holds {character}, which srun") and "use another" in message
    runs = [run({}, folder="runs/a"), run({}, folder=folder)]
    message = refusal(runs, JobRequest(nodes=1, gpus_per_node=1), is_array=True)
    assert message.startswith(f"array line 2: run.folder={folder} holds")


def test_the_job_s_name_is_one_that_slurm_takes() -> None:
    assert plan(run({}, folder="runs/größe 1"), JobRequest(nodes=1, gpus_per_node=1)).name == "größe_1"
    assert plan(run({}), JobRequest(nodes=1, gpus_per_node=1, job_name="x")).name == "x"
