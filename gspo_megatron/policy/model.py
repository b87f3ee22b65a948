"""The policy's model: Megatron's GPTModel built from a family's plain fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from gspo_megatron import ops
from gspo_megatron.config import KernelsConfig, MemoryConfig, ModelConfig
from gspo_megatron.device import DTYPES, current_device
from gspo_megatron.parallel import ParallelLayout
from gspo_megatron.policy.attention import PackedSequences, core_attention
from gspo_megatron.policy.experts import GroupedExperts
from gspo_megatron.policy.latent_attention import LatentAttention, latent_settings
from gspo_megatron.policy.norm import ProjectionNorm, RMSNorm
from gspo_megatron.policy.rotary import Rotary
from gspo_megatron.policy.router import Layer, Router, RouterLosses
from gspo_megatron.policy.sink_attention import SinkAttention
from gspo_megatron.policy.weights import Slot
from gspo_megatron.weights.families.base import ModelFields
from gspo_megatron.weights.families.deepseek_v3 import LatentAttentionFields
from gspo_megatron.weights.names import GroupedPlace, from_grouped_place
from gspo_megatron.weights.rules import TensorSpec, padded_vocab_size


class LogprobHead(ColumnParallelLinear):
    """Megatron's output layer, giving log-probabilities and entropies of targets instead of logits.

    The logits' product is accumulated and kept in float32, whatever the model's dtype.
    """

    vocab_size: int

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        wanted: Tensor,
        temperature: float,
        kernels: KernelsConfig,
        weight: Tensor,
        is_embedding: bool,
    ) -> Tensor:
        """hidden [T/tp, 1, H] (or [T, 1, H] without sequence parallelism), targets [1, T] -> [2, T] float32:
        log-probabilities and entropies, the same on every tensor-parallel rank; 0 but at the tokens `wanted` [R].

        `is_embedding`: the weight is this model chunk's embedding too, and gets a gradient from there."""
        if self.sequence_parallel:
            # The gather's backward is a reduce-scatter: it sums the ranks' partial gradients.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        targets = targets.squeeze(0)
        logprobs, entropy = ops.linear_logprobs(
            hidden.squeeze(1).index_select(0, wanted),
            weight,
            targets.index_select(0, wanted),
            temperature=temperature,
            vocab_start=self.tp_group.rank() * weight.shape[0],
            vocab_size=self.vocab_size,
            group=self.tp_group if self.tp_group.size() > 1 else None,
            reduce_hidden_grad=not self.sequence_parallel,
            # Added to without a copy of the weight's size, and without rounding it to the model's dtype.
            weight_grad=getattr(weight, "main_grad", None),
            skip_zero_rows=kernels.skip_zero_gradients,
            implementation=kernels.implementation,
        )
        results = torch.stack([logprobs, entropy])
        output = results.new_zeros((2, targets.shape[0])).index_copy(1, wanted, results)
        if output.requires_grad and hasattr(weight, "main_grad") and not is_embedding:
            output.register_hook(partial(_announce_gradient, weight))
        return output


def _announce_gradient(weight: Tensor, _: Tensor) -> None:
    """Megatron's DDP, where reductions overlap, wants to see a gradient before it takes the weight for done."""
    weight.grad = torch.zeros_like(weight[:1, :1]).expand_as(weight)  # no memory of the weight's size
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns [2, T] log-probabilities and entropies of `labels`, at the tokens whose indices
    are given as `loss_mask`: a prompt's tokens have no use for logits."""

    temperature: float = 1.0
    kernels = KernelsConfig()

    def __init__(self, *args: Any, real_vocab_size: int, rotary: Rotary | None, **kwargs: Any) -> None:
        """`rotary`: of our own attention; None: Megatron rotates."""
        super().__init__(*args, **kwargs)
        self.rotary = rotary
        if self.post_process:
            # Same parameters, hooks and checkpoint entries as Megatron made them; another forward.
            self.output_layer.__class__ = LogprobHead
            self.output_layer.vocab_size = real_vocab_size

    def forward(self, *args: Any, packed_seq_params: PackedSequences, **kwargs: Any) -> Tensor:
        """As Megatron's, called with packed_seq_params=PackedSequences."""
        if self.rotary is not None:
            # Megatron's own rotation cuts the pack up anew in each layer, after reading cu_seqlens from the device.
            longest, device = packed_seq_params.max_seqlen_kv, packed_seq_params.cu_seqlens.device
            packed_seq_params.rotary_angles = self.rotary.angles(longest, device)
            packed_seq_params.rotary_factor = self.rotary.factor
        output: Tensor = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        return output

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None = None, loss_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        assert labels is not None and loss_mask is not None
        is_tied = self.share_embeddings_and_output_weights
        return self.output_layer(
            hidden_states,
            labels,
            wanted=loss_mask,
            temperature=self.temperature,
            kernels=self.kernels,
            weight=self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight,
            is_embedding=is_tied and self.pre_process,
        )


BUFFERS = (".router.expert_bias",)  # ends of the names of buffers that are weights

RECOMPUTATION: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _expert_settings(fields: ModelFields) -> dict[str, Any]:
    return {
        "num_moe_experts": fields.num_experts,
        "moe_router_topk": fields.experts_per_token,
        "moe_ffn_hidden_size": fields.expert_ffn_hidden_size,
        "moe_layer_freq": [int(i in fields.moe_layers) for i in range(fields.num_layers)],
        "moe_router_pre_softmax": fields.router_pre_softmax,
        "moe_router_score_function": fields.router_score,
        "moe_router_enable_expert_bias": fields.router_selection_bias,
        "moe_router_bias_update_rate": 0.0,  # the selection bias stays what the checkpoint says
        "moe_router_num_groups": fields.router_groups,
        "moe_router_group_topk": fields.router_groups_chosen,
        "moe_router_topk_scaling_factor": fields.router_scale,
        "moe_shared_expert_intermediate_size": fields.shared_ffn_hidden_size,
        "moe_shared_expert_gate": fields.shared_expert_gate,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": False,
    }


def transformer_config(
    fields: ModelFields, layout: ParallelLayout, model: ModelConfig, memory: MemoryConfig
) -> TransformerConfig:
    """Megatron's configuration of the model."""
    dtype = DTYPES[model.dtype]
    moe = _expert_settings(fields) if fields.num_experts is not None else {}
    pipeline: dict[str, Any] = {}
    if layout.virtual_pipeline > 1:
        # With Megatron's defaults the interleaved schedule exchanges the wrong activations, without an error.
        pipeline = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    latent: dict[str, Any] = {}
    if isinstance(fields, LatentAttentionFields):
        latent = latent_settings(fields)
    config = (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=fields.num_layers,
        hidden_size=fields.hidden_size,
        num_attention_heads=fields.num_attention_heads,
        num_query_groups=fields.num_query_groups,
        kv_channels=fields.head_dim,
        ffn_hidden_size=fields.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=fields.norm_eps,
        qk_layernorm=fields.qk_layernorm and fields.qk_norm_of_heads,  # not for ProjectionNorm: see there
        add_bias_linear=fields.biases,
        add_qkv_bias=fields.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu if fields.swiglu_limit is None else quick_gelu,
        activation_func_clamp_value=fields.swiglu_limit,
        glu_linear_offset=0.0 if fields.swiglu_limit is None else 1.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # Megatron wants it for variable lengths, in dense models too
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,  # weights come from a checkpoint or from names, see policy/weights.py
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,
        **RECOMPUTATION[memory.recompute],
        **pipeline,
        **moe,
        **latent,
    )
    check_traps(config)
    return config


def check_traps(config: TransformerConfig) -> None:
    """Assert what Megatron-Core 0.16.1 computes wrongly, without an error, when it is set otherwise.

    The model, its routers and DDP copy some of it: check before each is built.
    """
    # The loss carries its own 1/N. Set after DDP was built, this halves gradients over two data-parallel ranks.
    assert config.calculate_per_token_loss, "Megatron would divide by micro-batches and ranks of its own choice"
    if config.virtual_pipeline_model_parallel_size is not None:
        assert config.overlap_p2p_comm and not config.batch_p2p_comm, "the interleaved schedule mixes up activations"
    if config.num_moe_experts is not None:
        # Scaled by the local token count, and off by a part of the norm under tensor with sequence parallelism:
        # policy/router.py has its own.
        assert config.moe_router_load_balancing_type == "none" and config.moe_z_loss_coeff is None
        assert config.moe_router_bias_update_rate == 0, "rollouts would route by another bias than the trainer"
    assert not config.moe_router_fusion, "the fused router leaves no room to replay routes"
    assert config.tensor_model_parallel_size == 1 or config.sequence_parallel


def _block_spec(fields: ModelFields, config: TransformerConfig, model: ModelConfig, chunk: int | None) -> Any:
    """Megatron's own block without Transformer Engine's layers, with our attention, routers, experts and norms."""
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=chunk)
    spec.layer_norm = RMSNorm
    losses = RouterLosses(model.router_aux_loss, model.router_z_loss)
    for layer in spec.layer_specs:
        layer.module = Layer
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        _adapt_attention(parts.self_attention, fields, model)
        if hasattr(parts.mlp.submodules, "experts"):
            parts.mlp.submodules.router = partial(Router, losses=losses)
            if model.experts == "grouped":
                parts.mlp.submodules.experts = ModuleSpec(module=GroupedExperts)
    return spec


def _adapt_attention(spec: ModuleSpec, fields: ModelFields, model: ModelConfig) -> None:
    """Our core attention and norms, in place of Megatron's."""
    parts: Any = spec.submodules
    parts.core_attention = ModuleSpec(module=core_attention(model.attention))
    if fields.attention_sinks:
        parts.core_attention = ModuleSpec(SinkAttention, {"windows": fields.attention_windows})
    if isinstance(fields, LatentAttentionFields):
        spec.module = LatentAttention
        spec.params["rope_interleave"] = fields.rope_interleave
        parts.q_layernorm = parts.kv_layernorm = RMSNorm
    elif fields.qk_layernorm and fields.qk_norm_of_heads:
        parts.q_layernorm = parts.k_layernorm = RMSNorm
    elif fields.qk_layernorm:
        parts.q_layernorm = ModuleSpec(ProjectionNorm, {"heads": fields.num_attention_heads})
        parts.k_layernorm = ModuleSpec(ProjectionNorm, {"heads": fields.num_query_groups})


def build_model(
    fields: ModelFields, config: TransformerConfig, layout: ParallelLayout, model: ModelConfig
) -> list[PolicyModel]:
    """This rank's model chunks, one for each round of the pipeline, without weights."""
    chunks = []
    # Transformer Engine's attention is rotated by Megatron.
    rotary = Rotary.of(fields) if model.attention == "torch" else None
    for chunk in range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else [None]:
        built = PolicyModel(
            config=config,
            transformer_layer_spec=_block_spec(fields, config, model, chunk),
            vocab_size=padded_vocab_size(fields.vocab_size, layout.tensor),
            real_vocab_size=fields.vocab_size,
            max_sequence_length=fields.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            share_embeddings_and_output_weights=fields.tied_embeddings,
            position_embedding_type="rope" if rotary is None else "none",
            rotary_base=fields.rope_theta,
            rotary=rotary,
            vp_stage=chunk,
        )
        chunks.append(built.to(device=current_device(), dtype=config.params_dtype))
        for module in chunks[-1].modules():
            if isinstance(module, Router) and module.expert_bias is not None:
                module.expert_bias = module.expert_bias.float()  # `to` rounds buffers too
    return chunks


def mark_parallel(slots: Iterable[Slot], specs: Iterable[TensorSpec]) -> None:
    """Tell Megatron which parameters are shards, and which are experts. Before DDP sorts them into buffers.

    Megatron marks shards while it initialises weights, which we don't let it do; an unmarked one counts as a
    duplicate on tensor ranks above 0 and drops out of the gradient norm. At expert_parallel = 1 it takes
    experts for dense parameters: where the expert-tensor degree is not the tensor degree, their gradients
    over the tensor-parallel ranks would never be summed.
    """
    by_name = {spec.megatron: spec for spec in specs}
    for slot in slots:
        if not isinstance(slot.parameter, Parameter):
            continue
        spec = by_name[slot.name]
        is_expert = spec.expert is not None or spec.stacks_experts
        sharded = spec.dim is not None or is_expert
        stacked = slot.index is not None  # one axis more than the rule knows of
        attributes = {
            "tensor_model_parallel": sharded,
            "partition_dim": (spec.dim or 0) + stacked,
            "partition_stride": 1,
        }
        if is_expert:
            attributes["allreduce"] = False  # reduced over the expert-data-parallel group
        for attribute, value in attributes.items():
            setattr(slot.parameter, attribute, value)


def parameter_slots(chunks: Sequence[Any], layout: ParallelLayout, fields: ModelFields) -> Iterator[Slot]:
    """This rank's parameters, and the buffers that belong to the weights, under their names in the whole model: global
    layer and expert numbers.

    A parameter that stacks experts gives one slot for each.
    """
    experts_here = (fields.num_experts or 0) // layout.expert
    first_expert = parallel_state.get_expert_model_parallel_rank() * experts_here
    for chunk in chunks:
        first_layer = chunk.decoder.layers[0].layer_number - 1
        buffers = ((name, b) for name, b in chunk.named_buffers() if name.endswith(BUFFERS))
        for name, parameter in [*chunk.named_parameters(), *buffers]:
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first_layer)
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                parts[at] = str(int(parts[at]) + first_expert)
            name = ".".join(parts)
            if parts[-2] == "experts" and not fields.stacked_experts:
                for i in range(parameter.shape[0]):
                    yield Slot(from_grouped_place(GroupedPlace(name, first_expert + i)), parameter, i)
            else:
                yield Slot(name, parameter)
