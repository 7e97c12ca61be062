"""What goes through files equals what stays in memory, is reused only when it may be, and is whole or absent."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import tiny
from filelock import FileLock
from rich.console import Console
from threads import Threads

from favor.config import load
from favor.data import prepare as preparing
from favor.data import shapes, store
from favor.data.grow import ReadReport
from favor.data.prepare import prepare_split
from favor.data.read import DataConfig, read, splits_of
from favor.data.settings import SourceConfig
from favor.data.splits import WINDOW, Recipe, Streams, extremes, hash_all, hash_ids, outlines
from favor.data.store import describe, group
from favor.data.tokenize import TokensConfig
from favor.data.types import Comparison, Picture, Thumb, TokenTree, longest_path
from favor.errors import DataError
from favor.lint.cheap import CHECKS
from favor.ranks import World, on_main
from favor.run import RunFolder
from favor.stop import StopRequest
from favor.train.preference import TrainConfig, train
from favor.train.session import Session

END = frozenset({2})
FILES = ["trees.arrow", "prompts.arrow", "report.json", "hashes.json"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FAVOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


def make_rows(count, prompts, seed=0):
    """Pairs, soft ones, ties and bad rows, those of one prompt far apart; some text that JSON must escape."""
    rng, words = random.Random(seed), ["good", "bad", "é", "\u2028", "film\n", "never", "\ud83d\ude00", '"', " "]

    def say():
        return "a" + "".join(rng.choices(words, k=rng.randint(1, 9)))

    rows = []
    for _ in range(count):
        row = {"prompt": f"Write about film {rng.randrange(prompts)}.", "chosen": say(), "rejected": "x" + say()}
        row |= rng.choice([{}, {"margin": 0.1}, {"weight": 1 / 3}, {"tie": True}, {"other": [1, None]}])
        if rng.random() < 0.1:
            user = {"role": "user", "content": row["prompt"]}
            row["prompt"] = [{"role": "system", "content": "Be kind."}, user]
        if rng.random() < 0.03:
            row["chosen"] = ""
        rows.append(row)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def wanted(source, tok, tokens=None, **settings):
    data = DataConfig(**{"train": source, "bad_rows": "drop", **settings})
    return Recipe(splits_of(data)[0], data, tokens or TokensConfig(), tok, END)


def get(source, tok, tokens=None, part=0, **settings):
    recipe = wanted(source, tok, tokens, **settings)
    return prepare_split(recipe._replace(split=splits_of(recipe.data)[part]), CHECKS, lambda _: None)


def caches(tmp_path):
    return sorted((tmp_path / "cache/tokens").glob("*"))


@pytest.mark.parametrize("truncation", ["drop", "prompt_start", "response_end"])
def test_through_files_equals_in_memory(tmp_path, tok, truncation):
    source = write(tmp_path / "rows.jsonl", make_rows(2500, 1500))
    tokens = TokensConfig(max_tokens=60, truncation=truncation)
    memory, files = (get(source, tok, tokens, cache=on) for on in (False, True))
    assert isinstance(memory.trees, list)
    assert not isinstance(files.trees, list)
    assert len(memory.trees) > WINDOW
    assert_same(files, memory)


def test_a_template_filled_in_gives_the_same_files(tmp_path, tok, monkeypatch):
    """Byte for byte what rendering every row gives (data/shapes.py)."""
    source = write(tmp_path / "rows.jsonl", make_rows(700, 400))
    assert shapes.only_written(tok.chat_template) == {False}
    get(source, tok, cache=True)
    (folder,) = caches(tmp_path)
    filled = [(folder / name).read_bytes() for name in FILES]
    shutil.rmtree(folder)
    monkeypatch.setattr(shapes, "only_written", lambda _: None)
    get(source, tok, cache=True)
    assert [(folder / name).read_bytes() for name in FILES] == filled


def assert_same(files, memory):
    assert list(files.trees) == memory.trees
    assert files.read == json.loads(json.dumps(memory.read))
    assert files.tokens == json.loads(json.dumps(memory.tokens))
    assert files.findings == memory.findings
    assert list(files.prompts) == memory.prompts
    for hashed in (hash_ids, hash_all):
        assert hashed({"train": files.trees}) == hashed({"train": memory.trees})


@pytest.mark.parametrize("pairing", ["auto", "best_worst"])
def test_sources_weights_and_a_held_out_share_through_files(tmp_path, tok, pairing):
    """Two files of different formats, weights and columns, a fifth of the prompts held out, a minimum gap."""
    pairs = write(tmp_path / "pairs.jsonl", make_rows(300, 60))
    rng = random.Random(1)
    rows = [
        {
            "question": f"Film {i % 30}?",
            "responses": ["good", "bad", f"fine {i}"],
            "scores": [rng.random() for _ in range(3)],
        }
        for i in range(90)
    ]
    ranked = write(tmp_path / "ranked.jsonl", rows)
    sources = [
        {"path": pairs, "weight": 2.0, "max_rows": 250},
        {"path": ranked, "weight": 0.5, "format": "ranked", "columns": {"prompt": "question"}},
    ]
    more = {"train": None, "sources": sources, "hold_out": {"share": 0.2}}
    more["compare"] = {"pairing": pairing, "min_gap": 0.05}
    for part in (0, 1):
        memory, files = (get(None, tok, part=part, cache=on, **more) for on in (False, True))
        assert len(memory.read["sources"]) == 2
        assert {tree.source for tree in memory.trees} == {pairs, ranked}
        assert_same(files, memory)
    assert len(caches(tmp_path)) == 2


def test_grouping_equals_read(tmp_path):
    source = write(tmp_path / "rows.jsonl", make_rows(400, 40))
    data = DataConfig(train=source, bad_rows="drop")
    expected, report = read(source, data, "train")
    found = ReadReport(source, "auto")
    trees = list(group(SourceConfig(path=source), data, "all", tmp_path, found))
    assert trees == expected
    assert found == report
    assert max(len(tree.rows) for tree in expected) > 5


def test_grouping_names_the_bad_row_and_the_empty_file(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p"}])
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: column 'chosen' is missing"):
        group(SourceConfig(path=source), DataConfig(train=source), "all", tmp_path, ReadReport(source, "auto"))
    with pytest.raises(DataError, match="it holds no rows"):
        get(write(tmp_path / "empty.jsonl", []), tiny.tokenizer(), cache=True)


def test_sequence(tmp_path):
    """Every field comes back, and int, slice and iteration behave as a list's."""
    trees = [
        TokenTree(
            (1, i),
            ((5, 2), (70_000, 6, 2)),
            (True, i % 2 == 0),
            (Comparison((1, 0), 1 / 3, (0.1,), 0.7), Comparison((0, 1))),
            first_response=2 * i,
            row=3 * i + 1,
            source=f"file {i // 700}",
            ties=(Comparison((0, 1), 2.0),),
            thumbs=(Thumb(0, True, 0.5),),
            pictures=(Picture("ab" * 32, f"/p/{i}.png", 3, 4, 1),) if i % 3 else (),
            picture_id=1 if i % 3 else -1,
        )
        for i in range(2 * WINDOW + 5)
    ]
    streams = Streams()
    assert list(store.write_trees(tmp_path, trees, streams)) == trees
    found = store.stored_trees(tmp_path, streams.notes())
    assert list(found) == trees
    assert (len(found), found[0], found[-1], found[WINDOW]) == (len(trees), trees[0], trees[-1], trees[WINDOW])
    assert found[WINDOW - 2 : WINDOW + 2] == trees[WINDOW - 2 : WINDOW + 2]
    assert found[-3:] == trees[-3:]
    with pytest.raises(IndexError):
        found[len(trees)]
    names = "prompt_ids response_ids complete comparisons first_response row ties thumbs source pictures picture_id"
    assert [field.name for field in fields(TokenTree)] == names.split(), (
        "splits.encode and store's readers must learn the new field"
    )
    assert hash_all({"a": found}) == hash_all({"a": trees})
    assert hash_all({"a": found}) != hash_all({"a": trees[:-1]})
    assert hash_all({"a": trees[:3], "b": trees[3:5]}) != hash_all({"a": trees[:2], "b": trees[2:5]})
    # without tokens everything else is there, as in memory
    assert outlines(trees) is trees
    empty = [replace(tree, prompt_ids=(), response_ids=((), ())) for tree in trees]
    assert list(outlines(found)) == empty


@pytest.mark.parametrize("seed", range(3))
def test_the_trees_with_most_are_noted(tmp_path, seed):
    """Of many equals the first: as a pass over all of them would find it."""
    rng = random.Random(seed)

    def path(shortest):
        return tuple(rng.randrange(50) for _ in range(rng.randint(shortest, 4)))

    trees = []
    for i in range(2 * WINDOW + 7):
        responses = tuple(path(1) for _ in range(rng.randint(1, 3)))
        trees.append(TokenTree(path(0), responses, (True,) * len(responses), (), 0, i + 1, source="s"))
    streams = Streams()
    assert list(store.write_trees(tmp_path, trees, streams)) == trees
    few = extremes(store.stored_trees(tmp_path, streams.notes()))
    assert extremes(trees) is trees
    assert len(few) <= 4
    most = (
        longest_path,
        lambda tree: len(tree.prompt_ids),
        lambda tree: max(map(len, tree.response_ids)),
        lambda tree: max(*tree.prompt_ids, *max(tree.response_ids, key=max), 0),
    )
    for size in most:
        assert max(few, key=size) == max(trees, key=size)


def test_a_start_from_the_cache_reads_few_trees(tmp_path, monkeypatch):
    """Whatever the number of rows: those of the self-check, the packs looked at, the steps and the reference, nothing twice."""
    tiny.save(tmp_path / "model")
    write(tmp_path / "p.jsonl", [row for row in make_rows(400, 400) if row["chosen"] and "tie" not in row])
    read, made = store._trees, []

    def counted(batch):
        for tree in read(batch):
            made.append(tree)
            yield tree

    monkeypatch.setattr(store, "_trees", counted)
    pieces = {"model.path": f"{tmp_path}/model", "data.train": f"{tmp_path}/p.jsonl", "data.cache": "true"}
    pieces |= {"data.bad_rows": "drop", "loss.kind": "simpo", "train.max_steps": "1", "train.batch_prompts": "2"}
    for run in ("first", "second"):
        made.clear()
        words = [f"run={tmp_path}/{run}", *(f"{key}={value}" for key, value in pieces.items())]
        train(
            load(TrainConfig, None, words),
            lambda root: Session(RunFolder(root), World(), Console(quiet=True), StopRequest()),
        )
    assert 4 < len(made) <= 2 + 4 + 4 * 2 + 2


def test_reused_without_reading(tmp_path, tok, monkeypatch):
    source = write(tmp_path / "rows.jsonl", make_rows(50, 20))
    first = get(source, tok, cache=True)
    for module, name in ((store, "group"), (store, "tokenized")):
        monkeypatch.setattr(module, name, None)
    again = get(source, tok, cache=True)
    assert list(again.trees) == list(first.trees)
    assert (again.read, again.tokens, again.findings) == (first.read, first.tokens, first.findings)


def test_every_part_of_the_fingerprint_counts(tmp_path, tok, monkeypatch):
    source = write(tmp_path / "rows.jsonl", make_rows(5, 5))
    start = wanted(source, tok)
    before = describe(start)
    other = tiny.tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    longer = tiny.tokenizer()
    longer.add_tokens(["films"])
    data = start.data
    changed = {
        "template": start._replace(tokenizer=other),
        "tokenizer": start._replace(tokenizer=longer),
        "tokens": start._replace(tokens=TokensConfig(max_tokens=9)),
        "data": start._replace(data=data.model_copy(update={"max_rows": 2})),
        "half": start._replace(split=start.split._replace(half="train")),
        "sources": start._replace(split=start.split._replace(sources=(SourceConfig(path=source, weight=2.0),))),
        "end ids": start._replace(end_ids=frozenset({3})),
    }
    for name, now in changed.items():
        assert {key for key in before if describe(now)[key] != before[key]} == {name}
    tok("x", padding="max_length", max_length=8, truncation=True)
    assert describe(start) == before
    assert describe(start._replace(data=data.model_copy(update={"cache": True, "eval": "y"}))) == before
    write(tmp_path / "rows.jsonl", make_rows(6, 5))
    assert {key for key in before if describe(start)[key] != before[key]} == {"content"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_cache_is_built_again(tmp_path, tok, name, damage):
    source = write(tmp_path / "rows.jsonl", make_rows(50, 20))
    first = list(get(source, tok, cache=True).trees)
    (folder,) = caches(tmp_path)
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        (folder / name).unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        (folder / name).write_bytes(content[:middle] if damage == "cut" else flipped)
    assert list(get(source, tok, cache=True).trees) == first
    assert (folder / name).read_bytes() == content
    assert caches(tmp_path) == [folder]


def test_random_damage_is_seen_and_said(tmp_path, tok):
    """A byte or a run of them, anywhere in any file: built again, and that is said; what is used is what was written."""
    source, rng = write(tmp_path / "rows.jsonl", make_rows(30, 20)), random.Random(5)
    first = get(source, tok, cache=True)
    expected = (list(first.trees), list(first.prompts), first.read, first.tokens, first.findings)
    (folder,) = caches(tmp_path)
    for name in FILES * 8:
        content = bytearray((folder / name).read_bytes())
        start = rng.randrange(len(content))
        stop = start + rng.choice([1, 1, 200])
        content[start:stop] = bytes(b ^ rng.randrange(1, 256) for b in content[start:stop])
        (folder / name).write_bytes(bytes(content))
        said = []
        found = prepare_split(wanted(source, tok, cache=True), CHECKS, said.append)
        assert "what was there is damaged" in said[0]
        assert (list(found.trees), list(found.prompts), found.read, found.tokens, found.findings) == expected
    assert caches(tmp_path) == [folder]


def test_other_things_in_place_of_a_cache(tmp_path, tok, monkeypatch):
    source = write(tmp_path / "rows.jsonl", make_rows(9, 9))
    first = list(get(source, tok, cache=True).trees)
    (folder,) = caches(tmp_path)
    for spoil in (lambda: (folder / "trees.arrow").mkdir(), folder.touch, lambda: folder.mkdir()):
        shutil.rmtree(folder)
        if spoil != folder.touch:
            folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            spoil()
        left = folder.with_name(f".{folder.name}.999999999.tmp")
        left.mkdir()
        assert list(get(source, tok, cache=True).trees) == first
        assert caches(tmp_path) == [folder]
    monkeypatch.setenv("FAVOR_CACHE", str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl.*: the token cache cannot be written .*data\.cache=false"):
        get(source, tok, cache=True)


@pytest.mark.parametrize("when", ["before it is read", "after it was read", "and back", "a new file", "gone"])
def test_a_file_that_changes_meanwhile_leaves_no_cache(tmp_path, tok, monkeypatch, when):
    """The identity is of the content before; what is read must be that."""
    (tmp_path / "in").mkdir()
    path, real = tmp_path / "in/rows.jsonl", store.group
    source = str(tmp_path / "in")
    write(path, make_rows(50, 20))
    content = path.read_bytes()

    def change():
        if when == "a new file":
            write(path.with_name("more.jsonl"), make_rows(1, 1))
        elif when == "gone":
            path.rename(path.with_name("other.jsonl"))
        else:
            write(path, make_rows(50, 20, seed=1))

    def group_while_it_changes(*args, **more):
        if when in ("before it is read", "and back"):
            change()
        found = real(*args, **more)
        if when == "and back":
            path.write_bytes(content)
        elif when != "before it is read":
            change()
        return found

    monkeypatch.setattr(store, "group", group_while_it_changes)
    with pytest.raises(DataError, match="changed while it was read; start again"):
        get(source, tok, cache=True)
    assert caches(tmp_path) == []
    monkeypatch.setattr(store, "group", real)
    path.write_bytes(content)
    assert len(get(source, tok, cache=True).trees) > 10


def test_the_second_builder_waits_and_is_told(tmp_path, tok):
    """It builds nothing itself."""
    source, said = write(tmp_path / "rows.jsonl", make_rows(50, 20)), []
    recipe = wanted(source, tok, cache=True)
    expected = list(prepare_split(recipe, CHECKS, said.append).trees)
    (folder,) = caches(tmp_path)
    shutil.move(folder, tmp_path / "aside")
    found, waits = [], []
    with FileLock(next((tmp_path / "cache/locks").iterdir())):
        second = threading.Thread(target=lambda: found.append(prepare_split(recipe, CHECKS, waits.append)))
        second.start()
        while not waits:
            assert second.is_alive()
            time.sleep(0.01)
        shutil.move(tmp_path / "aside", folder)
    second.join()
    assert list(found[0].trees) == expected
    assert len(waits) == 1
    assert "another process is tokenising the same data; waiting for it" in waits[0]


@pytest.mark.slow
def test_several_processes_build_one_cache(tmp_path):
    """Four at once: all get the same trees, one builds."""
    source = write(tmp_path / "rows.jsonl", make_rows(3000, 2000))
    program = (
        "import sys; sys.path.insert(0, 'tests'); import tiny; from pathlib import Path; from tests.data import test_cache as t;"
        "from favor.data.splits import hash_all; from favor.lint.cheap import CHECKS; from favor.data.prepare import prepare_split\n"
        "said = []\nfound = prepare_split(t.wanted(sys.argv[1], tiny.tokenizer(), cache=True), CHECKS, said.append)\n"
        "print(hash_all({'a': found.trees}), sum('(once' in text for text in said))"
    )
    root = Path(__file__).parent.parent.parent
    processes = [
        subprocess.Popen([sys.executable, "-c", program, source], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    words = [process.communicate(timeout=250)[0].split() for process in processes]
    assert len({found for found, _ in words}) == 1
    assert sum(int(built) for _, built in words) == 1
    assert len(caches(tmp_path)) == 1


@pytest.mark.parametrize("where", ["write_trees", "write_prompts", "seal"])
def test_interrupted_build_leaves_nothing(tmp_path, tok, monkeypatch, where):
    source = write(tmp_path / "rows.jsonl", make_rows(50, 20))
    real = getattr(store, where)

    def interrupted(*args):
        yield from real(*args)
        raise KeyboardInterrupt

    def interrupted_seal(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, where, interrupted_seal if where == "seal" else interrupted)
    with pytest.raises(KeyboardInterrupt):
        get(source, tok, cache=True)
    assert caches(tmp_path) == []


def test_auto_is_by_size(tmp_path, tok, monkeypatch):
    source = write(tmp_path / "rows.jsonl", make_rows(50, 20))
    assert isinstance(get(source, tok).trees, list)
    monkeypatch.setattr(preparing, "_LARGE", Path(source).stat().st_size - 1)
    assert not isinstance(get(source, tok).trees, list)


def test_errors_are_the_same_through_files(tmp_path, tok):
    source = write(
        tmp_path / "rows.jsonl", [*make_rows(3, 3), {"prompt": "a<|im_start|>", "chosen": "b", "rejected": "c"}]
    )
    messages = []
    for on in (False, True):
        with pytest.raises(DataError, match="row 4: it contains the text of the special token") as error:
            get(source, tok, cache=on, bad_rows="error")
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    with pytest.raises(DataError, match="nothing is left after tokenising"):
        get(source, tok, TokensConfig(max_tokens=8), cache=True)
    assert caches(tmp_path) == []


def test_memory_stays_flat(tmp_path, tok, monkeypatch):
    """Four times the rows, hardly more memory, where the path in memory needs several times as much."""
    for place in ("tokenize._BATCH", "splits.WINDOW", "store.WINDOW", "encode._MEMORY"):
        monkeypatch.setattr(f"favor.data.{place}", 32)
    get(write(tmp_path / "warm.jsonl", make_rows(5, 5)), tok, cache=True)
    peaks = {}
    for count, on in ((400, True), (1600, True), (1600, False)):
        rows = ({"prompt": f"{i} " * 8, "chosen": "good " * 9, "rejected": "bad " * 9} for i in range(count))
        source = write(tmp_path / f"{count}.jsonl", rows)
        tracemalloc.start()
        get(source, tok, cache=on)
        peaks[count, on] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[1600, True] < 1.5 * peaks[400, True]
    assert peaks[1600, True] < 0.4 * peaks[1600, False]


@pytest.mark.parametrize("has_it", [0, 1])
def test_two_machines_of_which_one_has_the_cache(tmp_path, tok, monkeypatch, has_it):
    """Whoever has it waits for the other, and only the main rank builds; a machine that has none then says so."""
    ranks = Threads()
    monkeypatch.setattr("favor.ranks.dist", ranks)
    source = write(tmp_path / "rows.jsonl", make_rows(9, 9))
    memory = list(get(source, tok, cache=False).trees)
    places = [tmp_path / "main", tmp_path / "other"]
    with monkeypatch.context() as patch:
        patch.setenv("FAVOR_CACHE", str(places[has_it]))
        get(source, tok, cache=True)
    monkeypatch.setattr("favor.data.store.cache_folder", lambda: places[ranks.get_rank()])
    said = []

    def read(world):
        found = prepare_split(wanted(source, tok, cache=True), CHECKS, said.append, partial(on_main, world))
        return list(found.trees)

    found = ranks.run(read)
    assert found[0] == memory
    assert found[1] == memory if has_it else "the token cache is missing or damaged on this machine" in str(found[1])
    assert len(said) == has_it
    assert places[1].exists() is bool(has_it)
