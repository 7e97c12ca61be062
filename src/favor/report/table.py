"""Held-out figures as rows of text, for the terminal and the page alike.

In: the content of eval.json. Out: (name, policy, reference) rows, and a rich table. Next: page.py.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.table import Table

Row = tuple[str, str, str]
# below this many prompts an interval rests on little: said beside it
FEW = 30


def figure_rows(figures: Mapping[str, Any]) -> list[Row]:
    """One row per figure: (what, policy, reference); intervals are 95 %, over prompts."""
    rows: list[Row] = []
    if "accuracy" in figures:
        # earlier files do not count prompts; there are at most as many as pairs
        prompts = figures.get("prompts", figures["pairs"])
        rows.append(
            (
                f"preference accuracy ({figures['pairs']} held-out pairs)",
                with_interval(figures["accuracy"], figures["accuracy_interval"], ".3f", prompts),
                with_interval(figures["reference_accuracy"], figures["reference_accuracy_interval"], ".3f", prompts),
            )
        )
        margin = with_interval(figures["margin"], figures["margin_interval"], "+.3f", prompts)
        rows.append(("implicit reward margin", margin, "0"))
        rows.append(("held-out DPO loss (nats a pair)", f"{figures['loss']:.4f}", "0.6931"))
    if calibration := figures.get("calibration"):
        prompts = calibration.get("prompts", calibration["pairs"])
        rows.append(
            (
                f"reward accuracy ({calibration['pairs']} held-out pairs)",
                with_interval(calibration["accuracy"], calibration["accuracy_interval"], ".3f", prompts),
                "",
            )
        )
        rows.append(("Bradley-Terry loss (nats a pair); ln 2 knows nothing", f"{calibration['loss']:.4f}", "0.6931"))
        rows.append(("calibration error (ECE)", f"{calibration['ece']:.3f}", ""))
    if kl := figures.get("kl"):
        error = "unknown" if kl["se"] is None else f"{kl['se']:.2f}"
        text = f"{kl['mean']:.2f} ± {error}{few(kl.get('num_prompts', kl['num_samples']))}"
        rows.append((f"KL(policy || reference), nats ({kl['num_samples']} samples, ± s.e.)", text, "0"))
    if length := figures.get("length"):
        rows.append(("mean length of samples, tokens", f"{length['policy']:.1f}", f"{length['reference']:.1f}"))
    if score := figures.get("score"):
        prompts = score["num_prompts"]
        rows.append(
            (
                f"{score['name']} score of samples ({prompts} prompts x {score['samples_per_prompt']})",
                with_interval(score["policy"], score["policy_interval"], ".3f", prompts),
                with_interval(score["reference"], score["reference_interval"], ".3f", prompts),
            )
        )
        difference = with_interval(score["difference"], score["interval"], "+.3f", prompts)
        rows.append((f"{score['name']} score, difference", difference, ""))
    return rows


def figures_table(figures: Mapping[str, Any]) -> Table:
    """The rows as a rich table."""
    table = Table("held out", "policy", "reference")
    for row in figure_rows(figures):
        table.add_row(*row)
    return table


def with_interval(value: float, interval: Sequence[float] | None, spec: str, prompts: int) -> str:
    """A figure, its interval, and a word where it rests on few prompts; without spread there is no interval."""
    ends = "(no interval: all alike)" if interval is None else f"[{interval[0]:{spec}}, {interval[1]:{spec}}]"
    return f"{value:{spec}} {ends}{few(prompts)}"


def few(prompts: int) -> str:
    """What is said beside a figure of less than 30 prompts."""
    return "" if prompts >= FEW else f", few: {prompts} prompt{'s' * (prompts != 1)}"


def rendered(package: str, template: str, **values: Any) -> Markup:
    """A template of a package, filled in; values are escaped, but for Markup."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = files(package).joinpath(template).read_text("utf-8")
    return Markup(environment.from_string(text).render(**values))
