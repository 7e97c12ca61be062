"""Held-out figures as rows of text, for the terminal and the page alike.

In: the content of eval.json. Out: (name, policy, reference) rows, and a rich table. Next: page.py.
"""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

Row = tuple[str, str, str]


def figure_rows(figures: Mapping[str, Any]) -> list[Row]:
    """One row per figure: (what, policy, reference); intervals are 95 % bootstrap intervals over prompts."""
    rows: list[Row] = []
    if "accuracy" in figures:
        rows.append(
            (
                f"preference accuracy ({figures['pairs']} held-out pairs)",
                _with_interval(figures["accuracy"], figures["accuracy_interval"], ".3f"),
                _with_interval(figures["reference_accuracy"], figures["reference_accuracy_interval"], ".3f"),
            )
        )
        rows.append(
            ("implicit reward margin", _with_interval(figures["margin"], figures["margin_interval"], "+.3f"), "0")
        )
        rows.append(("held-out DPO loss (nats a pair)", f"{figures['loss']:.4f}", "0.6931"))
    if calibration := figures.get("calibration"):
        rows.append(
            (
                f"reward accuracy ({calibration['pairs']} held-out pairs)",
                _with_interval(calibration["accuracy"], calibration["accuracy_interval"], ".3f"),
                "",
            )
        )
        rows.append(("Bradley-Terry loss (nats a pair); ln 2 knows nothing", f"{calibration['loss']:.4f}", "0.6931"))
        rows.append(("calibration error (ECE)", f"{calibration['ece']:.3f}", ""))
    if kl := figures.get("kl"):
        text = f"{kl['mean']:.2f} ± {kl['se']:.2f}"
        rows.append((f"KL(policy || reference), nats ({kl['num_samples']} samples, ± s.e.)", text, "0"))
    if length := figures.get("length"):
        rows.append(("mean length of samples, tokens", f"{length['policy']:.1f}", f"{length['reference']:.1f}"))
    if score := figures.get("score"):
        rows.append(
            (
                f"{score['name']} score of samples ({score['num_prompts']} prompts x {score['samples_per_prompt']})",
                _with_interval(score["policy"], score["policy_interval"], ".3f"),
                _with_interval(score["reference"], score["reference_interval"], ".3f"),
            )
        )
        rows.append(
            (f"{score['name']} score, difference", _with_interval(score["difference"], score["interval"], "+.3f"), "")
        )
    return rows


def figures_table(figures: Mapping[str, Any]) -> Table:
    """The rows as a rich table."""
    table = Table("held out", "policy", "reference")
    for row in figure_rows(figures):
        table.add_row(*row)
    return table


def _with_interval(value: float, interval: list[float], spec: str) -> str:
    return f"{value:{spec}} [{interval[0]:{spec}}, {interval[1]:{spec}}]"
