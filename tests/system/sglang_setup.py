"""What tests against real SGLang servers share: their environment, tiny models to serve, and `serve` itself."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ROOT = Path(__file__).parents[2]
VOCAB = 512
PAD, EOS = 0, 1
SETUP_LIMIT_S = 1200.0
START_S = 300.0
CONFIG = """
[run]
folder = "{folder}/run"
[model]
path = "{model}"
[task]
name = "reasoning_gym"
dataset = "spell_backward"
[sglang]
python = "{python}"
start_timeout_s = {timeout}
"""


@functools.cache
def sglang_python() -> Path:
    """The Python of .venv-sglang, which is made first where it is missing or old: one to two minutes.

    Raises AssertionError, with what the script said, if it can't be made: a missing server is no reason to skip.
    """
    done = subprocess.run(
        [ROOT / "tools" / "setup_sglang.sh"], cwd=ROOT, capture_output=True, text=True, timeout=SETUP_LIMIT_S
    )
    assert done.returncode == 0, f"tools/setup_sglang.sh ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return ROOT / ".venv-sglang" / "bin" / "python"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after <pad>, <eos> and <unk>."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def write_model(folder: Path, kind: str = "moe", seed: int = 0, layers: int = 3, hidden: int = 64) -> Path:
    """Save a tiny Qwen3-MoE (`moe`) or Qwen3 (`dense`) with a tokenizer, in float32; returns its folder.

    Weights are large enough that experts and attention matter, and small enough that float32's own error in a
    log-probability stays near 2e-6: at twice this range it exceeds 1e-5. 4 heads, 2 key-value heads, 8 experts: up to
    TP 2. There each rank of a server on a CPU, which pads its share of an MLP to a multiple of 32, has a part of every
    expert.
    """
    common = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if kind == "moe":
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts))
    else:
        assert kind == "dense", kind
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones by default, and so alike in every model
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Serve:
    """`python -m gspo_megatron serve` in the background."""

    def __init__(self, folder: Path, model: Path, *overrides: str) -> None:
        self.folder = folder
        config = folder / "train.toml"
        config.write_text(CONFIG.format(folder=folder, model=model, python=sglang_python(), timeout=START_S))
        with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gspo_megatron", "serve", str(config), *overrides],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                stdout=out,
                stderr=err,
            )

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def wait_ready(self, times: int = 1) -> str:
        """The server's address, when its summary has appeared so often and the addresses were printed."""
        deadline = time.monotonic() + START_S
        while self.read("stdout").count("ready after") < times or 'addresses = "' not in self.read("stdout"):
            assert self.process.poll() is None, self.read("stderr")
            assert time.monotonic() < deadline, self.read("stdout") + self.read("stderr")
            time.sleep(0.2)
        found = re.search(r'^addresses = "(\S+)"$', self.read("stdout"), re.MULTILINE)
        assert found is not None
        return found[1]

    def guards(self) -> dict[int, int]:
        """Process id of each server's guard, by port."""
        return {int(port): int(pid) for port, pid in re.findall(r":(\d+), ready .* pid (\d+)", self.read("stdout"))}

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def scheduler(self) -> psutil.Process:
        (found,) = [p for p in self.family() if p.cmdline()[:1] == ["sglang::scheduler"]]
        return found
