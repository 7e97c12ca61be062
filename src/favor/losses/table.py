"""THE table of losses, and section [loss] made from it.

A loss is one pure function and one row here. A parameter named in READINGS is what it reads of a batch: view.py makes it (h_P, the
gap, in gap_P); one of type Annotated is a setting. In: [loss], Scored and a Batch. Out: the loss of every item. Next: pairwise.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, Field, TypeAdapter, model_validator
from torch import Tensor
from torch.nn.functional import pad

from favor.config import choice, options
from favor.data.types import Batch
from favor.losses import pairwise, unpaired
from favor.losses.view import RATIOS, READINGS, Scored, View

# what a loss is a mean over, and the weights of these items
WEIGHTS: Mapping[str, Callable[[Batch], Tensor]] = {
    "pairs": lambda batch: batch.weight_P,
    "pairs and ties": lambda batch: torch.cat([batch.weight_P, batch.weight_U]),
    "rankings": lambda batch: batch.weight_Q,
    "thumbs": lambda batch: torch.cat([batch.weight_I, batch.weight_P, batch.weight_P]),
}


@dataclass(frozen=True)
class Loss:
    """A row: the function, which settings of View change what it sees, and what it is a mean over.

    coupled: an item's loss depends on the whole optimizer batch (function returns losses and their weights).
    """

    function: Callable[..., Any]
    sees: tuple[str, ...] = ()
    items: str = "pairs"
    coupled: bool = False

    def __post_init__(self) -> None:
        unknown = signature(self.function).parameters.keys() - READINGS.keys() - options(self.function).keys()
        if unknown:
            raise TypeError(
                f"{self.function}: {', '.join(sorted(unknown))} is neither a name of READINGS (losses/view.py) "
                "nor a setting, whose type is Annotated[TYPE, Field(..., description=...)]"
            )

    def reads(self) -> set[str]:
        """The readings among the function's parameters."""
        return set(signature(self.function).parameters) & set(READINGS)

    def settings(self) -> dict[str, tuple[Any, Any]]:
        """What [loss] has for it beside `kind`: name -> (annotation, default)."""
        seen = options(View)
        return options(self.function) | {name: seen[name] for name in self.sees}


# what the losses of one family can be told about how they see a batch (fields of View): ratios of any kind can be means over
# tokens; what is a gap of two ratios can use another divergence and weigh pairs; tokens can be cut where there are no ties
_RATIO = ("length_normalized",)
_TIES = (*_RATIO, "divergence", "wpo")
_GAP = (*_TIES, "ld_alpha")
LOSSES: Mapping[str, Loss] = {
    "dpo": Loss(pairwise.sigmoid, _GAP),
    "cdpo": Loss(pairwise.cdpo, _GAP),
    "robust": Loss(pairwise.robust, _GAP),
    "hinge": Loss(pairwise.hinge, _GAP),
    "exo": Loss(pairwise.exo, _GAP),
    "discopop": Loss(pairwise.discopop, _GAP),
    "odpo": Loss(pairwise.odpo, _GAP),
    "rao_kupper": Loss(pairwise.rao_kupper, _TIES, "pairs and ties"),
    "davidson": Loss(pairwise.davidson, _TIES, "pairs and ties"),
    # its target 1/(2 beta) is derived for the reverse KL alone
    "ipo": Loss(pairwise.ipo, (*_RATIO, "wpo")),
    "dpop": Loss(pairwise.dpop, ("wpo",)),
    "sppo_hard": Loss(pairwise.sppo_hard, _RATIO),
    "apo_zero": Loss(pairwise.apo_zero, _RATIO),
    "apo_down": Loss(pairwise.apo_down, _RATIO),
    "aot": Loss(unpaired.aot, _RATIO, coupled=True),
    "aot_unpaired": Loss(unpaired.aot_unpaired, _RATIO, "thumbs", coupled=True),
    "nca": Loss(unpaired.nca, _RATIO, "rankings"),
    "plackett_luce": Loss(unpaired.plackett_luce, _RATIO, "rankings"),
    # KTO compares with a z0 that is measured beforehand, BCO with the batch itself: only the latter is coupled
    "kto": Loss(unpaired.kto, items="thumbs"),
    "bco": Loss(unpaired.bco, items="thumbs", coupled=True),
    "simpo": Loss(pairwise.simpo, ("wpo",)),
    "cpo": Loss(pairwise.cpo),
    "orpo": Loss(pairwise.orpo),
    "sft": Loss(pairwise.sft),
    "preferred_ft": Loss(pairwise.preferred_ft),
    "unlikelihood": Loss(pairwise.unlikelihood),
}


@dataclass(frozen=True)
class Term:
    """One loss of [loss] with its settings, and its weight in the sum."""

    kind: str
    loss: Loss
    settings: Mapping[str, Any]
    weight: float

    def losses(self, scored: Scored, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, weight) of every item, float64; differentiable in scored.pi_R (and pi_M)."""
        view = View(scored, batch, **{name: self.settings[name] for name in self.loss.sees})
        given = {
            name: self.settings[name] for name in signature(self.loss.function).parameters if name in self.settings
        }
        item = self.loss.function(**{name: READINGS[name](view) for name in self.loss.reads()}, **given)
        # transport splits items into parts, whose weights only the loss itself knows
        if isinstance(item, tuple):
            return item
        if "wpo" in self.loss.sees:
            # ties stand behind the pairs, and are not weighed
            item = item * pad(view.trust_P(), (0, len(item) - len(batch.weight_P)), value=1.0)
        return item, WEIGHTS[self.loss.items](batch)


@dataclass(frozen=True)
class Needs:
    """What the terms of [loss] read beside log pi(y|x)."""

    reference: bool
    tokens: bool
    overlap: bool
    zero: bool
    coupled: bool
    two_passes: bool


def terms(config: "LossConfig") -> tuple[Term, ...]:
    """The losses that [loss] adds up: one, or those of kind "sum"."""
    settings = dict(config)
    parts = settings["terms"] if settings["kind"] == "sum" else (config,)
    return tuple(Term(own["kind"], LOSSES[own["kind"]], own, own.get("weight", 1.0)) for own in map(dict, parts))


def needs(config: "LossConfig") -> Needs:
    """What the terms of [loss] read."""
    found = terms(config)
    coupled = any(term.loss.coupled for term in found)
    return Needs(
        reference=any(term.loss.reads() & RATIOS for term in found),
        tokens=any(term.settings.get("ld_alpha") is not None for term in found),
        overlap=any(term.settings.get("wpo") == "aligned" for term in found),
        zero=any("zero" in term.loss.reads() for term in found),
        coupled=coupled,
        two_passes=coupled or dict(config)["passes"] == "two",
    )


def beta_of(config: "LossConfig") -> float:
    """The beta of the implicit reward beta log(pi/ref): that of the first term which has one, else DPO's default."""
    found = [term.settings["beta"] for term in terms(config) if "beta" in term.settings]
    return found[0] if found else LOSSES["dpo"].settings()["beta"][1]


def term_losses(config: "LossConfig", scored: Scored, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(loss, weight) of every item of every term of [loss]."""
    return [term.losses(scored, batch) for term in terms(config)]


def term_sums(config: "LossConfig", scored: Scored, batch: Batch) -> Tensor:
    """Every term's loss summed over its items, times the term's weight: float64 [terms]."""
    found = zip(terms(config), term_losses(config, scored, batch), strict=True)
    # summed, not averaged: step.py divides by the items of all micro-batches and ranks
    return torch.stack([term.weight * (item * weight).sum() for term, (item, weight) in found])


def item_weight(config: "LossConfig", batch: Batch) -> list[float]:
    """Summed weight of the items of every term: what the global batch's loss is divided by."""
    return [float(WEIGHTS[term.loss.items](batch).double().sum()) for term in terms(config)]


def _go_together(config: BaseModel) -> BaseModel:
    for term in terms(config):
        given = term.settings
        if given.get("ld_alpha") is not None and (
            given["length_normalized"] or dict(given["divergence"])["kind"] != "reverse_kl"
        ):
            raise ValueError(
                "loss.ld_alpha cuts summed log-ratios; it does not go with length_normalized or another divergence"
            )
        if term.loss.coupled and dict(config)["passes"] == "one":
            raise ValueError(
                f"loss '{term.kind}' depends on the whole optimizer batch, not on a part; set loss.passes=two"
            )
    return config


Passes = Annotated[
    Literal["auto", "one", "two"],
    Field(
        description="two: log-probs of the whole optimizer batch first, then gradients branch by branch; auto: where needed."
    ),
]
Weight = Annotated[float, Field(gt=0, le=1e6, description="Weight of this loss in the sum.")]
_SETTINGS = {name: loss.settings() for name, loss in LOSSES.items()}
_SENTENCE = "Which loss teaches the policy (docs/losses.md); sum adds up several."
_TERM = choice(_SETTINGS, "dpo", _SENTENCE, weight=(Weight, 1.0))
_TERMS = Annotated[
    tuple[_TERM, ...], Field(min_length=1, description="The losses that are added up, each with its weight.")
]
if TYPE_CHECKING:
    LossConfig: TypeAlias = BaseModel
else:
    LossConfig = choice(
        {**_SETTINGS, "sum": {"terms": (_TERMS, ...)}},
        "dpo",
        _SENTENCE,
        passes=(Passes, "auto"),
        __validators__={"go_together": model_validator(mode="after")(_go_together)},
    )
_ADAPTER = TypeAdapter[LossConfig](LossConfig)


def make_loss(kind: str = "dpo", **settings: Any) -> LossConfig:
    """Section [loss] from Python: the kind and its settings. Raises pydantic's ValidationError."""
    return _ADAPTER.validate_python({"kind": kind, **settings})
