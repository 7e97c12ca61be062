"""Every format means what it says; every row is merged, counted or refused by number."""

import gzip
import json

import pytest

from favor.data.formats import RowError
from favor.data.formats.fields import transcript
from favor.data.read import DataConfig, read
from favor.data.types import Comparison
from favor.errors import DataError

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}


def load(tmp_path, *rows, name="rows.jsonl", **settings):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return read(str(path), DataConfig(train=str(path), **settings), "train")


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", ("a", "b")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, (USER,), ((GOOD,), (BAD,))),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, (USER,), ((GOOD,), (BAD,))),
        ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, (USER,), ((GOOD,), (BAD,))),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,), ((GOOD,), (BAD,))),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},
            (USER,),
            ((GOOD,), (BAD,)),
        ),
    ],
    ids=["text", "chat", "text prompt, chat sides", "chat prompt, text sides", "implicit prompt", "transcript"],
)
def test_pairs(tmp_path, row, prompt, responses):
    (tree,), report = load(tmp_path, row)
    assert (tree.prompt, tree.responses, tree.comparisons) == (prompt, responses, (Comparison((0, 1)),))
    assert (report.format, report.num_rows, report.num_comparisons) == ("pairs", 1, 1)


def test_ranked(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x", "y", "z"], "ranking": [2, 0, 1]},
        {"prompt": "b", "responses": ["x", "y", "z"], "scores": [1, 3, 2]},
        {"prompt": "c", "responses": ["x", "y", "z"], "scores": [1, 3, 1]},
    ]
    trees, _ = load(tmp_path, *rows)
    assert [[c.order for c in tree.comparisons] for tree in trees] == [[(2, 0, 1)], [(1, 2, 0)], [(1, 0), (1, 2)]]


def test_sft_rows(tmp_path):
    trees, _ = load(tmp_path, {"prompt": "a", "completion": "x"}, {"messages": [USER, GOOD]})
    assert [(tree.prompt, tree.responses, tree.comparisons) for tree in trees] == [
        ("a", ("x",), ()),
        ((USER,), ((GOOD,),), ()),
    ]


def test_rows_of_one_prompt_become_one_tree(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "c", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "weight": 2.5},
    ]
    (p, q), report = load(tmp_path, *rows)
    assert p.responses == ("a", "b", "c")
    assert p.comparisons == (Comparison((0, 1), 3.5), Comparison((2, 0)))
    assert p.rows == (1, 3, 4)
    assert q.rows == (2,)
    assert (report.merged_prompts, report.merged_responses, report.repeated_comparisons) == (2, 3, 1)


def test_tools_keep_prompts_apart(tmp_path):
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    trees, _ = load(tmp_path, row, row | {"tools": tools}, row | {"tools": json.dumps(tools)})
    assert [tree.tools for tree in trees] == [None, tuple(tools)]


def test_transcript_keeps_every_turn():
    text = "\n\nHuman: one\n\nAssistant: two\nlines\n\nHuman: three\n\nAssistant: four"
    assert [(m["role"], m["content"]) for m in transcript(text, "chosen")] == [
        ("user", "one"),
        ("assistant", "two\nlines"),
        ("user", "three"),
        ("assistant", "four"),
    ]
    with pytest.raises(RowError, match="ends with a turn of 'user'"):
        transcript("\n\nHuman: one", "chosen")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "expected an object"),
        ({"question": "p", "answer": "a"}, "column 'chosen' is missing or null"),
        ({"prompt": "p", "chosen": "a"}, "column 'rejected' is missing or null"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "column 'rejected' is missing or null"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "  \n"}, "rejected is empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "p", "chosen": 3, "rejected": "a"}, "chosen must be text or a list of chat messages, found int 3"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, r"prompt\[0\] has no text content"),
        ({"prompt": ["hi"], "chosen": "a", "rejected": "b"}, r"prompt\[0\] is not a chat message"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "chosen ends with a turn of 'user'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "share no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "share no prompt"),
        ({"chosen": "no transcript", "rejected": "b"}, "there is no prompt column"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [0, 2]}, r"ranking \[0, 2\] is not an order"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "scores must be a list of 2 numbers"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "must be finite"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}, "all scores are equal"),
        ({"prompt": "p", "responses": ["a", "a"], "ranking": [0, 1]}, "two of its responses are the same"),
        ({"prompt": "p", "responses": ["a"], "ranking": [0]}, "at least two"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1}, "weight is -1"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": "{"}, "tools is not JSON"),
    ],
)
def test_bad_row_is_named_and_can_be_dropped(tmp_path, row, message):
    ranked = "responses" in row
    good = (
        {"prompt": "p", "responses": ["a", "b"], "ranking": [0, 1]}
        if ranked
        else {"prompt": "p", "chosen": "a", "rejected": "b"}
    )
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 2: .*{message}.*data\.bad_rows=drop"):
        load(tmp_path, good, row)
    (tree,), report = load(tmp_path, good, row, bad_rows="drop")
    assert tree.rows == (1,)
    assert [number for number, _ in report.dropped] == [2]


def test_unknown_columns_are_listed(tmp_path):
    with pytest.raises(
        DataError, match=r"row 1: its columns \(answer, question\) are of no known format; .*Known are prompt"
    ):
        load(tmp_path, {"question": "p", "answer": "a"})


def test_files_of_every_kind_give_the_same_trees(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "é", "rejected": "d"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text, "utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows), "utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = [read(str(p), DataConfig(train=str(p)), "train")[0] for p in sorted(tmp_path.iterdir())]
    assert len(found) == 4
    assert all([(t.prompt, t.responses) for t in trees] == [("p", ("a", "b")), ("q", ("é", "d"))] for trees in found)


def test_saved_data_set_folder(tmp_path):
    import datasets

    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "set")
    source = str(tmp_path / "set")
    (tree,), _ = read(source, DataConfig(train=source), "train")
    assert tree.responses == ("a", "b")
    with pytest.raises(DataError, match="has no split 'test'"):
        read(source, DataConfig(train=source), "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "p"\n', "row 1: not JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "row 1: not UTF-8"),
        ("a.jsonl", b"", "it holds no rows"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00broken", "damaged gzip"),
        ("a.jsonl.gz", b"plain text", "damaged gzip"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.json", b"[1,", "not JSON"),
        ("a.json", b"{}", "expected a list"),
        ("a.xlsx", b"x", "unknown kind of file"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(str(path), DataConfig(train=str(path)), "train")


def test_missing_file_is_no_hub_id():
    for source in ("missing.jsonl", "./missing", "a/b/c"):
        with pytest.raises(DataError, match="no such file or folder"):
            read(source, DataConfig(train=source), "train")
