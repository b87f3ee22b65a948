"""Builds the native extension, gspo_megatron._C, from csrc/; everything else is in pyproject.toml.

    GSPO_CUDA=auto|0|1    auto: CUDA kernels where nvcc is found; 0: never; 1: without nvcc the build fails
    CUDA_HOME, CUDA_PATH  where CUDA is; else /usr/local/cuda, else the nvcc on PATH
    CXX, CXXFLAGS         the C++ compiler, default g++, and flags that follow those here

Needs setuptools and pybind11, never torch. csrc/README.md says what is compiled for what.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

OBJECTS = Path("build/csrc")

# Python's own flags stay out: in some distributions they name a processor. No -ffast-math: infinities and NaN are data.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Icsrc"
X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = {"baseline": ""}
if X86:
    CXX_FLAGS += " -DGSPO_X86=1"
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512"
    )
CUDA_FLAGS = (
    "-std=c++17 -O3 --threads=2 -Xcompiler=-fPIC,-fvisibility=hidden -Icsrc "
    "-gencode=arch=compute_80,code=[sm_80,compute_80] -gencode=arch=compute_90a,code=sm_90a"
)
# Static: the module imports where there is no CUDA, and beside the runtime of torch, perhaps of another version.
CUDA_LINK_FLAGS = "-lcudart_static -ldl -lrt -lpthread"
HEADERS = (".h", ".cuh")
CUDA_MINIMUM = (12, 0)  # the first that compiles for sm_90a


def run(*command: str) -> str:
    """What a command prints; raises CompileError if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]}: not found; install g++ (Debian: package g++) or set CXX") from None
    if done.returncode != 0:
        raise CompileError(f"exit code {done.returncode}: {shlex.join(command)}\n{done.stdout}")
    return done.stdout


def find_nvcc() -> str | None:
    """The nvcc to build CUDA kernels with, or None if they are not to be built."""
    choice = os.environ.get("GSPO_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f'GSPO_CUDA="{choice}" must be auto, 0 or 1')
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which(f"{home}/bin/nvcc") for home in homes if home] + [shutil.which("nvcc")]
    found = next(filter(None, candidates), None)
    kernels = any(Path("csrc/cuda").glob("*.cu"))
    if choice == "1" and found is None:
        raise SystemExit(
            f"GSPO_CUDA=1, but there is no nvcc in CUDA_HOME={os.environ.get('CUDA_HOME', '')!r}, CUDA_PATH, "
            "/usr/local/cuda or PATH. Install the CUDA toolkit, set CUDA_HOME to where it is, or build without CUDA "
            "kernels: GSPO_CUDA=0"
        )
    if choice == "1" and not kernels:
        raise SystemExit("GSPO_CUDA=1, but csrc/cuda has no kernels: get the whole source, or set GSPO_CUDA=0")
    if choice == "0" or found is None or not kernels:
        return None
    real = os.path.realpath(found)  # nvcc finds its files beside itself, not beside a link to it
    return real if os.path.basename(real) == "nvcc" else found


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit, as its nvcc describes it: what is found on PATH may be a script far from the toolkit."""

    nvcc: str
    version: str  # as printed
    includes: list[str]
    libraries: list[str]  # folders

    @classmethod
    def of(cls, nvcc: str) -> Cuda:
        """Raises SystemExit if it is too old."""
        version = run(nvcc, "--version")
        release = re.search(r"release (\d+)\.(\d+)", version)
        if release is None or (int(release[1]), int(release[2])) < CUDA_MINIMUM:
            raise SystemExit(
                f"{nvcc} is of CUDA {release[0] if release else version}; {'.'.join(map(str, CUDA_MINIMUM))} or "
                "later is needed. Set CUDA_HOME to where that is, or build without CUDA kernels: GSPO_CUDA=0"
            )
        settings = dict(re.findall(r"^#\$ (\w+)=(.*)$", run(nvcc, "--dryrun", "-c", "any.cu"), re.MULTILINE))
        return cls(nvcc, version, shlex.split(settings["INCLUDES"]), shlex.split(settings["LIBRARIES"]))


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    source: Path
    variant: str  # tells the objects of one source apart
    command: list[str]
    versions: str  # of what is outside csrc
    includes: list[str]  # folders outside csrc; not in the object's name: build isolation makes new ones each time

    @cached_property  # once: the files may change while others are compiled
    def object(self) -> Path:
        """Named after all that decides its content: a switch compiles again, a repeat does not."""
        headers = sorted(path for path in Path("csrc").rglob("*") if path.suffix in HEADERS)
        digest = hashlib.sha256("\0".join([*self.command, self.versions]).encode())
        for path in (self.source, *headers):
            digest.update(f"\0{path}\0".encode() + path.read_bytes())
        return OBJECTS / f"{self.source.parent.name}-{self.source.stem}-{self.variant}.{digest.hexdigest()[:16]}.o"

    def compile(self) -> None:
        for outdated in OBJECTS.glob(f"{self.object.name.split('.')[0]}.*"):
            outdated.unlink(missing_ok=True)
        partial = self.object.with_suffix(f".{os.getpid()}")  # a build that is killed leaves no object
        warnings = run(*self.command, *self.includes, "-c", str(self.source), "-o", str(partial))
        print(f"compiled {self.source} ({self.variant})\n{warnings}", end="", flush=True)
        partial.rename(self.object)


def units(cxx: list[str], cuda: Cuda | None, python_folders: list[str]) -> list[Unit]:
    """All compilations, in the order in which their objects are to be linked.

    An inline function of the standard library that several objects hold is linked from the first of them. Objects of
    the lesser instruction sets therefore come first: a processor without AVX-512 would stop at an AVX-512 copy.
    """
    import pybind11  # only a build needs it

    version = run(*cxx, "--version")
    flags = [*CXX_FLAGS.split(), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    python = f"{version}{sysconfig.get_config_var('SOABI')} pybind11 {pybind11.__version__}"
    folders = [f"-I{folder}" for folder in (*python_folders, pybind11.get_include())]
    with_cuda = ["-DGSPO_WITH_CUDA=1"] if cuda else []
    cuda_folders = cuda.includes if cuda else []
    dispatch = Path("csrc/cpu/dispatch.cpp")
    found = [
        Unit(Path("csrc/bindings.cpp"), "all", [*cxx, *flags, *with_cuda], python, folders + cuda_folders),
        Unit(dispatch, "all", [*cxx, *flags], version, []),
    ]
    for name, options in INSTRUCTION_SETS.items():
        command = [*cxx, *flags, f"-DGSPO_ISA={name}", *options.split()]
        sources = sorted(set(Path("csrc/cpu").glob("*.cpp")) - {dispatch})
        found += [Unit(source, name, command, version, []) for source in sources]
    if cuda:
        settings = [
            f"{name}={os.environ.get(name)}" for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
        ]
        versions = "\n".join([cuda.version, version, *settings])
        command = [cuda.nvcc, *CUDA_FLAGS.split()]
        found += [Unit(source, "fat", command, versions, []) for source in sorted(Path("csrc/cuda").glob("*.cu"))]
    return found


class BuildNative(build_ext):
    """Compiles what has changed, all processors at once, and links it."""

    def run(self) -> None:
        if sys.platform != "linux":
            raise SystemExit(f"gspo_megatron is built on Linux only; this is {sys.platform}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        cuda = Cuda.of(nvcc) if nvcc else None
        print(f"CUDA kernels: {f'with {nvcc}' if nvcc else 'none'}", flush=True)
        cxx = shlex.split(os.environ.get("CXX") or "g++")
        everything = units(cxx, cuda, self.include_dirs)
        OBJECTS.mkdir(parents=True, exist_ok=True)
        stale = [unit for unit in everything if not unit.object.exists() or self.force]
        with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
            # What takes longest, and is last in the order of linking, starts first.
            list(pool.map(Unit.compile, reversed(stale)))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [*cuda.libraries, *CUDA_LINK_FLAGS.split()] if cuda else []
        objects = [str(unit.object) for unit in everything]
        print(run(*cxx, "-shared", "-fopenmp", *objects, *libraries, "-o", str(target)), end="")


# Everything in csrc belongs to a source distribution, whatever is built from it here.
files = sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file())
setup(ext_modules=[Extension("gspo_megatron._C", [], depends=files)], cmdclass={"build_ext": BuildNative})
