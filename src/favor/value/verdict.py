"""What to do with each pair: keep it, turn its label round, ask a person, or leave it out; and why, in words.

In: how likely each label is wrong, what the heads say. Out: Verdicts. Next: run.py.
"""

from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from favor.value.settings import ValueSettings

Array = NDArray[np.float64]
Verdict: TypeAlias = Literal["keep", "flip", "ask", "drop"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
# heads of ten that must be against a label before it is turned round without asking
_AGREED = 0.9


class Judged(NamedTuple):
    """A pair: P(its label is wrong), its margin by the label (mean and spread of the heads), share of heads that agree."""

    verdict: Verdict
    wrong: float
    margin: float
    spread: float
    agree: float

    @property
    def worth(self) -> float:
        """1 - 2 P(wrong): the factor by which its gradient points the right way on average; 0 is a coin."""
        return 1 - 2 * self.wrong

    def as_json(self) -> dict[str, object]:
        """All of it, by name."""
        return {"verdict": self.verdict, "reason": self.reason, "worth": self.worth, **self._asdict()}

    @property
    def reason(self) -> str:
        """Why, in words."""
        heads = f"{self.agree:.0%} of the cheap models agree with the label"
        said = {
            "keep": f"wrong with {self.wrong:.0%}" if self.wrong else "no labels are certain to be wrong",
            "flip": f"wrong with {self.wrong:.0%}: the other answer is the better one",
            "ask": f"wrong with {self.wrong:.0%}: a person's answer is worth most here",
            "drop": f"wrong with {self.wrong:.0%}, and not surely enough to turn it round",
        }
        return f"{said[self.verdict]}; {heads}"


def judge(wrong_P: Array, margin_MP: Array, settings: ValueSettings) -> list[Judged]:
    """A verdict on every pair.

    A label that is wrong with probability q is worth 1 - 2q as it is, 2q - 1 turned round, 0 left out; a person's answer adds
    2 min(q, 1 - q) to the better of the first two. So `asks` go where that is most, among pairs between keep and flip.
    """
    mean_P, spread_P, agree_P = margin_MP.mean(0), margin_MP.std(0), (margin_MP > 0).mean(0)
    flip_P = (wrong_P >= settings.flip) & (agree_P <= 1 - _AGREED)
    # as doubtful as a label that would be turned round is sure
    open_P = ~flip_P & (wrong_P > 1 - settings.flip)
    most = np.argsort(-np.minimum(wrong_P, 1 - wrong_P), kind="stable")
    asked = [place for place in most if open_P[place]][: settings.asks]
    verdict_P: list[Verdict] = ["flip" if flip else "keep" for flip in flip_P]
    for place in np.flatnonzero(open_P & (wrong_P >= 0.5)):
        verdict_P[place] = "drop"
    for place in asked:
        verdict_P[place] = "ask"
    numbers = (values.tolist() for values in (wrong_P, mean_P, spread_P, agree_P))
    return [Judged(*found) for found in zip(verdict_P, *numbers, strict=True)]
