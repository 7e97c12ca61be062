"""Properties that hold for any input: readers, prefix forests, micro-batches, recipes, grouping through files, columns.

`pytest -m slow` tries many more examples of each.
"""

import json
import math
from dataclasses import replace
from functools import cache as once
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from favor.config import dump, load
from favor.data import batches, readers, sources, splits, store
from favor.data.formats import FORMATS, Judgment, RowError, recognise
from favor.data.grow import ReadReport
from favor.data.read import DataConfig, judge, read
from favor.data.settings import SourceConfig
from favor.data.types import Comparison, Thumb, TokenTree
from favor.errors import ConfigError, DataError


def tried(few, many):
    """A property with a few examples by default, and many in its slow variant: a parameter `max_examples`."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def hold(examples, check, *given_by):
    """Check a property on that many examples; the same ones each time."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    chosen = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=quiet
    )
    chosen(given(*given_by)(check))()


def refused_or(kind, work):
    """What a piece of work gives, or the one kind of error it may end in."""
    try:
        return work()
    except kind as error:
        return error


NUMBERS = st.one_of(
    st.integers(-3, 5),
    st.sampled_from([10**12, -(10**25), 10**299, 0.0, -0.0, 1e308, math.inf, -math.inf, math.nan]),
    st.floats(-9, 9),
)
WORDS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "x",
            "a b",
            "tie",
            "N/A",
            "1",
            "\n\nHuman: a\n\nAssistant: b",
            "<extra_id_1>User\nx",
            '[{"a": 1}]',
            "[[",
            "9" * 400,
        ]
    ),
    st.text(max_size=6),
)
NAMES = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "text",
        "response",
        "answer",
        "rank",
        "Rating",
        "annotations",
        "overall_score",
        "title",
        "post",
        "subreddit",
        "messages",
        "tools",
        "type",
    ]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, WORDS, st.sampled_from(["user", "assistant", "system", "human", "gpt"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(NAMES, WORDS), inner, max_size=3)),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.one_of(WORDS, VALUES)}
    ),
    max_size=3,
)
TALK = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": WORDS}), max_size=3)
LIKELY = st.one_of(VALUES, WORDS, TURNS, TALK, st.lists(WORDS, max_size=4), st.lists(NUMBERS, max_size=4), NUMBERS)


@st.composite
def rows_of(draw, name):
    """A row with the columns of a format, most of them there, any value in each."""
    shape = FORMATS[name]
    needed, names = draw(st.sampled_from(shape.needs)), sorted(shape.columns)
    there = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    wanted = dict.fromkeys([*needed, *there] if draw(st.integers(0, 9)) else there)
    return {name: draw(LIKELY) for name in wanted} | draw(st.dictionaries(WORDS, VALUES, max_size=1))


def assert_sound(judgment):
    """What everything behind a reader relies on."""
    assert isinstance(judgment, Judgment)
    count = len(judgment.responses)
    assert count >= 1
    for text in (judgment.prompt, *judgment.responses):
        assert (isinstance(text, str) and text.strip()) or (isinstance(text, tuple) and text)
        for turn in text if isinstance(text, tuple) else ():
            assert isinstance(turn, dict)
            assert isinstance(turn["role"], str)
            assert isinstance(turn.get("content", ""), str)
    for order in (*judgment.orders, *judgment.ties):
        assert len(order) >= 2
        assert len(set(order)) == len(order)
        assert all(type(i) is int and 0 <= i < count for i in order)
    assert len({json.dumps(r, sort_keys=True) for r in judgment.responses}) == count
    assert 0 < judgment.weight < math.inf
    for numbers in (judgment.scores, judgment.votes):
        assert not numbers or len(numbers) == count
        assert all(type(n) is float and math.isfinite(n) for n in numbers)
    assert not judgment.labels or len(judgment.labels) == len(judgment.orders)
    assert all(0.5 <= label <= 1 for label in judgment.labels)
    assert all(0 <= i < count and isinstance(good, bool) for i, good in judgment.thumbs)
    assert all(0 <= i < count for i in judgment.cut)
    json.dumps(judgment)


@tried(60, 3000)
@pytest.mark.parametrize("name", FORMATS)
def test_any_row_is_a_sound_judgment_or_refused(name, examples):
    def check(row):
        row = {key: value for key, value in row.items() if value is not None}
        judgment = refused_or(RowError, lambda: judge(row, name, 1.0))
        if not isinstance(judgment, RowError):
            assert_sound(judgment)

    hold(examples, check, rows_of(name))


@tried(100, 5000)
def test_any_object_is_recognised_or_refused(examples):
    def check(row):
        name = refused_or(RowError, lambda: recognise(row))
        assert name in FORMATS or "of no known format" in str(name)

    hold(examples, check, st.one_of(st.dictionaries(WORDS, VALUES), *map(rows_of, FORMATS)))


def hard_equal(a, b):
    """Equal, types too; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(hard_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(hard_equal, a, b))
    return a == b or (a != a and b != b)


@tried(100, 5000)
def test_what_json_writes_is_read_back(examples):
    def check(value):
        text = json.dumps(value)
        assert hard_equal(readers.parse(text), value)
        assert hard_equal(readers.parse(f" {text}\r\n"), value)

    hold(examples, check, VALUES)


ANY_LINE = st.one_of(
    st.binary(max_size=30),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda value, at: json.dumps(value).encode()[:at], VALUES, st.integers(0, 20)),
    st.text(alphabet='{}[],:"\\ud8 0', max_size=20).map(str.encode),
)


@tried(100, 5000)
def test_every_line_of_any_file_is_a_row_or_a_bad_row(examples):
    """The rows that are read, and their numbers, are what one line after the other gives."""

    def slow(line):
        try:
            value = json.loads(line.decode("utf-8"))
            json.dumps(value, ensure_ascii=False).encode()
        except ValueError:
            return None
        return value

    def check(lines):
        lines = [b"[]", *(line.replace(b"\n", b" ") for line in lines)]
        with TemporaryDirectory() as folder:
            path = Path(folder) / "x.jsonl"
            path.write_bytes(b"\n".join(lines))
            found = dict(sources.rows(str(path), "train"))
        assert list(found) == [number for number, line in enumerate(lines, 1) if line.strip()]
        for number, value in found.items():
            expected = slow(lines[number - 1].rstrip(b"\r\n"))
            if isinstance(value, RowError):
                assert expected is None or '"' in str(lines[number - 1]), (
                    "only a field that stands twice may be refused"
                )
            else:
                assert hard_equal(value, expected)

    hold(examples, check, st.lists(ANY_LINE, max_size=6))


@tried(60, 5000)
def test_any_json_file_is_a_list_of_rows_or_refused(examples):
    def check(content, value):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "x.json"
            path.write_bytes(content)
            found = refused_or(DataError, lambda: list(sources.rows(str(path), "train")))
            assert isinstance(found, list) or ("x.json" in str(found) and "; " in str(found))
            path.write_text(json.dumps(value, indent=1))
            assert hard_equal([row for _, row in sources.rows(str(path), "train")], value)

    hold(examples, check, ANY_LINE.map(lambda line: b"[" + line + b"]"), st.lists(VALUES, max_size=4))


PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=7)


@tried(150, 20_000)
def test_radix_equals_a_trie(examples):
    """Every distinct prefix stands exactly once, in pre-order; nodes tile the row; each path finds its ids again."""

    def check(paths):
        nodes, ids, position, where = batches.radix(paths)
        prefixes = {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}
        assert len(ids) == len(position) == len(prefixes)
        assert [node.start for node in nodes] == [0, *(node.stop for node in nodes)][:-1]
        assert nodes[-1].stop == len(ids)
        assert all(node.start < node.stop <= node.end for node in nodes)
        owner = np.concatenate([np.full(node.stop - node.start, k) for k, node in enumerate(nodes)])
        spelled = {}
        for path, places in zip(paths, where, strict=True):
            assert ids[places].tolist() == list(path)
            assert position[places].tolist() == list(range(len(path)))
            # a token stands within the descendants of every node on the way to it
            assert all(
                nodes[owner[a]].start <= b < nodes[owner[a]].end for i, b in enumerate(places) for a in places[: i + 1]
            )
            for n, place in enumerate(places, 1):
                assert spelled.setdefault(int(place), tuple(path[:n])) == tuple(path[:n])
        assert set(spelled.values()) == prefixes
        assert len(spelled) == len(prefixes)
        # pre-order: what lies under a node is exactly what begins with it
        for node in nodes:
            begin = spelled[node.stop - 1]
            under = [
                place for place, prefix in spelled.items() if len(prefix) > len(begin) and prefix[: len(begin)] == begin
            ]
            assert sorted(under) == list(range(node.stop, node.end))

    hold(examples, check, PATHS)


# prompts and responses over three tokens, so that many begin alike
FEW = st.lists(st.integers(1, 3), min_size=1, max_size=12).map(tuple)
PLANNED = st.lists(
    st.builds(
        lambda prompt, responses: TokenTree(prompt, tuple(responses), (True,) * len(responses), (), 0, 1),
        FEW,
        st.lists(FEW, min_size=1, max_size=3, unique=True),
    ),
    max_size=12,
)


@tried(100, 10_000)
def test_plan_takes_every_index_once_within_the_budget(examples):
    """What a pack computes is counted on the pack as it is built: what several trees begin with, once."""

    def check(trees, budget, world):
        bins = batches.plan(trees, "tree", budget, world)
        assert sorted(i for members in bins for i in members) == list(range(len(trees)))
        assert len(bins) % world == 0
        assert all(members == sorted(members) for members in bins)
        costs = [batches.build([trees[i] for i in members], "tree").num_tokens if members else 0 for members in bins]
        assert all(len(members) <= 1 or cost <= budget for members, cost in zip(bins, costs, strict=True))

    hold(examples, check, PLANNED, st.integers(1, 60), st.integers(1, 4))


IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
FLOATS = st.floats(-1e30, 1e30)
COMPARED = st.builds(
    Comparison,
    st.lists(st.integers(0, 9), min_size=2, max_size=4).map(tuple),
    FLOATS,
    st.lists(FLOATS, max_size=3).map(tuple),
    FLOATS,
)
MANY = st.lists(COMPARED, max_size=2).map(tuple)
TREES = st.builds(
    TokenTree,
    IDS,
    st.lists(IDS, max_size=3).map(tuple),
    st.lists(st.booleans(), max_size=3).map(tuple),
    MANY,
    st.integers(0, 2**40),
    st.integers(1, 2**40),
    MANY,
    st.lists(st.builds(Thumb, st.integers(0, 9), st.booleans(), FLOATS), max_size=2).map(tuple),
    st.text(max_size=5),
).map(lambda tree: replace(tree, complete=(*tree.complete, True, False, True)[: len(tree.response_ids)]))


@tried(60, 5000)
def test_columns_give_their_trees_back(examples):
    def check(trees):
        with TemporaryDirectory() as place:
            streams = splits.Streams()
            assert list(store.write_trees(Path(place), trees, streams)) == trees
            found = store.stored_trees(Path(place), splits.Notes((), ()))
            assert list(found) == trees
            # all that the outlines lack is tokens
            empty = [replace(t, prompt_ids=(), response_ids=((),) * len(t.response_ids)) for t in trees]
            assert list(found.outlines()) == empty

    hold(examples, check, st.lists(TREES, max_size=4))


@st.composite
def preference_rows(draw):
    """Rows of few prompts, so that they meet; some bad, some not even JSON."""
    row = {
        "prompt": draw(st.sampled_from("abc")),
        "chosen": draw(st.sampled_from("uvw")),
        "rejected": draw(st.sampled_from("uvw")),
    }
    for name, values in (
        ("weight", [0.5, 3, -1]),
        ("margin", [0, 2.5]),
        ("tie", [True, False]),
        ("x", ["\u2028", None, [1e308]]),
    ):
        if not draw(st.integers(0, 3)):
            row[name] = draw(st.sampled_from(values))
    return draw(st.sampled_from([json.dumps(row)] * 9 + ["{", "[]", "", '{"prompt": "\\ud800"}']))


@tried(40, 2000)
def test_grouping_through_files_equals_reading_in_memory(examples):
    def outcome(work):
        found = refused_or(DataError, work)
        return str(found) if isinstance(found, DataError) else found

    def check(lines, pairing, gap, bad):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "x.jsonl"
            path.write_text("\n".join(lines), "utf-8")
            data = DataConfig(train=str(path), bad_rows=bad, compare={"pairing": pairing, "min_gap": gap})

            def through_files():
                report = ReadReport(str(path), "auto")
                return list(store.group(SourceConfig(path=str(path)), data, "all", Path(folder), report)), report

            def in_memory():
                trees, report = read(str(path), data, "train")
                return list(trees), report

            assert outcome(through_files) == outcome(in_memory)

    strategies = (
        st.sampled_from(["auto", "all", "best_worst"]),
        st.sampled_from([0.0, 1.0]),
        st.sampled_from(["drop", "error"]),
    )
    hold(examples, check, st.lists(preference_rows(), max_size=12), *strategies)


@once
def recipes():
    """Every recipe of the command line, with what it cannot do without."""
    from favor_frontier.recipe import FrontierConfig

    from favor.ask.settings import AskConfig
    from favor.audit.settings import AuditConfig
    from favor.chat.settings import ChatConfig
    from favor.conform.settings import ConformConfig
    from favor.demo import DemoConfig
    from favor.diff.settings import DiffConfig
    from favor.doctor.settings import DoctorConfig
    from favor.eval.evaluate import EvalConfig
    from favor.eval.score import ScoreConfig
    from favor.export.run import ExportConfig
    from favor.generate.prefer import PreferConfig
    from favor.generate.samples import SamplesConfig
    from favor.label.settings import LabelConfig
    from favor.lint.settings import LintConfig
    from favor.online import OnlineConfig
    from favor.realign.run import RealignConfig
    from favor.train.ppo import PpoConfig
    from favor.train.preference import TrainConfig
    from favor.train.reward import RewardTrainConfig
    from favor.train.sft import SftConfig
    from favor.value.settings import ValueConfig
    from favor.winrate.run import WinrateConfig

    model, data = {"model": {"path": "m"}}, {"data": {"train": "d"}}
    reward, run = {"reward": {"kind": "model", "path": "r"}}, {"run": "r"}
    made = {"out": "o", "prompts": "p"}
    return {
        TrainConfig: run | model | data,
        SftConfig: run | model | data,
        RewardTrainConfig: run | model | data,
        PpoConfig: run | model | data | reward,
        EvalConfig: run,
        ScoreConfig: {"out": "o", "data": "d"} | reward,
        SamplesConfig: made | {"engine": model},
        PreferConfig: made | {"engine": model} | reward,
        WinrateConfig: run | {"a": {"file": "a"}, "b": {"file": "b"}, "judge": {"kind": "callable", "path": "j.py:f"}},
        DiffConfig: {"a": {"path": "a"}, "b": {"path": "b"}, "prompts": "p"},
        OnlineConfig: run | model | reward | {"prompts": "p"},
        LabelConfig: {"data": "d"},
        ChatConfig: {"run": "r"},
        RealignConfig: {"run": "r"},
        ExportConfig: {"run": "r", "out": "o"},
        LintConfig: data,
        ValueConfig: model | data,
        AskConfig: model | {"pool": "p", "out": "o"},
        AuditConfig: run | {"data": "d", "judge": {"kind": "callable", "path": "j.py:f"}},
        FrontierConfig: run,
        DemoConfig: run,
        DoctorConfig: {},
        ConformConfig: {"adapter": "favor"},
    }


RECIPES = 23


def keys_of(schema, prefix=""):
    from favor.settings import _keys

    return list(_keys(schema, prefix))


SETTINGS = st.one_of(
    SCALARS,
    VALUES,
    st.sampled_from(["auto", "none", "float32", "linear", "adamw", "tree", "rows", "stored", "live", 2, 8, 0.5, True]),
)


@tried(15, 1000)
@pytest.mark.parametrize("number", range(RECIPES))
def test_any_settings_are_refused_or_come_back_from_toml(number, examples):
    """ConfigError or a record that equals what its own TOML loads as; nothing else."""
    schema, minimal = list(recipes().items())[number]
    names = st.one_of(
        st.sampled_from(keys_of(schema)), NAMES, st.text(max_size=4).map(lambda text: text.replace("=", "") or "x")
    )

    def override(name, value):
        return f"{name}={value if isinstance(value, str) else json.dumps(value)}"

    def check(changes):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "r.toml"
            import tomli_w

            path.write_text(tomli_w.dumps(minimal), "utf-8")
            found = refused_or(ConfigError, lambda: load(schema, path, [override(*change) for change in changes]))
            if not isinstance(found, ConfigError):
                path.write_text(dump(found), "utf-8")
                assert load(schema, path) == found

    hold(examples, check, st.lists(st.tuples(names, SETTINGS), max_size=4))


def test_the_recipes_are_all_there_are():
    """Each command's recipe is among those tried."""
    from favor import cli

    assert len(recipes()) == RECIPES
    assert {make().config for make in cli.COMMANDS.values()} == set(recipes())
    for schema, minimal in recipes().items():
        try:
            schema.model_validate(minimal)
        except ValidationError as error:
            pytest.fail(f"{schema.__name__}: {error}")
