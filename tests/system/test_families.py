"""Every model family against transformers in further layouts: context, pipeline, expert-tensor parallelism, and with
experts one after the other; see tests/distributed/test_families.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.parallel import ParallelLayout
from tests.distributed import family_models
from tests.distributed.conftest import ranks  # noqa: F401
from tests.distributed.test_checkpoint import check_there_and_back, save
from tests.distributed.test_families import TENSOR_EXPERT, Ranks, Reference, check, reference  # noqa: F401

pytestmark = [pytest.mark.system, pytest.mark.slow]

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LAYOUTS = [
    {"context": 2, "expert": 2},
    {"pipeline": 2},
    {"tensor": 2, "context": 2, "expert": 4},
    {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: ParallelLayout(**x).describe())
@pytest.mark.parametrize("family", family_models.CONFIGS)
def test_the_policy_is_transformers(
    family: str,
    layout: dict[str, int],
    reference: Reference,  # noqa: F811
    ranks: Ranks,  # noqa: F811
) -> None:
    if family == "qwen3":
        layout = {name: degree for name, degree in layout.items() if not name.startswith("expert")}
    if family == "gpt_oss":  # experts with biases are not cut
        layout = {name: degree for name, degree in layout.items() if name != "expert_tensor"}
    check(reference(family), layout, ranks)


@pytest.mark.parametrize("family", [f for f in family_models.CONFIGS if f not in ("qwen3", "gpt_oss")])
def test_experts_one_after_the_other(
    family: str,
    reference: Reference,  # noqa: F811
    ranks: Ranks,  # noqa: F811
) -> None:
    check(reference(family), TENSOR_EXPERT, ranks, model={"experts": "sequential"})


@pytest.mark.parametrize("recompute", ["selective", "moe", "full"])
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "gpt_oss"])
def test_recomputed_layers(
    family: str,
    recompute: str,
    reference: Reference,  # noqa: F811
    ranks: Ranks,  # noqa: F811
) -> None:
    check(reference(family), TENSOR_EXPERT, ranks, memory={"recompute": recompute})


@pytest.mark.parametrize("layout", [TENSOR_EXPERT, {"pipeline": 2}], ids=lambda x: ParallelLayout(**x).describe())
@pytest.mark.parametrize("family", family_models.CONFIGS)
def test_another_layout_loads_a_training_checkpoint(
    family: str,
    layout: dict[str, int],
    reference: Reference,  # noqa: F811
    ranks: Ranks,  # noqa: F811
    tmp_path: Path,
) -> None:
    """One rank's, optimizer state included, through the layout and back."""
    if family == "qwen3":
        layout = {name: degree for name, degree in layout.items() if name != "expert"}
    folder, saved = reference(family)["folder"], tmp_path / "saved"
    known = save(ranks, {}, folder, saved)
    check_there_and_back(layout, folder, (saved, known), tmp_path, ranks)


@pytest.mark.parametrize("family", [f for f in family_models.CONFIGS if f != "qwen3"])
def test_overlapped_reduction(
    family: str,
    reference: Reference,  # noqa: F811
    ranks: Ranks,  # noqa: F811
) -> None:
    layout = {"data": 2, "tensor": 2, "expert": 2}
    check(reference(family), layout, ranks, optimizer={"overlap_grad_reduce": True})


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"tie_word_embeddings": False}),
        ("qwen3_moe", {"norm_topk_prob": False, "tie_word_embeddings": True}),
        ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [0]}),
        ("glm4_moe", {"use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 0.25}),
        ("glm4_moe", {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0}),
        ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}),
        ("deepseek_v3", {"q_lora_rank": None, "rope_parameters": PLAIN_ROPE, "n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"rope_interleave": False, "n_shared_experts": 3, "routed_scaling_factor": 1.0}),
        ("deepseek_v3", {"rope_parameters": family_models.YARN | {"mscale": 0.8, "mscale_all_dim": 0.0}}),
        ("gpt_oss", {"rope_parameters": PLAIN_ROPE, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}),
    ],
    ids=str,
)
def test_what_config_json_can_switch(
    family: str,
    changes: dict[str, Any],
    reference: Reference,  # noqa: F811
    ranks: Ranks,  # noqa: F811
) -> None:
    layout = {"tensor": 2} if family == "qwen3" else {"tensor": 2, "expert": 2}
    check(reference(family, **changes), layout, ranks)
