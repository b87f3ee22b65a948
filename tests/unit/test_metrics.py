from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gspo_megatron import metrics
from gspo_megatron.errors import CauseError, UserError
from gspo_megatron.metrics import METRICS, SAMPLE_FIELDS, MetricsWriter

DOCUMENTED = [
    "step",
    "policy_version",
    "engine",
    "reward_mean",
    "reward_std",
    "response_length_mean",
    "truncated_fraction",
    "entropy",
    "grad_norm",
    "loss",
    "clip_fraction_token",
    "clip_fraction_sequence",
    "clip_fraction_positive",
    "clip_fraction_negative",
    "log_ratio_sequence_p01",
    "log_ratio_sequence_p50",
    "log_ratio_sequence_p99",
    "log_ratio_sequence_max_abs",
    "token_ratio_max",
    "kl_rollout_trainer",
    "expert_change_fraction",
    "sync_probe_max_abs",
    "rollout_tokens_per_s",
    "time_rollout_s",
    "time_logprobs_s",
    "time_train_s",
    "time_reshard_s",
    "time_step_s",
    "reshard_bytes",
    "eval_reward_mean",
]


def plain_writer(folder: Path) -> MetricsWriter:
    return MetricsWriter(folder, tensorboard=False, wandb_project="", config={})


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_the_documented_keys_come_first_and_in_order() -> None:
    assert list(METRICS)[: len(DOCUMENTED)] == DOCUMENTED
    assert all(description.strip() for description in METRICS.values())


def test_a_row_has_every_key_and_null_for_what_was_not_measured(tmp_path: Path) -> None:
    with plain_writer(tmp_path / "new" / "run") as writer:
        writer.write({"step": 1, "reward_mean": 0.0, "engine": "embedded"})
        row = read_lines(tmp_path / "new" / "run" / "metrics.jsonl")[0]  # flushed before close
    assert list(row) == list(METRICS)
    assert (row["step"], row["reward_mean"], row["engine"]) == (1, 0.0, "embedded")
    assert all(row[key] is None for key in METRICS if key not in ("step", "reward_mean", "engine"))


def test_numbers_of_numpy_and_torch_are_written_as_numbers(tmp_path: Path) -> None:
    with plain_writer(tmp_path) as writer:
        writer.write({"step": np.int64(2), "entropy": torch.tensor(0.25), "loss": np.float32(0.5)})
    row = read_lines(tmp_path / "metrics.jsonl")[0]
    assert (row["step"], row["entropy"], row["loss"]) == (2, 0.25, 0.5)


def test_non_finite_values_are_null_and_named(tmp_path: Path) -> None:
    with plain_writer(tmp_path) as writer:
        writer.write({"step": 1, "grad_norm": math.inf, "loss": torch.tensor(math.nan), "entropy": -math.inf})
        writer.write({"step": 2, "grad_norm": 1.0})
    bad, good = read_lines(tmp_path / "metrics.jsonl")
    assert bad["grad_norm"] is bad["loss"] is bad["entropy"] is None
    assert bad["non_finite"] == {"grad_norm": "inf", "loss": "nan", "entropy": "-inf"}
    assert "non_finite" not in good


def test_lists_are_written_as_lists(tmp_path: Path) -> None:
    key = "clip_fraction_token_mini_batches"
    with plain_writer(tmp_path) as writer:
        writer.write({"step": 1, key: [0.0, None, np.float64(0.5), math.nan]})
        writer.write({"step": 2})
    measured, absent = read_lines(tmp_path / "metrics.jsonl")
    assert measured[key] == [0.0, None, 0.5, None]
    assert measured["non_finite"] == {f"{key}/3": "nan"}
    assert absent[key] is None


def test_unknown_keys_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with plain_writer(tmp_path) as writer:
        with pytest.raises(ValueError, match=r'"reward_men" is no metric\. Did you mean "reward_mean"\?'):
            writer.write({"step": 1, "reward_men": 1.0})
        with pytest.raises(ValueError, match="needs an integer step"):
            writer.write({"reward_mean": 1.0})
        with pytest.raises(ValueError, match=r'"promt" is no field of a sample\. Did you mean "prompt"\?'):
            writer.write_samples(1, [{"promt": "x"}])
        with pytest.raises(TypeError, match="list"):
            writer.write({"step": 1, "reward_mean": [1.0]})
        with pytest.raises(TypeError, match="must be a list or None, not float"):
            writer.write({"step": 1, "clip_fraction_token_mini_batches": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_samples_survive_any_text(tmp_path: Path) -> None:
    texts = ["two\nlines", "\u2028 separator", 'quote " and \\', "é 漢 🙂", "lone \ud800 surrogate", ""]
    with plain_writer(tmp_path) as writer:
        writer.write_samples(3, [{"prompt": "p", "response": text, "reward": None} for text in texts])
    rows = read_lines(tmp_path / "samples.jsonl")
    assert [row["response"] for row in rows] == texts
    assert all(list(row) == list(SAMPLE_FIELDS) and row["step"] == 3 for row in rows)
    assert rows[0]["reward"] is None and rows[0]["advantage"] is None


def test_a_reopened_file_continues_after_its_last_whole_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with plain_writer(tmp_path) as writer:
        writer.write({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # killed while writing
    with caplog.at_level(logging.WARNING), plain_writer(tmp_path) as writer:
        writer.write({"step": 2})
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "incomplete line (16 bytes)" in caplog.text


def test_tensorboard_holds_what_was_measured(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True, wandb_project="", config={"run": {"seed": 3}}) as writer:
        writer.write({"step": 1, "reward_mean": 0.25, "engine": "embedded"})
        writer.write({"step": 2, "reward_mean": 0.75, "grad_norm": math.inf})
        writer.write({"step": 3, "clip_fraction_token_mini_batches": [None, 0.5]})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == [
        "reward_mean",
        "grad_norm",
        "clip_fraction_token_mini_batches/1",
    ]
    assert [(e.step, e.value) for e in events.Scalars("reward_mean")] == [(1, 0.25), (2, 0.75)]
    assert events.Scalars("grad_norm")[0].value == math.inf


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("tensorboard", {"tensorboard": True, "wandb_project": ""}, r"log\.tensorboard=true.*pip install tensorboard"),
        ("wandb", {"tensorboard": False, "wandb_project": "p"}, r'log\.wandb_project="p".*pip install wandb'),
    ],
)
def test_a_missing_sink_is_the_users_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say: not importable
    with pytest.raises(UserError, match=message):
        MetricsWriter(tmp_path, config={}, **options)
    assert not (tmp_path / "metrics.jsonl").exists()


class FakeWandb(ModuleType):
    """The part of wandb's interface that is used, as of 0.25; records the calls."""

    class Error(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__("wandb")
        self.errors = ModuleType("wandb.errors")
        self.errors.Error = FakeWandb.Error  # type: ignore[attr-defined]
        self.calls: list[tuple[str, Any]] = []
        self.broken = broken

    def init(self, *, project: str, name: str, dir: str, config: dict[str, Any]) -> FakeWandb:
        if self.broken:
            raise FakeWandb.Error("No API key configured")
        self.calls.append(("init", (project, name, dir, config)))
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, data: dict[str, Any]) -> None:
        self.calls.append(("log", data))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_wandb_gets_the_config_and_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "run1"
    with MetricsWriter(folder, tensorboard=False, wandb_project="p", config={"run": {"seed": 3}}) as writer:
        writer.write({"step": 5, "reward_mean": 0.5, "engine": "embedded", "expert_gradient_spread_layers": [1, 2]})
        writer.close()  # closing twice is fine
    spread = {"expert_gradient_spread_layers/0": 1, "expert_gradient_spread_layers/1": 2}
    assert fake.calls == [
        ("init", ("p", "run1", str(folder), {"run": {"seed": 3}})),
        ("define_metric", ("*", "step")),
        ("log", {"step": 5, "engine": "embedded", "reward_mean": 0.5} | spread),
        ("finish", None),
    ]


def test_wandb_without_a_login_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken=True))
    with pytest.raises(UserError, match=r"No API key configured.*WANDB_MODE=offline"):
        MetricsWriter(tmp_path, tensorboard=False, wandb_project="p", config={})


def test_a_full_disk_is_said_with_what_helps() -> None:
    with open("/dev/full", "ab", buffering=0) as file:
        for _ in range(2):  # nothing of the first try is left over
            with pytest.raises(CauseError, match=r"/dev/full cannot be written: No space left on device\. Make room"):
                metrics._append(file, "{}\n")
