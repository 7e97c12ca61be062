"""`favor audit`: a judge compares pairs in both orders, some of them again; figures, sentences, a page, soft labels.

In: AuditConfig. Out: audit.json, audit.html and soft-labels.jsonl in the run folder, where the verdicts are kept, so that a
repeated or continued audit asks only what is missing. Next: settings.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from favor.audit.figures import (
    Both,
    Judged,
    agreement_figures,
    judged,
    length_figures,
    order_figures,
    repeat_figures,
    self_figures,
)
from favor.audit.pairs import Pair, Taken, take
from favor.audit.powered import powered
from favor.audit.settings import AuditConfig
from favor.audit.soft import Soft, soft_labels
from favor.audit.words import failures, findings, headline
from favor.config import dump, read
from favor.errors import ConfigError, without_places
from favor.generate.samples import Progress
from favor.report.found import Found, card
from favor.report.frame import rendered
from favor.report.table import FEW, audit_rows
from favor.run import RunFolder, holds_work, jsonl, opened, write_config, write_json, write_text
from favor.winrate.judges import JUDGES, Duel, verdicts


def audit(config: AuditConfig, say: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """Judge, write audit.json, the page and the soft labels into the run folder, and return the figures.

    Raises ConfigError when the folder holds something else; DataError, CheckpointError or ServerError when an input cannot be
    used. Verdicts made until then are kept.
    """
    taken = take(config)
    JUDGES[config.judge.kind].check(config.judge)
    folder = RunFolder(Path(config.run))
    before = read(folder.config).keys() if folder.config.exists() else set[str]()
    if (before and not {"data", "judge"} <= before <= AuditConfig.model_fields.keys()) and holds_work(folder):
        raise ConfigError(f"{config.run}: already holds a run of another kind; choose another run=FOLDER")
    with opened(folder):
        write_config(folder, dump(config))
        both = _asked(config, taken.pairs, folder.judgments, say, partial(progress, "judgments"))
        places = _repeated(config, len(taken.pairs))
        some = [taken.pairs[place] for place in places]
        again = [
            _asked(config, some, _again(folder, time), say, partial(progress, f"judgments again {time}"))
            for time in range(1, config.repeats + 1)
        ]
        asked = [[both[place], *(each[i] for each in again)] for i, place in enumerate(places)] if again else []
        arrays = judged(taken.pairs, both)
        soft = soft_labels(arrays, config.seed)
        figures = _figures(config, taken, both, arrays, soft)
        figures |= repeat_figures([pair.group for pair in some], asked)
        found = findings(figures)
        figures |= {"findings": [one._asdict() for one in found], "headline": headline(found)}
        figures["failed"] = failures(figures, config.fail_on.model_dump(exclude_none=True))
        _write(config, folder, figures, _soft_rows(taken.pairs, both, soft))
    return figures


def _asked(
    config: AuditConfig,
    pairs: Sequence[Pair],
    kept: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> list[Both]:
    """The verdicts of pairs in both orders, from the file where they are kept."""
    duels = [duel for pair in pairs for duel in (Duel(pair.prompt, pair.a, pair.b), Duel(pair.prompt, pair.b, pair.a))]
    found = verdicts(config.judge, duels, kept, say, progress)
    return list(zip(found[::2], found[1::2], strict=True))


def _again(folder: RunFolder, time: int) -> Path:
    """Where the verdicts are kept of questions that were asked before."""
    return folder.judgments.with_stem(f"{folder.judgments.stem}-again-{time}")


def _repeated(config: AuditConfig, count: int) -> list[int]:
    """Places of the pairs that are asked again."""
    if not config.repeats:
        return []
    # a stream apart from the one that draws the pairs
    return sorted(np.random.default_rng([config.seed, 1]).permutation(count)[: config.repeat_pairs].tolist())


def _figures(
    config: AuditConfig, taken: Taken, both: Sequence[Both], arrays: Judged, soft: Soft | None
) -> dict[str, Any]:
    """Everything but what repetitions say."""
    known = ~np.isnan(arrays.human_P)
    figures: dict[str, Any] = {
        "judge": f"{config.judge.kind} {JUDGES[config.judge.kind].name(config.judge)}",
        "data": config.data,
        "own": config.own,
        "pairs": len(taken.pairs),
        "prompts": len(np.unique(arrays.prompt_P)),
        "human_pairs": int(known.sum()),
        "human_prompts": len(np.unique(arrays.prompt_P[known])),
        "repeats": config.repeats,
        "repeated_pairs": len(_repeated(config, len(taken.pairs))),
        **order_figures(taken.pairs, both),
        **length_figures(arrays),
        **self_figures(arrays),
        **agreement_figures(arrays),
        "win_rate": _win_rate(config, arrays.only(arrays.named_P)),
        "soft_labels": soft and {"calibration": soft.calibration, "label_smoothing": soft.smoothing},
        "left_out": taken.left_out,
    }
    return figures


def _win_rate(config: AuditConfig, pairs: Judged) -> dict[str, Any] | None:
    """The side's win rate; None without a side or without labels. A verdict that nobody can read counts as a tie."""
    if np.isnan(pairs.human_P).all():
        return None
    found = powered(np.where(np.isnan(pairs.judge_P), 0.5, pairs.judge_P), pairs.human_P, pairs.prompt_P)
    rates = {"human": found.human, "judge": found.judge, "both": found.both}
    told = {name: value for name, value in found._asdict().items() if name not in rates}
    side = config.side or "the first answer"
    return {"side": side, **told, **{k: v for name, rate in rates.items() for k, v in rate.named(name).items()}}


def _soft_rows(pairs: Sequence[Pair], both: Sequence[Both], soft: Soft | None) -> list[dict[str, Any]]:
    """Rows of format votes; none without labels."""
    rows: list[dict[str, Any]] = []
    for pair, verdicts_of, chance in zip(pairs, both, soft.chance_P.tolist() if soft else [], strict=soft is not None):
        sides = {
            "prompt": pair.prompt,
            "responses": [pair.a, pair.b],
            "votes": [round(chance, 6), round(1 - chance, 6)],
        }
        row: dict[str, Any] = {**sides, "verdicts": list(verdicts_of)}
        row |= {"human": pair.votes.share} if sum(pair.votes) else {}
        row |= {"tools": list(pair.tools)} if pair.tools else {}
        rows.append(row | ({} if all(pair.ended) else {"ended": list(pair.ended)}))
    return rows


def _write(config: AuditConfig, folder: RunFolder, figures: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The files of the run folder; soft labels of an earlier audit go where there are none now."""
    if rows:
        write_text(folder.soft_labels, jsonl(rows))
    else:
        folder.soft_labels.unlink(missing_ok=True)
    write_text(folder.audit_page, _page(config, figures))
    write_json(folder.audit, figures)


def _page(config: AuditConfig, figures: dict[str, Any]) -> str:
    """The page; it names no folder of this machine."""
    said = {
        level: [one["said"] for one in figures["findings"] if one["level"] == level]
        for level in ("found", "clear", "unknown")
    }
    light = "bad" if figures["failed"] else "unsure" if said["found"] or said["unknown"] else "good"
    few = f" Under {FEW} prompts little can be told." if figures["human_prompts"] < FEW else ""
    sure = (
        f"Ranges are 95 % intervals over prompts; of five fair figures one leaves its range in every fifth audit.{few}"
    )
    following = (
        [("", "Correct for what was found, or ask another judge; docs/audit.md says how.")] if said["found"] else []
    )
    found = Found(
        light,
        figures["headline"],
        [*said["clear"], *said["unknown"]],
        [sure],
        (),
        [*said["found"], *figures["failed"]],
        following,
    )
    known = [config.data, *([config.human] if config.human else []), figures["judge"]]
    shown = {
        "title": without_places(figures["judge"], known),
        "rows": [(a, without_places(b, known)) for a, b in audit_rows(figures)],
    }
    curve = ((figures["soft_labels"] or {}).get("calibration") or {}).get("curve", ())
    bins = [(f"{100 * b['predicted']:.0f} %", f"{100 * b['observed']:.0f} %", str(b["num_pairs"])) for b in curve]
    return rendered("favor.audit", "audit.html.jinja", verdict=card(found), bins=bins, **shown)
