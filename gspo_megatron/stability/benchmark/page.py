"""The benchmark's report as one HTML file without outside assets, and the same as Markdown."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gspo_megatron.stability.benchmark.cells import Plan
from gspo_megatron.stability.benchmark.spec import Spec
from gspo_megatron.stability.benchmark.statistics import smallest_p
from gspo_megatron.stability.benchmark.verdicts import SUPPORTED, UNDECIDED, Verdict
from gspo_megatron.stability.page import STYLE

_OWN_STYLE = """
.supported { color: #009E73; } .contradicted { color: #D55E00; } .undecided { color: var(--soft); }
.verdict { font-weight: 600; white-space: nowrap; }
dl { margin: 0.5rem 0; } dt { font-weight: 600; } dd { margin: 0 0 0.5rem 0; }
td.interval { white-space: nowrap; }
"""

INTRODUCTION = (
    "GSPO and GRPO are two ways to train a language model by rewards. Both let a batch of answers serve for several "
    "updates, and both cut off (clip) what has moved too far since the answers were written: GRPO token by token, "
    "GSPO by one number for the whole answer, the length-normalised sequence ratio s. GSPO was proposed because token "
    "ratios were found unstable for Mixture-of-Experts models, in which a router sends each token to a few experts "
    "and an update can change which. This benchmark runs both on models small enough for the machine named below, and "
    "holds what was claimed against what was measured. Hypotheses, measures and verdict rules were written down "
    "before the runs. A verdict holds for the conditions stated and for no larger model."
)


READING = (
    "Each claim has one value a seed and a range, set beforehand. Supported: the whole 95 % interval over seeds is in "
    "the range. Contradicted: all of it lies outside. Undecided: neither, as where seeds are too few or too different."
)

WORDS = {
    "rollout batch": "answers sampled from one state of the policy, scored, and then used for training",
    "mini-batch": "the part of a rollout batch that one update of the weights uses",
    "ratio": "probability of a token or answer under the policy now, over that under the policy it was sampled from",
    "log s, log W": "mean and sum over an answer's tokens of the logarithm of their ratios, in nats; GSPO clips s",
    "clip": "the range of ratios outside which a token or answer no longer pulls the policy further the same way",
    "advantage": "how much better an answer's reward is than that of other answers to the same prompt",
    "expert set": "the experts that a layer's router sends a token to; 2 of 8, say",
    "R2, R3": "routing replay: train with the expert sets of the policy before the updates (R2), of the sampler (R3)",
    "engine": "what samples the answers; it computes probabilities less exactly than the trainer, or as exactly",
    "seed": "one repetition of everything, from the random first weights on",
}


def figure_of(value: float | None) -> str:
    """At most three significant digits."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3g}".replace("-", "−")


def interval(verdict: Verdict) -> str:
    """The claim's value with its 95 % interval."""
    estimate = verdict.estimate
    if estimate is None:
        return "not measured"
    if estimate.num_seeds == 1:
        return f"{figure_of(estimate.mean)} (one seed)"
    return f"{figure_of(estimate.mean)} [{figure_of(estimate.low)}, {figure_of(estimate.high)}]"


def conditions(spec: Spec, verdict: Verdict) -> str:
    """What was compared, over how many seeds, and what a reader must know."""
    claim = verdict.claim
    parts = []
    of, against = selector(spec, claim.of), selector(spec, claim.against)
    if claim.against:
        parts.append(f"{of} against {against}")
    elif claim.of:
        parts.append(of)
    parts.append(f"{len(verdict.by_seed)} of {verdict.planned_seeds} seeds")
    if verdict.p is not None:
        parts.append(f"paired sign-flip test against no difference p = {figure_of(verdict.p)}")
    return "; ".join([*parts, *verdict.notes])


def selector(spec: Spec, values: Mapping[str, Any]) -> str:
    """Labels of cells in words."""
    return ", ".join(level(spec, key, value) for key, value in values.items())


def level(spec: Spec, key: str, value: Any) -> str:
    """One label in words: an arm's or model's title, a factor with its value."""
    if key == "arm":
        return spec.arms[value].title
    if key == "model":
        return spec.models[value].title
    name = key.rpartition(".")[2].replace("_", " ")
    return f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"


def seeds_note(seeds: int) -> str:
    """What so many seeds can and can't show."""
    if seeds < 2:
        return "One seed gives no interval: every verdict is undecided."
    text = (
        f"With {seeds} seeds an exact paired test can't give a p below {smallest_p(seeds):.3g}"
        + (", so it alone can never reach 0.05" if smallest_p(seeds) > 0.05 else "")
        + f". Intervals are Student's t over seeds ({seeds - 1} degrees of freedom), which take values over seeds as "
        "normal: they are wide, and only effects that are large beside the seeds' spread are decided. Bands in the "
        "picture are bootstrap bands over seeds: with so few they are little more than the seeds' range. Every claim "
        "is judged by itself, without a correction for their number."
    )
    return text


def markdown(spec: Spec, verdicts: Sequence[Verdict], facts: Mapping[str, str], missing: Sequence[str]) -> str:
    """report.md: the claims table and what stands behind it."""
    lines = [f"# {spec.title}", "", INTRODUCTION, "", "![curves](report.png)", "", "## Claims", ""]
    lines += [
        "| claim | the paper, or theory | measured [95 % interval] | verdict | conditions |",
        "| --- | --- | --- | --- | --- |",
    ]
    for v in verdicts:
        number = next(e.number for e in spec.experiments if e.name == v.experiment)
        cells = [
            f"{number}. {v.claim.text}",
            v.claim.paper or "–",
            interval(v),
            f"**{v.verdict}**",
            conditions(spec, v),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", summary(verdicts), "", READING, "", seeds_note(min(len(e.seeds) for e in spec.experiments)), ""]
    lines += ["## Missing", "", *(f"- {line}" for line in missing or ["Nothing: every cell is done."]), ""]
    lines += ["## Experiments", ""]
    for e in spec.experiments:
        lines += [f"### {e.number}. {e.title}", "", e.question, "", f"- **Hypothesis.** {e.hypothesis}"]
        lines += [f"- **Measure.** {e.measure}"]
        lines += [f"- **Rule: {c.text}** {c.rule[0].upper()}{c.rule[1:]}." for c in e.claims] + [""]
    lines += ["## Conditions", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["## Words", "", *(f"- **{word}**: {meaning}" for word, meaning in WORDS.items()), ""]
    return "\n".join(lines)


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many claims came out how."""
    counts = {name: sum(v.verdict == name for v in verdicts) for name in (SUPPORTED, "contradicted", UNDECIDED)}
    return f"{len(verdicts)} claims: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + "."


def html(
    spec: Spec,
    plan: Plan,
    verdicts: Sequence[Verdict],
    facts: Mapping[str, str],
    missing: Sequence[str],
    *,
    light_png: bytes,
    dark_png: bytes,
) -> str:
    """report.html."""
    sections = "\n".join(_experiment(spec, e.name, verdicts) for e in spec.experiments)
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts.items())
    words = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in WORDS.items())
    gaps = "".join(f"<li>{escape(line)}</li>" for line in missing)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(spec.title)}</title>
<style>{STYLE}{_OWN_STYLE}</style>
</head>
<body>
<h1>{escape(spec.title)}</h1>
<p>{escape(INTRODUCTION)}</p>
<details><summary>Words</summary><dl>{words}</dl></details>
<h2>Claims</h2>
<p>{escape(summary(verdicts))} {escape(READING)}</p>
{_claims(spec, verdicts)}
<p class="soft">{escape(seeds_note(min(len(e.seeds) for e in spec.experiments)))}</p>
<h2>Missing</h2>
{f'<ul class="notes">{gaps}</ul>' if missing else "<p>Nothing: every cell is done.</p>"}
<h2>Curves</h2>
<p class="soft">Lines are means over seeds, bands 95 % bootstrap bands over seeds.</p>
{_picture(light_png, dark_png)}
<h2>Experiments</h2>
{sections}
<h2>Conditions</h2>
<div class="scroll"><table>{rows}</table></div>
<details><summary>All cells ({len(plan.cells)})</summary>{_cells(plan)}</details>
<details><summary>The benchmark's file, as it was before the runs</summary><pre>{escape(spec.text)}</pre></details>
</body>
</html>
"""


def _picture(light: bytes, dark: bytes) -> str:
    def uri(png: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"

    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{uri(dark)}">'
        f'<img src="{uri(light)}" alt="Curves of all experiments over seeds"></picture>'
    )


def _verdict(verdict: Verdict) -> str:
    return f'<span class="verdict {verdict.verdict}">{verdict.verdict}</span>'


def _claims(spec: Spec, verdicts: Sequence[Verdict]) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("", "claim", "the paper, or theory", "measured [95 % interval]", "verdict", "conditions")
    )
    rows = []
    for v in verdicts:
        number = next(e.number for e in spec.experiments if e.name == v.experiment)
        cells = [
            f'<td><a href="#{escape(v.experiment)}">{number}</a></td>',
            f"<td>{escape(v.claim.text)}</td>",
            f"<td>{escape(v.claim.paper or '–')}</td>",
            f'<td class="interval">{escape(interval(v))}</td>',
            f"<td>{_verdict(v)}</td>",
            f'<td class="soft">{escape(conditions(spec, v))}</td>',
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _experiment(spec: Spec, name: str, verdicts: Sequence[Verdict]) -> str:
    experiment = next(e for e in spec.experiments if e.name == name)
    items = []
    for v in verdicts:
        if v.experiment != name:
            continue
        values = ", ".join(f"seed {seed}: {figure_of(value)}" for seed, value in v.by_seed.items()) or "none"
        items.append(
            f"<li>{escape(v.claim.text)} <span class='soft'>Rule: {escape(v.claim.rule)}.</span> "
            f"{escape(interval(v))}: {_verdict(v)} <span class='soft'>({escape(values)})</span></li>"
        )
    return (
        f'<h3 id="{escape(name)}">{experiment.number}. {escape(experiment.title)}</h3>\n'
        f"<p>{escape(experiment.question)}</p>\n"
        f"<dl><dt>Hypothesis</dt><dd>{escape(experiment.hypothesis)}</dd>"
        f"<dt>Measure</dt><dd>{escape(experiment.measure)}</dd></dl>\n<ul>{''.join(items)}</ul>"
    )


def _cells(plan: Plan) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(c.id)}</code></td><td>{escape(c.title)}</td></tr>" for c in plan.cells.values()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'
