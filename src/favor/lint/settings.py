"""Section [lint], and what a check sees and says.

In: a recipe. Out: LintConfig, Row, Finding. Next: rows.py.
"""

import difflib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from favor.config import STRICT
from favor.data.formats import Judgment
from favor.data.settings import DataConfig
from favor.data.tokenize import TokensConfig
from favor.data.types import Text
from favor.model.load import ModelConfig
from favor.rewards.source import RewardConfig

Severity = Literal["error", "warning", "note"]
# what a training recipe holds besides, and lint does not look at
ELSEWHERE = {"run", "seed", "resume", "loss", "optim", "reference", "train", "watch", "ppo", "sample"}
ORDER: tuple[Severity, ...] = ("error", "warning", "note")


class LintSettings(BaseModel):
    """Section [lint]; docs/lint.md gives every check with its threshold.

    out, page, fix: the findings as JSON and as an HTML page; a cleaned copy of the training rows (JSONL). They replace what
    favor lint wrote there before; overwrite: any other file too. fail_on: the
    least severe finding that makes the exit code 1. near: Jaccard similarity of word triples from which texts count as
    near-duplicates (0: not looked for). noise: how many standard deviations below its
    median a reward difference must lie to doubt its label. doubt: ask [model] about the labels, by the mean log-prob of a
    token, or by its log-ratio to `reference`, a model folder.
    """

    model_config = STRICT
    out: str | None = None
    page: str | None = None
    fix: str | None = None
    overwrite: bool = False
    fail_on: Literal["error", "warning", "never"] = "error"
    near: float = Field(default=0.8, ge=0, le=1)
    language: bool = True
    length_share: float = Field(default=0.6, ge=0.5, le=1)
    cut_share: float = Field(default=0.05, ge=0, le=1)
    opening_share: float = Field(default=0.5, gt=0, le=1)
    noise: float = Field(default=3.0, gt=0)
    doubt: bool = False
    reference: str | None = None
    examples: int = Field(default=5, ge=0)

    @field_validator("out", "page", "fix")
    @classmethod
    def _is_a_file(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).name:
            raise ValueError(f"{path} is a folder; name a file")
        return path

    @model_validator(mode="after")
    def _reference_is_read(self) -> "LintSettings":
        if self.reference is not None and not self.doubt:
            raise ValueError("lint.reference is read only with lint.doubt=true; set that or remove it")
        return self


class LintConfig(BaseModel):
    """A recipe for `favor lint`: [data] and [lint]; [model] tries its tokenizer and template, [reward] doubts labels.

    A whole training recipe serves too; its other sections are not looked at. What no such recipe has is refused.
    """

    model_config = STRICT | ConfigDict(extra="ignore")
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    lint: LintSettings = LintSettings()
    model: ModelConfig | None = None
    reward: RewardConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_other_keys(cls, tree: Any) -> Any:
        known = [*cls.model_fields, *ELSEWHERE]
        for key in tree if isinstance(tree, dict) else ():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key '{key}'; {hint}")
        return tree


class Row(NamedTuple):
    """One row: as the file has it, what it says, or why it says nothing."""

    part: str
    source: str
    number: int
    raw: dict[str, Any]
    judgment: Judgment | None
    refusal: str | None

    @property
    def where(self) -> tuple[str, int]:
        """(source, row number)."""
        return self.source, self.number


class Finding(NamedTuple):
    """One kind of fault and where it is: rows are (source, row number); examples show the first of them."""

    severity: Severity
    name: str
    message: str
    rows: tuple[tuple[str, int], ...] = ()
    examples: tuple[str, ...] = ()


def words_of(text: Text) -> str:
    """A prompt or response as plain text."""
    return text if isinstance(text, str) else "\n".join(str(m.get("content") or "") for m in text)


def shown(text: str, limit: int = 160) -> str:
    """One line of a text, for a message."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
