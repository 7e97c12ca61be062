"""Section [reward]: where scores come from, behind one signature.

In: RewardConfig. Out: a Scorer, (prompts, responses as text) -> one finite number each, higher is better.
Next: model.py.
"""

import importlib.util
import itertools
import json
import math
import reprlib
import tomllib
import warnings
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence, Set
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT
from favor.data.tokenize import TokensConfig
from favor.data.types import Text
from favor.errors import DataError, clipped
from favor.guard import content, sha
from favor.rewards.user import check_function, find_function, guarded
from favor.run import read_text

Scorer: TypeAlias = Callable[[Sequence[Text], Sequence[str]], list[float]]


class RewardConfig(BaseModel):
    """Section [reward].

    kind: model (a folder of `favor reward`, or any sequence classifier with one output), implicit (a run of
    `favor train`: beta log pi/ref), classifier (labelled texts, JSONL with text and fresh or label; TF-IDF and
    logistic regression fitted on the spot, P(positive)), callable (`file.py:function` or `package.module:function`,
    called with (prompts, responses)). `beta`, `reference` and `tokens` replace those of an implicit reward's run.
    """

    model_config = STRICT
    kind: Literal["model", "implicit", "classifier", "callable"]
    path: str
    reference: str | None = None
    beta: float | None = Field(default=None, gt=0)
    tokens: TokensConfig | None = None

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "RewardConfig":
        unread = sorted(self.model_fields_set & {"beta", "reference"})
        if unread and self.kind != "implicit":
            raise ValueError(f"reward.{unread[0]} is read by kind 'implicit' only; remove it")
        if self.tokens is not None and self.kind in ("classifier", "callable"):
            raise ValueError(f"reward.tokens is not read by kind '{self.kind}', which scores text; remove it")
        return self


def identity(config: RewardConfig) -> str:
    """A hash of the section and of the content of everything it names: another reward has another one."""
    named = [config.path, config.reference]
    place, _, _ = config.path.rpartition(":")
    if config.kind == "callable" and place and not place.endswith(".py"):
        spec = _spec(place)
        named.append(spec.origin if spec else None)
    recipe = Path(config.path) / "config.toml"
    if config.kind == "implicit" and recipe.exists():
        # its reference is the model the run started from
        named.append(tomllib.loads(read_text(recipe)).get("model", {}).get("path"))
    return sha(json.dumps([config.model_dump(mode="json"), [content(str(name)) for name in named if name]]))


def make_scorer(config: RewardConfig) -> Scorer:
    """Load what scores. Raises ConfigError, DataError or CheckpointError when it cannot be had."""
    return _checked(_MAKERS[config.kind](config), f"reward {config.kind} {config.path}")


def _model(config: RewardConfig) -> Scorer:
    from favor.rewards.model import model_scorer

    return model_scorer(config.path, config.tokens)


def _implicit(config: RewardConfig) -> Scorer:
    from favor.rewards.model import implicit_scorer

    return implicit_scorer(config.path, config.reference, config.beta, config.tokens)


def _classifier(config: RewardConfig) -> Scorer:
    from favor.rewards.classifier import train_judge

    judge = train_judge(Path(config.path))
    return lambda prompts, responses: judge.score(responses)


def _callable(config: RewardConfig) -> Scorer:
    function = find_function(config.path)

    def score(prompts: Sequence[Text], responses: Sequence[str]) -> Any:
        found: Any = function(list(prompts), list(responses))
        if isinstance(found, Coroutine):
            # nobody waits for it
            found.close()
            return found
        if not _is_list(found):
            return found
        # what is returned may run the user's code while it is read, and may have no end
        with guarded(config.path, "failed"), warnings.catch_warnings():
            # of torch, for a tensor that has a gradient
            warnings.simplefilter("ignore")
            given = list(found if isinstance(found, Collection) else itertools.islice(found, len(responses) + 1))
            return [value if value is None or isinstance(value, str | bytes) else _as_number(value) for value in given]

    return score


_MAKERS: dict[str, Callable[[RewardConfig], Scorer]] = {
    "model": _model,
    "implicit": _implicit,
    "classifier": _classifier,
    "callable": _callable,
}


def check_scorer(config: RewardConfig) -> None:
    """Look for what scores without loading a model: before hours are spent on what it is to score. Raises as `make_scorer`."""
    if config.kind == "callable":
        check_function(config.path)
    elif config.kind == "model":
        from favor.model.load import check_path

        check_path(config.path)
    elif not Path(config.path).exists():
        what = "no finished run" if config.kind == "implicit" else "no such file"
        raise DataError(f"{config.path}: {what}; check reward.path")


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        # make_scorer says what is wrong
        return None


def _checked(score: Scorer, what: str) -> Scorer:
    """One finite number per response, or an error that says which function gave what."""

    def checked(prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
        found: Any = score(prompts, responses)
        if not _is_list(found):
            raise DataError(f"{what}: returned {_shown(found)}; return a list with one number per response")
        given = list(found)
        if len(given) != len(responses):
            raise DataError(
                f"{what}: returned {len(given)} scores for {len(responses)} responses; return one number per response"
            )
        return [_number(x, text, what) for x, text in zip(given, responses, strict=True)]

    return checked


def _is_list(found: Any) -> bool:
    return isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping | Set)


def _as_number(value: Any) -> Any:
    """A number; what is none stays as it is, for the message."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return value


def _number(value: Any, text: str, what: str) -> float:
    if isinstance(value, str | bytes) or value is None:
        raise DataError(f"{what}: gave {_shown(value)} to the response {text!r:.80}; give it one number")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise DataError(f"{what}: gave {_shown(value)} to the response {text!r:.80}; give it one number") from None
    if not math.isfinite(found):
        raise DataError(f"{what}: score {found} for the response {text!r:.80}; give finite numbers")
    return found


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {clipped(' '.join(reprlib.repr(value).split()))}"
