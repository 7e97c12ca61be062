"""`favor conform`: every planted fault is found by the case that is meant for it, and by no other; a sound trainer passes."""

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conform_plain import ADAPTER, train_with
from test_one_file import EXAMPLE
from transformers import AutoTokenizer

from favor.config import load
from favor.conform.cases import JOBS, cases, needed
from favor.conform.judge import TOLERANCE, Bench, Seen, result_of, way_of
from favor.conform.oracle import RIGHT, Scored, Steps, expected, gap, tokens_of, weights_of
from favor.conform.oracle import load as load_model
from favor.conform.processes import carry_out
from favor.conform.run import carried_out, oracle, results, settled
from favor.conform.settings import ConformConfig, adapter_file, launch_words
from favor.conform.subjects import make_subjects
from favor.conform.worker import work
from favor.errors import ConfigError
from favor.run import read_json, write_json

# fault -> the cases that fail by it; the first is meant for it
FAULTS = {
    "late": ["first_token"],
    "unshifted": ["shift"],
    "no_end": ["end_token"],
    "two_ends": ["end_token"],
    "behind": ["behind_end"],
    "moving": ["reference", "order"],
    "beta": ["reference", "order", "clip", "accumulation"],
    "rolled": ["order"],
    "pads": ["padding"],
    "by_id": ["pad_is_end"],
    "two_begins": ["begin_once"],
    "strips": ["leading_blank"],
    "merges": ["boundary"],
    "normalises": ["signs"],
    "last_turn": ["turns"],
    "unique": ["duplicates"],
    "likes_equal": ["equal_sides"],
    "unclipped": ["clip", "accumulation"],
    "micro_sums": ["accumulation", "short_micro_batch"],
    "micro_means": ["short_micro_batch"],
    "nominal": ["last_batch"],
    "silent": ["truncation"],
    "noisy": ["dropout"],
    "forgets": ["resume"],
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Models of this size only wait for a second one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conform") / "subjects"
    make_subjects(folder)
    return folder


@pytest.fixture(scope="module")
def jobs(subjects):
    return settled(needed(()), subjects)


@pytest.fixture(scope="module")
def right(subjects, jobs):
    return oracle(subjects, jobs)


@pytest.fixture
def through(subjects, jobs, right, tmp_path):
    """Run a trainer, broken in one way, through cases, in this process."""

    def run(fault, names=()):
        adapter = tmp_path / "adapter.py"
        adapter.write_text(ADAPTER.format(fault=fault))
        some = {name: jobs[name] for name in needed(names)}
        seen = carried_out(tmp_path / "work", subjects, some, lambda at, ranks: ranks == 1 and work(adapter, at))
        return results(seen, right, names)

    return run


def failed(found):
    return {name for name, result in found.items() if result.status == "fails"}


def test_a_sound_trainer_passes(through):
    found = through("")
    assert {name: result for name, result in found.items() if result.status != "holds"}.keys() == {"two_ranks"}
    assert found["two_ranks"].status == "not tried"
    assert list(found) == [case.name for case in cases()]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_by_its_case_alone(fault, through):
    assert failed(through(fault)) == set(FAULTS[fault])


def test_every_case_has_a_planted_fault():
    """But for the first loss and the step, which have tests of their own, and for two processes, which the last one starts."""
    assert {case.name for case in cases()} - {names[0] for names in FAULTS.values()} == {
        "first_loss",
        "step",
        "two_ranks",
    }


def test_a_step_that_is_another_fails_the_step_and_says_no_more(through):
    found = through("decays", ("first_token", "shift", "end_token", "step"))
    assert failed(found) == {"step"}
    assert {name for name, result in found.items() if result.status == "not tried"} == {
        "first_token",
        "shift",
        "end_token",
    }


def test_a_warning_at_the_boundary_is_enough(through):
    found = through("warns", ("boundary",))["boundary"]
    assert (found.status, "merge" in found.found) == ("holds", True)


def test_without_losses_the_first_is_not_tried(through):
    assert through("mute", ("first_loss", "step"))["first_loss"].status == "not tried"


def test_a_mistake_of_the_program_is_no_refusal(through):
    found = through("raises", ("boundary", "step"))
    assert {result.status for result in found.values()} == {"fails"}
    assert found["boundary"].found == "TypeError: no such thing"


@pytest.mark.parametrize(
    ("error", "refusal", "status"),
    [
        ("ValueError", True, "refused"),
        ("ValueError", False, "fails"),
        ("SystemExit", True, "refused"),
        ("NotImplementedError", False, "not tried"),
        ("KeyError", True, "fails"),
        ("Ended", True, "fails"),
    ],
)
def test_what_an_error_is(error, refusal, status):
    bench = Bench({"step": Seen(None, (), "", error, "said")}, None)
    assert result_of(bench, ("step",), None, refusal=refusal).status == status


# --- the oracle ---


def test_the_sides_are_even_where_padding_is_not_the_subject(subjects):
    """Only then is a fault in padding found by its own case."""
    for name, job in JOBS.items():
        tokenizer = AutoTokenizer.from_pretrained(subjects / job.subject)
        size = job.steps.batch // job.steps.accumulation
        for at in range(0, len(job.rows), size):
            lengths = {
                len(one.prompt) + len(one.response) + len(one.behind)
                for row in job.rows[at : at + size]
                for one in (tokens_of(tokenizer, row, side) for side in ("chosen", "rejected"))
            }
            assert (len(lengths) > 1) == (name in ("padding", "fits", "cut")), name


def test_logits_are_as_large_as_those_of_real_models(subjects):
    model, tokenizer = load_model(subjects / "chat"), AutoTokenizer.from_pretrained(subjects / "chat")
    one = tokens_of(tokenizer, JOBS["step"].rows[0], "chosen")
    logits = model(input_ids=torch.tensor([one.prompt + one.response])).logits
    assert 2.5 < logits.std() < 5
    assert logits.abs().max() > 8


def test_the_first_step_is_the_closed_form(subjects):
    """-log s(0) = ln 2; the gradient is -beta/2 times that of the gap of log-probs; AdamW moves by lr g/(|g| + eps)."""
    steps, rows = Steps(lr=1e-3, beta=0.3, batch=1), JOBS["step"].rows
    found = expected(subjects / "chat", rows, steps)
    assert found.losses == [pytest.approx(math.log(2), abs=1e-7)]
    model, tokenizer = load_model(subjects / "chat"), AutoTokenizer.from_pretrained(subjects / "chat")
    total = []
    for side in ("chosen", "rejected"):
        one = tokens_of(tokenizer, rows[0], side)
        assert one.response[-1] == tokenizer.eos_token_id
        ids = torch.tensor([one.prompt + one.response])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total.append(logp[len(one.prompt) - 1 :].sum())
    (total[0] - total[1]).backward()
    right = {}
    for name, p in model.named_parameters():
        gradient = -0.15 * (torch.zeros_like(p) if p.grad is None else p.grad)
        right[name] = (-1e-3 * gradient / (gradient.abs() + 1e-8)).double()
    assert gap(found.change, right) < 1e-3


def test_a_second_step_knows_torch_adamw(subjects, tmp_path):
    """Two steps by hand against torch.optim.AdamW, clipped in the first."""
    rows, job = JOBS["clip"].rows, settled({"clip": JOBS["clip"]}, subjects)["clip"]
    found = expected(subjects / "chat", rows, job.steps)
    assert found.norms[0] > 1.3 * job.steps.clip > 1.6 * found.norms[1]
    told = train_with("", str(subjects / "chat"), rows, str(tmp_path / "out"), vars(job.steps))
    start, end = (weights_of(load_model(folder)) for folder in (subjects / "chat", Path(told["model"])))
    assert gap({name: end[name] - start[name] for name in start}, found.change) < TOLERANCE / 4


def test_ways_of_scoring_are_far_apart(right):
    """Farther than the tolerance, or one would be taken for another."""
    ways = [Scored(skipped, ends) for skipped in (0, 1) for ends in (0, 1, 2)] + [Scored(shifted=True)]
    for i, one in enumerate(ways):
        for other in ways[:i]:
            assert gap(right("step", one).change, right("step", other).change) > 5 * TOLERANCE
        assert way_of(Seen(right("step", one).change, (), ""), right) == one
    assert RIGHT in ways


# --- the command ---


def test_a_process_that_ends_or_hangs_is_a_result(tmp_path):
    """The next run goes on in a new process; what is printed, also below Python, is in the log."""
    (tmp_path / "mine.py").write_text(
        "import os, time\n"
        "def train(model, rows, out, settings):\n"
        "    os.write(2, b'below\\n')\n"
        "    print('above')\n"
        "    {'exit': lambda: os._exit(7), 'hang': lambda: time.sleep(999)}.get(model, lambda: None)()\n"
        "    if model == 'refuse':\n        raise ValueError('no')\n"
        "    return {'losses': ['0.5']}\n"
    )
    for number, model in enumerate(("fine", "exit", "hang", "refuse", "last")):
        (tmp_path / f"jobs/{number}").mkdir(parents=True)
        write_json(tmp_path / f"jobs/{number}/job.json", {"model": model, "rows": [], "settings": {}, "calls": [{}]})
    counts = []
    carry_out(tmp_path / "mine.py", tmp_path / "jobs", (), 8.0, lambda _, done, total: counts.append(done))
    found = [read_json(tmp_path / f"jobs/{number}/result.json") for number in range(5)]
    assert found[0] == found[4] == {"model": None, "losses": [0.5]}
    assert found[1] == {"error": "Ended", "said": "its process ended with exit code 7"}
    assert found[2] == {"error": "Ended", "said": "took longer than 8 s"}
    assert found[3] == {"error": "ValueError", "said": "no"}
    assert sum(counts) == 5
    assert {"above", "below"} == set((tmp_path / "jobs/0/log.txt").read_text().split())


def test_the_command_says_what_holds(favor, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n" + ADAPTER.format(fault="no_end")
    )
    words = ["conform", "adapter=mine.py", "cases=end_token,step", "out=f.json", "page=p.html"]
    code, out, err = favor(*words)
    assert (code, err) == (1, "")
    told = {case["case"]: case for case in json.loads((tmp_path / "f.json").read_text())["cases"]}
    assert {name: case["status"] for name, case in told.items()} == {"end_token": "fails", "step": "holds"}
    assert (told["end_token"]["found"], told["end_token"]["right"]) == ("never", "once")
    page = (tmp_path / "p.html").read_text()
    assert page.count("<tr id=") == 2
    assert str(tmp_path) not in page
    assert "next: favor conform adapter=FILE cases=end_token" in out
    # a file of somebody else's stays
    (tmp_path / "f.json").write_text("mine")
    code, _, err = favor(*words)
    assert (code, (tmp_path / "f.json").read_text()) == (2, "mine")
    assert "was changed since" in err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.py", None, "no such Python file"),
        ("a.py", "def trains(): pass\n", "defines no function train"),
        ("b.py", "def train(:\n", "is no Python"),
        ("torch.py", "def train(): pass\n", "which it would hide"),
        ("json.py", "def train(): pass\n", "which it would hide"),
        ("sys.py", "def train(): pass\n", "which it would hide"),
        ("c.py", "LAUNCH = ['-m', 3]\ndef train(): pass\n", "LAUNCH must be a list of texts"),
    ],
)
def test_mistakes_give_one_clear_message(name, text, said, favor, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, _, err = favor("conform", f"adapter={name}")
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_module_that_this_process_holds_hides_no_adapter(monkeypatch, tmp_path):
    """A reward's function from another mine.py stays in sys.modules; the adapter runs in a process of its own."""
    held = ModuleType("mine")
    held.__spec__ = ModuleSpec("mine", None, origin="/elsewhere/mine.py")
    monkeypatch.setitem(sys.modules, "mine", held)
    (tmp_path / "mine.py").write_text("def train(): pass\n")
    assert adapter_file(str(tmp_path / "mine.py")) == tmp_path / "mine.py"


def test_settings_that_cannot_be():
    for words, said in ((["cases=steps"], "'steps' is no case"), (["overwrite=true"], "overwrite is not read")):
        with pytest.raises(ConfigError, match=said):
            load(ConformConfig, None, ["adapter=favor", *words])


def test_adapters_that_come_with_favor():
    for name in ("favor", "trl"):
        assert launch_words(adapter_file(name))[:2] == ("-m", "torch.distributed.run")
    assert launch_words(adapter_file("one_file")) == ()
    assert EXAMPLE.exists()


def test_the_adapter_of_the_page_is_the_one_that_runs():
    """And it is short."""
    page = (Path(__file__).parent.parent / "docs/conform.md").read_text("utf-8")
    code = adapter_file("trl").read_text("utf-8").partition('"""\n\nfrom typing')[2]
    assert f"```python\nfrom typing{code}```" in page
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 36


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["favor", "one_file"])
def test_what_favor_and_the_one_file_do_holds(adapter, favor):
    code, out, err = favor("conform", f"adapter={adapter}", "--json")
    assert code == 0, (out, err)
