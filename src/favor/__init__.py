"""favor: teach a language model what people favor. `favor.dpo_loss` is the plain front of the fast code."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from favor.losses.pairwise import dpo_loss

__all__ = ["dpo_loss"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `favor --help` need not wait for torch."""
    if name == "dpo_loss":
        from favor.losses.pairwise import dpo_loss

        return dpo_loss
    raise AttributeError(f"module 'favor' has no attribute '{name}'")
