"""A corpus of bad data sources, and what each must lead to; bad_sources.py runs the commands over it.

A source is bad rows among good ones, or a file that cannot be read at all. What is right for it is written down beside
it, by hand, so that nothing of favor decides what favor should do.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = Path(__file__).parent / "data/formats"
GOOD = {"prompt": "Film {}?", "chosen": "good {}", "rejected": "bad {}"}


class Source(NamedTuple):
    """data: what data.train is set to. good: row -> (prompt, responses, best first); None: not looked at.

    bad: row -> what its reason must say. late: the same of rows that only the tokenizer refuses. refused: what the message
    must say where the source cannot be read at all. more: further settings. during: (file, what happens to it just
    before it is opened). compares: whether the good rows hold a comparison to train on.
    """

    data: Path | str
    good: Mapping[int, tuple[str, tuple[str, ...]] | None] = {}
    bad: Mapping[int, str] = {}
    late: Mapping[int, str] = {}
    refused: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    during: tuple[Path, Callable[[], None]] | None = None
    compares: bool = True


Case = Callable[[Path], Source]


def good(number: int, **more: Any) -> dict[str, Any]:
    """A good row; no two of different numbers share anything."""
    return {name: text.format(number) for name, text in GOOD.items()} | more


def line(number: int, **more: Any) -> bytes:
    return json.dumps(good(number, **more)).encode()


def said(number: int) -> tuple[str, tuple[str, ...]]:
    row = good(number)
    return row["prompt"], (row["chosen"], row["rejected"])


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content)
    return path


def expected(parts: "list[Any]") -> dict[str, Any]:
    """What rows lead to: a number is a good row, (bytes, number) is the good row of that number, (bytes, text) a bad one."""
    where = list(enumerate(parts, 1))
    plain = {at: part for at, part in where if isinstance(part, int)}
    told = {at: part[1] for at, part in where if isinstance(part, tuple)}
    numbers = plain | {at: number for at, number in told.items() if isinstance(number, int)}
    bad = {at: reason for at, reason in told.items() if isinstance(reason, str)}
    return {"good": {at: said(number) for at, number in numbers.items()}, "bad": bad}


def texts(parts: "list[Any]") -> list[bytes]:
    return [line(p) if isinstance(p, int) else p if isinstance(p, bytes) else p[0] for p in parts]


def jsonl(*parts: Any, name: str = "x.jsonl", pack: Callable[[bytes], bytes] = bytes, end: bytes = b"\n") -> Case:
    """Lines; bytes alone are lines that are no rows."""
    content = pack(b"".join(text + end for text in texts(list(parts))))
    return lambda here: Source(write(here / name, content), **expected(list(parts)))


def array(*parts: Any) -> Case:
    """The same values as one list in a .json file."""
    content = b"[" + b",\n ".join(texts(list(parts))) + b"]\n"
    return lambda here: Source(write(here / "x.json", content), **expected(list(parts)))


def whole(name: str, content: bytes, *refused: str) -> Case:
    """A file that cannot be read at all."""
    return lambda here: Source(write(here / name, content), refused=(name, *refused))


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * depth + closing * depth


def column(number: int, text: bytes, name: bytes = b"extra") -> bytes:
    """A good row with one more column, as JSON text."""
    return line(number)[:-1] + b', "' + name + b'": ' + text + b"}"


def instead(name: str, text: bytes) -> bytes:
    """A good row with JSON text in place of one column."""
    return (
        b"{"
        + b", ".join(
            json.dumps(k).encode() + b": " + (text if k == name else json.dumps(v).encode()) for k, v in good(9).items()
        )
        + b"}"
    )


HALF, HUGE, TIE = "half a character", "digits", "nested"
# valid JSON texts (or nearly), in a file of lines and in a list
VALUES: dict[str, list[Any]] = {
    **{f"lone surrogate in {name}": [1, (instead(name, b'"a \\ud800 b"'), HALF), 3] for name in GOOD},
    "lone low surrogate": [1, (instead("chosen", b'"\\uDC00"'), HALF), 3],
    "surrogates the wrong way round": [1, (instead("chosen", b'"\\ude00\\ud83d"'), HALF), 3],
    "a pair of surrogates is a character": [1, (instead("prompt", b'"Film 9?"')[:-1] + b', "x": "\\ud83d\\ude00"}', 9)],
    "lone surrogate in a role": [1, (instead("prompt", b'[{"role": "\\ud800", "content": "x"}]'), HALF)],
    "lone surrogate in a turn": [1, (instead("prompt", b'[{"role": "user", "content": "\\udfff"}]'), HALF)],
    "lone surrogate in tools": [1, (column(9, b'[{"name": "\\ud800"}]', b"tools"), HALF)],
    "lone surrogate in tools as text": [1, (column(9, b'"[{\\"name\\": \\"\\\\ud800\\"}]"', b"tools"), HALF)],
    "lone surrogate in a column's name": [1, (column(9, b"1", b"\\ud800"), HALF)],
    "lone surrogate in a column that nobody reads": [1, (column(9, b'"\\ud800"'), HALF)],
    "escaped NUL in a text nobody reads": [1, (column(9, b'"\\u0000"'), 9)],
    "NaN in a column that nobody reads": [1, (column(9, b"NaN"), 9), 3],
    "NaN as margin": [1, (column(9, b"NaN", b"margin"), "margin is nan"), 3],
    "Infinity as weight": [1, (column(9, b"Infinity", b"weight"), "weight is inf"), 3],
    "minus Infinity as weight": [1, (column(9, b"-Infinity", b"weight"), "weight is -inf"), 3],
    "1e400 as margin": [1, (column(9, b"1e400", b"margin"), "margin is inf"), 3],
    "a field twice": [1, (column(9, b'"other"', b"chosen"), "twice"), 3],
    "a field twice inside": [1, (column(9, b'{"a": 1, "a": 2}'), "twice"), 3],
    "nesting of 1,000 in a column that nobody reads": [1, (column(9, nested(1000)), TIE), 3],
    "nesting of 1,000 objects": [1, (column(9, nested(1000, b'{"a":', b"}").replace(b":}", b":1}", 1)), TIE), 3],
    "nesting of 900": [1, (column(9, nested(900)), TIE), 3],
    "nesting of 200": [1, (column(9, nested(200)), TIE), 3],
    "nesting of 1,000 as prompt": [1, (instead("prompt", nested(1000)), TIE), 3],
    "nesting of 1,000 in a turn": [
        1,
        (instead("prompt", b'[{"role": "user", "content": ' + nested(1000) + b"}]"), TIE),
    ],
    "nesting of 1,000 in tools as text": [1, (column(9, b'"' + nested(1000) + b'"', b"tools"), TIE)],
    "5,000 digits as margin": [1, (column(9, b"9" * 5000, b"margin"), HUGE), 3],
    "5,000 digits in a column that nobody reads": [1, (column(9, b"9" * 5000), HUGE), 3],
    "minus 5,000 digits": [1, (column(9, b"-" + b"9" * 5000), HUGE), 3],
    "400 digits as weight": [1, (column(9, b"9" * 400, b"weight"), HUGE), 3],
    "5,000 digits in tools as text": [1, (column(9, b'"[{\\"a\\": ' + b"9" * 5000 + b'}]"', b"tools"), HUGE)],
    "many brackets in a text": [1, (column(9, json.dumps("[{" * 3000).encode()), 9)],
    "null as row": [1, (b"null", "object"), 3],
    "numbers as rows": [1, (b"7", "object"), (b"-1.5e3", "object"), 4],
    "texts as rows": [(b'"a"', "object"), 2, (b'""', "object")],
    "lists as rows": [1, (b"[]", "object"), (b'["Film 9?", "good 9", "bad 9"]', "object")],
    "true as row": [1, (b"true", "object")],
    "an empty object": [1, (b"{}", "missing"), 3],
    "empty column name": [1, (column(9, b"1", b""), 9)],
    "a column with a line break in its name": [(b'{"a\\nb": 1, "c\\u001b[31m": 2}', "columns"), 2],
    "a long column name": [1, (column(9, b"1", b"n" * 5000), 9)],
    "a missing side": [1, (b'{"prompt": "x", "chosen": "y"}', "'rejected' is missing"), 3],
    "a missing prompt": [1, (b'{"chosen": "y", "rejected": "z"}', "no prompt"), 3],
    "rows of another format": [1, (b'{"prompt": "x", "responses": ["a", "b"], "ranking": [0, 1]}', "missing"), 3],
    "only nulls": [1, (b'{"prompt": null, "chosen": null, "rejected": null}', "missing"), 3],
    "only bad rows": [(b"{}", "columns (none)"), (b"[]", "object"), (b"1", "object")],
    "the first row is bad": [(b'{"q": "x"}', "columns (q)"), 2, 3],
    "turns without roles": [1, (instead("prompt", b'["a", "b"]'), "role"), 3],
    "a turn with a number": [1, (instead("prompt", b'[{"role": "user", "content": 7}]'), "content"), 3],
    "a turn with null": [1, (instead("prompt", b'[{"role": "user", "content": null}]'), "content"), 3],
    "a role that is a list": [1, (instead("prompt", b'[{"role": [], "content": "x"}]'), "role"), 3],
}
# lines that no .json file could hold
LINES: dict[str, list[Any]] = {
    "torn last line": [1, 2, (b'{"prompt": "x", "cho', "not JSON")],
    "torn line in the middle": [1, (b'{"prompt": "x",', "not JSON"), 3],
    "torn in a character": [1, ('{"prompt": "é'.encode()[:-1], "UTF-8"), 3],
    "torn in an escape": [1, (b'{"prompt": "\\u00', "not JSON"), 3],
    "two objects on one line": [1, (line(8) + line(9), "not JSON"), 3],
    "two objects with a comma": [1, (line(8) + b", " + line(9), "not JSON"), 3],
    "a comma too many": [1, (line(9)[:-1] + b",}", "not JSON"), 3],
    "a comma after the row": [1, (line(9) + b",", "not JSON"), 3],
    "a list over lines": [(b"[", "not JSON"), (line(8) + b",", "not JSON"), 3, (b"]", "not JSON")],
    "an object over lines": [(b"{", "not JSON"), (b'"prompt": "x"', "not JSON"), (b"}", "not JSON"), 4],
    "single quotes": [1, (b"{'prompt': 'x'}", "not JSON"), 3],
    "a comment": [(b"// rows", "not JSON"), 2, (b"# rows", "not JSON")],
    "plain text": [(b"prompt,chosen,rejected", "not JSON"), 2],
    "a tab inside a text": [1, (b'{"prompt": "a\tb"}', "not JSON"), 3],
    "NUL bytes": [1, (b'{"prompt": "a\x00b"}', "not JSON"), (b"\x00" * 40, "not JSON"), 4],
    "NUL bytes at the end": [1, 2, (b"\x00" * 4096, "not JSON")],
    "latin-1": [1, ('{"prompt": "é"}'.encode("latin-1"), "UTF-8"), 3],
    "surrogates as bytes": [1, ('{"prompt": "\ud800"}'.encode("utf-8", "surrogatepass"), "UTF-8"), 3],
    "overlong UTF-8": [1, (b'{"prompt": "\xc0\xaf"}', "UTF-8"), 3],
    "random bytes": [1, (bytes(range(128, 256)), "UTF-8"), (bytes(range(11, 128)), "not JSON"), 4],
    "a byte order mark": [(b"\xef\xbb\xbf" + line(1), 1), 2],
    "a byte order mark in the middle": [1, (b"\xef\xbb\xbf" + line(9), "not JSON"), 3],
    "a byte order mark alone": [(b"\xef\xbb\xbf", "not JSON"), 2],
    "UTF-16 without a mark": [(line(1).decode().encode("utf-16-le"), "not JSON")],
    "blanks that are not ASCII": [1, ("\u00a0\u3000".encode(), "not JSON"), 3],
    "empty lines": [b"", 2, b"  \t", b"\r", 5, b""],
    "half a number": [1, (b'{"prompt": 1.}', "not JSON"), (b"-", "not JSON"), (b"nul", "not JSON")],
    "nesting of 100,000": [1, (column(9, nested(100_000)), TIE), 3],
    "nesting of 100,000 without an end": [1, (b"[" * 100_000, TIE), 3],
    "nesting of 1,000 without an end": [1, (b"[" * 1000, ""), 3],
    "a line break character in a text": [1, ('{"prompt": "Film 9?", "chosen": "good 9", "rejected": "bad 9", "x": "\u2028"}'.encode(), 9), 3],
    "a line of 2 MB": [1, (column(9, json.dumps("word " * 400_000).encode()), 9), 3],
    "a line of 2 MB that is torn": [1, (b'{"prompt": "' + b"word " * 400_000, "not JSON"), 3],
}  # fmt: skip
TEXT_WRONG = [None, True, 7, [], {}, [1], [[]], {"a": {"b": None}}, " "]
NUMBER_WRONG = [None, True, "x", [], {}, float("nan"), float("inf"), [1]]
NUMBERS = {
    "labels",
    "overall_preference",
    "preference_strength",
    "score_chosen",
    "score_rejected",
    "helpfulness",
    "choice",
}
OPTIONAL = {
    "weight": [True, "1", [], {}, float("nan"), 0, -1],
    "margin": [True, "1", [], {}, float("nan"), -1],
    "tie": [7, "true", [], {}],
    "tools": [True, 7, "not json", {"a": 1}, [1], ["x"]],
    "ended": [True, 7, "x", [], [1, 1]],
    "system": [True, 7, [], {}],
    "input": [True, 7, [], {}],
    "history": [True, 7, "x", {}, [["a"]], [["a", 1]]],
    "kto_tag": [7, "true", [], {}],
    "score_A": [True, "x", [], {}],
    "label": [7, "true", [], {}],
}
GOLD = {
    "pairs": "trl_standard", "pairs of turns": "trl_conversational", "transcripts": "anthropic_hh", "ranked": "ranked",
    "sft": "sft", "turns": "sft", "thumbs": "trl_unpaired", "votes": "votes", "choices": "votes_choices",
    "ultrafeedback": "ultrafeedback", "ultrafeedback_binarized": "ultrafeedback_binarized", "shp": "shp",
    "helpsteer": "helpsteer", "helpsteer2_preference": "helpsteer2_preference", "helpsteer3": "helpsteer3", "nectar": "nectar",
    "openai_tldr": "openai_tldr", "openai_preference": "openai_preference", "alpaca": "alpaca_pairs",
    "alpaca ranking": "alpaca_ranking", "alpaca thumbs": "kto_alpaca", "sharegpt": "sharegpt", "sharegpt thumbs": "kto_sharegpt",
}  # fmt: skip


def wrong_types(name: str) -> Case:
    """A published row, and beside it the same with every wrong value in every column that its format reads."""
    from favor.data import formats

    row = json.loads((FORMATS / f"{GOLD[name]}.jsonl").read_text("utf-8").splitlines()[name == "turns"])
    shape = formats.FORMATS[formats.recognise(row)]
    rows: list[tuple[dict[str, Any], str]] = []
    for key in sorted({key for names in shape.needs for key in names} & row.keys()):
        wrong = OPTIONAL["label"] if key == "label" else NUMBER_WRONG if key in NUMBERS else TEXT_WRONG
        rows += [(row | {key: value}, "") for value in wrong if (key, value) != ("choices", [1])]
    # a thumb is read where there is one answer
    unread = {"kto_tag"} if "chosen" in row or isinstance(row.get("output"), list) else set[str]()
    for key in sorted((shape.also & OPTIONAL.keys()) - unread):
        rows += [(row | {key: value}, "") for value in OPTIONAL[key]]

    def make(here: Path) -> Source:
        content = "".join(json.dumps(r) + "\n" for r in [row, *(r for r, _ in rows)])
        bad = {at: reason for at, (_, reason) in enumerate(rows, 2)}
        alone = name in ("sft", "turns", "thumbs", "helpsteer", "alpaca thumbs", "sharegpt thumbs")
        # whether a list is a ranking, only the recipe can say
        more = ("data.format=alpaca",) if name == "alpaca ranking" else ()
        return Source(write(here / "x.jsonl", content.encode()), good={1: None}, bad=bad, compares=not alone, more=more)

    return make


def table(here: Path, columns: Mapping[str, Any], name: str = "x.parquet") -> Path:
    import pyarrow
    import pyarrow.parquet

    here.mkdir(exist_ok=True, parents=True)
    made = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(dict(columns))
    pyarrow.parquet.write_table(made, here / name)
    return here / name


def parquet(change: Callable[[Any], Mapping[str, Any]], bad: Mapping[int, str], looked_at: bool = True) -> Case:
    """Good rows 1 to 3 as columns, with what `change` makes of them (it gets pyarrow)."""

    def make(here: Path) -> Source:
        import pyarrow

        columns = {name: [good(i)[name] for i in (1, 2, 3)] for name in GOOD} | dict(change(pyarrow))
        kept = {i: said(i) if looked_at else None for i in (1, 2, 3) if i not in bad}
        return Source(table(here, columns), good=kept, bad=bad)

    return make


def every(reason: str) -> dict[int, str]:
    return dict.fromkeys((1, 2, 3), reason)


def bad_utf8(pa: Any) -> Any:
    return pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"\0\0\0\0\x06\0\0\0\x08\0\0\0\x0e\0\0\0"), pa.py_buffer(b"good 1\xff\xfegood 3")],
    )


def turns(pa: Any, extra: Any) -> Any:
    return pa.array([[{"role": "user", "content": f"Film {i}?", "at": extra}] for i in (1, 2, 3)])


def dates(pa: Any) -> Any:
    return pa.array([0, 2**30, 1], pa.int32()).cast(pa.date32())


def decimals(pa: Any) -> Any:
    from decimal import Decimal

    return pa.array([Decimal("1.5")] * 3)


PARQUET: dict[str, Case] = {
    "binary prompts": parquet(lambda pa: {"prompt": pa.array([b"a", b"b", b"c"])}, every("prompt")),
    "decimal margins": parquet(lambda pa: {"margin": decimals(pa)}, {}),
    "decimals that nobody reads": parquet(lambda pa: {"x": decimals(pa)}, {}),
    "timestamps as prompts": parquet(lambda pa: {"prompt": pa.array([1, 2, 3], pa.timestamp("s"))}, {}, looked_at=False),
    "timestamps that nobody reads": parquet(lambda pa: {"x": pa.array([1, 2, None], pa.timestamp("us", "UTC"))}, {}),
    "nanoseconds that nobody reads": parquet(lambda pa: {"x": pa.array([1, 2, 1001], pa.timestamp("ns"))}, {}),
    "times, durations and maps that nobody reads": parquet(
        lambda pa: {
            "t": pa.array([1, 2, 3], pa.time64("us")),
            "d": pa.array([1, 2, 3], pa.duration("s")),
            "m": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
            "b": pa.array([b"\xff", b"", None]),
        },
        {},
    ),
    "a date beyond the calendar": parquet(lambda pa: {"x": dates(pa)}, {2: "x"}),
    "a timestamp beyond the calendar": parquet(lambda pa: {"x": pa.array([0, 2**60, 1], pa.timestamp("us"))}, {2: "x"}),
    "text that is not UTF-8": parquet(lambda pa: {"chosen": bad_utf8(pa)}, {2: "UTF-8"}),
    "a timestamp in a turn": parquet(lambda pa: {"prompt": turns(pa, __import__("datetime").datetime(2020, 1, 1))}, {}, looked_at=False),
    "bytes in a turn": parquet(lambda pa: {"prompt": turns(pa, b"x")}, every("bytes")),
    "nulls in a column": parquet(lambda pa: {"chosen": ["good 1", None, "good 3"]}, {2: "'chosen' is missing"}),
    "a column of nothing but nulls": parquet(lambda pa: {"chosen": pa.nulls(3)}, every("")),
    "lists with nulls": parquet(lambda pa: {"prompt": pa.array([[None], [None], [None]])}, every("prompt[0]")),
    "structs as text": parquet(lambda pa: {"chosen": pa.array([{"a": None}, {"a": 1}, {"a": 2}])}, every("chosen")),
    "NaN as weight": parquet(lambda pa: {"weight": [1.0, float("nan"), 1.0]}, {2: "weight is nan"}),
    "dictionary-encoded and large text": parquet(
        lambda pa: {
            "prompt": pa.array(["Film 1?", "Film 2?", "Film 3?"]).dictionary_encode(),
            "chosen": pa.array(["good 1", "good 2", "good 3"], pa.large_string()),
        },
        {},
    ),
}  # fmt: skip


def twin_columns(here: Path) -> Source:
    import pyarrow

    columns = [pyarrow.array([good(i)[name] for i in (1, 2)]) for name in (*GOOD, "chosen")]
    path = table(here, pyarrow.table(columns, names=[*GOOD, "chosen"]))
    return Source(path, refused=("x.parquet", "twice"))


def no_rows(here: Path) -> Source:
    return Source(table(here, {name: __import__("pyarrow").array([], "string") for name in GOOD}), refused=("no rows",))


def cut(make: Case, keep: float, *refused: str) -> Case:
    """The file of another case, cut."""

    def spoiled(here: Path) -> Source:
        path = Path(make(here).data)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        return Source(path, refused=(path.name, *refused))

    return spoiled


def overwritten(make: Case, at: float, *refused: str) -> Case:
    """The file of another case with garbage in it."""

    def spoiled(here: Path) -> Source:
        path = Path(make(here).data)
        content = bytearray(path.read_bytes())
        start = int(len(content) * at)
        content[start : start + 40] = b"\xff" * 40
        path.write_bytes(bytes(content))
        return Source(path, refused=(path.name, *refused))

    return spoiled


def two(here: Path) -> Path:
    """A folder of two files: good rows 1, 2 and 3, 4."""
    write(here / "d/a.jsonl", line(1) + b"\n" + line(2) + b"\n")
    write(here / "d/b.jsonl", line(3) + b"\n" + line(4) + b"\n")
    return here / "d"


FOUR = {i: said(i) for i in range(1, 5)}


def in_folder(name: str, content: bytes | None, pattern: str = "", **expect: Any) -> Case:
    """Two good files and one more, in a folder or behind a pattern."""

    def make(here: Path) -> Source:
        folder = two(here)
        if content is not None:
            write(folder / name, content)
        return Source(f"{folder}{pattern}", **expect)

    return make


def with_entry(add: Callable[[Path], object], pattern: str = "", **expect: Any) -> Case:
    """Two good files and whatever `add` puts beside them."""

    def make(here: Path) -> Source:
        folder = two(here)
        add(folder)
        return Source(f"{folder}{pattern}", **expect)

    return make


def alone(add: Callable[[Path], object], name: str, *refused: str) -> Case:
    """Something that is no file."""

    def make(here: Path) -> Source:
        add(here / name)
        return Source(here / name, refused=refused)

    return make


def named(name: str, **expect: Any) -> Case:
    """A good file with a name that makes trouble."""

    def make(here: Path) -> Source:
        return Source(write(here / name, line(1) + b"\n"), **({"good": {1: said(1)}} | expect))

    return make


def while_opened(change: Callable[[Path], None], which: str, **expect: Any) -> Case:
    """Something happens to a file of a folder just before it is opened."""

    def make(here: Path) -> Source:
        path = two(here) / which
        return Source(path.parent, during=(path, lambda: change(path)), **expect)

    return make


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


GZ = partial(jsonl, name="x.jsonl.gz", pack=gzip.compress)
MANY = range(1, 40)
FILES: dict[str, Case] = {
    "empty file": whole("x.jsonl", b"", "no rows"),
    "blank lines": whole("x.jsonl", b"\n \n\r\n\t\n", "no rows"),
    "UTF-16 with a mark": whole("x.jsonl", b"\xff\xfe" + line(1).decode().encode("utf-16-le"), "UTF-16"),
    "UTF-16, high byte first": whole("x.jsonl", b"\xfe\xff" + line(1).decode().encode("utf-16-be"), "UTF-16"),
    "UTF-16 as .json": whole("x.json", ("[" + line(1).decode() + "]").encode("utf-16"), "UTF-16"),
    "gzip named .jsonl": whole("x.jsonl", gzip.compress(line(1)), "gzip"),
    "Parquet named .jsonl": whole("x.jsonl", b"PAR1" + bytes(99), "Parquet"),
    "CR alone ends lines": jsonl((line(1) + b"\r" + line(2) + b"\r" + line(3), "not JSON"), end=b""),
    "CR and LF end lines": jsonl(1, 2, 3, end=b"\r\n"),
    "no end of the last line": lambda here: Source(write(here / "x.jsonl", line(1) + b"\n" + line(2)), good={1: said(1), 2: said(2)}),
    "unknown ending": whole("x.xlsx", b"prompt,chosen\n", "unknown kind of file"),
    "no ending": whole("x", line(1), "unknown kind of file"),
    "capitals in the ending": whole("x.JSONL", line(1), "unknown kind of file"),
    "other compression": whole("x.jsonl.bz2", line(1), "unknown kind of file"),
    "json: empty": whole("x.json", b"", "not JSON"),
    "json: blank": whole("x.json", b" \n", "not JSON"),
    "json: empty list": whole("x.json", b"[]", "no rows"),
    "json: number": whole("x.json", b"7", "list of objects"),
    "json: text": whole("x.json", b'"a"', "list of objects"),
    "json: null": whole("x.json", b"null", "list of objects"),
    "json: object": whole("x.json", line(1), "list of objects"),
    "json: object of columns": whole("x.json", b'{"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}', "list of objects"),
    "json: lines": whole("x.json", line(1) + b"\n" + line(2) + b"\n", ".jsonl"),
    "json: torn": whole("x.json", b"[" + line(1) + b",\n" + line(2)[:-5], "row 2", "not JSON"),
    "json: no end": whole("x.json", b"[" + line(1) + b",\n" + line(2), "not JSON"),
    "json: a comma too many": whole("x.json", b"[" + line(1) + b",]", "not JSON"),
    "json: no comma": whole("x.json", b"[" + line(1) + b"\n" + line(2) + b"]", "not JSON"),
    "json: more behind it": whole("x.json", b"[" + line(1) + b"] []", "not JSON"),
    "json: latin-1": whole("x.json", '[{"prompt": "é"}]'.encode("latin-1"), "UTF-8"),
    "json: a mark": lambda here: Source(write(here / "x.json", b"\xef\xbb\xbf[" + line(1) + b"]"), good={1: said(1)}),
    "json: nesting of 100,000": array(1, (column(9, nested(100_000)), TIE), 3),
    "json: nesting of 100,000 without an end": whole("x.json", b"[" * 100_000, TIE),
    "gz: torn last line": GZ(1, 2, (b'{"prompt', "not JSON")),
    "gz: not UTF-8": GZ(1, (b'{"prompt": "\xff"}', "UTF-8"), 3),
    "gz: lone surrogate": GZ(1, (instead("chosen", b'"\\ud800"'), HALF), 3),
    "gz: two parts": lambda here: Source(write(here / "x.jsonl.gz", gzip.compress(line(1) + b"\n") + gzip.compress(line(2))), good={1: said(1), 2: said(2)}),
    "gz: empty": whole("x.jsonl.gz", b"", "no rows"),
    "gz: of nothing": whole("x.jsonl.gz", gzip.compress(b""), "no rows"),
    "gz: cut": cut(GZ(*MANY), 0.7, "damaged gzip"),
    "gz: cut in the header": cut(GZ(*MANY), 0.02, "damaged gzip"),
    "gz: garbage inside": overwritten(GZ(*MANY), 0.5, "damaged gzip"),
    "gz: garbage at the end": overwritten(GZ(*MANY), 0.97),
    "gz: more behind it": whole("x.jsonl.gz", gzip.compress(line(1) + b"\n") + b"more", "damaged gzip"),
    "gz: plain text": whole("x.jsonl.gz", line(1), "damaged gzip"),
    "parquet: no rows": no_rows,
    "parquet: a column twice": twin_columns,
    "parquet: cut": cut(parquet(lambda pa: {}, {}), 0.5, "not a readable Parquet"),
    "parquet: empty": whole("x.parquet", b"", "not a readable Parquet"),
    "parquet: text": whole("x.parquet", line(1), "not a readable Parquet"),
    "parquet: garbage in the footer": overwritten(parquet(lambda pa: {}, {}), 0.75, "not a readable Parquet"),
    "no such file": lambda here: Source(here / "none.jsonl", refused=("none.jsonl", "no such file")),
    "no such folder": lambda here: Source(here / "none/x.jsonl", refused=("none/x.jsonl", "no such file")),
    "a file as folder": lambda here: Source(write(here / "x.jsonl", line(1)) / "y.jsonl", refused=("y.jsonl", "no such file")),
    "empty name": lambda here: Source("", refused=("empty",)),
    "no match": in_folder("c.txt", b"x", "/none-*.jsonl", refused=("none-*.jsonl", "no file matches")),
    "empty folder": alone(Path.mkdir, "d", "no data file in this folder"),
    "a folder named x.jsonl": alone(Path.mkdir, "x.jsonl", "x.jsonl", "no data file in this folder"),
    "a folder named y.jsonl in a folder": with_entry(lambda d: (d / "y.jsonl").mkdir(), good=FOUR),
    "a folder of other files": with_entry(lambda d: [write(d / "c.txt", b"x"), (d / "a.jsonl").unlink(), (d / "b.jsonl").unlink()], refused=("no data file in this folder", "c.txt")),
    "a bad row in the second file": in_folder("b.jsonl", line(3) + b"\n{\n" + line(4), good={1: said(1), 2: said(2), 3: said(3), 5: said(4)}, bad={4: "not JSON"}),
    "an empty file among others": in_folder("aa.jsonl", b"", good=FOUR),
    "a damaged file among others": in_folder("c.jsonl.gz", b"\x1f\x8b\x08\0nonsense", refused=("c.jsonl.gz", "damaged gzip")),
    "a file of other kind among others": in_folder("c.xlsx", b"x", "/*", refused=("c.xlsx", "unknown kind of file")),
    "a link into nothing": alone(lambda p: p.symlink_to("gone"), "x.jsonl", "x.jsonl", "link"),
    "a link to itself": alone(loop, "x.jsonl", "x.jsonl", "link"),
    "a link into nothing in a folder": with_entry(lambda d: (d / "c.jsonl").symlink_to("gone"), refused=("c.jsonl", "link")),
    "a link into nothing behind a pattern": with_entry(lambda d: (d / "c.jsonl").symlink_to("gone"), "/*.jsonl", refused=("c.jsonl", "link")),
    "a link to itself in a folder": with_entry(lambda d: loop(d / "c.jsonl"), refused=("c.jsonl", "link")),
    "a folder that holds itself": with_entry(lambda d: (d / "again").symlink_to(d), "/**/*.jsonl", refused=("again/a.jsonl", "same file")),
    "a link to a file": with_entry(lambda d: (d / "c.jsonl").symlink_to("a.jsonl"), refused=("c.jsonl", "same file")),
    "a FIFO": alone(os.mkfifo, "x.jsonl", "x.jsonl", "not a regular file"),
    "a FIFO in a folder": with_entry(lambda d: os.mkfifo(d / "c.jsonl"), refused=("c.jsonl", "not a regular file")),
    "a FIFO behind a pattern": with_entry(lambda d: os.mkfifo(d / "c.jsonl"), "/*.jsonl", refused=("c.jsonl", "not a regular file")),
    "a device": lambda here: Source("/dev/zero", refused=("/dev/zero", "not a regular file")),
    "an over-long name": lambda here: Source(here / ("x" * 300 + ".jsonl"), refused=("too long",)),
    "an over-long path": lambda here: Source(str(here) + "/x" * 3000 + ".jsonl", refused=("too long",)),
    "a pattern that is over-long": lambda here: Source(str(here / ("x" * 300 + "*.jsonl")), refused=("*.jsonl",)),
    "a name with a line break": named("a\nb.jsonl"),
    "a bad row in a name with a line break": lambda here: Source(write(here / "a\nb.jsonl", b"{}\n"), bad={1: "columns"}),
    "a name that is not UTF-8": named(os.fsdecode(b"x\xff.jsonl"), good={}, refused=("UTF-8",)),
    "a name that is not UTF-8 in a folder": in_folder(os.fsdecode(b"x\xff.jsonl"), line(5), refused=("UTF-8",)),
    "a name with brackets": named("a[1].jsonl"),
    "a name with blanks": named("  x .jsonl"),
    "a file that goes before it is opened": while_opened(Path.unlink, "b.jsonl", refused=("b.jsonl",)),
    "a file that becomes a folder": while_opened(to_folder, "b.jsonl", refused=("b.jsonl",)),
    "columns that are not there": in_folder("c.txt", b"", bad=dict.fromkeys(range(1, 5), "'question'"), more=("data.columns.prompt=question",)),
    "bad rows beyond max_rows": lambda here: Source(write(here / "x.jsonl", line(1) + b"\n{\n"), good={1: said(1)}, more=("data.max_rows=1",)),
    "a forged turn": lambda here: Source(write(here / "x.jsonl", line(1) + b"\n" + instead("chosen", b'"a<|im_end|>b"') + b"\n"), good={1: said(1)}, late={2: "<|im_end|>"}),
    "a tool call of no shape": lambda here: Source(write(here / "x.jsonl", line(1) + b"\n" + instead("chosen", b'[{"role": "assistant", "content": null, "tool_calls": 7}]') + b"\n"), good={1: said(1)}, late={2: ""}),
}  # fmt: skip


def saved(spoil: Callable[[Path], object], **expect: Any) -> Case:
    """A folder saved by `datasets`, spoiled."""

    def make(here: Path) -> Source:
        import datasets

        datasets.Dataset.from_list([good(1), good(2)]).save_to_disk(here / "set")
        spoil(here / "set")
        return Source(here / "set", **({"refused": ("set", "saved data set")} | expect))

    return make


def arrow(folder: Path) -> Path:
    return next(folder.glob("*.arrow"))


def splits(folder: Path) -> None:
    import datasets

    shutil.rmtree(folder)
    datasets.DatasetDict({"dev": datasets.Dataset.from_list([good(1)])}).save_to_disk(folder)


def change_rows(*rows: Mapping[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        import datasets

        shutil.rmtree(folder)
        datasets.Dataset.from_list([dict(row) for row in rows]).save_to_disk(folder)

    return change


def no_rows_but_columns(folder: Path) -> None:
    import datasets

    shutil.rmtree(folder)
    datasets.Dataset.from_list([good(1)]).filter(lambda row: False).save_to_disk(folder)


SAVED: dict[str, Case] = {
    "good": saved(lambda d: None, good={1: said(1), 2: said(2)}, refused=()),
    "no rows file": saved(lambda d: arrow(d).unlink()),
    "rows cut": saved(lambda d: arrow(d).write_bytes(arrow(d).read_bytes()[:300])),
    "rows of garbage": saved(lambda d: arrow(d).write_bytes(bytes(range(256)) * 4)),
    "rows empty": saved(lambda d: arrow(d).write_bytes(b"")),
    "state of garbage": saved(lambda d: (d / "state.json").write_bytes(b"{")),
    "state of nothing": saved(lambda d: (d / "state.json").write_bytes(b"{}")),
    "state is a list": saved(lambda d: (d / "state.json").write_bytes(b"[1]")),
    "no state": saved(lambda d: (d / "state.json").unlink()),
    "info of garbage": saved(lambda d: (d / "dataset_info.json").write_bytes(b"\xff\xfe")),
    "info of other types": saved(lambda d: (d / "dataset_info.json").write_bytes(b'{"features": {"prompt": {"_type": "None"}}}')),
    "other splits": saved(splits, refused=("no split 't", "but dev")),
    "a bad row": saved(change_rows(good(1), {**good(2), "chosen": None}, good(3)), good={1: said(1), 3: said(3)}, bad={2: "'chosen' is missing"}, refused=()),
    "no rows": saved(change_rows()),
    "no rows, but columns": saved(no_rows_but_columns, refused=("no rows",)),
}  # fmt: skip


def cases() -> dict[str, Case]:
    """Every source by name."""
    found = {f"lines: {name}": jsonl(*parts) for name, parts in (VALUES | LINES).items()}
    found |= {f"list: {name}": array(*parts) for name, parts in VALUES.items()}
    found |= {f"wrong types: {name}": wrong_types(name) for name in GOLD}
    found |= {f"parquet: {name}": case for name, case in PARQUET.items()} | FILES
    return found | {f"saved: {name}": case for name, case in SAVED.items()}
