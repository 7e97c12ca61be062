"""Figures of members of the family: held-out pairs, KL, reward and length of their own samples, with 95 % intervals over prompts.

In: a policy with its reference, held-out trees, weights. Out: Member, one for each weight. Next: bake.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from favor.data.types import Batch, Text, TokenTree
from favor.errors import NumericsError
from favor.eval.evaluate import Subject
from favor.eval.figures import pairs
from favor.eval.intervals import SHARE, Array, mean_interval, sign_share
from favor.generate.samples import Progress
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import sum_tokens
from favor.model.mixed import family_kl, family_logps
from favor.model.sample import Mix, SampleConfig, decode, sample
from favor.rewards.model import Scorer


class Plan(NamedTuple):
    """What is sampled: prompts (a sample each, of the i-th asked each in turn), their random streams, and how."""

    asked: list[Text]
    prompts: list[tuple[int, ...]]
    seeds: list[int]
    sample: SampleConfig

    @property
    def each(self) -> int:
        """Samples of a prompt."""
        return len(self.prompts) // len(self.asked)

    @property
    def place(self) -> NDArray[np.int64]:
        """The prompt of each sample."""
        return np.repeat(np.arange(len(self.asked)), self.each)


class How(NamedTuple):
    """What scores samples, if anything does; tokens computed at once; who is told, and of which run."""

    score: Scorer | None
    budget: int
    progress: Progress
    run: str


class Member(NamedTuple):
    """One of the family: its figures, and for each prompt its samples as {text, cut, score}."""

    weight: float
    figures: dict[str, Any]
    samples: list[list[dict[str, Any]]]


def plan_of(subject: Subject, sample: SampleConfig, counts: tuple[int, int], seed: int) -> Plan:
    """The first prompts of the held-out data and the streams of `favor eval`. counts: prompts, samples of each."""
    prompts, each = counts
    trees, prompt_of = subject.trees[:prompts], {(tree.source, tree.rows[0]): tree.prompt for tree in subject.texts}
    asked = [prompt_of[tree.source, tree.row] for tree in trees]
    ids = [tree.prompt_ids for tree in trees for _ in range(each)]
    return Plan(asked, ids, [seed * 1_000_003 + i for i in range(len(ids))], sample)


def members(subject: Subject, weights: Sequence[float], plan: Plan, how: How) -> list[Member]:
    """Figures and samples for every weight. Raises NumericsError where log-probs are not finite."""
    on_pairs = _on_pairs(subject, weights, how)
    total = len(weights) * len(plan.prompts)
    found: list[Member] = []
    for weight, known in zip(weights, on_pairs, strict=True):
        ids = _drawn(subject, weight, plan, lambda done: how.progress(f"samples of {how.run}", done, total))
        figures, samples = _on_samples(subject, weight, plan, how, ids)
        found.append(Member(weight, known | figures, samples))
    return found


def _drawn(subject: Subject, weight: float, plan: Plan, progress: Callable[[int], None]) -> list[tuple[int, ...]]:
    """A sample of pi_w for every prompt of the plan; where one model alone decides, from that one."""
    alone: Policy | None = {0.0: subject.reference, 1.0: subject.policy}.get(weight)
    mix = Mix(subject.reference, weight) if alone is None else None
    return sample(alone or subject.policy, plan.prompts, plan.seeds, plan.sample, progress, mix=mix)


def _on_pairs(subject: Subject, weights: Sequence[float], how: How) -> list[dict[str, Any]]:
    """Accuracy and margin of the implicit reward beta log(pi_w / ref), beta being the run's for every weight."""

    def logps(batch: Batch) -> Tensor:
        values = family_logps(subject.reference, subject.policy, batch, (0.0, *weights))
        return torch.stack([sum_tokens(batch, value_E) for value_E in values])

    total = len(subject.trees)
    logp_WR = measured(
        subject.policy,
        subject.trees,
        logps,
        how.budget,
        progress=lambda done: how.progress(f"held-out pairs, {how.run}", done, total),
    )
    if not bool(torch.isfinite(logp_WR).all()):
        raise NumericsError(
            f"{subject.policy.source}: log-probs of the mixed model are not finite (logits of minus infinity cannot be mixed); "
            "choose lambdas=[0, 1], or another model"
        )
    chosen_P, rejected_P, prompt_P = pairs(subject.trees)
    reward_WR = (subject.beta * (logp_WR[1:] - logp_WR[0])).numpy()
    return [_of_margins(reward_R[chosen_P] - reward_R[rejected_P], prompt_P) for reward_R in reward_WR]


def _of_margins(margin_P: Array, prompt_P: NDArray[np.int64]) -> dict[str, Any]:
    accuracy = mean_interval(sign_share(margin_P), clusters=prompt_P, bounds=SHARE)
    return {**accuracy.named("accuracy"), **mean_interval(margin_P, clusters=prompt_P).named("margin")}


def _on_samples(
    subject: Subject, weight: float, plan: Plan, how: How, ids: list[tuple[int, ...]]
) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """KL (nats a response), reward, length (tokens) and share ended of a member's samples; the samples, prompt by prompt."""
    trees = [
        TokenTree(prompt, (response,), (True,), (), first_response=i, row=0)
        for i, (prompt, response) in enumerate(zip(plan.prompts, ids, strict=True))
    ]

    def kl(batch: Batch) -> Tensor:
        return sum_tokens(batch, family_kl(subject.reference, subject.policy, batch, weight))

    texts = decode(subject.policy.tokenizer, ids)
    cut = [one[-1] not in subject.policy.end_ids for one in ids]
    scores = how.score([plan.asked[i] for i in plan.place], texts) if how.score else None
    values: dict[str, tuple[Any, tuple[float, float] | None]] = {
        "kl": (measured(subject.policy, trees, kl, how.budget).numpy(), None),
        "length": ([len(one) for one in ids], None),
        "ended": ([not one for one in cut], SHARE),
    }
    if scores is not None:
        # scores that are all 0 or 1 are shares
        values["reward"] = (scores, SHARE if set(scores) <= {0.0, 1.0} else None)
    figures: dict[str, Any] = {}
    for name, (value, bounds) in values.items():
        figures |= mean_interval(np.array(value, np.float64), clusters=plan.place, bounds=bounds).named(name)
    said = [
        {"text": text, "cut": one, "score": score}
        for text, one, score in zip(texts, cut, scores or [None] * len(texts), strict=True)
    ]
    return figures, [said[i : i + plan.each] for i in range(0, len(said), plan.each)]
