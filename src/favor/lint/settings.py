"""Section [lint], and the table of what can be wrong with rows.

In: a recipe. Out: LintConfig; KINDS. Next: cheap.py.
"""

import difflib
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field, field_validator, model_validator

from favor.config import STRICT
from favor.data.settings import DataConfig, kwargs_are_read
from favor.data.tokenize import TokensConfig
from favor.model.load import ModelConfig
from favor.rewards.source import RewardConfig
from favor.settings import inmost

Severity: TypeAlias = Literal["error", "warning", "note"]
ORDER: tuple[Severity, ...] = ("error", "warning", "note")
# sections of training recipes that lint passes over
ELSEWHERE = {
    "run",
    "seed",
    "resume",
    "loss",
    "optim",
    "reference",
    "train",
    "watch",
    "health",
    "save",
    "ranks",
    "ppo",
    "sample",
    "bradley_terry",
}
# thresholds that the checks of `favor train` share
LENGTH_SHARE, CUT_SHARE = 0.6, 0.05
# kind of a finding about rows (docs/lint.md has those of the whole file, too) ->
# (severity, what is said after the number of rows ("": its check says it), whether --fix leaves these rows out)
KINDS: dict[str, tuple[Severity, str, bool]] = {
    "identical": ("error", "rows whose responses are the same", True),
    "empty": ("error", "rows with an empty or missing side", True),
    "malformed": ("error", "rows that cannot be read", True),
    "encoding": ("warning", "rows with text that was decoded wrongly", False),
    "lost_characters": ("warning", "rows with replacement characters", True),
    "invisible": ("warning", "rows with invisible or control characters", False),
    "entities": ("warning", "rows with HTML entities", False),
    "markup": ("note", "rows with HTML tags", False),
    "secret": ("error", "rows with what looks like a secret", True),
    "personal": ("warning", "rows with what looks like personal data", True),
    "echo": ("warning", "rows whose response repeats the prompt", True),
    "repeated_turn": ("warning", "rows with the same turn twice", True),
    "blanks": ("warning", "rows with a response that ends in blanks", False),
    "calls": ("warning", "rows whose preferred response calls what no tool takes", True),
    "stub": ("note", "rows with a response of a single word", False),
    "refusal": ("note", "rows whose preferred response is the refusal", False),
    "contradiction": ("error", "rows contradict another row", True),
    "contradicted": ("error", "", True),
    "duplicate": ("warning", "rows repeat an earlier one", True),
    "leak": ("error", "held-out rows have a prompt of the training part", False),
    "near_duplicate": ("warning", "rows nearly repeat another", True),
    "near_leak": ("warning", "held-out rows have nearly a prompt of the training part", False),
    "language": ("warning", "rows are in a different language from most", True),
    "special_text": ("error", "rows hold the text of a special token", True),
    "round_trip": ("error", "rows do not come through the template and the tokenizer as they are", True),
    "equal_ids": ("error", "rows compare responses that become the same tokens", True),
    "doubled_special": ("error", "rows have a doubled special token", True),
    "truncation": ("warning", "", True),
    "missing_end": (
        "note",
        "responses get no end-of-turn token from the chat template; favor adds the tokenizer's",
        False,
    ),
    "trimmed": ("note", "responses lose the blanks around their text in the chat template", False),
    "tools": ("note", "prompts have tools that the chat template leaves out", False),
    "variables": ("note", "prompts have chat_template_kwargs that the chat template does not read", False),
    "label_noise": ("warning", "rows have a label that a reward or model strongly disagrees with", False),
}


class LintSettings(BaseModel):
    """Section [lint]; docs/lint.md gives every check with its threshold."""

    model_config = STRICT
    out: str | None = None
    """Write the findings to this JSON file."""
    page: str | None = None
    """Write the findings to this HTML page."""
    fix: str | None = None
    """Write a cleaned copy of the training rows to this JSONL file."""
    overwrite: bool = False
    """Also replace files that favor lint did not write."""
    fail_on: Literal["error", "warning", "never"] = "error"
    """The least severe finding that makes the exit code 1."""
    near: float = Field(default=0.8, ge=0, le=1)
    """Jaccard similarity of word triples from which texts count as near-duplicates; 0 looks for none."""
    language: bool = True
    """Look for responses in another language than most of the file's."""
    length_share: float = Field(default=LENGTH_SHARE, ge=0.5, le=1)
    """Share of comparisons won by the longer response (or by the shorter) from which lengths are a warning."""
    cut_share: float = Field(default=CUT_SHARE, ge=0, le=1)
    """Share of rows that tokens.max_tokens cuts or drops from which it is a warning; needs [model]."""
    opening_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the preferred (or of the rejected) responses with the same first two words that is a warning."""
    noise: float = Field(default=3.0, gt=0)
    """Standard deviations below the median from which a reward difference speaks against its label; needs [reward] or doubt."""
    doubt: bool = False
    """Ask [model] about the labels, by the mean log-prob of a token, or by its log-ratio to lint.reference."""
    reference: str | None = None
    """Folder of the reference model for lint.doubt."""
    examples: int = Field(default=5, ge=0)
    """Rows of each finding that are shown with their text."""

    @field_validator("out", "page", "fix")
    @classmethod
    def _is_a_file(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).name:
            raise ValueError(f"{path} is a folder; name a file")
        return path


def passed_over(tree: Any, schema: type[BaseModel], elsewhere: Set[str]) -> Any:
    """A training recipe without the sections that this command does not read; a name that is nearly one of them is refused."""
    if not isinstance(tree, dict):
        return tree
    others = elsewhere - schema.model_fields.keys()
    for name in tree.keys() - schema.model_fields.keys() - others:
        for meant in difflib.get_close_matches(name, others, n=1, cutoff=0.75):
            typed = inmost(name, tree[name])
            raise ValueError(f"unknown key '{typed}'; did you mean '{meant}{typed.removeprefix(name)}'?")
    return {key: value for key, value in tree.items() if key not in others}


class LintConfig(BaseModel):
    """A recipe for `favor lint`: [data] and [lint]; [model] tries its tokenizer and template, [reward] doubts labels.

    A whole training recipe serves too: its other sections are passed over.
    """

    model_config = STRICT
    _kwargs = model_validator(mode="after")(kwargs_are_read)
    data: DataConfig
    tokens: TokensConfig = TokensConfig()
    lint: LintSettings = LintSettings()
    model: ModelConfig | None = None
    reward: RewardConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _pass_over(cls, tree: Any) -> Any:
        return passed_over(tree, cls, ELSEWHERE | {"value"})

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "LintConfig":
        settings = self.lint
        readers = {
            "overwrite": ("lint.out, lint.page or lint.fix", settings.out or settings.page or settings.fix),
            "cut_share": ("model.path", self.model),
            "doubt": ("model.path", self.model),
            "reference": ("lint.doubt=true", settings.doubt),
            "noise": ("reward.kind or lint.doubt=true", self.reward or settings.doubt),
        }
        given = settings.model_dump(exclude_defaults=True)
        for name, (by, read) in readers.items():
            if name in given and not read:
                raise ValueError(f"lint.{name} is read only with {by}; set that or remove it")
        if self.model is None and (own := self.tokens.model_dump(exclude_defaults=True)):
            raise ValueError(f"tokens.{next(iter(own))} is read only with model.path; set that or remove it")
        return self
