#!/usr/bin/env python
"""How the weights get from the Megatron layout to SGLang servers, and how long that takes.

    python tools/benchmark_reshard.py planned [--model NAME] [--gpus N] [--output FILE]
    python tools/benchmark_reshard.py measured [--layouts TP2,…] [--transports direct,…] [--output FILE]

planned: the plans of published models (tools/reshard_models) for 64, 256 and 1,024 GPUs, of which it needs none: who
sends how much in how many buckets, what is gathered for it, memory, and seconds predicted by a simple model (see
tools/reshard/figures.py), beside published times. Without --model and --gpus it writes
benchmarks/results/reshard_planned.md.

measured: real updates of a small MoE on this machine, over gloo, from every training layout over every transport, to
SGLang servers and to bare receivers, beside one plain broadcast of the same bytes. It writes
benchmarks/results/reshard_cpu.md. Without a command both are run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from reshard import measured, planned

from gspo_megatron.errors import UserError
from gspo_megatron.failures import EXIT_DONE, EXIT_USER_ERROR


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND")
    planned.add_arguments(commands.add_parser("planned", help="plans of published size, without devices"))
    measured.add_arguments(commands.add_parser("measured", help="real updates on this machine"))
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        for command in [given] if given else [["planned"], ["measured"]]:
            options = parser.parse_args(command)
            options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
