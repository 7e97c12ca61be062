"""Two answers and a verdict, under any names and values; and what may not be guessed about labels."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest

from favor.config import load
from favor.data.formats import FORMATS, RowError, recognise
from favor.data.formats.columns import VerdictConfig
from favor.data.grow import ReadReport
from favor.data.prepare import summary
from favor.data.prompts import read_prompts
from favor.data.read import DataConfig, read
from favor.data.settings import SourceConfig
from favor.data.store import group
from favor.data.types import Comparison, Thumb
from favor.errors import ConfigError, DataError
from favor.lint.models import Gap, noise_checks
from favor.lint.rows import row_of
from favor.lint.run import lint
from favor.lint.settings import LintConfig, LintSettings
from favor.words import expanded

C = Comparison
VALUES = {"first": ["model_a", 1], "second": ["model_b", 2], "tie": ["tie", 0.5], "both_bad": ["tie (bothbad)", True]}
TABLE = {"first": "ask.a", "second": "ask.b", "column": "winner", "values": VALUES}


def row(winner, n=0, **more):
    return {"question": f"Name a thing, {n}.", "ask": {"a": "A stone.", "b": "A house."}, "winner": winner, **more}


def load_rows(tmp_path, rows, columns=True, **settings):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    settings = {"verdict": TABLE} | ({"columns": {"prompt": "question"}} if columns else {}) | settings
    config = DataConfig(train=str(path), **settings)
    found = read(str(path), config, "train")
    source = SourceConfig(path=str(path))
    work, report = Path(tempfile.mkdtemp(dir=tmp_path)), ReadReport(str(path), config.format_of(source))
    trees = list(group(source, config, "all", work, report))
    assert (trees, report) == (list(found[0]), found[1])
    return found


@pytest.mark.parametrize(
    ("said", "comparisons", "ties", "thumbs"),
    [
        ("model_a", [C((0, 1))], [], []),
        ("model_b", [C((1, 0))], [], []),
        (2.0, [C((1, 0))], [], []),
        ("tie", [], [C((0, 1))], []),
        ("tie (bothbad)", [], [], [Thumb(0, False), Thumb(1, False)]),
        (True, [], [], [Thumb(0, False), Thumb(1, False)]),
        (["model_a", "model_b", "model_a", "tie"], [C((0, 1), label=0.625)], [], []),
        (["model_b", "tie (bothbad)"], [C((1, 0), label=0.75)], [], []),
        (["model_b", "tie (bothbad)", True], [], [], [Thumb(0, False), Thumb(1, False)]),
        ([1, 2], [], [C((0, 1))], []),
    ],
    ids=str,
)
def test_a_verdict_means_what_the_table_says(tmp_path, said, comparisons, ties, thumbs):
    (tree,), report = load_rows(tmp_path, [row(said)])
    assert (tree.prompt, tree.responses) == ("Name a thing, 0.", ("A stone.", "A house."))
    assert [list(tree.comparisons), list(tree.ties), list(tree.thumbs)] == [comparisons, ties, thumbs]
    assert (report.format, report.both_bad, report.num_placed) == ("verdict", bool(thumbs), bool(comparisons))
    shown = summary(asdict(report), {})
    assert ("1 rows that judge both responses bad" in shown) is bool(thumbs)
    assert ("the first response preferred in" in shown) is bool(comparisons)


def test_an_annotator_a_column(tmp_path):
    table = {"first": "a", "second": "b", "column": ["by.0", "x", "y"], "values": {"first": ["A"], "second": ["B"]}}
    rows = [
        {"prompt": "p", "a": "one", "b": "two", "by": ["A"], "x": "A", "y": "B"},
        {"prompt": "q", "a": "one", "b": "two", "y": "B", "x": None},
    ]
    trees, _ = load_rows(tmp_path, rows, columns=False, verdict=table)
    assert [tree.comparisons for tree in trees] == [(C((0, 1), label=pytest.approx(2 / 3)),), (C((1, 0)),)]
    with pytest.raises(DataError, match=r"row 1: none of the verdict's columns by.0, x, y has a value"):
        load_rows(tmp_path, [{"prompt": "p", "a": "one", "b": "two"}], columns=False, verdict=table)
    (tree,), _ = load_rows(tmp_path, rows[:1], columns=False, verdict=table, compare={"votes": "majority"})
    assert tree.comparisons == (C((0, 1)),)


def test_whole_conversations_are_read_as_in_pairs(tmp_path):
    said = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}] for text in ("yes", "no")]
    table = {"first": "conversation_a", "second": "conversation_b", "column": "winner", "values": VALUES}
    rows = [{"conversation_a": said[0], "conversation_b": said[1], "winner": "model_b"}]
    (tree,), _ = load_rows(tmp_path, rows, columns=False, verdict=table)
    assert tree.prompt == ({"role": "user", "content": "hi"},)
    assert tree.comparisons == (C((1, 0)),)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            row("model_c"),
            r"row 2: the verdict is 'model_c', and verdict.values holds only first \['model_a', 1\], second",
        ),
        (row(False), "the verdict is False, and"),
        (row("1"), "the verdict is '1', and"),
        (row([["model_a"]]), r"the verdict is \['model_a'\], and"),
        (row(None), "column 'winner', which verdict.column names, is missing or empty"),
        (row([]), "none of the verdict's columns winner has a value"),
        (row(1) | {"ask": {"a": "x"}}, "column 'ask.b', which verdict.second names, is missing or empty"),
        (row(1) | {"ask": {"a": "x", "b": "x"}}, "two of its responses are the same"),
    ],
)
def test_a_verdict_that_is_not_known_is_refused(tmp_path, bad, message):
    with pytest.raises(DataError, match=f"{message}.*data.bad_rows=drop"):
        load_rows(tmp_path, [row(1, 7), bad])
    _, report = load_rows(tmp_path, [row(1, 7), bad], bad_rows="drop")
    assert [number for number, _ in report.dropped] == [2]


def test_settings_that_contradict_each_other():
    values = {"first": ["a"], "second": ["b"]}
    table = {"first": "x", "second": "y", "column": "z", "values": values}
    for change, message in (
        ({"values": values | {"tie": ["a"]}}, "'a' appears twice"),
        ({"values": values | {"second": []}}, "at least 1 item"),
        ({"column": "x"}, "must be different columns"),
        ({"column": []}, "must be different columns"),
    ):
        with pytest.raises(ValueError, match=message):
            VerdictConfig.model_validate(table | change)
    # the same in Python, and not the same value
    VerdictConfig.model_validate(table | {"values": {"first": [1], "second": [True]}})
    for more, message in (
        ({"format": "pairs"}, "format says pairs; drop one"),
        ({"columns": {"first": "x"}}, "columns maps first, which verdict names already"),
        ({"compare": {"min_gap": 1.0}}, "data.compare.min_gap would be ignored"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(train="f", verdict=table, **more)
    with pytest.raises(ValueError, match="format says votes"):
        SourceConfig(path="f", format="votes", verdict=table)
    config = DataConfig(verdict=table, sources=[{"path": "f", "format": "pairs"}, {"path": "g"}])
    assert [config.format_of(source) for source in config.parts] == ["pairs", "verdict"]
    words = ["data.train=f", 'data.verdict={first="x", second="y", column="z", values={first=["a"], second=["b"]}}']
    assert load(LintConfig, None, words).data.verdict == VerdictConfig.model_validate(table)
    with pytest.raises(ConfigError, match="verdict"):
        load(LintConfig, None, [*words, "data.format=pairs"])


def test_a_list_of_answers_is_no_ranking_unless_the_format_is_named(tmp_path):
    rows = [{"instruction": "Name a thing.", "output": "A house."}, {"instruction": "Name two.", "output": ["a", "b"]}]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match="row 2: output is a list, which may be a ranking.*data.format=alpaca"):
        read(str(path), DataConfig(train=str(path)), "train")
    _, report = read(str(path), DataConfig(train=str(path), bad_rows="drop"), "train")
    assert [number for number, _ in report.dropped] == [2]
    trees, _ = read(str(path), DataConfig(train=str(path), format="alpaca"), "train")
    assert trees[1].comparisons == (C((0, 1)),)
    assert [prompt for _, prompt in read_prompts(str(path), "train")] == ["Name a thing.", "Name two."]
    found = {f.kind: f for f in lint(load(LintConfig, None, [f"data.train={path}"]))}
    assert found["malformed"].rows == ((str(path), 2),)


def test_lint_says_when_labels_lean_to_a_side(tmp_path):
    path = tmp_path / "r.jsonl"
    words = [f"data.train={path}", "data.columns={prompt='question'}", "lint.language=false", "lint.near=0"]
    words.append("data.verdict={first='ask.a', second='ask.b', column='winner', values={first=[1], second=[2]}}")
    for second, severity, share in ((40, "warning", 0), (20, "note", 50), (2, "warning", 95)):
        path.write_text("".join(json.dumps(row(2 if n < second else 1, n)) + "\n" for n in range(40)))
        found = {f.kind: f for f in lint(load(LintConfig, None, words))}
        assert found["position"].severity == severity
        assert f"the first response is preferred in {share}% of 40" in found["position"].message
        assert "unread_column" not in found
    path.write_text(json.dumps({"prompt": "p", "chosen": "a b", "rejected": "b a"}) + "\n")
    assert "position" not in {f.kind for f in lint(load(LintConfig, None, words[:1]))}


def test_lint_says_when_a_reward_is_against_most_labels():
    for against, severity in ((50, "warning"), (20, "note")):
        gaps = [
            Gap(row_of("train", ("f", i), {}, RowError("")), -1.0 if i < against else 1.0, "a", "b") for i in range(60)
        ]
        found = {f.kind: f for f in noise_checks(gaps, "the reward", LintSettings().noise)}
        assert found["agreement"].severity == severity


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"question": "p", "answer": "a"}, '\'columns={prompt="question", completion="answer"}\''),
        ({"question": "p", "good": "a", "bad": "b"}, '\'columns={prompt="question", chosen="good", rejected="bad"}\''),
        ({"prompt": "p", "non_preferred": "a", "preferred": "b", "x": 1}, '\'columns={chosen="preferred", rejected="non_preferred"}\''),
        ({"query": "p", "answer_a": "a", "answer_b": "b", "winner": 1}, '\'verdict={first="answer_a", second="answer_b", column="winner", values={first=[1], second=[...]}}\' and \'columns={prompt="query"}\''),
    ],
)  # fmt: skip
def test_a_row_of_no_format_is_shown_with_a_line_to_try(given, line):
    with pytest.raises(RowError) as caught:
        recognise(given)
    said = str(caught.value)
    assert line in said
    assert all(f"{name} = {value!r}" in said for name, value in given.items())
    assert len(said.splitlines()) == 1
    # the line is read as it stands
    words = [word.replace("...", '"?"') for word in line.strip("'").split("' and '")]
    columns = load(LintConfig, None, expanded("lint", ["data.train=f", *words])).data.columns
    if "verdict" not in line:
        mapped = {ours: given[theirs] for ours, theirs in columns.items()} | given
        assert recognise(mapped) in ("pairs", "sft")


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("pairs", {"margin": 10**400}),
        ("pairs", {"weight": 10**400}),
        ("pairs", {"weight": 1e-300}),
        ("pairs", {"margin": float("nan")}),
        ("pairs", {"tie": [[]]}),
        ("ranked", {"responses": ["a", "b"], "scores": [10**400, 1]}),
        ("ranked", {"responses": ["a", "b"], "scores": [1e308, -1e308]}),
        ("ranked", {"responses": ["a", "b"], "ranking": [[0], 1]}),
        ("votes", {"responses": ["a", "b"], "choices": [{}, 1]}),
        ("verdict", {"first": "a", "second": "b", "verdict": {}}),
        ("verdict", {"first": "a", "second": "b", "verdict": [[]]}),
        ("helpsteer2_preference", {"response_1": "a", "response_2": "b", "preference_strength": float("inf")}),
        ("pairs", {"chosen": [{"role": ["assistant"], "content": "a"}]}),
        ("pairs", {"chosen": [{"role": "assistant", "content": 5, "tool_calls": [1]}]}),
    ],
)
def test_odd_values_are_row_errors(name, odd):
    with pytest.raises(RowError) as caught:
        FORMATS[name]({"prompt": "p", "chosen": "a", "rejected": "b"} | odd)
    assert len(str(caught.value)) < 400


def test_numbers_from_tables_are_indices():
    """A column of integers with gaps comes back from a table as floats."""
    post = {"subreddit": "r/x", "title": "t", "post": "p"}
    given = {"info": post, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1.0}
    assert [type(i) for i in FORMATS["openai_tldr"](given).orders[0]] == [int, int]
