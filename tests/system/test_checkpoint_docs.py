"""The commands of docs/checkpoints.md do what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspo_megatron import checkpoints
from gspo_megatron.config import CheckpointConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()


def test_every_key_is_on_the_page() -> None:
    for name in CheckpointConfig.__dataclass_fields__:
        assert re.search(rf"`(checkpoint\.)?{name}`", PAGE), name


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(900)
def test_the_commands(tmp_path: Path) -> None:
    commands = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    outputs = []
    for command in [commands[0], *commands]:
        text = command.replace("runs/", f"{tmp_path}/")
        text = re.sub(r"\bpython (-m|tools)", rf"{sys.executable} \1", text)
        done = subprocess.run(
            ["bash", "-ec", text],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        outputs.append(done.stdout)
    assert "has finished; nothing is left to do" in outputs[1]
    assert "after 4 rollout batches" in outputs[2] and "TP2 × EP2" in outputs[2]
    assert [checkpoints.batch_of(path) for path in checkpoints.complete(tmp_path / "resumable")] == [6, 4]
    exported, final = (tmp_path / name / "model.safetensors" for name in ("exported", "resumable/final"))
    a, b = load_file(exported), load_file(final)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert "stopped on SIGUSR1 after rollout batch" in outputs[4]
