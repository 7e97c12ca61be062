"""THE table of formats: the columns of each, who reads them and what its rows can say; and which format a row has.

In: the columns of a row. Out: a Format, whose call makes the row's Judgment; what to try for a row of no known format.
docs/formats.md shows a row of each. Next: ../read.py.
"""

import difflib
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any, NamedTuple

from favor.data.formats import lists, pairs
from favor.data.formats.fields import TOO_DEEP, Judgment, RowError, brief, check_unicode, strings


class Format(NamedTuple):
    """A format needs all columns of `needs` and, where there are any, one of `either`; `more` are read too.

    compared: its rows compare responses. scored: they may say how far apart two are. voted: they may hold votes.
    """

    read: Callable[[dict[str, Any]], Judgment]
    needs: frozenset[str]
    either: frozenset[str] = frozenset()
    more: frozenset[str] = frozenset()
    compared: bool = True
    scored: bool = False
    voted: bool = False

    def __call__(self, row: dict[str, Any]) -> Judgment:
        """What a row says. Raises RowError, also for what is not text in whatever it takes from the row."""
        try:
            judgment = self.read(row)
        except RecursionError:
            raise RowError(TOO_DEEP) from None
        for text in strings((judgment.prompt, judgment.responses, judgment.tools)):
            check_unicode(text)
        return judgment

    @property
    def columns(self) -> frozenset[str]:
        """Every column that it reads."""
        return self.needs | self.either | self.more

    def fits(self, columns: Set[str]) -> bool:
        """Whether a row with these columns can be of this format."""
        return self.needs <= columns and (not self.either or bool(self.either & columns))

    def __str__(self) -> str:
        either = [" or ".join(sorted(self.either))] if self.either else []
        return " + ".join([*sorted(self.needs, key=_rank), *either])


def _rank(column: str) -> tuple[int, str]:
    return (0 if column in ("prompt", "instruction", "history", "context") else 1, column)


def _row(read: Callable[[dict[str, Any]], Judgment], columns: str, says: str = "compared") -> Format:
    """columns: "needs / either / more", the last two may be left out; says: what rows of it can say."""
    needs, either, more = (frozenset(part.split()) for part in f"{columns} / /".split("/")[:3])
    facts = says.split()
    return Format(
        read,
        needs,
        either,
        more | ({"weight"} if read is not pairs.sft else set()),
        "compared" in facts,
        "scored" in facts,
        "voted" in facts,
    )


# the first that fits is the format: what has more columns of its own stands before what has fewer
FORMATS: dict[str, Format] = {
    "openai_preference": _row(pairs.openai_preference, "input preferred_output non_preferred_output"),
    "shp": _row(pairs.shp, "history human_ref_A human_ref_B labels / / score_A score_B score_ratio", "compared scored"),
    "helpsteer3": _row(pairs.helpsteer3, "context response1 response2 overall_preference", "compared scored"),
    "helpsteer2_preference": _row(
        pairs.helpsteer2_preference, "prompt response_1 response_2 preference_strength", "compared scored"
    ),
    "openai_tldr": _row(pairs.openai_tldr, "info summaries choice"),
    "nectar": _row(lists.nectar, "prompt answers"),
    "ultrafeedback": _row(lists.ultrafeedback, "instruction completions", "compared scored"),
    "sharegpt": _row(lists.sharegpt, "conversations / / chosen rejected kto_tag system tools"),
    "alpaca": _row(lists.alpaca, "instruction / output chosen / input rejected kto_tag system history tools"),
    "ultrafeedback_binarized": _row(
        pairs.ultrafeedback_binarized, "chosen rejected score_chosen score_rejected / / prompt tools", "compared scored"
    ),
    "helpsteer": _row(lists.helpsteer, "prompt response helpfulness", "compared scored"),
    "verdict": _row(lists.verdict, "first second verdict / / prompt tools", "compared voted"),
    "votes": _row(lists.votes, "prompt responses / votes choices / tools", "compared scored voted"),
    "ranked": _row(lists.ranked, "responses / ranking scores / prompt ended tools", "compared scored"),
    "pairs": _row(pairs.pairs, "chosen rejected / / prompt margin tie tools", "compared scored"),
    "thumbs": _row(pairs.thumbs, "label / completion response messages / prompt tools", ""),
    "sft": _row(pairs.sft, " / messages completion response / prompt tools", ""),
}
_PLAIN = (
    "expected prompt + chosen + rejected, chosen + rejected, prompt + responses + ranking or scores, prompt + completion, "
    "messages, or the columns of "
)


def columns_of(name: str) -> frozenset[str]:
    """Every column that a format reads; of "auto", that any reads."""
    return FORMATS[name].columns if name in FORMATS else frozenset[str]().union(*(f.columns for f in FORMATS.values()))


def recognise(row: Mapping[str, Any]) -> str:
    """The format a row's columns belong to. Raises RowError, naming the columns found and the formats known."""
    columns = {name for name in row if row[name] is not None}
    for name, known in FORMATS.items():
        if known.fits(columns) and (name != "sft" or "messages" in columns or "prompt" in columns):
            return name
    special = ", ".join(name for name in FORMATS if name not in ("pairs", "ranked", "sft"))
    raise RowError(
        f"its columns ({', '.join(sorted(columns)) or 'none'}) are of no known format; {_PLAIN}{special}"
        f"{_nearest(columns)}; data.columns maps columns of other names. The row: {_short(row)}{suggested(row)}"
    )


def order_assumed(row: Mapping[str, Any], name: str) -> bool:
    """Whether a format takes a list for a ranking that the row does not call one."""
    return name == "alpaca" and isinstance(row.get("output"), list)


def check_order(row: Mapping[str, Any], name: str) -> None:
    """Raises RowError for a row whose order of preference the recognised format would only assume."""
    if order_assumed(row, name):
        raise RowError(
            "output is a list, which may be a ranking, best first, or samples in no order; if every list is a ranking, say "
            "data.format=alpaca"
        )


def _short(row: Mapping[str, Any]) -> str:
    """A row for a message: its columns with the beginning of their values."""
    return ", ".join(f"{name} = {brief(value, 30)}" for name, value in [*row.items()][:12])


def suggested(row: Mapping[str, Any]) -> str:
    """A line to try for a row of no known format, from the names and kinds of its columns; "" without any idea."""
    texts = [name for name, value in row.items() if isinstance(value, str | list | dict) and value]
    found: dict[str, str] = {}
    for ours, words in _WORDS.items():
        free = [name for name in texts if name not in found.values()]
        like = next((name for word in words for name in free if word in name.lower()), None)
        if like is not None:
            found[ours] = like
    prompt = {ours: name for ours, name in found.items() if ours == "prompt"}
    if "chosen" in found and "rejected" in found:
        return _line(prompt | {ours: found[ours] for ours in ("chosen", "rejected")})
    if two := _two_alike([name for name in texts if name not in prompt.values()]):
        judged = next((name for word in _JUDGED for name in row if word in name.lower() and name not in two), "VERDICT")
        value = json.dumps(row.get(judged, "A"), ensure_ascii=False, default=str)
        values = f"values={{first=[{value}], second=[...]}}"
        shown = (
            f"data.verdict={{first={_quoted(two[0])}, second={_quoted(two[1])}, column={_quoted(judged)}, {values}}}"
        )
        mapped = (
            f" and 'data.columns={{prompt={_quoted(prompt['prompt'])}}}'"
            if prompt.get("prompt", "prompt") != "prompt"
            else ""
        )
        return f"; to try, if that is what they mean: '{shown}'{mapped}"
    return _line(prompt | {"completion": found["completion"]}) if prompt and "completion" in found else ""


def _two_alike(names: Sequence[str]) -> tuple[str, str] | None:
    """Two columns whose names differ in one letter or digit: response_a and response_b."""
    for first, second in itertools.combinations(names, 2):
        if len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) == 1:
            return first, second
    return None


def _line(columns: Mapping[str, str]) -> str:
    inside = ", ".join(f"{ours}={_quoted(name)}" for ours, name in columns.items() if ours != name)
    return f"; to try, if that is what they mean: 'data.columns={{{inside}}}'" if inside else ""


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


# words in the names of columns, by what such columns mostly mean
_WORDS = {
    "rejected": ("reject", "dispref", "non_pref", "lose", "losing", "worse", "worst", "negative", "bad"),
    "chosen": ("chosen", "prefer", "winn", "accept", "better", "best", "positive", "good"),
    "prompt": ("prompt", "question", "instruction", "query", "problem", "input", "post", "context", "user", "text"),
    "completion": ("completion", "response", "answer", "output", "reply", "target", "summary"),
}
_JUDGED = ("winner", "verdict", "preference", "preferred", "label", "choice", "better", "judg", "vote", "rating")


def _nearest(columns: Set[str]) -> str:
    """The format that lacks least, columns of nearly the right name counting."""

    def near(known: Format) -> float:
        wanted = [*known.needs, *sorted(known.either)[:1]]
        return _covered(wanted, columns) + _covered(columns, known.columns)

    name = max(FORMATS, key=lambda name: near(FORMATS[name]))
    return f"; the nearest is {name} ({FORMATS[name]})" if near(FORMATS[name]) >= 0.75 else ""


def _covered(wanted: Collection[str], given: Collection[str]) -> float:
    """The share of the wanted names that are given, nearly equal ones counting in part."""
    return sum(max((_alike(want, name) for name in given), default=0.0) for want in wanted) / max(1, len(wanted))


def _alike(a: str, b: str) -> float:
    ratio = difflib.SequenceMatcher(None, a, b).ratio()
    return ratio if ratio >= 0.6 else 0.0
