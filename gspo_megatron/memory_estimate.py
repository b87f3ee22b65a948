"""Memory that a training rank needs, from the model, the layout and the settings: a plan, computed without devices.

Per parameter that a rank holds (P bytes an element: 4 for float32, 2 for bfloat16):

    parameters   P
    gradients    4                        accumulated and reduced in float32
    optimizer    8 for Adam's moments, and 4 for the main parameters of a bfloat16 model; divided by the ranks that
                 share them out under optimizer.distributed: data × context of dense parameters, the ranks with the
                 same experts of experts
    reference    P, where the algorithm has a KL term

Activations are what autograd keeps for the micro-batches that a pipeline rank has in flight. Per token and layer, in
elements of P bytes (h hidden size, q and kv the widths of all heads' queries and keys, k experts a token, f their
intermediate size, g that of dense layers and of shared experts), all divided by tensor × context:

    norms and residuals     4·h
    attention               5·q + kv
    its core                q               left out with recompute "selective"
    MLP, shared experts     5·g
    experts                 k·(h + 5·f)     left out, with the shared ones, with recompute "moe"

With recompute "full" a layer keeps h, and one layer's whole is there for a while; with "moe" one layer's experts are.
The head keeps logits of no token: it makes them again, a chunk at a time. Not counted: what CUDA, NCCL and the
allocator take, the chunk of logits, an uneven choice of experts, buffers of a weight update (at most two buckets, see
sglang.bucket_mb). tests/distributed/test_memory_estimate.py holds the first three rows against the bytes of real
models, exactly, and activations against those that autograd keeps on a CPU, to a fifth.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from gspo_megatron.config import SftConfig, TrainConfig
from gspo_megatron.device import DTYPES
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.traffic import stage_layers
from gspo_megatron.weights.reshard import shard_shapes

if TYPE_CHECKING:
    from gspo_megatron.weights.families import Family, ModelFields

MAIN_BYTES = 4  # float32
MOMENT_BYTES = 8


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a pipeline stage while it trains."""

    parameters: float
    gradients: float
    optimizer: float
    reference: float
    activations: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


@dataclass(frozen=True)
class Held:
    """Parameters that one rank of a stage holds, by number."""

    dense: int
    experts: int


def held_parameters(family: Family, fields: ModelFields, layout: ParallelLayout) -> list[Held]:
    """[pipeline stages]: what each rank of a stage holds, padding of the vocabulary included."""
    specs = family.specs(fields)
    dense, experts = [0] * layout.pipeline, [0] * layout.pipeline
    for spec, shape in zip(specs, shard_shapes(specs, layout), strict=True):
        if spec.load_only and layout.pipeline == 1:
            continue  # a tied head is the embedding itself
        if spec.dtype is not None:
            continue  # frozen and tiny: a router's selection bias
        stage = spec.pipeline_stage(layout, fields.num_layers)
        if spec.expert is None and not spec.stacks_experts:
            dense[stage] += shape.numel()
        else:  # one expert, of which a rank has a share of the number; or that share itself
            experts[stage] += shape.numel() * (layout.expert if spec.stacks_experts else 1)
    return [Held(d, e // layout.expert) for d, e in zip(dense, experts, strict=True)]


def estimate(
    config: TrainConfig | SftConfig, family: Family, fields: ModelFields, *, reference: bool = False
) -> list[RankMemory]:
    """[pipeline stages]: memory of each rank of a stage, on its device.

    Args:
        config: layout, dtype, optimizer, memory settings and the tokens of a micro-batch.
        family: of the model.
        fields: of the model.
        reference: whether the algorithm keeps the initial weights too.
    """
    layout = config.parallel.layout()
    itemsize = DTYPES[config.model.dtype].itemsize
    result = []
    for stage, held in enumerate(held_parameters(family, fields, layout)):
        count = held.dense + held.experts
        result.append(
            RankMemory(
                parameters=count * itemsize,
                gradients=count * MAIN_BYTES,
                optimizer=_optimizer_bytes(config, layout, held, itemsize),
                reference=count * itemsize * reference,
                activations=itemsize * _activation_elements(config, fields, layout, stage),
            )
        )
    return result


def _optimizer_bytes(config: TrainConfig | SftConfig, layout: ParallelLayout, held: Held, itemsize: int) -> float:
    each = MOMENT_BYTES + (MAIN_BYTES if itemsize < MAIN_BYTES else 0)
    sharing, expert_sharing = 1, 1
    if config.optimizer.distributed:
        sharing, expert_sharing = layout.data * layout.context, layout.expert_data
    on_device = 1 - config.memory.offload_optimizer
    return on_device * each * (held.dense / sharing + held.experts / expert_sharing)


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


def _activation_elements(
    config: TrainConfig | SftConfig, fields: ModelFields, layout: ParallelLayout, stage: int
) -> float:
    """Elements kept by one rank of a stage at the worst time."""
    tokens = config.data.token_budget / (layout.tensor * layout.context)
    layers = stage_layers(fields, layout, stage)
    kept = [_layer_elements(fields, layer, config.memory.recompute) for layer in layers]
    whole = [_layer_elements(fields, layer, "none") for layer in layers]
    # A layer that is recomputed is there whole while its backward pass runs.
    passing = max(w - k for w, k in zip(whole, kept, strict=True))
    return tokens * (_in_flight(layout, stage) * sum(kept) + passing + 2 * fields.hidden_size)


def _in_flight(layout: ParallelLayout, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at one time, over all its layers: 1F1B, interleaved or not."""
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    if chunks == 1:
        return stages - stage
    return ((chunks - 1) * stages + 2 * (stages - stage - 1) + 1) / chunks


def _layer_elements(fields: ModelFields, layer: int, recompute: str) -> float:
    """Elements that one layer keeps for one token, over all ranks that cut it."""
    h = fields.hidden_size
    if recompute == "full":
        return h
    q, kv = (heads * fields.head_dim for heads in (fields.num_attention_heads, fields.num_query_groups))
    found = 4 * h + (5 if recompute == "selective" else 6) * q + kv
    if layer not in fields.moe_layers:
        return found + 5 * fields.ffn_hidden_size
    if recompute == "moe":
        return found
    experts = fields.experts_per_token * (h + 5 * fields.expert_ffn_hidden_size)
    return found + experts + 5 * (fields.shared_ffn_hidden_size or 0)
