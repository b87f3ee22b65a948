"""Further faults in mid-step: a pipeline stage in the middle that raises, a rank that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_faults import TENSOR_DATA, Case, FaultyJob, check_ended, check_only_error

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
STAGES = {"tensor": 1, "expert": 1, "pipeline": 4}


def test_a_stage_that_raises_in_the_forward_pass(tmp_path: Path) -> None:
    outcome = FaultyJob(Case("raise_in_forward", 1, STAGES), tmp_path).wait()
    check_ended(outcome)
    check_only_error(outcome.stderr, 1)


def test_a_killed_rank_is_named_and_nothing_else_is_said(tmp_path: Path) -> None:
    outcome = FaultyJob(Case("kill", 2, TENSOR_DATA), tmp_path).wait()
    check_ended(outcome)
    assert outcome.stderr == "rank 2 of 4 was ended by SIGKILL (out of memory?)\n"
