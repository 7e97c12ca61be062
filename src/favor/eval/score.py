"""`favor score`: any reward on a file of responses; on preferences also its accuracy and calibration.

In: ScoreConfig. Out: JSON lines {"prompt", "responses", "scores"}, and figures. Next: figures.py.
"""

import json
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from favor import output
from favor.config import STRICT, Overwrite
from favor.data.formats import FORMATS, Judgment, RowError, order_assumed, recognise
from favor.data.formats.columns import named
from favor.data.formats.fields import TEMPLATE_KWARGS
from favor.data.prompts import prompt_of
from favor.data.settings import Columns
from favor.data.sources import read_objects
from favor.data.types import words_of
from favor.errors import DataError
from favor.eval.figures import calibrate
from favor.generate.samples import Out, Progress, Split, already, responses_of
from favor.output import Output
from favor.rewards.source import RewardConfig, identity, make_scorer, reads
from favor.run import jsonl

# Responses handed to the reward at once: enough to share prompts, little enough to see progress.
_CHUNK = 256


class ScoreConfig(BaseModel):
    """A recipe for `favor score`."""

    model_config = STRICT
    out: Out
    data: str
    """Preferences, SFT rows, or samples (prompt + responses); of preferences `<out>.figures.json` gets the figures."""
    split: Split = "test"
    columns: Columns = {}
    max_rows: int | None = Field(default=None, ge=1)
    """Score only the first N rows."""
    reward: RewardConfig
    overwrite: Overwrite = False


def score(config: ScoreConfig, progress: Progress, recipe: Path | None = None) -> dict[str, Any] | None:
    """Write the scores; returns accuracy, calibration curve and ECE, or None when nothing is compared.

    A file that the same data and reward made before stays as it is. Raises DataError for a row that cannot be
    used, ConfigError for an `out` that is not to be replaced (or is the `recipe`), and what the reward raises.
    """
    figures = Path(f"{config.out}.figures.json")
    claim = Output(Path(config.out), "out", config.overwrite, (figures,))
    inputs = (config.data, *reads(config.reward), recipe and str(recipe))
    with output.claimed(claim, inputs) as out:
        rows = _rows(config)
        out = replace(out, settings=output.hashes({"data": rows, "reward": identity(config.reward)}))
        if (before := already(out, progress)) is not None:
            return before["figures"]
        return _score(config, rows, out, progress)


def _score(config: ScoreConfig, rows: list[Judgment], out: Output, progress: Progress) -> dict[str, Any] | None:
    scorer = make_scorer(config.reward)
    if cut := sum(len(row.cut) for row in rows):
        progress(
            f"warning: {cut} responses stop before their end (ended) and are scored as if they had ended there", 1, 1
        )
    prompts = [row.prompt for row in rows for _ in row.responses]
    texts = [words_of(response) for row in rows for response in row.responses]
    scores: list[float] = []
    for first in range(0, len(texts), _CHUNK):
        part = slice(first, first + _CHUNK)
        scores += scorer(prompts[part], texts[part])
        progress("responses", len(texts[part]), len(texts))
    each = iter(scores)
    scored = [[next(each) for _ in row.responses] for row in rows]
    found = _calibration(rows, scored)
    lines = [
        {"prompt": row.prompt, "responses": list(row.responses), "scores": mine}
        for row, mine in zip(rows, scored, strict=True)
    ]
    written = {out.path: jsonl(lines)}
    if found:
        written[out.also[0]] = json.dumps(found, indent=2) + "\n"
    output.write(out, written, {"figures": found})
    return found


def _calibration(rows: list[Judgment], scored: list[list[float]]) -> dict[str, Any] | None:
    """Figures of the pairs that the rows' orders imply; None when there are none."""
    gaps: list[float] = []
    prompts: list[int] = []
    places: dict[str, int] = {}
    for row, mine in zip(rows, scored, strict=True):
        # rows of one prompt are not independent
        place = places.setdefault(json.dumps(row.prompt, sort_keys=True), len(places))
        new = [mine[a] - mine[b] for order in row.orders for a, b in combinations(order, 2)]
        gaps += new
        prompts += [place] * len(new)
    return {"calibration": asdict(calibrate(np.array(gaps), np.array(prompts)))} if gaps else None


def _rows(config: ScoreConfig) -> list[Judgment]:
    found: list[Judgment] = []
    for number, row in read_objects(config.data, config.split):
        try:
            row = named(row, config.columns, None)
            if row.get(TEMPLATE_KWARGS):
                raise RowError(f"it has {TEMPLATE_KWARGS}, which a reward on text does not see; leave the column out")
            found.append(_judgment(row))
            _refuse_unseen(found[-1])
        except RowError as error:
            fix = "" if error.of_names else "; fix the row"
            raise DataError(f"{config.data}, row {number}: {error}{fix}") from None
        if config.max_rows is not None and len(found) >= config.max_rows:
            break
    if not found:
        raise DataError(f"{config.data}: nothing to score: it holds no rows; name a file with rows")
    return found


def _judgment(row: dict[str, Any]) -> Judgment:
    if "responses" in row and not row.keys() & {"ranking", "scores", "votes", "choices"}:
        if not isinstance(row["responses"], list):
            raise RowError("samples are a prompt and a list of responses")
        return Judgment(prompt_of(row), tuple(responses_of(row)), ())
    name = recognise(row)
    judgment = FORMATS[name](row)
    # answers in no known order are samples
    return judgment._replace(orders=()) if order_assumed(row, name) else judgment


def _refuse_unseen(judgment: Judgment) -> None:
    """Raise RowError for what a reward on text would be blind to, so that its score would be of something else."""
    unread = {
        key
        for response in judgment.responses
        if not isinstance(response, str)
        for message in response
        for key, value in message.items()
        if key not in ("role", "content") and value
    } | ({"tools"} if judgment.tools else set[str]())
    if any(not isinstance(response, str) and len(response) > 1 for response in judgment.responses):
        unread.add("responses of several turns")
    if unread:
        raise RowError(
            f"it has {', '.join(sorted(unread))}, which a reward on text does not see; leave the row out, or for a run's own "
            "margins use favor eval"
        )
