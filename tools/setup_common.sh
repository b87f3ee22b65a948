# Sourced by the scripts that make a further virtual environment beside .venv: tools/setup_peers.sh, tools/setup_sglang.sh.
# They set NAME (of the make target), VENV and REQUIREMENTS (every package with its exact version) before, and then call
# make_environment with a summary of what is installed; their function `check` looks at the result.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV_PYTHON=$VENV/bin/python
STAMP=$VENV/.setup-stamp
LOG=build/$NAME.log

say() { echo "$NAME: $*"; }

fail() {  # fail WHAT HOW_TO_GO_ON
    echo "$NAME: FAILED to $1." >&2
    echo "$NAME: $2 Then run 'make $NAME' again." >&2
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

# What the environment depends on; one that was moved is made anew, its scripts hold absolute paths.
stamp() { { echo "$PWD ${PYTHON:-}"; cat "$REQUIREMENTS" tools/setup_common.sh "$0"; } | sha256sum | cut -d' ' -f1; }

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

broken_requirements() {  # prints what pip check finds, but for the lines that match the pattern
    "$VENV_PYTHON" -m pip check --disable-pip-version-check | grep -v "No broken\|$1" || true
}

make_environment() {  # make_environment WHAT
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
    step "install $1 (log: $LOG)" pip_install -r "$REQUIREMENTS"
    step "check what was installed" check
    stamp >"$STAMP"
    say "done: $VENV is ready"
}
