"""Guards that act: looks at a model while it trains, consequences of what they see, the checkpoint that is kept.

In: section [health], the held-out part, a Training. Out: the state with what was decided; records, events; the result.
The main rank decides for all. Next: preference.py.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from favor.data.types import Batch, TokenTree
from favor.errors import ConfigError
from favor.losses.table import LossConfig
from favor.model.load import precise
from favor.ranks import from_main
from favor.train import checkpoint
from favor.train.health import (
    SIGNS,
    Figures,
    HealthConfig,
    acted,
    after,
    is_better,
    of_samples,
    out_of_bounds,
    with_likelihood,
)
from favor.train.loop import Training, Turn
from favor.train.notes import duration
from favor.train.session import Health, TrainingState
from favor.train.watch import HeldOut, References, drawn, evaluate

_WARNED = "look at its samples; a smaller optim.lr or a larger loss.beta helps"
# figures of a look in its line, with their format
_SHOWN = {
    "ended": ("ended", ".2f"),
    "length": ("length", ".1f"),
    "repetition": ("repeated", ".2f"),
    "distinct": ("distinct", ".2f"),
    "displacement": ("chosen", "+.3f"),
    "kl": ("KL", ".2f"),
    "accuracy": ("acc", ".2f"),
}


def make_guard(
    config: HealthConfig,
    loss: LossConfig,
    training: Training,
    references: References,
    trees: Sequence[TokenTree],
) -> "Guard":
    """What looks at the model as it trains. loss: [loss]; trees: the held-out part."""
    assert references.exact is not None
    policy, ref, world = training.policy, references.of["eval"], training.session.world
    budget = training.recipe.train.budget
    # [loss] as the recipe has it, so that looks before and behind a likelihood term can be compared
    return Guard(
        config, loss, training, trees, lambda some: evaluate(loss, policy, ref, some, budget, world), references.exact
    )


def result(guard: "Guard", held_out: HeldOut | None, last: TrainingState) -> TrainingState:
    """After the last step: the state that is kept, whose weights the policy then holds; its held-out figures are the last ones."""
    kept = guard.result(last)
    if held_out and (kept.step != last.step or last.health.stopped):
        held_out.at(last.step, of=kept.step)
    return kept


@dataclass(frozen=True)
class Guard:
    """Looks of a run. taught: [loss]; evaluate: held-out figures of some trees; exact: log ref(y|x), nats [R]."""

    config: HealthConfig
    taught: LossConfig
    training: Training
    trees: Sequence[TokenTree]
    evaluate: Callable[[Sequence[TokenTree]], Mapping[str, object]]
    exact: Callable[[Batch], Tensor]

    def figures(self) -> dict[str, float]:
        """Of the policy as it is now: those of `of_samples`, kl, and held-out accuracy, loss and displacement."""
        policy, world = precise(self.training.policy), self.training.session.world
        prompts = [tree.prompt_ids for tree in self.trees[: self.config.prompts]]
        # fixed streams of their own: no look moves another one, or the training
        ids, kl = drawn(policy, self.exact, prompts, self.training.recipe.seed, self.config.tokens, world)
        held = self.evaluate(self.trees[: self.config.held_out])
        found = {name: value for name, value in held.items() if isinstance(value, float)}
        if isinstance(ends := held.get("accuracy_interval"), tuple):
            found["accuracy_high"] = ends[1]
        return of_samples(ids, policy.end_ids) | {"kl": kl.mean} | ({} if kl.se is None else {"kl_se": kl.se}) | found

    def loss(self, state: TrainingState) -> LossConfig:
        """[loss] as this step trains it."""
        weight = self.config.likelihood_weight
        return with_likelihood(self.taught, weight) if state.health.likelihood else self.taught

    def first(self, turn: Turn) -> None:
        """Before the first step, while policy and reference are one: what later looks are compared with, and what one costs.

        Raises ConfigError where the held-out part cannot be measured.
        """
        if turn.state.step:
            return
        now, seconds = self._looked()
        if "accuracy" not in now:
            raise ConfigError(
                "[health]: the held-out part has no pairs to measure accuracy on; give some, or remove it"
            )
        turn.keep(health=Health(start=now, seconds=seconds))
        session, steps = self.training.session, self.training.num_steps
        self._record(0, now, seconds)
        session.event(0, "health_cost", f"{_cost(self.config, steps, seconds)}; the first took {duration(seconds)}")
        for said in _blind(self.config, now):
            session.event(0, "health_blind", f"note: {said}")
        # the step's own speed is without the look
        turn.began = time.monotonic()

    def after(self, turn: Turn) -> None:
        """After a step, where a look is due: measure, decide, record; what is decided is in the turn's state."""
        step, config = turn.state.step, self.config
        last = step == self.training.num_steps
        if step % config.every and not last:
            return
        before = turn.state.health
        now, seconds = self._looked()
        out, better = self._agreed(before, now)
        health = after(config, before, step, now, (out, better)).model_copy(
            update={"seconds": before.seconds + seconds}
        )
        if last:
            # no step is left that these could change
            health = health.model_copy(update={"rate": before.rate, "likelihood": before.likelihood})
        turn.keep(health=health)
        self._record(step, now, seconds)
        done = acted(config, before, health)
        if done or set(out) - set(before.out):
            self._tell(step, {sign: (now[sign], before.start[sign]) for sign in out}, done)

    def result(self, state: TrainingState) -> TrainingState:
        """After the last step: the state whose weights are the result, which the policy then holds.

        Raises CheckpointError where the best look's checkpoint is damaged.
        """
        session, best, config = self.training.session, state.health.best, self.config
        session.event(state.step, "health_cost", f"health: the looks took {duration(state.health.seconds)}")
        if not state.health.stopped and config.kl_budget is None:
            return state
        within = "" if config.kl_budget is None else f" within a KL of {config.kl_budget:g}"
        if best is None:
            said = (
                f"warning: no later look was without a sign{within}, so the model is that of step {state.step} as it is"
            )
            session.event(state.step, "kept", f"{said}; the model it started from may be better", kept=state.step)
            return state
        said = f"kept step {best.step} of {state.step}: the best sound look{within}, by held-out accuracy"
        figures = {"kept": best.step, "accuracy": best.accuracy, "kl": best.kl}
        session.event(state.step, "kept", f"{said} ({best.accuracy:.2f}, KL {best.kl:.2f})", **figures)
        if best.step == state.step:
            return state
        return checkpoint.restore(checkpoint.of_step(session, best.step), self.training.learner, state)

    def _looked(self) -> tuple[dict[str, float], float]:
        began = time.monotonic()
        return self.figures(), time.monotonic() - began

    def _agreed(self, before: Health, now: Figures) -> tuple[tuple[str, ...], bool]:
        """The signs that are out of bounds and whether this is the model to keep, as the main rank sees it."""
        out = out_of_bounds(self.config, now, before.start)
        better = is_better(self.config, now, out, before.best)
        bits = [*(name in out for name in SIGNS), better]
        seen = from_main(sum(bit << place for place, bit in enumerate(bits)), self.training.session.world)
        *signs, better = (bool(seen >> place & 1) for place in range(len(bits)))
        return tuple(name for name, there in zip(SIGNS, signs, strict=True) if there), better

    def _record(self, step: int, now: Figures, seconds: float) -> None:
        session = self.training.session
        session.record({"kind": "health", "step": step, **now, "seconds": seconds})
        parts = [f"{label} {now[name]:{spec}}" for name, (label, spec) in _SHOWN.items() if name in now]
        session.say(f"health at step {step}: {'  '.join(parts)}")

    def _tell(self, step: int, signs: Mapping[str, tuple[float, float]], done: Sequence[str]) -> None:
        seen = ", ".join(
            f"{SIGNS[name].words} {now:.2f} ({'best' if name == 'accuracy' else 'at the start'} {start:.2f})"
            for name, (now, start) in signs.items()
        )
        said = f"warning: health at step {step}: {seen}: {' and '.join(done) or _WARNED}"
        self.training.session.event(step, "health", said, signs=dict(signs), done=list(done))


def _cost(config: HealthConfig, steps: int, seconds: float) -> str:
    looks = config.looks(steps)
    each = f"{config.prompts} samples of up to {config.tokens} tokens and {config.held_out} held-out prompts"
    kept = "; a checkpoint at each that is the best so far" if config.keeps else ""
    return f"health: {looks} looks, one every {config.every} steps, at {each}, about {duration(looks * seconds)} in all{kept}"


def _blind(config: HealthConfig, now: Figures) -> list[str]:
    """What the samples of the start are too short, or too alike, to show."""
    said: list[str] = []
    if now["ended"] == 0 and config.at("ended") != "off":
        said.append(
            f"no sample ends within {config.tokens} tokens at the start, so health.ended sees nothing; raise health.tokens"
        )
    if now["repetition"] + config.repetition >= 1 and config.at("repetition") != "off":
        said.append("samples repeat themselves at the start already, so health.repetition sees nothing")
    return said
