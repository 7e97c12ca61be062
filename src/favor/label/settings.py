"""The settings of `favor label`.

In: a recipe. Out: LabelConfig. Next: store.py.
"""

from typing import Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from favor.config import STRICT, Overwrite, Seed
from favor.data.formats import columns_of
from favor.data.settings import known_format

# settings that are read beside `out`, and those that say how `data` is read
_OF_OUT = {"db", "out", "labels", "overwrite"}
_OF_DATA = {"format", "columns", "max_rows", "pairs_per_prompt"}


class LabelConfig(BaseModel):
    """A recipe for `favor label`: with `out` it writes what people said, without it opens the page."""

    model_config = STRICT
    db: str = "labels.sqlite"
    """The file that keeps pairs and votes; made if it is not there."""
    data: str | None = None
    """What to compare: samples, answers to one prompt, or preferences, whose verdicts are not shown."""
    gold: str | None = None
    """Preferences whose answer is known; they are mixed in, and tell how often each person is right."""
    gold_share: float = Field(default=0.1, ge=0, le=1)
    """What share of the pairs shown is gold, while there are any left."""
    format: str = "auto"
    """The format of the rows of `data` (docs/formats.md); auto recognises it by the columns."""
    columns: dict[str, str] = {}
    """Our name of a column of `data` -> the file's (a.b for b inside a)."""
    split: str = "train"
    """The split, where a source has several."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only the first N rows of `data`."""
    pairs_per_prompt: int | None = Field(default=None, ge=1)
    """Of the pairs among a prompt's answers take at most N, by chance; absent: all."""
    votes_per_pair: int = Field(default=3, ge=1)
    """A pair with so many votes is not shown any more."""
    seed: Seed = 0
    """Decides which pairs are taken, which are gold and which answer stands left."""
    port: int = Field(default=0, ge=0, le=65535)
    """The port on 127.0.0.1; 0 takes a free one."""
    out: str | None = None
    """Write the labels here, as rows that `favor train` reads, and end."""
    labels: Literal["votes", "posterior"] = "votes"
    """What a row of `out` holds: every vote, or how likely each answer is the better one, given how able people are."""
    overwrite: Overwrite = False

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_format(name)

    @model_validator(mode="after")
    def _all_read(self) -> Self:
        if self.out is not None:
            unread, why = self.model_fields_set - _OF_OUT, "out=FILE writes the labels and ends"
        elif self.data is None:
            unread, why = self.model_fields_set & _OF_DATA, "there is no data=FILE"
        else:
            unread, why = set[str](), ""
        if unread:
            raise ValueError(f"{', '.join(sorted(unread))} would be ignored: {why}; drop one or the other")
        if self.overwrite and self.out is None:
            raise ValueError("overwrite would be ignored: it belongs to out=FILE")
        if odd := sorted(self.columns.keys() - columns_of(self.format)):
            raise ValueError(
                f"columns names {', '.join(odd)}, which no format reads; favor's names are in docs/formats.md"
            )
        return self
