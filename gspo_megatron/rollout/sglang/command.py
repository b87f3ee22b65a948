"""What one server is started with: its command line and environment, computed without starting anything."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gspo_megatron.config import SftConfig, SGLangConfig, TrainConfig
from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.api_key import ENVIRONMENT_VARIABLE

CPU_STAND_INS = Path(__file__).with_name("cpu_stand_ins")

# sglang.arguments can't say what the client must know too; the key would be readable in the list of processes.
_OWN_OPTIONS = {
    "--api-key": "sglang.api_key_file",
    "--admin-api-key": "sglang.api_key_file",
    "--config": "sglang.arguments itself",
    "--host": "sglang.host",
    "--port": "sglang.port",
    "--model-path": "model.path",
    "--model": "model.path",
    "--dtype": "sglang.dtype",
    "--tp-size": "sglang.tensor",
    "--tensor-parallel-size": "sglang.tensor",
    "--tp": "sglang.tensor",
    "--ep-size": "sglang.expert",
    "--expert-parallel-size": "sglang.expert",
    "--ep": "sglang.expert",
}

# Without a GPU: plain torch everywhere, no idle spinning, and a cache of a fixed size; the default would be a share of
# the machine's whole memory, which the trainer needs too.
_CPU_OPTIONS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-decode=disabled", "--cuda-graph-backend-prefill=disabled", "--disable-overlap-schedule"),
    *("--mem-fraction-static", "0.2", "--max-total-tokens", "65536", "--max-running-requests", "64"),
    *("--sleep-on-idle", "--skip-server-warmup"),
)

# What torchrun and SLURM tell a rank about its own job would make a server look for peers.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANK_PREFIXES = ("LOCAL_", "ROLE_", "TORCHELASTIC_", "GSPO_MEGATRON_")


def server_command(
    config: SGLangConfig,
    *,
    model_folder: str | Path,
    dtype: str,
    port: int,
    gpu: bool,
    first_gpu: int = 0,
    random_weights: bool = False,
) -> list[str]:
    """Program and arguments of one server. The key is none of them; see `SGLangServer`.

    Args:
        config: its `arguments` come last, so that they win.
        model_folder: Hugging Face folder.
        dtype: "float32" or "bfloat16".
        port: of this server.
        gpu: whether the machine has GPUs; without, the options of the CPU are added.
        first_gpu: the server takes `config.tensor` GPUs from this one on, counted among the visible ones.
        random_weights: start with random weights, because the folder has none or the trainer sends its own anyway.
    """
    command = [os.path.abspath(config.python), "-m", "sglang.launch_server"]  # abspath keeps a venv's symbolic link
    command += ["--model-path", str(model_folder), "--dtype", dtype, "--host", config.host, "--port", str(port)]
    command += ["--tp-size", str(config.tensor)]
    if config.expert > 1:
        command += ["--ep-size", str(config.expert)]
    if random_weights:
        command += ["--load-format", "dummy"]
    if config.routed_experts:
        command += ["--enable-return-routed-experts"]
    if gpu:
        command += ["--base-gpu-id", str(first_gpu)]
        if config.colocate:
            command += ["--enable-memory-saver"]
    else:
        command += _CPU_OPTIONS
    return command + split_arguments(config)


def server_environment(
    config: SGLangConfig, *, gpu: bool, cores: Sequence[int], inherited: Mapping[str, str]
) -> dict[str, str]:
    """Environment of each server: the given one, less what only a training rank may see.

    Args:
        config: how many servers and tensor-parallel ranks share the machine.
        gpu: whether the machine has GPUs. Without, Python finds the CPU stand-ins first.
        cores: numbers of the cores that the servers may use.
        inherited: usually os.environ.
    """
    environment = {
        name: value
        for name, value in inherited.items()
        if name not in (*_RANK_VARIABLES, ENVIRONMENT_VARIABLE, "PYTHONHOME") and not name.startswith(_RANK_PREFIXES)
    }
    # A folder on disk is all that is loaded; nothing is to be asked of the hub.
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    environment["PYTHONUNBUFFERED"] = "1"  # the last words of a server that is killed
    if gpu:
        return environment
    threads = max(1, len(cores) // (config.servers * config.tensor))
    environment = {"OMP_NUM_THREADS": str(threads)} | environment
    paths = [str(CPU_STAND_INS), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    if config.tensor > 1:
        # By default SGLang wants a NUMA node for each rank.
        binding = "|".join(str(cores[rank % len(cores)]) for rank in range(config.tensor))
        environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)
    return environment


def split_arguments(config: SGLangConfig) -> list[str]:
    """`sglang.arguments` one by one. Raises UserError for what has a config key of its own."""
    try:
        arguments = shlex.split(config.arguments)
    except ValueError as error:
        raise UserError(f"sglang.arguments={config.arguments!r} cannot be split: {error}") from None
    for argument in arguments:
        option = argument.partition("=")[0]
        # SGLang takes an option by any part from its beginning on. None of its other options is such a part.
        own = next((name for name in _OWN_OPTIONS if len(option) > 2 and name.startswith(option)), None)
        if own is not None:
            also = "" if option in _OWN_OPTIONS else f", which may be {own}"
            raise UserError(f"sglang.arguments may not set {option}{also}; use {_OWN_OPTIONS[own]} instead")
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# Checks before anything is started
# ---------------------------------------------------------------------------------------------------------------------


def first_server_gpu(config: TrainConfig | SftConfig) -> int:
    """The servers take this machine's GPUs behind those of its training ranks, unless they share them.

    torchrun says how many ranks run here; where nobody does, all do.
    """
    if config.sglang.colocate:
        return 0
    return int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.layout().world_size))


def check_servers(config: SGLangConfig, *, model_folder: str | Path, gpus: int, first_gpu: int = 0) -> None:
    """Raise UserError for what would let every server fail, before minutes are spent on it.

    Args:
        config: the servers.
        model_folder: Hugging Face folder.
        gpus: visible GPUs; 0: the servers run on the CPU.
        first_gpu: first GPU of the first server.
    """
    split_arguments(config)
    check_model(config, Path(model_folder))
    if gpus == 0 and config.expert > 1:
        # Its plain torch experts know no expert that is on another rank.
        raise UserError(
            f"sglang.expert={config.expert}: SGLang spreads experts over GPUs only; set 1 for servers on the CPU"
        )
    needed = first_gpu + config.servers * config.tensor
    if 0 < gpus < needed:
        raise UserError(
            f"sglang.servers={config.servers} × sglang.tensor={config.tensor} from GPU {first_gpu} on need {needed} "
            f"GPUs, but {gpus} {'is' if gpus == 1 else 'are'} visible; start fewer servers here, or start them on "
            "another node with `serve` and name them in sglang.addresses"
        )
    _check_python(config)


def check_model(config: SGLangConfig, folder: Path) -> None:
    """Raise UserError unless the model's heads and experts can be spread over a server's ranks."""
    try:
        model: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.path={folder} holds no config.json; give a Hugging Face folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={folder}: config.json cannot be read: {error}") from None
    heads, kv_heads = model.get("num_attention_heads"), model.get("num_key_value_heads")
    # Key-value heads are divided among the ranks, or each is copied to several.
    for name, count, copied in (("num_attention_heads", heads, False), ("num_key_value_heads", kv_heads, True)):
        if count and count % config.tensor and not (copied and config.tensor % count == 0):
            raise UserError(f"sglang.tensor={config.tensor} must divide {name}={count} of {folder}; {_divisors(count)}")
    experts = model.get("num_experts") or model.get("n_routed_experts")
    if experts and experts % config.expert:
        raise UserError(
            f"sglang.expert={config.expert} must divide num_experts={experts} of {folder}; {_divisors(experts)}"
        )


def _divisors(count: int) -> str:
    return f"use {', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}"


def _check_python(config: SGLangConfig) -> None:
    python = os.path.abspath(config.python)
    remedy = "run `make setup-sglang`, which makes .venv-sglang for the CPU, or name a Python that has SGLang"
    if not os.access(python, os.X_OK) or os.path.isdir(python):
        raise UserError(f"sglang.python={config.python}: there is no such program at {python}; {remedy}")
    # Importing it takes 4 s, finding it 30 ms; what else may be missing is in the server's log.
    search = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    found = subprocess.run([python, "-c", search], env=environment, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise UserError(f"sglang.python={config.python} has no SGLang; {remedy}")


def has_weights(model_folder: str | Path) -> bool:
    """Whether the folder holds safetensors; servers of one that doesn't start with random weights."""
    return any(Path(model_folder).glob("*.safetensors"))
