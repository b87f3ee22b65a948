"""Training over a real SGLang server with the families whose tensors it is known to lay out, besides Qwen3's.

The run starts from random weights that the server doesn't have: it gets them all in an update, every parameter's
checksum is compared, and log-probabilities of probes are those of the trainer.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.weights.families import FAMILIES
from tests.distributed import family_models
from tests.system.sglang_setup import ROOT, sglang_python

pytestmark = [pytest.mark.system, pytest.mark.slow]
QUICKSTART = ROOT / "examples" / "quickstart"
KNOWN = sorted(name for name, family in FAMILIES.items() if family.known_to_servers and not name.startswith("qwen3"))
CHANGES: dict[str, dict[str, int]] = {
    "olmoe": {"num_key_value_heads": 4},  # SGLang has it without query groups
    "glm4_moe": {"n_shared_experts": 1},  # as published; on a CPU SGLang pads each of several by itself
}
CONFIG = """
[run]
folder = "{folder}/run"
[model]
path = "{folder}/model"
init = "random"
[task]
name = "reasoning_gym"
dataset = "spell_backward"
prompt_pattern = ': (?P<word>\\w+)$'
prompt_template = "{{word}}>"
lowercase = true
[algorithm]
name = "gspo"
entropy_coefficient = 0.5 # something to learn without rewards
[rollout]
engine = "sglang"
prompts_per_batch = 8
samples_per_prompt = 4
max_response_tokens = 16
[optimizer]
lr = 0.05
[train]
rollout_batches = 2
[eval]
prompts = 8
[sglang]
python = "{python}"
tensor = {tensor}
check = "full"
start_timeout_s = 300
"""


@pytest.mark.parametrize(
    ("family", "tensor"),
    [(family, tensor) for family in KNOWN for tensor in (1, 2) if (family, tensor) != ("olmoe", 2)],  # SGLang can't
)
def test_a_server_holds_and_computes_what_the_trainer_does(family: str, tensor: int, tmp_path: Path) -> None:
    family_models.make(family, vocab_size=100, num_hidden_layers=2, **CHANGES.get(family, {})).save_pretrained(
        tmp_path / "model"
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(QUICKSTART / "model" / name, tmp_path / "model" / name)
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=tmp_path, python=sglang_python(), tensor=tensor))
    done = subprocess.run(
        [sys.executable, "-m", "gspo_megatron", "train", config], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    assert len(steps) == 2
    for line in steps:
        assert line["sync_probe_max_abs"] <= 1e-5 and line["kl_rollout_trainer"] <= 1e-8 and line["grad_norm"] > 1e-3
