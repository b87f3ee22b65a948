"""The model folder, and whether the parallel layout and its kernels fit the model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING

from gspo_megatron.config import SftConfig, TrainConfig
from gspo_megatron.preflight.result import Problems, divisors, one_of
from gspo_megatron.weights.grouped import misaligned

if TYPE_CHECKING:
    from gspo_megatron.weights.families import Family, ModelFields


def read_model(path: str) -> tuple[Family, ModelFields]:
    """Family and fields of the model folder; a hand-written config.json may hold anything."""
    from gspo_megatron.weights.families import load_fields

    return load_fields(path)


def check_weights(path: str, family: Family, fields: ModelFields) -> None:
    """Names and shapes from the files' headers; no tensor is read."""
    from gspo_megatron.weights.hf_checkpoint import HFCheckpoint

    HFCheckpoint(path).verify(family.specs(fields), left_out=fields.left_out)


def check_layout(config: TrainConfig | SftConfig, fields: ModelFields, problems: Problems) -> None:
    """Whether the degrees of parallelism cut the model into equal parts."""
    parallel = config.parallel
    check_divides(problems, "tensor", parallel.tensor, fields.split_by_tensor)
    check_divides(problems, "pipeline", parallel.pipeline, {"num_hidden_layers": fields.num_layers})
    problems.require(
        parallel.pipeline > 1 or parallel.virtual_pipeline == 1,
        f"parallel.virtual_pipeline={parallel.virtual_pipeline} interleaves the chunks of pipeline ranks, but "
        "parallel.pipeline=1; use virtual_pipeline=1, or at least two pipeline ranks",
    )
    if fields.num_layers % parallel.pipeline == 0 and parallel.pipeline > 1:
        a_stage = {"num_hidden_layers / parallel.pipeline": fields.num_layers // parallel.pipeline}
        check_divides(problems, "virtual_pipeline", parallel.virtual_pipeline, a_stage)
    if fields.num_experts is None:
        for name in ("expert", "expert_tensor"):
            degree = getattr(parallel, name)
            problems.require(
                degree == 1, f"parallel.{name}={degree}, but the model has no experts (it is dense); use 1"
            )
        return
    stage = parallel.tensor * parallel.context * parallel.data
    check_divides(
        problems,
        "expert",
        parallel.expert,
        {"num_experts": fields.num_experts},
        usable=lambda degree: stage % (degree * parallel.expert_tensor) == 0,
    )
    problems.require(
        not fields.biases or parallel.expert_tensor == 1,
        f"parallel.expert_tensor={parallel.expert_tensor}, but experts with biases are not cut over ranks, each of "
        "which would add the bias; use 1",
    )
    check_divides(
        problems,
        "expert_tensor",
        parallel.expert_tensor,
        {"moe_intermediate_size": fields.expert_ffn_hidden_size},
        usable=lambda degree: stage % (degree * parallel.expert) == 0,
    )


def check_kernels(
    config: TrainConfig | SftConfig, fields: ModelFields, problems: Problems, *, here: bool = True
) -> None:
    """Whether the chosen kernels, experts, routers' losses and attention can run on this model, and `here`."""
    import torch

    from gspo_megatron import ops
    from gspo_megatron.device import DTYPES, current_device

    if config.kernels.implementation == "native" and here:
        with problems.collect():
            ops.check_device(current_device())
    model, parallel = config.model, config.parallel
    for name in ("router_aux_loss", "router_z_loss"):
        problems.require(
            getattr(model, name) == 0 or bool(fields.moe_layers),
            f"model.{name}={getattr(model, name):g}, but the model has no router (it is dense); use 0",
        )
    problems.require(
        model.routing_replay == "off" or bool(fields.moe_layers),
        f'model.routing_replay="{model.routing_replay}", but the model has no router (it is dense); use "off"',
    )
    problems.require(
        model.routing_replay == "off" or isinstance(config, TrainConfig),
        f'model.routing_replay="{model.routing_replay}", but a cold start has neither an old policy nor rollouts; '
        'use "off"',
    )
    problems.require(
        bool(fields.moe_layers) or not (isinstance(config, TrainConfig) and config.rollout.routed_experts),
        "rollout.routed_experts=true, but the model has no experts (it is dense); use false",
    )
    problems.require(
        not fields.stacked_experts or model.experts == "grouped",
        f'model.experts="{model.experts}", but this family keeps a layer\'s experts together; use "grouped"',
    )
    if (
        fields.num_experts is not None
        and model.experts == "grouped"
        and fields.expert_ffn_hidden_size % parallel.expert_tensor == 0
    ):
        ffn_size = fields.expert_ffn_hidden_size // parallel.expert_tensor
        wrong = misaligned(fields.hidden_size, ffn_size, DTYPES[model.dtype])
        problems.require(wrong is None, f'model.experts="grouped" can\'t run: {wrong}; use "sequential"')
    if model.attention == "transformer_engine":
        problems.require(
            not here or (importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()),
            'model.attention="transformer_engine" needs Transformer Engine and a CUDA device; install them, '
            'or use "torch"',
        )
        problems.require(
            model.dtype == "bfloat16",
            f'model.attention="transformer_engine" computes in bfloat16, but model.dtype="{model.dtype}"; '
            'use dtype="bfloat16", or attention="torch"',
        )


def check_family(config: TrainConfig | SftConfig, family: Family, problems: Problems) -> None:
    """What is not there for every family: the servers' layout of its tensors, Transformer Engine's attention."""
    kind = family.model_type
    problems.require(
        config.rollout.engine != "sglang" or family.known_to_servers or config.sglang.check == "off",
        f'rollout.engine="sglang" with sglang.check="{config.sglang.check}": what a server makes of the tensors of a '
        f'{kind} model is not known, so that its weights can\'t be checked; use sglang.check="off" '
        '(sglang.probe_prompts still compares log-probabilities), or rollout.engine="embedded"',
    )
    problems.require(
        config.rollout.engine != "sglang" or config.sglang.tensor == 1 or family.split_by_servers,
        f"sglang.tensor={config.sglang.tensor}: SGLang can't split a {kind} model, whose queries and keys are "
        "normalised over all heads together; use 1, and sglang.servers for more GPUs",
    )
    problems.require(
        config.model.attention == "torch" or family.known_to_transformer_engine,
        f'model.attention="{config.model.attention}" is not set up for {kind} models; use "torch"',
    )


def check_memory(
    config: TrainConfig | SftConfig, fields: ModelFields, problems: Problems, *, here: bool = True
) -> None:
    """Whether the memory settings can do anything on this model, and `here`. An evaluation doesn't read them."""
    import torch

    problems.require(
        config.memory.recompute != "moe" or bool(fields.moe_layers),
        'memory.recompute="moe", but the model has no experts (it is dense); use "selective", "full" or "none"',
    )
    if config.memory.offload_optimizer > 0:
        given = f"memory.offload_optimizer={config.memory.offload_optimizer:g}"
        problems.require(
            not here or torch.cuda.is_available(),
            f"{given} moves state from a GPU to host memory, but there is no GPU; use 0",
        )
        problems.require(
            config.model.dtype == "bfloat16",
            f"{given} moves the float32 main parameters of a bfloat16 model, but "
            f'model.dtype="{config.model.dtype}" has none; use dtype="bfloat16", or 0',
        )
        problems.require(config.optimizer.distributed, f"{given} needs optimizer.distributed=true; set it, or use 0")


def check_divides(
    problems: Problems,
    name: str,
    degree: int,
    sizes: dict[str, int],
    usable: Callable[[int], bool] = lambda degree: True,
) -> None:
    """The degree must divide every size; the message lists those that do and fit the rest of the layout."""
    wrong = [f"{size_name}={size}" for size_name, size in sizes.items() if size % degree]
    common = gcd(*sizes.values())
    remedy = one_of([d for d in divisors(common) if usable(d)])
    problems.require(not wrong, f"parallel.{name}={degree} must divide {' and '.join(wrong)}; use {remedy}")
