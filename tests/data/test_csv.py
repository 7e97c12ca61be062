"""CSV and TSV files are sources like any other: text stays text, columns of numbers become numbers, faults name their line."""

import csv
import json

import pytest

from favor.data import sources, tables
from favor.data.formats import FORMATS
from favor.data.read import DataConfig, read
from favor.errors import DataError

CHAT = [{"role": "user", "content": 'Say "hi", twice.'}]


def write(path, rows, delimiter=",", **options):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def raw(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def rows_of(source):
    return list(sources.rows(source, "train"))


@pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.csv", ";"), ("x.csv", "\t"), ("x.tsv", "\t")])
def test_every_separator_gives_the_rows(tmp_path, name, delimiter):
    rows = [
        {"prompt": "a, b; c", "chosen": 'one\nline "more"', "rejected": "7", "margin": "2.5"},
        {"prompt": "true", "chosen": "[1]", "rejected": " b ", "margin": ""},
    ]
    found = rows_of(write(tmp_path / name, rows, delimiter))
    # the second row begins on line 4: the first has two
    assert [number for number, _ in found] == [2, 4]
    assert found[0][1] == rows[0] | {"margin": 2.5}
    assert found[1][1] == rows[1] | {"margin": None}


def test_it_trains_as_the_same_rows_in_json(tmp_path):
    rows = [{"prompt": f"p {i}", "chosen": f"good, {i}", "rejected": "4", "margin": i} for i in range(4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = [write(tmp_path / "x.csv", rows), str(tmp_path / "x.jsonl")]
    trees = [read(source, DataConfig(train=source), "train")[0] for source in both]
    assert [(t.prompt, t.responses, t.comparisons) for t in trees[0]] == [
        (t.prompt, t.responses, t.comparisons) for t in trees[1]
    ]


def test_cells_of_columns_without_text_are_json(tmp_path):
    rows = [{"prompt": "p", "responses": '["a", "b"]', "ranking": "[1, 0]"}]
    assert rows_of(write(tmp_path / "x.csv", rows))[0][1] == {"prompt": "p", "responses": ["a", "b"], "ranking": [1, 0]}
    for word, value in (("true", True), ("False", False), ("TRUE", True)):
        thumbs = [{"prompt": "true", "completion": "false", "label": word}]
        assert rows_of(write(tmp_path / "y.csv", thumbs))[0][1] == thumbs[0] | {"label": value}


def test_chat_messages_are_json_in_a_cell(tmp_path):
    rows = [{"prompt": json.dumps(CHAT), "chosen": "hi", "rejected": "no"}]
    assert rows_of(write(tmp_path / "x.csv", rows))[0][1]["prompt"] == CHAT
    rows[0]["prompt"] = str(CHAT)
    with pytest.raises(DataError, match=r"x\.csv, row 2: prompt holds messages as Python writes them"):
        read(write(tmp_path / "x.csv", rows), DataConfig(train="x"), "train")


def test_columns_without_text_are_columns_of_formats():
    known = frozenset().union(*(form.columns for form in FORMATS.values()))
    # HelpSteer's other scores stand in for helpfulness by data.columns
    assert tables.NOT_TEXT - known == {"correctness", "coherence", "complexity", "verbosity"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('prompt,chosen,rejected\na,b,c\na,"b" x,c\n', "x.csv, line 3: not CSV"),
        ('prompt,chosen,rejected\na,b,c\na,"b,c\n', "line 3: not CSV"),
        ("prompt,chosen,chosen\na,b,c\n", "the column 'chosen' appears twice"),
        ("prompt,chosen,rejected\na,b,c\na,b\n", "x.csv, row 3: it has 2 cells, and the header names 3 columns"),
        (b"prompt,chosen,rejected\na,b,c\na,b\xff,c\n", "x.csv, row 3: chosen is not UTF-8"),
        ("prompt,chosen,rejected\na,b,c\n".encode("utf-16"), "UTF-16"),
        ("prompt,chosen,rejected\n", "it holds no rows"),
        ("", "it holds no rows"),
        ("prompt,chosen,rejected,margin\na,b,c,x\n", "x.csv, row 2: margin is 'x'"),
    ],
)
def test_what_is_wrong_names_the_line(tmp_path, text, said):
    source = raw(tmp_path / "x.csv", text)
    with pytest.raises(DataError) as error:
        read(source, DataConfig(train=source), "train")
    assert said in str(error.value)


def test_bad_rows_are_dropped_and_a_byte_order_mark_is_none(tmp_path):
    source = raw(tmp_path / "x.csv", "\ufeff,prompt,chosen,rejected\n0,a,b,c\n1,a,b\n\n2,d,e,f\n")
    trees, report = read(source, DataConfig(train=source, bad_rows="drop"), "train")
    assert [tree.prompt for tree in trees] == ["a", "d"]
    assert [row for row, _ in report.dropped] == [3]


def test_long_cells_are_read(tmp_path):
    rows = [{"prompt": "p" * 200_000, "chosen": "a", "rejected": "b"}]
    assert rows_of(write(tmp_path / "x.csv", rows))[0][1] == rows[0]
