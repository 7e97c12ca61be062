"""Section [reward]: where scores come from, behind one signature.

In: RewardConfig. Out: a Scorer, (prompts, responses as text) -> one finite number each, higher is better.
Next: model.py.
"""

import importlib.util
import itertools
import json
import math
import reprlib
import warnings
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, Tag

from favor.config import STRICT, by_kind
from favor.data.types import Text
from favor.errors import DataError, clipped
from favor.guard import content, sha
from favor.model.load import check_path
from favor.rewards.model import ScoredTokens, Scorer, base_of, implicit_scorer, model_scorer
from favor.rewards.user import check_function, find_function, guarded


class ModelReward(BaseModel):
    """Section [reward], kind "model": the number that a reward model gives."""

    model_config = STRICT
    kind: Literal["model"] = "model"
    path: str
    """A folder of `favor reward`, or any sequence classifier with one output."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """How its weights are kept in memory, as model.weights."""
    tokens: ScoredTokens = ScoredTokens()


class ImplicitReward(BaseModel):
    """Section [reward], kind "implicit": beta log pi/ref of a run of `favor train`."""

    model_config = STRICT
    kind: Literal["implicit"] = "implicit"
    path: str
    """The run folder."""
    reference: str | None = None
    """Another model to compare with than the one the run started from."""
    beta: float | None = Field(default=None, gt=0)
    """Another beta than the run's."""
    tokens: ScoredTokens | None = None
    """How text becomes tokens, if not as in the run."""


class ClassifierReward(BaseModel):
    """Section [reward], kind "classifier": P(positive) by TF-IDF and logistic regression, fitted when it is loaded."""

    model_config = STRICT
    kind: Literal["classifier"] = "classifier"
    path: str
    """Labelled texts, JSON lines with text and label (true or false)."""


class CallableReward(BaseModel):
    """Section [reward], kind "callable": a function of yours, called with (prompts, responses)."""

    model_config = STRICT
    kind: Literal["callable"] = "callable"
    path: str
    """`file.py:function` or `package.module:function`."""


RewardConfig: TypeAlias = Annotated[
    Annotated[ModelReward, Tag("model")]
    | Annotated[ImplicitReward, Tag("implicit")]
    | Annotated[ClassifierReward, Tag("classifier")]
    | Annotated[CallableReward, Tag("callable")],
    by_kind(),
    Field(description="What gives a response its score."),
]


def reads(config: RewardConfig) -> tuple[str, ...]:
    """The files and folders that the section names."""
    other = config.reference if isinstance(config, ImplicitReward) else None
    return (config.path, other) if other else (config.path,)


def identity(config: RewardConfig) -> str:
    """A hash of the section and of the content of everything it names: another reward has another one."""
    named: list[str | None] = [*reads(config)]
    place = config.path.rpartition(":")[0]
    if isinstance(config, ImplicitReward):
        named.append(base_of(config.path))
    elif isinstance(config, CallableReward) and place and not place.endswith(".py"):
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            # make_scorer says what is wrong
            spec = None
        named.append(spec and spec.origin)
    return sha(json.dumps([config.model_dump(mode="json"), [content(name) for name in named if name]]))


def check_scorer(config: RewardConfig) -> None:
    """Look for what scores without loading a model: before hours are spent on what it is to score. Raises as `make_scorer`."""
    if isinstance(config, CallableReward):
        check_function(config.path)
    elif isinstance(config, ModelReward):
        check_path(config.path)
    elif not Path(config.path).exists():
        what = "no finished run" if isinstance(config, ImplicitReward) else "no such file"
        raise DataError(f"{config.path}: {what}; check reward.path")


def make_scorer(config: RewardConfig) -> Scorer:
    """Load what scores. Raises ConfigError, DataError or CheckpointError when it cannot be loaded."""
    score, what = _scorer(config), f"reward {config.kind} {config.path}"

    def checked(prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
        found: Any = score(prompts, responses)
        if not _is_list(found):
            raise DataError(f"{what}: returned {_shown(found)}; return a list with one number per response")
        given = list(found)
        if len(given) != len(responses):
            raise DataError(
                f"{what}: returned {len(given)} scores for {len(responses)} responses; return one number per response"
            )
        for value, text in zip(given, responses, strict=True):
            if not isinstance(value, float):
                raise DataError(f"{what}: gave {_shown(value)} to the response {text!r:.80}; give it one number")
            if not math.isfinite(value):
                raise DataError(f"{what}: score {value} for the response {text!r:.80}; give finite numbers")
        return given

    return checked


def _scorer(config: RewardConfig) -> Scorer:
    if isinstance(config, ModelReward):
        return model_scorer(config.path, config.tokens, config.weights)
    if isinstance(config, ImplicitReward):
        return implicit_scorer(config.path, config.reference, config.beta, config.tokens)
    if isinstance(config, CallableReward):
        return _called(config.path)
    # scikit-learn is slow to import
    from favor.rewards.classifier import train_judge

    judge = train_judge(Path(config.path))
    return lambda prompts, responses: judge.score(responses)


def _called(path: str) -> Scorer:
    function = find_function(path)

    def score(prompts: Sequence[Text], responses: Sequence[str]) -> Any:
        found: Any = function(list(prompts), list(responses))
        if isinstance(found, Coroutine):
            # nobody waits for it
            found.close()
            return found
        if not _is_list(found):
            return found
        # what is returned may run the user's code while it is read, and may have no end
        with guarded(path, "failed"), warnings.catch_warnings():
            # of torch, for a tensor that has a gradient
            warnings.simplefilter("ignore")
            given = list(found if isinstance(found, Collection) else itertools.islice(found, len(responses) + 1))
            return [_as_number(value) for value in given]

    return score


def _is_list(found: Any) -> bool:
    return isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping | Set)


def _as_number(value: Any) -> Any:
    """A float; what is not a number stays as it is, for the message."""
    try:
        return value if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {clipped(' '.join(reprlib.repr(value).split()))}"
