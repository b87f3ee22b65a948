"""A plugin of SGLang for servers without a GPU, found by the entry point in gspo_sglang_cpu-1.dist-info.

SGLang keeps the routed experts that it returns in host memory that it registers with CUDA, so that copies from the GPU
are fast. On the CPU nothing is copied from elsewhere and there is no CUDA to register with, so that step is left out.
"""

from __future__ import annotations

import importlib

_REGISTER = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"


def register() -> None:
    """Called once in every process of a server, before it starts."""
    # By name: this file runs in the server's Python, the only one that has SGLang.
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(_REGISTER, _nothing_to_register, hooks.HookType.REPLACE)


def _nothing_to_register(*args: object, **kwargs: object) -> None:
    pass
