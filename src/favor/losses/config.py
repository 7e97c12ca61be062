"""Section [loss]: which loss, and the options it reads.

In: nothing. Out: LossConfig and OPTIONS, what each loss reads. Next: view.py.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from favor.config import STRICT

# options of every loss that looks at a pair's gap of log-ratios
_GAP = frozenset({"beta", "length_normalized", "divergence", "divergence_alpha", "ld_alpha", "wpo"})
_SIDES = frozenset({"beta", "length_normalized"})
OPTIONS: dict[str, frozenset[str]] = {
    "sigmoid": _GAP,
    "cdpo": _GAP | {"label_smoothing"},
    "robust": _GAP | {"label_smoothing"},
    "hinge": _GAP,
    "exo": _GAP | {"label_smoothing"},
    "discopop": _GAP | {"discopop_tau"},
    "odpo": _GAP | {"offset", "offset_scale"},
    "rao_kupper": (_GAP - {"ld_alpha"}) | {"tie_width"},
    "davidson": (_GAP - {"ld_alpha"}) | {"tie_nu"},
    "ipo": frozenset({"beta", "length_normalized", "wpo"}),
    "dpop": frozenset({"beta", "dpop_lambda", "wpo"}),
    "sppo_hard": _SIDES,
    "apo_zero": _SIDES,
    "apo_down": _SIDES,
    "aot": _SIDES,
    "aot_unpaired": _SIDES,
    "nca": _SIDES | {"score_temperature"},
    "plackett_luce": _SIDES | {"top_k"},
    "kto": frozenset({"beta", "desirable_weight", "undesirable_weight"}),
    "bco": frozenset({"beta"}),
    "simpo": frozenset({"beta", "gamma", "wpo"}),
    "cpo": frozenset({"beta", "nll_weight"}),
    "orpo": frozenset({"beta"}),
    "sft": frozenset[str](),
    "preferred_ft": frozenset[str](),
    "unlikelihood": frozenset({"alpha"}),
}
# losses whose items depend on the whole optimizer batch: they need two passes
COUPLED = frozenset({"aot", "aot_unpaired", "bco"})
LossName = Literal[
    "sigmoid",
    "cdpo",
    "robust",
    "hinge",
    "exo",
    "discopop",
    "odpo",
    "rao_kupper",
    "davidson",
    "ipo",
    "dpop",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
    "nca",
    "plackett_luce",
    "kto",
    "bco",
    "simpo",
    "cpo",
    "orpo",
    "sft",
    "preferred_ft",
    "unlikelihood",
]


class LossConfig(BaseModel):
    """Section [loss]; docs/losses.md defines every loss and option. beta: temperature of the KL constraint, 1/nats.

    `also` adds further losses, each with its weight; every loss is the mean over its own items. passes: two computes the
    log-probs of the whole optimizer batch first and then the gradient branch by branch (train/twopass.py).
    """

    model_config = STRICT
    name: LossName = "sigmoid"
    weight: float = Field(default=1.0, gt=0, le=1e6)
    beta: float = Field(default=0.1, gt=0, le=1e6)
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    length_normalized: bool = False
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl"
    divergence_alpha: float = Field(default=0.5, gt=0, lt=1)
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    wpo: Literal["off", "probability", "aligned"] = "off"
    alpha: float = Field(default=0.5, ge=0, le=1)
    desirable_weight: float = Field(default=1.0, gt=0)
    undesirable_weight: float = Field(default=1.0, gt=0)
    discopop_tau: float = Field(default=0.05, gt=0)
    dpop_lambda: float = Field(default=50.0, gt=0)
    offset: Literal["log", "linear"] = "log"
    offset_scale: float = Field(default=1.0, gt=0)
    tie_width: float = Field(default=0.5, gt=0)
    tie_nu: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    score_temperature: float = Field(default=1.0, gt=0)
    gamma: float = Field(default=0.5, ge=0)
    nll_weight: float = Field(default=1.0, ge=0)
    also: tuple["LossConfig", ...] = ()
    passes: Literal["auto", "one", "two"] = "auto"

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "LossConfig":
        unread = sorted(self.model_fields_set - {"name", "weight", "also", "passes"} - OPTIONS[self.name])
        if unread:
            raise ValueError(
                f"loss.{unread[0]} is not read by loss '{self.name}'; remove it or choose a loss that uses it"
            )
        return self

    @model_validator(mode="after")
    def _options_go_together(self) -> "LossConfig":
        if self.divergence != "alpha" and "divergence_alpha" in self.model_fields_set and self.divergence_alpha != 0.5:
            raise ValueError("loss.divergence_alpha is read only with loss.divergence=alpha; remove one")
        if self.ld_alpha is not None and (self.length_normalized or self.divergence != "reverse_kl"):
            raise ValueError(
                "loss.ld_alpha cuts summed log-ratios; it does not go with length_normalized or another divergence"
            )
        if self.name == "exo" and self.label_smoothing == 0:
            raise ValueError("loss 'exo' takes log(label_smoothing); set loss.label_smoothing above 0")
        coupled = sorted(COUPLED & {term.name for term in self.terms})
        if coupled and self.passes == "one":
            raise ValueError(
                f"loss '{coupled[0]}' depends on the whole optimizer batch, more than one pass sees; set loss.passes=two"
            )
        if any(term.also or term.passes != "auto" for term in self.also):
            raise ValueError("a loss in loss.also has no `also` and no `passes` of its own; set them in [loss]")
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The resolved recipe holds what this loss reads, so that it can be read back."""
        used = {"name", "weight", "also", "passes"} | OPTIONS[self.name]
        idle = {"weight": 1.0, "passes": "auto"}
        found = {key: value for key, value in handler(self).items() if key in used and value not in (None, [], ())}
        return {key: value for key, value in found.items() if idle.get(key) != value}

    @property
    def terms(self) -> tuple["LossConfig", ...]:
        """This loss and those in `also`."""
        return (self, *self.also)
