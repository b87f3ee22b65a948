"""The report of one or several runs: report.png and a self-contained report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gspo_megatron.errors import UserError
from gspo_megatron.stability.figure import MAX_RUNS, draw
from gspo_megatron.stability.page import render
from gspo_megatron.stability.quantities import first_last_gain, first_last_means, measured
from gspo_megatron.stability.run_data import read_run, run_names

__all__ = ["first_last_gain", "summarize", "write_report"]


def summarize(folder: Path) -> str:
    """One line on a run: mean reward of the first and last five rollout batches, held-out before and after. Then one
    for each of the watchdog's findings."""
    run = read_run(folder)
    parts = []
    if (means := first_last_means(run.rows, "reward_mean")) is not None:
        first, last = means
        parts.append(f"mean reward {first:.3f} (first 5 batches) → {last:.3f} (last 5), {last - first:+.3f}")
    if len(held_out := measured(run.rows, "eval_reward_mean")) > 1:
        parts.append(f"held-out {held_out[0]:.3f} → {held_out[-1]:.3f}")
    found = "".join(f"\n  watchdog, batch {finding.step}: {finding.message}" for finding in run.findings)
    return f"{folder}: {'; '.join(parts) or 'too short for a comparison'}{found}"


def write_report(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write report.png and report.html, with several runs overlaid.

    Args:
        folders: run folders; each needs a metrics.jsonl, config.toml and samples.jsonl are used where present.
        out: folder to write into; made if missing. None: the run folder for one run, for several the parent of the
            first.

    Returns:
        The files written: the PNG, then the HTML.

    Raises:
        UserError: no folder, one without records or with a malformed line, too many, or nowhere to write.
    """
    if not folders:
        raise UserError("no run folder given; give at least one, e.g. runs/quickstart")
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} run folders are more than colours can tell apart; give at most {MAX_RUNS}")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"run folder {folder} does not exist; give the run.folder of a run")
    runs = [read_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
    light = draw(runs)
    page = render(runs, light_png=light, dark_png=draw(runs, dark=True))
    if out is None:
        out = folders[0] if len(folders) == 1 else folders[0].resolve().parent
    png_path, html_path = out / "report.png", out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        png_path.write_bytes(light)
        # A lone surrogate of a response has no UTF-8 form.
        html_path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise UserError(f"cannot write the report into {out} ({error.strerror}); give another output folder") from error
    return [png_path, html_path]
