"""Section [data]: which files, in what format, and what becomes of their judgments.

In: a recipe. Out: DataConfig. Next: read.py.
"""

import difflib
from typing import Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from favor.config import STRICT, Seed
from favor.data.formats import FORMATS, columns_of
from favor.data.pairing import Pairing, Rules, Votes

Value = str | bool | int | float


class VerdictValues(BaseModel):
    """Which values of the verdict's column mean what."""

    model_config = STRICT
    first: tuple[Value, ...] = Field(min_length=1)
    second: tuple[Value, ...] = Field(min_length=1)
    tie: tuple[Value, ...] = ()
    both_bad: tuple[Value, ...] = ()

    @model_validator(mode="after")
    def _apart(self) -> Self:
        # 1 and true are equal in Python and are not the same value here
        every = [repr(value) for values in self.model_dump().values() for value in values]
        twice = next((value for value in every if every.count(value) > 1), None)
        if twice is not None:
            raise ValueError(
                f"data.verdict.values: {twice} stands there twice, so it would mean two things; name it once"
            )
        return self


class VerdictConfig(BaseModel):
    """A table [data.verdict]: two answers and which is better. Names are the file's (a.b for b inside a).

    column: where the verdict stands: one column, whose value may be a list (one an annotator), or a column an annotator,
    of which some may be empty. values: what its values mean.
    """

    model_config = STRICT
    first: str
    second: str
    column: str | tuple[str, ...]
    values: VerdictValues

    @property
    def columns(self) -> tuple[str, ...]:
        """The verdict's columns."""
        return (self.column,) if isinstance(self.column, str) else self.column

    @model_validator(mode="after")
    def _different(self) -> Self:
        names = (self.first, self.second, *self.columns)
        if not self.columns or len(set(names)) < len(names):
            raise ValueError(
                f"data.verdict names {', '.join(names)}: first, second and column must be different columns"
            )
        return self


class SourceConfig(BaseModel):
    """A table [[data.sources]]: one of several files to mix. What it does not say, section [data] says.

    weight multiplies the weight of every comparison, tie and thumb of this source.
    """

    model_config = STRICT
    path: str
    weight: float = Field(default=1.0, gt=0)
    format: str | None = None
    split: str | None = None
    columns: dict[str, str] | None = None
    verdict: VerdictConfig | None = None
    max_rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.format is not None:
            known_format(self.format)
        _check_columns(self.columns or {}, self.format or "auto")
        _check_verdict(self.verdict, self.columns or {}, self.format or "auto")
        return self


class DataConfig(BaseModel):
    """Section [data]. A source is a .jsonl, .jsonl.gz, .json or .parquet file, a glob or folder, a saved data set, a hub id.

    train or sources: what to train on. eval: held-out data; or eval_share of the prompts are held out, chosen by a hash
    of the prompt and eval_seed. columns: our name -> the file's name of a column (a.b for b inside a). verdict: columns of
    two answers and of what says which is better, with the meaning of its values.
    pairing: what scores and rankings become: a ranking of all, all pairs, best against worst, best against each other
    one; auto keeps rankings and makes pairs where members are equal or closer than min_gap. min_gap: pairs whose scores
    differ by less are left out. streaming: read a hub id row by row instead of fetching it whole. cache: keep the token ids
    in a file under ~/.cache/favor that is memory-mapped and reused; auto does so for sources over 50 MB and streamed
    ones. votes on two responses: a soft label, a weight (votes in excess), or just the majority.
    """

    model_config = STRICT
    train: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    eval: str | None = None
    eval_share: float = Field(default=0.0, ge=0, le=0.5)
    eval_seed: Seed = 0
    format: str = "auto"
    columns: dict[str, str] = {}
    verdict: VerdictConfig | None = None
    pairing: Pairing = "auto"
    min_gap: float = Field(default=0.0, ge=0)
    votes: Votes = "soft"
    split: str = "train"
    eval_split: str = "test"
    max_rows: int | None = Field(default=None, ge=1)
    bad_rows: Literal["error", "drop"] = "error"
    streaming: bool = False
    cache: Literal["auto"] | bool = "auto"

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_format(name)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if (self.train is None) == (not self.sources):
            raise ValueError("give either data.train=FILE or tables [[data.sources]], one of the two")
        if self.eval is not None and self.eval_share:
            raise ValueError("data.eval names held-out data already, so data.eval_share would be ignored; drop one")
        if self.eval_seed and not self.eval_share:
            raise ValueError("data.eval_seed needs data.eval_share: it says which prompts are held out")
        _check_columns(self.columns, self.format)
        _check_verdict(self.verdict, self.columns, self.format)
        self._check_used()
        return self

    def _check_used(self) -> None:
        """Refuse settings that no source's format could make use of."""
        held_out = () if self.eval is None else (SourceConfig(path=self.eval),)
        names = {self.format_of(source) for source in (*self.parts, *held_out)}
        if "auto" in names:
            return
        shown = ", ".join(sorted(names))
        known = [FORMATS[name] for name in names]
        if self.pairing != "auto" and not any("order" in each.says for each in known):
            raise ValueError(f"data.pairing would be ignored: format {shown} compares nothing")
        if self.min_gap and not any("scores" in each.says for each in known):
            raise ValueError(f"data.min_gap would be ignored: format {shown} has no scores")
        if self.votes != "soft" and not any("votes" in each.says for each in known):
            raise ValueError(f"data.votes would be ignored: format {shown} has no votes")

    def verdict_of(self, source: SourceConfig) -> VerdictConfig | None:
        """The verdict's table of a source: its own, or the section's where the source names no format of its own."""
        if source.verdict is not None or source.format not in (None, "auto", "verdict"):
            return source.verdict
        return self.verdict

    def format_of(self, source: SourceConfig) -> str:
        """The format of a source, or auto."""
        return "verdict" if self.verdict_of(source) else source.format or self.format

    @property
    def parts(self) -> tuple[SourceConfig, ...]:
        """The sources of the training part; `train` is one of weight 1."""
        return self.sources if self.train is None else (SourceConfig(path=self.train),)

    @property
    def training(self) -> str:
        """The training part's sources, for messages."""
        return ", ".join(source.path for source in self.parts)

    @property
    def rules(self) -> Rules:
        """How judgments become comparisons."""
        return Rules(self.pairing, self.min_gap, self.votes)


def known_format(name: str) -> str:
    """The name of a format, or auto. Raises ValueError with the nearest name."""
    if name != "auto" and name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ValueError(f"format '{name}' is unknown; {hint}known: auto, {', '.join(FORMATS)}")
    return name


def _check_columns(columns: dict[str, str], name: str) -> None:
    """Every column that is mapped must be one that the format reads."""
    known = columns_of(name)
    for column in columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ValueError(
                f"columns maps '{column}', which format {name} does not read; {hint}it reads: {_list(known)}"
            )


def _check_verdict(verdict: VerdictConfig | None, columns: dict[str, str], name: str) -> None:
    """A verdict's table makes the format, so nothing else may name another one or its columns."""
    if verdict is None:
        return
    if name not in ("auto", "verdict"):
        raise ValueError(
            f"verdict says that rows hold two answers and a verdict, and format says {name}; drop one of the two"
        )
    both = sorted({"first", "second", "verdict"} & columns.keys())
    if both:
        raise ValueError(f"columns maps {', '.join(both)}, which verdict names already; name it in one place")


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
