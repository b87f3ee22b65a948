"""Every model family against transformers in further layouts: context, pipeline, expert-tensor parallelism, and with
experts one after the other; see tests/distributed/test_families.py."""

from __future__ import annotations

import pytest

from gspo_megatron.parallel import ParallelLayout
from tests.distributed import family_models
from tests.distributed.conftest import ranks  # noqa: F401
from tests.distributed.test_families import Ranks, Reference, check, reference  # noqa: F401

pytestmark = [pytest.mark.system, pytest.mark.slow]

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
    check(reference(family), layout, ranks)


@pytest.mark.parametrize("experts", ["sequential"])
@pytest.mark.parametrize("family", [f for f in family_models.CONFIGS if f != "qwen3"])
def test_experts_one_after_the_other(
    family: str,
    experts: str,
    reference: Reference,  # noqa: F811
    ranks: Ranks,  # noqa: F811
) -> None:
    check(reference(family), {"tensor": 2, "expert": 2}, ranks, model={"experts": experts})
