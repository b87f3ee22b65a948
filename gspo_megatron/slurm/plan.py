"""From a config and a request to a job: which nodes run what. Pure, so that it can be planned anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.config import TrainConfig
from gspo_megatron.errors import UserError
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.slurm.request import JobRequest

FIRST_SERVER_PORT = 30000  # where sglang.port is 0: addresses must be known before the servers run


@dataclass(frozen=True)
class Run:
    """One run of a job; an array job has several."""

    config_file: Path
    overrides: tuple[str, ...]
    config: TrainConfig


@dataclass(frozen=True)
class Component:
    """Nodes that are asked for alike: the whole job, or one part of a heterogeneous one."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int  # 0: SLURM's default
    partition: str


@dataclass(frozen=True)
class Servers:
    """SGLang servers that the job starts by `serve`, one task a node."""

    nodes: int
    per_node: int
    port: int  # of each node's first server
    apart: bool  # on nodes of their own


@dataclass(frozen=True)
class JobPlan:
    """Everything that the script says."""

    name: str
    runs: tuple[Run, ...]
    is_array: bool
    trainers: Component
    servers: Servers | None
    server_component: Component | None  # of servers that are apart
    request: JobRequest
    warnings: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.trainers.nodes * self.trainers.tasks_per_node

    def describe(self) -> str:
        """One line for each thing that the job needs."""
        request, trainers, first = self.request, self.trainers, self.runs[0].config
        ranks = f"{_count(trainers.tasks_per_node, 'rank')} on each"
        where = f"{ranks}, one a GPU" if request.gpus_per_node else f"{ranks}, on CPUs"
        rows = [
            ("job", f"{self.name}; {request.time} a start, saves {request.signal_lead_s} s before, comes back up to "
                    f"{request.max_requeues} times"),
            ("trainer", f"{_count(trainers.nodes, 'node')}, {where}; {first.parallel.layout().describe()}"),
        ]  # fmt: skip
        if self.servers is not None:
            place = "nodes of their own" if self.servers.apart else "the trainer's nodes"
            rows.append(
                ("servers", f"{_count(self.servers.nodes, 'node')} × {self.servers.per_node} of TP"
                            f"{first.sglang.tensor} on {place}, from port {self.servers.port}")
            )  # fmt: skip
        if self.is_array:
            limit = f", {request.array_limit} at one time" if request.array_limit else ""
            rows.append(("array", f"{_count(len(self.runs), 'run')}{limit}"))
        lines = [f"{name:<10} {text}" for name, text in rows]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def plan_job(runs: Sequence[Run], request: JobRequest, *, is_array: bool = False) -> JobPlan:
    """The nodes of a job and what each runs.

    Args:
        runs: one, or those of an array, which must fit the same nodes.
        request: what is asked of SLURM.
        is_array: whether the job is an array, perhaps of one run.

    Raises:
        UserError: nodes × GPUs are not what the layout and the servers need, two runs write to one folder, or
            something that SLURM can't do.
    """
    plans = [_plan_run(run, request, f"array line {i}: " if is_array else "") for i, run in enumerate(runs, start=1)]
    if is_array:
        _check_array(runs, request, plans)
    trainers, servers = plans[0]
    if request.server_nodes:
        assert servers is not None
        gpus = request.gpus_per_node if request.server_gpus_per_node is None else request.server_gpus_per_node
        cores = request.cpus_per_rank * max(1, gpus)  # a server's GPU gets as many as a rank
        apart = Component(request.server_nodes, 1, gpus, cores, request.server_partition or request.partition)
    else:
        apart = None
    name = request.job_name or Path(runs[0].config.run.folder).name
    return JobPlan(
        name="".join(c if c.isalnum() or c in "._-" else "_" for c in name) or "gspo",
        runs=tuple(runs),
        is_array=is_array,
        trainers=trainers,
        servers=servers,
        server_component=apart,
        request=request,
        warnings=tuple(dict.fromkeys(w for run in runs for w in _warnings(run, trainers))),
    )


def _plan_run(run: Run, request: JobRequest, where: str) -> tuple[Component, Servers | None]:
    try:
        _check_folder(run.config.run.folder)
        servers = _plan_servers(run, request)
        reserved = _gpus_beside_ranks(run, request, servers)
        ranks = _ranks_per_node(run.config.parallel.layout(), request, reserved)
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    trainers = Component(request.nodes, ranks, request.gpus_per_node, request.cpus_per_rank, request.partition)
    return trainers, servers


def _check_folder(folder: str) -> None:
    for character in "%\\":
        if character in folder:
            raise UserError(
                f"run.folder={folder} holds {character}, which srun does not take as it is in the names of its logs; "
                "use another character"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


def _ranks_per_node(layout: ParallelLayout, request: JobRequest, reserved: int) -> int:
    """One rank a GPU that no server has; on CPUs as many as are needed."""
    world, nodes, gpus = layout.world_size, request.nodes, request.gpus_per_node
    if gpus == 0:
        if world % nodes:
            fitting = [str(n) for n in range(1, world + 1) if world % n == 0]
            raise UserError(f"--nodes {nodes} must divide the {_needs(layout)}; use {', '.join(fitting)}")
        return world // nodes
    free = gpus - reserved
    beside = f" beside {reserved} of the servers" if reserved else ""
    if free < 1:
        raise UserError(f"--gpus-per-node {gpus} leaves no GPU{beside} for training; start fewer servers")
    if nodes * free != world:
        raise UserError(
            f"--nodes {nodes} × --gpus-per-node {gpus} make {nodes * free} GPUs{beside}, one a rank, but the config "
            f"has {_needs(layout)}; use {' or '.join(_remedies(layout, nodes, free, reserved))}"
        )
    return free


def _needs(layout: ParallelLayout) -> str:
    degrees = f"{layout.tensor}×{layout.context}×{layout.pipeline}×{layout.data}"
    return f"{_count(layout.world_size, 'rank')} (parallel.tensor×context×pipeline×data = {degrees})"


def _remedies(layout: ParallelLayout, nodes: int, free: int, reserved: int) -> list[str]:
    """Other nodes, other GPUs a node, other data parallelism: whichever would fit."""
    found = []
    if layout.world_size % free == 0:
        found.append(f"--nodes {layout.world_size // free}")
    if layout.world_size % nodes == 0 and layout.world_size // nodes <= 16:
        found.append(f"--gpus-per-node {layout.world_size // nodes + reserved}")
    data, left_over = divmod(nodes * free, layout.tensor * layout.context * layout.pipeline)
    if left_over == 0 and data and layout.tensor * layout.context * data % (layout.expert * layout.expert_tensor) == 0:
        found.append(f"--parallel.data {data}")
    return found or ["other [parallel] degrees"]


def _warnings(run: Run, trainers: Component) -> list[str]:
    found = []
    tensor = run.config.parallel.tensor
    if tensor > trainers.tasks_per_node or trainers.tasks_per_node % tensor:
        found.append(
            f"parallel.tensor={tensor} spreads over nodes of {_count(trainers.tasks_per_node, 'rank')}: each layer "
            "waits for the network between them; use a degree that divides the ranks of a node"
        )
    if run.config.checkpoint.every == 0:
        found.append(
            "checkpoint.every=0 saves only when the job is told to: a node that fails takes along all since "
            "then; set it to some rollout batches"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Servers
# ---------------------------------------------------------------------------------------------------------------------


def _plan_servers(run: Run, request: JobRequest) -> Servers | None:
    """Servers that `serve` starts; None where there are none, or the only node's first rank starts them itself."""
    sglang = run.config.sglang
    if run.config.rollout.engine != "sglang":
        if request.server_nodes:
            raise UserError(
                f'--server-nodes {request.server_nodes} start SGLang servers, but rollout.engine="'
                f'{run.config.rollout.engine}" uses none; set "sglang", or leave --server-nodes out'
            )
        return None
    if sglang.server_addresses:
        if request.server_nodes:
            raise UserError(
                f"--server-nodes {request.server_nodes} and sglang.addresses={sglang.addresses} both say where servers "
                "are; leave one out"
            )
        return None
    if request.server_nodes == 0 and request.nodes == 1:
        return None
    if not sglang.api_key_file:
        raise UserError(
            "servers that other nodes reach need a key, and none may be in the script: make a file with "
            "(umask 077; openssl rand -hex 32 > FILE), where all nodes see it, and set sglang.api_key_file"
        )
    if request.server_nodes:
        return _servers_apart(run.config, request)
    if request.gpus_per_node and not sglang.colocate:
        raise UserError(
            f"servers on the GPUs of {request.nodes} training nodes must share them: set sglang.colocate=true, or give "
            "servers nodes of their own by --server-nodes"
        )
    return Servers(request.nodes, _servers_per_node(run.config, request.gpus_per_node), _port(run.config), apart=False)


def _servers_apart(config: TrainConfig, request: JobRequest) -> Servers:
    if config.sglang.colocate:
        raise UserError(
            f"--server-nodes {request.server_nodes} gives the servers nodes of their own, but sglang.colocate=true has "
            "them share the trainer's GPUs; leave one out"
        )
    if config.sglang.transport == "tensor":
        raise UserError(
            'sglang.transport="tensor" shares memory on one machine, but --server-nodes gives the servers nodes of '
            'their own; use "distributed", or "disk" with a folder that all nodes see'
        )
    gpus = request.gpus_per_node if request.server_gpus_per_node is None else request.server_gpus_per_node
    return Servers(request.server_nodes, _servers_per_node(config, gpus), _port(config), apart=True)


def _servers_per_node(config: TrainConfig, gpus: int) -> int:
    """As many as the node's GPUs can hold; on CPUs, sglang.servers."""
    tensor = config.sglang.tensor
    if gpus == 0:
        return config.sglang.servers
    if gpus % tensor:
        raise UserError(
            f"sglang.tensor={tensor} must divide the {gpus} GPUs of a node, on which each server runs; use "
            f"{', '.join(str(d) for d in range(1, gpus + 1) if gpus % d == 0)}"
        )
    return gpus // tensor


def _port(config: TrainConfig) -> int:
    return config.sglang.port or FIRST_SERVER_PORT


def _gpus_beside_ranks(run: Run, request: JobRequest, servers: Servers | None) -> int:
    """GPUs of the only node that servers take which its first rank starts."""
    sglang = run.config.sglang
    starts = run.config.rollout.engine == "sglang" and servers is None and not sglang.server_addresses
    return sglang.servers * sglang.tensor if starts and not sglang.colocate and request.gpus_per_node else 0


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


def _check_array(runs: Sequence[Run], request: JobRequest, plans: Sequence[tuple[Component, Servers | None]]) -> None:
    if request.server_nodes:
        raise UserError(
            f"--array and --server-nodes {request.server_nodes}: SLURM makes no arrays of heterogeneous jobs; let the "
            "servers share the trainer's nodes, or submit one job for each run"
        )
    lines: dict[Path, int] = {}
    for number, run in enumerate(runs, start=1):
        folder = Path(run.config.run.folder)
        if folder in lines:
            raise UserError(
                f"array lines {lines[folder]} and {number} both write to run.folder={folder}; give each its own, e.g. "
                f"--run.folder {folder}_{number}"
            )
        lines[folder] = number
    for number, plan in enumerate(plans, start=1):
        if plan != plans[0]:
            raise UserError(
                f"array line {number} needs other nodes or servers than line 1; give all lines layouts and [sglang] "
                "degrees that fit the same nodes"
            )
