"""Settings: frozen dataclasses, one per concern. The text under a field is its help on the command line.

A command reads one TOML file with one table per section; every field can be overridden as
`--section.key value`. Local checks are here; what needs the model's config or several sections
together is checked in preflight.
"""

from gspo_megatron.config.commands import MeasureConfig, MeasureSettings, SftConfig, TrainConfig
from gspo_megatron.config.learning import AlgorithmConfig, DataConfig, OptimizerConfig, SftLoopConfig, TrainLoopConfig
from gspo_megatron.config.policy import KernelsConfig, MemoryConfig, ModelConfig, ParallelConfig
from gspo_megatron.config.rollout import GenerationConfig, RolloutConfig, SGLangConfig, TaskConfig
from gspo_megatron.config.run import CheckpointConfig, EvalConfig, LogConfig, RunConfig, TelemetryConfig, WatchdogConfig

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "GenerationConfig",
    "KernelsConfig",
    "LogConfig",
    "MeasureConfig",
    "MeasureSettings",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "SftConfig",
    "SftLoopConfig",
    "TaskConfig",
    "TelemetryConfig",
    "TrainConfig",
    "TrainLoopConfig",
    "WatchdogConfig",
]
