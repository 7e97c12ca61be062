"""What one row of each public preference format says; docs/formats.md shows a row of each.

In: a row as a dict. Out: a Judgment: the prompt, its responses and their orders, best first. Next: fields.py.
"""

from favor.data.formats.fields import Judgment, Kind, RowError, transcript
from favor.data.formats.table import FORMATS, Format, check_order, columns_of, order_assumed, recognise

__all__ = [
    "FORMATS",
    "Format",
    "Judgment",
    "Kind",
    "RowError",
    "check_order",
    "columns_of",
    "order_assumed",
    "recognise",
    "transcript",
]
