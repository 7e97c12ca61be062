"""Verdicts that were paid for are kept: an append-only file, one line per judged (prompt, first, second).

In: a JudgeConfig and duels. Out: a verdict per duel; only those not in the file are judged. Next: judges.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from favor.data.types import Text
from favor.errors import CheckpointError
from favor.guard import content, is_sealed, seal, sha
from favor.rewards.source import reads
from favor.run import append, cut_torn_line, read_jsonl
from favor.winrate.judges import Duel, JudgeConfig, make_judge, settings_that_count
from favor.winrate.stats import Verdict


def judge_all(
    config: JudgeConfig,
    duels: Sequence[Duel],
    path: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> list[Verdict]:
    """A verdict for every duel, from the file `path` where it is there; new ones are added to it one by one.

    The judge is loaded only when something is missing. What it raises comes through; the verdicts so far are kept.
    """
    settings = identity(config)
    keys = [key_of(settings, duel) for duel in duels]
    cut_torn_line(path)
    known: dict[str, Verdict] = {r["key"]: r["verdict"] for r in read_sealed(path)}
    missing = {key: duel for key, duel in zip(keys, duels, strict=True) if key not in known}
    say(f"judgments: {len(missing)} to make, {len(set(keys)) - len(missing)} kept in {path}")
    names = list(missing)

    def done(index: int, verdict: Verdict) -> None:
        known[names[index]] = verdict
        append(path, seal({"key": names[index], "verdict": verdict}))
        progress(1, len(names))

    if missing:
        make_judge(config)(list(missing.values()), done)
    return [known[key] for key in keys]


def read_sealed(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that grows, if there is one. Raises CheckpointError naming a line that is not what was written."""
    records = read_jsonl(path) if path.exists() else []
    for number, record in enumerate(records, 1):
        if not is_sealed(record):
            raise CheckpointError(
                f"{path}, line {number}: damaged, not what was written; remove that line to make it again"
            )
    return records


def key_of(settings: dict[str, Any], duel: Duel) -> str:
    """SHA-256 over the judge's settings and the texts in their order."""
    return sha(json.dumps([settings, duel], sort_keys=True))


def identity(config: JudgeConfig) -> dict[str, Any]:
    """The judge's settings with the content of the files they name: an edited judge is another judge."""
    model = config.model.path if config.model else None
    reward = reads(config.reward) if config.reward else ()
    return settings_that_count(config) | {"content": [content(path) for path in (config.path, model, *reward) if path]}


def text_key(prompt: Text) -> str:
    """Equal for equal prompts, be they text or a single user turn."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return json.dumps(turns, sort_keys=True)
