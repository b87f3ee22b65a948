#!/usr/bin/env bash
# Makes .venv-peers, where TRL runs beside us in benchmarks: the versions of requirements/peers.txt, CPU build of torch.
# Run again it does nothing if nothing changed. The project itself is not installed there.
#
#   PYTHON=python3.12     the base Python; default: the first of python3.11, python3.12, python3 that will do
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-peers
VENV_PYTHON=$VENV/bin/python
REQUIREMENTS=requirements/peers.txt
STAMP=$VENV/.setup-stamp
LOG=build/setup-peers.log

say() { echo "setup-peers: $*"; }

fail() {  # fail WHAT HOW_TO_GO_ON
    echo "setup-peers: FAILED to $1." >&2
    echo "setup-peers: $2 Then run 'make setup-peers' again." >&2
    exit 1
}

step() {  # step WHAT COMMAND…: one line, the output goes to the log, its end is shown on failure
    local what=$1
    shift
    say "$what"
    echo "== $what: $*" >>"$LOG"
    if ! "$@" >>"$LOG" 2>&1; then
        tail -n 15 "$LOG" >&2
        fail "$what" "Everything is in $LOG; an unreachable package index and a full disk are the usual causes."
    fi
}

# --no-deps: the list is complete, and no package may bring another torch or CUDA libraries.
pip_install() { "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input --no-deps "$@"; }

stamp() { { echo "$PWD ${PYTHON:-}"; cat "$REQUIREMENTS" tools/setup_peers.sh; } | sha256sum | cut -d' ' -f1; }

choose_python() {
    local candidates=(${PYTHON:-python3.11 python3.12 python3}) candidate
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "find a base Python among: ${candidates[*]}" "Name a Python of 3.11 or later, with venv, by PYTHON=…."
}

install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$REQUIREMENTS")
    if "$VENV_PYTHON" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null; then
        say "torch $version is there"
    elif say "install torch $version, CPU build" && pip_install "torch==$version+cpu" >>"$LOG" 2>&1; then
        :
    else
        # The default build without its CUDA libraries cannot be imported: where it is the only one, stop here.
        fail "find torch $version+cpu" \
            "Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (CONTRIBUTING.md); pip's words are in $LOG."
    fi
}

check() {  # everything imports, and what is missing is the one thing that is missing on purpose
    "$VENV_PYTHON" -W ignore - <<'PY'
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from trl import GRPOConfig, GRPOTrainer, __version__

assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"
print(f"trl {__version__}, torch {torch.__version__}")
PY
    local unmet
    unmet=$("$VENV_PYTHON" -m pip check --disable-pip-version-check | grep -v 'No broken\|liger.kernel .* requires triton' || true)
    if [[ -n $unmet ]]; then
        echo "$unmet"
        return 1
    fi
}

main() {
    if [[ -x $VENV_PYTHON && -f $STAMP && $(<"$STAMP") == "$(stamp)" ]]; then
        say "nothing to do: $VENV is up to date"
        return
    fi
    unset PIP_CONSTRAINT
    mkdir -p "$(dirname "$LOG")"
    : >"$LOG"
    local base
    base=$(choose_python)
    if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        step "make $VENV from $("$base" --version)" "$base" -m venv --clear "$VENV"
    fi
    rm -f "$STAMP"
    install_torch
    step "install TRL and what it needs (log: $LOG)" pip_install -r "$REQUIREMENTS"
    step "check what was installed" check
    stamp >"$STAMP"
    say "done: $VENV is ready"
}

main
