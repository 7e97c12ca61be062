"""What a user meets after installing: run by `make smoke` with the Python of an environment that has the wheel and its core dependencies alone."""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import tiny

import favor

ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]


def run(here, *words):
    done = subprocess.run([Path(sys.executable).with_name("favor"), *words], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), (words, done.stdout, done.stderr)
    return done.stdout


def main():
    assert Path(favor.__file__).is_relative_to(sys.prefix), favor.__file__
    assert not [name for name in ("pytest", "ruff", "pyright", "trl", "vllm") if importlib.util.find_spec(name)]
    for template in (
        "favor/report/page.html.jinja",
        "favor/lint/lint.html.jinja",
        "favor/report/style.css",
        "favor_frontier/frontier.html.jinja",
    ):
        package, _, rest = template.partition("/")
        assert files(package).joinpath(rest).is_file(), template
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        tiny.save(here / "model")
        (here / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        assert "lint" in run(here, "--help")
        words = ["run=run", "model.path=model", "data.train=d.jsonl", "data.eval=d.jsonl", "train.batch_prompts=2"]
        assert "trained 2 steps" in run(here, "train", *words)
        assert "preference accuracy" in run(here, "eval", "run=run", "sample.max_new_tokens=4", "sample_prompts=2")
        run(here, "report", "run")
        run(here, "lint", "data.train=d.jsonl", "lint.page=lint.html", "lint.fail_on=never")
        assert re.search("Film 0", (here / "run/report.html").read_text("utf-8"))
        assert "favor lint" in (here / "lint.html").read_text("utf-8")
    print("smoke: installed from the wheel; trained, evaluated, reported and linted")


if __name__ == "__main__":
    main()
