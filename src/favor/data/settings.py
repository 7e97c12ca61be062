"""Section [data]: which files, in what format, and what becomes of their judgments.

In: a recipe. Out: DataConfig. Next: read.py.
"""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from favor.config import STRICT, Seed
from favor.data.formats import FORMATS, columns_of
from favor.data.formats.columns import VerdictConfig
from favor.data.grow import Rules

# option of data.compare -> what rows must say for it to be read, and what is said of formats without that
_RULE_NEEDS = {
    "pairing": ("order", "compares nothing"),
    "min_gap": ("scores", "has no scores"),
    "votes": ("votes", "has no votes"),
}


class SourceConfig(BaseModel):
    """A table [[data.sources]]: one of several files to mix. What it leaves out is taken from section [data]."""

    model_config = STRICT
    path: str
    """Where its rows come from, as data.train."""
    weight: float = Field(default=1.0, gt=0)
    """Multiplies the weight of every comparison, tie and thumb of this source."""
    format: str | None = None
    """As data.format, of this source."""
    split: str | None = None
    """As data.split, of this source."""
    columns: dict[str, str] | None = None
    """As data.columns, of this source."""
    verdict: VerdictConfig | None = None
    """As data.verdict, of this source."""
    max_rows: int | None = Field(default=None, ge=1)
    """As data.max_rows, of this source."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.format is not None:
            known_format(self.format)
        _check_names(self.columns or {}, self.verdict, self.format or "auto")
        return self


class HoldOutConfig(BaseModel):
    """Section [data.hold_out]: held-out prompts taken out of the training data, chosen by a hash of the prompt."""

    model_config = STRICT
    share: float = Field(gt=0, le=0.5)
    """What share of the prompts is held out."""
    seed: Seed = 0
    """Another seed holds out other prompts."""


class DataConfig(BaseModel):
    """Section [data]. A source is a .jsonl, .jsonl.gz, .json, .csv, .tsv or .parquet file, a glob, a folder, a hub id."""

    model_config = STRICT
    train: str | None = None
    """What to train on: a source."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources to mix, in place of data.train."""
    eval: str | None = None
    """Held-out data: a source."""
    hold_out: HoldOutConfig | None = None
    format: str = "auto"
    """The format of the rows (docs/formats.md); auto recognises it by the columns."""
    columns: dict[str, str] = {}
    """Our name of a column -> the file's (a.b for b inside a)."""
    verdict: VerdictConfig | None = None
    """Two answers, the column that says which is better, and what its values mean."""
    compare: Rules | None = None
    split: str = "train"
    """The split to train on, of a source that has several."""
    eval_split: str = "test"
    """The split of data.eval."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only the first N rows."""
    bad_rows: Literal["error", "drop"] = "error"
    """Whether a row that cannot be read ends the run, or is dropped and counted."""
    streaming: bool = False
    """Read a hub id row by row instead of fetching it whole."""
    cache: Literal["auto"] | bool = "auto"
    """Keep token ids in a memory-mapped file under ~/.cache/favor; auto: for sources over 50 MB and streamed ones."""

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_format(name)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if (self.train is None) == (not self.sources):
            raise ValueError("give either data.train=FILE or tables [[data.sources]], one of the two")
        if self.eval is not None and self.hold_out is not None:
            raise ValueError("data.eval names held-out data already, so [data.hold_out] would be ignored; drop one")
        if self.eval is None and self.eval_split != "test":
            raise ValueError("data.eval_split is the split of data.eval, which is not set; name that or remove it")
        _check_names(self.columns, self.verdict, self.format)
        self._check_used()
        return self

    def _check_used(self) -> None:
        """Refuse settings that no source could make use of."""
        given = self.model_dump(exclude_defaults=True)
        # data.eval reads all of them but split
        for option in given.keys() & (
            {"split"} if self.eval else {"split", "format", "columns", "verdict", "max_rows"}
        ):
            if self.sources and all(self._has_own(source, option) for source in self.sources):
                raise ValueError(f"data.{option} would be ignored: each of data.sources has its own; remove it")
        held_out = () if self.eval is None else (SourceConfig(path=self.eval),)
        names = {self.format_of(source) for source in (*self.parts, *held_out)}
        if "auto" in names:
            return
        for option in self.rules.model_dump(exclude_defaults=True):
            says, lacks = _RULE_NEEDS[option]
            if not any(says in FORMATS[name].says for name in names):
                shown = ", ".join(sorted(names))
                raise ValueError(f"data.compare.{option} would be ignored: format {shown} {lacks}")

    def _has_own(self, source: SourceConfig, option: str) -> bool:
        return self.verdict_of(source) is not self.verdict if option == "verdict" else vars(source)[option] is not None

    def columns_of(self, source: SourceConfig) -> dict[str, str]:
        """The columns of a source that are mapped: its own mapping, or the section's."""
        return self.columns if source.columns is None else source.columns

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
        return self.compare or Rules()


def _of_any_format(columns: dict[str, str]) -> dict[str, str]:
    _check_names(columns, None, "auto")
    return columns


# of commands that read one file, beside the key that names it
Columns = Annotated[
    dict[str, str],
    Field(description="Our name of a column of that file -> the file's (a.b for b inside a)."),
    AfterValidator(_of_any_format),
]


def known_format(name: str) -> str:
    """The name of a format, or auto. Raises ValueError with the nearest name."""
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"format '{name}' is unknown; {_nearest(name, FORMATS)}known: auto, {', '.join(FORMATS)}")
    return name


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'? " if near else ""


def _check_names(columns: dict[str, str], verdict: VerdictConfig | None, name: str) -> None:
    """Every column that is mapped must be one that the format reads; a verdict's table makes the format and names its columns."""
    known = columns_of(name)
    for column in columns:
        if column not in known:
            raise ValueError(
                f"columns maps '{column}', which format {name} does not read; {_nearest(column, known)}it reads: "
                + ", ".join(sorted(known))
            )
    if verdict is None:
        return
    if name not in ("auto", "verdict"):
        raise ValueError(
            f"verdict says that rows hold two answers and a verdict, and format says {name}; drop one of the two"
        )
    both = sorted({"first", "second", "verdict"} & columns.keys())
    if both:
        raise ValueError(f"columns maps {', '.join(both)}, which verdict names already; name it in one place")


def kwargs_are_read(recipe: Any) -> Any:
    """The recipe as it is. Raises ValueError for variables of a chat template where none is used."""
    if recipe.tokens.template == "plain" and recipe.model and recipe.model.template_kwargs:
        raise ValueError(
            "model.template_kwargs is for a chat template, and tokens.template=plain uses none; leave one out"
        )
    return recipe
