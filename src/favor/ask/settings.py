"""Section [ask] and what it stands on.

In: a recipe. Out: AskConfig. Next: choose.py.
"""

from typing import Any

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT, Overwrite, Seed
from favor.data.settings import DataConfig, kwargs_are_read
from favor.data.tokenize import TokensConfig
from favor.lint.settings import ELSEWHERE, passed_over
from favor.model.load import ModelConfig


class AskConfig(BaseModel):
    """A recipe for `favor ask`; sections of a training recipe that it does not read are passed over."""

    model_config = STRICT
    _kwargs = model_validator(mode="after")(kwargs_are_read)
    seed: Seed = 0
    model: ModelConfig
    pool: str
    """What could be labelled: samples, answers to one prompt, or preferences, whose verdicts are not looked at."""
    out: str
    """Write the pairs to label here, as JSON lines that favor label reads."""
    overwrite: Overwrite = False
    history: str = "asked.jsonl"
    """What was asked so far and what was foretold of it; the next rounds add to it."""
    data: DataConfig | None = None
    """The labels so far; absent: none, and chance alone chooses."""
    tokens: TokensConfig = TokensConfig()
    count: int = Field(default=20, ge=1)
    """Pairs to ask about."""
    by_chance: float = Field(default=0.2, ge=0, le=1)
    """The share of them that chance draws from the whole pool: only these tell without bias how good the model is."""
    enough: float | None = Field(default=None, gt=0.5, lt=1)
    """Say that it is enough once the accuracy before labelling is surely as high."""
    gain: float = Field(default=0.05, gt=0, lt=1)
    """Say that it is enough once the second half of the labels surely gained less accuracy than this."""
    models: int = Field(default=10, ge=2, le=1000)
    """Cheap models that are asked, each of a bootstrap sample of the labelled prompts."""
    max_tokens_per_pack: int = Field(default=4096, ge=1)
    """Tokens computed at once: lower it if memory runs out."""

    @model_validator(mode="before")
    @classmethod
    def _pass_over(cls, tree: Any) -> Any:
        return passed_over(tree, cls, ELSEWHERE | {"lint", "reward", "value"})

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "AskConfig":
        # by value: a resolved recipe names every key
        for name in ("enough", "gain"):
            if self.by_chance == 0 and vars(self)[name] != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is measured on pairs drawn by chance, and by_chance=0 draws none; change one of the two"
                )
        if self.data is not None and (self.data.eval is not None or self.data.hold_out is not None):
            raise ValueError("favor ask reads labels only; remove data.eval and data.hold_out")
        return self
