"""The page of `favor diff`: what changed in sentences, all figures, the gates, answers side by side.

In: the content of the JSON file. Out: HTML that names no folder of this machine. Next: ../report/frame.py.
"""

from collections.abc import Mapping
from typing import Any

from favor.errors import without_places
from favor.report.found import Found, Light, card
from favor.report.frame import rendered
from favor.report.samples import difference, within
from favor.report.table import DIFF_HEADER, FEW, diff_rows
from favor.report.words import between, plural

_LIGHTS: Mapping[str, Light] = {"passes": "good", "fails": "bad", "not settled": "unsure", "": "settled"}


def page(figures: Mapping[str, Any]) -> str:
    """The whole page. What models said is shown as text, whatever it holds."""
    known = [figures["a"], figures["b"]]
    names = {name: without_places(figures[name], known) for name in ("a", "b")}
    found = Found(
        _LIGHTS[figures["verdict"]],
        headline(figures),
        changes(figures),
        _sure(figures),
        [],
        [_gate(gate) for gate in figures["gates"] if gate["verdict"] != "passes"],
    )
    values = {
        "rows": diff_rows(figures),
        "header": DIFF_HEADER,
        "gates": [(_limit(g), _gate(g)) for g in figures["gates"]],
    }
    examples = [_shown(one) for one in figures["examples"]]
    return rendered(
        "favor.diff",
        "diff.html.jinja",
        names=names,
        verdict=card(found),
        left_out=figures["left_out"],
        examples=examples,
        **values,
    )


def headline(figures: Mapping[str, Any]) -> str:
    """One sentence: the gates, or without any what changed."""
    gates, changed = figures["gates"], [one for one in figures["figures"].values() if one["side"]]
    if gates:
        of = {name: sum(gate["verdict"] == name for gate in gates) for name in ("passes", "fails", "not settled")}
        said = ", ".join(f"{count} {name}" for name, count in of.items() if count)
        passed = ", which counts as passing" if of["not settled"] and figures["unsettled"] == "pass" else ""
        return f"Of {plural(len(gates), 'limit')}: {said}{passed}."
    if not changed:
        return "No figure is known to have changed."
    return f"{plural(len(changed), 'figure')} changed for certain."


def changes(figures: Mapping[str, Any]) -> list[str]:
    """A sentence for every figure that changed for certain."""
    said: list[str] = []
    for one in figures["figures"].values():
        spec, ends = one["spec"], between(one["interval"], one["spec"])
        if one["side"] and one["a"] is None:
            said.append(f"{one['what']}: {one['b']:{spec}} ({ends}).")
        elif one["side"]:
            said.append(f"{one['what']}: {one['a']:{spec}} to {one['b']:{spec}} (b less a {ends}).")
    return said or [
        "No figure is known to have changed; what did not change for certain may still have changed a little."
    ]


def _sure(figures: Mapping[str, Any]) -> list[str]:
    asked, total = figures["answered"], figures["prompts"]
    said = [
        f"{asked} of {plural(total, 'prompt')} were needed, {plural(figures['samples_per_prompt'], 'answer')} of either model to "
        "each, by the same random numbers.",
        "The ranges hold at all times together with 95 %, so one may look after every batch and stop; those of the gates "
        "together, and those of all other figures together (Bonferroni).",
    ]
    if asked < FEW:
        said.append(f"Under {FEW} prompts little can be told.")
    return [*said, *(f"{note[0].upper()}{note[1:]}." for note in figures["left_out"])]


def _limit(gate: Mapping[str, Any]) -> str:
    return f"{gate['figure']}: {gate['limit']}"


def _gate(gate: Mapping[str, Any]) -> str:
    return f"{_limit(gate)} {gate['verdict']}: {gate['value']:.3g} ({between(gate['interval'], '.3g')})"


def _shown(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example with the words that differ marked."""
    texts = difference(*(within(example[side]["text"]) for side in ("a", "b")))
    sides = {
        side: {"text": text, "cut": not example[side]["ended"], "score": None}
        for side, text in zip(("a", "b"), texts, strict=True)
    }
    return {**example, "prompt": within(example["prompt"]), **sides}
