#!/usr/bin/env bash
# Makes .venv-sglang, where SGLang servers run on a CPU: the versions of requirements/sglang.txt, CPU build of torch.
# Run again it does nothing if nothing changed; after an interruption it goes on where it stopped. The project itself is
# not installed there. On a machine with a GPU it stops: the SGLang that is installed there is the one to use.
#
#   PYTHON=python3.12     the base Python; default: the first of python3.11, python3.12, python3 that will do
#   GSPO_CUDA=auto|0|1    auto: look for an NVIDIA GPU; 0: make the environment for the CPU even if there is one
NAME=setup-sglang
VENV=.venv-sglang
REQUIREMENTS=requirements/sglang.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup_common.sh"

find_gpu() {
    case "${GSPO_CUDA:-auto}" in
        0) return 1 ;;
        1) return 0 ;;
        auto) compgen -G '/dev/nvidia[0-9]*' >/dev/null || { command -v nvidia-smi && nvidia-smi -L | grep -q GPU; } >/dev/null 2>&1 ;;
        *) fail "read GSPO_CUDA=\"$GSPO_CUDA\"" "It must be auto, 0 or 1." ;;
    esac
}

# The packages themselves and the CPU stand-ins beside them import; what is missing is asked for by SGLang alone.
check() {
    PYTHONPATH=gspo_megatron/rollout/sglang/cpu_stand_ins SGLANG_USE_CPU_ENGINE=1 CUDA_VISIBLE_DEVICES='' \
        "$VENV_PYTHON" -W ignore - <<'PY' || return 1
import sglang
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.scheduler
import torch

assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"
print(f"sglang {sglang.__version__}, torch {torch.__version__}")
PY
    local unmet
    unmet=$(broken_requirements '^sglang ')
    if [[ -n $unmet ]]; then
        echo "$unmet"
        return 1
    fi
}

if find_gpu; then
    fail "choose an SGLang: this machine has an NVIDIA GPU, and $VENV would hold the CPU build of torch" \
        "Install SGLang as its own documentation says, and name its Python in the config: [sglang] python = \"/path/to/bin/python\". For servers on the CPU all the same, set GSPO_CUDA=0."
fi
make_environment "SGLang and what it needs on a CPU"
