"""A MoE layer's experts as two grouped products, in place of Megatron's loop over experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensorFactory
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor
from torch.nn.parameter import Parameter

from gspo_megatron.device import current_device
from gspo_megatron.weights.grouped import misaligned

QUICK_GELU_ALPHA = 1.702  # Megatron's quick_gelu has it too, compiled
EXTRA_STATE = "_extra_state"  # torch's name for what a module saves besides its parameters


class GroupedExperts(MegatronModule):
    """Gated experts over `torch.nn.functional.grouped_mm`; the same function of the same weights as SequentialMLP.

    Made by Megatron's MoELayer as `submodules.experts`. With E local experts, F the intermediate size of an
    expert on this expert-tensor rank and H the hidden size:

        weight1 [E, 2F, H]: of each expert this shard's gate rows, then its up rows
        weight2 [E, H, F]

    and, with `add_bias_linear`, bias1 [E, 2F] and bias2 [E, H]. The activation is SwiGLU, or gpt-oss's where there is
    a clamp value.

    Nothing here depends on how tokens were routed. On CUDA bfloat16 runs without waiting for the device; for
    float32 torch itself reads the group sizes and loops.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        _check(config)
        assert submodules is None and pg_collection is not None
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp

        ffn, remainder = divmod(config.moe_ffn_hidden_size, self.tp_group.size())
        hidden, dtype = config.hidden_size, config.params_dtype
        assert remainder == 0, f"{config.moe_ffn_hidden_size=} over {self.tp_group.size()} expert-tensor ranks"
        assert (refusal := misaligned(hidden, ffn, dtype)) is None, refusal
        device = torch.device("cpu") if config.use_cpu_initialization else current_device()
        self.weight1 = Parameter(torch.empty(num_local_experts, 2 * ffn, hidden, dtype=dtype, device=device))
        self.weight2 = Parameter(torch.empty(num_local_experts, hidden, ffn, dtype=dtype, device=device))
        parameters = [(self.weight1, 1), (self.weight2, 2)]
        self.has_biases: bool = config.add_bias_linear
        if self.has_biases:
            self.bias1 = Parameter(torch.empty(num_local_experts, 2 * ffn, dtype=dtype, device=device))
            self.bias2 = Parameter(torch.empty(num_local_experts, hidden, dtype=dtype, device=device))
            parameters += [(self.bias1, 1), (self.bias2, 1)]
        self.activation = partial(_weighted_swiglu, limit=config.activation_func_clamp_value)
        for weight, axis in parameters:
            # A shard even where it is the only one: what is not counts on tensor rank 0 alone in the gradient norm.
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim = axis  # type: ignore[attr-defined]
            weight.partition_stride = 1  # type: ignore[attr-defined]
            weight.allreduce = False  # type: ignore[attr-defined]  # reduced over the expert-data-parallel group

        self.register_load_state_dict_pre_hook(_drop_extra_states)
        self.recompute_activation = config.recompute_granularity == "selective" and "moe_act" in (
            config.recompute_modules or ()
        )
        # On Blackwell a group without rows may leave its weight's gradient unwritten (pytorch/pytorch#172439).
        self.zero_empty_groups = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Each token through its expert, times its routing probability.

        Args:
            permuted_local_hidden_states: [T, H], sorted by expert; already gathered over the expert-tensor group.
            tokens_per_expert: [E] integers that add up to T, on the host or on the device.
            permuted_probs: [T].

        Returns:
            [T, H], of which each expert-tensor rank has its summand (the dispatcher adds them), and no bias.
        """
        x, probs = permuted_local_hidden_states.contiguous(), permuted_probs
        if x.shape[0] == 0:
            return self._no_tokens(x, probs), None
        counts = tokens_per_expert.to(x.device, non_blocking=True)
        fc1 = self._product(x, self.weight1, counts)
        if self.has_biases:
            expert = torch.repeat_interleave(counts, output_size=x.shape[0])  # [T]
            fc1 = fc1 + self.bias1.index_select(0, expert)
        if self.recompute_activation and torch.is_grad_enabled():
            checkpoint = CheckpointWithoutOutput(fp8=None)  # its default asks Transformer Engine
            output = self._product(checkpoint.checkpoint(self.activation, fc1, probs), self.weight2, counts)
            checkpoint.discard_output_and_register_recompute(output)
        else:
            output = self._product(self.activation(fc1, probs), self.weight2, counts)
        if self.has_biases:
            output = output + (self.bias2.index_select(0, expert) * probs.unsqueeze(-1)).to(output.dtype)
        if output.requires_grad:
            output.register_hook(Tensor.contiguous)  # the backward of grouped_mm takes no expanded gradient
        return output, None

    def _product(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Rows of x [T, in] times their expert's weight [out, in], transposed: [T, out]."""
        transposed = weight.transpose(1, 2)
        if self.zero_empty_groups and transposed.requires_grad:
            empty = (counts == 0)[:, None, None]
            transposed.register_hook(lambda gradient: gradient.masked_fill(empty, 0))
        return F.grouped_mm(x, transposed, offs=counts.cumsum(0, dtype=torch.int32))

    def _no_tokens(self, x: Tensor, probs: Tensor) -> Tensor:
        """[0, H] that depends on every weight: overlapped gradient reduction waits for a gradient of each.

        Plain products over views of the weights: what a grouped product does without any row differs by device.
        """
        ffn, hidden = self.weight2.shape[2], x.shape[1]
        fc1 = (x @ self.weight1.flatten(0, 1).T)[:, : 2 * ffn]
        if self.has_biases:
            fc1 = fc1 + self.bias1[0]
        output = (self.activation(fc1, probs) @ self.weight2.flatten(0, 1).T)[:, :hidden]
        return output + self.bias2[0] if self.has_biases else output

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients: here they come with the backward pass."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """For dist_checkpointing: the keys, shapes and offsets of SequentialMLP, so that either loads the other's."""
        assert not (metadata or {}).get("singleton_local_shards"), "experts are kept as shards of one tensor per layer"
        state: ShardedStateDict = {}
        copy = self.dp_group.rank()
        for number in (1, 2):
            layer, gated = f"linear_fc{number}", number == 1
            for kind in ("weight", "bias") if self.has_biases else ("weight",):
                state[f"{prefix}{kind}{number}"] = ShardedTensorFactory(
                    f"{prefix}experts.{layer}.{kind}",
                    getattr(self, f"{kind}{number}"),
                    partial(self._shards, sharded_offsets=sharded_offsets, gated=gated),
                    partial(_merge, gated=gated),
                    (0, 0, copy),
                )
            # Megatron's linear layers save an empty state beside each weight, and miss it when they load.
            for expert in range(self.num_local_experts):
                state[f"{prefix}{layer}.{expert}.{EXTRA_STATE}"] = make_sharded_object_for_checkpoint(
                    None,
                    f"{prefix}experts.{layer}.{EXTRA_STATE}",
                    (*sharded_offsets, self._expert_offset(expert, axis=len(sharded_offsets))),
                    (0, self.tp_group.rank(), copy),
                )
        return state

    def _expert_offset(self, expert: int, *, axis: int) -> tuple[int, int, int]:
        """(axis, global number, number of all experts) of a local expert."""
        return (
            axis,
            self.ep_group.rank() * self.num_local_experts + expert,
            self.ep_group.size() * self.num_local_experts,
        )

    @torch.no_grad()
    def _shards(
        self,
        key: str,
        weight: Tensor,
        replica_id: ReplicaId,
        flattened_range: slice | None,
        *,
        sharded_offsets: tuple,
        gated: bool,
    ) -> list[ShardedTensor]:
        """One shard per expert, of weight1 and bias1 one for gate and one for up; the expert axis goes first."""
        assert flattened_range is None
        degree, rank = self.tp_group.size(), self.tp_group.rank()
        axis = len(sharded_offsets)  # of the experts
        shards = []
        for expert, whole in enumerate(weight.unbind(0)):
            if gated:
                gate, up = whole.chunk(2)
                cuts = [(gate, (axis + 1, rank, 2 * degree)), (up, (axis + 1, degree + rank, 2 * degree))]
            else:
                cuts = [(whole, (axis + whole.ndim, rank, degree))]  # a bias is not cut: degree is 1
            for tensor, cut in cuts:
                offsets = (*sharded_offsets, self._expert_offset(expert, axis=axis), cut)
                shards.append(
                    ShardedTensor.from_rank_offsets(
                        key, tensor, *offsets, replica_id=replica_id, prepend_axis_num=axis + 1
                    )
                )
        return shards


@torch.no_grad()
def _merge(shards: list[Tensor], *, gated: bool) -> Tensor:
    """Inverse of `_shards`, after loading."""
    stacked = torch.stack(shards)
    return stacked.unflatten(0, (-1, 2)).flatten(1, 2) if gated else stacked


def _weighted_swiglu(fc1: Tensor, probs: Tensor, limit: float | None) -> Tensor:
    """fc1 [T, 2F], probs [T] -> [T, F]. Rounded to fc1's dtype before and after the product with probs, as
    Megatron's MLP does it. `limit`: of gpt-oss's activation, else plain SwiGLU."""
    gate, up = fc1.chunk(2, dim=-1)
    if limit is None:
        activation = F.silu(gate) * up
    else:
        gate = gate.clamp(max=limit)
        activation = gate * torch.sigmoid(QUICK_GELU_ALPHA * gate) * (up.clamp(-limit, limit) + 1)
    return (activation * probs.unsqueeze(-1)).to(activation.dtype)


def _drop_extra_states(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: the empty states that `sharded_state_dict` lists belong to no submodule here."""
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(EXTRA_STATE)]:
        del state_dict[key]


def _check(config: TransformerConfig) -> None:
    """What this module leaves out."""
    plain = config.activation_func_clamp_value is None
    assert config.gated_linear_unit and config.activation_func is (F.silu if plain else quick_gelu)
    assert config.glu_linear_offset == (0 if plain else 1), "experts are plain SwiGLU, or gpt-oss's"
    assert not config.add_bias_linear or config.expert_tensor_parallel_size == 1, "bias2 would be added on each rank"
    assert not config.bias_activation_fusion and not config.use_te_activation_func, "the activation is not fused"
    assert not config.moe_apply_probs_on_input, "probabilities weigh the activation"
    assert config.moe_latent_size is None, "experts work on the hidden size"
    assert not config.fp8 and not config.fp4, "experts compute in params_dtype"
    assert not config.perform_initialization, "weights come from a checkpoint or from names, see policy/weights.py"
