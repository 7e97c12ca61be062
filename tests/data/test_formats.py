"""Every published format is recognised by its columns and gives exactly the trees it means."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from favor.data import batches
from favor.data.formats import FORMATS, Format, Judgment, RowError, columns_of, recognise
from favor.data.grow import ReadReport, Rules, grow
from favor.data.read import DataConfig, read
from favor.data.settings import SourceConfig
from favor.data.tokenize import TokensConfig, tokenize
from favor.data.types import Comparison, Thumb
from favor.errors import DataError


def say(role, text):
    return {"role": role, "content": text}


FOLDER = Path(__file__).parent / "formats"
C = Comparison

# fixture: its format, and of each tree (comparisons, ties, thumbs)
MEANT = {
    "trl_standard": ("pairs", [([C((0, 1))], [], []), ([C((0, 1), gaps=(2.0,))], [], [])]),
    "trl_conversational": ("pairs", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "trl_implicit_prompt": ("pairs", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "trl_unpaired": ("thumbs", [([], [], [Thumb(0, True), Thumb(1, False)]), ([], [], [Thumb(0, True)])]),
    "anthropic_hh": ("pairs", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "ultrafeedback": (
        "ultrafeedback",
        [
            ([C((1, 2, 3, 0), gaps=(2.5, 3.0, 1.0))], [], []),
            ([C((0, 3), gaps=(1.5,)), C((0, 1), gaps=(2.5,)), C((2, 3), gaps=(1.5,)), C((2, 1), gaps=(2.5,)), C((3, 1), gaps=(1.0,))], [C((0, 2))], []),
        ],
    ),
    "ultrafeedback_binarized": ("ultrafeedback_binarized", [([C((0, 1), gaps=(2.5,))], [], []), ([], [C((0, 1))], [])]),
    "shp": ("shp", [([C((0, 1), gaps=(2.0,)), C((2, 1), gaps=(1.0,))], [], [])]),
    "helpsteer": ("helpsteer", [([C((0, 2, 1), gaps=(1.0, 3.0))], [], []), ([], [], [])]),
    "helpsteer2": ("helpsteer", [([], [C((0, 1))], []), ([], [], [])]),
    "helpsteer2_preference": ("helpsteer2_preference", [([C((0, 1), gaps=(2.0,))], [], []), ([C((1, 0), gaps=(1.0,))], [], [])]),
    "helpsteer3": ("helpsteer3", [([C((0, 1), gaps=(3.0,))], [], []), ([C((1, 0), gaps=(2.0,))], [], []), ([], [C((0, 1))], [])]),
    "nectar": ("nectar", [([C((0, 1, 2, 3, 4, 5, 6))], [], []), ([C((0, 1)), C((0, 2))], [C((1, 2))], [])]),
    "openai_tldr": ("openai_tldr", [([C((0, 1)), C((2, 1))], [], [])]),
    "openai_preference": ("openai_preference", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "kto_alpaca": ("alpaca", [([], [], [Thumb(0, True), Thumb(1, False)])]),
    "alpaca_ranking": ("alpaca", [([C((0, 1, 2))], [], []), ([C((0, 1))], [], [])]),
    "alpaca_pairs": ("alpaca", [([C((0, 1))], [], [])]),
    "sharegpt": ("sharegpt", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "kto_sharegpt": ("sharegpt", [([], [], [Thumb(0, True), Thumb(1, False)])]),
    "votes": ("votes", [([C((0, 1), label=0.75)], [], []), ([C((0, 2, 1))], [], []), ([], [C((0, 1))], [])]),
    "votes_choices": ("votes", [([C((0, 1), label=0.625)], [], []), ([C((1, 0))], [], [])]),
    "verdict": ("verdict", [([C((0, 1))], [], []), ([C((1, 0), label=5 / 6)], [], []), ([], [], [Thumb(0, False), Thumb(1, False)]), ([], [C((0, 1))], [])]),
    "ties": ("pairs", [([], [C((0, 1))], []), ([C((0, 1))], [], [])]),
    "ranked": ("ranked", [([C((2, 1, 0))], [], []), ([C((0, 1), gaps=(4.0,)), C((2, 1), gaps=(4.0,))], [C((0, 2))], [])]),
    "sft": ("sft", [([], [], []), ([], [], [])]),
    "trl_tools": ("pairs", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "trl_thinking": ("pairs", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "openai_tools": ("openai_preference", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "sharegpt_tools": ("sharegpt", [([C((0, 1))], [], []), ([C((0, 1))], [], [])]),
    "sft_tools": ("sft", [([], [], []), ([], [], [])]),
}  # fmt: skip


def rows_of(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


def load(name, **settings):
    path = str(FOLDER / f"{name}.jsonl")
    # a list of answers is a ranking only where the format is named
    settings = {"format": "alpaca"} | settings if name == "alpaca_ranking" else settings
    return read(path, DataConfig(train=path, **settings), "train")


def test_every_fixture_and_format_is_here():
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(MEANT)
    assert {name for name, _ in MEANT.values()} == set(FORMATS)


@pytest.mark.parametrize("name", MEANT)
def test_fixture_is_recognised_and_means_what_it_says(name):
    form, meant = MEANT[name]
    assert {recognise(row) for row in rows_of(name)} == {form}
    trees, report = load(name)
    assert [(list(t.comparisons), list(t.ties), list(t.thumbs)) for t in trees] == meant
    assert report.format == form
    assert report.num_rows == len(rows_of(name)) == sum(len(tree.rows) for tree in trees)
    assert load(name, format=form)[0] == trees


@pytest.mark.parametrize("name", MEANT)
def test_fixture_trains(name):
    """Read, tokenised and packed, every fixture gives finite tensors with all its comparisons."""
    texts, _ = load(name)
    made = tiny.tokenizer(tiny.template_of(name))
    tokens, _ = tokenize(texts, made, TokensConfig(max_tokens=2048), frozenset({2}), "error")
    for layout in ("tree", "rows"):
        batch = batches.build(tokens, layout)
        for value in vars(batch).values():
            assert not hasattr(value, "isfinite") or value.isfinite().all()
        assert batch.weight_Q.numel() == sum(len(tree.comparisons) for tree in texts)
        assert batch.good_I.numel() == sum(len(tree.thumbs) for tree in texts)
        assert batch.weight_U.numel() == sum(len(tree.ties) for tree in texts)


def test_prompts_and_responses_as_they_are_shown_to_the_model():
    (tldr,), _ = load("openai_tldr")
    assert tldr.prompt == (
        "SUBREDDIT: r/gardening\n\nTITLE: My tomatoes split\n\n"
        "POST: I water them once a week and after rain they split.\n\nTL;DR:"
    )
    assert tldr.responses == (" Tomatoes split after rain.", " Tomatoes.", " Tomatoes split: water more evenly?")
    assert load("nectar")[0][1].prompt == (say("user", "Hi"), say("assistant", "Hello!"), say("user", "Name a hill."))
    assert load("helpsteer2")[0][0].prompt == (
        say("user", "Hello"),
        say("assistant", "Hi, what is it?"),
        say("user", "Name a bird."),
    )
    binarized = load("ultrafeedback_binarized")[0][0]
    assert (binarized.prompt, binarized.responses[1]) == (
        (say("user", "What is the third planet?"),),
        (say("assistant", "Mars."),),
    )
    hot, fruit = load("alpaca_ranking")[0]
    assert (hot.prompt, hot.responses) == ("Give the opposite.\nhot", ("cold", "cool", "warm"))
    assert [m["role"] for m in fruit.prompt] == ["system", "user", "assistant", "user"]
    assert [m["role"] for m in load("sharegpt")[0][0].prompt] == ["user", "assistant", "user"]
    assert load("openai_preference")[0][1].tools[0]["function"]["name"] == "weather"
    assert load("helpsteer")[1].lone_scores == 1


def roles(turns):
    """Who speaks; of a turn with calls the names and arguments."""
    return [
        [(call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", [])]
        or turn["role"]
        for turn in turns
    ]


def test_calls_as_openai_writes_them_are_read_as_they_are():
    """Several of one turn, each with its arguments, which are JSON text; tools as a list and as JSON text."""
    oslo, rome = '{"city": "Oslo"}', '{"city": "Rome"}'
    both, late = [("weather", oslo), ("weather", rome)], [("time", oslo)]
    whole, step = load("trl_tools")[0]
    assert roles(whole.prompt) == ["user"]
    assert roles(whole.responses[0]) == [both, "tool", "tool", "assistant"]
    assert roles(whole.responses[1]) == [[("weather", oslo)], "tool", "assistant"]
    assert [turn["tool_call_id"] for turn in whole.responses[0][1:3]] == ["call_0", "call_1"]
    assert roles(step.prompt) == ["user", [("weather", oslo)], "tool"]
    assert [roles(side) for side in step.responses] == [[late], ["assistant"]]
    assert whole.tools == step.tools
    first, second = load("openai_tools")[0]
    assert [roles(side) for side in first.responses] == [[both], ["assistant"]]
    assert (roles(second.prompt), roles(second.responses[1])) == (["user", late, "tool"], [late])
    told, asked = load("sft_tools")[0]
    assert roles(told.prompt) == ["system", "user", [("weather", oslo)], "tool"]
    assert roles(asked.responses[0]) == [both]
    for tree in (whole, first, second, told):
        assert {"weather": 1, "time": 1}.keys() >= {tool["function"]["name"] for tool in tree.tools} > set()


def test_calls_and_observations_of_sharegpt():
    """A function_call is one call or a list of them, all of one turn; a side may be a list of turns."""
    oslo, rome = {"city": "Oslo"}, {"city": "Rome"}
    whole, step = load("sharegpt_tools")[0]
    assert roles(whole.prompt) == ["system", "user"]
    assert roles(whole.responses[0]) == [[("weather", oslo), ("weather", rome)], "tool", "assistant"]
    assert whole.responses[0][1]["content"] == "[5, 18]"
    assert whole.responses[1] == (say("assistant", "In Rome."),)
    assert roles(step.prompt) == ["user", [("weather", oslo)], "tool"]
    assert [roles(side) for side in step.responses] == [[[("time", oslo)]], ["assistant"]]
    assert [tool["name"] for tool in whole.tools] == ["weather", "time"]


def test_reasoning_and_variables_are_read_as_they_are():
    thinking, brief = load("trl_thinking")[0]
    assert [side[0]["reasoning_content"] for side in thinking.responses] == ["7 times 8 is 56.", "7 times 8 is 54."]
    assert thinking.template_kwargs == {"enable_thinking": True}
    assert "reasoning_content" not in brief.responses[0][0]
    assert brief.template_kwargs == {"enable_thinking": False}
    assert thinking.prompt == brief.prompt


def test_agents_rows_by_other_names_are_read_by_columns_alone(tmp_path):
    """As sets name them that hold the messages so far and two answers."""
    (whole, step), (thinking, brief) = rows_of("trl_tools"), rows_of("trl_thinking")
    names = {
        "prompt": "messages",
        "chosen": "chosen_response",
        "rejected": "rejected_response",
        "tools": "functions",
        "chat_template_kwargs": "template.kwargs",
    }
    rows = [
        {names[key]: value for key, value in row.items() if key != "chat_template_kwargs"}
        for row in (whole, step, thinking, brief)
    ]
    for row, fixture in zip(rows[2:], (thinking, brief), strict=True):
        row["template"] = {"kwargs": fixture["chat_template_kwargs"]}
    path = tmp_path / "r.jsonl"
    for kinds, fixture in ((rows[:2], "trl_tools"), (rows[2:], "trl_thinking")):
        path.write_text("".join(json.dumps(row) + "\n" for row in kinds))
        used = {ours: theirs for ours, theirs in names.items() if ours in rows_of(fixture)[0]}
        trees, _ = read(str(path), DataConfig(train=str(path), columns=used), "train")
        for tree, meant in zip(trees, load(fixture)[0], strict=True):
            assert (tree.prompt, tree.responses, tree.tools) == (meant.prompt, meant.responses, meant.tools)
            assert (tree.comparisons, tree.template_kwargs) == (meant.comparisons, meant.template_kwargs)


MALFORMED = [
    ("trl_unpaired", {"label": 1}, "label is 1, expected true"),
    ("ultrafeedback", {"completions": []}, "completions must be a list of at least 2 objects"),
    ("ultrafeedback", {"completions": [{"response": "a"}, {"response": "b"}]}, r"completions\[0\] has no overall_score"),
    ("ultrafeedback", {"completions": [{"overall_score": 1}, {"overall_score": 2}]}, r"completions\[0\].response must be"),
    ("ultrafeedback", {"completions": [{"response": "a", "annotations": {"x": {"Rating": "high"}}}] * 1 + [{"response": "b", "overall_score": 1}]}, r"annotations.x.Rating is 'high'"),
    ("ultrafeedback_binarized", {"score_chosen": 1.0}, "score_chosen is 1 and score_rejected 6"),
    ("ultrafeedback_binarized", {"score_chosen": "8"}, "score_chosen is '8'"),
    ("ultrafeedback_binarized", {"prompt": "Another."}, "prompt is not among the turns"),
    ("shp", {"labels": 2}, "labels is 2"),
    ("shp", {"labels": 0}, "labels says that comment B is better, but score_A"),
    ("shp", {"human_ref_B": ""}, "human_ref_B is empty"),
    ("shp", {"score_A": 0, "score_B": 0, "score_ratio": 0.5}, "score_ratio is 0.5"),
    ("helpsteer", {"helpfulness": "4"}, "helpfulness is '4'"),
    ("helpsteer2", {"prompt": "a<extra_id_1>Robot\nb"}, "prompt has a turn of 'Robot'"),
    ("helpsteer2_preference", {"preference_strength": 4}, "preference_strength is 4"),
    ("helpsteer3", {"overall_preference": None}, "column 'overall_preference' is missing"),
    ("helpsteer3", {"context": []}, "context must be text or a list"),
    ("nectar", {"answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]}, r"answers\[1\].rank is None"),
    ("nectar", {"prompt": "\n\nHuman: hi\n\nAssistant: there"}, "prompt must end with what the human says"),
    ("openai_tldr", {"choice": 2}, "choice is 2"),
    ("openai_tldr", {"info": {"title": "t"}}, "info.subreddit is None"),
    ("openai_tldr", {"summaries": [{"text": "a"}, {"text": 3}]}, r"summaries\[1\].text must be text"),
    ("openai_preference", {"input": "hi"}, "input must be an object"),
    ("openai_preference", {"preferred_output": [{"role": "user", "content": "x"}]}, "preferred_output ends with a turn of 'user'"),
    ("kto_alpaca", {"kto_tag": "yes"}, "kto_tag is 'yes'"),
    ("alpaca_ranking", {"output": ["one"]}, "output must be text, or a list of at least two"),
    ("alpaca_ranking", {"history": ["a"]}, "history must hold pairs"),
    ("alpaca_pairs", {"rejected": None}, "column 'rejected' is missing"),
    ("sharegpt", {"chosen": "text"}, r"chosen\[0\] is not a turn"),
    ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\].from is 'robot'"),
    ("sharegpt", {"chosen": []}, "chosen must be a list of turns"),
    ("sharegpt", {"chosen": [{"from": "gpt", "value": "a"}, {"from": "observation", "value": "b"}]}, "chosen ends with a turn of 'tool'"),
    ("sharegpt", {"chosen": [{"from": "gpt", "value": "a"}, "b"]}, r"chosen\[1\] is not a turn"),
    ("sharegpt", {"chosen": {"from": "function_call", "value": "look(1)"}}, r"chosen\[0\].value is not a function call: not JSON"),
    ("sharegpt", {"chosen": {"from": "function_call", "value": "[]"}}, r"chosen\[0\].value must be the JSON of a function call.* or a list"),
    ("sharegpt", {"chosen": {"from": "function_call", "value": "[1]"}}, r"chosen\[0\].value must be the JSON of a function call"),
    ("sharegpt", {"chosen": {"from": "function_call", "value": '{"arguments": {}}'}}, r"chosen\[0\].value must be .* with name and arguments"),
    ("votes", {"votes": [1]}, "votes must be a list of 2"),
    ("votes", {"votes": [0, 0]}, "at least one above 0"),
    ("votes_choices", {"choices": [0, 2]}, "choices holds 2"),
    ("ranked", {"ranking": [0, 1]}, r"ranking \[0, 1\] is not an order"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), MALFORMED)
def test_malformed_row_names_its_column(name, change, message):
    row = {key: value for key, value in (rows_of(name)[0] | change).items() if value is not None}
    with pytest.raises(RowError, match=message):
        FORMATS[MEANT[name][0]](row)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[]), max_size=5)
    | st.sampled_from(["", "\ud800", "\n\nHuman: a\n\nAssistant: b", "{", "[1]", "9" * 400, 10**400, -(10**400), "user", "assistant", "gpt", "N/A"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "from", "value", "tool_calls", "answer", "rank", "Rating", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_column_is_read_or_refused(data):
    """Nothing but a RowError; what is read has finite numbers and text that can be written."""
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    fixture = data.draw(st.sampled_from(sorted(f for f, (form, _) in MEANT.items() if form == name)))
    row = dict(rows_of(fixture)[0])
    for column in data.draw(st.lists(st.sampled_from(sorted(columns_of(name) | {"history"})), min_size=1, max_size=3)):
        row[column] = data.draw(ODD)
    if data.draw(st.booleans()):
        inside = [value for value in row.values() if isinstance(value, list) and value]
        for value in inside[:2]:
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(ODD)
    row = {key: value for key, value in row.items() if value is not None}
    judgment = None
    with contextlib.suppress(RowError):
        judgment = FORMATS[name](row)
    if judgment is None:
        return
    tree = grow([(1, judgment)], Rules(), "f", ReadReport("f", name))
    json.dumps([tree.prompt, tree.responses], ensure_ascii=False).encode("utf-8")
    assert all(math.isfinite(x) for c in (*tree.comparisons, *tree.ties) for x in (c.weight, c.label, *c.gaps))


def test_unknown_columns_name_the_nearest_format():
    with pytest.raises(
        RowError, match=r"columns \(chosen_answer, prompt, rejected_answer\).*nearest is pairs \(chosen \+ rejected\)"
    ):
        recognise({"prompt": "p", "chosen_answer": "a", "rejected_answer": "b"})
    with pytest.raises(RowError, match=r"give 'verdict=.*nearest is shp "):
        recognise({"history": "p", "human_ref_a": "a", "human_ref_b": "b", "label_": 1})


def test_columns_are_mapped(tmp_path):
    rows = [
        {"question": "p", "rejected": "good", "chosen": "bad", "x": {"list": [{"d": 3}]}},
        {"question": "q", "rejected": "good", "chosen": "bad", "x": {"list": [{"d": 1}]}},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "question", "chosen": "rejected", "rejected": "chosen", "margin": "x.list.0.d"}
    trees, _ = read(str(path), DataConfig(train=str(path), columns=columns), "train")
    assert [(t.prompt, t.responses, t.comparisons) for t in trees] == [
        ("p", ("good", "bad"), (C((0, 1), gaps=(3.0,)),)),
        ("q", ("good", "bad"), (C((0, 1), gaps=(1.0,)),)),
    ]
    with pytest.raises(
        DataError,
        match=r"row 1: column 'ask', which columns.prompt names, is missing or empty; those with a value are question, rej",
    ):
        read(str(path), DataConfig(train=str(path), columns={"prompt": "ask"}), "train")
    with pytest.raises(ValueError, match="columns maps 'promt'.*did you mean 'prompt'"):
        DataConfig(train="x", columns={"promt": "question"})


def line_of_docs(name, form):
    """A format's line in the table of docs/formats.md."""
    needs = " or ".join(" + ".join(f"`{column}`" for column in names) for names in form.needs)
    also = ", ".join(f"`{column}`" for column in sorted(form.also))
    return f"| [{name}](#{name}) | {needs} | {also} | {', '.join(sorted(form.says))} |"


def undocumented(formats):
    """Formats without a line in the table of docs/formats.md, or without a section whose rows are read as of it."""
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text("utf-8")
    shown = set()
    for section in page.split("\n## ")[1:]:
        name = section.split("\n", 1)[0]
        for block in section.split("```json\n")[1:]:
            for line in block.split("```")[0].splitlines():
                row = json.loads(line)
                assert recognise(row) == name
                formats[name](row)
                shown.add(name)
    assert shown <= set(formats)
    return [n for n, form in formats.items() if n not in shown or line_of_docs(n, form) not in page.splitlines()]


def test_every_format_and_every_row_of_the_docs():
    """docs/formats.md: a line and a section a format, and the rows shown there can be read."""
    assert undocumented(FORMATS) == []


def test_a_format_added_to_the_table_is_recognised_read_and_missed_in_the_docs(monkeypatch):
    duel = Format(
        lambda row: Judgment(row["asked"], (row["won"], row["lost"]), ((0, 1),)),
        (("asked", "won", "lost"),),
        frozenset({"weight"}),
        frozenset({"order", "sides"}),
    )
    row = {"asked": "p", "won": "a", "lost": "b", "weight": 2}
    with pytest.raises(RowError, match="of no known format"):
        recognise(row)
    assert "won" not in columns_of("auto")
    monkeypatch.setitem(FORMATS, "duel", duel)
    assert recognise(row) == "duel"
    assert FORMATS["duel"](row) == Judgment("p", ("a", "b"), ((0, 1),), 2.0, placed=True)
    with pytest.raises(RowError, match="weight is -1, expected a positive number"):
        FORMATS["duel"](row | {"weight": -1})
    with pytest.raises(RowError, match=r"nearest is duel \(asked \+ won \+ lost\)"):
        recognise({"asked": "p", "winn": "a", "lost": "b"})
    assert DataConfig(train="x", format="duel", columns={"won": "w"}, compare={"pairing": "all"}).format == "duel"
    with pytest.raises(ValueError, match="data.compare.min_gap would be ignored: format duel has no scores"):
        DataConfig(train="x", format="duel", compare={"min_gap": 1})
    assert undocumented(FORMATS) == ["duel"]


def test_no_format_hides_another():
    """A row with just the columns that a format is recognised by is of that format, not of one above it."""
    for name, form in FORMATS.items():
        for needs in form.needs:
            assert recognise(dict.fromkeys(needs, "x")) == name
        assert form.says <= {"order", "scores", "votes", "thumbs", "sides"}


def test_format_names_and_columns():
    for name in FORMATS:
        assert SourceConfig(path="x", format=name).format == name
        assert columns_of(name)
    with pytest.raises(ValueError, match="format 'votez' is unknown; did you mean 'votes'"):
        DataConfig(train="x", format="votez")
