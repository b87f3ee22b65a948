from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from gspo_megatron.errors import UserError
from gspo_megatron.metrics import MetricsWriter
from gspo_megatron.stability.figure import MAX_RUNS, build_figure
from gspo_megatron.stability.report import summarize, write_report
from gspo_megatron.stability.run_data import config_differences, pick_samples, read_run

ENGINE = "embedded, not SGLang"
ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""


def row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step, "engine": ENGINE, "reward_mean": 0.4 + 0.01 * step, "entropy": 0.5, "grad_norm": 1.0 + step % 3,
        "clip_fraction_token": 0.1, "clip_fraction_sequence": 0.2, "clip_fraction_positive": 0.05,
        "clip_fraction_negative": 0.3, "log_ratio_sequence_p01": -0.02, "log_ratio_sequence_p50": 0.0,
        "log_ratio_sequence_p99": 0.02, "time_rollout_s": 0.3, "time_logprobs_s": 0.1, "time_train_s": 0.5,
        "time_reshard_s": 0.05, "time_step_s": 1.0, **values,
    }  # fmt: skip


def make_run(folder: Path, rows: list[dict[str, Any]], *, samples: Any = (), config: str | None = None) -> Path:
    with MetricsWriter(folder, tensorboard=False, wandb_project="", config={}) as writer:
        for r in rows:
            writer.write(r)
        writer.write_samples(1, samples)
    if config is None:
        config = f'[run]\nfolder = "{folder.name}"\n[algorithm]\nname = "gspo"\nclip_low = 0.03\nclip_high = 0.04\n'
    (folder / "config.toml").write_text(config)
    return folder


def texts(figure: Figure) -> str:
    """All text of the figure, a line each."""
    figure.draw_without_rendering()
    found = [t.get_text() for ax in figure.axes for t in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]]
    legends = [legend for ax in figure.axes if (legend := ax.get_legend())] + list(figure.legends)
    found += [t.get_text() for legend in legends for t in legend.get_texts()]
    return "\n".join([*found, figure.get_suptitle()])


class Page(HTMLParser):
    """Tags, addresses and visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "srcset", "href")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_one_run_gives_a_picture_and_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    samples = [{"prompt": "p", "response": "r", "reward": 1.0, "finish_reason": "stop", "policy_version": 0}]
    rows = [{"step": 0, "engine": ENGINE, "eval_reward_mean": 0.4, "eval_reward_ci95": 0.03}]
    rows += [row(i) for i in range(1, 21)]
    rows[-1] |= {"eval_reward_mean": 0.55, "eval_reward_ci95": 0.02}
    folder = make_run(tmp_path / "run", rows, samples=samples)
    assert write_report([folder]) == [folder / "report.png", folder / "report.html"]

    image = imread(io.BytesIO((folder / "report.png").read_bytes()))
    assert min(image.shape[:2]) > 1000
    page = Page(folder / "report.html")
    assert len(page.addresses) == 2 and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    source = (folder / "report.html").read_text()
    assert "url(" not in source and "@import" not in source and "prefers-color-scheme: dark" in source
    assert ENGINE in page.text
    assert "0.4 ± 0.03" in page.text and "0.55 ± 0.02" in page.text
    assert ">0.43</td>" in source and ">0.58</td>" in source and ">0.15</td>" in source  # first 5, last 5, gain
    assert "algorithm.clip_low" in page.text


def test_the_summary_gives_the_gain_and_the_held_out_rewards(tmp_path: Path) -> None:
    rows = [row(0, reward_mean=None, eval_reward_mean=0.25)] + [row(i, reward_mean=i / 100) for i in range(1, 21)]
    rows[-1]["eval_reward_mean"] = 0.5
    folder = make_run(tmp_path / "run", rows)
    assert summarize(folder) == (
        f"{folder}: mean reward 0.030 (first 5 batches) → 0.180 (last 5), +0.150; held-out 0.250 → 0.500"
    )
    short = make_run(tmp_path / "short", rows[:3])
    assert summarize(short) == f"{short}: too short for a comparison"


def test_what_a_model_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    samples = [
        {"prompt": ATTACK, "response": ATTACK, "reward": 0.5, "finish_reason": ATTACK, "policy_version": 1},
        {"prompt": "p", "response": "lone \ud800", "reward": 0.1},
    ]
    config = f"[task]\nname = {json.dumps(ATTACK)}\n"
    folder = make_run(tmp_path / "<b>run", [row(1, engine=ATTACK)], samples=samples, config=config)
    write_report([folder])
    page = Page(folder / "report.html")
    assert not {"script", "b>run"} & set(page.tags) and page.tags.count("img") == 1 and not page.handlers
    # Engine, setting; and in best, worst and longest: finish reason, prompt, response.
    assert page.text.count(ATTACK) == 1 + 1 + 3 * 3
    assert "<b>run" in page.text


def test_unmeasured_panels_say_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [{"step": i, "reward_mean": 0.5} for i in range(3)])
    shown = texts(build_figure([read_run(folder)]))
    assert shown.count("not measured") == 5
    write_report([folder])
    page = Page(folder / "report.html")
    assert "Not measured:" in page.text and "No rollouts were recorded" in page.text
    assert "rollout engine: not recorded" in shown


def test_metrics_of_several_numbers_are_shown_place_by_place(tmp_path: Path) -> None:
    clip = "clip_fraction_sequence_mini_batches"
    rows = [row(step, **{clip: [0.0, step / 100, None]}) for step in range(1, 8)]
    rows[0]["expert_change_fraction_layers"] = [0.125, 0.25]
    folder = make_run(tmp_path / "run", rows)
    write_report([folder])
    text = Page(folder / "report.html").text
    assert "By mini-batch and by MoE layer" in text
    assert "0 · 0.05 · –" in text, "the mean of the last five"
    assert "0.125 · 0.25" in text
    folder = make_run(tmp_path / "other", [row(1)])
    write_report([folder])
    assert "By mini-batch" not in Page(folder / "report.html").text


def test_an_evaluation_alone_can_be_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [{"step": 0, "eval_reward_mean": 0.5}])
    shown = texts(build_figure([read_run(folder)]))
    assert "held-out" in shown and "interval" not in shown
    assert len(write_report([folder])) == 2


def test_partly_measured_kinds_are_named(tmp_path: Path) -> None:
    rows = [row(i, clip_fraction_token=None, time_reshard_s=None) for i in range(1, 4)]
    shown = texts(build_figure([read_run(make_run(tmp_path / "run", rows))]))
    assert "tokens (not measured)" in shown and "reshard (not measured)" in shown
    assert "rollout (not measured)" not in shown


def test_figure_annotates_gain_clip_and_engine(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [row(i) for i in range(1, 21)])
    figure = build_figure([read_run(folder)])
    shown = texts(figure)
    assert "Reward: +0.150" in shown and "first 5: 0.430" in shown and "last 5: 0.580" in shown
    assert "clip -0.03 / +0.039" in shown
    assert f"run  (rollout engine: {ENGINE})" in shown
    log_ratio = next(ax for ax in figure.axes if ax.get_title().startswith("Sequence log-ratio"))
    heights = [float(np.asarray(line.get_ydata())[0]) for line in log_ratio.lines]
    assert any(h == pytest.approx(math.log(0.97)) for h in heights)
    assert any(h == pytest.approx(math.log(1.04)) for h in heights)
    assert next(ax for ax in figure.axes if ax.get_title().startswith("Gradient")).get_yscale() == "log"


def test_a_clip_far_from_the_data_is_named_not_drawn(tmp_path: Path) -> None:
    config = '[algorithm]\nname = "grpo"\nclip_low = 0.2\nclip_high = 0.27\n'
    figure = build_figure([read_run(make_run(tmp_path / "run", [row(i) for i in range(3)], config=config))])
    assert "clip of tokens -0.22 / +0.24: off the scale" in texts(figure)
    log_ratio = next(ax for ax in figure.axes if ax.get_title().startswith("Sequence log-ratio"))
    assert max(np.abs(log_ratio.get_ylim())) < 0.03


def test_zero_and_non_finite_gradient_norms_are_marked(tmp_path: Path) -> None:
    rows = [row(1, grad_norm=0.0), row(2, grad_norm=math.inf), row(3, grad_norm=1.0)]
    folder = make_run(tmp_path / "run", rows)
    run = read_run(folder)
    assert list(run.non_finite_steps("grad_norm")) == [2]
    assert "NaN or infinite" in texts(build_figure([run])) and "zero" in texts(build_figure([run]))
    write_report([folder])
    assert "grad_norm was NaN or infinite in 1 of 3 rows" in Page(folder / "report.html").text


@pytest.mark.parametrize("norms", [(0.61, 0.62), (3e-7, 2e-6), (0.01, 4000.0), (7.0, 7.0), (0.0, 0.0)])
def test_the_log_axis_always_has_numbers(tmp_path: Path, norms: tuple[float, float]) -> None:
    folder = make_run(tmp_path / "run", [row(i, grad_norm=norm) for i, norm in enumerate(norms)])
    figure = build_figure([read_run(folder)])
    figure.draw_without_rendering()
    axis = figure.axes[4].yaxis
    low, high = figure.axes[4].get_ylim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    assert len({t.label1.get_text() for t in ticks if low <= t.get_loc() <= high} - {""}) >= 2


def test_several_runs_are_overlaid_and_their_configs_compared(tmp_path: Path) -> None:
    config = '[run]\nfolder = "{}"\nseed = 0\n[algorithm]\nname = "{}"\nclip_low = 0.03\nclip_high = 0.04\n{}'
    a = make_run(tmp_path / "a", [row(i) for i in range(1, 21)], config=config.format("a", "gspo", ""))
    b = make_run(
        tmp_path / "b", [row(i, reward_mean=0.5) for i in range(1, 31)],
        config=config.format("b", "gspo_token", "mini_batches = 4\n"),
    )  # fmt: skip
    assert write_report([a, b]) == [tmp_path / "report.png", tmp_path / "report.html"]
    assert not (a / "report.png").exists()
    runs = [read_run(a), read_run(b)]
    assert config_differences(runs) == {"algorithm.name": ["gspo", "gspo_token"], "algorithm.mini_batches": [None, 4]}
    shown = texts(build_figure(runs))
    assert f"a ({ENGINE}), reward +0.150" in shown and f"b ({ENGINE}), reward +0.000" in shown
    page = Page(tmp_path / "report.html")
    assert "Config differences" in page.text and "gspo_token" in page.text and "not set" in page.text
    # Two runs' curves are in the reward panel, each in its own colour.
    reward = build_figure(runs).axes[0]
    assert len({line.get_color() for line in reward.lines if len(np.asarray(line.get_xdata())) in (20, 30)}) == 2


def test_runs_of_equal_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / seed / "train", [row(1)]) for seed in ("s3", "s4")]
    html = write_report(folders, tmp_path / "out" / "here")[1]
    assert html == tmp_path / "out" / "here" / "report.html"
    assert "s3/train" in Page(html).text and "s4/train" in Page(html).text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["_hidden", "$a_b$ $x", "x" * 200])
def test_odd_folder_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    folders = [make_run(tmp_path / name, [row(1)]), make_run(tmp_path / "other", [row(1)])]
    assert len(write_report(folders)) == 2


def test_a_truncated_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [row(1), row(2)], samples=[{"prompt": "p", "response": "r", "reward": 1}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 3, "re')
    write_report([folder])
    text = Page(folder / "report.html").text
    assert "metrics.jsonl: line 3, the last, is incomplete" in text
    assert "samples.jsonl: line 2, the last, is incomplete" in text
    assert [r["step"] for r in read_run(folder).rows] == [1, 2]


def test_batches_run_again_after_a_resume_count_once(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", [row(1), row(2, reward_mean=0.1), row(3), row(2, reward_mean=0.9)]))
    assert [r["step"] for r in run.rows] == [1, 2, 3]
    assert run.values("reward_mean")[1] == 0.9
    assert any("1 rollout batches were run again" in note for note in run.notes)


def test_config_and_samples_may_be_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [row(1)])
    (folder / "config.toml").unlink()
    (folder / "samples.jsonl").unlink()
    write_report([folder])
    text = Page(folder / "report.html").text
    assert "config.toml is missing" in text and "samples.jsonl is missing" in text


def test_nan_of_other_writers_is_not_measured_but_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward_mean": NaN, "loss": null}\n')
    run = read_run(folder)
    assert run.rows[0]["reward_mean"] is None and run.rows[0]["non_finite"] == {"reward_mean": "nan"}
    assert len(write_report([folder])) == 2


def test_samples_are_picked_by_reward_and_length() -> None:
    samples = [{"step": i, "response": "x" * (i % 4), "reward": r} for i, r in enumerate([0.0, 1.0, None, 1.0, 0.5])]
    picked = pick_samples(samples, 2)
    assert [s["step"] for s in picked["best"]] == [3, 1]
    assert [s["step"] for s in picked["worst"]] == [0, 4]
    assert [s["step"] for s in picked["longest"]] == [3, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no metrics\.jsonl"),
        ("", "holds nothing"),
        ("\n \n", "holds nothing"),
        ('{"step": 1', "holds no complete line"),
        ('{"step": 1}\n{"step" 2}\n{"step": 3}\n', "line 2: not valid JSON"),
        ('{"step": 1}\n\n[2]\n{"step": 3}\n', r"line 3: \[2\] is no JSON object"),
        ('{"step": 1}\n{"reward_mean": 1}\n', "line 2: step=None is no integer"),
        ('{"step": 1, "entropy": "high"}\n', "line 1: entropy='high' is no number"),
    ],
)
def test_bad_metrics_are_the_users_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        write_report([tmp_path])
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "report.png").exists()


def test_bad_arguments_are_the_users_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [row(1)])
    with pytest.raises(UserError, match="no run folder given"):
        write_report([])
    with pytest.raises(UserError, match="missing does not exist"):
        write_report([tmp_path / "missing"])
    with pytest.raises(UserError, match="given twice"):
        write_report([folder, tmp_path / "." / "run"])
    with pytest.raises(UserError, match=f"give at most {MAX_RUNS}"):
        write_report([folder] * (MAX_RUNS + 1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report([folder], tmp_path / "file")
    (folder / "config.toml").write_text("[broken")
    with pytest.raises(UserError, match="no valid TOML"):
        write_report([folder])
