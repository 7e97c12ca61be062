"""Bad settings over every command: each is refused by one line that names what is wrong, or accepted and provably honoured.

Run as a program it prints the table: `python tests/bad_settings.py` (a name as its argument runs the cases that contain it).
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

# as the command line does, before transformers is imported
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import tiny

from favor.cli import main

ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
LENGTH = "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
FIRST = "def judge(prompt, a, b):\n    return 'A'\n"
TOML = (
    "train",
    "sft",
    "reward",
    "ppo",
    "eval",
    "score",
    "winrate",
    "diff",
    "sample",
    "prefer",
    "loop",
    "frontier",
    "lint",
    "value",
    "ask",
    "audit",
    "realign",
    "conform",
    "demo",
)
SEEDLESS = ("frontier", "lint", "conform")


class Case(NamedTuple):
    """A command with bad (or odd) settings. `names`: what the one line must hold; empty: accepted, and `check(here)` is true."""

    name: str
    words: Callable[[Path, Path], list[str]]
    names: tuple[str, ...] = ()
    check: Callable[[Path], Any] = lambda here: True
    slow: bool = False
    environment: Mapping[str, str] = MappingProxyType({})


class Outcome(NamedTuple):
    """kind: refused, accepted (both as they should be), traceback, silent (accepted what is bad), unclear, unwelcome, endless."""

    kind: str
    detail: str


def prepare(folder):
    """A tiny model, good data, functions, and a finished run."""
    tiny.save(folder / "model")
    lines(folder / "good.jsonl", ROWS)
    lines(
        folder / "many.jsonl",
        [{"prompt": f"Film {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(24)],
    )
    lines(folder / "a.jsonl", [{"prompt": r["prompt"], "responses": [r["chosen"]]} for r in ROWS])
    lines(folder / "b.jsonl", [{"prompt": r["prompt"], "responses": [r["rejected"]]} for r in ROWS])
    (folder / "length.py").write_text(LENGTH)
    (folder / "first.py").write_text(FIRST)
    words = [*base("train", folder), f"run={folder / 'run'}", f"data.eval={folder / 'good.jsonl'}"]
    with (
        mock.patch.object(sys, "argv", ["favor", *words]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        main()
    assert (folder / "run/model").is_dir()
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def base(command, inputs):
    """Words with which the command would succeed."""
    model, data = [f"model.path={inputs / 'model'}", "model.dtype=float32"], f"{inputs / 'good.jsonl'}"
    engine = [f"engine.{word}" for word in model]
    reward = ["reward.kind=callable", f"reward.path={inputs / 'length.py'}:score"]
    steps, drawn = ["train.batch_prompts=2", "train.max_steps=1"], "sample.max_new_tokens=3"
    task = [f"task.{k}={v}" for k, v in (("model", inputs / "model"), ("prompts", data), ("eval_prompts", data))]
    words = {
        "train": ["run=run", *model, f"data.train={data}", *steps],
        "sft": ["run=run", *model, f"data.train={data}", *steps],
        "reward": ["run=run", *model, f"data.train={data}", *steps],
        "ppo": ["run=run", *model, f"data.train={data}", *steps, *reward, drawn],
        "eval": [f"run={inputs / 'run'}", "sample_prompts=1", drawn],
        "score": ["out=out.jsonl", f"data={data}", *reward],
        "winrate": ["run=run", f"a.file={inputs / 'a.jsonl'}", f"b.file={inputs / 'b.jsonl'}", "judge.kind=callable"]
        + [f"judge.path={inputs / 'first.py'}:judge"],
        "diff": [f"a={inputs / 'model'}", f"b={inputs / 'model'}", f"prompts={data}", "checks=false", drawn],
        "sample": ["out=out.jsonl", f"prompts={data}", *engine, drawn],
        "prefer": ["out=out.jsonl", f"prompts={data}", *engine, drawn, *reward],
        "loop": ["run=run", "rounds=1", f"prompts={data}", *model, drawn, *reward, *steps, "prompts_per_round=2"],
        "frontier": ["run=run", *task, *(f"task.{word}" for word in reward)],
        "lint": [f"data.train={data}", "lint.fail_on=never"],
        "value": [*model, f"data.train={inputs / 'many.jsonl'}", "value.out=out.jsonl"],
        "ask": [*model, f"pool={data}", "out=out.jsonl"],
        "audit": [
            "run=run",
            f"data={data}",
            f"human={data}",
            "judge.kind=callable",
            f"judge.path={inputs / 'first.py'}:judge",
        ],
        "realign": [
            f"run={inputs / 'run'}",
            "lambdas=[0,1]",
            "sample_prompts=1",
            drawn,
            "out=out.json",
            "page=out.html",
        ],
        "conform": ["adapter=favor", "cases=first_loss"],
        "report": [f"{inputs / 'run'}"],
        "demo": ["run=run"],
    }
    return [command, *words[command]]


def bad(command, *more, names, name=None, **options):
    """The command's good words and bad ones after them."""
    return Case(
        name or f"{command} {' '.join(more)}"[:90], lambda i, h: [*base(command, i), *more], tuple(names), **options
    )


def odd(command, *more, check=lambda here: True, **options):
    """Words that look odd and are honoured."""
    return Case(f"{command} {' '.join(more)}"[:90], lambda i, h: [*base(command, i), *more], (), check, **options)


def recipe(name, content, *names, command="train", make=None, check=lambda here: True, slow=False):
    """The command with a recipe file of this content (bytes or text; {base} is filled in by good TOML)."""

    def words(inputs, here):
        path = here / "r.toml"
        if make is not None:
            make(path, inputs)
        else:
            raw = content if isinstance(content, bytes) else content.replace("{base}", toml(inputs)).encode()
            path.write_bytes(raw)
        return [command, str(path)]

    return Case(f"recipe: {name}", words, names, check, slow)


def toml(inputs):
    return (
        f'run = "run"\nmodel = {{path = "{inputs / "model"}", dtype = "float32"}}\n'
        f'data = {{train = "{inputs / "good.jsonl"}"}}\ntrain = {{batch_prompts = 2, max_steps = 1}}\n'
    )


def function(name, code, *names, command="score", entry="score", check=lambda here: True):
    """A function of the user's."""

    def words(inputs, here):
        (here / "mine.py").write_text(code)
        key = "judge" if command == "winrate" else "reward"
        return [*base(command, inputs), f"{key}.path={here / 'mine.py'}:{entry}"]

    return Case(f"function: {name} ({command})", words, names and ("mine.py", *names), check)


def config_of(run):
    return tomllib.loads((run / "config.toml").read_text("utf-8"))


def config(here):
    return config_of(here / "run")


def scores(here):
    return [json.loads(line)["scores"] for line in (here / "out.jsonl").read_text("utf-8").splitlines()]


def fifo(path, inputs):
    """A recipe through a pipe, as the shell's <(...) gives it."""
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_text(toml(inputs)), daemon=True).start()


def every_command():
    """The same faults in every command that takes a recipe."""
    for command in TOML:
        yield bad(command, "nonsense=1", names=["nonsense"])
        yield bad(command, "=1", names=["=1", "section.key=value"])
        yield bad(command, "a..b=1", names=["a..b=1"])
        yield bad(
            command,
            "seed=-1" if command not in SEEDLESS else "data=1",
            names=["seed"] if command not in SEEDLESS else ["data"],
        )
        yield bad(command, "two.toml", "three.toml", names=["two.toml", "three.toml"])


def seeds():
    for command in ("train", "sft", "reward", "ppo", "eval", "score", "winrate", "sample", "prefer", "loop", "demo"):
        yield bad(command, "seed=" + "1" + "0" * 30, names=["seed"])
    for command in ("train", "sample", "eval", "loop", "ppo"):
        yield bad(command, f"seed={2**64}", names=["seed"])
        yield odd(command, "seed=4294967295", check=None if command == "eval" else lambda here: True)
    yield bad("frontier", "seeds=[1" + "0" * 30 + "]", names=["seeds"])
    yield bad("frontier", "seeds=[-1]", names=["seeds"])
    yield bad("train", "seed=" + "9" * 5000, names=["seed"], name="train seed of 5,000 digits")
    yield bad("train", "seed=true", names=["seed"])
    yield bad("train", "seed=1.5", names=["seed"])
    yield bad("train", "data.hold_out.share=0.4", f"data.hold_out.seed={10**40}", names=["data.hold_out.seed"])


def numbers():
    for key in ("loss.beta", "optim.lr", "optim.clip", "optim.eps", "optim.weight_decay"):
        yield bad("train", f"{key}=nan", names=[key])
        yield bad("train", f"{key}=inf", names=[key])
    yield bad("train", "optim.betas=[1.0, 0.9]", names=["optim.betas"])
    yield bad("train", "optim.betas=[0.9, 1.5]", names=["optim.betas"])
    yield bad("train", "optim.betas=[-0.1, 0.9]", names=["optim.betas"])
    yield bad("train", "optim.betas=[0.9]", names=["optim.betas"])
    yield bad("train", "optim.betas=0.9", names=["optim.betas"])
    yield bad("train", "optim.lr=1e300", names=["optim.lr"])
    yield bad("train", "optim.lr=0", names=["optim.lr"])
    yield bad("train", "optim.clip=0", names=["optim.clip"])
    yield bad("train", "loss.beta=1e300", names=["loss.beta"])
    yield odd("train", f"train.epochs={10**15}", check=lambda here: config(here)["train"]["epochs"] == 10**15)
    yield bad("train", f"train.epochs={10**30}", names=["train.epochs"])
    yield bad("train", f"train.max_steps={10**400}", names=["train.max_steps"], name="train train.max_steps=10**400")
    yield odd("train", f"train.batch_prompts={10**15}")
    yield odd("train", f"train.max_tokens_per_pack={10**15}")
    yield bad("train", f"optim.warmup={10**400}", names=["optim.warmup"], name="train warmup 10**400")
    yield bad("train", "train.batch_prompts=true", names=["train.batch_prompts"])
    yield bad("train", "train.shuffle=2", names=["train.shuffle"])
    yield bad("train", f"model.lora.rank={10**12}", names=["model.lora.rank"])
    yield bad("train", "model.lora.targets=nothing", names=["model.lora.targets"])
    yield bad("train", "model.lora.targets=[]", names=["model.lora.targets"])
    yield bad("train", 'model.lora.targets="["', names=["model.lora.targets"])
    yield bad("train", "tokens.max_tokens=0", names=["tokens.max_tokens"])
    yield odd("train", f"tokens.max_tokens={10**15}")
    yield bad("train", "watch.kl.every=1", f"watch.kl.tokens={10**9}", names=["watch.kl.tokens"])
    yield bad("train", "watch.kl.every=1", "watch.kl.prompts=1", names=["watch.kl.prompts"])
    for command in ("sample", "prefer", "ppo", "eval", "loop"):
        yield bad(command, f"sample.max_new_tokens={10**9}", names=["max_new_tokens"])
    yield bad("sample", "sample.temperature=nan", names=["sample.temperature"])
    yield bad("sample", "sample.temperature=1e-400", names=["sample.temperature"])
    yield bad("sample", "sample.temperature=1e-300", names=["sample.temperature"])
    yield odd("sample", f"engine.batch={10**15}")
    yield bad("sample", f"samples_per_prompt={10**9}", names=["samples_per_prompt"])
    yield bad("winrate", f"samples_per_prompt={10**30}", names=["samples_per_prompt"])
    yield bad("diff", "gate.refused.max_rise=nan", names=["gate.refused.max_rise"])
    yield bad("diff", "gate.refused.max_rise=2", names=["gate.refused.max_rise"])
    yield bad("diff", "gate.refusal.max_rise=0.1", names=["gate.refusal", "refused"])
    yield bad("diff", "gate=0.1", names=["gate"])
    yield bad("diff", "kl_clip=0", names=["kl_clip"])
    yield bad("diff", f"sample.max_new_tokens={10**9}", names=["max_new_tokens"])
    yield odd("diff", "gate.refused.max_rise=1", "stop_early=true")
    yield from answers()
    yield bad("ppo", "ppo.clip=inf", names=["ppo.clip"])
    yield bad("ppo", f"ppo.samples_per_prompt={10**18}", names=["ppo.samples_per_prompt"])
    yield bad("eval", f"samples_per_prompt={10**18}", names=["samples_per_prompt"])
    yield bad("eval", f"sample_prompts={10**30}", names=["sample_prompts"])
    yield bad("reward", "bradley_terry.margin_scale=inf", names=["bradley_terry.margin_scale"])
    yield bad("lint", "lint.near=2", names=["lint.near"])
    yield bad("lint", f"lint.examples={10**30}", names=["lint.examples"])
    for method, strength in (
        ("dpo", "-1"),
        ("dpo", "0"),
        ("unlikelihood", "5"),
        ("ppo", "-1"),
        ("kto", "nan"),
        ("ipo", "inf"),
    ):
        yield bad("frontier", f"methods.{method}=[{strength}]", names=[f"methods.{method}"])
    yield bad("frontier", "methods.dpo=0.1", names=["methods.dpo"])
    yield bad("frontier", "methods.dpo=[0.1, 0.1]", names=["methods.dpo"])
    yield bad("frontier", "methods.best_of_n=[1.5]", names=["methods.best_of_n"])
    yield bad("frontier", f"methods.best_of_n=[{10**15}]", names=["methods.best_of_n"])
    yield bad("frontier", f"jobs={10**9}", names=["jobs"])
    yield bad("demo", f"pairs={10**30}", names=["pairs"])


def answers():
    """The commands that answer a question about data, judges and models."""
    for command in ("value", "ask", "audit", "realign"):
        yield bad(command, f"seed={10**30}", names=["seed"])
        yield odd(command)
    yield bad("value", "value.models=1", names=["value.models"])
    yield bad("value", "value.flip=0.5", names=["value.flip"])
    yield bad("value", "value.flip=nan", names=["value.flip"])
    yield bad("value", f"value.folds={10**9}", names=["value.folds"])
    yield bad("value", "value.gradients=true", names=["value.gradients", "value.trusted"])
    yield bad("value", "value.examples=3", names=["value.examples", "value.page"])
    yield bad("ask", "gain=0.1", "by_chance=0", names=["gain", "by_chance"])
    yield bad("value", "value.trusted=nothing.jsonl", names=["nothing.jsonl"])
    yield bad("value", "data.train=few.jsonl", names=["few.jsonl"])
    yield odd("value", f"value.asks={10**9}", f"value.examples={10**9}", "value.page=page.html")
    yield odd("value", f"value.max_tokens_per_pack={10**15}")
    yield bad("ask", "by_chance=2", names=["by_chance"])
    yield bad("ask", "by_chance=nan", names=["by_chance"])
    yield bad("ask", "gain=0", names=["gain"])
    yield bad("ask", "enough=1", names=["enough"])
    yield bad("ask", "pool=nothing.jsonl", names=["nothing.jsonl"])
    yield odd("ask", f"count={10**9}")
    yield bad("audit", f"pairs={10**30}", names=["pairs"], name="audit pairs of 31 digits")
    yield odd("audit", f"pairs={10**9}")
    yield bad("audit", "pairs=1", names=["pairs"])
    yield bad("audit", "repeats=0", "repeat_pairs=3", names=["repeat_pairs"])
    yield bad("audit", f"repeats={10**9}", names=["repeats"])
    yield bad("audit", "own=me", names=["source"])
    yield bad("audit", 'source=["a", "b", "c"]', "own=me", names=["source"])
    yield bad("audit", "fail_on.flip_rate=nan", names=["fail_on.flip_rate"])
    yield bad("audit", "fail_on.self_bias=0.1", names=["fail_on.self_bias"])
    yield bad("audit", "human=nothing.jsonl", names=["nothing.jsonl"])
    yield bad("realign", "lambdas=[]", names=["lambdas"])
    yield bad("realign", "lambdas=[1, 1]", names=["lambdas"])
    yield bad("realign", "lambdas=[nan]", names=["lambdas"])
    yield bad("realign", "lambdas=[-1]", names=["lambdas"])
    yield bad("realign", "bake=1", names=["bake_to"])
    yield bad("realign", "sweep=[nothing]", names=["nothing"])
    yield bad("realign", "sample.temperature=0.5", names=["sample.temperature"])
    yield bad("realign", f"sample.max_new_tokens={10**9}", names=["max_new_tokens"])
    yield odd("realign", "lambdas=[100]")
    yield bad("conform", "cases=nothing", names=["nothing"])
    yield bad("conform", "adapter=nothing", names=["nothing"])
    yield bad("conform", "adapter=nothing.py", names=["nothing.py"])
    yield bad("conform", "timeout_s=0", names=["timeout_s"])
    yield bad("conform", "timeout_s=nan", names=["timeout_s"])


def words_and_types():
    for word, *names in (
        ("model=1", "'model'"),
        ("model.path=", "model.path"),
        ("model.path.x=1", "model.path"),
        ("run=", "run"),
        ("data.train=", "data.train"),
        ("data.train=[]", "data.train"),
        ("data.train={}", "data.train"),
        ("data.sources=1", "data.sources"),
        ("data.sources=[1]", "data.sources"),
        ('data.columns={prompt = ""}', "data.columns.prompt"),
        ("data.columns=[1]", "data.columns"),
        ("data.columns.prompt=1.5e400", "1.5e400"),
        ("loss.terms=[1]", "loss.terms"),
        ("loss.terms={kind = 'sft'}", "loss.terms"),
        ("loss.kind=sigmoid", "loss.kind"),
        ("reference=live", "'reference'"),
        ("train=1", "'train'"),
        ("train.epochs=2024-01-01", "train.epochs"),
        ("train.epochs=[1]", "train.epochs"),
        ("train.epochs={a = 1}", "train.epochs"),
        ("optim.kind=adam", "optim.kind"),
        ("optim..lr=1", "optim..lr"),
        (".lr=1", ".lr=1"),
        ("modell.path=x", "modell", "model"),
        ('"model.path"=x', '"model'),
        ("modèle.chemin=x", "modèle"),
        ("__class__=1", "__class__"),
        ("model.path=\ud800x", "model.path"),
        ("seed=1\nrun = 'other'", "seed"),
    ):
        yield bad("train", word, names=names, name=f"train {word.encode('unicode_escape').decode()}"[:90])
    yield bad("train", "run=" + "x" * 300, names=["File name too long"])
    yield bad("train", "run=" + "y/" * 3000, names=["cannot be"], name="train run= of 3,000 folders")
    yield bad(
        "train", "model.path=" + "x" * 10**5, names=["File name too long"], name="train model.path of 100,000 letters"
    )
    yield bad(
        "train",
        "data.train=" + "x" * 10**5 + ".jsonl",
        names=["too long"],
        name="train data.train of 100,000 letters",
    )
    yield bad("train", "x" * 10**5 + "=1", names=["unknown key"], name="train key of 100,000 letters")
    yield bad("train", "a." * 2000 + "b=1", names=["unknown key"], name="train key of 2,000 sections")
    yield bad("train", "seed=" + "[" * 5000, names=["seed"], name="train seed=[[[[ 5,000")
    yield bad(
        "train", "data.columns=" + "[" * 3000 + "]" * 3000, names=["data.columns"], name="train list of 3,000 levels"
    )
    yield odd("train", "run=2024-11-24", check=lambda here: (here / "2024-11-24/model").is_dir())
    yield odd("train", "run=a\nseed = 2", check=lambda here: config_of(here / "a\nseed = 2")["seed"] == 0)
    yield odd("train", "run=123", check=lambda here: (here / "123/model").is_dir())
    yield odd("train", "run=true", check=lambda here: (here / "true/model").is_dir())
    yield odd("train", "run=été 日本", check=lambda here: (here / "été 日本/model").is_dir())
    yield odd("train", "seed=1", "seed=2", check=lambda here: config(here)["seed"] == 2)
    yield odd("train", "seed = 7", check=lambda here: config(here)["seed"] == 7)
    yield odd("train", "run=a=b", check=lambda here: (here / "a=b/model").is_dir())
    yield bad("train", "lint.near=0.5", names=["'lint'"])
    yield bad("lint", "lnt.near=0.5", names=["lnt"])
    yield bad("lint", "dta.train=x", names=["dta"])
    yield odd("lint", "loss.beta=0.2")
    yield bad("report", "nowhere", names=["nowhere"])
    yield Case("report of an empty word", lambda i, h: ["report", ""], ("no run here",))
    yield Case("report of a file", lambda i, h: ["report", str(i / "good.jsonl")], ("good.jsonl",))
    yield Case("report of an over-long path", lambda i, h: ["report", "x" * 5000], ("File name too long",))
    yield Case("report with key=value", lambda i, h: ["report", str(i / "run"), "seed=1"], ("seed=1",))
    yield Case("lint --fix of an empty word", lambda i, h: [*base("lint", i), "--fix", ""], ("fix",))
    yield Case(
        "lint --fix into no folder",
        lambda i, h: [*base("lint", i), "--fix", "no/where.jsonl"],
        ("no: no such folder", "lint.fix=FILE"),
    )


def recipes():
    yield recipe("a folder", "", "r.toml", make=lambda p, i: p.mkdir())
    yield recipe("a pipe", "", make=fifo, check=lambda here: (here / "run/model").is_dir())
    yield recipe("binary", bytes(range(256)), "r.toml")
    yield recipe("NUL bytes", b'run = "a\0b"\n', "r.toml")
    yield recipe("NUL in a string", '{base}\nseed = 0\n[reference]\nstore = "a\\u0000b"\n', "reference.store")
    yield recipe("100 MB", "", "r.toml", make=lambda p, i: p.write_bytes(b"# x\n" * 25_000_000), slow=True)
    yield recipe("2 MB", "", "r.toml", make=lambda p, i: p.write_bytes(b"# x\n" * 500_000))
    yield recipe("UTF-16", "run = 'a'".encode("utf-16"), "r.toml", "UTF-8")
    yield recipe("a byte-order mark", "\ufeff{base}", check=lambda here: (here / "run/model").is_dir())
    yield recipe("empty", "", "model")
    yield recipe("JSON", '{"run": "a"}', "r.toml", "TOML")
    yield recipe("duplicate keys", "run = 'a'\nrun = 'b'\n", "r.toml")
    yield recipe("duplicate sections", "[train]\nepochs = 1\n[train]\nepochs = 2\n", "r.toml")
    yield recipe("a date", "{base}\nseed = 2024-01-01\n", "seed")
    yield recipe("a time for text", "{base}\n[reference]\nstore = 12:00:00\n", "reference.store")
    yield recipe("a key with dots", '{base}\n"loss.beta" = 0.2\n', "loss.beta")
    yield recipe("a key with quotes", "{base}\n'a\"b' = 1\n", 'a"b')
    yield recipe("an empty key", '{base}\n"" = 1\n', "unknown key")
    yield recipe("a table for a list", "{base}\n[loss]\nkind = 'sum'\n[loss.terms]\nkind = 'sft'\n", "loss.terms")
    yield recipe("a list of tables for a section", "{base}\n[[optim]]\nlr = 1.0\n", "optim")
    yield recipe("nesting of 5,000", "a = " + "[" * 5000 + "]" * 5000, "r.toml")
    yield recipe("an integer of 5,000 digits", "seed = " + "9" * 5000, "r.toml")
    yield recipe("an integer of 400 digits", "{base}\nseed = " + "9" * 400, "seed")
    yield recipe("nan", "{base}\n[optim]\nlr = nan\n", "optim.lr")
    yield recipe("a hexadecimal seed", "{base}\nseed = 0xff\n", check=lambda here: config(here)["seed"] == 255)
    yield recipe("another command's section", "{base}\n[ppo]\nclip = 0.2\n", "ppo")
    yield recipe("no rights", "", "r.toml", make=lambda p, i: p.symlink_to("/proc/1/mem"))
    yield recipe("a loop of links", "", "r.toml", make=lambda p, i: p.symlink_to(p))
    yield recipe("a broken link", "", "r.toml", make=lambda p, i: p.symlink_to("gone"))
    yield Case("recipe: an empty word", lambda i, h: ["train", ""], ("recipe",))
    yield Case("recipe: over-long", lambda i, h: ["train", "x" * 5000], ("recipe",))
    yield Case("recipe: /dev/zero", lambda i, h: ["train", "/dev/zero"], ("/dev/zero",))
    yield Case("recipe: NUL device", lambda i, h: ["train", "/dev/null"], ("not set",))
    yield Case("recipe: the data", lambda i, h: ["train", str(i / "good.jsonl")], ("good.jsonl", "TOML"))


def places():
    """Paths that cannot be read or written."""
    for command, key in (("train", "run"), ("sft", "run"), ("loop", "run"), ("winrate", "run")):
        yield bad(command, f"{key}=/proc/favor", names=["/proc/favor"])
        yield bad(command, f"{key}=/dev/null", names=["/dev/null"])
        yield bad(command, f"{key}=/dev/null/x", names=["/dev/null/x"])
    for command in ("sample", "prefer", "score"):
        for place in ("/proc/favor.jsonl", "x" * 300, ".", ""):
            yield bad(command, f"out={place}", names=[place or "out"])
        yield bad(command, "out=/dev/null/x.jsonl", names=["/dev/null"])
        yield bad(command, "out=no/where.jsonl", names=["no: no such folder", "out=FILE"])
    for key in ("lint.out", "lint.page", "lint.fix"):
        yield bad("lint", f"{key}=/proc/x", names=["/proc/x"])
        yield bad("lint", f"{key}={'x' * 300}", names=["File name too long"])
        yield bad("lint", f"{key}=.", names=["."])
    yield bad("train", "reference.store=/proc/x.safetensors", names=["/proc/x.safetensors"])
    yield bad("train", f"reference.store={'x' * 300}", names=["File name too long"])
    yield bad("train", "reference.store=.", names=["."])
    yield bad("train", "data.train=/proc/1/mem", names=["/proc/1/mem"])
    yield bad("train", "data.train=/dev/null", names=["/dev/null"])
    yield bad("train", "model.path=/dev/null", names=["/dev/null"])
    yield bad("train", "model.path=~/nowhere", names=["~/nowhere"])
    yield bad("train", "model.path=.", names=["no config.json"])
    yield bad("eval", "run=/dev/null", names=["/dev/null"])
    yield bad("eval", "reference=./gone", names=["./gone"])
    yield bad("eval", "data=gone.jsonl", names=["gone.jsonl"])
    yield bad("score", "reward.path=gone.py:score", names=["gone.py"])
    yield bad("score", "reward.path=gone.module:score", names=["gone"])
    yield bad("score", "reward.path=:score", names=[":score"])
    yield bad("score", "reward.path=..:score", names=["..:score"])
    yield bad("score", "reward.path=a b.c:score", names=["a b.c"])
    yield bad("score", "reward.path=/:score", names=["/"])
    yield bad("score", "reward.kind=classifier", "reward.path=gone.jsonl", names=["gone.jsonl"])
    yield bad("score", "reward.kind=implicit", "reward.path=gone", names=["gone"])
    yield bad("score", "reward.kind=model", "reward.path=./gone", names=["./gone"])
    # data are looked at before a model that has to come over the network
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for command, key in (
        ("train", "data.train"),
        ("sft", "data.train"),
        ("reward", "data.train"),
        ("ppo", "data.train"),
    ):
        yield bad(
            command,
            "model.path=nobody/nothing",
            f"{key}=gone.jsonl",
            names=["gone.jsonl", "no such file"],
            environment=unreachable,
        )
    for command, section in (("sample", "engine.model"), ("prefer", "engine.model"), ("loop", "model")):
        yield bad(
            command,
            f"{section}.path=nobody/nothing",
            "prompts=gone.jsonl",
            names=["gone.jsonl", "no such file"],
            environment=unreachable,
        )
    yield bad(
        "train",
        "model.path=nobody/nothing",
        "data.eval=gone.jsonl",
        names=["gone.jsonl", "no such file"],
        environment=unreachable,
    )
    yield bad(
        "eval",
        "reference=nobody/nothing",
        "data=gone.jsonl",
        names=["gone.jsonl", "no such file"],
        environment=unreachable,
    )
    for command, section in (("prefer", "engine.model"), ("loop", "model"), ("ppo", "model")):
        model = f"{section}.path=nobody/nothing"
        yield bad(command, model, "reward.path=gone.py:f", names=["gone.py"], environment=unreachable)


def functions():
    for name, body, *names in (
        ("raises", "raise ValueError('my fault')", "ValueError", "my fault", "line 2"),
        ("raises without words", "raise KeyError", "KeyError", "line 2"),
        ("raises an error of many lines", "raise ValueError('one\\ntwo')", "ValueError", "one"),
        ("exits", "import sys; sys.exit(3)", "SystemExit", "line 2"),
        ("recurses", "return score(prompts, responses)", "RecursionError"),
        ("divides by zero", "return [1 / 0 for r in responses]", "ZeroDivisionError"),
        ("asserts", "assert False", "AssertionError", "line 2"),
        ("returns text", "return 'abcdefghijklmnopqrst'", "number"),
        ("returns digits", "return '1' * len(responses)", "number"),
        ("returns texts of numbers", "return ['1' for r in responses]", "number"),
        ("returns None", "return None", "number"),
        ("returns one number", "return 1.0", "number"),
        ("returns Nones", "return [None for r in responses]", "number"),
        ("returns nan", "return [float('nan') for r in responses]", "nan"),
        ("returns inf", "return [float('inf') for r in responses]", "inf"),
        ("returns too few", "return [1.0]", "1 score"),
        ("returns too many", "return [1.0] * 99", "99 scores"),
        ("returns an endless generator", "import itertools; return itertools.count()", "number"),
        ("returns a generator that raises", "return (1 / 0 for r in responses)", "ZeroDivisionError"),
        ("returns a dict", "return {r: 1.0 for r in responses}", "number"),
        ("returns a set", "return {1.0 * len(responses)}", "number"),
        ("returns huge integers", "return [10 ** 400 for r in responses]", "number"),
        ("returns complex numbers", "return [1j for r in responses]", "number"),
        ("returns a matrix", "import numpy; return numpy.ones((len(responses), 2))", "number"),
        ("is a coroutine", "pass", "number"),
    ):
        code = f"def score(prompts, responses):\n    {body}\n"
        yield function(name, "async " + code if "coroutine" in name else code, *names)
    for name, value in (
        ("a generator", "(float(len(r)) for r in responses)"),
        ("a tuple", "tuple(len(r) for r in responses)"),
        ("booleans", "[len(r) > 5 for r in responses]"),
        ("a numpy array", "__import__('numpy').array([len(r) for r in responses])"),
        ("a numpy column", "__import__('numpy').array([[len(r)] for r in responses]).ravel()"),
        ("a tensor", "__import__('torch').tensor([float(len(r)) for r in responses], requires_grad=True)"),
        ("fractions", "[__import__('fractions').Fraction(len(r)) for r in responses]"),
    ):
        code = f"def score(prompts, responses):\n    return {value}\n"
        yield function(f"returns {name}", code, check=lambda here: scores(here)[0][0] >= scores(here)[0][1])
    yield function("is a class", "class score:\n    def __init__(self, prompts, responses): pass\n", "number")
    yield function(
        "is an object that can be called",
        "class C:\n    def __call__(self, p, r): return [1.0] * len(r)\nscore = C()\n",
    )
    yield function("is a number", "score = 1\n", "no function 'score'")
    yield function("is missing", "pass\n", "no function 'score'")
    yield function("takes one argument", "def score(responses):\n    return [1.0]\n", "TypeError", "score")
    yield function("syntax error", "def score(:\n", "SyntaxError", "line 1")
    yield function("import error", "import not_there_at_all\n", "not_there_at_all")
    yield function("raises while imported", "1 / 0\n", "ZeroDivisionError", "line 1")
    yield function("exits while imported", "import sys\nsys.exit(0)\n", "SystemExit", "line 2")
    yield function("NUL byte in the file", "x = 1\0\n", "mine.py")
    yield function(
        "raises",
        "def score(p, r):\n    raise OSError(28, 'No space left on device')\n",
        "OSError",
        "line 2",
        command="prefer",
    )
    yield function("raises", "def score(p, r):\n    raise OSError('x')\n", "OSError", "line 2", command="ppo")
    yield function(
        "raises", "def score(p, r):\n    raise RuntimeError('x')\n", "RuntimeError", "line 2", command="loop"
    )
    for name, body, *names in (
        ("raises", "raise ValueError('my fault')", "ValueError", "my fault", "line 2"),
        ("exits", "raise SystemExit", "SystemExit"),
        ("returns None", "pass", "None"),
        ("returns a list", "return ['A']", "A"),
        ("returns small letters", "return 'a'", "'a'"),
        ("returns an array", "import numpy; return numpy.array(['A', 'B'])", "A"),
        ("returns a number", "return 1", "1"),
    ):
        yield function(name, f"def judge(prompt, a, b):\n    {body}\n", *names, command="winrate", entry="judge")
    yield from classifiers()


def classifiers():
    """The judge that is fitted on labelled texts: text with fresh or label is enough."""

    def fitted(name, rows, *names):
        def words(inputs, here):
            content = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (here / "labels.jsonl").write_text(content)
            return [*base("score", inputs), "reward.kind=classifier", f"reward.path={here / 'labels.jsonl'}"]

        return Case(f"classifier: {name}", words, names and ("labels.jsonl", *names), lambda here: scores(here)[0])

    texts = [(f"good film number {i}", True) if i % 2 else (f"bad film number {i}", False) for i in range(40)]
    yield fitted("text and label", [{"text": t, "label": v} for t, v in texts])
    yield fitted("labels 0 and 1", [{"text": t, "label": int(v)} for t, v in texts])
    yield fitted("text and fresh", [{"text": t, "fresh": v} for t, v in texts])
    yield fitted("no label", [{"text": t} for t, _ in texts], "row 1", "label")
    yield fitted("no text", [{"label": 1}], "row 1", "text")
    yield fitted("labels in words", [{"text": t, "label": "yes"} for t, _ in texts], "row 1", "label")
    yield fitted("one label only", [{"text": t, "label": 1} for t, _ in texts], "label")
    yield fitted("two rows", [{"text": t, "label": v} for t, v in texts[:2]], "rows")
    yield fitted("empty texts", [{"text": "", "label": v} for _, v in texts], "row 1", "text")
    yield fitted("no rows", "", "no rows")
    yield fitted("not JSON", "{\n", "row 1")
    yield fitted("a list", "[1]\n", "row 1")


def secrets():
    """Nothing secret in a message; that none reaches a file is looked at in test_secrets."""
    url = "judge.server.url=http://ann:hunter2@localhost:9/v1"
    hosted = ("judge.kind=openai", "judge.server.model=m")
    for command, words in (("winrate", hosted),):
        yield Case(
            "a password in a server's url",
            lambda i, h, c=command, w=words: [*(x for x in base(c, i) if not x.startswith("judge")), *w, url],
            ("judge.server.url", "server.api_key_env"),
        )

    def served(*more, names):
        """Sampling from a server that is not there."""
        words = ["engine.kind=openai", *(f"engine.{word}" for word in ("server.model=m", "server.retries=0", *more))]
        return Case(
            f"sample {' '.join(words)}"[:110],
            lambda i, h: [*(x for x in base("sample", i) if not x.startswith("engine.")), *words],
            tuple(names),
        )

    for query in ("?api_key=hunter2", "?token=hunter2", "#hunter2"):
        yield served(
            f"server.url=http://localhost:9/v1{query}",
            names=["server.url"],
        )
    yield served(
        "server.url=http://hunter2@localhost:9/v1",
        names=["server.api_key_env"],
    )
    yield bad("sample", "engine.server=http://ann:hunter2@localhost:9/v1", names=["server"])
    yield served(
        "server.url=http://localhost:9/v1",
        "server.api_key_env=sk-hunter2",
        names=["server.api_key_env"],
    )
    yield served(
        "server.url=http://localhost:9/v1",
        "server.api_key=hunter2",
        names=["server.api_key"],
    )
    yield served("server.url=http://[::1", names=["server.url"])
    yield served("server.url=http://localhost:99999/v1", names=["server.url"])
    yield served("server.url=localhost/v1", names=["server.url"])
    yield bad("train", "model.path=https://ann:hunter2@host/x/y", names=["no such model"])
    yield bad("train", "data.train=https://ann:hunter2@host/x.jsonl", names=["no such file"])


def world():
    """What a launcher sets."""
    for name, environment, *names in (
        ("WORLD_SIZE alone", {"WORLD_SIZE": "2"}, "WORLD_SIZE", "torchrun"),
        ("no number", {"WORLD_SIZE": "abc"}, "WORLD_SIZE", "abc"),
        ("nought", {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ("no address", {"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ("no port", {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        (
            "rank too large",
            {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "0"},
            "RANK",
        ),
    ):
        yield bad("train", names=names, name=f"world: {name}", environment=environment)
    yield odd("train", environment={"WORLD_SIZE": "1"})
    yield odd("train", environment={"WORLD_SIZE": ""})


def cases():
    groups = (every_command, seeds, numbers, words_and_types, recipes, places, functions, secrets, world)
    return [case for group in groups for case in group()]


CASES = cases()


class Endless(BaseException):
    """The command did not come to an end."""


def _too_long(number, frame):
    raise Endless


def outcome(case, inputs, here):
    """Run it in this process, in the empty folder `here`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = case.words(inputs, here)
    clean = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment = {**clean, "FAVOR_CACHE": str(here / "cache"), "HF_HUB_OFFLINE": "1", **case.environment}
    began = time.monotonic()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(60)
    with (
        contextlib.chdir(here),
        mock.patch.object(sys, "argv", ["favor", *words]),
        mock.patch.dict(os.environ, environment, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except Endless:
            return Outcome("endless", "")
        except Exception as error:  # noqa: BLE001 (a traceback is what is looked for)
            return Outcome("traceback", f"{type(error).__name__}: {error}"[:120])
        finally:
            signal.alarm(0)
    return judged(case, code or 0, err.getvalue(), here, time.monotonic() - began)


def judged(case, code, err, here, seconds):
    """What the command's end is worth."""
    if code == 0:
        if case.names:
            return Outcome("silent", "accepted")
        try:
            fine = case.check is None or case.check(here)
        except Exception as error:  # noqa: BLE001 (whatever the check meets, the setting was not honoured)
            return Outcome("silent", f"not honoured: {type(error).__name__}: {error}"[:120])
        return Outcome("accepted", "") if fine else Outcome("silent", "not honoured")
    found = err.strip().splitlines()
    if not case.names:
        return Outcome("unwelcome", err.strip()[:120])
    problems = [f"exit code {code}"] if code != 2 else []
    # a line for each setting that is refused
    problems += [f"{len(found)} lines"] if not all(line.startswith("favor: ") for line in found) else []
    problems += [f"{name} not named" for name in case.names if name[:50] not in err]
    problems += [f"{len(err)} characters"] if len(err) > 1500 else []
    problems += ["the secret is shown"] if "hunter2" in err else []
    problems += ["a traceback"] if "Traceback" in err else []
    problems += [f"{seconds:.0f} s"] if seconds > 20 else []
    problems += ["left-over temporary files"] if list(here.rglob("*.tmp")) else []
    return (
        Outcome("unclear", "; ".join(problems) + f": {err.strip()[:60]} ... {err.strip()[-160:]}")
        if problems
        else Outcome("refused", "")
    )


def program():
    """Print a line for every case that is not as it should be, and the counts."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    counts = Counter()
    # a bad setting must not take the machine's memory
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as place:
        inputs = Path(place) / "inputs"
        inputs.mkdir()
        prepare(inputs)
        for number, case in enumerate(case for case in CASES if wanted in case.name):
            here = Path(place) / str(number)
            here.mkdir()
            found = outcome(case, inputs, here)
            counts[found.kind] += 1
            if found.detail:
                print(
                    f"{found.kind:10} {case.name[:70]:70} {found.detail}".encode("ascii", "replace").decode(),
                    flush=True,
                )
    print(f"{sum(counts.values())} settings: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    return 1 if set(counts) - {"refused", "accepted"} else 0


if __name__ == "__main__":
    sys.exit(program())
