"""Section [reward]: where scores come from, behind one signature.

In: RewardConfig. Out: a Scorer, (prompts, responses as text) -> one finite number each, higher is better.
Next: model.py.
"""

import importlib
import importlib.util
import json
import math
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT
from favor.data.tokenize import TokensConfig
from favor.data.types import Text
from favor.errors import ConfigError, DataError
from favor.guard import content, sha
from favor.run import read_text

Scorer: TypeAlias = Callable[[Sequence[Text], Sequence[str]], list[float]]


class RewardConfig(BaseModel):
    """Section [reward].

    kind: model (a folder of `favor reward`, or any sequence classifier with one output), implicit (a run of
    `favor train`: beta log pi/ref), classifier (labelled texts, JSONL with text and fresh or label; TF-IDF and
    logistic regression fitted on the spot, P(positive)), callable (`file.py:function` or `package.module:function`,
    called with (prompts, responses)). `beta` and `reference` replace those of an implicit reward's run.
    """

    model_config = STRICT
    kind: Literal["model", "implicit", "classifier", "callable"]
    path: str
    reference: str | None = None
    beta: float | None = Field(default=None, gt=0)
    tokens: TokensConfig = TokensConfig(max_tokens=4096)

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "RewardConfig":
        unread = sorted(self.model_fields_set & {"beta", "reference"})
        if unread and self.kind != "implicit":
            raise ValueError(f"reward.{unread[0]} is read by kind 'implicit' only; remove it")
        # by value, because a run's resolved recipe names the default too
        if self.tokens != TokensConfig(max_tokens=4096) and self.kind in ("classifier", "callable"):
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
    from favor.scoring.model import model_scorer

    return model_scorer(config.path, config.tokens)


def _implicit(config: RewardConfig) -> Scorer:
    from favor.scoring.model import implicit_scorer

    return implicit_scorer(config.path, config.reference, config.beta, config.tokens)


def _classifier(config: RewardConfig) -> Scorer:
    from favor.scoring.classifier import train_judge

    judge = train_judge(Path(config.path))
    return lambda prompts, responses: judge.score(responses)


def _callable(config: RewardConfig) -> Scorer:
    function = find_function(config.path)
    return lambda prompts, responses: function(list(prompts), list(responses))


_MAKERS: dict[str, Callable[[RewardConfig], Scorer]] = {
    "model": _model,
    "implicit": _implicit,
    "classifier": _classifier,
    "callable": _callable,
}


def find_function(path: str) -> Callable[..., Any]:
    """`file.py:function` or `package.module:function` -> the function. Raises ConfigError naming what is missing."""
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{path}: expected file.py:function or package.module:function")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    found = vars(module).get(name)
    if not callable(found):
        raise ConfigError(f"{path}: {place} has no function '{name}'")
    return found


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{path}: no such Python file; check the path before the colon")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and the like look their module up by name
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        # make_scorer says what is wrong
        return None


def _from_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: no such Python module ({error}); install it or name a file.py") from None


def _checked(score: Scorer, what: str) -> Scorer:
    """One finite number per response, or an error that says which function gave what."""

    def checked(prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
        try:
            scores = [float(x) for x in score(prompts, responses)]
        except TypeError as error:
            raise DataError(f"{what}: must return one number per response ({error})") from None
        if len(scores) != len(responses):
            raise DataError(f"{what}: returned {len(scores)} scores for {len(responses)} responses")
        bad = next((i for i, x in enumerate(scores) if not math.isfinite(x)), None)
        if bad is not None:
            raise DataError(f"{what}: score {scores[bad]} for the response {responses[bad]!r:.80}; give finite numbers")
        return scores

    return checked
