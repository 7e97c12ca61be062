"""`favor score`: any reward on a file of responses; on preferences also its accuracy and calibration.

In: ScoreConfig. Out: JSON lines {"prompt", "responses", "scores"}, and figures. Next: calibration.py.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from favor import output
from favor.config import STRICT
from favor.data.formats import FORMATS, Judgment, RowError, order_assumed, recognise
from favor.data.prompts import prompt_of, sample_text
from favor.data.sources import read_objects
from favor.data.types import Text
from favor.errors import DataError
from favor.eval.calibration import calibrate
from favor.output import Output
from favor.rewards.source import RewardConfig, identity, make_scorer, reads

# Responses handed to the scorer at once: enough to share prompts, little enough to see progress.
_CHUNK = 256


class ScoreConfig(BaseModel):
    """A recipe for `favor score`. `data` is preferences, SFT rows, or samples (prompt + responses).

    `out` gets the scores, `<out>.figures.json` the figures when the data compares responses.
    """

    model_config = STRICT
    out: str
    data: str
    split: str = "test"
    max_rows: int | None = Field(default=None, ge=1)
    reward: RewardConfig
    overwrite: bool = False


def score(
    config: ScoreConfig, progress: Callable[[str, int, int], None], recipe: Path | None = None
) -> dict[str, Any] | None:
    """Write the scores; returns accuracy, calibration curve and ECE, or None when nothing is compared.

    A file that the same data and reward made before stays as it is. Raises DataError for a row that cannot be
    used, ConfigError for an `out` that is not to be replaced (or is the `recipe`), and what the reward raises.
    """
    figures = Path(f"{config.out}.figures.json")
    claim = Output(Path(config.out), "out", config.overwrite, (figures,))
    read = (config.data, *reads(config.reward), recipe and str(recipe))
    with output.claimed(claim, read) as out:
        rows = _judgments(config)
        told = {"data": rows, "reward": identity(config.reward)}
        out = replace(out, settings=output.hashes(told))
        if (before := output.finished(out)) is not None:
            progress(f"{config.out}: made before with the same settings, kept (overwrite=true makes it again)", 1, 1)
            return before["figures"]
        return _score(config, rows, out, progress)


def _score(
    config: ScoreConfig, rows: list[Judgment], out: Output, progress: Callable[[str, int, int], None]
) -> dict[str, Any] | None:
    scorer = make_scorer(config.reward)
    if cut := sum(len(row.cut) for row in rows):
        progress(
            f"warning: {cut} responses stop before their end (ended) and are scored as if they had ended there", 1, 1
        )
    prompts = [row.prompt for row in rows for _ in row.responses]
    texts = [_words(response) for row in rows for response in row.responses]
    scores: list[float] = []
    for first in range(0, len(texts), _CHUNK):
        part = slice(first, first + _CHUNK)
        scores += scorer(prompts[part], texts[part])
        progress("responses", len(texts[part]), len(texts))
    lines: list[str] = []
    gaps: list[float] = []
    prompt_of: list[int] = []
    places: dict[str, int] = {}
    place = 0
    for row in rows:
        mine = scores[place : place + len(row.responses)]
        place += len(mine)
        lines.append(
            json.dumps({"prompt": row.prompt, "responses": list(row.responses), "scores": mine}, ensure_ascii=False)
        )
        pairs = [(o[i], o[j]) for o in row.orders for i in range(len(o)) for j in range(i + 1, len(o))]
        gaps += [mine[a] - mine[b] for a, b in pairs]
        # rows of one prompt are not independent
        prompt_of += [places.setdefault(json.dumps(row.prompt, sort_keys=True), len(places))] * len(pairs)
    found = {"calibration": calibrate(np.array(gaps), np.array(prompt_of)).as_json()} if gaps else None
    texts = {out.path: "\n".join(lines) + "\n"}
    if found:
        texts[out.also[0]] = json.dumps(found, indent=2) + "\n"
    output.write(out, texts, {"figures": found})
    return found


def _judgments(config: ScoreConfig) -> list[Judgment]:
    found: list[Judgment] = []
    for number, row in read_objects(config.data, config.split):
        try:
            found.append(_judgment(row))
            _refuse_unseen(found[-1])
        except RowError as error:
            raise DataError(f"{config.data}, row {number}: {error}; fix the row") from None
        if config.max_rows is not None and len(found) >= config.max_rows:
            break
    if not found:
        raise DataError(f"{config.data}: nothing to score: it holds no rows; name a file with rows")
    return found


def _judgment(row: dict[str, Any]) -> Judgment:
    if "responses" in row and not row.keys() & {"ranking", "scores", "votes", "choices"}:
        if not isinstance(row["responses"], list):
            raise RowError("samples are a prompt and a list of responses")
        return Judgment(prompt_of(row), tuple(sample_text(value, "responses") for value in row["responses"]), ())
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
    if unread:
        raise RowError(
            f"it has {', '.join(sorted(unread))}, which a reward on text does not see; leave the row out, or for a run's own "
            "margins use favor eval"
        )


def _words(response: Text) -> str:
    return response if isinstance(response, str) else "\n".join(str(m.get("content") or "") for m in response)
