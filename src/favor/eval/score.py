"""`favor score`: any reward on a file of responses; on preferences also its accuracy and calibration.

In: ScoreConfig. Out: JSON lines {"prompt", "responses", "scores"}, and figures. Next: calibration.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from favor.config import STRICT
from favor.data.formats import FORMATS, Judgment, RowError, recognise
from favor.data.sources import read_objects
from favor.data.types import Text
from favor.errors import DataError
from favor.eval.calibration import calibrate
from favor.run import write_json, write_text
from favor.scoring.source import RewardConfig, make_scorer

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


def score(config: ScoreConfig, progress: Callable[[str, int, int], None]) -> dict[str, Any] | None:
    """Write the scores; returns accuracy, calibration curve and ECE, or None when nothing is compared.

    Raises DataError for a row that cannot be used, and what the reward raises.
    """
    rows = _judgments(config)
    scorer = make_scorer(config.reward)
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
    write_text(Path(config.out), "\n".join(lines) + "\n")
    if not gaps:
        return None
    found = {"calibration": calibrate(np.array(gaps), np.array(prompt_of)).as_json()}
    write_json(Path(f"{config.out}.figures.json"), found)
    return found


def _judgments(config: ScoreConfig) -> list[Judgment]:
    found: list[Judgment] = []
    for number, row in read_objects(config.data, config.split):
        try:
            found.append(_judgment(row))
        except RowError as error:
            raise DataError(f"{config.data}, row {number}: {error}; mend the row") from None
        if config.max_rows is not None and len(found) >= config.max_rows:
            break
    if not found:
        raise DataError(f"{config.data}: nothing to score: it holds no rows")
    return found


def _judgment(row: dict[str, Any]) -> Judgment:
    if "responses" in row and not row.keys() & {"ranking", "scores", "votes", "choices"}:
        prompt, responses = row.get("prompt"), row["responses"]
        if not isinstance(prompt, str | list) or not isinstance(responses, list):
            raise RowError("samples are a prompt and a list of responses")
        return Judgment(prompt if isinstance(prompt, str) else tuple(prompt), tuple(responses), ())
    return FORMATS[recognise(row)](row)


def _words(response: Text) -> str:
    return response if isinstance(response, str) else "\n".join(str(m.get("content") or "") for m in response)
