"""`favor lint` finds each planted fault by its name and row, nothing in clean data, and cleans what can be cleaned."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import tiny
import torch
from oracles import plain_logps
from transformers import AutoModelForCausalLM

from favor.config import load
from favor.data.formats import FORMATS
from favor.data.read import read_splits
from favor.data.tokenize import TokenReport, TokensConfig, tokenize
from favor.errors import ConfigError, DataError
from favor.lint.cheap import CHECKS
from favor.lint.models import as_tree, model_gaps
from favor.lint.rows import row_of
from favor.lint.run import fails, lint
from favor.lint.sets import near_pairs, shingles
from favor.lint.settings import KINDS, LintConfig
from favor.model.load import ModelConfig, load_policy
from favor.run import cache_folder

WHO = [
    "critic",
    "teacher",
    "nurse",
    "pilot",
    "farmer",
    "poet",
    "judge",
    "baker",
    "sailor",
    "painter",
    "tailor",
    "miner",
]
WHAT = ["praises", "describes", "remembers", "questions", "defends", "dislikes", "explains", "compares"]
WHICH = ["quiet", "ancient", "bright", "narrow", "gentle", "crooked", "distant", "golden", "hollow", "sudden"]
THING = ["bridge", "garden", "harbour", "letter", "melody", "mountain", "painting", "recipe", "station", "winter"]


def sentence(rng):
    """Ten everyday words in an order that hardly comes twice."""
    return (
        f"The {rng.choice(WHICH)} {rng.choice(WHO)} {rng.choice(WHAT)} the {rng.choice(WHICH)} {rng.choice(THING)} "
        f"near the {rng.choice(WHICH)} {rng.choice(THING)}"
    )


def clean_rows(count=60, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt": f"{sentence(rng)}: go on.", "chosen": sentence(rng), "rejected": sentence(rng)} for _ in range(count)
    ]


def change(**columns):
    """A plant that changes row 11."""

    def plant(train, held_out):
        train[10] = {k: v(train[10]) if callable(v) else v for k, v in (train[10] | columns).items()}
        return [("train", 11)]

    return plant


def swap(train, held_out):
    train.append(train[4] | {"chosen": train[4]["rejected"], "rejected": train[4]["chosen"]})
    return [("train", 61)]


def repeat(train, held_out):
    train.append(dict(train[7]))
    return [("train", 61)]


def nearly(train, held_out):
    row = train[7]
    train.append(row | {"chosen": row["chosen"] + " indeed"})
    return [("train", 61)]


def leak(train, held_out):
    held_out[3]["prompt"] = train[20]["prompt"]
    return [("eval", 4)]


def near_leak(train, held_out):
    held_out[3]["prompt"] = train[20]["prompt"] + " Please"
    return [("eval", 4)]


def longer(train, held_out):
    for row in train[:55]:
        row["chosen"] += ", and so it stayed all the long summer"
    return []


def openings(train, held_out):
    for row in train[:50]:
        row["chosen"] = "Great question! " + row["chosen"]
        row["rejected"] += ", as they do say"
    return []


def swapped_label(train, held_out):
    for row in train:
        row["chosen"] += " gladly"
        row["rejected"] += " sadly!"
    train[30]["chosen"], train[30]["rejected"] = train[30]["rejected"], train[30]["chosen"]
    return [("train", 31)]


def too_long(train, held_out):
    for row in train[:6]:
        row["rejected"] = " ".join([row["rejected"]] * 40)
    return [("train", i + 1) for i in range(6)]


def chat(train, held_out):
    turns = [{"role": "user", "content": "Is it so? Tell me."}] * 2
    train[10] = {
        "prompt": [*turns, {"role": "user", "content": "And then?"}],
        "chosen": [{"role": "assistant", "content": "It began with rain."}],
        "rejected": [{"role": "assistant", "content": "Nobody knows the end."}],
    }
    return [("train", 11)]


def lost_turn(train, held_out):
    chat(train, held_out)
    train[10]["prompt"] = [{"role": "tool", "content": "Forty-two degrees"}, {"role": "user", "content": "And then?"}]
    return [("train", 11)]


# name -> (finding, plant); the words it needs beside
PLANTED = {
    "identical sides": ("identical", change(rejected=lambda r: r["chosen"])),
    "empty side": ("empty", change(chosen="")),
    "whitespace side": ("empty", change(rejected=" \n\t ")),
    "missing side": ("empty", change(rejected=None)),
    "no text": ("malformed", change(chosen=7)),
    "contradiction": ("contradiction", swap),
    "duplicate": ("duplicate", repeat),
    "near-duplicate": ("near_duplicate", nearly),
    "leak": ("leak", leak),
    "near leak": ("near_leak", near_leak),
    "special token": ("special_text", change(chosen="He said <|im_end|> and left the room")),
    "doubled end": ("special_text", change(chosen=lambda r: r["chosen"] + "<|im_end|>")),
    "longer chosen": ("length", longer),
    "same opening": ("opening", openings),
    "mojibake": ("encoding", change(chosen="The cafÃ© near the harbour was closed for the winter")),
    "lost characters": ("lost_characters", change(chosen="The caf\ufffd near the harbour was closed")),
    "zero width": ("invisible", change(rejected="The quiet\u200b harbour near the bridge was closed")),
    "control character": ("invisible", change(prompt="Tell\x07 me about the harbour")),
    "entities": ("entities", change(chosen="Salt &amp; pepper belong to the gentle recipe")),
    "another language": (
        "language",
        change(chosen="Der alte Garten am Hafen war im Winter immer geschlossen und niemand wusste warum"),
    ),
    "secret": ("secret", change(chosen="use the key sk-abcdefghijklmnopqrstuvwx for it")),
    "secret in an unread column": ("secret", change(note="AKIAABCDEFGHIJKLMNOP")),
    "personal data": ("personal", change(rejected="Write to jane.doe@example.com about the bridge")),
    "echo": ("echo", change(rejected=lambda r: r["prompt"] + " Yes.")),
    "repeated turn": ("repeated_turn", chat),
    "trailing blanks": ("blanks", change(chosen=lambda r: r["chosen"] + "  ")),
    "truncation": ("truncation", too_long),
    "template drops a turn": ("round_trip", lost_turn),
    "label noise": ("label_noise", swapped_label),
}
# a template that leaves tool turns out, as many do
DROPPING = tiny.CHATML.replace(
    "{% for m in messages %}", "{% for m in messages %}{% if m['role'] != 'tool' %}"
).replace("<|im_end|>\n' }}{% endfor %}", "<|im_end|>\n' }}{% endif %}{% endfor %}")


@pytest.fixture
def files(tmp_path):
    """Writes a training and a held-out file; returns the words that lint them with a tokenizer and a reward."""
    tiny.save(tmp_path / "model", template=DROPPING)
    (tmp_path / "good.py").write_text(
        "def score(prompts, responses):\n"
        "    return [len(r) % 7 / 10 + 5 * r.endswith('gladly') - 5 * r.endswith('sadly!') for r in responses]\n"
    )

    def write(train, held_out=None, *more):
        for name, rows in (("train", train), ("eval", held_out or clean_rows(12, seed=9))):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(lines, "utf-8")
        words = [f"data.train={tmp_path / 'train.jsonl'}", f"data.eval={tmp_path / 'eval.jsonl'}"]
        words += [f"model.path={tmp_path / 'model'}", "tokens.template=chat", "tokens.max_tokens=400"]
        return load(LintConfig, None, [*words, *more])

    return write


def worse_than_notes(findings):
    return {f.kind: f for f in findings if f.severity != "note"}


def reward(tmp_path):
    return ["reward.kind=callable", f"reward.path={tmp_path / 'good.py'}:score"]


def test_rows_that_all_fail_are_told_by_their_numbers(files):
    """As where one is left: file and row, from 1."""
    said = [{"role": "assistant", "content": "", "reasoning_content": "hm"}]
    bad = [{**row, "rejected": said} for row in clean_rows(4)]
    found = [f for f in lint(files(bad)) if f.severity == "error"]
    assert found
    told = " ".join(str(f) for f in found)
    assert "row 0" not in told
    assert "row 1" in told
    assert "max_tokens" not in told


def test_clean_data_has_no_findings(files, tmp_path):
    for seed in range(3):
        found = lint(files(clean_rows(seed=seed), None, *reward(tmp_path)))
        assert worse_than_notes(found) == {}
        assert {"read", "length"} <= {f.kind for f in found}


def test_there_are_enough_faults():
    assert len(PLANTED) >= 20


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(files, tmp_path, fault):
    name, plant = PLANTED[fault]
    train, held_out = clean_rows(), clean_rows(12, seed=9)
    rows = plant(train, held_out)
    found = worse_than_notes(lint(files(train, held_out, *reward(tmp_path))))
    assert set(found) == {name}
    assert [(tmp_path / f"{part}.jsonl").as_posix() for part, _ in rows] == [source for source, _ in found[name].rows]
    assert [number for _, number in rows] == [number for _, number in found[name].rows]
    if rows:
        assert found[name].examples or name == "truncation"


CLEANABLE = [
    fault for fault in PLANTED if PLANTED[fault][0] not in ("length", "opening", "leak", "near_leak", "label_noise")
]


@pytest.mark.parametrize("fault", CLEANABLE)
def test_fix_writes_a_clean_copy_and_says_what_it_did(files, tmp_path, fault):
    train, held_out = clean_rows(), clean_rows(12, seed=9)
    rows = PLANTED[fault][1](train, held_out)
    before = json.loads(json.dumps(train))
    clean = tmp_path / "clean.jsonl"
    lint(files(train, held_out, f"lint.fix={clean}"))
    kept = [json.loads(line) for line in clean.read_text("utf-8").splitlines()]
    actions = [json.loads(line) for line in (tmp_path / "clean.actions.jsonl").read_text("utf-8").splitlines()]
    touched = {a["row"] for a in actions}
    assert {number for _, number in rows} <= touched
    assert len(touched) <= len(rows) + 1  # a contradiction takes both its rows
    dropped = {a["row"] for a in actions if a["action"] == "dropped"}
    assert len(kept) == len(train) - len(dropped)
    untouched = [row for number, row in enumerate(before, 1) if number not in touched]
    assert [row for row in kept if row in untouched] == untouched
    again = lint(files(kept, held_out, f"lint.fix={tmp_path / 'again.jsonl'}"))
    assert worse_than_notes(again) == {}
    assert (tmp_path / "again.actions.jsonl").read_text() == ""
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text("utf-8").splitlines()] == kept


def says(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "assistant", "content": "I look it up.", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("call", "tools", "said"),
    [
        (("weather", '{"town": "Os'), True, "the arguments of weather are no JSON object"),
        (("weather", '{"town": "Os'), False, "the arguments of weather are no JSON object"),
        (("rain", {"town": "Oslo"}), True, "rain is not among the row's tools (weather)"),
        (("weather", '{"city": "Oslo"}'), True, "do not fit its schema"),
        (("weather", {"town": 7}), True, "do not fit its schema"),
        (("weather", '{"town": "Oslo"}'), True, None),
        (("weather", {"town": "Oslo"}), True, None),
        (("rain", {"any": 1}), False, None),
    ],
)
def test_calls_of_preferred_responses_are_calls_that_a_tool_takes(tmp_path, call, tools, said):
    """Those of the worse one may be broken: that is mostly why it is worse."""
    schema = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
    known = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    row = {"prompt": [{"role": "user", "content": "Rain?"}], "chosen": says(*call), "rejected": says("wether", "{")}
    path, clean = tmp_path / "calls.jsonl", tmp_path / "clean.jsonl"
    path.write_text(
        "".join(json.dumps(one) + "\n" for one in [*clean_rows(3), row | ({"tools": known} if tools else {})])
    )
    found = [f for f in lint(load(LintConfig, None, [f"data.train={path}", f"lint.fix={clean}"])) if f.kind == "calls"]
    assert [f.rows for f in found] == ([((str(path), 4),)] if said else [])
    assert len(clean.read_text().splitlines()) == (3 if said else 4)
    if said:
        assert said in found[0].examples[0]


def test_variables_that_no_template_reads_are_counted(files):
    rows = clean_rows(6)
    for row, given in zip(rows, ({"enable_thinkin": True}, {"add_generation_prompt": True}, None), strict=False):
        row |= {"chat_template_kwargs": given} if given else {}
    (found,) = [f for f in lint(files(rows)) if f.kind == "variables"]
    assert (found.severity, found.message.split()[0]) == ("note", "1")


def test_what_is_no_fault(files):
    """Typographic quotes, accents, emoji of several parts, code, tags in a note only."""
    train = clean_rows()
    train[1]["chosen"] = "“Über” the naïve café — it\u2019s fine… 👩\u200d🚀 said the poet"
    train[2]["chosen"] = "x = {'a': [1, 2]}  # see the bridge\nprint(x)"
    train[3]["chosen"] = "Use <b>bold</b> near the harbour and the bridge"
    found = lint(files(train))
    assert worse_than_notes(found) == {}
    assert next(f for f in found if f.kind == "markup").rows[0][1] == 4


def test_rows_of_one_prompt_are_no_near_duplicates(files):
    """Six pairs of four answers share prompt and sides; two answers that differ in a word are near-duplicates."""
    rng, train = random.Random(5), clean_rows()
    answers = [sentence(rng) for _ in range(4)]
    prompt = " ".join(sentence(rng) for _ in range(4))
    train += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in itertools.combinations(answers, 2)]
    assert worse_than_notes(lint(files(train))) == {}


def test_mapped_columns_are_read_and_the_clean_copy_keeps_their_names(files, tmp_path):
    train = [
        {"question": r["prompt"], "chosen": r["chosen"], "rejected": r["rejected"], "by": "x"} for r in clean_rows()
    ]
    train[10]["chosen"] += "  "
    clean = tmp_path / "clean.jsonl"
    config = files(train, None, 'data.columns={prompt="question"}', f"lint.fix={clean}")
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": None})})
    found = lint(config)
    assert set(worse_than_notes(found)) == {"blanks"}
    assert next(f for f in found if f.kind == "unread_column").message.endswith("read: by (60)")
    assert all(set(json.loads(line)) == set(train[0]) for line in clean.read_text("utf-8").splitlines())


def test_severity_decides_the_exit(files):
    train = clean_rows()
    config = files(train)
    assert not fails(config, lint(config))
    repeat(train, None)
    for level, expected in (("error", False), ("warning", True), ("never", False)):
        config = files(train, None, f"lint.fail_on={level}")
        assert fails(config, lint(config)) is expected


def test_a_model_doubts_labels(files, tmp_path):
    """The gaps are those of plain transformers; a reference turns mean log-probs into log-ratios."""
    train = clean_rows(14)
    model, reference = tmp_path / "model", tmp_path / "other"
    tiny.model(seed=3).save_pretrained(reference)
    tiny.tokenizer(template=DROPPING).save_pretrained(reference)
    for more, by in (([], "the model"), ([f"lint.reference={reference}"], "the implicit reward")):
        found = {f.kind: f for f in lint(files(train, None, "lint.doubt=true", "model.dtype=float32", *more))}
        assert found["agreement"].message.startswith(by)
    policy, other = (load_policy(ModelConfig(path=str(path), dtype="float32")) for path in (model, reference))
    rows = [row_of("train", ("t", i), row, FORMATS["pairs"](row)) for i, row in enumerate(train)]
    settings = TokensConfig(template="chat")
    logps = []
    trees, _ = tokenize(
        [as_tree(row, i) for i, row in enumerate(rows)], policy.tokenizer, settings, policy.end_ids, "error"
    )
    for path in (model, reference):
        with torch.no_grad():
            logps.append(plain_logps(AutoModelForCausalLM.from_pretrained(path), trees))
    lengths = torch.tensor([len(r) for tree in trees for r in tree.response_ids])
    for ref, value in ((None, logps[0] / lengths), (other, logps[0] - logps[1])):
        gaps = [gap.value for gap in model_gaps(rows, policy, ref, settings)]
        assert gaps == pytest.approx((value[::2] - value[1::2]).tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="only with lint.doubt=true"):
        LintConfig.model_validate({"data": {"train": "x"}, "lint": {"reference": "x"}})


def test_page_and_json_escape_what_they_show(files, tmp_path):
    train = clean_rows()
    train[10]["chosen"] = "<script>alert(1)</script> &amp; more of the harbour"
    lint(files(train, None, f"lint.page={tmp_path / 'p.html'}", f"lint.out={tmp_path / 'p.json'}"))
    page = (tmp_path / "p.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "&amp;amp;" in page
    found = json.loads((tmp_path / "p.json").read_text("utf-8"))["findings"]
    assert {"entities", "markup", "read"} <= {f["kind"] for f in found}


def test_refusals(files, tmp_path):
    train = clean_rows(4)
    with pytest.raises(ConfigError, match="is the file it reads"):
        lint(files(train, None, f"lint.fix={tmp_path / 'train.jsonl'}"))
    with pytest.raises(DataError, match="no row is left after cleaning; nothing was written"):
        lint(files([{"prompt": "p", "chosen": "", "rejected": "x"}], None, f"lint.fix={tmp_path / 'c.jsonl'}"))
    assert not (tmp_path / "c.jsonl").exists()
    found = lint(files(train, None, "model.path=./nowhere"))
    assert any(f.kind == "tokenizer" and "left out" in f.message for f in found)


def test_near_pairs_against_all_pairs():
    """The candidates of the hashing are checked exactly: never a wrong pair, and hardly one missed."""
    rng = random.Random(3)
    texts = [" ".join(sentence(rng) for _ in range(4)) for _ in range(60)]
    texts += [text.replace("The", "A", 1) for text in texts[:30]]
    grams = [shingles(text) for text in texts]
    expected = {
        (i, j)
        for i in range(len(texts))
        for j in range(i)
        if len(grams[i] & grams[j]) >= 0.8 * len(grams[i] | grams[j])
    }
    found = set(near_pairs(texts, 0.8))
    assert found <= expected
    assert len(found) >= 0.97 * len(expected) > 20


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's real quotes, cleaned: the first 60 training and 12 held-out rows."""
    folder = cache_folder() / "reviews"
    if not (folder / "train.jsonl").exists():
        pytest.skip("the embedded data is not in the cache: run `favor demo` once")
    found = []
    for name, count in (("train", 60), ("test", 12)):
        clean = tmp_path_factory.mktemp("demo") / "clean.jsonl"
        lint(load(LintConfig, None, [f"data.train={folder / name}.jsonl", f"lint.fix={clean}"]))
        # the whole cleaned file has no finding, not only the rows used below
        assert worse_than_notes(lint(load(LintConfig, None, [f"data.train={clean}"]))) == {}
        found.append([json.loads(line) for line in clean.read_text("utf-8").splitlines()[:count]])
    return found


@pytest.mark.slow
def test_the_demo_data_comes_out_clean(files, demo, tmp_path):
    """The real quotes hold some entities and some quotes in other languages; the cleaned copy gives no finding."""
    assert worse_than_notes(lint(files(*demo, *reward(tmp_path)))) == {}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found_in_the_demo_data(files, demo, tmp_path, fault):
    train, held_out = json.loads(json.dumps(demo))
    name, plant = PLANTED[fault]
    rows = plant(train, held_out)
    found = worse_than_notes(lint(files(train, held_out, *reward(tmp_path))))
    assert set(found) == {name}
    assert [number for _, number in rows] == [number for _, number in found[name].rows]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lnit.near=0"], "unknown key 'lnit.near'; did you mean 'lint.near'?"),
        (["tokns.max_tokens=9"], "unknown key 'tokns.max_tokens'; did you mean 'tokens.max_tokens'?"),
        # of a section of training recipes, which lint passes over
        (["trian.epochs=1"], "unknown key 'trian.epochs'; did you mean 'train.epochs'?"),
        (["zzz=1"], "unknown key 'zzz'; known here: data, tokens, lint, model, reward"),
        (["lint.naer=0"], "did you mean 'lint.near'?"),
    ],
)
def test_misspelt_sections_are_refused(words, said):
    with pytest.raises(ConfigError) as error:
        load(LintConfig, None, ["data.train=x.jsonl", *words])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "by"),
    [
        ("lint.noise=2", "reward.kind or lint.doubt=true"),
        ("lint.doubt=true", "model.path"),
        ("lint.cut_share=0.1", "model.path"),
        ("lint.overwrite=true", "lint.out, lint.page or lint.fix"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(words, by):
    with pytest.raises(ConfigError, match=f"is read only with {by}; set that or remove it"):
        load(LintConfig, None, ["data.train=x.jsonl", words])


def test_a_reason_that_many_rows_share_is_told_once(files):
    train = [{key: value for key, value in row.items() if key != "prompt"} for row in clean_rows()]
    (told,) = [finding for finding in lint(files(train, None)) if finding.kind == "malformed"]
    assert len(told.rows) == len(train)
    (example,) = told.examples
    assert example.endswith("name the prompt's column: 'columns={prompt=\"COLUMN\"}'")


@pytest.mark.parametrize("count", [0, 2, 9])
def test_every_finding_shows_as_many_rows_as_asked(files, count):
    """Contradictions and languages too; without examples the message names the first rows."""
    train = clean_rows()
    german = "Der alte Garten am Hafen war im Winter immer geschlossen und niemand wusste warum"
    for number in range(5):
        train[number]["chosen"] = f"{german} {number}"
    train += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in train[20:28]]
    train += [dict(row) for row in train[30:38]]
    found = worse_than_notes(lint(files(train, None, f"lint.examples={count}", "lint.near=0")))
    assert {kind: len(finding.rows) for kind, finding in found.items()} == {
        "contradiction": 8,
        "duplicate": 8,
        "language": 5,
    }
    for finding in found.values():
        assert len(finding.examples) == min(count, len(finding.rows))
        assert ("(rows " in finding.message) == (count == 0)


def test_training_and_lint_say_the_same_of_a_file(files):
    """One lint: kinds, severities and thresholds are the same; only what stands for a row differs."""
    train, held_out = clean_rows(), clean_rows(12, seed=9)
    longer(train, held_out)
    train[3]["rejected"] += "  "
    leak(train, held_out)
    train.append(train[8] | {"chosen": train[8]["rejected"], "rejected": train[8]["chosen"]})
    config = files(train, held_out)
    cheap = {"length", "blanks", "stub", "contradiction", "leak", "truncation"}
    said = {(f.kind, f.severity) for f in lint(config) if f.kind in cheap}
    splits = read_splits(config.data)
    trees, held = splits["train"][0], splits["eval"][0]
    training = [*CHECKS.split(trees, TokenReport("chat", trees=len(trees))), *CHECKS.leaks(trees, held)]
    # lint speaks of the lengths of every part together, training of each split
    assert (
        {(f.kind, f.severity) for f in training}
        == said
        == {
            ("length", "warning"),
            ("blanks", "warning"),
            ("contradiction", "error"),
            ("leak", "error"),
        }
    )


def test_a_row_is_classified_by_the_kind_of_its_error(files):
    """What the reason says in English does not matter: a column may be called as it likes."""
    train = clean_rows()
    train[4] = {"prompt": "p", "chosen": "a b", "rejected": ["is empty"]}
    train[5]["rejected"] = train[5]["chosen"]
    train[6]["chosen"] = " "
    found = worse_than_notes(lint(files(train)))
    assert {kind: [number for _, number in finding.rows] for kind, finding in found.items()} == {
        "malformed": [5],
        "identical": [6],
        "empty": [7],
    }


def test_the_page_says_what_the_table_of_kinds_says():
    """docs/lint.md: every kind with its severity, and whether --fix leaves its rows out."""
    text = (Path(__file__).parent.parent / "docs/lint.md").read_text("utf-8")
    told = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            kinds, severity, *_, fix = (part.strip() for part in line.strip("|").split(" |"))
            told |= {kind.strip("` "): (severity.split(",")[0], fix.startswith("drops")) for kind in kinds.split(",")}
    assert {kind: (severity, drops) for kind, (severity, _, drops) in KINDS.items()}.items() <= told.items()


def test_every_training_recipe_is_a_recipe_for_lint():
    """What its sections say beside the data is passed over, so lint must know their names."""
    from favor.lint.settings import ELSEWHERE
    from favor.train import ppo, preference, reward, sft

    recipes = (preference.TrainConfig, sft.SftConfig, reward.RewardTrainConfig, ppo.PpoConfig)
    keys = {key for recipe in recipes for key in recipe.model_fields}
    assert keys - LintConfig.model_fields.keys() == ELSEWHERE


def test_the_page_says_why_and_what_to_do_and_hides_what_is_private(files, tmp_path):
    train = clean_rows()
    key = "sk-" + "abcdefghijklmnop" * 2
    train[3] |= {"chosen": f"the key is {key}  ", "rejected": "no key of mine"}
    train[5] |= {"chosen": "the very same words", "rejected": "the very same words"}
    lint(files(train, None, f"lint.page={tmp_path / 'p.html'}"))
    page = (tmp_path / "p.html").read_text("utf-8")
    # the row is told twice, as a secret and for its blanks
    assert key not in page
    assert "no key of mine" not in page
    assert "its texts are not shown" in page
    for text in (
        "Both answers are the same text",
        "nothing to prefer",
        "In 1 row.",
        "--fix clean.jsonl",
        ">preferred<",
    ):
        assert text in page, text
    assert page.count("the very same words") == 2
    assert str(tmp_path) not in page


def test_every_finding_has_a_sentence_and_a_reason():
    from favor.lint.advice import ADVICE

    told = set(
        re.findall(
            r"^\| (`\w+`(?:, `\w+`)*) \|", (Path(__file__).parent.parent / "docs/lint.md").read_text(), re.MULTILINE
        )
    )
    names = {name.strip("`") for row in told for name in row.split(", ")}
    assert len(names) > 30
    assert names == set(ADVICE)
    assert set(KINDS) <= names
    assert all(advice.title for advice in ADVICE.values())
