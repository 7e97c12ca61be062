"""Where a plot's labels stand so that they cover neither each other nor the points.

In: a point, the width of a text, boxes that are taken. Out: a box. Next: curves.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

# mean width of a letter of the labels, pixels, and the height of a line
_LETTER, _LINE = 6.7, 13.0
# right of the point, left, above, below, and further off
_WAYS = ((1, 0), (0, -1), (0, 1), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1))
_FAR = (1.0, 2.0, 3.0)


class Box(NamedTuple):
    """A rectangle, pixels: its upper left corner and its size."""

    x: float
    y: float
    width: float
    height: float

    def covered(self, other: "Box") -> float:
        """The area that both cover."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        down = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(across, 0.0) * max(down, 0.0)


def width_of(text: str) -> float:
    """About how wide a label is, pixels."""
    return _LETTER * len(text)


def free_place(spot: tuple[float, float], width: float, taken: Sequence[Box], within: Box) -> Box:
    """The place beside a point that covers least of what is taken, the nearest of equals; never beyond `within`."""
    places = [_beside(spot, width, way, far, within) for far in _FAR for way in _WAYS]
    return min(places, key=lambda box: sum(box.covered(other) for other in taken))


def _beside(spot: tuple[float, float], width: float, way: tuple[int, int], far: float, within: Box) -> Box:
    across, down = way
    left = spot[0] + across * 7 * far - (0 if across > 0 else width if across < 0 else width / 2)
    top = spot[1] + down * 14 * far - _LINE / 2
    left = max(within.x, min(left, within.x + within.width - width))
    top = max(within.y, min(top, within.y + within.height - _LINE))
    return Box(left, top, width, _LINE)
