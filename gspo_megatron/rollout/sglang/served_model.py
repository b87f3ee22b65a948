"""Whether a server serves the model that is trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.weights.server_layout import ServerLayout, ServerParameter

# Of config.json: what decides the parameters' names and shapes, and what the same weights compute with them.
_MODEL_KEYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "tie_word_embeddings",
    "rms_norm_eps",
)
_CPU_MLP_MULTIPLE = 32  # SGLang on a CPU pads a rank's share of an MLP to it


@dataclass(frozen=True)
class ServedModel:
    """What a server said about itself."""

    address: ServerAddress
    layout: ServerLayout
    dtype: torch.dtype
    on_gpu: bool
    model_path: str
    sglang_version: str


def read_served_model(address: ServerAddress, model: dict[str, Any], server: dict[str, Any]) -> ServedModel:
    """From the answers of /model_info and /server_info.

    Raises:
        UserError: the server is laid out in a way that updates can't reach.
    """
    for name in ("pp_size", "dp_size"):
        if server.get(name, 1) != 1:
            raise UserError(
                f"{address.url} runs with {name}={server[name]}; weight updates reach {name}=1 only; start "
                "several servers instead"
            )
    if server.get("quantization"):
        raise UserError(
            f"{address.url} quantizes its weights ({server['quantization']}); start it without --quantization"
        )
    device, dtype = str(server.get("device")), str(server.get("dtype"))
    on_gpu = device != "cpu"
    if dtype == "auto":  # of the folder it loaded
        config = _read_config(str(model.get("model_path"))) or {}
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"{address.url} runs in {dtype}; start it with --dtype float32 or bfloat16")
    return ServedModel(
        address,
        ServerLayout(server.get("tp_size", 1), server.get("ep_size", 1), 1 if on_gpu else _CPU_MLP_MULTIPLE),
        getattr(torch, dtype),
        on_gpu,
        str(model.get("model_path")),
        str(server.get("version", "of unknown version")),
    )


def check_same_model(
    served: ServedModel,
    model: dict[str, Any],
    names: Iterable[str],
    parameters: Sequence[ServerParameter],
    folder: Path,
) -> None:
    """Raise UserError unless the server serves the architecture of `folder`, with exactly these parameters.

    Shapes are compared through the server's config.json where it can be read from here.
    """
    url = served.address.url
    ours = _read_config(str(folder)) or {}
    if model.get("model_type") not in (None, ours.get("model_type")):
        raise UserError(
            f'{url} serves a "{model["model_type"]}" model, but model.path={folder} is a "{ours.get("model_type")}"; '
            "start the server with the same model"
        )
    theirs = _read_config(served.model_path)
    if theirs is not None:
        different = [k for k in _MODEL_KEYS if k in ours and k in theirs and ours[k] != theirs[k]]
        if different:
            said = ", ".join(f"{k}={theirs[k]!r} instead of {ours[k]!r}" for k in different)
            raise UserError(
                f"{url} serves {served.model_path}, which is another model than model.path={folder}: {said}; start the "
                "server with the same model"
            )
    wanted, found = {p.name for p in parameters}, set(names)
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        raise UserError(
            f"{url} has other parameters than model.path={folder}: it lacks {_some(missing)}, and has {_some(extra)} "
            "that are not trained; start it with the same model, and without options that change its weights"
        )


def _read_config(folder: str) -> dict[str, Any] | None:
    try:
        content = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "none"
