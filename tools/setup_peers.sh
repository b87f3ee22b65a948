#!/usr/bin/env bash
# Makes .venv-peers, where TRL runs beside us in benchmarks: the versions of requirements/peers.txt, CPU build of torch.
# Run again it does nothing if nothing changed. The project itself is not installed there.
#
#   PYTHON=python3.12     the base Python; default: the first of python3.11, python3.12, python3 that will do
NAME=setup-peers
VENV=.venv-peers
REQUIREMENTS=requirements/peers.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup_common.sh"

check() {  # everything imports, and what is missing is the one thing that is missing on purpose
    "$VENV_PYTHON" -W ignore - <<'PY' || return 1
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from trl import GRPOConfig, GRPOTrainer, __version__

assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"
print(f"trl {__version__}, torch {torch.__version__}")
PY
    local unmet
    unmet=$(broken_requirements 'liger.kernel .* requires triton')
    if [[ -n $unmet ]]; then
        echo "$unmet"
        return 1
    fi
}

make_environment "TRL and what it needs"
