"""The page on reading a run explains every metric, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from gspo_megatron.metrics import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "reading_a_run.md").read_text()


def test_every_metric_is_explained_once() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    explained = [name for cell in rows for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(explained) == sorted(METRICS)


def test_the_readme_links_to_it() -> None:
    assert "(docs/reading_a_run.md)" in (Path(__file__).parents[2] / "README.md").read_text()
