"""THE table of formats: recognition, reading, settings, lint and docs/formats.md take what they know of a format from it.

To add a format: write its reader (plain.py, published.py), one row here above every row whose columns are among its own,
and a section with an example in docs/formats.md. In: a row. Out: its format, whose call reads it. Next: fields.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

from favor.data.formats import fields, plain, published
from favor.data.formats.columns import unknown
from favor.data.formats.fields import Format, Judgment, Row, RowError


def _row(
    reader: Callable[[Row], Judgment], needs: str, also: str = "weight", says: str = "order", list_of: str = ""
) -> Format:
    alternatives = tuple(tuple(names.split()) for names in needs.split("|"))
    return Format(reader, alternatives, frozenset(also.split()), frozenset(says.split()), list_of)


# reader; columns it is recognised by, alternatives split by "|"; columns read beside them; what its rows can say (Format
# explains the words). The first row that fits is the format.
FORMATS: dict[str, Format] = {
    "openai_preference": _row(published.openai_preference, "input preferred_output non_preferred_output"),
    "shp": _row(
        published.shp,
        "history human_ref_A human_ref_B labels",
        "score_A score_B score_ratio weight",
        "order scores sides",
    ),
    "helpsteer3": _row(
        published.helpsteer3, "context response1 response2 overall_preference", says="order scores sides"
    ),
    "helpsteer2_preference": _row(
        published.helpsteer2_preference, "prompt response_1 response_2 preference_strength", says="order scores sides"
    ),
    "openai_tldr": _row(published.openai_tldr, "info summaries choice", says="order sides"),
    "nectar": _row(published.nectar, "prompt answers"),
    "ultrafeedback": _row(published.ultrafeedback, "instruction completions", says="order scores"),
    "sharegpt": _row(
        published.sharegpt, "conversations", "chosen rejected kto_tag system tools weight", "order thumbs"
    ),
    "alpaca": _row(
        published.alpaca,
        "instruction output | instruction chosen",
        "input rejected kto_tag system history tools weight",
        "order thumbs",
        list_of="output",
    ),
    "ultrafeedback_binarized": _row(
        published.binarized, "chosen rejected score_chosen score_rejected", "prompt tools weight", "order scores"
    ),
    "helpsteer": _row(published.helpsteer, "prompt response helpfulness", says="order scores"),
    "verdict": _row(plain.verdict, "first second verdict", "ended prompt tools weight", "order votes sides thumbs"),
    "votes": _row(
        plain.votes, "prompt responses votes|prompt responses choices", "ended tools weight", "order scores votes sides"
    ),
    "ranked": _row(
        plain.ranked, "responses ranking | responses scores", "prompt ended tools weight", "order scores sides"
    ),
    "pairs": _row(fields.pairs, "chosen rejected", "prompt margin tie tools weight", "order scores"),
    "thumbs": _row(plain.thumbs, "label completion | label response | label messages", "prompt tools weight", "thumbs"),
    "sft": _row(plain.sft, "messages | prompt completion | prompt response", "tools", ""),
}


def columns_of(name: str) -> frozenset[str]:
    """Every column that a format reads; of "auto", that any reads."""
    return FORMATS[name].columns if name in FORMATS else frozenset[str]().union(*(f.columns for f in FORMATS.values()))


def recognise(row: Mapping[str, Any]) -> str:
    """The format a row's columns belong to. Raises RowError, naming the columns found and the formats known."""
    columns = {name for name in row if row[name] is not None}
    for name, known in FORMATS.items():
        if any(columns.issuperset(names) for names in known.needs):
            return name
    raise unknown(row, columns, FORMATS)


def order_assumed(row: Mapping[str, Any], name: str) -> bool:
    """Whether a format takes a list for a ranking that the row does not call one."""
    column = FORMATS[name].list_of
    return column != "" and isinstance(row.get(column), list)


def check_order(row: Mapping[str, Any], name: str) -> None:
    """Raises RowError for a row whose order of preference the recognised format would only assume."""
    if order_assumed(row, name):
        raise RowError(
            f"{FORMATS[name].list_of} is a list, which may be a ranking, best first, or samples in no order; if every list "
            f"is a ranking, say data.format={name}"
        )
