#!/usr/bin/env python
"""Convert a model between Hugging Face safetensors and Megatron's torch_dist, and prove it.

    python tools/convert_checkpoint.py import HF_DIR OUT_DIR [--dtype bfloat16|float32] [--overwrite] [--dry-run]
    python tools/convert_checkpoint.py export MEGATRON_DIR OUT_DIR [--dtype …] [--overwrite] [--dry-run]
    python tools/convert_checkpoint.py verify A [B] [--dtype …] [--logits]
    python tools/convert_checkpoint.py inspect DIR [--json]
    python tools/convert_checkpoint.py diff A B

On CPUs, in one process. A conversion that was killed goes on where it was when it is started again. Exit codes: 0 done;
1 the two differ, or something failed; 2 the input is wrong. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gspo_megatron.errors import UserError
from gspo_megatron.failures import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR
from gspo_megatron.logs import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor

    from gspo_megatron.weights.conversion.compare import Comparison
    from gspo_megatron.weights.conversion.models import HFModel, TorchDistModel
    from gspo_megatron.weights.conversion.to_hf import ToHF
    from gspo_megatron.weights.conversion.to_megatron import ToMegatron

    Model = HFModel | TorchDistModel

_UNREADABLE = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
_LOGIT_TOKENS = (4, 32)  # sequences, tokens of each
_LOGIT_TOLERANCE = 1e-4


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILED
        if isinstance(error, _UNREADABLE) and (path := _path_in_source(error, options)):
            print(f"error: {path} can't be read: {error.strerror}", file=sys.stderr)
            return EXIT_USER_ERROR
        # A disk that fills or fails; what is finished stays for the next call.
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_FAILED


def _path_in_source(error: OSError, options: argparse.Namespace) -> Path | None:
    """The file that the error is about, where it lies in a folder that is read."""
    if not isinstance(error.filename, str):
        return None
    path = Path(error.filename).absolute()
    given = (getattr(options, name, None) for name in ("HF_DIR", "MEGATRON_DIR", "A", "B", "DIR"))
    folders = {folder.absolute() for folder in given if folder is not None}
    return path if folders & {path, *path.parents} else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    threads = max(1, min(8, len(os.sched_getaffinity(0))))

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, *folders: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        for folder in folders:
            command.add_argument(folder.strip("?"), type=Path, nargs="?" if folder.endswith("?") else None)
        return command

    for name, run, help, source in (
        ("import", _import, "Hugging Face → torch_dist", "HF_DIR"),
        ("export", _export, "torch_dist → Hugging Face", "MEGATRON_DIR"),
    ):
        command = add(name, run, help, source, "OUT_DIR")
        command.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: as they are)")
        command.add_argument("--overwrite", action="store_true", help="replace OUT_DIR, once the result is complete")
        command.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
        command.add_argument(
            "--threads", type=_positive, default=threads, help="files at a time (default: %(default)s)"
        )
    command = add("verify", _verify, "prove that two hold the same weights bit for bit", "A", "B?")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="prove that B holds what a conversion of A to it gives"
    )
    command.add_argument("--logits", action="store_true", help="run both on the same tokens too")
    command.add_argument("--threads", type=_positive, default=threads)
    command = add("inspect", _inspect, "list tensors, shapes, dtypes, layout and step", "DIR")
    command.add_argument("--json", action="store_true")
    command = add("diff", _diff, "compare two checkpoints tensor by tensor", "A", "B")
    command.add_argument("--threads", type=_positive, default=threads)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _import(options: argparse.Namespace) -> int:
    from gspo_megatron.device import DTYPES
    from gspo_megatron.weights.conversion.models import HFModel, open_model
    from gspo_megatron.weights.conversion.to_megatron import ToMegatron

    model = open_model(options.HF_DIR)
    if not isinstance(model, HFModel):
        raise UserError(f"{options.HF_DIR} is a torch_dist checkpoint; import takes a Hugging Face folder, see export")
    dtype = DTYPES[options.dtype] if options.dtype else None
    return _convert(ToMegatron(model, dtype=dtype), model.left_out, options)


def _export(options: argparse.Namespace) -> int:
    from gspo_megatron.device import DTYPES
    from gspo_megatron.weights.conversion.models import TorchDistModel, open_model
    from gspo_megatron.weights.conversion.to_hf import ToHF

    model = open_model(options.MEGATRON_DIR)
    if not isinstance(model, TorchDistModel):
        raise UserError(f"{options.MEGATRON_DIR} is a Hugging Face folder; export takes a torch_dist one, see import")
    dtype = DTYPES[options.dtype] if options.dtype else None
    return _convert(ToHF(model, dtype=dtype), model.left_out, options)


def _convert(conversion: ToMegatron | ToHF, left_out: Sequence[str], options: argparse.Namespace) -> int:
    from gspo_megatron.weights.conversion.execute import execute
    from gspo_megatron.weights.conversion.plan import describe_plan
    from gspo_megatron.weights.conversion.progress import ByteProgress
    from gspo_megatron.weights.conversion.target import check_target

    check_target(options.OUT_DIR, conversion.source, overwrite=options.overwrite)
    print(describe_plan(conversion, options.OUT_DIR, left_out, threads=options.threads, every_file=options.dry_run))
    if options.dry_run:
        return EXIT_DONE
    total = sum(file.nbytes for file in conversion.files)
    with ByteProgress(total, "converting") as progress:
        execute(conversion, options.OUT_DIR, overwrite=options.overwrite, threads=options.threads, report=progress)
    print(f"{options.OUT_DIR} is complete")
    return EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    from gspo_megatron.device import DTYPES
    from gspo_megatron.weights.conversion.compare import check_files, verify
    from gspo_megatron.weights.conversion.models import HFModel, open_model
    from gspo_megatron.weights.conversion.progress import ByteProgress

    models = [open_model(folder) for folder in (options.A, options.B) if folder is not None]
    if len(models) == 1 and (options.logits or options.dtype):
        raise UserError(f"{'--logits' if options.logits else '--dtype'} compares two models; give the other one too")
    damage = [line for model in models for line in check_files(model, options.threads)]
    if damage:
        raise UserError("; ".join(damage[:5]))
    if len(models) == 1:
        model = models[0]
        if isinstance(model, HFModel):
            model.check_tied_head()
        print(f"{model.folder}: complete, {len(model.names)} tensors in their shapes")
        return EXIT_DONE
    with ByteProgress(_nbytes(models[0]), "verifying") as progress:
        dtype = DTYPES[options.dtype] if options.dtype else None
        result = verify(*models, dtype=dtype, threads=options.threads, advance=progress.advance)
    code = _report(result, models)
    if code == EXIT_DONE and options.logits:
        code = compare_logits(models)
    return code


def compare_logits(models: Sequence[Model]) -> int:
    """Both in float32 on the same random tokens, each by its own implementation: transformers or the training's."""
    import torch

    vocabulary = models[0].architecture.fields.vocab_size
    tokens = torch.randint(vocabulary, _LOGIT_TOKENS, generator=torch.Generator().manual_seed(0))
    one, other = (_logits(model, tokens) for model in models)
    largest, difference = float(one.abs().max()), float((one - other).abs().max())
    agree = difference <= _LOGIT_TOLERANCE * max(1.0, largest)
    print(
        f"logits of {tokens.numel()} tokens in float32 {'agree' if agree else 'differ'}: by at most {difference:.3g}, "
        f"the largest is {largest:.3g}, allowed is {_LOGIT_TOLERANCE:g} of it"
    )
    return EXIT_DONE if agree else EXIT_FAILED


def _logits(model: Model, tokens: Tensor) -> Tensor:
    from gspo_megatron.weights.conversion.models import HFModel

    if isinstance(model, HFModel):
        if model.checkpoint.scales:
            raise UserError(f"{model.folder}: --logits needs weights without scales; give what import and export make")
        from gspo_megatron.rollout.embedded.logits import transformers_logits

        return transformers_logits(model.folder, tokens)
    from gspo_megatron.launch import single_rank_environment
    from gspo_megatron.policy.logits import megatron_logits

    with single_rank_environment():
        return megatron_logits(model.folder, tokens)


def _diff(options: argparse.Namespace) -> int:
    from gspo_megatron.weights.conversion.compare import diff
    from gspo_megatron.weights.conversion.models import open_model
    from gspo_megatron.weights.conversion.progress import ByteProgress

    models = [open_model(folder) for folder in (options.A, options.B)]
    with ByteProgress(_nbytes(models[0]), "comparing") as progress:
        result = diff(*models, threads=options.threads, advance=progress.advance)
    return _report(result, models)


def _nbytes(model: Model) -> int:
    from gspo_megatron.weights.conversion.compare import nbytes_of

    return sum(nbytes_of(model, name) for name in model.names)


def _report(result: Comparison, models: Sequence[Model]) -> int:
    others = [difference for difference in result.differences if not difference.is_of_dtype_alone]
    for difference in others:
        print(f"{difference.name}: {difference.reason}")
    if of_dtype := len(result.differences) - len(others):
        [first, *_] = [difference for difference in result.differences if difference.is_of_dtype_alone]
        print(f"of another dtype, but equal in value: {of_dtype} tensors ({first.name}: {first.reason} …)")
    for line in result.config_differences:
        print(f"config.json: {line}")
    if result.left_out:
        print(f"not compared, for they belong to no rule: {len(result.left_out)} tensors ({result.left_out[0]} …)")
    names = " and ".join(str(model.folder) for model in models)
    if result.is_equal:
        print(f"{names} are equal: {result.tensors} tensors, {result.nbytes / 1e9:.3f} GB, bit for bit")
        return EXIT_DONE
    dtypes = f", and {of_dtype} more of another dtype, but equal in value" * (of_dtype > 0)
    print(f"{names} differ in {len(others)} tensors and {len(result.config_differences)} keys of config.json{dtypes}")
    return EXIT_FAILED


def _inspect(options: argparse.Namespace) -> int:
    from gspo_megatron.weights.conversion.inspect import inspect

    found = inspect(options.DIR)
    print(json.dumps(found.as_json(), indent=1) if options.json else found.describe())
    return EXIT_DONE


if __name__ == "__main__":
    quiet_libraries()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names come from anywhere
    sys.exit(main())
