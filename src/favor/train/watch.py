"""What is measured around training: held-out figures before the first and after the last step, sampled KL where it is asked for.

In: policy, references and the data. Out: figures. Next: preference.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from favor.config import STRICT
from favor.data.splits import Splits
from favor.data.types import Batch, TokenTree
from favor.errors import ConfigError
from favor.eval.figures import Divergence, kl_of_samples
from favor.eval.intervals import SHARE, mean_interval, sign_share
from favor.losses.table import LossConfig, item_weight, needs, term_sums, terms
from favor.model.load import Policy, precise
from favor.model.sample import SampleConfig, decode, sampled
from favor.ranks import World, from_main
from favor.rewards.source import Scorer
from favor.train.checkpoint import checkpoints
from favor.train.coupled import gather
from favor.train.loggers import ToLogger
from favor.train.reference import Reference
from favor.train.rollout import scores
from favor.train.session import Session
from favor.train.stats import STATS, batch_sums, means, rewards, usable

# Trees whose log-probs are held at once in the held-out evaluation.
_WINDOW = 128


class KlConfig(BaseModel):
    """Section [watch.kl]: how far the policy has moved, by its own samples."""

    model_config = STRICT
    every: int = Field(ge=1)
    """Steps between probes."""
    prompts: int = Field(default=16, ge=2)
    """Prompts sampled from, the first of the held-out part (of the training part without one)."""
    tokens: int = Field(default=48, ge=1, le=1_000_000)
    """Longest sample."""


class HeldOutConfig(BaseModel):
    """Section [watch.eval]: loss, accuracy and margin on the held-out part, also between the first and the last step."""

    model_config = STRICT
    every: int = Field(ge=1)
    """Steps between evaluations; before the first step and after the last there is one anyway."""


class WatchConfig(BaseModel):
    """Section [watch]: what is measured while training; by default held-out figures at the start and at the end."""

    model_config = STRICT
    kl: KlConfig | None = None
    """The KL probe."""
    eval: HeldOutConfig | None = None
    """Held-out figures every so many steps."""
    logger: ToLogger = None


@dataclass(frozen=True)
class HeldOut:
    """Held-out figures before the first step, after the last and, with `every`, between; lines of metrics.jsonl of kind eval."""

    measure: Callable[[], Mapping[str, object]]
    session: Session
    every: int | None = None

    def at(self, step: int, of: int | None = None) -> None:
        """Measure, keep and say it. of: the step whose weights are measured, where it is another."""
        found = self.measure()
        other = {} if of in (None, step) else {"of_step": of}
        self.session.record({"kind": "eval", "step": step, **other, **found})
        self.session.say(f"held-out at step {step if of is None else of}: {said(found)}")

    def first(self, *, resume: bool) -> None:
        """Before the first step; a run that continues has had its own."""
        left = checkpoints(self.session.folder.checkpoints) if resume else []
        if not from_main(len(left), self.session.world):
            self.at(0)

    def after(self, step: int, total: int) -> None:
        """After a step, where one is due."""
        if step == total or (self.every is not None and step % self.every == 0):
            self.at(step)


def said(found: Mapping[str, object]) -> str:
    """Held-out figures as a line."""
    parts = [f"loss {found['loss']:.4f}"]
    if "accuracy" in found:
        ends = found.get("accuracy_interval")
        within = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if isinstance(ends, tuple | list) else ""
        parts.append(f"acc {found['accuracy']:.2f}{within}")
    return "  ".join(parts + ([f"margin {found['margin']:+.3f}"] if "margin" in found else []))


@dataclass(frozen=True)
class References:
    """What a policy is compared with: the reference of every split; live ones where they are needed; a scorer of probes.

    live: log-probs computed as the policy's are while it trains; exact: the same in float32.
    """

    of: Mapping[str, Reference]
    live: Callable[[Batch], Tensor] | None
    exact: Callable[[Batch], Tensor] | None
    scorer: Scorer | None


def probe(
    config: KlConfig, seed: int, policy: Policy, references: References, splits: Splits, world: World
) -> dict[str, float]:
    """Sampled KL, and the samples' score, on the first prompts of the held-out part (of the training part without one)."""
    assert references.exact is not None
    policy = precise(policy)
    name = "eval" if splits.eval else "train"
    trees = splits.by_name[name][: config.prompts]
    ids, kl = drawn(policy, references.exact, [tree.prompt_ids for tree in trees], seed, config.tokens, world)
    found = {"kl": kl.mean} | ({} if kl.se is None else {"kl_se": kl.se})
    found["ended"] = sum(response[-1] in policy.end_ids for response in ids) / len(ids)
    if references.scorer is not None:
        texts = splits.prompts_of(name, trees)
        found["reward"] = float(scores(references.scorer, texts, decode(policy.tokenizer, ids), world).mean())
    return found


def drawn(
    policy: Policy,
    exact: Callable[[Batch], Tensor],
    prompts: Sequence[Sequence[int]],
    seed: int,
    tokens: int,
    world: World,
) -> tuple[list[tuple[int, ...]], Divergence]:
    """A sample for each prompt, of at most `tokens` tokens, by random streams of its own, and the KL that they show."""
    settings = SampleConfig(max_new_tokens=tokens)
    ids = sampled(policy, prompts, [seed * 1_000_003 + i for i in range(len(prompts))], settings, world)
    return ids, kl_of_samples(policy, exact, prompts, ids, settings, world)


def measurable(config: LossConfig, trees: Sequence[TokenTree], session: Session, *, asked: bool) -> bool:
    """Whether the loss can be taken of the held-out part. asked: by [watch.eval], so that an unusable part is refused.

    Raises ConfigError as `usable` does.
    """
    try:
        usable(config, trees, "the held-out part")
    except ConfigError as error:
        if asked:
            raise
        session.event(0, "held_out", f"note: nothing is measured on held-out data while training: {error}")
        return False
    return True


def evaluate(
    config: LossConfig, policy: Policy, reference: Reference, trees: Sequence[TokenTree], budget: int, world: World
) -> dict[str, object]:
    """Held-out loss, accuracy (with its 95 % interval over prompts) and margin, by the training loss, in float32.

    displacement: mean over pairs of log pi/ref(chosen) a token, nats. A coupled loss sees the whole part at once.
    """
    policy = precise(policy)
    owner = {tree.first_response + i: n for n, tree in enumerate(trees) for i in range(len(tree.response_ids))}
    margins, moved, prompts = [np.empty(0)], [np.empty(0)], list[int]()
    window = len(trees) if needs(config).coupled else _WINDOW
    totals = dict.fromkeys(STATS, 0.0)
    sums, counts = (torch.zeros(len(terms(config)), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(trees), window):
        scored, batch = gather(config, policy, reference, trees[start : start + window], budget, world)
        sums += term_sums(config, scored, batch).cpu()
        counts += torch.tensor(item_weight(config, batch), dtype=torch.float64)
        totals = {name: totals[name] + float(value) for name, value in batch_sums(config, scored, batch).items()}
        reward_R = rewards(config, scored, batch)
        margins.append((reward_R[batch.chosen_P] - reward_R[batch.rejected_P]).cpu().numpy())
        moved.append(((scored.pi_R - scored.ref_R) / batch.length_R)[batch.chosen_P].cpu().numpy())
        prompts += [owner[index] for index in batch.index_R[batch.chosen_P].tolist()]
    found = means(totals)
    kept = ("accuracy", "margin", "reward_good", "reward_bad")
    shown: dict[str, object] = {"loss": float((sums / counts.clamp_min(1e-12)).sum())}
    shown |= {name: found[name] for name in kept if name in found}
    if not prompts:
        return shown
    if needs(config).reference:
        shown["displacement"] = float(np.concatenate(moved).mean())
    interval = mean_interval(sign_share(np.concatenate(margins)), clusters=np.array(prompts), bounds=SHARE)
    return shown | {"accuracy_interval": interval.ends, "pairs": len(prompts), "prompts": len(set(prompts))}
