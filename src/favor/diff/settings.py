"""The recipe of `favor diff`: two models, prompts, what is looked at, and which changes are too much.

In: a recipe. Out: DiffConfig. Next: signs.py.
"""

from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from favor.config import STRICT, Overwrite, Seed
from favor.data.prompts import PromptTokens
from favor.data.settings import Columns
from favor.diff.figures import FIGURES, Limits, of_range
from favor.generate.engines import ModelAt
from favor.generate.samples import MaxPrompts, PromptsFile, SamplesPerPrompt, Split
from favor.model.sample import SampleConfig
from favor.rewards.source import RewardConfig


class DiffConfig(BaseModel):
    """A recipe for `favor diff`; docs/diff.md says what each figure means."""

    model_config = STRICT
    a: ModelAt
    b: ModelAt
    prompts: PromptsFile
    split: Split = "train"
    columns: Columns = {}
    max_prompts: MaxPrompts = None
    tokens: PromptTokens = PromptTokens()
    sample: SampleConfig = SampleConfig()
    samples_per_prompt: SamplesPerPrompt = 1
    seed: Seed = 0
    """Decides the samples, by the same random streams for both, and the order in which the prompts are worked through."""
    refusals: tuple[str, ...] = ()
    """With which words a refusal begins, in place of favor's own list."""
    kl_clip: float = Field(default=1.0, gt=0)
    """Log-ratios beyond this, nats a token, count as this: an interval needs bounds."""
    checks: bool = True
    """Whether both are asked favor's fixed set of short questions, for what was forgotten."""
    reward: RewardConfig | None = None
    gate: dict[str, Limits] = {}
    """Which change of a figure is too much: gate.FIGURE.max_rise, max_fall (of b less a), min, max (of b)."""
    unsettled: Literal["fail", "pass"] = "fail"
    """What it means that the prompts are too few to tell whether a limit holds."""
    stop_early: bool = False
    """Stop as soon as every gate is settled; the intervals allow it."""
    out: str | None = None
    """Write figures and examples to this JSON file."""
    page: str | None = None
    """Write them to this HTML page."""
    overwrite: Overwrite = False
    examples: int = Field(default=10, ge=0)
    """Prompts with both answers that are shown, those that changed most."""
    max_tokens_per_pack: int = Field(default=4096, ge=1)
    """Tokens whose log-probs are computed at once: lower it if memory runs out."""

    @field_validator("refusals")
    @classmethod
    def _say_something(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        if any(not phrase.strip() for phrase in phrases):
            raise ValueError("one is blank, with which every answer begins; remove it")
        return phrases

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "DiffConfig":
        written = self.out is not None or self.page is not None
        # by value: a resolved recipe names every key
        fields = type(self).model_fields
        given = {name for name in ("examples", "unsettled", "kl_clip") if vars(self)[name] != fields[name].default}
        unread: dict[str, tuple[bool, str]] = {
            "overwrite": (self.overwrite and not written, "neither out nor page is written; set one of them"),
            "examples": ("examples" in given and not written, "neither out nor page is written; set one of them"),
            "stop_early": (self.stop_early and not self.gate, "there is no [gate] to settle; set one"),
            "unsettled": ("unsettled" in given and not self.gate, "there is no [gate] to settle; set one"),
            "kl_clip": ("kl_clip" in given and not self.tells_kl, "KL needs sample.temperature=1"),
        }
        for name, (is_unread, why) in unread.items():
            if is_unread:
                raise ValueError(f"{name} is not read: {why}, or remove it")
        return self

    @model_validator(mode="after")
    def _gates_can_be_measured(self) -> "DiffConfig":
        needs = {"win": (self.reward is not None, "a section [reward]"), "checks": (self.checks, "checks=true")}
        needs |= dict.fromkeys(("kl", "reverse_kl"), (self.tells_kl, "sample.temperature=1"))
        for name, limits in self.gate.items():
            if name not in FIGURES:
                raise ValueError(f"gate.{name}: no such figure; known: {', '.join(FIGURES)}")
            there, what = needs.get(name, (True, ""))
            if not there:
                raise ValueError(f"gate.{name} needs {what}; set it, or remove the gate")
            if not FIGURES[name].paired and (limits.max_rise, limits.max_fall) != (None, None):
                raise ValueError(f"gate.{name}: it is one figure of both models, which has min and max alone; set one")
            if told := of_range(limits, self.bounds(name)):
                raise ValueError(f"gate.{name}.{told}")
        return self

    @property
    def tells_kl(self) -> bool:
        """Whether samples are of the models' own distributions."""
        return self.sample.temperature == 1.0

    @property
    def sides(self) -> dict[str, ModelAt]:
        """Both models by name."""
        return {"a": self.a, "b": self.b}

    def bounds(self, figure: str) -> tuple[float, float]:
        """Between what the values of a figure lie."""
        if figure == "length":
            return 0.0, float(self.sample.max_new_tokens)
        return (-self.kl_clip, self.kl_clip) if figure in ("kl", "reverse_kl") else (0.0, 1.0)
