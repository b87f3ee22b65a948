"""The policy: its model, its layout, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from gspo_megatron.config.checks import require
from gspo_megatron.parallel import ParallelLayout


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str
    """Hugging Face folder with config.json, tokenizer and (for init = "weights") safetensors."""
    init: Literal["weights", "random"] = "weights"
    """Start from the folder's weights, or from random weights of its config."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the policy's parameters. Gradients are reduced and optimizer state is kept in float32."""
    experts: Literal["grouped", "sequential"] = "grouped"
    """Products of a MoE layer's experts: all in one grouped product, or one expert after the other (for comparison)."""
    attention: Literal["torch", "transformer_engine"] = "torch"
    """Attention kernels: torch's own (flash attention over packed sequences on CUDA), or Transformer Engine's, which
    must be installed."""
    router_aux_loss: float = 0.0
    """Weight of the experts' load-balancing loss, of each sequence by itself and summed over MoE layers; in a balanced
    layer it is 1. 0: none."""
    router_z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits, summed over MoE layers. 0: none."""
    routing_replay: Literal["off", "r2", "r3"] = "off"
    """Experts that a training pass sends tokens to: its own routers' choice; those that the pass for the old
    log-probabilities chose ("r2"); or, in both, those that the rollout engine chose ("r3")."""

    def __post_init__(self) -> None:
        for name in ("router_aux_loss", "router_z_loss"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"model.{name}={value} must be at least 0, e.g. 0.001; 0 for none")


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. Ranks needed = tensor × context × pipeline × data."""

    tensor: int = 1
    """Tensor parallel degree (with sequence parallelism)."""
    pipeline: int = 1
    """Pipeline parallel degree; divides the number of layers."""
    context: int = 1
    """Context parallel degree: ranks that share each sequence's tokens."""
    data: int = 1
    """Data parallel degree: replicas of the model; each generates its own share of the prompts."""
    expert: int = 1
    """Expert parallel degree, over the ranks of tensor × context × data."""
    expert_tensor: int = 1
    """Tensor parallel degree inside an expert."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    timeout_s: float = 600.0
    """A collective that takes longer ends the run with an error, in seconds."""

    def __post_init__(self) -> None:
        require(self.timeout_s >= 1, f"parallel.timeout_s={self.timeout_s} must be at least 1 second")
        require(self.timeout_s <= 1e6, f"parallel.timeout_s={self.timeout_s} must be at most 1e6 seconds")
        self.layout()

    def layout(self) -> ParallelLayout:
        names = [f.name for f in fields(ParallelLayout)]
        return ParallelLayout(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class MemoryConfig:
    """What is recomputed or moved to host memory to save device memory."""

    recompute: Literal["none", "selective", "moe", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: none, the core attention's, the MoE layers',
    or whole layers'."""
    offload_optimizer: float = 0.0
    """Share of the optimizer's state and main parameters kept and updated in host memory, from 0 to 1."""
    offload_gradients: bool = False
    """Free the gradient buffers between training phases, for engines on the same devices."""

    def __post_init__(self) -> None:
        require(
            0 <= self.offload_optimizer <= 1,
            f"memory.offload_optimizer={self.offload_optimizer} must lie between 0 and 1",
        )


@dataclass(frozen=True)
class KernelsConfig:
    """How log-probabilities and the policy loss are computed."""

    implementation: Literal["native", "reference"] = "native"
    """native: the compiled kernels; reference: their definition in plain torch, slower, for debugging."""
    skip_zero_gradients: bool = True
    """Leave tokens without gradient out of the output layer's backward pass: of clipped responses, and of responses
    without advantage, where there is no KL and no entropy term. Leave out the backward pass of a whole micro-batch
    without gradient, but not under pipeline parallelism, experts spread over more ranks than tensor × context,
    overlapped reductions or routers' losses. A GPU is waited for each time."""
