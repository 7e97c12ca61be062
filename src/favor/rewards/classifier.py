"""A judge of film reviews: TF-IDF and logistic regression, trained on films that nothing else uses.

In: texts with their verdicts. Out: P(fresh) of any text. Next: source.py.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from favor.data.sources import read_objects
from favor.errors import DataError

# rows of either label below which a fit says nothing
_FEWEST = 2


@dataclass(frozen=True)
class Judge:
    """A fitted pipeline and its accuracy on films it was not fitted on."""

    pipeline: Pipeline
    accuracy: float

    def score(self, texts: Sequence[str]) -> list[float]:
        """P(fresh) of each text, 0 to 1; an empty text gets the prior."""
        return [float(p) for p in self.pipeline.predict_proba(list(texts))[:, 1]]


def train_judge(path: Path, seed: int = 0) -> Judge:
    """Fit on JSON lines with text and fresh or label; a fifth of the films gives the accuracy, then all are used.

    Where no film is named each row counts as one. Raises DataError naming the row, or what the labels lack.
    """
    rows = [(number, row) for number, row in read_objects(str(path), "train")]
    if not rows:
        raise DataError(f"{path}: it holds no rows; give rows with text and label")
    texts = [_text(row, f"{path}, row {number}") for number, row in rows]
    fresh = np.array([_label(row, f"{path}, row {number}") for number, row in rows])
    films = np.unique([str(row.get("film", number)) for number, row in rows], return_inverse=True)[1]
    if min(Counter(fresh.tolist()).get(side, 0) for side in (True, False)) < _FEWEST:
        raise DataError(f"{path}: a classifier needs {_FEWEST} rows or more of either label; add rows")
    held_out = np.random.default_rng(seed).random(films.max() + 1)[films] < 0.2
    return Judge(_fit(texts, fresh, path, seed), _accuracy(texts, fresh, held_out, path, seed))


def _accuracy(texts: list[str], fresh: np.ndarray, held_out: np.ndarray, path: Path, seed: int) -> float:
    """On the part held out; nan where it, or what is left, is too small to have both labels."""
    if not held_out.any() or len(set(fresh[~held_out].tolist())) < 2:
        return float("nan")
    fitted = _fit([t for t, h in zip(texts, held_out, strict=True) if not h], fresh[~held_out], path, seed)
    return float(fitted.score([t for t, h in zip(texts, held_out, strict=True) if h], fresh[held_out]))


def _fit(texts: list[str], fresh: np.ndarray, path: Path, seed: int) -> Pipeline:
    try:
        return _pipeline(seed).fit(texts, fresh)
    except ValueError as error:
        raise DataError(f"{path}: no classifier can be fitted ({error}); give more texts that share words") from None


def _text(row: dict[str, Any], where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: text is {text!r:.80}; every row needs a text and its label")
    return text


def _label(row: dict[str, Any], where: str) -> bool:
    label = row.get("fresh", row.get("label"))
    if isinstance(label, bool) or label in (0, 1):
        return bool(label)
    raise DataError(f"{where}: label is {label!r:.80}; give true or false (or 1 or 0) as label or fresh")


def _pipeline(seed: int) -> Pipeline:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    return make_pipeline(words, LogisticRegression(C=4.0, class_weight="balanced", max_iter=1000, random_state=seed))
