"""The SLURM example of docs/sglang.md, run with programs that stand in for SLURM's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs" / "sglang.md"
STAND_INS = {
    "scontrol": '[ "$*" = "show hostnames n[1-4]" ] && printf "n%s\\n" 1 2 3 4',
    "openssl": "echo key",
    "sleep": "exec /bin/sleep 0.05",
    # `serve` runs until it is ended; each node writes its own file, some time after the start.
    "srun": """
printf '%s\\n' "$*" >> calls
case "$*" in
*" serve "*)
    case "$*" in *"--nodelist=n1,n2 "*) nodes="n1 n2" ;; *) nodes="n3 n4" ;; esac
    for node in $nodes; do
        /bin/sleep 0.2
        printf '[sglang]\\naddresses = "http://%s:30000,http://%s:30001"\\n# key\\n' $node $node > serve-7-$node.txt
    done
    exec /bin/sleep 60 ;;
esac
""",
}


def test_the_slurm_example_starts_servers_on_the_nodes_whose_addresses_the_trainer_gets(tmp_path: Path) -> None:
    [example] = [block for block in re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL) if "srun" in block]
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-u", "-c", example],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | job,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    serve, train = (tmp_path / "calls").read_text().splitlines()
    assert "--nodelist=n1,n2 --nodes=2 " in serve and " serve train.toml " in serve
    assert "--nodelist=n3,n4 --nodes=2 " in train and "--nnodes 2 " in train and "n3:29500" in train
    addresses = "http://n1:30000,http://n1:30001,http://n2:30000,http://n2:30001"
    assert f" train train.toml --sglang.addresses {addresses} --sglang.api_key_file {tmp_path}/gspo_key" in train
    assert (tmp_path / "gspo_key").stat().st_mode & 0o077 == 0
