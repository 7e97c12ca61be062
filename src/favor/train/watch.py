"""What is measured while a policy trains, where it is asked for: sampled KL, held-out figures.

In: policy, references and the data. Out: figures. Next: preference.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from favor.config import STRICT
from favor.data.splits import Splits
from favor.data.types import Batch, TokenTree
from favor.eval.figures import kl_of_samples
from favor.losses.table import LossConfig, item_weight, needs, term_sums, terms
from favor.model.load import Policy, precise
from favor.model.sample import SampleConfig, decode
from favor.ranks import World
from favor.rewards.source import Scorer
from favor.train.coupled import gather
from favor.train.loggers import ToLogger
from favor.train.reference import Reference
from favor.train.rollout import sampled, scores
from favor.train.stats import STATS, batch_sums, means

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
    """Section [watch.eval]: loss, accuracy and margin on the held-out part."""

    model_config = STRICT
    every: int = Field(ge=1)
    """Steps between evaluations."""


class WatchConfig(BaseModel):
    """Section [watch]: what is measured while training; nothing by default."""

    model_config = STRICT
    kl: KlConfig | None = None
    """The KL probe."""
    eval: HeldOutConfig | None = None
    """Held-out figures."""
    logger: ToLogger = None


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
    settings = SampleConfig(max_new_tokens=config.tokens)
    prompts = [tree.prompt_ids for tree in trees]
    ids = sampled(policy, prompts, [seed * 1_000_003 + i for i in range(len(prompts))], settings, world)
    kl = kl_of_samples(policy, references.exact, prompts, ids, settings, world)
    found = {"kl": kl.mean} | ({} if kl.se is None else {"kl_se": kl.se})
    if references.scorer is not None:
        texts = splits.prompts_of(name, trees)
        found["reward"] = float(scores(references.scorer, texts, decode(policy.tokenizer, ids), world).mean())
    return found


def evaluate(
    config: LossConfig, policy: Policy, reference: Reference, trees: Sequence[TokenTree], budget: int, world: World
) -> dict[str, float]:
    """Held-out loss, accuracy and margin, by the training loss, in float32. A coupled loss sees the whole part at once."""
    policy = precise(policy)
    window = len(trees) if needs(config).coupled else _WINDOW
    totals = dict.fromkeys(STATS, 0.0)
    sums, counts = (torch.zeros(len(terms(config)), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(trees), window):
        scored, batch = gather(config, policy, reference, trees[start : start + window], budget, world)
        sums += term_sums(config, scored, batch).cpu()
        counts += torch.tensor(item_weight(config, batch), dtype=torch.float64)
        totals = {name: totals[name] + float(value) for name, value in batch_sums(config, scored, batch).items()}
    found = means(totals)
    kept = ("accuracy", "margin", "reward_good", "reward_bad")
    return {"loss": float((sums / counts.clamp_min(1e-12)).sum())} | {k: found[k] for k in kept if k in found}
