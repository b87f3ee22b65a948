"""From a plan to the text of an sbatch script."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2

from gspo_megatron.slurm.plan import Component, JobPlan, Run

TEMPLATE = "job.sbatch.jinja"


@dataclass(frozen=True)
class _ScriptRun:
    """A run's words in the script, quoted for bash."""

    config: str  # file and overrides
    folder: str


def render(plan: JobPlan, *, command: Sequence[str]) -> str:
    """The script; the same plan gives the same text.

    Args:
        plan: the job.
        command: by which the script was made, for its first lines.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # "{#" is a comment in Jinja and the length of an array in bash.
        comment_start_string="<#",
        comment_end_string="#>",
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        plan=plan,
        request=plan.request,
        servers=plan.servers,
        # Ranks may end one after another, as late as a collective among them may come.
        wait_s=math.ceil(max(run.config.parallel.timeout_s for run in plan.runs)),
        made_by=" ".join(_on_one_line(word) for word in command),
        components=_directives(plan),
        runs=[_script_run(run) for run in plan.runs],
    )


def _script_run(run: Run) -> _ScriptRun:
    return _ScriptRun(shlex.join([str(run.config_file), *run.overrides]), shlex.quote(run.config.run.folder))


def _on_one_line(word: str) -> str:
    """A word as bash reads it, without a character that could end the comment which it stands in."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "$'" + "".join(c if c.isprintable() else _as_bytes(c) for c in escaped) + "'"


def _as_bytes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def _directives(plan: JobPlan) -> list[list[str]]:
    """Options of sbatch: of the job, or of each component of a heterogeneous one."""
    request = plan.request
    whole = [
        f"--job-name={plan.name}",
        f"--output={'%x-%A_%a.out' if plan.is_array else '%x-%j.out'}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{request.signal_lead_s}",
    ]
    if plan.is_array:
        limit = f"%{request.array_limit}" if request.array_limit else ""
        whole.append(f"--array=0-{len(plan.runs) - 1}{limit}")
    components = [[*whole, *_resources(plan, plan.trainers)]]
    if plan.server_component is not None:
        components.append(_resources(plan, plan.server_component))
    return components


def _resources(plan: JobPlan, component: Component) -> list[str]:
    request = plan.request
    found = [f"--nodes={component.nodes}", f"--ntasks-per-node={component.tasks_per_node}"]
    if component.gpus_per_node:
        found.append(f"--gpus-per-node={component.gpus_per_node}")
    if component.cpus_per_task:
        found.append(f"--cpus-per-task={component.cpus_per_task}")
    found.append(f"--time={request.time}")
    if component.partition:
        found.append(f"--partition={component.partition}")
    if request.account:
        found.append(f"--account={request.account}")
    return [*found, *map(_quoted, request.sbatch)]


def _quoted(option: str) -> str:
    """An option as sbatch reads a line: it ends at a space or #, and a backslash counts inside of quotes too."""
    name, _, value = option.partition("=")
    if not re.search(r"[\s#\"'\\]", value):
        return option
    return f'{name}="' + re.sub(r'(["\\])', r"\\\1", value) + '"'
