"""A classifier of texts: TF-IDF and logistic regression, fitted when it is loaded.

In: texts with their labels. Out: P(positive) of any text. Next: source.py.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
        """P(positive) of each text, 0 to 1; an empty text gets the prior."""
        return [float(p) for p in self.pipeline.predict_proba(list(texts))[:, 1]]


def train_judge(path: Path, seed: int = 0) -> Judge:
    """Fit on JSON lines with text and label (or fresh); a fifth gives the accuracy (nan if too small), then all are used.

    Rows of one `film` stay together; where none is named each row is alone. Raises DataError naming the row, or what the
    labels lack.
    """
    texts: list[str] = []
    labels: list[bool] = []
    films: list[str] = []
    for number, row in read_objects(str(path), "train"):
        text, label = row.get("text"), row.get("label", row.get("fresh"))
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}, row {number}: text is {text!r:.80}; every row needs a text and its label")
        if not isinstance(label, bool) and label not in (0, 1):
            raise DataError(f"{path}, row {number}: label is {label!r:.80}; give true or false (or 1 or 0) as label")
        texts.append(text)
        labels.append(bool(label))
        films.append(str(row.get("film", number)))
    if not texts:
        raise DataError(f"{path}: it holds no rows; give rows with text and label")
    if min(Counter(labels).get(side, 0) for side in (True, False)) < _FEWEST:
        raise DataError(f"{path}: a classifier needs {_FEWEST} rows or more of either label; add rows")
    label, film = np.array(labels), np.unique(films, return_inverse=True)[1]
    held_out = np.random.default_rng(seed).random(film.max() + 1)[film] < 0.2
    accuracy = float("nan")
    if held_out.any() and len(set(label[~held_out].tolist())) == 2:
        fitted = _fit([t for t, h in zip(texts, held_out, strict=True) if not h], label[~held_out], path, seed)
        accuracy = float(fitted.score([t for t, h in zip(texts, held_out, strict=True) if h], label[held_out]))
    return Judge(_fit(texts, label, path, seed), accuracy)


def _fit(texts: list[str], label: np.ndarray, path: Path, seed: int) -> Pipeline:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    logistic = LogisticRegression(C=4.0, class_weight="balanced", max_iter=1000, random_state=seed)
    try:
        return make_pipeline(words, logistic).fit(texts, label)
    except ValueError as error:
        raise DataError(f"{path}: no classifier can be fitted ({error}); give more texts that share words") from None
