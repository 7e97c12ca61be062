"""Section [health]: signs that a model's answers break while it trains, when each counts, and what is then done.

In: sampled token ids; figures now and before the first step. Out: figures, the signs that are out of bounds, the state that a
look leads to, [loss] with the likelihood term. All of it is pure; what measures and acts is guards.py. Next: guards.py.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT
from favor.losses.table import LossConfig, make_loss, needs, terms
from favor.train.session import Health, Kept

Figures: TypeAlias = Mapping[str, float]
Act: TypeAlias = Literal["warn", "likelihood", "lower_lr", "stop"]
On: TypeAlias = Annotated[
    Literal["off", "warn", "likelihood", "lower_lr", "stop"] | None,
    Field(description="What is done at this sign; absent: health.consequence; off: it is not looked at."),
]
# tokens of what counts as repeated within an answer, and as distinct over all
_REPEATED, _DISTINCT = 4, 2
# losses that hold log pi(chosen) up already
_LIKELY = ("sft", "preferred_ft", "orpo")


class OnConfig(BaseModel):
    """Section [health.on]: what is done at each sign."""

    model_config = STRICT
    ended: On = None
    length: On = None
    repetition: On = None
    distinct: On = None
    displacement: On = None
    kl: On = None
    accuracy: On = None


class HealthConfig(BaseModel):
    """Section [health]: a look at samples and held-out pairs every so many steps, and what is done when they break."""

    model_config = STRICT
    every: int = Field(ge=1)
    """Steps between looks; one comes before the first step and one after the last."""
    prompts: int = Field(default=16, ge=2)
    """Held-out prompts that a look samples one answer to, the first ones."""
    tokens: int = Field(default=48, ge=1, le=1_000_000)
    """Longest sample."""
    held_out: int = Field(default=32, ge=2)
    """Held-out prompts whose pairs a look measures, the first ones."""
    consequence: Act = "warn"
    """What is done when a sign is out of bounds, where health.on says nothing else."""
    on: OnConfig = OnConfig()
    ended: float = Field(default=0.33, gt=0, le=1)
    """Sign: fewer samples end than this share of those before the first step."""
    length: float = Field(default=2.0, gt=1)
    """Sign: samples are longer, or shorter, than before the first step by more than this factor."""
    repetition: float = Field(default=0.25, gt=0, lt=1)
    """Sign: the share of repeated 4-grams within a sample rises by more than this."""
    distinct: float = Field(default=0.5, gt=0, lt=1)
    """Sign: the share of distinct 2-grams over all samples falls below this share of that before the first step."""
    displacement: float = Field(default=1.0, gt=0)
    """Sign: chosen held-out answers lose more than this against the reference, nats a token."""
    kl: float = Field(default=30.0, gt=0)
    """Sign: sampled KL from the reference above this, nats an answer."""
    accuracy: float = Field(default=0.05, ge=0, lt=1)
    """Sign: the 95 % interval of held-out accuracy lies by more than this below the best look's accuracy."""
    lr_factor: float = Field(default=0.1, gt=0, lt=1)
    """lower_lr: every look with such a sign multiplies the learning rate of the steps behind it by this."""
    likelihood_weight: float = Field(default=1.0, gt=0, le=1e6)
    """likelihood: weight of RPO's term, -log pi(chosen) a token, from the look on."""
    kl_budget: float | None = Field(default=None, gt=0)
    """The result is the look of the highest held-out accuracy within this KL; absent: the last step, after a stop the best look."""

    def at(self, sign: str) -> str:
        """What is done at a sign."""
        return dict(self.on)[sign] or self.consequence

    @property
    def done(self) -> set[str]:
        """All that can be done."""
        return {self.at(sign) for sign in SIGNS}

    @property
    def keeps(self) -> bool:
        """Whether the best look's checkpoint may become the result."""
        return "stop" in self.done or self.kl_budget is not None

    def looks(self, steps: int) -> int:
        """Looks of a run of so many steps."""
        return 1 + math.ceil(steps / self.every)

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "HealthConfig":
        given, done = self.model_dump(exclude_defaults=True).keys(), self.done
        unread = {"lr_factor": "lower_lr" not in done, "likelihood_weight": "likelihood" not in done}
        unread |= {"consequence": all(dict(self.on).values())} | {sign: self.at(sign) == "off" for sign in SIGNS}
        for name in given:
            if unread.get(name):
                raise ValueError(
                    f"health.{name} is set, but no sign of health.on reads it; remove it, or change health.on"
                )
        if done == {"off"}:
            raise ValueError("health.on switches every sign off, so nothing is looked at; remove section [health]")
        if self.kl_budget is not None and self.kl_budget > self.kl and self.at("kl") != "off":
            raise ValueError("health.kl_budget is above health.kl, beyond which no look is kept; raise health.kl")
        return self


def refusal(config: HealthConfig, loss: LossConfig, *, held_out: bool, moves: bool) -> str | None:
    """Why [health] cannot work in a recipe. held_out: whether data is; moves: whether the reference does."""
    if not held_out:
        return "[health] looks at held-out data; name data.eval or data.hold_out.share, or remove it"
    if moves:
        return "[health] measures from the model as it starts, which [reference.sync] moves; remove one of the two"
    if not needs(loss).reference and (
        config.on.displacement not in (None, "off") or config.displacement != HealthConfig(every=1).displacement
    ):
        return "health.displacement is against a reference, which this loss does not read; remove it"
    return _no_likelihood(loss) if "likelihood" in config.done else None


def _no_likelihood(loss: LossConfig) -> str | None:
    for term in terms(loss):
        if term.loss.items == "thumbs":
            return (
                f"loss '{term.kind}' has no chosen answer for health's likelihood term; lower_lr or stop work with it"
            )
        if term.kind in _LIKELY or term.settings.get("nll_weight"):
            return f"loss '{term.kind}' has a likelihood term already; health can only lower_lr or stop"
    return None


def with_likelihood(config: LossConfig, weight: float) -> LossConfig:
    """[loss] + weight * mean over pairs of -log pi(y_w|x)/|y_w|, RPO's term. Pang et al. 2024, arXiv 2404.19733, eq. 2."""
    given = config.model_dump()
    passes = given.pop("passes")
    found = given["terms"] if given["kind"] == "sum" else (given,)
    return make_loss("sum", terms=[*found, {"kind": "sft", "weight": weight}], passes=passes)


def repeated(ids: Sequence[int], size: int = _REPEATED) -> float:
    """seq-rep-n: 1 - distinct n-grams / n-grams of an answer; 0 without any. Welleck et al. 2019, arXiv 1908.04319, eq. 10."""
    grams = _grams(ids, size)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], size: int = _DISTINCT) -> float:
    """distinct-n: distinct n-grams / n-grams of all answers together; 0 without any. Li et al. 2016, arXiv 1510.03055."""
    grams = list(chain.from_iterable(_grams(ids, size) for ids in answers))
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]


def of_samples(answers: Sequence[Sequence[int]], end_ids: Collection[int]) -> dict[str, float]:
    """ended, length (tokens, the end token too), repetition (mean over answers) and distinct of sampled answers."""
    ended = [ids[-1] in end_ids for ids in answers]
    said = [ids[:-1] if end else ids for ids, end in zip(answers, ended, strict=True)]
    return {
        "ended": sum(ended) / len(answers),
        "length": sum(map(len, answers)) / len(answers),
        "repetition": sum(map(repeated, said)) / len(answers),
        "distinct": distinct(said),
    }


@dataclass(frozen=True)
class Sign:
    """A figure, its name for people, and when it is out of bounds: (now, at the start, limit) -> whether."""

    words: str
    out: Callable[[float, float, float], bool]


# accuracy's now is the upper end of its interval and its start the best look's; displacement and KL are differences already
SIGNS: Mapping[str, Sign] = {
    "ended": Sign("samples that end", lambda now, start, limit: now < limit * start),
    "length": Sign("tokens a sample", lambda now, start, limit: not start / limit <= now <= start * limit),
    "repetition": Sign("repeated 4-grams", lambda now, start, limit: now > start + limit),
    "distinct": Sign("distinct 2-grams", lambda now, start, limit: now < limit * start),
    "displacement": Sign("chosen answers' nats a token", lambda now, _, limit: now < -limit),
    "kl": Sign("KL", lambda now, _, limit: now > limit),
    "accuracy": Sign("held-out accuracy", lambda high, best, limit: high < best - limit),
}


def out_of_bounds(config: HealthConfig, now: Figures, start: Figures) -> tuple[str, ...]:
    """The signs whose figure is out of bounds, or is no number; those that are off, or have no figure, are passed over."""
    limits = dict(config)
    return tuple(
        name
        for name, sign in SIGNS.items()
        if name in now
        and config.at(name) != "off"
        and (not math.isfinite(now[name]) or sign.out(now.get(f"{name}_high", now[name]), start[name], limits[name]))
    )


def is_better(config: HealthConfig, now: Figures, out: Sequence[str], best: Kept | None) -> bool:
    """Whether a look's model is the one to keep: no sign, within the budget, the highest accuracy, then the lowest loss."""
    if not config.keeps or out or (config.kl_budget is not None and now["kl"] > config.kl_budget):
        return False
    return best is None or (now["accuracy"], -now["loss"]) > (best.accuracy, -best.loss)


def after(config: HealthConfig, before: Health, step: int, now: Figures, found: tuple[Sequence[str], bool]) -> Health:
    """The state that a look leads to. found: the signs that are out of bounds, and whether the model is the one to keep."""
    out, better = found
    asked = {config.at(sign) for sign in out}
    kept = Kept(step=step, **{name: now[name] for name in ("accuracy", "loss", "kl")}) if better else before.best
    moved = {
        "start": {**before.start, "accuracy": max(before.start["accuracy"], now["accuracy"])},
        "out": tuple(out),
        "rate": before.rate * (config.lr_factor if "lower_lr" in asked else 1.0),
        "likelihood": before.likelihood or "likelihood" in asked,
        "stopped": "stop" in asked,
        "best": kept,
    }
    return before.model_copy(update=moved)


def acted(config: HealthConfig, before: Health, now: Health) -> list[str]:
    """What a look changed, in words."""
    said = [f"the learning rate is now {now.rate:.3g} of its schedule"] if now.rate != before.rate else []
    if now.likelihood and not before.likelihood:
        said.append(f"the likelihood term is added, with weight {config.likelihood_weight:g}")
    return [*said, "training stops"] if now.stopped else said
