"""Faults against every command that writes: kills, kills aimed inside writes, a full disk, damaged files.

After each fault the command is continued as a user would. What it leaves must equal, byte for byte, what an unbroken
run leaves, or the command must refuse in one line. `make fault` prints the table; `--quick` is the suite's share.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
# a forked child would wait for ever for threads of the tokenizer that only its parent has
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import tiny

GOOD = [{"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(6)]
CLOCK = {"seconds", "pairs_per_s", "tokens_per_s", "sampling_s"}
OUTCOMES = ("equal", "told", "refused", "wrong", "traceback")
KINDS = ("kill", "aimed kill", "full disk", "small disk", "torn lines", "damage")
DIED, RAISED = 137, 70
# curves that a run says are damaged
TOLD = "told"
_UNIQUE = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class Command(NamedTuple):
    """What is run, whether it continues with resume=true, and the files that count in the end."""

    words: list[str]
    resumes: bool
    results: tuple[str, ...]


def commands(inputs):
    """Every command that writes, on the tiny model; paths are relative to the trial's own folder."""
    data, reward = f"{inputs}/good.jsonl", ["reward.kind=callable", f"reward.path={inputs}/length.py:score"]
    model = [f"model.path={inputs}/model", "model.dtype=float32"]
    train = ["run=run", *model, f"data.train={data}", "train.batch_prompts=2", "train.epochs=2", "save.every=1"]
    train += ["optim.lr=1e-2"]
    watched = [f"data.eval={data}", "watch.eval.every=2", "watch.kl.every=2", "watch.kl.prompts=2", "watch.kl.tokens=4"]
    drawn = [f"prompts={data}", "sample.max_new_tokens=4", "sample.batch=4"]
    engine = [*(f"engine.{word}" for word in model), *drawn[:2], "engine.batch=4"]
    rollouts = ["run=run", *model, f"data.train={data}", "train.batch_prompts=2", "save.every=1"]
    ends = ("model/*.safetensors", "metrics.jsonl")
    in_run = tuple(f"run/{name}" for name in ends)
    return {
        "train": Command(["train", *train, *watched], True, in_run),
        "train, LoRA": Command(["train", *train, "model.lora.rank=2"], True, in_run),
        "train, cache": Command(["train", *train, "data.cache=true"], True, in_run),
        "train, TR-DPO": Command(["train", *train, "reference.mode=live", "reference.sync.every=2"], True, in_run),
        "sft": Command(["sft", *train], True, in_run),
        "reward": Command(["reward", *train, f"data.eval={data}"], True, (*in_run, "run/eval.json")),
        "ppo": Command(["ppo", *rollouts, *reward, "sample.max_new_tokens=4", "train.max_steps=3"], True, in_run),
        "loop": Command(
            *(
                [
                    "loop",
                    "run=run",
                    *model,
                    *drawn,
                    *reward,
                    "rounds=2",
                    "prompts_per_round=3",
                    "train.batch_prompts=1",
                ],
            ),
            True,
            ("run/rounds.jsonl", *(f"run/round-2/train/{name}" for name in ends), "run/round-2/preferences.jsonl"),
        ),
        "sample": Command(["sample", "out=s.jsonl", *engine, "samples_per_prompt=2"], False, ("s.jsonl",)),
        "prefer": Command(["prefer", "out=p.jsonl", *engine, *reward], False, ("p.jsonl",)),
        "score": Command(["score", "out=c.jsonl", f"data={data}", *reward], False, ("c.jsonl", "c.jsonl.figures.json")),
        "winrate": Command(
            ["winrate", "run=run", f"a.model={inputs}/model", f"b.model={inputs}/other", *drawn[:2]]
            + [f"judge.reward.path={inputs}/length.py:score", "judge.reward.kind=callable", "judge.kind=reward"],
            False,
            ("run/winrate.json", "run/winrate-samples.jsonl"),
        ),
        "diff": Command(
            ["diff", f"a={inputs}/model", f"b={inputs}/other", *drawn[:2], "out=d.json", "page=d.html", "checks=false"],
            False,
            ("d.json", "d.html"),
        ),
        "lint": Command(
            ["lint", f"data.train={data}", "lint.fix=clean.jsonl", "lint.out=lint.json", "lint.page=lint.html"],
            False,
            ("clean.jsonl", "clean.actions.jsonl", "lint.json", "lint.html"),
        ),
        "eval": Command(
            ["eval", "run=done", "sample_prompts=2", "sample.max_new_tokens=4"],
            False,
            ("done/eval.json", "done/eval-pairs.jsonl", "done/samples.jsonl"),
        ),
        "report": Command(["report", "done"], False, ("done/report.html",)),
    }


def prepare(root):
    """Models, data and a scorer; a finished run to evaluate and to report on."""
    tiny.save(root / "model")
    tiny.model(seed=1).save_pretrained(root / "other")
    tiny.tokenizer().save_pretrained(root / "other")
    (root / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    (root / "length.py").write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    words = commands(root)["train"].words
    code, said = child(root, ["run=done" if word == "run=run" else word for word in words])
    assert code == 0, said


def child(here, words, fault=None, kill_after=None):
    """Run a command in a fork of this process: (exit code, what it said on stderr)."""
    log = here / ".stderr"
    # a kill may come before the child opens it
    log.write_text("")
    pid = os.fork()
    if pid == 0:
        code = RAISED
        try:
            code = _in_child(here, words, fault, log)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), log.read_text("utf-8", "replace")


def _in_child(here, words, fault, log):
    from favor.cli import main

    os.chdir(here)
    os.environ["FAVOR_CACHE"] = str(here / "cache")
    for number, path in ((1, os.devnull), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["favor", *words]
    if fault:
        sys.addaudithook(fault(here))
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    except BaseException:  # noqa: BLE001 (whatever it is, it is a traceback)
        traceback.print_exc()
        return RAISED
    return 0


def writes(here, act):
    """An audit hook that calls act(n) at the n-th thing done to the file system below `here`."""
    count, inside = 0, str(here.resolve())

    def hook(event, args):
        nonlocal count
        if event == "open":
            path, mode, flags = args
            changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if flags else "w" in str(mode) or "a" in str(mode)
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            path, changes = args[0], True
        else:
            return
        if isinstance(path, str | bytes) and changes:
            full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (an audit hook must not open files)
            if full.startswith(inside) and not full.endswith(".stderr"):
                count += 1
                act(count, event)

    return hook


def die_at(number):
    """A kill at the n-th write: nothing is flushed, nothing is tidied."""
    return lambda here: writes(here, lambda n, event: os._exit(DIED) if n == number else None)


def full_from(number):
    """A disk that is full from the n-th write on; removing still works."""

    def act(n, event):
        if n >= number and event not in ("os.remove", "os.rmdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda here: writes(here, act)


def count_writes(counter):
    def act(n, event):
        counter.value = n

    return lambda here: writes(here, act)


def results(here, command):
    """What counts in the end: file -> bytes; of metrics the curves as the report reads them, without the clock."""
    from favor.report.records import collect

    found = {}
    for pattern in command.results:
        for path in sorted(here.glob(pattern)):
            name = str(path.relative_to(here))
            if path.name == "metrics.jsonl":
                record = collect(path.parent)
                if any("is not what was written" in event["message"] for event in record.events):
                    found[name] = TOLD
                    continue
                curves = [{k: v for k, v in r.items() if k not in CLOCK} for r in (*record.steps, *record.evals)]
                found[name] = json.dumps(curves, sort_keys=True)
            elif path.suffix == ".html":
                found[name] = _UNIQUE.sub("", path.read_text())
            else:
                found[name] = path.read_bytes()
    return found


def left_over(here):
    """Temporary and lock files that lie about. Those of the cache, one empty file a data set, are kept in its own folder."""
    found = (p for p in here.rglob("*") if p.name.endswith((".tmp", ".lock")))
    return [str(p.relative_to(here)) for p in found if p.parent != here / "cache/locks"]


def goes_on(here, command):
    """Continue as a user would: with resume=true where there is something to resume."""
    if not command.resumes:
        return child(here, command.words)
    code, said = child(here, [*command.words, "resume=true"])
    return child(here, command.words) if code == 2 and "nothing to resume" in said else (code, said)


def judge(code, said):
    """How a command ended: done, refused in one line, or badly."""
    lines = said.strip().splitlines()
    if "Traceback" in said or code == RAISED:
        return "traceback"
    if code == 0:
        return "done"
    return "refused" if code == 2 and len(lines) == 1 and lines[0].startswith("favor: ") else "traceback"


def outcome(here, command, expected, *, repeat=True):
    """Continue after a fault, and compare. A refusal counts only where nothing is wrong with going on anew."""
    code, said = goes_on(here, command)
    verdict = judge(code, said)
    if verdict == "done":
        found, litter = results(here, command), left_over(here)
        if found == expected and not litter:
            return "equal", said
        told = TOLD in found.values() and not litter
        same = found.keys() == expected.keys() and all(v in (TOLD, expected[k]) for k, v in found.items())
        differs = [k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)]
        return ("told" if told and same else "wrong"), f"{said}differs: {differs}, lies about: {litter}"
    return verdict, said


def fresh(root, name):
    """A folder of its own for a trial."""
    here = Path(tempfile.mkdtemp(prefix=name.split(",")[0] + "-", dir=root / "trials"))
    if (root / "done").exists():
        shutil.copytree(root / "done", here / "done")
    return here


def broken_off(root, name, command, at, act=die_at):
    here = fresh(root, name)
    return here, *child(here, command.words, act(at))


def trial(root, name, command, unbroken, kind, rng):
    """One fault: (outcome, where, what was said)."""
    expected, writes_of, seconds = unbroken
    at = rng.randint(1, writes_of)
    if kind == "kill":
        here = fresh(root, name)
        child(here, command.words, kill_after=rng.uniform(0, seconds))
    elif kind == "aimed kill":
        here, _, _ = broken_off(root, name, command, at)
    elif kind == "full disk":
        here, code, said = broken_off(root, name, command, at, full_from)
        if judge(code, said) == "traceback":
            return "traceback", here, f"write {at}: {said}"
    elif kind == "small disk":
        here, code, said = small_disk(root, name, command, rng)
        if judge(code, said) == "traceback":
            return "traceback", here, said
    else:
        here, _, _ = broken_off(root, name, command, rng.randint(writes_of // 2, writes_of))
        said = (tear if kind == "torn lines" else damage)(here, rng)
    verdict, also = outcome(here, command, expected)
    return verdict, here, f"write {at}: {also}"


def small_disk(root, name, command, rng):
    """The command on a file system of a few hundred KiB, then what it left on one that is large enough."""
    disk, here = root / "disk", fresh(root, name)
    disk.mkdir(exist_ok=True)
    size = rng.randint(40, 900)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
    try:
        if not command.resumes:
            shutil.copytree(here, disk, dirs_exist_ok=True)
        code, said = child(disk, command.words)
        shutil.copytree(disk, here, dirs_exist_ok=True)
    except (OSError, shutil.Error):
        code, said = 0, ""
    finally:
        subprocess.run(["umount", disk], check=True)
    return here, code, said


def can_mount(root):
    probe = root / "probe"
    probe.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", probe], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", probe], check=True)
    return done.returncode == 0


def artefacts(here):
    """Everything that a command keeps to go on from."""
    kept = (".safetensors", ".json", ".jsonl", ".partial", ".arrow", ".toml")
    return sorted(p for p in here.rglob("*") if p.is_file() and p.name.endswith(kept) and "done" not in p.parts)


def tear(here, rng):
    """Cut the last line of every file of lines, as a killed writer may."""
    for path in artefacts(here):
        raw = path.read_bytes()
        if path.name.endswith(("metrics.jsonl", "judgments.jsonl", ".partial")) or path.name.startswith("responses-"):
            path.write_bytes(raw[: max(0, len(raw) - rng.randint(1, 30))])


def damage(here, rng):
    """Random bytes in one file."""
    if found := [p for p in artefacts(here) if p.stat().st_size]:
        path = rng.choice(found)
        raw = bytearray(path.read_bytes())
        start = rng.randrange(len(raw))
        for place in range(start, min(len(raw), start + rng.choice((1, 20, 200)))):
            raw[place] ^= rng.randrange(1, 256)
        path.write_bytes(raw)


def unbroken(root, name, command):
    """What the command leaves undisturbed, how often it writes, and how long it takes."""
    import multiprocessing

    counter = multiprocessing.Value("i", 0, lock=False)
    here, began = fresh(root, name), time.monotonic()
    code, said = child(here, command.words, count_writes(counter))
    assert code in (0, 1 if name == "lint" else 0), (name, said)
    found = results(here, command)
    assert found, name
    shutil.rmtree(here)
    return found, counter.value, time.monotonic() - began


def main(arguments):
    import torch

    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    root = Path(tempfile.mkdtemp(prefix="favor-fault-"))
    (root / "trials").mkdir()
    prepare(root)
    chosen = {n: c for n, c in commands(root).items() if not arguments.only or n in arguments.only}
    kinds = [k for k in arguments.kinds if k != "small disk" or can_mount(root)]
    counts, bad = Counter(), []
    ends = time.monotonic() + arguments.minutes * 60
    began = {name: unbroken(root, name, command) for name, command in chosen.items()}
    for _ in range(arguments.trials):
        for name, command in chosen.items():
            for kind in kinds:
                if time.monotonic() > ends:
                    continue
                verdict, here, said = trial(root, name, command, began[name], kind, rng)
                counts[name, kind, verdict] += 1
                if verdict in ("wrong", "traceback"):
                    bad.append((name, kind, str(here), said))
                    print(f"{verdict}: {name}, {kind}, {here}\n{said}", file=sys.stderr, flush=True)
                elif arguments.verbose:
                    print(f"{verdict}: {name}, {kind}: {said.strip()[-200:]}", file=sys.stderr, flush=True)
                if verdict not in ("wrong", "traceback"):
                    shutil.rmtree(here)
    show(counts, list(chosen), kinds)
    if not bad:
        shutil.rmtree(root)
    return 1 if bad else 0


def show(counts, names, kinds):
    """The table: command x kind of fault."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "command",
        "fault",
        "trials",
        "equal",
        "equal but curves, said",
        "refused in one line",
        "silently wrong",
        "traceback",
    )
    for name in names:
        for kind in kinds:
            row = [counts[name, kind, each] for each in OUTCOMES]
            table.add_row(name, kind, str(sum(row)), *map(str, row))
    total = [sum(n for (_, _, verdict), n in counts.items() if verdict == each) for each in OUTCOMES]
    table.add_section()
    table.add_row("all", "", str(sum(total)), *map(str, total))
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=6, help="of every command and kind")
    parser.add_argument("--minutes", type=float, default=19.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    print(f"seed {given.seed}")
    sys.exit(main(given))
