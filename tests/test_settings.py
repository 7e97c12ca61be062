"""The list of settings is complete, current and short; `favor init` and `favor schema` say what is true."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from favor import cli
from favor.config import load
from favor.data.read import read_splits
from favor.errors import ConfigError, DataError
from favor.init import recipe_for
from favor.plain import write_new
from favor.settings import RENAMED, models, schema_of, settings
from favor.train.preference import TrainConfig
from favor.train.sft import SftConfig

ROOT = Path(__file__).parent.parent
# settings of a plain DPO run; a setting that is worth one more raises it, with the reason in its message
PLAIN = 54
# pages that may say what a setting was called
PAST = ("CHANGELOG.md", "docs/log.md", "docs/settings.md")


def sections(schema):
    """A config class and every section below it."""
    yield schema
    for field in schema.model_fields.values():
        for inner in models(field.annotation):
            yield from sections(inner)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_setting_has_a_sentence(command):
    for section in set(sections(cli.COMMANDS[command]().config)):
        leaves = {n: f for n, f in section.model_fields.items() if not any(models(f.annotation, lists=False))}
        bare = [name for name, field in leaves.items() if not (field.description or "").strip() and name != "kind"]
        assert bare == [], section.__name__


def test_a_plain_run_has_few_settings():
    found = [s.key for s in settings(TrainConfig) if s.type != "section"]
    assert len(found) == len(set(found)) <= PLAIN


def test_a_choice_shows_the_settings_of_its_kind():
    plain = {s.key for s in settings(TrainConfig)}
    kto = {s.key for s in settings(TrainConfig, {"loss": {"kind": "kto"}})}
    assert "loss.desirable_weight" in kto - plain
    assert "loss.divergence.kind" in plain - kto
    assert "model.lora.*" in plain
    assert "model.lora.rank" in {s.key for s in settings(TrainConfig, {"model": {"lora": {}}})}
    of = {s.key: s.kinds for s in settings(TrainConfig, every=True)}
    assert "simpo" in of["loss.gamma"]


def test_the_page_is_current():
    code = "import runpy, sys; found = runpy.run_path('docs/settings.py'); sys.stdout.write(found['text']())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs/settings.md").read_text("utf-8") == done.stdout, "run `make settings-doc`"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_recipe_has_a_schema(command):
    schema = cli.COMMANDS[command]().config.model_json_schema()
    assert json.loads(json.dumps(schema))["additionalProperties"] is False


def test_the_schema_of_a_loss_allows_what_the_kind_reads():
    schema = TrainConfig.model_json_schema()
    found = [section["properties"] for section in schema["$defs"].values() if "kind" in section["properties"]]
    kinds = {properties["kind"].get("const"): properties for properties in found}
    assert "label_smoothing" in kinds["cdpo"]
    assert "label_smoothing" not in kinds["ipo"]


def test_no_page_uses_an_old_name_of_a_setting():
    """docs/log.md tells of the past, docs/settings.md is made from the code."""
    old = [name for name in RENAMED if re.fullmatch(r"[a-z_]+\.[a-z_]+", name)]
    for page in {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / n for n in PAST}:
        found = re.findall(rf"(?<![\w.])(?:{'|'.join(map(re.escape, old))})(?![\w.])", page.read_text("utf-8"))
        assert found == [], f"{page.name}: {found}; the names of today are in RENAMED (src/favor/settings.py)"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_first_line_of_a_recipe_is_its_command(recipe):
    first = recipe.read_text("utf-8").splitlines()[0]
    assert re.search(rf": favor [a-z]+ recipes/{recipe.name}( \S+=\S+)*$", first), first


@pytest.mark.parametrize(
    ("row", "command", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "train", "dpo"),
        ({"prompt": "a", "completion": "b", "label": True}, "train", "kto"),
        ({"prompt": "a", "completion": "b"}, "sft", None),
    ],
)
def test_init_writes_a_recipe_that_loads(row, command, kind, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "r.toml"
    made, text, _ = recipe_for("./m", str(tmp_path / "d.jsonl"), out)
    assert made == command
    write_new(out, text)
    config = load(TrainConfig if command == "train" else SftConfig, out)
    assert (config.model.path, config.data.train) == ("./m", str(tmp_path / "d.jsonl"))
    if kind:
        assert config.loss.kind == kind
    assert out.read_text("utf-8") == text
    assert "# lr = " in text
    # held-out data, without which favor eval has nothing to measure on
    assert command == "sft" or config.data.hold_out.share == 0.1
    # every line that is not a sentence is TOML once its mark is gone
    lines = [
        line.removeprefix("# ") for line in text.splitlines()[3:] if not line.startswith("#:") and "..." not in line
    ]
    tomllib.loads("\n".join(lines))
    with pytest.raises(ConfigError, match="there already"):
        write_new(out, "other")
    assert out.read_text("utf-8") == text


def test_init_takes_columns_by_their_names_and_says_so(tmp_path):
    """A CSV of one's own needs no hand: the guess stands in the recipe, and reads the file."""
    rows = "".join(f"Name fish {i}.,A trout.,A stone.\n" for i in range(40))
    (tmp_path / "d.csv").write_text(f"question,better,worse\n{rows}")
    data = str(tmp_path / "d.csv")
    _, text, guessed = recipe_for("./m", data, tmp_path / "r.toml", ["optim.lr=1e-6"])
    wanted = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert guessed == (
        "columns: prompt is 'question', chosen is 'better', rejected is 'worse'; guessed by the names, so look whether it is right"
    )
    assert f"# {guessed}\n" in text
    write_new(tmp_path / "r.toml", text)
    config = load(TrainConfig, tmp_path / "r.toml")
    assert (config.data.columns, config.optim.lr, config.data.hold_out.share) == (wanted, 1e-6, 0.1)
    trees, _ = read_splits(config.data)["train"]
    assert trees[0].responses == ("A trout.", "A stone.")


@pytest.mark.parametrize("more", [[], ["data.columns.prompt=customer_message"], ["data.columns.rejected=bad_reply"]])
def test_init_finds_the_prompt_by_what_is_left(tmp_path, more):
    """A column of words beside the two answers, whatever its name; what is typed is kept, the rest guessed."""
    (tmp_path / "d.csv").write_text(
        "id,customer_message,good_reply,bad_reply\nT-1,Where is it?,We look today.,No idea.\n"
    )
    _, text, _ = recipe_for("./m", str(tmp_path / "d.csv"), tmp_path / "r.toml", more)
    assert tomllib.loads(text)["data"]["columns"] == {
        "prompt": "customer_message",
        "chosen": "good_reply",
        "rejected": "bad_reply",
    }
    (tmp_path / "e.csv").write_text(
        "id,what they wrote,good_reply,bad_reply\nT-1,Where is it?,We look today.,No idea.\n"
    )
    _, text, _ = recipe_for("./m", str(tmp_path / "e.csv"), tmp_path / "r.toml")
    assert tomllib.loads(text)["data"]["columns"]["prompt"] == "what they wrote"


def test_init_takes_the_other_answer_for_the_worse_one(tmp_path):
    """liked_reply is known by its name, other_reply by the part that both have; with two such columns nothing is guessed."""
    (tmp_path / "d.csv").write_text(
        "no,customer_wrote,liked_reply,other_reply\n1,Where is it?,We look today.,No idea.\n"
    )
    _, _, mapped = recipe_for("./m", str(tmp_path / "d.csv"), tmp_path / "r.toml")
    assert mapped.startswith(
        "columns: prompt is 'customer_wrote', chosen is 'liked_reply', rejected is 'other_reply'; "
    )
    (tmp_path / "e.csv").write_text(
        "no,customer_wrote,liked_reply,other_reply,third_reply\n1,Where is it?,We look today.,No idea.,None.\n"
    )
    with pytest.raises(DataError, match=r"e\.csv, row 2: .*; name them: 'columns="):
        recipe_for("./m", str(tmp_path / "e.csv"), tmp_path / "r.toml")


def test_init_does_not_write_a_recipe_that_reads_nothing(tmp_path):
    """Two columns could be the prompt: neither is taken, and the remedy is said, once."""
    (tmp_path / "d.csv").write_text("theme a,theme b,good,bad\nto be,or not,We look today.,No idea.\n")
    with pytest.raises(DataError, match=r"name the prompt's column: 'columns=\{prompt=\"COLUMN\"\}'$"):
        recipe_for("./m", str(tmp_path / "d.csv"), tmp_path / "r.toml")


def test_init_takes_settings(tmp_path):
    """What is typed wins over what is guessed; what no recipe has is refused."""
    (tmp_path / "d.csv").write_text("question,better,worse\nA fish?,A trout.,A stone.\n")
    swapped = [
        'columns={prompt="question", chosen="worse", rejected="better"}',
        "data.eval=held.jsonl",
        "loss.kind=ipo",
    ]
    _, text, mapped = recipe_for("./m", str(tmp_path / "d.csv"), tmp_path / "r.toml", swapped)
    found = tomllib.loads(text)
    assert mapped == "columns: prompt is 'question', chosen is 'worse', rejected is 'better'"
    assert f"# {mapped}\n" in text
    assert found["data"]["columns"]["chosen"] == "worse"
    assert (found["data"]["eval"], found["loss"]["kind"]) == ("held.jsonl", "ipo")
    assert "hold_out" not in found["data"]
    with pytest.raises(ConfigError, match="unknown key 'optim.rate'"):
        recipe_for("./m", str(tmp_path / "d.csv"), tmp_path / "r.toml", ["optim.rate=1"])


def test_init_refuses_what_is_no_preference_file(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": 1}\n')
    with pytest.raises(DataError, match="d.jsonl, row 1"):
        recipe_for("m", str(tmp_path / "d.jsonl"), tmp_path / "r.toml")


def test_the_list_refuses_a_kind_that_is_not_there():
    for kind in ("nope", [1]):
        with pytest.raises(ConfigError, match="choose one of dpo, "):
            list(settings(TrainConfig, {"loss": {"kind": kind}}))


def test_a_schema_allows_a_section_without_its_kind():
    """oneOf would refuse [optim] lr = 1e-6, which fits two kinds."""
    assert '"oneOf"' not in json.dumps(schema_of(TrainConfig))
