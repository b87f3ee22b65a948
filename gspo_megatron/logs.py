"""Keeping a run's output readable."""

from __future__ import annotations

import logging
import warnings

# What Megatron-Core 0.16.1 and torch say on every rank at every start, whatever the settings.
KNOWN_WARNINGS = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"full scope is deprecated",
    r"If you are using transformer_engine as the transformer implementation",  # recompute = "selective"
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # experts at expert_tensor = 1
    r"When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"`torch\.distributed\.\w+` is deprecated",
)


def quiet_libraries() -> None:
    """Silence the known warnings. Call before importing Megatron: it warns on import."""
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
