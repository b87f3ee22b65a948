"""The project's own files: import contract, pinned versions, setup script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gspo_megatron

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A folder with the package and the import contract, to be edited freely."""
    shutil.copytree(ROOT / "gspo_megatron", tmp_path / "gspo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", LINT_IMPORTS, cwd=folder)


def test_the_package_keeps_the_import_contract(package_copy: Path) -> None:
    result = lint_imports(package_copy)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ops/__init__.py", "import megatron.core"),
        ("weights/rules.py", "from megatron.core import parallel_state"),
        ("rollout/__init__.py", "import sglang"),
        ("policy/__init__.py", "import transformers"),
        ("types.py", "import gspo_megatron.ops"),  # upward
        ("ops/__init__.py", "import gspo_megatron.algorithms"),
        ("algorithms/__init__.py", "import gspo_megatron.policy"),
        ("data/__init__.py", "import gspo_megatron.tasks"),  # siblings
        ("rollout/__init__.py", "import gspo_megatron.policy"),
        ("stability/__init__.py", "def f():\n    import gspo_megatron.rollout"),  # also inside a function
        ("unplaced.py", "x = 1"),  # a module without a layer
    ],
)
def test_a_forbidden_import_breaks_the_contract(package_copy: Path, module: str, line: str) -> None:
    with open(package_copy / "gspo_megatron" / module, "a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(package_copy)
    assert result.returncode != 0, result.stdout
    assert "0 broken" not in result.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("policy/__init__.py", "import megatron.core"),
        ("weights/families/__init__.py", "import transformers"),
        ("stability/__init__.py", "import gspo_megatron.weights"),
    ],
)
def test_an_allowed_import_keeps_the_contract(package_copy: Path, module: str, line: str) -> None:
    with open(package_copy / "gspo_megatron" / module, "a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(package_copy)
    assert result.returncode == 0, result.stdout


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in found}


def test_every_dependency_is_pinned_to_a_version_that_fits() -> None:
    pinned = pins()
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["dev"] + extras["tensorboard"]:
        requirement = Requirement(text)
        pin = pinned.get(canonicalize_name(requirement.name), "")
        assert re.fullmatch(r"==[\w.]+", pin), f"{text} has no exact version in requirements/constraints.txt: {pin!r}"
        assert requirement.specifier.contains(pin.removeprefix("=="), prereleases=True), f"{text} against {pin}"


def test_setup_installs_the_torch_that_is_pinned() -> None:
    match = re.search(r"^TORCH_CPU=(\S+)", (ROOT / "tools/setup.sh").read_text(), re.MULTILINE)
    assert match is not None
    assert pins()["torch"] == f"=={match[1]}"


def test_every_package_imported_is_declared() -> None:
    """An undeclared import works only as long as something else happens to install it."""
    distribution_of = {"math_verify": "math-verify", "megatron": "megatron-core", "yaml": "pyyaml"}
    extras = PROJECT["optional-dependencies"]
    declared = {
        canonicalize_name(Requirement(text).name)
        for text in PROJECT["dependencies"] + extras["tensorboard"] + extras["wandb"]
    }
    pattern = re.compile(r"^\s*(?:from|import)\s+(\w+)[\w.]*(?:\s+import\b|\s+as\b|\s*$)", re.MULTILINE)
    known = sys.stdlib_module_names | {"gspo_megatron"}
    for path in sorted((ROOT / "gspo_megatron").rglob("*.py")):
        for name in set(pattern.findall(path.read_text())) - known:
            distribution = canonicalize_name(distribution_of.get(name, name))
            assert distribution in declared, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml lacks"


def test_version_is_the_package_s_own() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", gspo_megatron.__version__)
    assert PROJECT["dynamic"] == ["version"]
    assert f"## [{gspo_megatron.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def setup_copy(tmp_path: Path) -> Path:
    """A folder in which tools/setup.sh can be run without touching the checkout's .venv."""
    for name in ("tools/setup.sh", "pyproject.toml", "setup.py", "requirements/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
    return tmp_path


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(str(folder / "tools/setup.sh"), *arguments, cwd=folder, **({"GSPO_CUDA": "0"} | environment))


def test_setup_does_nothing_when_nothing_changed(setup_copy: Path) -> None:
    (setup_copy / ".venv/bin").mkdir(parents=True)
    (setup_copy / ".venv/bin/python").symlink_to(sys.executable)
    (setup_copy / ".venv/.setup-stamp").write_text(run_setup(setup_copy, "--stamp").stdout)

    start = time.monotonic()
    result = run_setup(setup_copy)
    assert time.monotonic() - start < 2
    assert result.returncode == 0, result.stderr
    assert result.stdout == "setup: nothing to do: .venv is up to date\n"


@pytest.mark.parametrize("changed", ["pyproject.toml", "requirements/constraints.txt", "csrc/bindings.cpp"])
def test_setup_runs_again_when_its_inputs_change(setup_copy: Path, changed: str) -> None:
    before = run_setup(setup_copy, "--stamp").stdout
    with open(setup_copy / changed, "a") as file:
        file.write("# changed\n")
    assert run_setup(setup_copy, "--stamp").stdout != before


def test_setup_without_a_usable_python_says_what_it_needs(setup_copy: Path) -> None:
    result = run_setup(setup_copy, PYTHON=str(setup_copy / "no-such-python"))
    assert result.returncode == 1
    assert "no-such-python" in result.stderr
    assert "Python 3.11 or later" in result.stderr


def test_setup_refuses_an_unknown_gspo_cuda(setup_copy: Path) -> None:
    result = run_setup(setup_copy, GSPO_CUDA="yes")
    assert result.returncode == 1
    assert 'GSPO_CUDA="yes"' in result.stderr
    assert "auto, 0 or 1" in result.stderr


def test_setup_that_cannot_download_names_the_step_and_can_go_on(setup_copy: Path) -> None:
    offline = {
        "PYTHON": sys.executable,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(setup_copy),
        "PIP_CONFIG_FILE": os.devnull,
    }
    result = run_setup(setup_copy, **offline)
    assert result.returncode == 1
    assert "FAILED to install torch" in result.stderr
    assert "make setup" in result.stderr
    assert not (setup_copy / ".venv/.setup-stamp").exists()

    again = run_setup(setup_copy, **offline)
    assert again.returncode == 1
    assert "going on with the .venv that is there" in again.stdout
