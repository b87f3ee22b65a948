"""Whether a server serves the model that is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.errors import UserError
from gspo_megatron.rollout.sglang.address import ServerAddress
from gspo_megatron.weights.server_layout import ServerLayout, ServerParameter

logger = logging.getLogger(__name__)

# Of config.json: what decides the parameters' names and shapes, and what the same weights compute with them.
_MODEL_KEYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "attention_bias",
    "hidden_act",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "mlp_only_layers",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
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
    overrides: str = "{}"  # JSON, of entries of config.json


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
        config = _read_config(str(model.get("model_path")))
        dtype = "the dtype of a folder that cannot be read here" if config is None else _automatic_dtype(config)
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"{address.url} runs in {dtype}; start it with --dtype float32 or bfloat16")
    return ServedModel(
        address,
        ServerLayout(server.get("tp_size", 1), server.get("ep_size", 1), 1 if on_gpu else _CPU_MLP_MULTIPLE),
        getattr(torch, dtype),
        on_gpu,
        str(model.get("model_path")),
        str(server.get("version", "of unknown version")),
        str(server.get("json_model_override_args") or "{}"),
    )


def _automatic_dtype(config: dict[str, Any]) -> str:
    """By SGLang's rule."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return "float16" if dtype == "float32" else dtype


def check_same_model(
    served: ServedModel,
    model: dict[str, Any],
    names: Iterable[str],
    parameters: Sequence[ServerParameter],
    folder: Path,
    *,
    transport: str,
) -> None:
    """Raise UserError unless the server serves the architecture of `folder`, with exactly these parameters.

    Sizes are compared through the server's config.json. Where it can't be read from here, only the transport
    "distributed" is let through: other sizes are then refused by the server, which the other transports would end.
    """
    url = served.address.url
    ours = _read_config(str(folder)) or {}
    if model.get("model_type") not in (None, ours.get("model_type")):
        raise UserError(
            f'{url} serves a "{model["model_type"]}" model, but model.path={folder} is a "{ours.get("model_type")}"; '
            "start the server with the same model"
        )
    _check_same_config(served, ours, folder, transport)
    wanted, found = {p.name for p in parameters}, set(names)
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        raise UserError(
            f"{url} has other parameters than model.path={folder}: it lacks {_some(missing)}, and has {_some(extra)} "
            "that are not trained; start it with the same model, and without options that change its weights"
        )


def _check_same_config(served: ServedModel, ours: dict[str, Any], folder: Path, transport: str) -> None:
    what = f"{served.address.url} serves {served.model_path}"
    theirs = _read_config(served.model_path)
    if theirs is None and transport != "distributed":
        raise UserError(
            f"{what}, whose config.json cannot be read here to compare its sizes, and other ones would end the server "
            f'over sglang.transport="{transport}"; start it with a model folder that this machine can read, or use '
            '"distributed", over which it refuses them'
        )
    if theirs is None:
        logger.warning("%s, whose config.json cannot be read here: its sizes are not compared before it is used", what)
    overrides = json.loads(served.overrides)
    wanted, found = _compared(ours), _compared((theirs or ours) | overrides)
    found |= {key: value for key, value in overrides.items() if key == "rope_theta"}  # also beside rope_parameters
    different = [key for key in wanted if key in found and wanted[key] != found[key]]
    if not different:
        return
    how, remedy = "", "start the server with the same model"
    if overrides:
        how, remedy = f" with --json-model-override-args '{served.overrides}'", f"{remedy}, and do not override that"
    said = ", ".join(f"{key}={found[key]!r} instead of {wanted[key]!r}" for key in different)
    raise UserError(f"{what}{how}, which is another model than model.path={folder}: {said}; {remedy}")


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config.json is compared, in one form whichever version of transformers wrote it."""
    compared = {key: config[key] for key in _MODEL_KEYS if key in config}
    # transformers 5 has rope_theta among the rope_parameters; where the older rope_scaling is there, it goes first.
    newer = config.get("rope_parameters") or {}
    rope = config.get("rope_scaling") or newer
    theta = rope.get("rope_theta") or config.get("rope_theta") or newer.get("rope_theta")
    compared |= {"rope_theta": theta} if theta else {}
    compared["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    compared |= {f"rope {key}": value for key, value in rest.items() if value is not None}
    # Where use_sliding_window is false or left out, the window has no effect.
    compared["use_sliding_window"] = bool(config.get("use_sliding_window"))
    if compared["use_sliding_window"]:
        compared |= {key: config.get(key) for key in ("sliding_window", "max_window_layers")}
    return compared


def _read_config(folder: str) -> dict[str, Any] | None:
    try:
        content = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "none"
