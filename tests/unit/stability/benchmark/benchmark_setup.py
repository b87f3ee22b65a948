"""A benchmark of two arms and two seeds on bases that nothing reads but the enumeration, and a stand-in for the
process of a cell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gspo_megatron.stability.benchmark.cells import Plan, make_plan
from gspo_megatron.stability.benchmark.results import Result
from gspo_megatron.stability.benchmark.runner import Workplace
from gspo_megatron.stability.benchmark.spec import Spec, read_spec

SPEC = """
name = "two_arms"
title = "Two arms"
seeds = [11, 12]

[needs]
machine = "any"

[base]
train = "train.toml"
sft = "sft.toml"

[train]
optimizer.lr = 1e-3

[models.small]
title = "small model"
base = "model"

[models.deep]
title = "deep model"
base = "model"
config = { num_hidden_layers = 9 }

[arms.gspo]
title = "GSPO"
settings.algorithm.name = "gspo"

[arms.grpo]
title = "GRPO"
settings.algorithm.name = "grpo"

[experiments.first]
number = 1
title = "First"
question = "Which?"
hypothesis = "The one."
measure = "Clipping."
command = "train"
grid = [{ models = ["small"], arms = ["gspo", "grpo"], factors = { "algorithm.mini_batches" = [4] }, seconds = 10 }]

[[experiments.first.claims]]
name = "gap"
text = "GSPO clips ten times as much"
kind = "ratio"
metric = "clip_fraction_token"
reduce = "mean"
floor = 1e-5
of = { arm = "gspo" }
against = { arm = "grpo" }
at_least = 10

[[experiments.first.panels]]
kind = "batches"
title = "Clipped"
metrics = ["clip_fraction_token"]
y_label = "share"

[experiments.second]
number = 2
title = "Second"
question = "How?"
hypothesis = "Slowly."
measure = "Slope."
command = "train"
grid = [{ models = ["small"], arms = ["gspo"], factors = { "algorithm.mini_batches" = [4, 8] }, seconds = 10 }]

[[experiments.second.claims]]
name = "slope"
text = "Doubles"
kind = "slope"
metric = "clip_fraction_token"
reduce = "last:2"
over = "algorithm.mini_batches"
at_least = 0.5
at_most = 1.5
"""

# `python -m gspo_megatron COMMAND BASE --key value …` as far as the benchmark looks at it: a line of calls.txt, and
# records; under GRPO it fails if the file "broken" is there, and takes a minute if "slow" is.
_PROCESS = """#!{python}
import json, os, pathlib, sys, time
words = sys.argv[3:]
command, settings = words[0], dict(zip(words[2::2], words[3::2]))
root = pathlib.Path("{root}")
name = settings.get("--algorithm.name", "")
with open(root / "calls.txt", "a") as file:
    file.write(f"{{os.getpid()}} {{command}} {{name}} {{settings['--run.seed']}}\\n")
if name == "grpo" and (root / "broken").exists():
    print("error: grpo is broken", file=sys.stderr)
    sys.exit(1)
if name == "grpo" and (root / "slow").exists():
    time.sleep(60)
run = pathlib.Path(settings["--run.folder"])
run.mkdir(parents=True, exist_ok=True)
clip = {{"gspo": 0.2, "grpo": 0.01, "": 0.0}}[name] * int(settings.get("--algorithm.mini_batches", 4)) / 4
rows = [{{"step": step, "clip_fraction_token": clip, "reward_mean": 0.5, "time_step_s": 1.0}} for step in range(4)]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(run / "final").mkdir(exist_ok=True)
"""


def write_root(root: Path, text: str = SPEC) -> tuple[Spec, Plan]:
    """The spec's bases and model under `root`; returns the spec and its cells."""
    (root / "model").mkdir(parents=True, exist_ok=True)
    (root / "model" / "config.json").write_text('{"num_hidden_layers": 2}')
    (root / "train.toml").write_text('[run]\nfolder = "x"\n[optimizer]\nlr = 1e-4\n')
    (root / "sft.toml").write_text('[run]\nfolder = "x"\n')
    (root / "spec.toml").write_text(text)
    spec = read_spec(root / "spec.toml", root)
    return spec, make_plan(spec, root)


def workplace(root: Path) -> Workplace:
    """Cells are the stand-in's."""
    process = root / "process"
    process.write_text(_PROCESS.format(python=sys.executable, root=root))
    process.chmod(0o755)
    return Workplace(root / "runs", root, str(process))


def calls(root: Path) -> list[str]:
    """What was run, `command arm seed`, in order."""
    path = root / "calls.txt"
    return [line.partition(" ")[2] for line in path.read_text().splitlines()] if path.exists() else []


def result(**columns: Any) -> Result:
    """A training run's result."""
    return Result(1.0, columns, {}, {})


def measured(**values: float) -> Result:
    """A measurement's result."""
    return Result(1.0, {}, values, {})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
