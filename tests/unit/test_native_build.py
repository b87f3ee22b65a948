"""setup.py: what is compiled for what, when it is compiled again, and what it needs; on small sources of its own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pybind11
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
X86 = platform.machine() == "x86_64"
INSTRUCTION_SETS = ["baseline", "avx2", "avx512"] if X86 else ["baseline"]

# level() is an inline function that every object holds under one name, as functions of the standard library are.
SOURCES = {
    "launchers.h": """
        #pragma once
        constexpr int kAnswer = 7;
        namespace gspo {
        __attribute__((noinline)) inline int level(volatile int* zero) {
        #if defined(__AVX512F__)
            return 3 + *zero;
        #elif defined(__AVX2__)
            return 2 + *zero;
        #else
            return 1 + *zero;
        #endif
        }
        }
        """,
    "bindings.cpp": """
        #include <Python.h>
        #include "launchers.h"
        #if !__has_include(<pybind11/pybind11.h>)
        #error no pybind11
        #endif
        #ifdef GSPO_WITH_CUDA
        #include <cuda_runtime_api.h>
        namespace gspo::cuda { int count_devices(); }
        #else
        #define CUDART_VERSION 0
        namespace gspo::cuda { int count_devices() { return 0; } }
        #endif
        namespace gspo { int level_of(int which); int answer(); }
        static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(gspo::answer()); }
        static PyObject* cudart(PyObject*, PyObject*) { return PyLong_FromLong(CUDART_VERSION); }
        static PyObject* count_devices(PyObject*, PyObject*) { return PyLong_FromLong(gspo::cuda::count_devices()); }
        static PyObject* level_of(PyObject*, PyObject* which) {
            return PyLong_FromLong(gspo::level_of(static_cast<int>(PyLong_AsLong(which))));
        }
        static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr},
                                        {"cudart", cudart, METH_NOARGS, nullptr},
                                        {"count_devices", count_devices, METH_NOARGS, nullptr},
                                        {"level_of", level_of, METH_O, nullptr},
                                        {nullptr, nullptr, 0, nullptr}};
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, {}, {}, {}, {}};
        PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
        """,
    "cpu/dispatch.cpp": """
        #include "launchers.h"
        namespace gspo {
        namespace baseline { int inlined(); int flags(); }
        #ifdef GSPO_X86
        namespace avx2 { int flags(); }
        namespace avx512 { int flags(); }
        #endif
        int answer() { return kAnswer; }
        int level_of(int which) {
        #ifdef GSPO_X86
            if (which == 2) return avx2::flags();
            if (which == 3) return avx512::flags();
        #endif
            return which == 0 ? baseline::inlined() : baseline::flags();
        }
        }
        """,
    "cpu/operation.cpp": """
        #include "launchers.h"
        namespace gspo::GSPO_ISA {
        int inlined() { static volatile int zero = 0; return level(&zero); }
        int flags() {
        #if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
            return 3;
        #elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
            return 2;
        #else
            return 1;
        #endif
        }
        }
        """,
    "cuda/operation.cu": """
        #include <cuda_runtime.h>
        namespace gspo::cuda {
        __global__ void nothing() {}
        int count_devices() {
            int count = 0;
            const cudaError_t error = cudaGetDeviceCount(&count);
            nothing<<<1, 1>>>();
            return error == cudaSuccess ? count : -static_cast<int>(error);
        }
        }
        """,
}


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without the switches of whoever runs the tests, and with a torch that cannot be imported."""
    switches = ("CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
    inherited = {name: value for name, value in os.environ.items() if name not in switches}
    defaults = {"PYTHONPATH": str(folder / "no_torch"), "GSPO_CUDA": "0"}
    return subprocess.run(
        command, cwd=folder, env=inherited | defaults | environment, capture_output=True, text=True, check=False
    )


def build(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", *arguments, folder=folder, **environment)


def built(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """Builds; the names of the sources that were compiled, with the instruction set."""
    result = build(folder, *arguments, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return sorted(line.removeprefix("compiled csrc/") for line in result.stdout.splitlines() if "compiled" in line)


def evaluate(folder: Path, expression: str) -> object:
    """An expression of _C, in a process that sees no GPU."""
    code = f"import json; from gspo_megatron import _C; print(json.dumps({expression}))"
    result = run(sys.executable, "-c", code, folder=folder, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of the small sources, built without CUDA kernels."""
    folder = tmp_path_factory.mktemp("finished")
    for name, text in SOURCES.items():
        (folder / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "csrc" / name).write_text(text)
    (folder / "csrc/README.md").touch()
    (folder / "gspo_megatron").mkdir()
    (folder / "no_torch").mkdir()
    (folder / "no_torch/torch.py").write_text('raise RuntimeError("the build imported torch")\n')
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "gspo_megatron/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    built(folder)
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be edited and built again."""
    return shutil.copytree(finished, tmp_path / "project")


@pytest.fixture
def without_nvcc(project: Path) -> dict[str, str]:
    """Environment in which neither PATH nor the usual place has an nvcc."""
    script = (project / "setup.py").read_text()
    assert "/usr/local/cuda" in script
    (project / "setup.py").write_text(script.replace("/usr/local/cuda", str(project / "no_cuda")))
    (project / "bin").mkdir()
    for name in ("g++", "as", "ld"):
        program = shutil.which(name)
        assert program is not None, f"building needs {name}"
        (project / "bin" / name).symlink_to(program)
    return {"PATH": str(project / "bin")}


def add_nvcc(folder: Path, version: str) -> str:
    """A CUDA folder whose nvcc is a script that writes down how it was called and compiles with g++."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "lib").mkdir()
    (folder / "include/cuda_runtime_api.h").write_text("#define CUDART_VERSION 1\n")
    subprocess.run(["ar", "rc", str(folder / "lib/libcudart_static.a")], check=True)
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
        case "$1" in
            --version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
            --dryrun)
                echo '#$ INCLUDES="-I{folder}/include"  ' >&2
                echo '#$ LIBRARIES=  "-L{folder}/lib/stubs" "-L{folder}/lib"' >&2 ;;
            *)
                echo "$*" >>{folder}/calls
                for last in "$@"; do :; done
                echo 'namespace gspo::cuda {{ int count_devices() {{ return -35; }} }}' |
                    {shutil.which("g++")} -x c++ -std=c++17 -fPIC -c - -o "$last" ;;
        esac
        """
    )
    nvcc.chmod(0o755)
    return str(folder)


def test_build_environment_is_setuptools_and_pybind11() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {Requirement(text).name for text in requirements} == {"setuptools", "pybind11"}


def test_build_imports_no_torch(finished: Path) -> None:
    """Every build here runs with a torch that cannot be imported; this shows that it cannot."""
    result = run(sys.executable, "-c", "import torch", folder=finished)
    assert "the build imported torch" in result.stderr
    assert evaluate(finished, "_C.answer()") == 7


def test_each_instruction_set_has_its_flags(finished: Path) -> None:
    levels = range(1, len(INSTRUCTION_SETS) + 1)
    assert evaluate(finished, f"[_C.level_of(i) for i in {list(levels)}]") == list(levels)


def test_baseline_runs_no_copy_of_an_inline_function_that_needs_more(finished: Path) -> None:
    assert evaluate(finished, "_C.level_of(0)") == 1


def test_a_repeat_compiles_nothing(project: Path) -> None:
    objects = {path: path.stat().st_mtime_ns for path in (project / "build/csrc").iterdir()}
    assert len(objects) == 2 + len(INSTRUCTION_SETS)
    assert built(project) == []
    assert {path: path.stat().st_mtime_ns for path in (project / "build/csrc").iterdir()} == objects


def test_a_build_environment_elsewhere_compiles_nothing(project: Path, tmp_path: Path) -> None:
    """As pip makes a new one for each build."""
    elsewhere = tmp_path / "environment/pybind11"
    shutil.copytree(Path(pybind11.__file__).parent, elsewhere, ignore=shutil.ignore_patterns("__pycache__"))
    assert built(project, PYTHONPATH=str(elsewhere.parent)) == []


def test_changed_flags_compile_everything(project: Path) -> None:
    assert len(built(project, CXXFLAGS="-DOTHER")) == 2 + len(INSTRUCTION_SETS)
    assert len(list((project / "build/csrc").iterdir())) == 2 + len(INSTRUCTION_SETS), "outdated objects are removed"


def test_a_changed_header_compiles_everything(project: Path) -> None:
    header = project / "csrc/launchers.h"
    modified_at = header.stat().st_mtime_ns
    header.write_text(header.read_text().replace("kAnswer = 7", "kAnswer = 8"))
    os.utime(header, ns=(modified_at, modified_at))  # as of an unpacked archive: the time says nothing
    assert len(built(project)) == 2 + len(INSTRUCTION_SETS)
    assert evaluate(project, "_C.answer()") == 8


def test_a_changed_source_compiles_alone(project: Path) -> None:
    with open(project / "csrc/cpu/operation.cpp", "a") as file:
        file.write("// changed\n")
    assert built(project) == sorted(f"cpu/operation.cpp ({name})" for name in INSTRUCTION_SETS)


def test_a_source_that_does_not_compile_fails_the_build_and_leaves_no_object(project: Path) -> None:
    source = project / "csrc/cpu/operation.cpp"
    source.write_text(source.read_text().replace("return 1;", "return no_such_name;"))
    for _ in range(2):
        result = build(project)
        assert result.returncode != 0
        assert "no_such_name" in result.stderr
    assert not list((project / "build/csrc").glob("cpu-operation-baseline*"))


def test_unknown_gspo_cuda_is_refused(project: Path) -> None:
    result = build(project, GSPO_CUDA="yes")
    assert result.returncode != 0
    assert 'GSPO_CUDA="yes" must be auto, 0 or 1' in result.stderr


def test_without_nvcc_auto_builds_for_the_cpu_and_1_is_refused(project: Path, without_nvcc: dict[str, str]) -> None:
    assert built(project, **without_nvcc, GSPO_CUDA="auto") == []
    result = build(project, **without_nvcc, GSPO_CUDA="1", CUDA_HOME="/no/such/folder")
    assert result.returncode != 0
    assert "GSPO_CUDA=1, but there is no nvcc in CUDA_HOME='/no/such/folder'" in result.stderr
    assert "GSPO_CUDA=0" in result.stderr


def test_without_kernels_auto_builds_for_the_cpu_and_1_is_refused(project: Path, tmp_path: Path) -> None:
    (project / "csrc/cuda/operation.cu").unlink()
    home = add_nvcc(tmp_path / "cuda", "13.0")
    assert built(project, GSPO_CUDA="auto", CUDA_HOME=home) == []
    result = build(project, GSPO_CUDA="1", CUDA_HOME=home)
    assert result.returncode != 0
    assert "csrc/cuda has no kernels" in result.stderr


def test_a_switch_of_cuda_builds_again_and_back(project: Path, tmp_path: Path) -> None:
    home = add_nvcc(tmp_path / "cuda", "13.0")
    assert built(project, GSPO_CUDA="1", CUDA_HOME=home) == ["bindings.cpp (all)", "cuda/operation.cu (fat)"]
    assert evaluate(project, "[_C.cudart(), _C.count_devices()]") == [1, -35]
    assert built(project, GSPO_CUDA="auto", CUDA_HOME=home) == []
    calls = (tmp_path / "cuda/calls").read_text().splitlines()
    assert len(calls) == 1
    for flags in ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a", "-fvisibility=hidden"):
        assert flags in calls[0]

    assert built(project, GSPO_CUDA="0", CUDA_HOME=home) == ["bindings.cpp (all)"]
    assert evaluate(project, "_C.cudart()") == 0


def test_an_nvcc_that_does_not_know_hopper_is_refused(project: Path, tmp_path: Path) -> None:
    result = build(project, GSPO_CUDA="auto", CUDA_HOME=add_nvcc(tmp_path / "cuda", "11.8"))
    assert result.returncode != 0
    assert "release 11.8; 12.0 or later is needed" in result.stderr


def test_another_system_is_refused(project: Path) -> None:
    result = run(
        *(sys.executable, "-c"),
        "import runpy, sys, sysconfig, setuptools; sysconfig.get_config_vars(); sys.platform = 'darwin'; "
        "sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')",
        folder=project,
    )
    assert result.returncode != 0
    assert "built on Linux only; this is darwin" in result.stderr


@pytest.mark.parametrize("kind", ["link", "script"])
def test_a_module_with_cuda_kernels_imports_without_a_gpu(project: Path, tmp_path: Path, kind: str) -> None:
    real = shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")
    if real is None:
        pytest.skip("needs a CUDA toolkit: no nvcc in /usr/local/cuda or PATH")
    nvcc = tmp_path / "bin/nvcc"  # as distributions have it: far from the toolkit
    nvcc.parent.mkdir()
    if kind == "link":
        nvcc.symlink_to(real)
    else:
        nvcc.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
        nvcc.chmod(0o755)
    assert "cuda/operation.cu (fat)" in built(project, GSPO_CUDA="1", CUDA_HOME=str(tmp_path))
    assert evaluate(project, "_C.cudart() >= 12000 and _C.count_devices() <= 0") is True
    module = next((project / "gspo_megatron").glob("_C*.so"))
    symbols = subprocess.run(["nm", "-D", str(module)], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C" in symbols
    assert "cuda" not in symbols.lower(), "the CUDA runtime is linked into the module, and seen by no other"


def test_a_source_distribution_holds_all_of_csrc(project: Path) -> None:
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    result = run(sys.executable, "-c", code, folder=project)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next((project / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{name}" for name in SOURCES} | {"csrc/README.md", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


@pytest.mark.parametrize("switch", [{"GSPO_CUDA": "auto"}, {"CUDA_HOME": "/another"}, {"CXX": "another"}])
def test_make_setup_builds_again_after_a_switch(tmp_path: Path, switch: dict[str, str]) -> None:
    for name in ("tools/setup.sh", "pyproject.toml", "setup.py", "requirements/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
    stamps = [
        run("tools/setup.sh", "--stamp", folder=tmp_path, **environment).stdout for environment in ({}, {}, switch)
    ]
    assert stamps[0] == stamps[1] != stamps[2]
