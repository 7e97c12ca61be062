"""Responses of several turns: what the model said is scored, what others said is read, and nothing is seen that would not be."""

import json
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from favor.ask.settings import AskConfig
from favor.cli import main
from favor.data.batches import build
from favor.data.prepare import prepare
from favor.data.prompts import read_prompts
from favor.data.read import DataConfig, read
from favor.data.splits import Streams, encode, hash_ids
from favor.data.tokenize import TokensConfig, tokenize
from favor.data.types import Comparison, PromptTree, TokenTree, as_read, said
from favor.errors import CheckpointError, ConfigError, DataError
from favor.eval.score import ScoreConfig
from favor.eval.score import _rows as scored_rows
from favor.label.intake import Tally, _data
from favor.label.settings import LabelConfig
from favor.lint.cheap import CHECKS
from favor.lint.settings import LintConfig
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import ModelConfig, make_policy
from favor.model.logprobs import response_logps, scored_logps
from favor.model.template import with_defaults
from favor.online import OnlineConfig
from favor.train.ppo import PpoConfig
from favor.train.preference import TrainConfig
from favor.train.reward import RewardTrainConfig
from favor.train.sft import SftConfig
from favor.value.settings import ValueConfig

END = frozenset({2})
USER = {"role": "user", "content": "What is good?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "the film"}}}],
}
FOUND = {"role": "tool", "content": "warm and bright"}
# ChatML that writes calls as JSON
CALLING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def say(text, **more):
    return {"role": "assistant", "content": text, **more}


def ids(
    prompt,
    *responses,
    template=CALLING,
    bad_rows="error",
    tokenizer=None,
    tools=None,
    variables=None,
    end_ids=END,
    **config,
):
    orders = (Comparison((0, 1)),) if len(responses) > 1 else ()
    tree = PromptTree(prompt, responses, orders, (4,), "rows.jsonl", tools, template_kwargs=variables)
    return tokenize([tree], tokenizer or tiny.tokenizer(template), TokensConfig(**config), end_ids, bad_rows)


def runs(tree, i=0):
    """Where the model speaks: (start, stop) of every run of scored tokens on the path of a response."""
    scored = np.concatenate([np.zeros(len(tree.prompt_ids), bool), said(tree.response_ids[i]), [False]])
    edges = np.flatnonzero(np.diff(scored.astype(int)))
    return [(int(a) + 1, int(b) + 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def seen(tokenizer, turns, **variables):
    """What a model sees when it is asked for its next turn."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def check_exact(tree, tokenizer, prompt, response, i=0, *, end_ids=END, **variables):
    """Every turn of the model begins behind what it would be shown, and ends with its end token, which it says once."""
    path = tree.prompt_ids + as_read(tree.response_ids[i])
    speaks = [k for k, turn in enumerate(response) if turn["role"] == "assistant"]
    spans = runs(tree, i)
    assert len(spans) == len(speaks)
    for k, (start, stop) in zip(speaks, spans, strict=True):
        assert path[:start] == seen(tokenizer, [*prompt, *response[:k]], **variables)
        assert path[stop - 1] in end_ids
        assert not end_ids.intersection(path[start : stop - 1])
    assert spans[-1][1] == len(path)


def test_each_turn_stands_where_the_model_would_say_it():
    tokenizer = tiny.tokenizer(CALLING)
    good, bad = (CALL, FOUND, say("It is warm.")), (say("I know it."), USER, say("No film is good."), USER, say("bad"))
    (tree,), report = ids((USER,), good, bad)
    check_exact(tree, tokenizer, (USER,), good, 0)
    check_exact(tree, tokenizer, (USER,), bad, 1)
    text = tokenizer.decode([t for t in tree.response_ids[0] if t >= 0])
    assert text == '{"name": "look", "arguments": {"at": "the film"}}<|im_end|>It is warm.<|im_end|>'
    assert tree.complete == (True, True)
    heard = sum(t < 0 for response in tree.response_ids for t in response)
    assert (report.several_turns, report.tokens_read) == (2, heard)
    assert tree.num_scored == sum(map(len, tree.response_ids)) - heard


def test_one_turn_is_what_it_was():
    (tree,), report = ids((USER,), (say("good"),), (say("bad"),))
    assert all(min(response) >= 0 for response in tree.response_ids)
    assert (report.several_turns, report.tokens_read) == (0, 0)


WORDS = st.text("abcdef .,<>|{}\n", min_size=1, max_size=12).filter(str.strip)
TURN = st.one_of(
    st.builds(say, WORDS),
    st.builds(lambda text: {"role": "user", "content": text}, WORDS),
    st.builds(lambda text: {"role": "tool", "content": text}, WORDS),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(TURN, max_size=5), WORDS, WORDS)
def test_any_conversation_is_exact(between, first, last):
    tokenizer = tiny.tokenizer(CALLING)
    response = (say(first), *between, say(last))
    (tree,), _ = ids((USER,), response, (say("other words"),), tokenizer=tokenizer)
    check_exact(tree, tokenizer, (USER,), response)


def policy_of(trees, layout="auto", family="llama"):
    config = ModelConfig(path="tiny", device="cpu", layout=layout)
    return settle(make_policy(tiny.model(family), tiny.tokenizer(), config), layout, trees, train=True)[0]


def oracle(model, tree):
    """Log-probs of what the model said, one plain row at a time, token by token."""
    values = []
    for response in tree.response_ids:
        path = torch.tensor([tree.prompt_ids + as_read(response)])
        logp = model(input_ids=path).logits[0].log_softmax(-1)
        start = len(tree.prompt_ids)
        places = [start + k for k, token in enumerate(response) if token >= 0]
        values.append(sum(logp[place - 1, path[0, place]].double() for place in places))
    return torch.stack(values)


def parting():
    """Sides that part at once, behind a tool's answer, and at the last turn; two of them of one prompt."""
    long = (CALL, FOUND, say("It is warm."), USER, say("The film is good."))
    other = (CALL, {"role": "tool", "content": "cold"}, say("It is dull."))
    pairs = [
        (long, (say("I do not know."),)),
        (long, other),
        (long, (*long[:4], say("The film is bad, and dull."))),
        ((say("good"),), (say("bad"), USER, say("worse"))),
    ]
    trees = [ids((USER,), *pair)[0][0] for pair in pairs]
    return [replace(tree, first_response=2 * n) for n, tree in enumerate(trees)]


@pytest.mark.parametrize("layout", ["auto", "rows"])
def test_log_probs_and_gradients_are_those_of_plain_rows(layout):
    trees = parting()
    policy = policy_of(trees, layout)
    assert policy.layout == {"auto": "tree", "rows": "rows"}[layout]
    model = tiny.model("llama")
    expected = torch.cat([oracle(model, tree) for tree in trees])
    share = torch.linspace(1, 2, len(expected), dtype=torch.float64)
    batch = build(trees, policy.layout)
    found = response_logps(policy, batch)
    assert torch.allclose(found, expected, atol=1e-4)
    # were tools' answers and headers scored too, it would be far off
    assert (batch.length_R.numpy() == [int(said(r).sum()) for t in trees for r in t.response_ids]).all()
    (share * found).sum().backward()
    (share * expected).sum().backward()
    for mine, plain in zip(policy.causal_lm.parameters(), model.parameters(), strict=True):
        assert float((mine.grad - plain.grad).norm()) < 1e-5 * float(plain.grad.norm() + 1e-3)


def test_what_others_say_weighs_nothing():
    """Scored in full the responses would be others, and the hash by which references are kept knows it."""
    trees = parting()
    policy = policy_of(trees)
    whole = [replace(tree, response_ids=tuple(map(as_read, tree.response_ids))) for tree in trees]
    mine, other = (response_logps(policy, build(some, policy.layout)).detach() for some in (trees, whole))
    changed = (other - mine).abs() > 1.0
    assert changed.tolist() == [any(t < 0 for t in r) for tree in trees for r in tree.response_ids]
    assert hash_ids({"train": trees}) != hash_ids({"train": whole})


def test_each_scored_token_is_measured_once():
    """Token by token, over several packs: what sums to the responses' log-probs."""
    trees = parting()
    policy = policy_of(trees)
    logp_M = measured(policy, trees, lambda b: scored_logps(policy, b)[b.member_edge_M], 60, tokens=True)
    lengths = [int(said(r).sum()) for tree in trees for r in tree.response_ids]
    assert logp_M.shape == (sum(lengths),)
    sums = torch.stack([part.sum() for part in logp_M.split(lengths)])
    assert torch.allclose(sums, torch.cat([oracle(tiny.model("llama"), tree) for tree in trees]), atol=1e-4)


def test_cut_at_their_end_they_stay_what_they_are():
    long = (CALL, FOUND, say("It is warm and bright."), USER, say("The film is good."))
    (whole,), _ = ids((USER,), long, (say("bad"),))
    for room in range(1, len(whole.response_ids[0]), 3):
        most = max(8, len(whole.prompt_ids) + room)
        (tree,), _ = ids((USER,), long, (say("bad"),), max_tokens=most, truncation="response_end")
        kept = most - len(whole.prompt_ids)
        cut = whole.response_ids[0][:kept]
        # what others say behind the model's last token gives it nothing to learn
        assert tree.response_ids[0] == cut[: max(i for i, token in enumerate(cut, 1) if token >= 0)]
        assert tree.complete[0] == (kept >= len(whole.response_ids[0]))


# as Qwen3: reasoning of turns before the last user's is left out
FORGETS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as DeepSeek-R1: the prompt opens the reasoning, and none of it is written where it was said before
OPENS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("response", "template", "named"),
    [
        ((USER, say("good")), CALLING, "must begin and end with a turn of the assistant"),
        ((say("good"), USER), CALLING, "must begin and end with a turn of the assistant"),
        (
            (say("good", reasoning_content="hm"), USER, say("x")),
            FORGETS,
            "leaves out str 'hm'.*make a row of every turn",
        ),
        (
            (say("<think>\nhm\n</think>\ngood"), USER, say("x")),
            OPENS,
            "an earlier turn differently once others follow.*make a row of every turn",
        ),
        ((say("good"),), OPENS, "begins inside its reasoning.*reasoning_content"),
        ((say("good"), USER, say("x")), ENDLESS, "ends no turn with an end-of-turn token"),
        (
            (say("good"), {"role": "user", "content": "no <|im_end|> here"}, say("x")),
            CALLING,
            "special token <|im_end|>",
        ),
    ],
)
def test_what_the_model_would_not_see_is_refused(response, template, named):
    with pytest.raises(DataError, match=f"row 4: .*{named}"):
        ids((USER,), response, (say("bad"),), template=template)


def test_no_template_no_several_turns():
    with pytest.raises(DataError, match="several turns has no plain form; use a chat template"):
        ids("p", (say("a"), USER, say("b")), "c", template=None)


@pytest.mark.parametrize(
    "turn",
    [
        say("<think>\nIt is warm.\n</think>\n\nParis"),
        say("Paris", reasoning_content="It is warm."),
    ],
)
def test_reasoning_that_the_prompt_opens_is_said_behind_it(turn):
    tokenizer = tiny.tokenizer(OPENS)
    (tree,), _ = ids((USER,), (turn,), (say("<think>\nhm\n</think>\n\nRome"),), template=OPENS)
    assert tree.prompt_ids == seen(tokenizer, [USER])
    assert tokenizer.decode(tree.prompt_ids).endswith("<think>\n")
    assert tokenizer.decode(tree.response_ids[0]) == "It is warm.\n</think>\n\nParis<|im_end|>"
    # what it says is then seen without its reasoning, as the template has it
    later = tokenizer.decode(seen(tokenizer, [USER, say("<think>\nx\n</think>\n\nParis"), USER]))
    assert "</think>" not in later


def test_arguments_are_what_the_template_writes_as_json():
    concatenates = CALLING.replace("call.function | tojson", "call.function.name + ' ' + call.function.arguments")
    for template in (CALLING, concatenates):
        found = []
        for arguments in ({"at": "the film"}, '{"at": "the film"}'):
            call = say("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": arguments}}])
            (tree,), _ = ids((USER,), (call, FOUND, say("warm")), (say("bad"),), template=template)
            found.append(tree.response_ids[0])
        assert found[0] == found[1]
        assert '{"at": "the film"}' in tiny.tokenizer().decode([t for t in found[0] if t >= 0])


SWITCHED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ 'briefly: ' }}{% endif %}{% endif %}"
)
SWITCHED = SWITCHED.replace(
    "'<|im_start|>' + m['role'] + '\n' + m['content']",
    "'<|im_start|>' + m['role'] + '\n' + ('briefly: ' if m['role'] == 'assistant' and enable_thinking is defined and not "
    "enable_thinking else '') + m['content']",
)


def test_a_row_sets_variables_of_the_template():
    tokenizer = tiny.tokenizer(SWITCHED)
    pair = ((say("good"),), (say("bad"),))
    (plain,), _ = ids((USER,), *pair, template=SWITCHED)
    (brief,), _ = ids((USER,), *pair, template=SWITCHED, variables={"enable_thinking": False})
    assert brief.prompt_ids == seen(tokenizer, [USER], enable_thinking=False) != plain.prompt_ids
    assert brief.response_ids == plain.response_ids


def rows_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return read(str(path), DataConfig(train=str(path)), "train")


def test_rows_of_one_prompt_but_other_variables_are_two_prompts(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    trees, _ = rows_of(tmp_path, row, row | {"chat_template_kwargs": {"enable_thinking": False}}, row)
    assert [(tree.rows, tree.template_kwargs) for tree in trees] == [((1, 3), None), ((2,), {"enable_thinking": False})]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"tokenize": True}, "'tokenize' is no variable"),
        ({"not a name": 1}, "'not a name' is no variable"),
        ([1], "must be an object"),
        ("{", "is not JSON"),
    ],
)
def test_variables_that_cannot_be_are_refused(tmp_path, value, named):
    with pytest.raises(DataError, match=rf"row 1: chat_template_kwargs.*{named}"):
        rows_of(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b", "chat_template_kwargs": value})


GOOD, BAD = say("good"), say("bad")


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        # sides part at the first answer, then run on
        (
            {"chosen": [USER, GOOD, USER, BAD], "rejected": [USER, BAD, USER, GOOD]},
            (USER,),
            ((GOOD, USER, BAD), (BAD, USER, GOOD)),
        ),
        # others answer differently: from what the assistant said before
        (
            {"chosen": [USER, CALL, FOUND, GOOD], "rejected": [USER, CALL, USER, BAD]},
            (USER,),
            ((CALL, FOUND, GOOD), (CALL, USER, BAD)),
        ),
        # one goes on where the other ends
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, (USER,), ((GOOD,), (GOOD, USER, BAD))),
        # a prompt and sides of several turns
        (
            {"prompt": [USER], "chosen": [CALL, FOUND, GOOD], "rejected": [BAD]},
            (USER,),
            ((CALL, FOUND, GOOD), (BAD,)),
        ),
        # one step: the same past, two next turns
        (
            {"prompt": [USER, CALL, FOUND], "chosen": [GOOD], "rejected": [CALL]},
            (USER, CALL, FOUND),
            ((GOOD,), (CALL,)),
        ),
        ({"prompt": "p", "responses": [[CALL, FOUND, GOOD], "bad", [GOOD]], "ranking": [0, 2, 1]}, "p", None),
    ],
)
def test_sides_of_several_turns_are_read(tmp_path, row, prompt, responses):
    (tree,), _ = rows_of(tmp_path, row)
    assert tree.prompt == prompt
    if responses is not None:
        assert tree.responses == responses


def test_a_cache_on_the_disk_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FAVOR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    rows = [
        {"chosen": [USER, CALL, FOUND, GOOD], "rejected": [USER, BAD]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"enable_thinking": False}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    tokenizer = tiny.tokenizer(CALLING)
    found = [
        prepare(DataConfig(train=str(path), cache=cache), TokensConfig(), (tokenizer, END), CHECKS, lambda _: None)
        for cache in (False, True)
    ]
    first, second = (list(splits.train) for splits in found)
    assert first == second
    assert any(token < 0 for tree in first for ids in tree.response_ids for token in ids)
    assert hash_ids({"train": found[0].train}) == hash_ids({"train": found[1].train})


RUN_TEMPLATE = SWITCHED.replace("m['content'] + '<|im_end|>", "(m['content'] or '') + '<|im_end|>")


def test_a_run_begins_at_ln_2_and_keeps_the_variables(tmp_path, monkeypatch):
    """Train, evaluate from a stored reference, and read the saved model: it is asked as it was trained."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model", template=RUN_TEMPLATE)
    pair = {"prompt": [USER], "chosen": [GOOD, FOUND, say("It is warm.")], "rejected": [BAD, USER, say("It is dull.")]}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(pair | {"weight": n + 1}) + "\n" for n in range(4)), "utf-8"
    )
    told = [
        "model.path=model",
        "data.train=rows.jsonl",
        "out=run",
        "train.epochs=4",
        "optim.lr=1e-2",
        "optim.warmup=0",
    ]
    command = ["favor", "train", *told, "model.template_kwargs={enable_thinking=false}"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[-1]["loss"] < 0.6
    report = json.loads((tmp_path / "run/data.json").read_text())["train"]["tokens"]
    assert report["several_turns"] == 2
    assert report["tokens_read"] > 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert seen(saved, [USER]) == seen(tiny.tokenizer(SWITCHED), [USER], enable_thinking=False)
    assert seen(saved, [USER], enable_thinking=True) == seen(tiny.tokenizer(SWITCHED), [USER])


def test_variables_want_a_template():
    with pytest.raises(ConfigError, match="model.template_kwargs is for a chat template, and nowhere has none"):
        with_defaults(tiny.tokenizer(None), {"enable_thinking": False}, "nowhere")
    with pytest.raises(ConfigError, match="the chat template of here has no variable enable_thnking"):
        with_defaults(tiny.tokenizer(SWITCHED), {"enable_thnking": False}, "here")
    plain = {"model": {"path": "x", "template_kwargs": {"enable_thinking": False}}, "tokens": {"template": "plain"}}
    rows, reward = {"data": {"train": "x"}}, {"reward": {"kind": "model", "path": "x"}}
    for recipe, more in (
        *((recipe, {"run": "r", **rows}) for recipe in (TrainConfig, SftConfig, RewardTrainConfig)),
        (OnlineConfig, {"run": "r", "prompts": "x", **reward}),
        (PpoConfig, {"run": "r", "data": {"train": "x"}, **reward}),
        *((recipe, rows) for recipe in (LintConfig, ValueConfig)),
        (AskConfig, {"pool": "x", "out": "y"}),
    ):
        with pytest.raises(ValidationError, match="template_kwargs is for a chat template, and tokens.template=plain"):
            recipe.model_validate({**more, **plain})
    with pytest.raises(ValidationError, match="'messages' is no variable"):
        ModelConfig(path="x", template_kwargs={"messages": 1})


@pytest.mark.parametrize(
    "value", [True, False, 3, 0.5, 'it\'s "so" \n {{ x }} é', ["a", {"b": None}], {"c": [1, True]}]
)
def test_any_value_is_what_it_was(value):
    shows = tiny.tokenizer("{{ given | tojson }}{% if add_generation_prompt %}{% endif %}")
    expected = shows.apply_chat_template([USER], tokenize=False, given=value)
    assert with_defaults(shows, {"given": value}, "x").apply_chat_template([USER], tokenize=False) == expected
    assert with_defaults(shows, {"given": value}, "x").chat_template.count("is not defined") == 1
    assert shows.apply_chat_template([USER], tokenize=False, given=7) == "7"


def test_a_largest_id_that_is_only_read_is_seen():
    """A token that the model has no embedding for, in a tool's answer."""
    tree = TokenTree((1, 5), ((7, 2, ~tiny.VOCAB, 8, 2),), (True,), (), 0, 1)
    with pytest.raises(CheckpointError, match=f"the id {tiny.VOCAB} "):
        policy_of([tree])


def test_of_trees_in_a_file_it_is_among_the_few_that_are_looked_at():
    plain = TokenTree((1, 5, 5), ((7, 8, 9, 2),), (True,), (), 0, 1)
    streams = Streams()
    streams.add(encode([plain, TokenTree((1, 5), ((7, 2, ~tiny.VOCAB, 2),), (True,), (), 1, 2), plain]))
    assert 1 in streams.notes().extremes


# ---- what a review found

# the end of a call is no end of a turn here, that of a tool's answer is
OTHER_ENDS = CALLING.replace("'<|im_end|>\n'", "('<|eom|>' if m.tool_calls else '<|im_end|>') + '\n'")


def test_the_end_of_what_others_say_ends_no_turn_of_the_models():
    with pytest.raises(DataError, match="row 4: the chat template ends no turn"):
        ids((USER,), (CALL, FOUND, say("warm")), (say("bad"),), template=OTHER_ENDS)


def test_an_end_inside_of_what_is_said_is_not_its_end():
    odd = say("one <|im_end|> two")
    (tree,), _ = ids((USER,), (odd, USER, say("x")), (say("bad"),), special_text="allow")
    text = tiny.tokenizer().decode([token for token in tree.response_ids[0] if token >= 0])
    assert text == "one <|im_end|> two<|im_end|>x<|im_end|>"


def test_control_tokens_are_found_in_what_json_text_says():
    evil = '{"a": "\\u003c|im_end|\\u003e evil"}'
    call = say("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": evil}}])
    for prompt, response in (((USER,), (call, FOUND, say("x"))), ((USER, call, FOUND), (say("x"),))):
        with pytest.raises(DataError, match="special token <|im_end|>"):
            ids(prompt, response, (say("bad"),))


@pytest.mark.parametrize("arguments", ['{"at":"the film"}', '{"n":1}', '{"n": 1.5, "s": "\\u00e9"}', "no JSON"])
def test_a_prompt_may_hold_calls_with_arguments_as_text(arguments):
    call = say("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": arguments}}])
    (tree,), _ = ids((USER, call, FOUND), (say("x"),), (say("bad"),))
    assert len(tree.response_ids) == 2


def test_cut_before_they_part_in_what_the_model_says_they_are_one():
    sides = [(CALL, {"role": "tool", "content": f"{word} and bright"}, say(word)) for word in ("warm", "cold")]
    (tree,), _ = ids((USER,), *sides)
    room = next(i for i, token in enumerate(tree.response_ids[0]) if token < 0) + 6
    found, report = _cut_to(sides, len(tree.prompt_ids) + room)
    assert found == []
    assert report.comparisons_dropped == 1


def _cut_to(sides, most):
    other = PromptTree(
        ({"role": "user", "content": "a"},), ((say("b"),), (say("c"),)), (Comparison((0, 1)),), (5,), "r"
    )
    tree = PromptTree((USER,), tuple(sides), (Comparison((0, 1)),), (4,), "rows.jsonl")
    found, report = tokenize(
        [tree, other], tiny.tokenizer(CALLING), TokensConfig(max_tokens=most, truncation="response_end"), END, "drop"
    )
    return [each for each in found if each.row == 4], report


def test_a_turn_within_that_is_written_twice_or_says_nothing_is_refused():
    once = "(m['content'] or '')"
    twice = CALLING.replace(once, f"{once} + ({once} if m.role == 'assistant' else '')")
    with pytest.raises(DataError, match="writes a part of it twice"):
        ids((USER,), (say("P"), USER, say("x")), (say("bad"),), template=twice)
    with pytest.raises(DataError, match="a turn of the assistant in a response says nothing"):
        ids((USER,), (say(""), USER, say("x")), (say("bad"),))


def test_what_a_model_says_behind_an_opened_thought_is_taken_as_it_is():
    for text in ("hm\n</think>\n\nParis", "hm</think>Paris", " hm \n</think> Paris"):
        (tree,), _ = ids((USER,), (say(text),), (say("a\n</think>\n\nb"),), template=OPENS)
        assert tiny.tokenizer().decode(tree.response_ids[0]) == f"{text}<|im_end|>"
    for turn in (say("x", reasoning_content="a", thinking="b"), say("x", reasoning_content="<think>a</think>")):
        with pytest.raises(DataError, match="in more than one place|holds <think>"):
            ids((USER,), (turn,), (say("a\n</think>\n\nb"),), template=OPENS)


@pytest.mark.parametrize(
    "template", ["\nhello {{ x }}", "  {% for m in messages %}{{ m.role }}{{ x }}{% endfor %}", "\n\n {{ x }}"]
)
def test_defaults_change_nothing_else(template):
    plain = tiny.tokenizer(template).apply_chat_template([USER], tokenize=False, x=1)
    assert with_defaults(tiny.tokenizer(template), {"x": 1}, "x").apply_chat_template([USER], tokenize=False) == plain


@pytest.mark.parametrize(
    "given", [{"d": date(2024, 1, 1)}, {"eos_token": "z"}, {"none": 1}, {"for": 1}, {"n": float("nan")}]
)
def test_variables_that_templates_cannot_have_are_refused(given):
    with pytest.raises(ValidationError, match="variable of a chat template"):
        ModelConfig(path="x", template_kwargs=given)


def test_no_command_drops_the_variables_of_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"enable_thinking": False}}
    path.write_text(json.dumps(row) + "\n", "utf-8")
    with pytest.raises(DataError, match="chat_template_kwargs is not read where answers are sampled"):
        read_prompts(str(path), "train")
    with pytest.raises(DataError, match="it has chat_template_kwargs, which a reward on text does not see"):
        scored_rows(ScoreConfig(data=str(path), out=str(tmp_path / "o"), reward={"kind": "callable", "path": "f.py:f"}))
    tree = PromptTree("p", ("a", "b"), (Comparison((0, 1)),), (1,), "r", template_kwargs={"x": 1})
    with pytest.raises(DataError, match="chat_template_kwargs has no plain form"):
        tokenize([tree], tiny.tokenizer(None), TokensConfig(), END, "error")
    with pytest.raises(DataError, match="labels do not keep chat_template_kwargs"):
        list(_data(str(path), LabelConfig(data=str(path), db=str(tmp_path / "l.db")), Tally(str(path))))
