"""The checksum of parameters on a GPU, against SGLang's own kernel, run on the CPU by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.system.sglang_setup import ROOT, sglang_python

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

# The kernel's file is executed by itself: the package around it would load CUDA libraries. Its only demand that a CPU
# doesn't meet is that the tensor lies on a GPU.
PROGRAM = """
import importlib.metadata, importlib.util, pathlib, sys, types
import torch

files = importlib.metadata.files("sglang")
path = next(f.locate() for f in files if str(f).endswith("kernels/ops/memory/gpu_tensor_hash.py"))
patched = pathlib.Path(sys.argv[2]) / "kernel.py"  # Triton reads a kernel's source from its file
patched.write_text(pathlib.Path(path).read_text().replace("assert t.is_cuda", "assert True").replace(
    "assert tensor.is_cuda", "assert True"))

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

kernel = load("kernel", patched)
ours = load("checksum", sys.argv[1])
generator = torch.Generator().manual_seed(0)
for numel, dtype in ((1, torch.bfloat16), (5, torch.float32), (8192, torch.float32), (20001, torch.bfloat16)):
    tensor = torch.randn(numel, generator=generator).to(dtype)
    checksum = ours.DeviceChecksum(tensor.numel() * tensor.element_size())
    for piece in tensor.split(max(1, numel // 3)):
        checksum.update(piece)
    expected = f"{kernel.gpu_tensor_hash(tensor):016x}"
    assert checksum.hexdigest() == expected, (numel, dtype, checksum.hexdigest(), expected)
print("equal")
"""


def test_the_checksum_is_that_of_sglangs_kernel(tmp_path: object) -> None:
    done = subprocess.run(
        [str(sglang_python()), "-c", PROGRAM, str(ROOT / "gspo_megatron/weights/checksum.py"), str(tmp_path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr
