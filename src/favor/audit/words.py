"""What the figures of an audit mean, in sentences: found, clear or not known; and which thresholds they cross.

In: the figures of audit.json. Out: Findings, a headline. Next: ../report/table.py.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from favor.report.found import side_of
from favor.report.words import between, percent

Figures = Mapping[str, Any]


class Finding(NamedTuple):
    """One thing that was looked for. found: the figure's interval leaves out what a fair judge has."""

    kind: str
    level: Literal["found", "clear", "unknown"]
    said: str


def findings(f: Figures) -> list[Finding]:
    """Everything that was looked for, in the order of the table."""
    return [_flips(f), _order(f), _length(f), *([_own(f)] if f["own"] else []), _people(f), _unusable(f)]


def headline(found: list[Finding]) -> str:
    """One sentence for all of them."""
    names = [one.kind for one in found if one.level == "found"]
    unknown = [one.kind for one in found if one.level == "unknown"]
    said = f"Found: {', '.join(names)}." if names else "Nothing was found against this judge."
    return said + (f" Not known: {', '.join(unknown)}." if unknown else "")


def failures(f: Figures, limits: Mapping[str, float]) -> list[str]:
    """The thresholds of [fail_on] that are crossed, each as a sentence."""
    said: list[str] = []
    for name, limit in limits.items():
        value, least = f[name], name == "agreement"
        if value is None:
            said.append(f"{name} could not be measured, and fail_on.{name} is {limit:g}")
        elif (value < limit) if least else (abs(value) > limit):
            said.append(f"{name} is {value:.3f}, {'below' if least else 'beyond'} fail_on.{name} = {limit:g}")
    return said


def _flips(f: Figures) -> Finding:
    if f["flip_rate"] is None:
        return Finding("flips", "unknown", "Flips: not measured, no question was asked again (repeats=0).")
    asked = f"{f['repeated_pairs']} pairs, each asked {f['repeats'] + 1} times in both orders"
    if not f["flip_rate"]:
        return Finding("flips", "clear", f"Flips: none; the same question got the same verdict every time ({asked}).")
    share = f"{percent(f['flip_rate'])} ({_ends(f, 'flip_rate')})"
    return Finding(
        "flips", "found", f"Flips: asked the same again, the verdict is another in {share} of cases ({asked})."
    )


def _order(f: Figures) -> Finding:
    side, disagree = side_of(f["position_bias_interval"], 0.0), f["inconsistency"] and percent(f["inconsistency"])
    if side:
        place, share = ("first", 0.5 + f["position_bias"]) if side > 0 else ("second", 0.5 - f["position_bias"])
        said = f"Position: {percent(share)} of its decided verdicts go to the answer shown {place} (fair: 50 %); "
        return Finding("position", "found", f"{said}the two orders disagree in {disagree} of the pairs.")
    # without repetitions flips by chance cannot be told from the order
    effect = "order_effect" if f["order_effect"] is not None else "inconsistency"
    if side_of(f[f"{effect}_interval"], 0.0) > 0 and f[effect]:
        why = (
            "more than flips explain"
            if effect == "order_effect"
            else "by chance or by the order: repeats=0 cannot tell"
        )
        return Finding("position", "found", f"Position: the two orders disagree in {disagree} of the pairs, {why}.")
    if f["position_bias"] is None:
        return Finding("position", "unknown", "Position: no verdict preferred an answer.")
    return Finding("position", "clear", f"Position: no preference for a place (bias {f['position_bias']:+.3f}).")


def _length(f: Figures) -> Finding:
    side = side_of(f["length_bias_interval"], 0.0)
    rates = [f"{percent(f[name])} of the time" for name in ("longer_rate", "longer_rate_human") if f[name] is not None]
    if f["length_bias"] is None:
        seen = f"it prefers the longer answer {rates[0]}; " if rates else "no two lengths differ; "
        return Finding(
            "length", "unknown", f"Length: {seen}without people's labels nobody knows whether that is wrong."
        )
    told = (
        f"log-odds {f['length_bias']:+.2f} ({between(f['length_bias_interval'], '+.2f')}), people's verdict held fixed"
    )
    if not side:
        return Finding("length", "clear", f"Length: no pull beyond what people's verdicts explain ({told}).")
    pulled = "longer" if side > 0 else "shorter"
    return Finding(
        "length",
        "found",
        f"Length: drawn to the {pulled} answer ({told}); the longer one wins {rates[0]}, with people {rates[1]}.",
    )


def _own(f: Figures) -> Finding:
    if f["self_bias"] is None:
        rate = (
            ""
            if f["own_rate"] is None
            else f"it prefers its own in {percent(f['own_rate'])} of {f['own_pairs']} pairs; "
        )
        return Finding(
            "self", "unknown", f"Own answers: {rate}without people's labels on such pairs that may be deserved."
        )
    gap = f"{100 * f['self_preference']:+.0f} points beside people"
    told = f"log-odds {f['self_bias']:+.2f} ({between(f['self_bias_interval'], '+.2f')}), people's verdict and length held fixed"
    if side := side_of(f["self_bias_interval"], 0.0):
        return Finding("self", "found", f"Own answers: {'partial to' if side > 0 else 'against'} them ({told}; {gap}).")
    return Finding("self", "clear", f"Own answers: treated as others ({told}; {gap}).")


def _people(f: Figures) -> Finding:
    if f["agreement"] is None:
        return Finding("people", "unknown", "People: not compared, no labels were given (human=FILE).")
    said = f"People: the judge says what a person says in {percent(f['agreement'])} ({_ends(f, 'agreement')}) of cases"
    if side_of(f["agreement_decided_interval"], 0.5) < 0:
        return Finding("people", "found", f"{said}, less often than chance: its verdicts may be the wrong way round.")
    if f["ceiling"] is not None:
        said += f"; two people say the same in {percent(f['ceiling'])} ({_ends(f, 'ceiling')})"
    else:
        said += "; how often two people do is unknown (one vote a pair), so their labels are taken for right"
    best = f["ceiling_interval"][0] if f["ceiling_interval"] else 1.0
    below = f["agreement_interval"] is not None and f["agreement_interval"][1] < best
    return Finding("people", "found" if below else "clear", f"{said}.")


def _unusable(f: Figures) -> Finding:
    if f["unusable"]:
        return Finding("unusable", "found", f"Unusable: {percent(f['unusable'])} of the verdicts could not be read.")
    return Finding("unusable", "clear", f"Unusable: every verdict could be read; {percent(f['ties'])} are ties.")


def _ends(f: Figures, name: str) -> str:
    return between(f[f"{name}_interval"])
