"""What can be seen of one answer by itself: refusal, language, JSON, lists, headers, code; and what a prompt asks for.

In: texts. Out: truth values; a count of nothing else. Pure, but for the identifier of languages. Next: calls.py.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from favor.data.formats import RowError
from favor.data.formats.fields import shown
from favor.data.readers import parse
from favor.data.schema import holds
from favor.data.types import Text

_APOSTROPHES = dict.fromkeys(map(ord, "\u2019\u2018\u02bc\u2032\u00b4`"), "'")
_CANNOT = ("i can't", "i cannot", "i can not", "i'm unable to", "i am unable to", "i'm not able to", "i am not able to")
_WILL_NOT = ("i won't", "i will not", "i must decline to", "i have to decline to", "i'm not going to")
_DO = (
    *("help", "assist", "provide", "answer", "comply", "fulfil", "do that", "do this", "engage", "support", "create"),
    *("generate", "write", "give", "discuss", "share", "offer", "participate", "continue", "be able to", "respond"),
)
# how a refusal begins; docs/diff.md shows them
REFUSALS = (
    *(
        "i'm sorry, but",
        "i'm sorry but",
        "i am sorry, but",
        "i am sorry but",
        "sorry, but",
        "sorry but",
        "sorry, i can",
    ),
    *("i'm sorry, i can", "i'm sorry, i am unable", "i'm sorry, i'm unable", "i apologize, but", "i apologise, but"),
    *("my apologies, but", "unfortunately, i can", "unfortunately, i'm unable", "unfortunately, i am unable"),
    *("i'm afraid i can", "i am afraid i can", "i must decline", "i have to decline", "i do not feel comfortable"),
    *(
        "i don't feel comfortable",
        "i'm not comfortable",
        "as an ai",
        "as a language model",
        "as a large language model",
    ),
    *(f"{start} {verb}" for start in (*_CANNOT, *_WILL_NOT) for verb in _DO),
)
# opening and closing of a block of code: marks, what they say
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_ITEM = re.compile(r"\s*(?:[-*+\u2022]|\d{1,3}[.)])\s+\S")
_HEADER = re.compile(r" {0,3}#{1,6}\s+\S")
_WHOLE_FENCE = re.compile(r"(`{3,}|~{3,})[^\n]*\n(.*)\n\1\s*", re.DOTALL)
_ASKS_JSON = re.compile(
    r"\b(?:in|as|valid|only|return|output|produce|using)\b[^.\n]{0,40}\bjson\b|\bjson (?:object|array|format)\b", re.I
)
# letters from which a script is sure
_LETTERS = 4


class Wanted(NamedTuple):
    """What a row asks of its answer: whether JSON, and of which schema; which tools there are."""

    json: bool
    schema: Any
    tools: tuple[dict[str, Any], ...] | None


def wanted(row: Mapping[str, Any], prompt: Text, tools: tuple[dict[str, Any], ...] | None) -> Wanted:
    """By the column response_format (as chat APIs have it), else by the words of the last turn. Raises RowError."""
    given = row.get("response_format")
    if given is None:
        return Wanted(bool(_ASKS_JSON.search(last_turn(prompt))), None, tools)
    kind = given.get("type") if isinstance(given, dict) else given
    if kind not in ("text", "json", "json_object", "json_schema"):
        raise RowError(f"response_format is {shown(given)}, expected text, json, json_object or json_schema")
    inner = given.get("json_schema") if isinstance(given, dict) else None
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if kind == "json_schema" and not isinstance(schema, dict):
        raise RowError("response_format is a json_schema without json_schema.schema, an object")
    return Wanted(kind != "text", schema, tools)


def last_turn(prompt: Text) -> str:
    """What was said last before the answer."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")


def starts(phrases: Sequence[str]) -> tuple[str, ...]:
    """Phrases as `refuses` compares them."""
    return tuple(_plain(phrase) for phrase in phrases)


def refuses(text: str, phrases: Sequence[str]) -> bool:
    """Whether an answer begins with one of the phrases: case, kinds of apostrophes and what is no letter before them apart."""
    return re.sub(r"^[\W_]+", "", _plain(text)).startswith(tuple(phrases))


def _plain(text: str) -> str:
    return " ".join(text.translate(_APOSTROPHES).casefold().split())


def script_of(text: str) -> str:
    """The script of most of its letters, by Unicode's names (LATIN, CYRILLIC, CJK, ...; kana: KANA); "" of few or many."""
    names = Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    total, kana = sum(names.values()), names["HIRAGANA"] + names["KATAKANA"]
    # Japanese has both
    if 10 * kana > kana + names["CJK"]:
        names["KANA"] = kana + names.pop("CJK", 0)
    if total < _LETTERS:
        return ""
    name, count = names.most_common(1)[0]
    return name if 2 * count > total else ""


def elsewhere(prompt: str, answer: str, language: Callable[[str], str]) -> bool:
    """Whether script or language of an answer are surely others than those of its prompt."""
    return any(
        bool(first and second and first != second)
        for first, second in ((of(prompt), of(answer)) for of in (script_of, language))
    )


class Written(NamedTuple):
    """The form of an answer: a list of two items or more, a header, a block of code, one that is not closed."""

    lists: bool
    headers: bool
    code: bool
    open_fence: bool


def written(text: str) -> Written:
    """Markdown as CommonMark reads it; what stands in a block of code is neither list nor header."""
    fence, blocks, outside = "", 0, list[str]()
    for line in text.splitlines():
        found = _FENCE.match(line)
        if fence:
            closes = found is not None and found[1].startswith(fence) and not found[2].strip()
            fence = "" if closes else fence
        elif found is not None and not (found[1][0] == "`" and "`" in found[2]):
            fence, blocks = found[1], blocks + 1
        else:
            outside.append(line)
    items = sum(_ITEM.match(line) is not None for line in outside)
    return Written(items >= 2, any(map(_HEADER.match, outside)), blocks > 0, bool(fence))


def is_json(text: str, schema: Any = None) -> bool:
    """Whether an answer is JSON and nothing else, or one block of code with it; where a schema is given, of that."""
    text = text.strip()
    found = _WHOLE_FENCE.fullmatch(text)
    try:
        return holds(parse(found[2] if found else text), schema)
    except ValueError:
        return False
