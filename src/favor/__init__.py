"""favor: teach a language model what people favor. In Python: `favor.train(model, rows, ...)`, docs/python.md."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from favor.api.answers import Answer, ask, audit, conform, realign, value
    from favor.api.calls import Scores, diff, evaluate, frontier, sample, score, winrate
    from favor.api.run import Run, load_run
    from favor.api.training import lint, reward, sft, train
    from favor.errors import FavorError
    from favor.losses.pairwise import dpo_loss

__all__ = [
    "Answer",
    "FavorError",
    "Run",
    "Scores",
    "ask",
    "audit",
    "conform",
    "diff",
    "dpo_loss",
    "evaluate",
    "frontier",
    "lint",
    "load_run",
    "realign",
    "reward",
    "sample",
    "score",
    "sft",
    "train",
    "value",
    "winrate",
]
# where each lies; imported on first use, so that `favor --help` need not wait for torch
_PLACES = {
    **dict.fromkeys(("Answer", "ask", "audit", "conform", "realign", "value"), "favor.api.answers"),
    **dict.fromkeys(("Scores", "diff", "evaluate", "frontier", "sample", "score", "winrate"), "favor.api.calls"),
    **dict.fromkeys(("lint", "reward", "sft", "train"), "favor.api.training"),
    **dict.fromkeys(("Run", "load_run"), "favor.api.run"),
    "FavorError": "favor.errors",
    "dpo_loss": "favor.losses.pairwise",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'favor' has no attribute '{name}'")
    return vars(import_module(_PLACES[name]))[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Front(ModuleType):
    """`favor.train` is the function, also once the rooms train/, lint/, winrate/ and the like have been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
