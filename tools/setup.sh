#!/usr/bin/env bash
# Makes .venv in the checkout with the tested versions, the project (editable) and the developer tools.
# Run again it does nothing if nothing changed; after an interruption it goes on where it stopped.
#
#   PYTHON=python3.12     the base Python; default: the first of python3.11, python3.12, python3 … that will do
#   GSPO_CUDA=auto|0|1    auto: look for an NVIDIA GPU, build CUDA kernels where nvcc is found; 0: neither;
#                         1: as if there were a GPU, and fail without nvcc
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
VENV_PYTHON=$VENV/bin/python
STAMP=$VENV/.setup-stamp
CONSTRAINTS=$VENV/constraints.txt
LOG=build/setup.log
TORCH_CPU=2.13.0   # the tested version
TORCH_MINIMUM=2.11

say() { echo "setup: $*"; }

fail() {  # fail STEP HOW_TO_GO_ON
    echo "setup: FAILED to $1." >&2
    echo "setup: $2 Then run 'make setup' again: it goes on where it stopped." >&2
    exit 1
}

step() {  # step WHAT COMMAND…: one line, the output goes to the log, its end is shown on failure
    local what=$1
    shift
    say "$what"
    echo "== $what: $*" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1; then
        echo "setup: last lines of $LOG:" >&2
        tail -n 15 "$LOG" >&2
        fail "$what" "Everything is in $LOG; an unreachable package index and a full disk are the usual causes."
    fi
}

pip_install() { "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input "$@"; }

find_gpu() {
    case "${GSPO_CUDA:-auto}" in
        0) return 1 ;;
        1) return 0 ;;
        auto) compgen -G '/dev/nvidia[0-9]*' >/dev/null || { command -v nvidia-smi && nvidia-smi -L | grep -q GPU; } >/dev/null 2>&1 ;;
        *) fail "read GSPO_CUDA=\"$GSPO_CUDA\"" "It must be auto, 0 or 1." ;;
    esac
}

usable_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

has_cuda_torch() {  # whether a Python imports a CUDA build of torch that is new enough
    "$1" -W ignore - "$TORCH_MINIMUM" <<'PY' 2>/dev/null
import sys, torch
version = lambda text: tuple(int(part) for part in text.split("+")[0].split(".")[:2])
sys.exit(torch.version.cuda is None or version(torch.__version__) < version(sys.argv[1]))
PY
}

has_unfit_torch() {  # on a GPU machine: a torch that is too old or was built for the CPU
    [[ $hardware == gpu ]] && "$1" -c 'import torch' 2>/dev/null && ! has_cuda_torch "$1"
}

choose_python() {  # prints the base Python; on a GPU machine one that has a CUDA build of torch comes first
    local candidates=(${PYTHON:-python3.11 python3.12 python3 python3.13}) found=() candidate
    for candidate in "${candidates[@]}"; do
        if usable_python "$candidate"; then found+=("$candidate"); fi
    done
    if [[ ${#found[@]} -eq 0 ]]; then
        fail "find a base Python among: ${candidates[*]}" \
            "Python 3.11 or later with the modules venv and ensurepip is needed (Debian: package python3-venv); name one with PYTHON=…."
    fi
    if [[ $1 == gpu ]]; then
        for candidate in "${found[@]}"; do
            if has_cuda_torch "$candidate"; then echo "$candidate"; return; fi
        done
    fi
    echo "${found[0]}"
}

stamp() {  # what the environment depends on; a checkout that was moved needs its editable install again
    local files=(pyproject.toml setup.py requirements/constraints.txt tools/setup.sh)
    {
        echo "$PWD $hardware ${PYTHON:-}"
        # What setup.py reads; an nvcc that was installed since builds the CUDA kernels.
        echo "${GSPO_CUDA:-auto} ${CUDA_HOME:-} ${CUDA_PATH:-} ${CXX:-} ${CXXFLAGS:-}"
        for nvcc in "$(command -v nvcc)" {"${CUDA_HOME:-}","${CUDA_PATH:-}",/usr/local/cuda}/bin/nvcc; do readlink -e "$nvcc" || true; done
        cat "${files[@]}"
        find csrc -type f ! -name '*.md' | sort | xargs -r cat
    } | sha256sum | cut -d' ' -f1
}

show_packages_of() {  # --system-site-packages shows those of an installed Python, not those of a virtual environment
    "$1" -c 'import sys, sysconfig
if sys.prefix != sys.base_prefix: print(sysconfig.get_path("purelib"))' >"$("$VENV_PYTHON" -c 'import sysconfig
print(sysconfig.get_path("purelib"))')/base_environment.pth"
}

make_venv() {
    local options=() base
    base=$(choose_python "$hardware") || exit 1
    if [[ $hardware == gpu ]] && has_cuda_torch "$base"; then
        options+=(--system-site-packages)
    fi
    if "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 && ! has_unfit_torch "$VENV_PYTHON"; then
        say "going on with the $VENV that is there"
    else
        # Without pip there is nothing in it worth keeping; a torch that does not fit is best left behind whole.
        step "make $VENV from $("$base" -c 'import sys; print(sys.executable, sys.version.split()[0])') ${options[*]:-}" \
            "$base" -m venv --clear "${options[@]}" "$VENV"
        if [[ ${#options[@]} -gt 0 ]]; then show_packages_of "$base"; fi
    fi
}

install_torch_cpu() {
    cp requirements/constraints.txt "$CONSTRAINTS"
    if "$VENV_PYTHON" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$TORCH_CPU')" 2>/dev/null; then
        say "torch $TORCH_CPU is there"
    elif say "install torch $TORCH_CPU, CPU build" && pip_install -c "$CONSTRAINTS" "torch==$TORCH_CPU+cpu" >>"$LOG" 2>&1; then
        :
    else
        say "no CPU build where pip looks; the default build can be several GB (CONTRIBUTING.md says how to avoid it)"
        step "install torch $TORCH_CPU" pip_install -c "$CONSTRAINTS" "torch==$TORCH_CPU"
    fi
    "$VENV_PYTHON" -W ignore -c "
import torch
if torch.version.cuda is not None:
    print(f'setup: note: torch {torch.__version__} is a CUDA build; it works without a GPU, but takes more disk')"
}

install_torch_gpu() {
    if has_cuda_torch "$VENV_PYTHON"; then
        say "use the torch that is there"
    else
        step "install the newest torch that fits (>= $TORCH_MINIMUM)" pip_install "torch>=$TORCH_MINIMUM"
    fi
    local version
    version=$("$VENV_PYTHON" -c 'import torch; print(torch.__version__)')
    grep -v '^torch==' requirements/constraints.txt >"$CONSTRAINTS"
    echo "torch==$version" >>"$CONSTRAINTS"
    say "torch $version is kept as it is"
}

report() {
    HARDWARE=$hardware "$VENV_PYTHON" -W ignore - <<'PY'
import importlib.util
import os

import megatron.core
import torch

from gspo_megatron import _C

def state(module: str) -> str:
    return "found; Megatron-Core's optimizer uses it" if importlib.util.find_spec(module) else "not found (used where present, never needed)"

cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
print(f"setup: torch {torch.__version__} ({cuda}), megatron-core {megatron.core.__version__}")
print(f"setup: native operations: {_C.instruction_set()} on this processor, {'with' if _C.with_cuda else 'without'} CUDA kernels")
if os.environ["HARDWARE"] == "gpu" and not _C.with_cuda:
    print("setup: on a GPU the native operations need them: set CUDA_HOME to a CUDA toolkit, run 'make setup' again")
print(f"setup: Transformer Engine: {state('transformer_engine')}")
print(f"setup: apex: {state('amp_C')}")  # amp_C is NVIDIA's; the package of that name on PyPI is another project
PY
}

main() {
    hardware=cpu
    if find_gpu; then hardware=gpu; fi
    if [[ -x $VENV_PYTHON && -f $STAMP && $(<"$STAMP") == "$(stamp)" ]]; then
        say "nothing to do: $VENV is up to date"
        return
    fi
    if [[ -n ${PIP_CONSTRAINT:-} ]]; then
        say "PIP_CONSTRAINT=$PIP_CONSTRAINT is set aside: requirements/constraints.txt takes its place"
        unset PIP_CONSTRAINT
    fi
    mkdir -p "$(dirname "$LOG")"
    : >"$LOG"
    say "setting up for $([[ $hardware == gpu ]] && echo 'an NVIDIA GPU' || echo 'the CPU (no NVIDIA GPU found)')"
    make_venv
    rm -f "$STAMP"
    "install_torch_$hardware"
    dependencies >"$VENV/requirements.txt"
    step "install the dependencies and developer tools (log: $LOG)" \
        pip_install -c "$CONSTRAINTS" -r "$VENV/requirements.txt"
    step "install gspo_megatron, editable" pip_install --no-deps -e .
    report || fail "import what was installed" "The error is above; where transformer_engine is named, uninstall it or complete it."
    stamp >"$STAMP"
    say "done: $VENV is ready"
}

dependencies() {
    "$VENV_PYTHON" - <<'PY'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + extras["dev"] + extras["tensorboard"]))
PY
}

if [[ ${1:-} == --stamp ]]; then  # what the stamp would be, for tests
    hardware=cpu
    if find_gpu; then hardware=gpu; fi
    stamp
else
    main
fi
