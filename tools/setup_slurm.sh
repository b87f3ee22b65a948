#!/usr/bin/env bash
# Installs what tests/system/test_slurm.py needs: SLURM's and munge's programs, and ShellCheck, from Debian's packages.
# Run again it does nothing. The tests start their own daemons, on loopback, in a folder of their own; no service of
# this machine is configured.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
PROGRAMS=(munged slurmctld slurmd sbatch shellcheck)
PACKAGES=(slurm-wlm munge shellcheck)

say() { echo "setup-slurm: $*"; }

fail() { # fail WHAT HOW_TO_GO_ON
    echo "setup-slurm: FAILED to $1." >&2
    echo "setup-slurm: $2 Then run 'make setup-slurm' again." >&2
    exit 1
}

missing() {
    local program
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

if [[ -z $(missing) ]]; then
    say "nothing to do: ${PROGRAMS[*]} are there"
    exit 0
fi
command -v apt-get >/dev/null || fail "install ${PACKAGES[*]}: there is no apt-get" "Install SLURM 22.05 or later, munge and ShellCheck."
[[ $(id -u) == 0 ]] || fail "install ${PACKAGES[*]}: only root may" "Run: sudo apt-get install --no-install-recommends ${PACKAGES[*]}."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
say "install ${PACKAGES[*]}"
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install -y --no-install-recommends "${PACKAGES[@]}"; } >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "install ${PACKAGES[*]}" "An unreachable package index is the usual cause."
fi
left=$(missing | tr '\n' ' ')
[[ -z $left ]] || fail "find ${left}after installing ${PACKAGES[*]}" "Install what has them."
say "done: SLURM $(dpkg-query -W -f '${Version}' slurm-wlm)"
