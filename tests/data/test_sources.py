"""Files, globs, folders and hub ids are one stream of rows; a message names the file and the row in it."""

import gzip
import json
from types import SimpleNamespace

import pytest

from favor.data import sources, store
from favor.data.read import DataConfig, read
from favor.errors import DataError


def row(name):
    return {"prompt": f"p {name}", "chosen": "a", "rejected": "b"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def folder(tmp_path):
    """Four files of three kinds, and one that holds no rows."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data"
    path.mkdir()
    (path / "b.jsonl").write_bytes(lines(row(3)) + b"\n" + lines(row(4)))
    (path / "a.jsonl.gz").write_bytes(gzip.compress(lines(row(1), row(2))))
    (path / "c.json").write_text(json.dumps([row(5)]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(6), row(7)]), path / "d.parquet")
    (path / "README.md").write_text("no data")
    return path


def prompts(source):
    trees, _ = read(source, DataConfig(train=source), "train")
    return [tree.prompt for tree in trees]


def test_folder_and_glob_are_read_by_name(folder):
    assert prompts(str(folder)) == [f"p {i}" for i in range(1, 8)]
    assert prompts(f"{folder}/*.jsonl*") == ["p 1", "p 2", "p 3", "p 4"]
    assert prompts(f"{folder}/[cd].*") == ["p 5", "p 6", "p 7"]
    assert prompts(f"{folder.parent}/**/*.json") == ["p 5"]


def test_rows_are_numbered_through_and_found_again(folder):
    numbers = [number for number, _ in sources.rows(str(folder), "train")]
    assert numbers == [1, 2, 3, 5, 6, 7, 8]
    assert sources.where(str(folder), 5) == f"{folder / 'b.jsonl'}, row 3"
    assert sources.where(str(folder), 8) == f"{folder / 'd.parquet'}, row 2"
    assert sources.where(str(folder / "b.jsonl"), 3) == f"{folder / 'b.jsonl'}, row 3"


def test_bad_row_names_its_file(folder):
    (folder / "b.jsonl").write_bytes(lines(row(3), {"prompt": "p", "chosen": "", "rejected": "b"}))
    with pytest.raises(DataError, match=r"data/b\.jsonl, row 2: chosen is empty"):
        prompts(str(folder))
    (folder / "b.jsonl").write_bytes(lines(row(3)) + b"{")
    with pytest.raises(DataError, match=r"data/b\.jsonl, row 2: not JSON"):
        prompts(f"{folder}/*.jsonl*")


@pytest.mark.parametrize("change", ["more", "other", "touched", "gone"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row(1)) * 5)
    found = sources.rows(str(path), "train")
    next(found)
    if change == "more":
        with path.open("ab") as file:
            file.write(lines(row(2)))
    elif change == "other":
        path.rename(tmp_path / "b.jsonl")
        path.write_bytes(lines(row(1)) * 5)
    elif change == "gone":
        path.unlink()
    else:
        path.touch()
    with pytest.raises(DataError, match=r"a\.jsonl: (changed while it was read|cannot be read \(No such file)"):
        list(found)


def test_the_place_of_a_bad_row_is_told_though_the_files_have_gone(folder):
    (folder / "a.jsonl.gz").unlink()
    assert sources.where(str(folder), 4) == f"{folder / 'c.json'}, row 1"
    (folder / "b.jsonl").write_bytes(b"\xff\xfe")
    assert sources.where(str(folder), 4) == f"{folder}, row 4"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "x", "cho', r"row 2: not JSON \(Unterminated string starting at column 17\)"),
        (b'{"prompt": "x"', r"row 2: not JSON \(Expecting ',' delimiter at column 15\)"),
        (b'{"prompt": "x"} {}', r"row 2: not JSON \(more text behind the value, from column 17 on\)"),
        (b"\xff", r"row 2: not UTF-8 text \(invalid start byte at byte 1\)"),
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_bad_line_is_told_by_its_own_columns(tmp_path, line, said, end):
    """Whatever ends the line."""
    (tmp_path / "a.jsonl").write_bytes(lines(row(1)) + line + end)
    with pytest.raises(DataError, match=said):
        prompts(str(tmp_path / "a.jsonl"))


def test_nothing_there_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"none-\*\.jsonl: no file matches"):
        prompts(f"{folder}/none-*.jsonl")
    with pytest.raises(DataError, match=r"README\.md: unknown kind of file"):
        prompts(f"{folder}/*")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no data file in this folder \(nothing\)"):
        prompts(str(empty))
    (empty / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no data file in this folder \(notes\.txt\)"):
        prompts(str(empty))


def test_identity_is_of_content(folder):
    before = store.identity(str(folder), "train", streaming=False)
    (folder / "README.md").write_text("changed")
    (folder / "b.jsonl").touch()
    assert store.identity(str(folder), "train", streaming=False) == before
    (folder / "b.jsonl").write_bytes(lines(row(9)))
    after = store.identity(str(folder), "train", streaming=False)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    assert sources.size(str(folder)) == sum(p.stat().st_size for p in folder.iterdir() if p.name != "README.md")


def test_saved_data_set_is_one(tmp_path):
    import datasets

    datasets.Dataset.from_list([row(1)]).save_to_disk(tmp_path / "set")
    source = str(tmp_path / "set")
    assert prompts(source) == ["p 1"]
    assert sources.files(source) is None
    assert sources.size(source) > 100
    assert len(store.identity(source, "train", streaming=False)) >= 3


def test_hub_id_streams(monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return iter([row(1), row(2)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=lambda _: SimpleNamespace(sha="abc"))
    )
    data = DataConfig(train="org/name", streaming=True, max_rows=1)
    trees, _ = read("org/name", data, "train")
    assert [tree.prompt for tree in trees] == ["p 1"]
    assert asked == [("org/name", "train", True)]
    assert store.identity("org/name", "train", streaming=True) == [["org/name", "abc"]]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_call_has_its_own_arguments_and_not_those_that_arrow_gives_to_all(tmp_path, kind):
    """Two calls of tools with other arguments stand in one column of Arrow, whose structs have the fields of both."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    def called(name, **arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]

    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": called("weather", city="Oslo"), "rejected": said}
        for i, said in enumerate((called("day", zone="CET"), called("weather", city="Rome")))
    ]
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "rows")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        assert '"city": null' in json.dumps(pyarrow.parquet.read_table(path).to_pylist()[0]["rejected"])
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    trees, _ = read(str(path), DataConfig(train=str(path)), "train")
    found = [[text[0]["tool_calls"][0]["function"]["arguments"] for text in tree.responses] for tree in trees]
    assert found == [[{"city": "Oslo"}, {"zone": "CET"}], [{"city": "Oslo"}, {"city": "Rome"}]]
