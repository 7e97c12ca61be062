"""The figures of winrate.json as rows of text, for the terminal and the page alike.

In: the content of winrate.json. Out: (name, value) rows, and a rich table. Next: page.py.
"""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from favor.report.table import with_interval


def winrate_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One row per figure: (what, value); intervals are 95 %, over prompts."""
    f = figures
    counts = f"{f['wins']} / {f['ties']} / {f['losses']} of {f['pairs']} pairs, {f['prompts']} prompts"
    rows = [
        ("win rate of a over b", with_interval(f["win_rate"], f["win_rate_interval"], ".3f", f["prompts"])),
        ("  at equal lengths", _where_known(f, "lc_win_rate", ".3f")),
        ("wins / ties / losses of a", counts),
        ("both orders agree", f"{f['consistency']:.3f} of the pairs"),
        ("position bias (0: none, +0.5: always the first)", _where_known(f, "position_bias", "+.3f")),
        (f"mean length ({f['length_unit']})", f"a {f['mean_length_a']:.0f}, b {f['mean_length_b']:.0f}"),
        ("a is the longer one", f"{f['longer_a']:.3f} of the pairs"),
    ]
    if f["invalid"]:
        rows.append(
            ("left out: a verdict could not be read", f"{f['invalid']} pairs ({f['invalid_verdicts']} verdicts)")
        )
    rows += [(f"left out: {name.replace('_', ' ')}", str(count)) for name, count in f["left_out"].items() if count]
    return [*rows, ("a", str(f["a"])), ("b", str(f["b"])), ("judge", str(f["judge"]))]


def winrate_table(figures: Mapping[str, Any]) -> Table:
    """The rows as a rich table."""
    table = Table("a against b", "")
    for row in winrate_rows(figures):
        table.add_row(*row)
    return table


def _where_known(figures: Mapping[str, Any], name: str, spec: str) -> str:
    if figures[name] is None:
        return "not available"
    return with_interval(figures[name], figures[f"{name}_interval"], spec, figures["prompts"])
