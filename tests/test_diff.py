"""`favor diff`: what is seen of answers, intervals that hold at all times, gates and exit codes, planted changes, a page that is safe."""

import json
from functools import partial
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from interval_coverage import NAIVE, PEEKED, measure, peeks
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from favor.config import load
from favor.data.schema import holds
from favor.diff import checks, run
from favor.diff import measure as measuring
from favor.diff.calls import Called, Form, called, form_of
from favor.diff.figures import FIGURES, Gate, Limits, Values, all_measured, judged, measured, verdict_of
from favor.diff.run import diff
from favor.diff.settings import DiffConfig
from favor.diff.signs import REFUSALS, elsewhere, is_json, refuses, script_of, starts, wanted, written
from favor.errors import ConfigError, DataError
from favor.eval.sequence import sequence
from favor.lint.language import identifier

PHRASES = starts(REFUSALS)
LONGEST = 12
IDENTIFIER = identifier()


@pytest.fixture(autouse=True)
def _one_identifier(monkeypatch):
    """It takes half a second to load; and the threads of tiny models only wait for each other."""
    monkeypatch.setattr(measuring, "identifier", lambda: IDENTIFIER)
    torch.set_num_threads(1)


# --- what is seen of one answer ---


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("  \u201cI CANNOT assist with this.\u201d", True),
        ("As an AI language model, I have no opinions.", True),
        ("Unfortunately, I can\u2019t do that.", True),
        ("I'm sorry to hear that. Here is what helps.", False),
        ("I can't wait to see it again!", False),
        ("I cannot recommend this film.", False),
        ("Of course. I can't help loving it.", False),
        ("", False),
    ],
)
def test_refusals(text, yes):
    assert refuses(text, PHRASES) == yes


def test_own_phrases_are_compared_in_the_same_way():
    assert refuses("No\u2019 way, I say", starts(("NO' WAY",)))
    assert not refuses("I'm sorry, but no.", starts(("NO' WAY",)))


ENGLISH = "This is a warm and funny film that I would watch again with my whole family tomorrow."
GERMAN = "Das ist ein warmer und lustiger Film, den ich morgen gern noch einmal mit der Familie sehen möchte."


@pytest.mark.parametrize(
    ("prompt", "answer", "yes"),
    [
        (ENGLISH, ENGLISH, False),
        (ENGLISH, GERMAN, True),
        (ENGLISH, "Это очень хороший фильм", True),
        ("これはどんな映画ですか", "这是一部温暖的电影", True),
        ("Name a film.", GERMAN, False),
        (ENGLISH, "Heat", False),
        (ENGLISH, "42 + 1", False),
        (ENGLISH, "def f(x):\n    return x + 1", False),
    ],
)
def test_language(prompt, answer, yes):
    """Only what is sure: a short prompt has no language, but it has a script."""
    assert elsewhere(prompt, answer, IDENTIFIER) == yes


def test_scripts():
    assert [script_of(t) for t in ("film", "фильм", "映画です", "电影很好", "한국어 영화", "ab", "filmфильм")] == [
        *("LATIN", "CYRILLIC", "KANA", "CJK", "HANGUL", "", "CYRILLIC"),
    ]


def test_markdown():
    """(list, header, code, open): what stands in a block of code is neither list nor header."""
    assert written("- one\n- two") == (True, False, False, False)
    assert written("1. one\n2) two\n\n## So") == (True, True, False, False)
    assert written("- one") == (False, False, False, False)
    assert written("a - b\n#tag\n-5 degrees") == (False, False, False, False)
    assert written("```python\n# comment\n- a\n- b\n```\nso") == (False, False, True, False)
    assert written("```python\nx = 1") == (False, False, True, True)
    assert written("````\n```\n````") == (False, False, True, False)
    assert written("````\n```\nopen still") == (False, False, True, True)
    assert written("~~~\n```\n~~~") == (False, False, True, False)
    assert written("say ```x``` inline") == (False, False, False, False)
    assert written("```x``` alone") == (False, False, False, False)


SCHEMA = {
    "type": "object",
    "required": ["city"],
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "at": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "number"}}]},
    },
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "yes"),
    [
        ({"city": "Oslo"}, True),
        ({"city": "Oslo", "days": 3, "unit": "C", "at": [1, 2.5]}, True),
        ({"city": "Oslo", "days": 3.0, "at": None}, True),
        ({}, False),
        ({"city": 5}, False),
        ({"city": "Oslo", "days": 2.5}, False),
        ({"city": "Oslo", "days": True}, False),
        ({"city": "Oslo", "unit": "K"}, False),
        ({"city": "Oslo", "at": ["x"]}, False),
        ({"city": "Oslo", "more": 1}, False),
        (["Oslo"], False),
    ],
)
def test_schemas(value, yes):
    assert holds(value, SCHEMA) == yes
    assert is_json(json.dumps(value), SCHEMA) == yes
    assert is_json(f"```json\n{json.dumps(value, indent=1)}\n```\n", SCHEMA) == yes


def test_what_is_json():
    assert is_json('  {"a": 1}\n')
    assert not is_json('Here it is: {"a": 1}')
    assert not is_json('{"a": 1,}')
    assert not is_json("```json\n{}\n```\nThat was it.")
    assert not is_json("[" * 200_000)
    # a description that is none decides nothing
    assert holds(3, "x")
    assert holds({"a": 1}, {"type": ["object", "null"], "required": 7, "properties": 7, "enum": 1})


def test_what_a_row_asks_for():
    def asks(prompt, **row):
        return wanted(row, prompt, None).json

    assert asks("Answer in JSON.")
    assert asks(({"role": "user", "content": "hi"}, {"role": "user", "content": "Return only valid JSON"}))
    assert not asks("Who is Jason? What is JSON?")
    assert not asks("Answer in JSON.", response_format={"type": "text"})
    assert (
        wanted({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "x", None)[1] == SCHEMA
    )


# --- calls ---

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
TOOLS = ({"type": "function", "function": ADD},)
CALLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>\n' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson "
    "+ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HERMES = Form("<tool_call>", "name", "arguments")


def test_the_form_of_calls_is_read_off_the_template():
    assert form_of(tiny.tokenizer(CALLS)) == HERMES
    # one that knows no calls, and one that is no chat template
    assert form_of(tiny.tokenizer()) is None
    assert form_of(tiny.tokenizer(None)) is None


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen2_5", HERMES),
        ("qwen3", HERMES),
        ("llama3_1", Form("", "name", "parameters")),
        ("gptoss", "named"),
        # arguments as XML
        ("glm4moe", None),
        ("gemma", None),
    ],
)
def test_forms_of_shipped_templates(name, form):
    package = find_spec("trl")
    assert package is not None, "the extra bench brings TRL, whose package holds templates"
    template = Path(package.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text("utf-8")
    found = form_of(tiny.tokenizer(template))
    assert (found.name_key == "" and "functions." in found.opening) if form == "named" else found == form


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 4.", (0, 0)),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>', (1, 0)),
        ('So:<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>', (1, 0)),
        (
            '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><tool_call>{"name": "sub", "arguments": {}}',
            (2, 1),
        ),
        ('<tool_call>[{"name": "add", "arguments": {"a": 2}}, {"name": "add", "arguments": {"a": "2"}}]', (2, 1)),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call>', (1, 1)),
        ('<tool_call>{"name": "add", "arguments": {"a": 2}', (1, 1)),
        ("<tool_call>add(2)</tool_call>", (1, 1)),
        ('<tool_call>{"name": ["add"], "arguments": {"a": 2}}', (1, 1)),
        ('{"name": "add", "arguments": {"a": 2}}', (0, 0)),
    ],
)
def test_calls(text, found):
    assert called(text, HERMES, TOOLS) == Called(*found)


def test_calls_in_other_forms():
    bare, named = Form("", "name", "parameters"), Form("to=functions.", between="<|message|>")
    assert called('{"name": "add", "parameters": {"a": 2}}', bare, TOOLS) == (1, 0)
    assert called('4, or {"name": "add", "parameters": {"a": 2}}', bare, TOOLS) == (0, 0)
    assert called('to=functions.add<|message|>{"a": 2}', named, TOOLS) == (1, 0)
    assert called('to=functions.sub<|message|>{"a": 2}', named, TOOLS) == (1, 1)
    assert called('to=functions.add {"a": 2}', named, TOOLS) == (1, 1)


# --- intervals and gates ---


@pytest.mark.parametrize("name", PEEKED)
def test_looking_after_every_batch_is_allowed(name):
    """Of 400 runs with 10 looks at most 5 % (and what 400 leave open) ever leave the truth out."""
    (row,) = measure(partial_setting(name), 400)
    assert row.coverage >= 0.95 - 2 * row.error


def partial_setting(name):
    from interval_coverage import Setting

    return Setting(name, peeks(PEEKED[name], 80, 8))


def test_the_usual_interval_does_not_hold_at_all_times():
    (row,) = measure(next(one for one in NAIVE if "nothing changes" in one.name)._replace(cost=1), 300)
    assert row.coverage < 0.85


def test_several_gates_share_the_error():
    """Two gates, one of which limits b itself too: three intervals, each at 1 - 0.05 / 3; all others share 5 % anew."""
    rng = np.random.default_rng(0)
    values = {name: Values(*(rng.random((2, 60)) < 0.3) * 1.0) for name in ("refused", "ended", "lists", "code")}
    gates = {"refused": Limits(max_rise=0.1), "ended": Limits(max_fall=0.1, min=0.2)}
    found = all_measured(values, dict.fromkeys(FIGURES, (0.0, 1.0)), gates)
    assert [found[name].sure for name in values] == pytest.approx([1 - 0.05 / 3] * 2 + [1 - 0.05 / 2] * 2)
    change = values["ended"].b - values["ended"].a
    assert found["ended"].interval == sequence(change, -1, 1, 0.05 / 3)
    assert found["ended"].b_interval == sequence(values["ended"].b, 0, 1, 0.05 / 3)
    assert found["lists"].b_interval is None


@pytest.mark.parametrize(
    ("limits", "ends", "verdict"),
    [
        ({"max_rise": 0.1}, (-0.05, 0.1), "passes"),
        ({"max_rise": 0.1}, (0.05, 0.2), "not settled"),
        ({"max_rise": 0.1}, (0.11, 0.2), "fails"),
        ({"max_fall": 0.1}, (-0.1, 0.5), "passes"),
        ({"max_fall": 0.1}, (-0.2, 0.0), "not settled"),
        ({"max_fall": 0.1}, (-0.5, -0.2), "fails"),
        ({"max": 0.4}, (0.1, 0.4), "passes"),
        ({"max": 0.4}, (0.41, 0.9), "fails"),
        ({"min": 0.4}, (0.4, 0.9), "passes"),
        ({"min": 0.4}, (0.1, 0.39), "fails"),
        ({"min": 0.4}, (0.1, 0.5), "not settled"),
    ],
)
def test_a_gate_passes_once_the_whole_interval_does(limits, ends, verdict):
    figure = measured("ended", Values(np.zeros(3), np.zeros(3)), (0.0, 1.0), Limits(min=0.0), 0.05)
    gates = {"ended": Limits(**limits)}
    (gate,) = judged({"ended": figure._replace(interval=ends, b_interval=ends)}, gates)
    assert gate.verdict == verdict


def test_gates_together():
    def of(*verdicts):
        return [Gate("ended", "", 0.0, (0.0, 0.0), verdict) for verdict in verdicts]

    assert verdict_of(of("passes", "fails", "not settled"), "pass") == "fails"
    assert verdict_of(of("passes", "not settled"), "fail") == "not settled"
    assert verdict_of(of("passes", "not settled"), "pass") == "passes"
    assert verdict_of(of("passes"), "fail") == "passes"
    assert verdict_of([], "fail") == ""


# --- the command ---


def without_memory(folder, end, other=0.0):
    """A model that samples every token from one distribution: the end token has the logit `end`, id 40 has `other`, others 0."""
    config = GPTNeoXConfig(**tiny._SIZES, tie_word_embeddings=False)
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        norm = model.gpt_neox.final_layer_norm
        norm.weight.zero_()
        norm.bias.zero_()
        norm.bias[0] = 1.0
        head = model.get_output_embeddings().weight
        head.zero_()
        head[2, 0], head[40, 0] = end, other
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def ends_by(end, tokens, other=0.0):
    """Share of such a model's answers that end within so many tokens."""
    stops = np.exp(end) / (np.exp(end) + np.exp(other) + tiny.VOCAB - 2)
    return 1 - (1 - stops) ** tokens


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    without_memory(folder / "good", 5.0)
    without_memory(folder / "damped", 1.0)
    without_memory(folder / "moved", 5.0, 3.0)
    tiny.save(folder / "llama")
    lines(folder / "p.jsonl", [{"prompt": f"Tell me of film {i}."} for i in range(40)])
    tools = [{"prompt": f"What is {i:02} and 2?", "tools": list(TOOLS)} for i in range(40)]
    lines(folder / "tools.jsonl", tools)
    return folder


def words_of(place, a, b, *more, prompts="p.jsonl"):
    sides = [f"a={place / a}", f"b={place / b}", f"prompts={place / prompts}"]
    return [*sides, f"sample.max_new_tokens={LONGEST}", "checks=false", *more]


def compare(*words):
    return diff(load(DiffConfig, None, words), lambda text: None, lambda *_: None)


def said_by(monkeypatch, texts):
    """Answers as written: texts[model's last name](prompt's number) in place of sampling; all of them end."""

    def sample(policy, prompts, seeds, config, progress):
        tokenizer, name = policy.tokenizer, policy.source.rpartition("/")[2]
        numbers = [int("".join(c for c in tokenizer.decode(ids) if c.isdigit())[:2] or 0) for ids in prompts]
        answers = [tokenizer(texts[name](i), add_special_tokens=False).input_ids for i in numbers]
        return [(*answer, 2) for answer in answers]

    monkeypatch.setattr(measuring, "sample", sample)


def words_said(place, *more, b="damped", prompts="p.jsonl"):
    """As `words_of`, with room for longer answers."""
    return [*words_of(place, "good", b, prompts=prompts), "sample.max_new_tokens=80", *more]


def test_a_model_beside_itself(place):
    """The planted no-change: every difference is 0, nothing is called changed, no answer is shown as changed."""
    figures = compare(*words_of(place, "good", "good", "checks=true", "sample.max_new_tokens=6"))
    assert {name for name, one in figures["figures"].items() if one["side"]} == set()
    assert all(one["change"] == 0 for one in figures["figures"].values())
    assert {"kl", "reverse_kl", "checks", "ended"} <= figures["figures"].keys()
    assert figures["examples"] == []
    assert figures["verdict"] == ""


def test_a_damped_end_token_is_seen(place):
    """Its shares have a closed form; the interval of the change holds their difference and leaves 0 out."""
    figures = compare(*words_of(place, "good", "damped"))
    one, true = figures["figures"]["ended"], [ends_by(end, LONGEST) for end in (5.0, 1.0)]
    assert [one["a"], one["b"]] == pytest.approx(true, abs=0.15)
    low, high = one["interval"]
    assert low <= true[1] - true[0] <= high < 0
    assert figures["figures"]["length"]["side"] == 1
    assert figures["figures"]["refused"]["side"] == 0
    assert "does not end now" in {turn for one in figures["examples"] for turn in one["turns"]}


def test_kl_is_that_of_plain_transformers(place):
    """Every answer scored token by token by both models alone, and the closed form within its interval."""
    pairs = []
    with pytest.MonkeyPatch.context() as patch:
        real = measuring.pairs_of
        patch.setattr(run, "pairs_of", lambda *given: pairs.extend(found := real(*given)) or found)
        figures = compare(*words_of(place, "good", "moved"))
    a, b = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("good", "moved"))

    def logp(model, ids):
        logps = model(torch.tensor([[5, *ids]])).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(1, torch.tensor(ids)[:, None]).double().sum())

    with torch.no_grad():
        ratios = [[logp(b, one.ids) - logp(a, one.ids) for one in (pair.b, pair.a)] for pair in pairs]
    of_b = [ratio / len(pair.b.ids) for (ratio, _), pair in zip(ratios, pairs, strict=True)]
    of_a = [-ratio / len(pair.a.ids) for (_, ratio), pair in zip(ratios, pairs, strict=True)]
    assert figures["figures"]["kl"]["b"] == pytest.approx(np.clip(of_b, -1, 1).mean(), abs=1e-4)
    assert figures["figures"]["reverse_kl"]["b"] == pytest.approx(np.clip(of_a, -1, 1).mean(), abs=1e-4)
    assert figures["means"]["kl_of_answers"] == pytest.approx(np.mean([ratio for ratio, _ in ratios]), abs=1e-4)
    assert figures["figures"]["kl"]["side"] == 0 or figures["figures"]["kl"]["side"] == 1
    # the examples are those with the largest log-ratios
    largest = max(max(abs(x), abs(y)) for x, y in zip(of_b, of_a, strict=True))
    assert max(abs(one["log_ratio"]) for one in figures["examples"]) == pytest.approx(largest, abs=1e-4)


def test_the_same_random_numbers_and_the_same_result(place):
    """Batches change nothing; another seed does."""
    first, again, other = (
        compare(*words_of(place, "good", "damped", *more)) for more in ((), ("sample.batch=7",), ("seed=1",))
    )
    assert first["figures"] == again["figures"]
    assert first["figures"]["length"] != other["figures"]["length"]


def test_samples_of_one_prompt_are_one_value(place):
    figures = compare(*words_of(place, "good", "damped", "samples_per_prompt=3", "max_prompts=20"))
    assert figures["figures"]["ended"]["prompts"] == 20
    assert figures["answered"] == figures["prompts"] == 20
    rows = [example["row"] for example in figures["examples"]]
    assert len(rows) == len(set(rows))


def test_refusals_are_planted_and_found(place, monkeypatch, favor, tmp_path):
    """b refuses half of the prompts: the gate fails with exit code 1, and both answers stand on the page."""
    texts = {
        "good": lambda i: "A fine film.",
        "damped": lambda i: "I\u2019m sorry, but no." if i % 2 else "A fine film.",
    }
    said_by(monkeypatch, texts)
    words = words_said(place, "gate.refused.max_rise=0.05", "page=d.html", "out=d.json")
    code, out, err = favor("diff", *words)
    assert (code, err) == (1, "")
    assert "Of 1 limit: 1 fails; " in out
    figures = json.loads((tmp_path / "d.json").read_text())
    assert figures["figures"]["refused"]["b"] == 0.5
    assert figures["verdict"] == "fails"
    assert all("refuses now" in one["turns"] for one in figures["examples"][:1])
    page = (tmp_path / "d.html").read_text("utf-8")
    assert "refuses now" in page
    assert str(place) not in page


def test_exit_codes(place, monkeypatch, favor):
    """0 passes, 1 fails, 3 not settled unless that counts as passing, 2 what cannot be done."""
    said_by(monkeypatch, dict.fromkeys(("good", "damped"), lambda i: "A fine film."))
    words = words_said(place, "max_prompts=12")
    assert favor("diff", *words, "gate.refused.max_rise=0.9")[0] == 0
    code, out, _ = favor("diff", *words, "gate.refused.max_rise=0.001")
    assert code == 3
    assert "1 not settled" in out
    assert favor("diff", *words, "gate.refused.max_rise=0.001", "unsettled=pass")[0] == 0
    assert favor("diff", *words, "gate.ended.max=0.5", "gate.refused.max_rise=0.001")[0] == 1
    code, _, err = favor("diff", *words, "gate.refusal.max_rise=0.1")
    assert code == 2
    assert "gate.refusal" in err


def test_it_stops_when_every_gate_is_settled(place, monkeypatch):
    """And what it has seen by then is what the whole run saw in its first prompts."""
    said_by(monkeypatch, dict.fromkeys(("good", "damped"), lambda i: "A fine film."))
    words = words_said(place, "gate.refused.max_rise=0.4", "sample.batch=5")
    whole, early = compare(*words), compare(*words, "stop_early=true")
    assert whole["answered"] == 40
    assert early["verdict"] == whole["verdict"] == "passes"
    assert early["answered"] % 5 == 0
    assert 5 < early["answered"] < 40
    shorter = early["gates"][0]["interval"]
    # one batch less would not have been enough
    zeros = np.zeros(early["answered"])
    assert shorter == sequence(zeros, -1, 1)
    assert shorter[1] <= 0.4 < sequence(zeros[5:], -1, 1)[1]
    unsettled = compare(*words, "gate.lists.max_rise=0.0001", "stop_early=true")
    assert (unsettled["answered"], unsettled["verdict"]) == (40, "not settled")


def test_tools(place, monkeypatch):
    """a calls a tool; b calls it wrongly in half of the answers, and does not call in the others."""
    for name in ("good", "damped"):
        tokenizer = tiny.tokenizer(CALLS)
        tokenizer.save_pretrained(place / f"tools-{name}" / name)
        AutoModelForCausalLM.from_pretrained(place / name).save_pretrained(place / f"tools-{name}" / name)
    right = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    said_by(monkeypatch, {"good": lambda i: right, "damped": lambda i: right.replace('"a"', '"b"') if i % 2 else "4"})
    figures = compare(
        *words_of(place, "tools-good/good", "tools-damped/damped", "sample.max_new_tokens=80", prompts="tools.jsonl")
    )
    found = figures["figures"]
    assert (found["called"]["a"], found["called"]["b"]) == (1.0, 0.5)
    assert (found["bad_call"]["a"], found["bad_call"]["b"]) == (0.0, 0.5)
    assert found["called"]["side"] == -1
    # a template that writes no calls
    plain = compare(*words_said(place, prompts="tools.jsonl"))
    assert "called" not in plain["figures"]
    assert any("calls are left out" in note for note in plain["left_out"])
    with pytest.raises(ConfigError, match=r"gate.called: calls are left out"):
        compare(*words_said(place, "gate.called.max_fall=0.1", prompts="tools.jsonl"))


def test_json_is_looked_for_where_it_is_asked_for(place, monkeypatch, tmp_path):
    rows = [{"prompt": f"Film {i:02}, in JSON."} for i in range(20)] + [{"prompt": f"Film {i}."} for i in range(50, 60)]
    prompts = lines(tmp_path / "j.jsonl", rows)
    said_by(monkeypatch, {"good": lambda i: '{"film": 1}', "damped": lambda i: "A film."})
    found = compare(*words_said(place), f"prompts={prompts}")["figures"]
    assert (found["json"]["a"], found["json"]["b"], found["json"]["prompts"]) == (1.0, 0.0, 20)
    with pytest.raises(ConfigError, match=r"gate.json: no row asks for JSON"):
        compare(*words_said(place, "gate.json.max_fall=0.1"))


def test_other_tokenizers_leave_kl_out_and_say_so(place, monkeypatch):
    said_by(monkeypatch, dict.fromkeys(("good", "other"), lambda i: "A fine film."))
    AutoModelForCausalLM.from_pretrained(place / "good").save_pretrained(place / "other")
    tiny.tokenizer(tiny.CHATML.replace("assistant", "answer")).save_pretrained(place / "other")
    figures = compare(*words_said(place, b="other"))
    assert "kl" not in figures["figures"]
    assert figures["left_out"][0].startswith("KL is left out: the models do not read the same tokens")
    with pytest.raises(ConfigError, match=r"gate.kl: KL is left out"):
        compare(*words_said(place, "gate.kl.max=0.1", b="other"))
    cold = compare(*words_of(place, "good", "good", "sample.temperature=0.5"))
    assert "sample.temperature=1" in cold["left_out"][0]


def test_win_rates_of_a_reward(place, monkeypatch, tmp_path):
    said_by(monkeypatch, {"good": lambda i: "A film.", "damped": lambda i: "A fine film." if i % 4 else "A film."})
    (tmp_path / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    reward = ["reward.kind=callable", f"reward.path={tmp_path / 'length.py'}:score", "gate.win.min=0.5"]
    figures = compare(*words_said(place, *reward))
    assert figures["figures"]["win"]["b"] == pytest.approx(0.75 + 0.25 / 2)
    assert figures["verdict"] == "passes"
    assert figures["means"]["reward"] == pytest.approx([7, 7 + 5 * 0.75])


# --- forgetting ---


def test_the_checks_are_sound():
    found = checks.questions()
    assert len(found) > 100
    assert len({(one.prompt, one.choices[0]) for one in found}) == len(found)
    for one in found:
        assert len(set(one.choices)) == 4, one
    assert ("One child, two", " children") in {(one.prompt, one.choices[0]) for one in found}


def test_checks_beside_plain_transformers(place):
    """Log-probs of every continuation by plain transformers, one row at a time."""
    from favor.model.layout import settle
    from favor.model.load import ModelConfig, load_policy

    some = checks.questions()[::9]
    policy = load_policy(ModelConfig(path=str(place / "llama")), frozen=True)
    trees = checks.trees_of(some, policy.tokenizer)
    settled, _ = settle(policy, "auto", trees)
    found = checks.right(settled, trees, 4096)
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    for one, is_right in zip(some, found, strict=True):
        logps = []
        for text in one.choices:
            ids = policy.tokenizer(one.prompt + text, add_special_tokens=False).input_ids
            start = len(policy.tokenizer(one.prompt, add_special_tokens=False).input_ids)
            with torch.no_grad():
                all_logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            logps.append(sum(float(all_logps[i - 1, ids[i]]) for i in range(start, len(ids))))
        assert is_right == (max(logps) == logps[0])


def test_forgetting_is_planted_and_found(place, monkeypatch):
    """b has a third of them wrong that a has right; alike answers are never right by luck of their order."""
    side = {"good": lambda count: np.ones(count), "damped": lambda count: (np.arange(count) % 3 > 0) * 1.0}
    monkeypatch.setattr(run, "right", lambda policy, trees, _: side[policy.source.rpartition("/")[2]](len(trees)))
    figures = compare(*words_said(place, "checks=true", "gate.checks.max_fall=0.1", "max_prompts=3"))
    one = figures["figures"]["checks"]
    assert (one["a"], round(one["b"], 2), one["side"]) == (1.0, 0.67, -1)
    assert figures["verdict"] == "fails"
    # four continuations that are equally likely: nothing is known
    from favor.data.types import TokenTree
    from favor.model.layout import settle
    from favor.model.load import ModelConfig, load_policy

    alike = [TokenTree((5, 6), ((60,), (61,), (62,), (63,)), (False,) * 4, (), 0, 0)]
    settled, _ = settle(load_policy(ModelConfig(path=str(place / "good")), frozen=True), "auto", alike)
    assert checks.right(settled, alike, 4096).tolist() == [0.0]


# --- page, files, words ---


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_what_models_and_prompts_say_is_text(place, monkeypatch, tmp_path):
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    prompts = lines(tmp_path / "evil.jsonl", [{"prompt": f"{evil} {i}"} for i in range(3)])
    said_by(monkeypatch, {"good": lambda i: f"a {evil}", "damped": lambda i: f"b </p>{evil}{{{{ 7 * 7 }}}}"})
    page = tmp_path / "d.html"
    compare(*words_said(place), f"prompts={prompts}", f"page={page}")
    tags = Tags()
    tags.feed(page.read_text("utf-8"))
    assert not {tag for tag, _ in tags.tags} & {"script", "img"}
    assert not [name for _, attrs in tags.tags for name in attrs if name.startswith("on")]
    assert "&lt;script&gt;" in page.read_text("utf-8")
    assert "{{ 7 * 7 }}" in page.read_text("utf-8").partition('<section id="examples">')[2]


def test_files_are_whole_and_others_are_left(place, tmp_path, monkeypatch):
    said_by(monkeypatch, dict.fromkeys(("good", "damped"), lambda i: "A film."))
    words = words_said(place, f"out={tmp_path / 'd.json'}", f"page={tmp_path / 'd.html'}")
    (tmp_path / "d.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"d.html: is there already"):
        compare(*words)
    assert not (tmp_path / "d.json").exists()
    compare(*words, "overwrite=true")
    first = (tmp_path / "d.json").read_bytes()
    compare(*words)
    assert (tmp_path / "d.json").read_bytes() == first
    with pytest.raises(ConfigError, match="is the file it reads"):
        compare(*words[:-2], f"out={place / 'p.jsonl'}", "overwrite=true")
    assert (place / "p.jsonl").read_text().startswith("{")


def test_sides_may_be_given_as_words(place, monkeypatch, favor, tmp_path):
    """Two folders, or runs, which stand for their models; a recipe holds the rest."""
    said_by(monkeypatch, dict.fromkeys(("good", "damped", "model"), lambda i: "A film."))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text("")
    (tmp_path / "run/model").symlink_to(place / "damped")
    (tmp_path / "gate.toml").write_text(
        f'prompts = "{place / "p.jsonl"}"\nmax_prompts = 9\nchecks = false\n[sample]\nmax_new_tokens = 4\n'
        "[gate.refused]\nmax_rise = 0.9\n"
    )
    code, out, err = favor("diff", "gate.toml", place / "good", "run", "--json")
    assert code == 0, err
    figures = json.loads(out)["figures"]
    assert (figures["a"], figures["b"]) == (str(place / "good"), "run/model")
    assert figures["verdict"] == "passes"
    assert favor("diff", place / "good", place / "good", place / "good")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stop_early=true"], "stop_early is not read: there is no [gate]"),
        (["unsettled=pass"], "unsettled is not read"),
        (["overwrite=true"], "overwrite is not read"),
        (["examples=3"], "examples is not read"),
        (["sample.temperature=0.5", "kl_clip=2"], "kl_clip is not read"),
        (["sample.temperature=0.5", "gate.kl.max=0.1"], "gate.kl needs sample.temperature=1"),
        (["gate.win.min=0.5"], "gate.win needs a section [reward]"),
        (["gate.checks.max_fall=0.1"], "gate.checks needs checks=true"),
        (["gate.refusal.max_rise=0.1"], "gate.refusal: no such figure; known: length, ended"),
        (["gate.kl.max_rise=0.1"], "gate.kl: it is one figure of both models"),
        (["gate.refused={}"], "no limit is set"),
        (["gate.refused.max_rise=-0.1"], "gate.refused.max_rise"),
        (["gate.refused.max_rise=2"], "max_rise is 2, and it is always between 0 and 1"),
        (["gate.length.max=81"], "max is 81, and it is always between 0 and 80"),
        (["gate.ended.min=0.9", "gate.ended.max=0.1"], "nothing is between"),
        (["gate.refused.most=0.1"], "unknown key 'gate.refused.most'"),
        (['refusals=["no", " "]'], "one is blank"),
        (["a.lora.rank=4"], "lora"),
    ],
)
def test_what_would_not_be_read_is_refused(place, words, said):
    with pytest.raises(ConfigError) as error:
        load(DiffConfig, None, words_said(place, *words))
    assert said in str(error.value)


def test_rows_that_cannot_be_used(place, tmp_path):
    check = partial(compare, *words_of(place, "good", "good"))
    prompts = lines(tmp_path / "x.jsonl", [{"prompt": "x", "response_format": "xml"}])
    with pytest.raises(DataError, match=r"row 1: response_format is str 'xml'"):
        check(f"prompts={prompts}")
    prompts = lines(tmp_path / "y.jsonl", [{"prompt": "x"}, {"prompt": "y", "tools": "{"}])
    with pytest.raises(DataError, match=r"row 2: tools is not JSON"):
        check(f"prompts={prompts}")
