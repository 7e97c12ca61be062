"""The pictures of a batch: each is seen once, and every place in the prompts knows which of its features belongs there.

In: token trees with pictures. Out: prompts in which parts of different pictures differ; where which feature stands in a batch.
Next: batches.py.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from favor.data.types import Picture, TokenTree


def told_apart(trees: Sequence[TokenTree]) -> tuple[list[tuple[int, ...]], tuple[Picture, ...]]:
    """The prompts' ids, with ~f where feature f of all their pictures belongs; and the pictures, each once, in f's order.

    The token that stands for a part of a picture is the same for all pictures, and what is equal is computed once.
    """
    pictures: dict[str, Picture] = {}
    for tree in trees:
        for picture in tree.pictures:
            pictures.setdefault(picture.digest, picture)
    begins = dict(zip(pictures, accumulate((p.tokens for p in pictures.values()), initial=0), strict=False))
    prompts: list[tuple[int, ...]] = []
    for tree in trees:
        features = (begins[picture.digest] + i for picture in tree.pictures for i in range(picture.tokens))
        prompts.append(tuple(~next(features) if i == tree.picture_id else i for i in tree.prompt_ids))
    return prompts, tuple(pictures.values())


def seen(ids_BT: np.ndarray, trees: Sequence[TokenTree]) -> dict[str, Any]:
    """Where features belong in B*T, int64 [J], and which; the ids there become the model's own, in place."""
    flat = ids_BT.reshape(-1)
    places = np.flatnonzero(flat < 0)
    features = ~flat[places]
    # one model reads all of them, so they have one id
    flat[places] = next(tree.picture_id for tree in trees if tree.pictures)
    return {"seen_J": torch.from_numpy(places), "feature_J": torch.from_numpy(features)}
