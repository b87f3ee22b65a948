"""Megatron's DDP, distributed optimizer and learning-rate schedule, from our settings."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.config import MemoryConfig, OptimizerConfig
from gspo_megatron.policy.model import PolicyModel, check_traps

# Biases and norms don't decay: Megatron knows them by their one axis or name, but not those stacked over experts.
EXPERT_BIASES = "*.experts.bias?"

# Parameters whose gradients are reduced together where reduction overlaps; None: Megatron's choice.
BUCKET_NUMEL: int | None = None


def wrap_ddp(
    chunks: list[PolicyModel], config: TransformerConfig, settings: OptimizerConfig
) -> list[DistributedDataParallel]:
    """Gradient buffers in float32, reduced over the ranks that hold the same parameters."""
    check_traps(config)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.distributed,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        bucket_size=BUCKET_NUMEL,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # a step looks at the norm of the whole gradient, see MegatronPolicy.train_step
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:  # only the last micro-batch's backward pass may start the reduction
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], settings: OptimizerConfig, memory: MemoryConfig, dtype: torch.dtype
) -> Any:
    """AdamW over the wrapped chunks."""
    offload: dict[str, Any] = {}
    if memory.offload_optimizer > 0:
        offload = {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": memory.offload_optimizer,
            "use_precision_aware_optimizer": True,
            "pin_cpu_grads": torch.cuda.is_available(),
            "pin_cpu_params": torch.cuda.is_available(),
        }
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        weight_decay=settings.weight_decay,
        # The norm is measured also where nothing is clipped.
        clip_grad=settings.clip_grad or float("inf"),
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.distributed,
        overlap_param_gather=settings.overlap_param_gather,
        **offload,
    )
    undecayed = get_standard_config_overrides(config)
    undecayed[ParamKey(name=EXPERT_BIASES)] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(config, chunks, undecayed, use_gloo_process_groups=False)
    _gather_parameters_once(optimizer)
    return optimizer


def _gather_parameters_once(optimizer: Any) -> None:
    """A MoE model has an optimizer for dense parameters and one for experts. Each of them, after its step, would gather
    the parameters of both: leave it to the last."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer])[:-1]:
        if isinstance(part, DistributedOptimizer):
            part.step_with_ready_grads = MethodType(MixedPrecisionOptimizer.step_with_ready_grads, part)


def build_schedule(optimizer: Any, settings: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then the decay over the rest of `total_steps` optimizer steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(total_steps, settings.warmup_steps + 1),
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
    )
