"""Figures as rows of text, for the terminal and the page alike.

In: the content of eval.json, winrate.json, audit.json or realign.json, or of favor diff. Out: rows and rich tables.
Next: words.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

# below this many prompts an interval rests on little: said beside it
FEW = 30
_ACCURACIES = (
    "preference accuracy: how often the preferred answer is the likelier one; "
    "implicit reward accuracy: how often training raised it more than the other"
)


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """One row per figure of eval.json: (what, policy, reference); intervals are 95 %, over prompts."""
    rows: list[tuple[str, str, str]] = []
    if "accuracy" in figures:
        # earlier files do not count prompts; there are at most as many as pairs
        f = {"prompts": figures["pairs"]} | dict(figures)
        # two figures that are easily confused: likelier under the model itself, and raised more than the other
        own = _known(f, "policy_accuracy", ".3f") if "policy_accuracy" in f else "not measured"
        rows += [
            (f"preference accuracy ({f['pairs']} held-out pairs)", own, _known(f, "reference_accuracy", ".3f")),
            ("implicit reward accuracy", _known(f, "accuracy", ".3f"), "0.5"),
            ("implicit reward margin", _known(f, "margin", "+.3f"), "0"),
            ("held-out DPO loss (nats a pair)", f"{f['loss']:.4f}", "0.6931"),
        ]
    if calibration := figures.get("calibration"):
        f = {"prompts": calibration["pairs"]} | calibration
        rows += [
            (f"reward accuracy ({f['pairs']} held-out pairs)", _known(f, "accuracy", ".3f"), ""),
            ("Bradley-Terry loss (nats a pair; guessing gives ln 2)", f"{f['loss']:.4f}", "0.6931"),
            ("calibration error (ECE)", f"{f['ece']:.3f}", ""),
        ]
    if kl := figures.get("kl"):
        error = "unknown" if kl["se"] is None else f"{kl['se']:.2f}"
        text = f"{kl['mean']:.2f} ± {error}{_few(kl.get('num_prompts', kl['num_samples']))}"
        rows.append((f"KL(policy || reference), nats ({kl['num_samples']} samples, ± s.e.)", text, "0"))
    if length := figures.get("length"):
        rows.append(("mean length of samples, tokens", f"{length['policy']:.1f}", f"{length['reference']:.1f}"))
    if score := figures.get("score"):
        f = {"prompts": score["num_prompts"], "difference_interval": score["interval"]} | score
        what = f"{f['name']} score of samples ({f['prompts']} prompts x {f['samples_per_prompt']})"
        rows += [
            (what, _known(f, "policy", ".3f"), _known(f, "reference", ".3f")),
            (f"{f['name']} score, difference", _known(f, "difference", "+.3f"), ""),
        ]
    return rows


def winrate_rows(figures: Mapping[str, Any], names: Sequence[str] = ("a", "b")) -> list[tuple[str, str]]:
    """One row per figure of winrate.json: (what, value); intervals are 95 %, over prompts. names: what the sides are called."""
    f, (a, b) = figures, names
    counts = f"{f['wins']} / {f['ties']} / {f['losses']} of {f['pairs']} pairs, {f['prompts']} prompts"
    rows = [
        (f"win rate of {a} over {b}", _known(f, "win_rate", ".3f")),
        ("  at equal lengths", _known(f, "lc_win_rate", ".3f")),
        (f"wins / ties / losses of {a}", counts),
        ("both orders agree", f"{f['consistency']:.3f} of the pairs"),
        ("position bias (0: none, +0.5: always the first)", _known(f, "position_bias", "+.3f")),
        (f"mean length ({f['length_unit']})", f"{a} {f['mean_length_a']:.0f}, {b} {f['mean_length_b']:.0f}"),
        (f"{a} is the longer one", f"{f['longer_a']:.3f} of the pairs"),
    ]
    if f["invalid"]:
        unread = f"{f['invalid']} pairs ({f['invalid_verdicts']} verdicts)"
        rows.append(("left out: a verdict could not be read", unread))
    rows += [(f"left out: {name.replace('_', ' ')}", str(count)) for name, count in f["left_out"].items() if count]
    return [*rows, ("a", str(f["a"])), ("b", str(f["b"])), ("judge", str(f["judge"]))]


def family_rows(figures: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and a row for each strength of realign.json and each run beside; intervals are 95 %, over prompts."""
    reward = {"reward": ("reward", ".3f")} if figures["reward"] else {}
    kept = {"accuracy": ("accuracy", ".3f"), "margin": ("margin", "+.3f"), "kl": ("KL, nats", ".2f")}
    kept |= reward | {"length": ("length, tokens", ".1f"), "ended": ("ended", ".2f")}
    rows = [
        (
            name,
            "none" if one["beta"] is None else f"{one['beta']:.3g}",
            *(_ends(one, key, spec) for key, (_, spec) in kept.items()),
        )
        for name, one in family_names(figures)
    ]
    return ("strength", "beta", *(name for name, _ in kept.values())), rows


def family_names(figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, figures) of each strength, then of the runs of the sweep, by the last part of their paths."""
    names = [(f"lambda {one['lambda']:g}", one) for one in figures["family"]]
    return names + [(f"trained: {str(one['run']).rstrip('/').rpartition('/')[2]}", one) for one in figures["sweep"]]


def _ends(figures: Mapping[str, Any], name: str, spec: str) -> str:
    """A figure with the ends of its interval, where it has one."""
    ends = figures[f"{name}_interval"]
    return f"{figures[name]:{spec}}" + ("" if ends is None else f" [{ends[0]:{spec}}, {ends[1]:{spec}}]")


# figure of audit.json -> (what it is, its format, whether it rests on the pairs that people labelled)
_AUDITED: dict[str, tuple[str, str, bool]] = {
    "flip_rate": ("another verdict when asked again", ".3f", False),
    "inconsistency": ("both orders disagree", ".3f", False),
    "order_effect": ("  beyond flips by chance", "+.3f", False),
    "position_bias": ("position bias (0: none, +0.5: always the first)", "+.3f", False),
    "length_bias": ("length bias, log-odds, people's verdict held fixed", "+.2f", True),
    "length_difference": ("  the judge's coefficient less people's", "+.2f", True),
    "length_association": ("  as it is, whatever its reason", "+.2f", False),
    "longer_rate": ("the judge prefers the longer answer", ".3f", False),
    "longer_rate_human": ("  people do", ".3f", True),
    "self_bias": ("self-preference, log-odds, people's verdict held fixed", "+.2f", True),
    "self_preference": ("  rate of its own answers less people's", "+.3f", True),
    "own_rate": ("  it prefers its own", ".3f", False),
    "agreement": ("agreement with people (one, a tie, the other)", ".3f", True),
    "agreement_decided": ("  where both prefer an answer", ".3f", True),
    "kappa": ("  Cohen's kappa", ".3f", True),
    "ceiling": ("  people with each other", ".3f", True),
    "ties": ("verdicts that are ties", ".3f", False),
    "unusable": ("verdicts that could not be read", ".3f", False),
}


def audit_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One row per figure of audit.json that was measured: (what, value); intervals are 95 %, over prompts."""
    people = {**figures, "prompts": figures["human_prompts"]}
    rows = [
        (what, _known(people if human else figures, name, spec))
        for name, (what, spec, human) in _AUDITED.items()
        if figures[name] is not None
    ]
    if win := figures["win_rate"]:
        rows += [
            (
                f"win rate of {win['side']} by people ({win['labels']} labels alone)",
                _known(people | win, "human", ".3f"),
            ),
            (f"  by the judge alone ({win['pairs']} pairs)", _known(figures | win, "judge", ".3f")),
            ("  by both (prediction-powered)", _known(people | win, "both", ".3f")),
            ("  the labels are worth", f"{win['worth']:.0f} (weight of the judge {win['weight']:.2f})"),
        ]
    if soft := figures["soft_labels"]:
        ece = soft["calibration"] and soft["calibration"]["ece"]
        rows.append(("soft labels, calibration error on people's", "not known" if ece is None else f"{ece:.3f}"))
        rows.append(("  one share for all (label_smoothing)", f"{soft['label_smoothing']:.3f}"))
    rows += [(f"left out: {name}", str(count)) for name, count in figures["left_out"].items() if count]
    return [*rows, ("pairs, prompts", f"{figures['pairs']}, {figures['prompts']}"), ("judge", str(figures["judge"]))]


def figure_columns(figures: Mapping[str, Any]) -> tuple[str, str]:
    """What the two columns of `figure_rows` are: a reward model has no reference, only what guessing gives."""
    return ("after (policy)", "before (reference)") if "accuracy" in figures else ("value", "guessing")


def figures_table(figures: Mapping[str, Any]) -> Table:
    """The rows of eval.json as a rich table."""
    table = _table(("held out", *figure_columns(figures)), figure_rows(figures))
    table.caption = _ACCURACIES if "accuracy" in figures else None
    return table


def winrate_table(figures: Mapping[str, Any]) -> Table:
    """The rows of winrate.json as a rich table."""
    return _table(("a against b", ""), winrate_rows(figures))


def worth_table(figures: Mapping[str, Any]) -> Table:
    """What `favor value` found, as a rich table."""
    f = figures
    labels = "labels that cheap models agree with, which never saw the prompt"
    rows = [
        ("wrong labels", _known(f, "wrong_labels", ".3f")),
        (labels, _known(f, "agreement", ".3f")),
        ("labels that the model's own log-probs agree with", _known(f, "logp_agreement", ".3f")),
        *((f"pairs to {name}", str(count)) for name, count in f["verdicts"].items()),
        *((("rows left out, without a pair that can be used", str(f["left_out"])),) if f["left_out"] else ()),
    ]
    for row in f["curve"]:
        kept = row["share"] if isinstance(row["share"], str) else f"{row['share']:.0%} kept"
        chance = "" if row["by_chance"] is None else f"; by chance {row['by_chance']:.3f}"
        rows.append((f"held-out accuracy, {kept}", _known(row | {"prompts": FEW}, "accuracy", ".3f") + chance))
    return _table((f"{f['pairs']} pairs, {f['prompts']} prompts", ""), rows)


def family_table(figures: Mapping[str, Any]) -> Table:
    """The rows of realign.json as a rich table."""
    table = _table(*family_rows(figures))
    sampled = figures["sampled_prompts"]
    held_out = f"{figures['pairs']} held-out pairs of {figures['prompts']} prompts{_few(figures['prompts'])}"
    table.caption = f"{held_out}; samples of {sampled} prompts{_few(sampled)}"
    return table


def diff_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per figure of favor diff: (what, a, b, b less a, how sure it is of that, prompts)."""
    rows: list[tuple[str, ...]] = []
    for one in figures["figures"].values():
        spec, (low, high) = one["spec"], one["interval"]
        sides = ("", "") if one["a"] is None else (f"{one['a']:{spec}}", f"{one['b']:{spec}}")
        sign = "" if one["a"] is None else "+"
        change = f"{one['change']:{sign}{spec}} [{low:{sign}{spec}}, {high:{sign}{spec}}]"
        rows.append((one["what"], *sides, change, str(one["prompts"])))
    means = figures["means"]
    a, b = means["distinct_over_all"]
    rows.append(("distinct 2-grams over all answers", f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}", ""))
    if "reward" in means:
        a, b = means["reward"]
        rows.append(("mean reward", f"{a:.4g}", f"{b:.4g}", f"{b - a:+.4g}", ""))
    if "kl_of_answers" in means:
        rows.append(("KL(b || a), nats an answer", "", "", f"{means['kl_of_answers']:.3f}", ""))
        rows.append(("KL(a || b), nats an answer", "", "", f"{means['reverse_kl_of_answers']:.3f}", ""))
    return rows


DIFF_HEADER = ("figure", "a", "b", "b less a, or of both", "prompts")


def diff_table(figures: Mapping[str, Any]) -> Table:
    """The figures of favor diff, then its gates."""
    table = _table(DIFF_HEADER, diff_rows(figures))
    for gate in figures["gates"]:
        low, high = gate["interval"]
        table.add_row(
            f"gate {gate['figure']}: {gate['limit']}", "", "", f"{gate['verdict']} [{low:.3g}, {high:.3g}]", ""
        )
    return table


def audit_table(figures: Mapping[str, Any]) -> Table:
    """The rows of audit.json as a rich table."""
    return _table(("the judge", ""), audit_rows(figures))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


def _known(figures: Mapping[str, Any], name: str, spec: str) -> str:
    """A figure and its interval; without spread there is none. Few prompts are said beside it."""
    value, interval = figures[name], figures[f"{name}_interval"]
    if value is None:
        return "not available"
    ends = "(no interval: all alike)" if interval is None else f"[{interval[0]:{spec}}, {interval[1]:{spec}}]"
    return f"{value:{spec}} {ends}{_few(figures['prompts'])}"


def _few(prompts: int) -> str:
    return "" if prompts >= FEW else f", few: {prompts} prompt{'s' * (prompts != 1)}"
