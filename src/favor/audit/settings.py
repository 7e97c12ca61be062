"""The recipe of `favor audit`: which pairs, which judge, what people said, what is too much.

In: a recipe. Out: AuditConfig. Next: pairs.py.
"""

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT, Run, Seed
from favor.data.settings import Columns
from favor.generate.samples import Split
from favor.winrate.judges import JudgeConfig, ModelJudge, RewardJudge

# what a figure needs to be measured, by its name
_NEEDS = {
    "flip_rate": "repeats above 0",
    "length_bias": "human=FILE",
    "self_bias": "human=FILE and own=SOURCE",
    "agreement": "human=FILE",
}


class FailOn(BaseModel):
    """Section [fail_on]: figures beyond which the exit code is 1, also where one cannot be measured; without any it is 0."""

    model_config = STRICT
    flip_rate: float | None = Field(default=None, ge=0, le=1)
    """The largest share of repeated questions with another verdict."""
    inconsistency: float | None = Field(default=None, ge=0, le=1)
    """The largest share of pairs whose two orders disagree."""
    position_bias: float | None = Field(default=None, ge=0, le=0.5)
    """The largest position bias, of either sign."""
    length_bias: float | None = Field(default=None, ge=0)
    """The largest length bias, of either sign, in log-odds."""
    self_bias: float | None = Field(default=None, ge=0)
    """The largest self-preference, of either sign, in log-odds."""
    unusable: float | None = Field(default=None, ge=0, le=1)
    """The largest share of verdicts that could not be read."""
    agreement: float | None = Field(default=None, ge=0, le=1)
    """The least agreement with people."""


class AuditConfig(BaseModel):
    """A recipe for `favor audit`."""

    model_config = STRICT
    run: Run
    data: str
    """Preferences of any format, or rows of prompt, first and second: the pairs that the judge compares."""
    human: str | None = None
    """Preferences that people gave, found among the pairs by their texts; the file of data again where its labels are people's."""
    split: Split = "train"
    columns: Columns = {}
    judge: JudgeConfig
    pairs: int = Field(default=200, ge=2)
    """Pairs to judge in both orders, drawn by the seed; those with a human label come first."""
    repeats: int = Field(default=2, ge=0, le=20)
    """How often the same question is asked again."""
    repeat_pairs: int = Field(default=40, ge=2)
    """Pairs that are asked again, drawn by the seed."""
    source: str | tuple[str, ...] = ()
    """The column that says what each answer comes from (a list), or two columns, one an answer."""
    own: str | None = None
    """The source of the judge's own answers: is it partial to them?"""
    side: str | None = None
    """The source whose win rate is estimated; without it the first answer's, where rows place the two themselves."""
    seed: Seed = 0
    fail_on: FailOn = FailOn()

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "AuditConfig":
        if bool(self.source) != (self.own is not None or self.side is not None):
            raise ValueError("source names columns in which own or side is looked for: give source and one of them")
        if not isinstance(self.source, str) and len(self.source) not in (0, 2):
            raise ValueError(f"source names {len(self.source)} columns; give one that holds a list, or two")
        if self.repeats == 0 and "repeat_pairs" in self.model_fields_set:
            raise ValueError("repeat_pairs is not read: repeats is 0 and nothing is asked again; remove one of them")
        measured = {
            "flip_rate": self.repeats > 0,
            "length_bias": self.human is not None,
            "self_bias": self.human is not None and self.own is not None,
            "agreement": self.human is not None,
        }
        for name in self.fail_on.model_dump(exclude_none=True):
            if not measured.get(name, True):
                raise ValueError(f"fail_on.{name} needs {_NEEDS[name]}, without which it is not measured")
        return self

    @property
    def dtypes(self) -> list[str]:
        """What a model that is loaded computes in."""
        if isinstance(self.judge, ModelJudge):
            return [self.judge.model.dtype]
        return ["float32"] * isinstance(self.judge, RewardJudge)
