"""Builds the native extension from csrc/ once there is one; everything else is in pyproject.toml.

GSPO_CUDA=auto|0|1 chooses whether CUDA kernels are built. There are none yet, so it is only validated.
"""

import os
from glob import glob

from setuptools import setup

BINDINGS = "csrc/bindings.cpp"


def cuda_choice() -> str:
    choice = os.environ.get("GSPO_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f'GSPO_CUDA="{choice}" must be auto, 0 or 1')
    return choice


def extensions() -> list:
    choice = cuda_choice()
    kernels = sorted(glob("csrc/cuda/*.cu"))
    if kernels and choice == "1":
        raise SystemExit(f"GSPO_CUDA=1, but setup.py does not compile CUDA yet: {', '.join(kernels)}")
    if not os.path.exists(BINDINGS):
        return []
    from pybind11.setup_helpers import Pybind11Extension  # only a build with sources needs it

    sources = [BINDINGS, *sorted(glob("csrc/cpu/*.cpp"))]
    return [Pybind11Extension("gspo_megatron._C", sources, include_dirs=["csrc"], cxx_std=17)]


setup(ext_modules=extensions())
