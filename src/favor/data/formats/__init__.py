"""What one row of each public preference format says; docs/formats.md shows a row of each.

In: a row as a dict. Out: a Judgment: the prompt, its responses and their orders, best first. Next: common.py.
"""

from collections.abc import Callable
from typing import Any

from favor.data.formats.chat import alpaca, sharegpt
from favor.data.formats.common import Judgment, RowError, checked, transcript
from favor.data.formats.pairs import (
    helpsteer2_preference,
    helpsteer3,
    openai_preference,
    openai_tldr,
    pairs,
    sft,
    shp,
    ultrafeedback_binarized,
)
from favor.data.formats.scored import helpsteer, nectar, ranked, ultrafeedback
from favor.data.formats.shapes import check_order, columns_of, order_assumed, recognise
from favor.data.formats.thumbs import thumbs
from favor.data.formats.votes import verdict, votes

_READERS: dict[str, Callable[[dict[str, Any]], Judgment]] = {
    "pairs": pairs,
    "ranked": ranked,
    "sft": sft,
    "thumbs": thumbs,
    "votes": votes,
    "verdict": verdict,
    "ultrafeedback": ultrafeedback,
    "ultrafeedback_binarized": ultrafeedback_binarized,
    "shp": shp,
    "helpsteer": helpsteer,
    "helpsteer2_preference": helpsteer2_preference,
    "helpsteer3": helpsteer3,
    "nectar": nectar,
    "openai_tldr": openai_tldr,
    "openai_preference": openai_preference,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
}
FORMATS = {name: checked(reader) for name, reader in _READERS.items()}

__all__ = [
    "FORMATS",
    "Judgment",
    "RowError",
    "check_order",
    "columns_of",
    "order_assumed",
    "recognise",
    "transcript",
]
