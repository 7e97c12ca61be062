"""What is measured while a policy trains: sampled KL, held-out figures, displacement of the chosen.

In: policy, references and the data. Out: records and warnings. Next: preference.py.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from favor.config import STRICT
from favor.data.prepare import Splits
from favor.data.types import Batch, TokenTree
from favor.eval.divergence import kl_of_samples
from favor.losses.table import LossConfig, beta_of, item_weight, needs, term_sums, terms
from favor.losses.view import Scored
from favor.model.load import Policy, precise
from favor.model.sample import SampleConfig, decode
from favor.ranks import World
from favor.rewards.source import Scorer
from favor.train.reference import Reference
from favor.train.rollout import sampled, scores
from favor.train.session import Session
from favor.train.step import Stepped
from favor.train.twopass import gather

STATS = (
    "pairs",
    "correct",
    "margin",
    "reward_chosen",
    "reward_rejected",
    "logp_chosen_per_token",
    "logp_rejected_per_token",
    "chosen_below_reference",
    "referenced",
    "good",
    "bad",
    "reward_good",
    "reward_bad",
)


# Trees whose log-probs are held at once in the held-out evaluation.
_WINDOW = 128


class WatchConfig(BaseModel):
    """Section [watch]: what is measured while training. 0 switches a cadence off."""

    model_config = STRICT
    eval_every: int = Field(default=0, ge=0)
    kl_every: int = Field(default=0, ge=0)
    kl_prompts: int = Field(default=16, ge=2)
    kl_tokens: int = Field(default=48, ge=1, le=1_000_000)
    displacement_threshold: float = Field(default=0.75, gt=0, le=1)


@dataclass(frozen=True)
class Beside:
    """What stands beside the policy: the reference of every split, live ones where they are needed, a scorer of probes.

    alive: log-probs computed as the policy's are while it trains; measured: the same in float32.
    """

    references: Mapping[str, Reference]
    alive: Callable[[Batch], Tensor] | None
    measured: Callable[[Batch], Tensor] | None
    scorer: Scorer | None


def batch_stats(config: LossConfig, scored: Scored, batch: Batch) -> dict[str, Tensor]:
    """Sums over the pairs and thumbs of a batch (docs/metrics.md defines each name). A margin of exactly 0 counts as half right."""
    pi_R = scored.pi_R.detach()
    per_token_R = pi_R / batch.length_R
    free = not needs(config).reference
    reward_R = beta_of(config) * (per_token_R if free else pi_R - scored.ref_R)
    chosen_P, rejected_P = reward_R[batch.chosen_P], reward_R[batch.rejected_P]
    margin_P, thumb_I = chosen_P - rejected_P, reward_R[batch.thumb_I]
    ones_P = torch.full_like(margin_P, 1.0)
    sums = (
        ones_P.sum(),
        ((margin_P.sign() + 1) / 2).sum(),
        margin_P.sum(),
        chosen_P.sum(),
        rejected_P.sum(),
        per_token_R[batch.chosen_P].sum(),
        per_token_R[batch.rejected_P].sum(),
        *((margin_P.new_zeros(()),) * 2 if free else ((chosen_P < 0).double().sum(), ones_P.sum())),
        batch.good_I.double().sum(),
        (~batch.good_I).double().sum(),
        thumb_I[batch.good_I].sum(),
        thumb_I[~batch.good_I].sum(),
    )
    return dict(zip(STATS, sums, strict=True))


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """The step record's figures from the sums of batch_stats; those without items are left out."""
    found: dict[str, float] = {}
    if pairs := sums["pairs"]:
        found |= {"accuracy": sums["correct"] / pairs} | {name: sums[name] / pairs for name in STATS[2:7]}
    if sums["referenced"]:
        found["chosen_below_reference"] = sums["chosen_below_reference"] / sums["referenced"]
    if sums["good"]:
        found["reward_good"] = sums["reward_good"] / sums["good"]
    if sums["bad"]:
        found["reward_bad"] = sums["reward_bad"] / sums["bad"]
    return (
        found
        | {"pairs": round(pairs)}
        | ({"thumbs": round(sums["good"] + sums["bad"])} if sums["good"] + sums["bad"] else {})
    )


def figures(record: Mapping[str, object]) -> str:
    """The progress line's figures, from a step record."""
    shown = {
        "loss": ("loss", ".4f"),
        "accuracy": ("acc", ".2f"),
        "margin": ("margin", "+.3f"),
        "kl": ("KL", ".2f"),
        "reward": ("reward", ".3f"),
        "pairs_per_s": ("pairs/s", ".2f"),
        "tokens_per_s": ("unique tok/s", ".0f"),
    }
    return "  ".join(f"{label} {record[key]:{spec}}" for key, (label, spec) in shown.items() if key in record)


def probe(
    watch: WatchConfig, seed: int, policy: Policy, beside: Beside, splits: Splits, world: World
) -> dict[str, float]:
    """Sampled KL, and the samples' score, on the first prompts of the held-out part (of the training part without one)."""
    assert beside.measured is not None
    policy = precise(policy)
    name = "eval" if splits.eval else "train"
    trees = splits.by_name[name][: watch.kl_prompts]
    settings = SampleConfig(max_new_tokens=watch.kl_tokens)
    prompts = [tree.prompt_ids for tree in trees]
    ids = sampled(policy, prompts, [seed * 1_000_003 + i for i in range(len(prompts))], settings, world)
    kl = kl_of_samples(policy, beside.measured, prompts, ids, settings, world)
    found = {"kl": kl.mean} | ({} if kl.se is None else {"kl_se": kl.se})
    if beside.scorer is not None:
        texts = [splits.prompts[name][tree.source, tree.row] for tree in trees]
        found["reward"] = float(scores(beside.scorer, texts, decode(policy, ids), world).mean())
    return found


def watch_displacement(
    session: Session, below: deque[tuple[float, float]], done: Stepped, at_step: int, threshold: float
) -> None:
    """Warn when, over the last pairs, too many chosen responses have become less likely than under the reference."""
    was_over = len(below) == below.maxlen and _share(below) > threshold
    below.append((done.sums["chosen_below_reference"], done.sums["referenced"]))
    share = _share(below)
    if len(below) == below.maxlen and share > threshold and not was_over:
        session.event(
            at_step,
            "displacement",
            f"warning: {share:.0%} of the last pairs have a chosen response less likely than under the reference "
            f"(threshold {threshold:.0%}); a larger loss.beta, a smaller optim.lr or SFT on the chosen first holds it up",
        )


def _share(below: deque[tuple[float, float]]) -> float:
    return sum(b for b, _ in below) / max(1.0, sum(n for _, n in below))


def evaluate(
    config: LossConfig, policy: Policy, reference: Reference, trees: Sequence[TokenTree], settings: tuple[int, World]
) -> dict[str, float]:
    """Held-out loss, accuracy and margin, by the training loss, in float32. A coupled loss sees the whole part at once.

    settings: token budget, ranks, which share the work.
    """
    policy = precise(policy)
    window = len(trees) if needs(config).coupled else _WINDOW
    stats: dict[str, float] = dict.fromkeys(STATS, 0.0)
    sums, counts = (torch.zeros(len(terms(config)), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(trees), window):
        scored, batch = gather(config, policy, reference, trees[start : start + window], settings)
        sums += term_sums(config, scored, batch).cpu()
        counts += torch.tensor(item_weight(config, batch), dtype=torch.float64)
        stats = {name: stats[name] + float(value) for name, value in batch_stats(config, scored, batch).items()}
    found = means(stats)
    shown = ("accuracy", "margin", "reward_good", "reward_bad")
    return {"loss": float((sums / counts.clamp_min(1e-12)).sum())} | {k: found[k] for k in shown if k in found}
