"""`favor train --dry-run --measure`: the largest pack and an ordinary batch, computed once; from them what the whole run takes.

In: TrainConfig. Out: Measured: peak memory, seconds by part. Nothing is left behind. Next: fit.py.
"""

import io
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console
from torch import Tensor

from favor.data import batches
from favor.data.batches import LoaderState, Order
from favor.data.types import TokenTree
from favor.errors import ConfigError
from favor.guard import file_hash
from favor.losses.table import needs
from favor.model.batched import measured
from favor.model.kept import keepable
from favor.model.logprobs import response_logps
from favor.model.room import peak
from favor.ranks import World
from favor.run import fsync
from favor.train import reference
from favor.train.checkpoint import copy_bytes
from favor.train.loop import Training, make_training, num_steps
from favor.train.moments import kept
from favor.train.optim import STATE_BYTES
from favor.train.preference import Begun, TrainConfig, begin, compares_live, make_references, plan_step
from favor.train.session import OpenSession, Session, in_session
from favor.train.step import step
from favor.train.watch import KlConfig, References, probe

# optimizer batches whose tokens are counted; packs of the ordinary one that are timed
_COUNTED, _TIMED = 256, 8
# trees that a pass without gradients plans together
_WINDOW = 128
# bytes that are written to see how fast that is
_WRITTEN = 64 << 20
# trees of one micro-batch
Pack = Sequence[TokenTree]


class Measured(NamedTuple):
    """What a run takes on this machine.

    peak: bytes of the whole process on a CPU, of the device on a GPU. Of these, state: weights, gradients, optimizer and a
    reference's copy; pack: what is added while the largest pack, of `pack_tokens`, is computed; copy: what a checkpoint is
    written from, which training does without where memory is scarce. longest: tokens of the longest tree. seconds: by part.
    """

    peak: int
    state: int
    pack: int
    copy: int
    pack_tokens: int
    longest: int
    num_steps: int
    num_tokens: int
    seconds: dict[str, float]


class _Counted(NamedTuple):
    """Packs of an optimizer batch, and the tokens of each."""

    packs: Sequence[Pack]
    tokens: list[int]


def measure(config: TrainConfig) -> Measured:
    """Load the model, compute three optimizer steps on the recipe's own data, and extrapolate.

    Raises what training would raise, and ConfigError where several processes run or would share the model.
    """
    if config.ranks.shard != "none":
        raise ConfigError(
            "--measure runs as one process, and ranks.shard splits the model over several; docs/scale.md computes what each holds, "
            "or set ranks.shard=none to measure one that holds everything"
        )

    def run(opened: OpenSession) -> Measured:
        session = opened(Path(place))
        if session.world.size > 1:
            raise ConfigError("--measure: several processes run here; start it as one, without torchrun")
        return _measured(config, session)

    with tempfile.TemporaryDirectory(prefix="favor-measure-") as place:
        return in_session(run, console=Console(file=io.StringIO()))


def _measured(config: TrainConfig, session: Session) -> Measured:
    before = psutil.Process().memory_info().rss
    # a store that is named holds the log-probs of all responses; these are of some
    unstored = config.reference.model_copy(update={"store": None})
    begun = begin(config.model_copy(update={"resume": False, "reference": unstored}), session)
    seconds = {"start": time.time() - psutil.Process().create_time()}
    counted = _counted(begun)
    sizes = {i: batches.computed_tokens(begun.splits.train[i], begun.policy.layout) for i in begun.used}
    longest = max(sizes, key=lambda i: sizes[i])
    parts = _chosen(counted, begun.splits.train[longest], sizes[longest], begun.config.train.budget)
    some = replace(begun.splits, train=_renumbered([tree for part in parts for tree in part]), eval=())
    references = _references(begun._replace(splits=some), session)
    training = make_training(begun.config, begun.policy, [], session)
    num, tokens = num_steps(begun.config.train, len(begun.used)), sum(sum(batch.tokens) for batch in counted)
    tokens = round(num * tokens / len(counted))
    # in the order of a run, as what was freed before shapes what is held later
    seconds |= _passes(begun, references, some.train, tokens, num, stored=_is_stored(config))
    trees = iter(some.train)
    _, worst, ordinary = (_step(begun, training, references, list(islice(trees, len(part)))) for part in parts)
    most = _peak(begun.policy.device)
    copy = copy_bytes(training.learner) if _checkpoints(config, num) else 0
    seconds |= {"steps": num * ordinary.update + tokens * ordinary.per_token} | _saving(config, training, num)
    state = _state(begun, training)
    on_cpu = begun.policy.device.type == "cpu"
    pack, shortest = max(0, most - state - before * on_cpu), min(sizes[longest], worst.largest)
    # the copy lies in the machine's memory
    copy *= on_cpu
    return Measured(most + copy, state, pack, copy, worst.largest, shortest, num, tokens, seconds)


def _counted(begun: Begun) -> list[_Counted]:
    """Optimizer batches of the run, evenly spread where there are many, in the packs that training would cut."""
    config, splits, layout = begun.config.train, begun.splits, begun.policy.layout
    steps = num_steps(config, len(begun.used))
    order = Order(len(begun.used), config.batch_prompts, begun.config.seed, config.shuffle)
    found: list[_Counted] = []
    for indices, _ in islice(order.batches(LoaderState()), 0, steps, max(1, steps // _COUNTED)):
        trees = [splits.train[begun.used[i]] for i in indices]
        packs = [[trees[i] for i in members] for members in batches.plan(trees, layout, config.budget) if members]
        found.append(_Counted(packs, [batches.build(pack, layout).num_tokens for pack in packs]))
    return found


def _chosen(counted: Sequence[_Counted], longest: TokenTree, size: int, budget: int) -> tuple[Pack, Pack, Pack]:
    """Trees of three steps: an ordinary batch, which makes the optimizer's state; the largest pack; an ordinary batch again.

    size: tokens of the longest tree.
    """
    middle = sorted(counted, key=lambda batch: sum(batch.tokens))[len(counted) // 2]
    spread = middle.packs[:: -(-len(middle.packs) // _TIMED)]
    # while the second micro-batch of a step is computed, gradients are there beside it
    behind = [batch for batch in counted if len(batch.tokens) > 1] or counted
    most = max(behind, key=lambda batch: max(batch.tokens[1:], default=batch.tokens[0]))
    second = most.tokens[1:].index(max(most.tokens[1:])) + 1 if len(most.tokens) > 1 else 0
    worst = [tree for i in sorted({0, second}) for tree in most.packs[i]]
    if size > max(most.tokens[0], budget):
        worst = [longest, *most.packs[second]]
    ordinary = [tree for pack in spread for tree in pack]
    return ordinary, worst, ordinary


def _renumbered(trees: Iterable[TokenTree]) -> list[TokenTree]:
    """Trees as if they were all there are: the index of a response is its place in the reference store."""
    begins, found = 0, list[TokenTree]()
    for tree in trees:
        found.append(replace(tree, first_response=begins))
        begins += len(tree.response_ids)
    return found


def _references(begun: Begun, session: Session) -> References:
    identity = reference.identity(begun.policy, begun.config.tokens)
    return make_references(begun.config, begun.policy, begun.splits, identity, session)


class _Took(NamedTuple):
    """A step: seconds of the optimizer's update, and of a token beside it; tokens of its largest micro-batch."""

    update: float
    per_token: float
    largest: int


def _step(begun: Begun, training: Training, references: References, trees: Pack) -> _Took:
    """One optimizer step, as training takes it."""
    learner, clock = training.learner, list[float]()

    def tick(*_: object) -> None:
        clock.append(_now(learner.device))

    handles = (learner.optimizer.register_step_pre_hook(tick), learner.optimizer.register_step_post_hook(tick))
    began = _now(learner.device)
    cut, objective = plan_step(begun.config, begun.policy, references, trees, training.session.world)
    step(learner, cut, objective)
    whole, update = _now(learner.device) - began, clock[1] - clock[0]
    for handle in handles:
        handle.remove()
    tokens = [batch.num_tokens for batch in cut]
    return _Took(update, (whole - update) / sum(tokens), max(tokens))


def _now(device: torch.device) -> float:
    """The clock, after everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _passes(
    begun: Begun, references: References, trees: Pack, tokens: int, steps: int, *, stored: bool
) -> dict[str, float]:
    """Seconds of the reference, of the held-out figures and of the KL probes over the run. stored: the run finds its reference."""
    config, policy, splits = begun.config, begun.policy, begun.splits
    began = _now(policy.device)
    measured(policy, trees, lambda batch: response_logps(policy, batch), config.train.budget)
    rate = (_now(policy.device) - began) / _computed(trees, begun)
    found, held_out = dict[str, float](), _computed(splits.eval, begun)
    live = config.reference.mode == "live"
    if needs(config.loss).reference and not live and not stored:
        every = steps / num_steps(config.train.model_copy(update={"epochs": 1, "max_steps": None}), len(begun.used))
        found["reference"] = rate * (tokens / every + held_out)
    if held_out:
        between = (steps - 1) // config.watch.eval.every if config.watch.eval else 0
        found["held-out figures"] = rate * held_out * (2 + between) * (1 + live)
    if (kl := config.watch.kl) is not None and steps >= kl.every:
        began = _now(policy.device)
        probe(kl, config.seed, policy, references, splits, World())
        found["KL probes"] = (_now(policy.device) - began) * (steps // kl.every)
    if (health := config.health) is not None:
        began, sampling = _now(policy.device), KlConfig(every=1, prompts=health.prompts, tokens=health.tokens)
        probe(sampling, config.seed, policy, references, splits, World())
        each = _now(policy.device) - began + rate * _computed(splits.eval[: health.held_out], begun) * (1 + live)
        found["looks at health"] = each * health.looks(steps)
    return found


def _computed(trees: Pack, begun: Begun) -> int:
    """Tokens of a pass without gradients over these trees."""
    layout, budget = begun.policy.layout, begun.config.train.budget
    windows = (trees[start : start + _WINDOW] for start in range(0, len(trees), _WINDOW))
    return sum(batches.planned_tokens(window, layout, budget) for window in windows)


def _is_stored(config: TrainConfig) -> bool:
    return config.reference.store is not None and Path(config.reference.store).exists()


def _saving(config: TrainConfig, training: Training, steps: int) -> dict[str, float]:
    """Seconds of checkpoints and of the final model, by what a small file takes in the run's place."""
    trained = sum(parameter.numel() for parameter in training.learner.parameters.values())
    size = trained * (4 + _checkpoints(config, steps) * (4 + STATE_BYTES[config.optim.kind]))
    place = Path(config.run).absolute()
    with tempfile.TemporaryDirectory(dir=next(folder for folder in place.parents if folder.is_dir())) as there:
        file = Path(there) / "written"
        began = time.perf_counter()
        file.write_bytes(bytes(_WRITTEN))
        fsync(file)
        file_hash(file)
        return {"saving": (time.perf_counter() - began) * size / _WRITTEN}


def _checkpoints(config: TrainConfig, steps: int) -> int:
    return (steps - 1) // config.save.every if config.save.every else 0


def _state(begun: Begun, training: Training) -> int:
    """Bytes of weights, of gradients, of the optimizer's state, of a reference's copy."""
    config, learner = begun.config, training.learner
    remembered = (t for p in learner.parameters.values() for t in kept(learner.optimizer.state[p]).values())
    weights, gradients = _bytes(begun.policy.model.parameters()), _bytes(learner.parameters.values())
    if config.model.lora is None and compares_live(config):
        halved = begun.policy.weights == "bfloat16" and not config.reference.sync
        weights += weights - (2 * sum(p.numel() for p in keepable(begun.policy.model)) if halved else 0)
    return weights + gradients + _bytes(remembered)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _peak(device: torch.device) -> int:
    """Most bytes held until now: on a GPU of its memory by torch, else by this process."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak()
