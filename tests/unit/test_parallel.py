"""Rank arithmetic, against its own inverse and against Megatron-Core's groups."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.errors import UserError
from gspo_megatron.parallel import ParallelLayout


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    tensor, context, data, pipeline = (draw(st.integers(1, 4)) for _ in range(4))
    stage = tensor * context * data
    pairs = [(e, t) for e in range(1, stage + 1) for t in range(1, stage + 1) if stage % (e * t) == 0]
    expert, expert_tensor = draw(st.sampled_from(pairs))
    return ParallelLayout(
        tensor=tensor, context=context, data=data, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor
    )


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_both_grids_number_every_rank_once(layout: ParallelLayout) -> None:
    assert layout.world_size == layout.tensor * layout.context * layout.data * layout.pipeline
    assert layout.expert_tensor * layout.expert * layout.expert_data * layout.pipeline == layout.world_size
    dense, expert = set(), set()
    for rank in range(layout.world_size):
        c = layout.coordinates(rank)
        assert layout.rank(tensor=c.tensor, context=c.context, data=c.data, pipeline=c.pipeline) == rank
        assert (
            layout.expert_rank(
                expert=c.expert, expert_tensor=c.expert_tensor, expert_data=c.expert_data, pipeline=c.pipeline
            )
            == rank
        )
        dense.add((c.tensor, c.context, c.data, c.pipeline))
        expert.add((c.expert_tensor, c.expert, c.expert_data, c.pipeline))
        assert 0 <= c.tensor < layout.tensor and 0 <= c.context < layout.context and 0 <= c.data < layout.data
        assert 0 <= c.expert_tensor < layout.expert_tensor and 0 <= c.expert < layout.expert
        assert 0 <= c.expert_data < layout.expert_data and 0 <= c.pipeline < layout.pipeline
    assert len(dense) == len(expert) == layout.world_size


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_replicas_cut_the_job_into_equal_parts_each_with_its_head(layout: ParallelLayout) -> None:
    replicas = [layout.replica_ranks(d) for d in range(layout.data)]
    assert sorted(rank for ranks in replicas for rank in ranks) == list(range(layout.world_size))
    for data, ranks in enumerate(replicas):
        assert len(ranks) == layout.tensor * layout.context * layout.pipeline
        assert ranks == sorted(ranks)
        assert layout.head_rank(data) == ranks[0]
        head = layout.coordinates(ranks[0])
        assert (head.tensor, head.context, head.pipeline, head.data) == (0, 0, 0, data)


LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2, data=2, expert=2),
    ParallelLayout(tensor=2, pipeline=2, data=2, expert=4),
    ParallelLayout(tensor=4, context=2, data=3, pipeline=2, expert=6, expert_tensor=2),
    ParallelLayout(tensor=2, context=3, data=4, pipeline=3, expert=8, expert_tensor=1),
    ParallelLayout(tensor=1, context=1, data=8, pipeline=4, expert=8),
    ParallelLayout(tensor=4, data=2, expert=2, expert_tensor=4),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=ParallelLayout.describe)
def test_the_groups_are_megatrons(layout: ParallelLayout) -> None:
    """The ranks that share all coordinates but one form Megatron's group of that axis, in its order."""
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(layout.tensor, 1, layout.data, layout.pipeline, layout.context, order)
    expert = RankGenerator(layout.expert_tensor, layout.expert, layout.expert_data, layout.pipeline, 1, order)

    def ours(axes: tuple[str, ...], grid: tuple[str, ...]) -> list[list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(layout.world_size):
            c = layout.coordinates(rank)
            groups.setdefault(tuple(getattr(c, a) for a in grid if a not in axes), []).append(rank)
        return sorted(groups.values())

    dense_grid = ("tensor", "context", "data", "pipeline")
    for token, axes in {
        "tp": ("tensor",),
        "cp": ("context",),
        "dp": ("data",),
        "pp": ("pipeline",),
        "dp-cp": ("data", "context"),
        "tp-pp": ("tensor", "pipeline"),
    }.items():
        assert sorted(dense.get_ranks(token)) == ours(axes, dense_grid), token
    expert_grid = ("expert_tensor", "expert", "expert_data", "pipeline")
    for token, axes in {
        "tp": ("expert_tensor",),
        "ep": ("expert",),
        "dp": ("expert_data",),
        "pp": ("pipeline",),
        "tp-ep": ("expert_tensor", "expert"),
    }.items():
        assert sorted(expert.get_ranks(token)) == ours(axes, expert_grid), token


@pytest.mark.parametrize("name", ["tensor", "pipeline", "context", "data", "expert", "expert_tensor"])
@pytest.mark.parametrize("degree", [0, -2])
def test_a_degree_below_one_is_named(name: str, degree: int) -> None:
    with pytest.raises(UserError, match=f"^parallel.{name}={degree} must be at least 1$"):
        ParallelLayout(**{name: degree})


@pytest.mark.parametrize(
    ("degrees", "remedy"),
    [
        ({"tensor": 2, "data": 3, "expert": 4}, "use expert in [1, 2, 3, 6]"),
        ({"data": 8, "expert": 3, "expert_tensor": 2}, "use expert in [1, 2, 4]"),
        ({"tensor": 2, "expert": 4}, "use expert in [1, 2]"),
        ({"data": 2, "expert_tensor": 3}, "use expert_tensor in [1, 2]"),
        ({"tensor": 4, "expert": 2, "expert_tensor": 8}, "use expert_tensor in [1, 2, 4]"),
    ],
)
def test_experts_that_do_not_fit_a_stage_get_a_remedy_that_works(degrees: dict[str, int], remedy: str) -> None:
    with pytest.raises(UserError) as error:
        ParallelLayout(**degrees)
    message = str(error.value)
    stage = degrees.get("tensor", 1) * degrees.get("data", 1)
    assert f"parallel.expert={degrees.get('expert', 1)} × parallel.expert_tensor=" in message
    assert f"tensor×context×data={stage}" in message
    assert message.endswith(remedy)
    name, options = remedy.removeprefix("use ").split(" in ")
    for option in options.strip("[]").split(", "):
        if name == "expert":
            ParallelLayout(**(degrees | {"expert": int(option)}))
        else:
            ParallelLayout(**(degrees | {"expert": 1, "expert_tensor": int(option)}))


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (ParallelLayout(), "no parallelism, 1 rank"),
        (ParallelLayout(tensor=2, expert=2), "TP2 × EP2, 2 ranks"),
        (
            ParallelLayout(tensor=2, pipeline=2, virtual_pipeline=2, context=2, data=2),
            "TP2 × PP2 × VPP2 × CP2 × DP2, 16 ranks",
        ),
        (ParallelLayout(data=4, expert=2, expert_tensor=2), "DP4 × EP2 × ETP2, 4 ranks"),
    ],
)
def test_a_layout_is_described_by_the_degrees_above_one(layout: ParallelLayout, text: str) -> None:
    assert layout.describe() == text
