"""Converting large checkpoints: speed and memory beside a plain copy, and SIGKILL at random moments."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.weights.conversion.execute import partial_folder
from gspo_megatron.weights.conversion.models import open_model
from gspo_megatron.weights.torch_dist.checksums import FileSum, find_damage, hash_files, list_files
from tests.distributed import family_models
from tests.unit.weights.test_conversion_docs import COMMANDS
from tools import benchmark_conversion, convert_checkpoint

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tools" / "convert_checkpoint.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_gigabytes_in_bounded_memory_at_the_speed_of_a_copy(tmp_path: Path) -> None:
    found = benchmark_conversion.measure(tmp_path / "work", benchmark_conversion.GIGABYTES, repeats=3)
    print(benchmark_conversion.table(found, benchmark_conversion.GIGABYTES))
    for direction, runs in found.items():
        assert max(r.peak_bytes for r in runs) <= benchmark_conversion.MOST_BYTES, direction
        assert sorted(r.ratio for r in runs)[1] >= benchmark_conversion.LEAST_RATIO, direction


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_at_ten_moments_it_goes_on_and_ends_bitwise_equal(direction: str, tmp_path: Path) -> None:
    kill_at_random_moments(direction, tmp_path, gigabytes=1.0, kills=10)


@pytest.mark.timeout(600)
def test_killed_at_two_moments_it_goes_on_and_ends_bitwise_equal(tmp_path: Path) -> None:
    kill_at_random_moments("import", tmp_path, gigabytes=0.3, kills=2)


def sums_of(folder: Path) -> dict[str, FileSum]:
    return hash_files(folder, list_files(folder))


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(*arguments: object) -> str:
    with start(*arguments) as process:
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0, said
    return said


def kill_at_random_moments(direction: str, folder: Path, *, gigabytes: float, kills: int) -> None:
    """Each time a conversion is begun, killed somewhere between its first byte and its last, and begun again."""
    source = benchmark_conversion.make_model(folder / "model", gigabytes, shard_bytes=gigabytes * 1e9 / 6)
    if direction == "export":
        finish("import", source, folder / "dist")
        source = folder / "dist"
    target, partial = folder / "out", partial_folder(folder / "out")
    finish(direction, source, target)
    expected, taken_up, interrupted = sums_of(target), 0, 0
    total = sum(entry.size for entry in expected.values())
    rng = random.Random(direction)
    for number in range(kills):
        shutil.rmtree(target)
        moment = (number + rng.random()) / kills * total  # bytes; one in each part of the way
        with start(direction, source, target) as process:
            deadline = time.monotonic() + 300
            while process.poll() is None and written(partial) < moment:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.wait()
        if target.exists():  # it was done before: what has the name is whole
            assert sums_of(target) == expected
            continue
        interrupted += 1
        assert partial.exists()
        taken_up += "from an earlier try" in finish(direction, source, target)
        assert sums_of(target) == expected
        assert not partial.exists()
    assert interrupted >= kills // 2, "most kills are to hit the writing"
    if kills >= 10:
        assert taken_up >= 1, "some files were finished before a kill"
    if direction == "import":
        assert find_damage(target) == []


def written(partial: Path) -> int:
    """Bytes of the files of an unfinished folder."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(partial))
    except FileNotFoundError:  # not yet begun, or just finished
        return 0


@pytest.mark.timeout(600)
def test_logits_of_both_sides_agree_or_are_said_to_differ(tmp_path: Path) -> None:
    """The trainer's model beside transformers', on a model that a rule wrong in both directions would have changed."""
    source, dist, swapped = tmp_path / "hf", tmp_path / "dist", tmp_path / "swapped"
    family_models.make("qwen3_moe").to(torch.bfloat16).save_pretrained(source)  # as models are published
    finish("import", source, dist)
    [line] = [line for line in COMMANDS if "--logits" in line]  # of docs/conversion.md
    said = finish(*line.replace("Qwen3-30B-A3B", str(source)).replace("qwen3_dist", str(dist)).split()[2:])
    assert "are equal: " in said and "logits of 128 tokens in float32 agree: by at most" in said
    tensors = load_file(shutil.copytree(source, swapped) / "model.safetensors")
    for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, swapped / "model.safetensors", metadata={"format": "pt"})
    models = [open_model(swapped), open_model(source)]
    assert convert_checkpoint.compare_logits(models) == 1
    assert convert_checkpoint.compare_logits(models[1:] * 2) == 0
