"""Names of metrics in a benchmark's file, checked before hours are spent on what can't be read afterwards."""

from __future__ import annotations

from collections.abc import Collection

from gspo_megatron.errors import UserError, nearest
from gspo_megatron.metrics import LIST_METRICS, METRICS
from gspo_megatron.stability.benchmark.measurements import measured_names
from gspo_megatron.stability.benchmark.results import check_reduction, split_entry
from gspo_megatron.stability.benchmark.spec import Experiment, Panel, Spec


def check_names(spec: Spec) -> None:
    """Every claim and panel names what its experiment's cells record.

    Raises:
        UserError: a metric or reduction is unknown, or a panel does not fit the command.
    """
    for experiment in spec.experiments:
        where = f"[experiments.{experiment.name}]"
        values, curves = _measured(spec, experiment)
        for claim in experiment.claims:
            what = f'{where} claim "{claim.name}"'
            if experiment.command == "train":
                _check_reduced(claim.metric, claim.reduce, what)
            elif claim.reduce:
                raise UserError(f'{what}: reduce="{claim.reduce}" is of the batches of a run; a measurement has none')
            else:
                _check_known(claim.metric, values, what)
        for panel in experiment.panels:
            _check_panel(panel, experiment.command, curves, f'{where} panel "{panel.title}"')


def _measured(spec: Spec, experiment: Experiment) -> tuple[set[str], set[str]]:
    """Values and curves of the experiment's cells; none of training runs."""
    if experiment.command == "train":
        return set(), set()
    return measured_names({**spec.train, **experiment.settings}.get("measure.what", "lengths"))


def _check_panel(panel: Panel, command: str, curves: Collection[str], what: str) -> None:
    if (panel.kind == "curve") != (command == "measure"):
        kinds = "curve" if command == "measure" else "batches, seconds, mini_batches or factor"
        raise UserError(f'{what}: kind="{panel.kind}" does not fit command="{command}"; use {kinds}')
    if panel.kind == "curve":
        _check_known(panel.x, curves, what)
    for metric in panel.metrics:
        name, _, reduce = metric.partition("|")
        if panel.kind == "curve":
            _check_known(metric, curves, what)
        elif panel.kind == "factor":
            _check_reduced(name, reduce, what)
        else:
            _check_metric(metric, what, is_list=panel.kind == "mini_batches")


def _check_reduced(metric: str, reduce: str, what: str) -> None:
    _check_metric(metric, what, is_list=False)
    try:
        check_reduction(reduce)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _check_metric(metric: str, what: str, *, is_list: bool) -> None:
    """`is_list`: the whole list is drawn; else one number a batch is wanted."""
    name, is_entry = split_entry(metric)
    _check_known(name, METRICS, what)
    if (name in LIST_METRICS) != (is_list or is_entry) or (is_list and is_entry):
        raise UserError(f"{what}: {metric} is {'a list' if name in LIST_METRICS else 'no list'}; {_HINT[is_list]}")


_HINT = {True: "name a metric with one entry a mini-batch", False: "name one number, such as name[0] of a list"}


def _check_known(name: str, known: Collection[str], what: str) -> None:
    if name not in known:
        raise UserError(f'{what}: nothing records "{name}".{nearest(name, known)}')
