"""A judge of film reviews: TF-IDF and logistic regression, trained on films that nothing else uses.

In: quotes with their verdicts. Out: P(fresh) of any text. Next: source.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline


@dataclass(frozen=True)
class Judge:
    """A fitted pipeline and its accuracy on films it was not fitted on."""

    pipeline: Pipeline
    accuracy: float

    def score(self, texts: Sequence[str]) -> list[float]:
        """P(fresh) of each text, 0 to 1; an empty text gets the prior."""
        return [float(p) for p in self.pipeline.predict_proba(list(texts))[:, 1]]


def train_judge(path: Path, seed: int = 0) -> Judge:
    """Fit on classifier.jsonl (film, text, fresh); a fifth of its films measures the accuracy, then all are used."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    texts = [row["text"] for row in rows]
    fresh = np.array([row["fresh"] for row in rows])
    films = np.unique([row["film"] for row in rows], return_inverse=True)[1]
    held_out = np.random.default_rng(seed).random(films.max() + 1)[films] < 0.2
    fitted = _pipeline(seed).fit([t for t, h in zip(texts, held_out, strict=True) if not h], fresh[~held_out])
    accuracy = fitted.score([t for t, h in zip(texts, held_out, strict=True) if h], fresh[held_out])
    return Judge(_pipeline(seed).fit(texts, fresh), float(accuracy))


def _pipeline(seed: int) -> Pipeline:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    return make_pipeline(words, LogisticRegression(C=4.0, class_weight="balanced", max_iter=1000, random_state=seed))
