"""Section [value]: what is asked about the pairs of a file.

In: a recipe. Out: ValueConfig. Next: features.py.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator

from favor.config import STRICT, Seed
from favor.data.settings import DataConfig, kwargs_are_read
from favor.data.tokenize import TokensConfig
from favor.lint.settings import ELSEWHERE, passed_over
from favor.model.load import ModelConfig


class ValueSettings(BaseModel):
    """Section [value]; docs/value.md says what each figure means."""

    model_config = STRICT
    out: str | None = None
    """Write a line for every pair to this JSONL file."""
    page: str | None = None
    """Write what was found to this HTML page."""
    clean: str | None = None
    """Write the pairs that stay, with doubted labels turned round, to this JSONL file."""
    overwrite: bool = False
    """Also replace files that favor value did not write."""
    trusted: str | None = None
    """Pairs whose labels are right, of the same kind as those asked about: with them the share of wrong labels is measured."""
    policies: tuple[str, ...] = ()
    """Runs of favor train from model.path, such as one with several seeds: the implicit margin of each pair, and its spread."""
    models: int = Field(default=10, ge=2, le=1000)
    """Cheap models, each of a bootstrap sample of the prompts."""
    folds: int = Field(default=5, ge=2, le=100)
    """Parts of the prompts; a model is asked only about parts that it was not fitted to."""
    flip: float = Field(default=0.8, gt=0.5, lt=1)
    """Probability of a wrong label from which it is turned round."""
    asks: int = Field(default=20, ge=0)
    """Pairs that a person could look at: those where an answer is worth most."""
    gradients: bool = False
    """Also compare each pair's gradient on an adapter with that of the trusted pairs; takes a backward pass a pair."""
    max_tokens_per_pack: int = Field(default=4096, ge=1)
    """Tokens computed at once: lower it if memory runs out."""
    examples: int = Field(default=10, ge=0)
    """Pairs of each verdict that the page shows."""

    @field_validator("out", "page", "clean")
    @classmethod
    def _is_a_file(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).name:
            raise ValueError(f"{path} is a folder; name a file")
        return path

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "ValueSettings":
        if self.policies and self.out is None:
            raise ValueError("value.policies adds columns to value.out; name that file, or remove them")
        if self.gradients and self.trusted is None:
            raise ValueError("value.gradients compares with the pairs of value.trusted; name them, or remove it")
        if self.examples != type(self).model_fields["examples"].default and not self.page:
            raise ValueError("value.examples is read only with value.page; set it or remove value.examples")
        if self.overwrite and not (self.out or self.page or self.clean):
            raise ValueError(
                "value.overwrite is read only with value.out, value.page or value.clean; set one or remove it"
            )
        return self


class ValueConfig(BaseModel):
    """A recipe for `favor value`: [model], [data], [tokens] and [value]; a whole training recipe serves too."""

    model_config = STRICT
    _kwargs = model_validator(mode="after")(kwargs_are_read)
    seed: Seed = 0
    model: ModelConfig
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    value: ValueSettings = ValueSettings()

    @model_validator(mode="before")
    @classmethod
    def _pass_over(cls, tree: Any) -> Any:
        return passed_over(tree, cls, ELSEWHERE | {"lint", "reward"})
