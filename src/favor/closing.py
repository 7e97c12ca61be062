"""The last lines of a command: how long it took, what changed, what to type next; and the same as one JSON object.

In: what a command left behind, its run folder or its figures. Out: Done, and lines. No torch here. Next: cli.py.
"""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from favor.errors import clipped
from favor.run import RunFolder, read_jsonl
from favor.train.notes import cut, duration

if TYPE_CHECKING:
    from favor.data.types import Finding
    from favor.doctor.settings import Sign

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    """What a command leaves. changed: in words; figures, paths: by name; following: what to type next; failed: exit code `code`.

    product: the text that was asked for, alone on stdout, so that it can go into a file.
    """

    changed: tuple[str, ...] = ()
    figures: Figures = field(default_factory=dict[str, Any])
    paths: Mapping[str, str] = field(default_factory=dict[str, str])
    following: tuple[str, ...] = ()
    failed: bool = False
    code: int = 1
    product: str | None = None

    def lines(self, seconds: float) -> Iterator[str]:
        """For people."""
        yield "; ".join((f"done in {duration(seconds)}", *self.changed))
        for number, command in enumerate(self.following):
            yield f"{'next: ' if number == 0 else '      '}{command}"

    def as_json(self, command: str, seconds: float) -> dict[str, Any]:
        """For programs."""
        told = {"command": command, "seconds": round(seconds, 3), "figures": dict(self.figures)}
        told |= {} if self.product is None else {"product": self.product}
        return told | {"paths": dict(self.paths), "next": list(self.following)}


@dataclass(frozen=True)
class Speech:
    """How much a command says: everything; quiet: nothing but what it was asked for; json: one object, all else on stderr."""

    command: str
    quiet: bool = False
    json: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)
    began: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def elsewhere(self) -> Generator[None]:
        """Where what is printed goes while the command runs."""
        with contextlib.ExitStack() as stack:
            if self.quiet:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            elif self.json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            yield

    def address(self, url: str) -> None:
        """Where a page is: without it nobody gets in, so nothing keeps it back; with `json` an object of its own."""
        print(json.dumps({"command": self.command, "url": url}) if self.json else url, file=self.out, flush=True)
        print("this address holds the token of this start: give it to nobody; Ctrl-C ends", flush=True)

    def end(self, done: Done) -> None:
        """The product and the last lines; of several processes one speaks."""
        if not speaks():
            return
        seconds = time.monotonic() - self.began
        if self.json:
            print(json.dumps(done.as_json(self.command, seconds), ensure_ascii=False), file=self.out)
            return
        if done.product is not None:
            print(done.product, end="", file=self.out, flush=True)
        for line in () if self.quiet else done.lines(seconds):
            print(line, file=self.out if done.product is None else sys.stderr)


def speaks() -> bool:
    """Whether this process, of several that torchrun started, talks to people."""
    return os.environ.get("RANK", "0") in ("", "0")


def ended(speech: Speech, work: Callable[[], Done]) -> None:
    """Run a command and say its end: every command goes through here. Raises SystemExit when it has failed."""
    with speech.elsewhere():
        done = work()
    speech.end(done)
    if done.failed:
        sys.exit(done.code)


def typed(*words: str) -> str:
    """A command as it is typed; a word with blanks gets quotes."""
    return shlex.join(("favor", *words))


def training(run: str, following: Sequence[Sequence[str]]) -> Done:
    """What a training run changed: its loss and held-out figures from the first to the last, and what it warned of."""
    folder = RunFolder(Path(run))
    there = folder.metrics.exists() and folder.metrics.stat().st_size
    records = read_jsonl(folder.metrics) if there else []
    steps, evals = (_by_step(records, kind) for kind in ("step", "eval"))
    figures: dict[str, Any] = {"steps": steps[-1]["step"] if steps else 0}
    changed: list[str] = []
    for name, found in (("", steps), ("held-out ", evals)):
        for key in ("loss", "accuracy", "reward"):
            # a batch's own accuracy is noise beside the held-out one
            if found and key in found[0] and key in found[-1] and (name or key != "accuracy"):
                figures[f"{name.replace('held-out ', 'held_out_')}{key}"] = [found[0][key], found[-1][key]]
                changed.append(f"{name}{key} {_change(key, found[0], found[-1])}")
    figures["warnings"] = warnings = _warnings(records)
    if warnings:
        changed.append(f"look at the lines above on: {', '.join(warnings)}")
    paths = {"run": folder.root, "model": folder.model, "metrics": folder.metrics}
    there = {name: str(path) for name, path in paths.items() if path.exists()}
    # without held-out data favor eval has nothing to measure on
    return Done(
        tuple(changed), figures, there, tuple(typed(*words) for words in following if evals or words[0] != "eval")
    )


def _by_step(records: Sequence[Figures], kind: str) -> list[Figures]:
    """The records of a kind, in the order of their steps; of a step that was written again the last."""
    found = [record for record in records if record.get("kind") == kind]
    return [record for _, record in sorted({record["step"]: record for record in found}.items())]


def _warnings(records: Sequence[Figures]) -> list[str]:
    """The names of the warnings and notes of a run, each once."""
    events = [record for record in records if record.get("kind") == "event"]
    return list(dict.fromkeys(e["name"] for e in events if str(e["message"]).startswith(("warning:", "note:"))))


def _change(key: str, first: Figures, last: Figures) -> str:
    spec = ".4f" if key == "loss" else ".2f"
    interval = last.get(f"{key}_interval")
    within = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    pairs = f" of {last['pairs']} pairs" if within and "pairs" in last else ""
    return f"{first[key]:{spec}} -> {last[key]:{spec}}{within}{pairs}"


def evaluation(run: str, figures: Figures) -> Done:
    """After `favor eval`."""
    folder = RunFolder(Path(run))
    paths = {"figures": str(folder.evaluation)}
    if figures["kl"] is not None or "length" in figures:
        paths["samples"] = str(folder.samples)
    changed = [f"implicit reward accuracy {_with_interval(figures, 'accuracy')} (before: 0.50)"]
    if kl := figures["kl"]:
        changed.append(f"KL {kl['mean']:.2f} nats")
    if "ended" in figures and (said := cut([figures["ended"]["policy"]], "sample.max_new_tokens")):
        changed.append(said)
    return Done(tuple(changed), figures, paths, (typed("report", run),))


def winrate(run: str, figures: Figures) -> Done:
    """After `favor winrate`."""
    folder = RunFolder(Path(run))
    paths = {"figures": str(folder.winrate), "samples": str(folder.winrate_samples)}
    return Done((f"a wins {_with_interval(figures, 'win_rate')}",), figures, paths, (typed("report", run),))


def realigned(figures: Figures, paths: Mapping[str, str]) -> Done:
    """After `favor realign`."""
    first, last, baked = figures["family"][0], figures["family"][-1], figures["baked"]
    changed = [f"KL {first['kl']:.2f} to {last['kl']:.2f} nats from lambda {first['lambda']:g} to {last['lambda']:g}"]
    if baked is None:
        chosen = f"bake={last['lambda']:g}"
        following = typed("realign", f"run={figures['run']}", chosen, "bake_to=FOLDER")
    else:
        gap = f"{baked['kl_per_token']:.2g} nats a token from the exact family (KL), {baked['largest_kl']:.2g} at most"
        changed.append(f"lambda {baked['lambda']:g} baked into {baked['folder']}: {gap}")
        following = typed("sample", f"model={baked['folder']}", "prompts=FILE", "out=samples.jsonl")
        paths = {**paths, "baked": baked["folder"]}
    return Done(tuple(changed), figures, paths, (following,))


def audited(run: str, figures: Figures) -> Done:
    """After `favor audit`; it has failed where a figure is beyond its threshold."""
    folder = RunFolder(Path(run))
    paths = {"figures": folder.audit, "page": folder.audit_page, "soft_labels": folder.soft_labels}
    there = {name: str(path) for name, path in paths.items() if path.exists()}
    following = typed("train", "model.path=MODEL", f"data.train={folder.soft_labels}", "run=runs/dpo")
    calibration = (figures["soft_labels"] or {}).get("calibration")
    # labels that say no more than a coin teach nothing
    if "soft_labels" not in there or (calibration and calibration["loss"] >= math.log(2)):
        following = typed("label", f"data={figures['data']}", "db=labels.sqlite")
    return Done((figures["headline"], *figures["failed"]), figures, there, (following,), bool(figures["failed"]))


def scores(data: str, out: str, figures: Figures | None, reward: Sequence[str]) -> Done:
    """After `favor score`. reward: the words that name it, by which preferences can be doubted."""
    if figures is None:
        sides = (f"a.file={data}", "b.file=OTHERS.jsonl", "judge.kind=reward")
        following = typed("winrate", *sides, *(f"judge.{word}" for word in reward), "run=runs/winrate")
        return Done((f"scores in {out}",), {}, {"scores": out}, (following,))
    found = figures["calibration"]
    changed = (
        f"accuracy {_with_interval(found, 'accuracy')} of {found['pairs']} pairs, calibration error {found['ece']:.3f}"
    )
    following = typed("lint", f"data.train={data}", *reward)
    return Done((changed,), figures, {"scores": out, "figures": f"{out}.figures.json"}, (following,))


def samples(out: str, count: int) -> Done:
    """After `favor sample`: of the samples that did not come to their end it says so."""
    rows = read_jsonl(Path(out))
    ended = [one for row in rows for one in row.get("ended", [])]
    said = cut(ended, "sample.max_new_tokens")
    first = rows[0]["responses"][0] if rows and rows[0]["responses"] else ""
    changed = (
        f"{count} samples",
        *([said] if said else []),
        f"the first: {clipped(' '.join(first.split())) or 'blank'}",
    )
    figures = {"samples": count, "ended": sum(ended) / len(ended) if ended else None}
    scores = typed("score", f"data={out}", "model=REWARD_MODEL", f"out={out}.scores.jsonl")
    # people can compare where a prompt has several
    several = any(len(row["responses"]) > 1 for row in rows)
    following = (typed("label", f"data={out}"), scores) if several else (scores,)
    return Done(changed, figures, {"samples": out}, following)


def preferences(out: str, figures: Figures) -> Done:
    """After `favor prefer`."""
    following = (
        typed("lint", f"data.train={out}"),
        typed("train", "model.path=MODEL", f"data.train={out}", "run=runs/dpo"),
    )
    return Done((f"preferences in {out}",), figures, {"preferences": out}, following)


def findings(found: "Sequence[Finding]", words: Sequence[str], fixed: str | None, *, failed: bool) -> Done:
    """After `favor lint`. words: the recipe and data that were looked at; fixed: the cleaned copy, if one was written."""
    counts = Counter(finding.severity for finding in found)
    figures = {"counts": dict(counts), "findings": [finding._asdict() for finding in found]}
    said = ", ".join(f"{counts[name]} {name}{'s' * (counts[name] != 1)}" for name in ("error", "warning", "note"))
    if any(finding.kind == "read" and ", 0 of them usable" in finding.message for finding in found):
        # there is nothing to clean; what to try stands with the rows
        following = ()
    elif fixed is not None:
        # the copy has the columns of what it was made from
        kept = [word for word in words if not word.startswith("data.train=")]
        following = (typed("lint", *kept, f"data.train={fixed}"),)
    elif failed or counts["error"]:
        following = (typed("lint", *words, "--fix", "clean.jsonl"),)
    else:
        # a file alone says neither what is trained nor where it goes
        named = any(word.startswith("model") for word in words)
        missing = (
            () if words[0].endswith(".toml") else ("run=runs/dpo",) if named else ("model.path=MODEL", "run=runs/dpo")
        )
        following = (typed("train", *words, *missing, "--dry-run"),)
    return Done((said,), figures, {"cleaned": fixed} if fixed else {}, following, failed)


def worth(said: str, figures: Figures, asked: Mapping[str, Any]) -> Done:
    """After `favor value`. said: its headline; asked: its section, by which files were written."""
    paths = {name: asked[name] for name in ("out", "page", "clean") if asked[name] is not None}
    data = asked["clean"] or "FILE"
    following = [typed("train", "model.path=MODEL", f"data.train={data}", "run=runs/dpo")]
    if not asked["clean"] and figures["label_smoothing"]:
        robust = ("loss.kind=robust", f"loss.label_smoothing={figures['label_smoothing']}")
        following = [typed("train", "model.path=MODEL", "data.train=FILE", *robust, "run=runs/dpo")]
    return Done((said,), figures, paths, tuple(following))


def asked(out: str, history: str, figures: Figures) -> Done:
    """After `favor ask`: how good the model was on pairs drawn by chance, and whether that is enough."""
    low, high = figures["accuracy_sequence"]
    said = [f"{figures['asked']} pairs to label in {out}, {figures['by_chance']} of them by chance"]
    if figures["foretold"]:
        right = f"{figures['accuracy']:.2f} [{low:.2f}, {high:.2f}]"
        said.append(
            f"the model was right on {right} of {figures['foretold']} pairs drawn by chance, before their labels came"
        )
    said.append("that is enough" if figures["settled"] else "more labels may help")
    following = (
        typed("label", f"data={out}", "db=labels.sqlite"),
        typed("label", "db=labels.sqlite", "out=labels.jsonl"),
    )
    return Done(tuple(said), figures, {"pairs": out, "history": history}, following)


def compared(said: str, figures: Figures, written: Mapping[str, str | None]) -> Done:
    """After `favor diff`. said: its headline. The exit code is 1 where a gate fails, 3 where one is not settled."""
    paths = {name: path for name, path in written.items() if path is not None}
    answered = f"{figures['answered']} of {figures['prompts']} prompts answered"
    sides = (f"a={figures['a']}", f"b={figures['b']}", "prompts=FILE")
    more = typed("diff", *sides, *(() if "page" in paths else ("page=diff.html",)))
    models = (f"a.model={figures['b']}", f"b.model={figures['a']}", "prompts=FILE", "judge.kind=...", "run=runs/duel")
    following = (more, typed("winrate", *models))
    verdict = figures["verdict"]
    bad = verdict in ("fails", "not settled")
    return Done((said.rstrip("."), answered), figures, paths, following, bad, 3 if verdict == "not settled" else 1)


def conformed(found: Mapping[str, Figures], out: str | None, page: str | None) -> Done:
    """After `favor conform`. found: what came of each case."""
    counts = Counter(result["status"] for result in found.values())
    said = ", ".join(f"{counts[name]} {name}" for name in ("holds", "fails", "refused", "not tried") if counts[name])
    failed = [name for name, result in found.items() if result["status"] == "fails"]
    paths = {name: path for name, path in (("found", out), ("page", page)) if path is not None}
    again = (
        typed("conform", "adapter=FILE", f"cases={','.join(failed)}") if failed else typed("conform", "adapter=FILE")
    )
    return Done((said,), {"counts": dict(counts), "cases": found}, paths, (again,), failed=bool(failed))


def checked(found: "Sequence[Sign]", *, asked: str | None) -> Done:
    """After `favor doctor`. asked: the model or run that it looked at."""
    counts = Counter(sign.level for sign in found)
    said = ", ".join(f"{counts[name]} {name}" for name in ("ok", "note", "broken"))
    figures = {"counts": dict(counts), "findings": [sign._asdict() for sign in found]}
    following = (
        typed("demo") if asked is None else typed("init", "--model", asked, "--data", "FILE", "--out", "recipe.toml")
    )
    more = () if asked else (typed("doctor", "model=MODEL"),)
    return Done((said,), figures, {}, (*more, following), failed=bool(counts["broken"]))


def _with_interval(figures: Figures, name: str) -> str:
    interval = figures.get(f"{name}_interval")
    value = figures[name]
    if value is None:
        return "unknown"
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
