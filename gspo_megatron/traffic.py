"""Bytes that each rank sends in one optimizer step: a formula in the model, the layout and the batch.

A plan without devices or process groups: it can be asked for 1,024 GPUs on a laptop. `tools/benchmark_layouts.py`
holds it against what the collectives really carry.

Bytes are what a rank sends under the ideal ring or pairwise algorithm over p ranks: of n bytes (the whole tensor)
an all-gather and a reduce-scatter send n·(p-1)/p, an all-reduce twice that, a broadcast n·(p-1)/p in the mean; an
all-to-all sends what leaves the rank, a point-to-point message its size. A communication library may send more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.rules import padded_vocab_size

FLOAT32_BYTES = 4
INT64_BYTES = 8
SHAPE_BYTES = 3 * INT64_BYTES  # announced before each message between stages, because packs differ in length


@dataclass(frozen=True)
class StepWork:
    """What one data-parallel replica computes in one optimizer step; the mean over replicas where they differ."""

    tokens: float  # over all micro-batches and context-parallel ranks, padding included
    micro_batches: int
    element_bytes: int = 4  # of parameters and activations: 4 for float32, 2 for bfloat16
    distributed_optimizer: bool = True  # optimizer.distributed
    recompute: Literal["none", "selective", "moe", "full"] = "none"  # memory.recompute
    # gloo cannot reduce-scatter pieces of different lengths: expert tensor parallelism then uses an all-reduce.
    uneven_reduce_scatter: bool = True


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer step, by what they are for."""

    sequence: float = 0.0  # hidden states over tensor-parallel ranks: sequence parallelism's gathers and scatters
    vocabulary: float = 0.0  # softmax statistics over the shards of the vocabulary
    experts: float = 0.0  # tokens to the ranks of their experts and back, with their probabilities
    expert_tensor: float = 0.0  # the same tokens over the ranks that share an expert
    routing: float = 0.0  # how many tokens each expert gets, exchanged before every dispatch
    context: float = 0.0  # keys and values over the ranks that share a sequence
    pipeline: float = 0.0  # hidden states from stage to stage
    gradients: float = 0.0  # of dense parameters, over data- and context-parallel ranks
    expert_gradients: float = 0.0  # of experts, over the ranks that hold the same ones
    parameters: float = 0.0  # dense parameters, gathered after the sharded optimizer's update
    expert_parameters: float = 0.0
    replicated: float = 0.0  # gradients of norms and routers over tensor-parallel ranks; a tied embedding's two copies

    @property
    def total(self) -> float:
        return sum(astuple(self))


def step_traffic(fields: ModelFields, layout: ParallelLayout, work: StepWork) -> list[Traffic]:
    """[pipeline stages]: what each rank of a stage sends in one optimizer step, forward, backward and update.

    Tokens are routed to experts evenly. The mean over the ranks that exchange tokens hardly depends on it; the
    busiest rank's share does.
    """
    return [_stage_traffic(fields, layout, work, stage) for stage in range(layout.pipeline)]


def mean(traffics: Sequence[Traffic]) -> Traffic:
    """The mean over stages, and so over ranks: all stages have the same number of ranks."""
    return Traffic(*(sum(values) / len(traffics) for values in zip(*map(astuple, traffics), strict=True)))


def _stage_traffic(fields: ModelFields, layout: ParallelLayout, work: StepWork, stage: int) -> Traffic:
    layers = len(stage_layers(fields, layout, stage))
    moe_layers = sum(layer in fields.moe_layers for layer in stage_layers(fields, layout, stage))
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    hidden = work.tokens / layout.context * fields.hidden_size * work.element_bytes  # of a context-parallel rank
    return Traffic(
        sequence=hidden * _ring(layout.tensor) * _sequence_passes(layers, moe_layers, work, is_first, is_last),
        vocabulary=_vocabulary(layout, work) if is_last else 0.0,
        **_expert_layers(fields, layout, work, moe_layers),
        context=_context(fields, layout, work, layers),
        pipeline=_pipeline(layout, work, hidden / layout.tensor, stage),
        **_data_parallel(fields, layout, work, stage),
        replicated=_replicated(fields, layout, stage),
    )


def stage_layers(fields: ModelFields, layout: ParallelLayout, stage: int) -> list[int]:
    """Layers of a pipeline rank: the model's chunks go round the ranks, virtual_pipeline times."""
    chunks = layout.pipeline * layout.virtual_pipeline
    per_chunk = fields.num_layers // chunks
    return [layer for layer in range(fields.num_layers) if layer // per_chunk % layout.pipeline == stage]


def dense_parameters(fields: ModelFields, layout: ParallelLayout, stage: int) -> int:
    """Parameters of one rank of a stage, without experts."""
    h, tp = fields.hidden_size, layout.tensor
    layers = stage_layers(fields, layout, stage)
    attention = 2 * (fields.num_attention_heads + fields.num_query_groups) * fields.head_dim * h // tp
    dense_mlps = sum(layer not in fields.moe_layers for layer in layers)
    mlp = 3 * h * fields.ffn_hidden_size // tp
    vocabulary = padded_vocab_size(fields.vocab_size, tp) // tp * h
    copies = int(stage == 0) + int(stage == layout.pipeline - 1)
    if fields.tied_embeddings and layout.pipeline == 1:
        copies = 1
    return (
        len(layers) * attention + dense_mlps * mlp + copies * vocabulary + _replicated_parameters(fields, layout, stage)
    )


def expert_parameters(fields: ModelFields, layout: ParallelLayout, stage: int) -> int:
    """Parameters of the experts of one rank of a stage."""
    moe_layers = sum(layer in fields.moe_layers for layer in stage_layers(fields, layout, stage))
    whole = moe_layers * (fields.num_experts or 0) * 3 * fields.hidden_size * fields.expert_ffn_hidden_size
    return whole // (layout.expert * layout.expert_tensor)


def _replicated_parameters(fields: ModelFields, layout: ParallelLayout, stage: int) -> int:
    """Norms and routers, which every tensor-parallel rank holds whole."""
    layers = stage_layers(fields, layout, stage)
    norms = 2 * fields.hidden_size + (2 * fields.head_dim if fields.qk_layernorm else 0)
    routers = sum(layer in fields.moe_layers for layer in layers) * (fields.num_experts or 0) * fields.hidden_size
    final_norm = fields.hidden_size if stage == layout.pipeline - 1 else 0
    return len(layers) * norms + routers + final_norm


def _ring(ranks: int) -> float:
    """Share of a whole tensor that a rank sends in an all-gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def _sequence_passes(layers: int, moe_layers: int, work: StepWork, is_first: bool, is_last: bool) -> int:
    """How often the whole hidden states are gathered or scattered over the tensor-parallel ranks.

    Attention and dense MLPs: a gather and a scatter in forward; in backward their two opposites, and the input
    gathered again, which forward did not keep. Experts see tokens that stay where they are. The embedding's scatter
    and the head's gather have one opposite each.
    """
    blocks = layers + layers - moe_layers
    return (7 if work.recompute == "full" else 5) * blocks + 2 * is_first + 2 * is_last


def _vocabulary(layout: ParallelLayout, work: StepWork) -> float:
    """All-reduces of the largest logit and of three sums per token, in float32; backward has none."""
    return 4 * work.tokens / layout.context * FLOAT32_BYTES * 2 * _ring(layout.tensor)


def _expert_layers(fields: ModelFields, layout: ParallelLayout, work: StepWork, moe_layers: int) -> dict[str, float]:
    """Each token goes to each of its experts and its result comes back, in forward and in backward."""
    choices = work.tokens / layout.context / layout.tensor * fields.experts_per_token * moe_layers
    hidden, probability = fields.hidden_size * work.element_bytes, FLOAT32_BYTES
    forwards = 2 if work.recompute in ("moe", "full") else 1
    # Over the ranks that share an expert, dispatch gathers and combine scatters; backward does the opposite.
    scatter = 1 if work.uneven_reduce_scatter else 2
    there, back = hidden + probability, hidden
    expert_tensor = forwards * (there + scatter * back) + scatter * there + back
    counts = (fields.num_experts or 0) * INT64_BYTES * layout.expert * layout.expert_tensor
    return {
        "experts": choices * (forwards + 1) * (there + back) * _ring(layout.expert),
        "expert_tensor": choices * layout.expert_tensor * expert_tensor * _ring(layout.expert_tensor),
        "routing": (forwards * moe_layers * work.micro_batches * counts * _ring(layout.expert * layout.expert_tensor)),
    }


def _context(fields: ModelFields, layout: ParallelLayout, work: StepWork, layers: int) -> float:
    """Keys and values gathered in forward, their gradients scattered in backward, in float32 at least."""
    width = 2 * fields.num_query_groups * fields.head_dim / layout.tensor
    gathers = 2 if work.recompute in ("selective", "full") else 1
    element_bytes = gathers * work.element_bytes + max(work.element_bytes, FLOAT32_BYTES)
    return layers * work.tokens * width * element_bytes * _ring(layout.context)


def _pipeline(layout: ParallelLayout, work: StepWork, hidden: float, stage: int) -> float:
    """Each chunk but the model's last sends its output on, each but the first its input's gradient back."""
    if layout.pipeline == 1:
        return 0.0
    messages = 2 * layout.virtual_pipeline - (stage == 0) - (stage == layout.pipeline - 1)
    return messages * (hidden + work.micro_batches * SHAPE_BYTES)


def _data_parallel(fields: ModelFields, layout: ParallelLayout, work: StepWork, stage: int) -> dict[str, float]:
    """Gradients in float32 are reduce-scattered and parameters gathered; or gradients are all-reduced."""
    dense = dense_parameters(fields, layout, stage) * _ring(layout.data * layout.context)
    experts = expert_parameters(fields, layout, stage) * _ring(layout.expert_data)
    if not work.distributed_optimizer:
        return {"gradients": 2 * FLOAT32_BYTES * dense, "expert_gradients": 2 * FLOAT32_BYTES * experts}
    return {
        "gradients": FLOAT32_BYTES * dense,
        "expert_gradients": FLOAT32_BYTES * experts,
        "parameters": work.element_bytes * dense,
        "expert_parameters": work.element_bytes * experts,
    }


def _replicated(fields: ModelFields, layout: ParallelLayout, stage: int) -> float:
    total = _replicated_parameters(fields, layout, stage) * FLOAT32_BYTES * 2 * _ring(layout.tensor)
    if fields.tied_embeddings and layout.pipeline > 1 and stage in (0, layout.pipeline - 1):
        rows = padded_vocab_size(fields.vocab_size, layout.tensor) // layout.tensor
        total += rows * fields.hidden_size * FLOAT32_BYTES * 2 * _ring(2)
    return total
