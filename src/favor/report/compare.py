"""Runs side by side: runs are columns, figures rows; the best is marked, differences are paired, settings that differ are listed.

In: run records, the first being what the others are compared with. Out: compare.html. Next: verdict.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup

from favor.eval.intervals import Interval, mean_interval, sign_share
from favor.report import samples
from favor.report.curves import curves
from favor.report.found import Found, card, other, place
from favor.report.frame import rendered
from favor.report.page import flatten
from favor.report.plot import COLOURS
from favor.report.records import Record, RunRecord, anywhere
from favor.report.verdict import warnings
from favor.report.words import between, plural
from favor.run import write_text

# answers that the page shows, and letters of all of them
_PROMPTS, _LETTERS = 12, 60_000
# warnings of all runs, letters of one and of a setting, settings
_WARNINGS, _LONGEST, _ROWS = 60, 300, 100


class Figure(NamedTuple):
    """A figure that runs are compared by: part, key and interval in eval.json, format, which way is good."""

    name: str
    part: str
    key: str
    ends: str
    spec: str
    good: Literal["up", "down", ""] = "up"

    def of(self, run: RunRecord) -> tuple[Any, Any]:
        """Its value and its interval, None where it was not measured."""
        found = (run.evaluation.get(self.part) or {}) if self.part else run.evaluation
        return found.get(self.key), found.get(self.ends)


FIGURES = (
    Figure("implicit reward accuracy, held-out", "", "accuracy", "accuracy_interval", ".3f"),
    Figure("preference accuracy, held-out", "", "policy_accuracy", "policy_accuracy_interval", ".3f"),
    Figure("implicit reward margin", "", "margin", "margin_interval", "+.3f", ""),
    Figure("held-out DPO loss, nats", "", "loss", "", ".4f", "down"),
    Figure("score of its own answers", "score", "policy", "policy_interval", ".3f"),
    Figure("reward model accuracy, held-out", "calibration", "accuracy", "accuracy_interval", ".3f"),
    Figure("calibration error (ECE)", "calibration", "ece", "", ".3f", "down"),
    Figure("KL, nats an answer", "kl", "mean", "", ".2f", ""),
    Figure("tokens an answer", "length", "policy", "", ".1f", ""),
)
# of a pair's record: what is compared pair by pair
_PAIRED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], tuple[float, float] | None]] = {
    "implicit reward accuracy": ("margin", sign_share, (-1.0, 1.0)),
    "preference accuracy": ("policy_gap", sign_share, (-1.0, 1.0)),
    "implicit reward margin": ("margin", lambda values: values, None),
}


class Cell(NamedTuple):
    """A figure of one run, as text; whether it is the best of its row."""

    text: str
    best: bool


class Difference(NamedTuple):
    """What is compared, which run with the first, the difference with its interval, on what, and the verdict."""

    what: str
    run: str
    text: str
    on: str
    verdict: str


def write_comparison(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page of several runs, the first being what the others are compared with; whole or not at all."""
    write_text(path, comparison([anywhere(run) for run in _apart(runs)]))


def comparison(runs: Sequence[RunRecord]) -> Markup:
    """The page of several runs."""
    rows, found = figure_rows(runs), differences(runs)
    return rendered(
        "favor.report",
        "compare.html.jinja",
        runs=runs,
        colours=COLOURS,
        verdict=card(verdict_of(runs, found)),
        rows=rows,
        differences=found,
        settings=settings_rows([run.settings for run in runs]),
        plots=curves(runs, "step", inner=False),
        inner=curves(runs, "step", inner=True),
        answers=_answers(runs),
        warned=_warned(runs),
    )


def figure_rows(runs: Sequence[RunRecord]) -> list[tuple[str, str, list[Cell]]]:
    """(figure, which way is good, a cell for each run), for every figure that a run has; of steps, the last one's."""
    rows: list[tuple[str, str, list[Cell]]] = []
    for figure in FIGURES:
        found = [figure.of(run) for run in runs]
        if any(value is not None for value, _ in found):
            texts = [_shown(figure, *one) for one in found]
            rows.append((figure.name, figure.good, _cells([value for value, _ in found], texts, figure.good)))
    last = [run.steps[-1] if run.steps else {} for run in runs]
    rows += [("training steps", "", [Cell(f"{step.get('step', 0)}", False) for step in last])]
    rows += [
        ("training time, s", "", [Cell(f"{step['seconds']:.0f}" if "seconds" in step else "-", False) for step in last])
    ]
    return rows


def _shown(figure: Figure, value: Any, ends: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:{figure.spec}}" + (f" [{ends[0]:{figure.spec}}, {ends[1]:{figure.spec}}]" if ends else "")


def _cells(values: Sequence[Any], texts: Sequence[str], good: str) -> list[Cell]:
    known = [value for value in values if value is not None]
    best = {"up": max, "down": min}[good](known) if good and len(known) > 1 and len(set(known)) > 1 else None
    return [Cell(text, best is not None and value == best) for text, value in zip(texts, values, strict=True)]


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Every other run less the first, on the same held-out pairs and prompts; where none are shared, nothing is said."""
    first, found = runs[0], list[Difference]()
    for run in runs[1:]:
        for what, (key, value, bounds) in _PAIRED.items():
            if common := _common(first, run, key):
                before, after, prompt = (np.array(column, np.float64) for column in zip(*common, strict=True))
                shift = mean_interval(value(after) - value(before), clusters=prompt.astype(np.int64), bounds=bounds)
                found.append(_difference(what, run, shift, plural(len(common), "pair")))
        if gain := _scores(first, run):
            values, prompt = (np.array(column) for column in zip(*gain, strict=True))
            shift = mean_interval(values, clusters=prompt.astype(np.int64))
            found.append(
                _difference("score of its own answers", run, shift, plural(len(set(prompt.tolist())), "prompt"))
            )
    return found


def _common(first: RunRecord, run: RunRecord, key: str) -> list[tuple[float, float, int]]:
    """(first's value, run's value, prompt) of the pairs that both have."""
    known = {record["pair"]: record[key] for record in first.pairs if key in record}
    return [(known[r["pair"]], r[key], r["prompt"]) for r in run.pairs if key in r and r["pair"] in known]


def _scores(first: RunRecord, run: RunRecord) -> list[tuple[float, int]]:
    """(difference of scores, place of the prompt), sample by sample, where one scorer scored answers to the same prompts."""
    names = [(one.evaluation.get("score") or {}).get("name") for one in (first, run)]
    if names[0] is None or names[0] != names[1]:
        return []
    known = {samples.prompt_text(record["prompt"]): record.get("policy_scores", []) for record in first.samples}
    return [
        (after - before, place)
        for place, record in enumerate(run.samples)
        for before, after in zip(
            known.get(samples.prompt_text(record["prompt"]), []), record.get("policy_scores", []), strict=False
        )
    ]


def _difference(what: str, run: RunRecord, shift: Interval, on: str) -> Difference:
    text = f"{shift.mean:+.3f} ({between(shift.ends, '+.3f')})"
    side = 0 if shift.ends is None else (shift.low > 0) - (shift.high < 0)
    return Difference(what, run.name, text, on, {1: "higher", 0: "not settled", -1: "lower"}[side])


def verdict_of(runs: Sequence[RunRecord], found: Sequence[Difference]) -> Found:
    """The score of answers decides where there is one, else the accuracy on pairs."""
    first, others = runs[0].name, [run.name for run in runs[1:]]
    deciding = next(
        (what for what in ("score of its own answers", *_PAIRED) if any(d.what == what for d in found)), None
    )
    told = [d for d in found if d.what == deciding]
    missing = [run for run in runs if not run.evaluation and not other(run)]
    wrong = [f"{run.name} was not evaluated: favor eval run={place(run)} measures it." for run in missing]
    wrong += [
        f"{run.name} is of another kind; its own page shows it: favor report {place(run)}."
        for run in runs
        if other(run)
    ]
    wrong += [f"{run.name}: {plural(len(said), 'warning')}, listed below." for run in runs if (said := warnings(run))]
    if not told:
        headline = f"{first} and {' and '.join(others)} side by side; no held-out pairs are shared, so which is better is open."
        return Found(
            "none",
            headline,
            wrong=wrong,
            next=[(f"favor eval run={place(run)}", "keeps its pairs for comparison") for run in runs],
        )
    better, worse = ([d.run for d in told if d.verdict == side] for side in ("higher", "lower"))
    parts = [
        f"{' and '.join(names)} {how} {first}"
        for names, how in ((better, "is better than"), (worse, "is worse than"))
        if names
    ]
    headline = (
        "; ".join(parts) + f", by the {deciding}."
        if parts
        else f"No difference to {first} is settled, by the {deciding}."
    )
    return Found(
        "settled" if parts else "unsure",
        headline,
        changed=[f"{d.run} less {first}, {d.what}: {d.text}, on the same {d.on}." for d in told],
        sure=[
            "Ranges are 95 % intervals of the paired difference over prompts; what another seed would give is not in them."
        ],
        wrong=wrong,
    )


def _warned(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(run, warning), the first of each run."""
    most = max(_WARNINGS // len(runs), 1)
    return [(run.name, text[:_LONGEST]) for run in runs for text in warnings(run)[:most]]


def settings_rows(recipes: Sequence[Record]) -> list[tuple[str, ...]]:
    """(key, a value for each recipe) of the settings that are not the same in all."""
    flat = [dict(flatten(recipe)) for recipe in recipes]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in ("run", "resume")]
    rows = [(key, *(one.get(key, "not set") for one in flat)) for key in keys]
    different = [tuple(text[:_LONGEST] for text in row) for row in rows if len(set(row[1:])) > 1]
    return different[:_ROWS]


def _answers(runs: Sequence[RunRecord]) -> list[tuple[str, list[tuple[str, str, Any]]]]:
    """(prompt, [(run, answer, score)]) of the prompts that more than one run has answered, the first answer of each."""
    by_prompt: dict[str, list[tuple[str, str, Any]]] = {}
    for run in runs:
        for record in run.samples:
            if record["policy"]:
                score = (record.get("policy_scores") or [None])[0]
                by_prompt.setdefault(samples.prompt_text(record["prompt"]), []).append(
                    (run.name, str(record["policy"][0]), score)
                )
    letters, kept = 0, list[tuple[str, list[tuple[str, str, Any]]]]()
    for prompt, said in by_prompt.items():
        letters += len(prompt) + sum(len(text) for _, text, _ in said)
        if len(said) > 1 and len(kept) < _PROMPTS and letters < _LETTERS:
            kept.append((prompt, said))
    return kept


def _apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs of one name get a number."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({names[:i].count(run.name) + 1})") if names.count(run.name) > 1 else run
        for i, run in enumerate(runs)
    ]
