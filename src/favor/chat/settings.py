"""The settings of `favor chat`.

In: a recipe. Out: ChatConfig. Next: talk.py.
"""

from pydantic import BaseModel, Field, field_validator

from favor.config import STRICT, Seed
from favor.generate.engines import Decoding


class ChatConfig(BaseModel):
    """A recipe for `favor chat`. What is asked with is shown on the page and can be changed there."""

    model_config = STRICT
    run: str
    """The run folder: its model answers, and beside it the model that it started from."""
    reference: str | None = None
    """Another model to compare with than the one the run started from."""
    db: str = "labels.sqlite"
    """The file that keeps the votes, as `favor label` does; made if it is not there."""
    name: str = "me"
    """Whose votes these are."""
    sample: Decoding = Decoding(max_new_tokens=128, temperature=0.7)
    seed: Seed = 0
    blind: bool = False
    """Whether it is hidden which answer is which until there is a vote; chance then decides which stands first."""
    port: int = Field(default=0, ge=0, le=65535)
    """The port on 127.0.0.1; 0 takes a free one."""

    @field_validator("name")
    @classmethod
    def _can_be_shown(cls, name: str) -> str:
        said = " ".join(name.split())
        if not said or len(said) > 60 or not said.isprintable():
            raise ValueError("give a name of 1 to 60 letters")
        return said
