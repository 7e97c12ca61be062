"""The last lines of a command: how long it took, what changed, what to type next; and the same as one JSON object.

In: what a command left behind, its run folder or its figures. Out: Done, and lines. No torch here. Next: cli.py.
"""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from favor.run import RunFolder, read_jsonl

if TYPE_CHECKING:
    from favor.data.types import Finding

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    """What a command leaves. changed: in words; figures, paths: by name; following: what to type next; failed: exit code 1."""

    changed: tuple[str, ...] = ()
    figures: Figures = field(default_factory=dict[str, Any])
    paths: Mapping[str, str] = field(default_factory=dict[str, str])
    following: tuple[str, ...] = ()
    failed: bool = False

    def lines(self, seconds: float) -> Iterator[str]:
        """For people."""
        yield "; ".join((f"done in {duration(seconds)}", *self.changed))
        for number, command in enumerate(self.following):
            yield f"{'next: ' if number == 0 else '      '}{command}"

    def as_json(self, command: str, seconds: float) -> dict[str, Any]:
        """For programs."""
        told = {"command": command, "seconds": round(seconds, 3), "figures": dict(self.figures)}
        return told | {"paths": dict(self.paths), "next": list(self.following)}


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.8 s, 42 s, 5 min 12 s, 2 h 3 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


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
    if share := cut(figures.get("ended", {}).get("policy")):
        changed.append(f"{share}; raise sample.max_new_tokens")
    return Done(tuple(changed), figures, paths, (typed("report", run),))


def winrate(run: str, figures: Figures) -> Done:
    """After `favor winrate`."""
    folder = RunFolder(Path(run))
    paths = {"figures": str(folder.winrate), "samples": str(folder.winrate_samples)}
    return Done((f"a wins {_with_interval(figures, 'win_rate')}",), figures, paths, (typed("report", run),))


def scores(out: str, figures: Figures | None) -> Done:
    """After `favor score`."""
    if figures is None:
        return Done((f"scores in {out}",), {}, {"scores": out})
    found = figures["calibration"]
    changed = (
        f"accuracy {_with_interval(found, 'accuracy')} of {found['pairs']} pairs, calibration error {found['ece']:.3f}"
    )
    return Done((changed,), figures, {"scores": out, "figures": f"{out}.figures.json"})


def samples(out: str, count: int) -> Done:
    """After `favor sample`: of the samples that did not come to their end it says so."""
    ended = [one for row in read_jsonl(Path(out)) for one in row.get("ended", [])]
    share = sum(ended) / len(ended) if ended else None
    said = cut(share)
    changed = (f"{count} samples", *([f"{said}; raise sample.max_new_tokens"] if said else []))
    figures = {"samples": count, "ended": share}
    return Done(
        changed, figures, {"samples": out}, (typed("score", f"data={out}", "run=RUN", f"out={out}.scores.jsonl"),)
    )


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
    if fixed is not None:
        following = typed("lint", f"data.train={fixed}")
    elif failed or counts["error"]:
        following = typed("lint", *words, "--fix", "clean.jsonl")
    else:
        following = typed("train", *words, "--dry-run")
    return Done((said,), figures, {"cleaned": fixed} if fixed else {}, (following,), failed)


def cut(ended: float | None) -> str | None:
    """A sentence where more than a quarter of the samples did not come to their end."""
    return None if ended is None or ended >= 0.75 else f"{1 - ended:.0%} of the samples were cut at the token limit"


def _with_interval(figures: Figures, name: str) -> str:
    interval = figures.get(f"{name}_interval")
    value = figures[name]
    if value is None:
        return "unknown"
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
