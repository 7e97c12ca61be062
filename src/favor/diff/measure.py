"""Both models answer some prompts by the same random streams; what each figure is of these answers.

In: two Sides, Asked prompts. Out: values prompt by prompt, and the answers. Next: signs.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from favor.data.prompts import sample_seeds
from favor.data.types import Text, TokenTree
from favor.diff.calls import Form, called
from favor.diff.settings import DiffConfig
from favor.diff.signs import REFUSALS, Wanted, elsewhere, is_json, last_turn, refuses, starts, written
from favor.eval.intervals import Array
from favor.lint.language import identifier
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import response_logps
from favor.model.sample import decode, sample
from favor.rewards.model import Scorer
from favor.train.health import repeated


class Asked(NamedTuple):
    """A prompt: its place among all (which its random streams hang on), its row in the file, what it asks for."""

    place: int
    row: int
    prompt: Text
    wanted: Wanted


class Side(NamedTuple):
    """A model, settled, with the token ids of every prompt by its place, and how its template writes calls."""

    policy: Policy
    prompts: list[tuple[int, ...]]
    form: Form | None


class Answer(NamedTuple):
    """What a model sampled: ids (the end token too), text; what is seen of it, by figure."""

    ids: tuple[int, ...]
    said: tuple[int, ...]
    text: str
    signs: dict[str, float]


class Pair(NamedTuple):
    """The answers of both to a prompt by the same random numbers. log_ratio: log b - log a of b's answer and of a's, nats."""

    asked: Asked
    a: Answer
    b: Answer
    log_ratio: tuple[float, float] | None
    reward: tuple[float, float] | None


class Judge(NamedTuple):
    """What looks at answers: phrases of refusals, the language of a text, a reward; whether KL can be told."""

    refusals: tuple[str, ...]
    language: Callable[[str], str]
    reward: Scorer | None
    kl: bool


def judge_of(config: DiffConfig, sides: Mapping[str, Side], reward: Scorer | None) -> Judge:
    """As the recipe has it."""
    kl = config.tells_kl and comparable(sides)
    return Judge(starts(config.refusals or REFUSALS), identifier(), reward, kl)


def pairs_of(
    config: DiffConfig, sides: Mapping[str, Side], judge: Judge, asked: Sequence[Asked], progress: Callable[[int], None]
) -> list[Pair]:
    """The answers to some prompts, `samples_per_prompt` pairs for each, in their order."""
    each = [one for one in asked for _ in range(config.samples_per_prompt)]
    seeds = sample_seeds(config.seed, [one.place for one in asked], config.samples_per_prompt)
    a, b = (_answers(config, side, judge, each, seeds, progress) for side in sides.values())
    ratios: list[Any] = [None] * len(each)
    if judge.kl:
        ratios = _log_ratios(sides, each, (a, b), config.max_tokens_per_pack)
    rewards: list[Any] = [None] * len(each)
    if judge.reward is not None:
        prompts = [one.prompt for one in each]
        rewards = list(zip(*(judge.reward(prompts, [x.text for x in side]) for side in (a, b)), strict=True))
    return [Pair(*parts) for parts in zip(each, a, b, ratios, rewards, strict=True)]


def comparable(sides: Mapping[str, Side]) -> bool:
    """Whether both read the same tokens: one vocabulary, and the same ids for every prompt."""
    a, b = sides.values()
    return a.prompts == b.prompts and a.policy.tokenizer.get_vocab() == b.policy.tokenizer.get_vocab()


def _answers(
    config: DiffConfig,
    side: Side,
    judge: Judge,
    asked: Sequence[Asked],
    seeds: Sequence[int],
    progress: Callable[[int], None],
) -> list[Answer]:
    policy = side.policy
    ids = sample(policy, [side.prompts[one.place] for one in asked], seeds, config.sample, progress)
    said = [one[:-1] if one[-1] in policy.end_ids else one for one in ids]
    # a template may write calls by special tokens
    raw = policy.tokenizer.batch_decode([list(one) for one in said], skip_special_tokens=False)
    found: list[Answer] = []
    for one, mine, words, text, whole in zip(asked, ids, said, decode(policy.tokenizer, ids), raw, strict=True):
        found.append(
            Answer(mine, words, text, _signs(one, text, judge) | _of_ids(mine, words) | _calls(one, whole, side))
        )
    return found


def _signs(asked: Asked, text: str, judge: Judge) -> dict[str, float]:
    found = written(text)._asdict() | {
        "refused": refuses(text, judge.refusals),
        "language": elsewhere(last_turn(asked.prompt), text, judge.language),
    }
    found |= {"json": is_json(text, asked.wanted.schema)} if asked.wanted.json else {}
    return {name: float(value) for name, value in found.items()}


def _of_ids(ids: tuple[int, ...], said: tuple[int, ...]) -> dict[str, float]:
    ended = float(len(ids) > len(said))
    return {"length": float(len(ids)), "ended": ended, "repetition": repeated(said), "distinct": 1 - repeated(said, 2)}


def _calls(asked: Asked, text: str, side: Side) -> dict[str, float]:
    if asked.wanted.tools is None or side.form is None:
        return {}
    found = called(text, side.form, asked.wanted.tools)
    return {"called": float(found.calls > 0), "bad_call": float(found.bad > 0)}


def _log_ratios(
    sides: Mapping[str, Side], asked: Sequence[Asked], answers: Sequence[Sequence[Answer]], budget: int
) -> list[tuple[float, float]]:
    """Log pi_b - log pi_a of b's answer and of a's, nats a response; each distinct answer to a prompt is computed once."""
    of_place: dict[int, dict[tuple[int, ...], None]] = {}
    for one, *both in zip(asked, *answers, strict=True):
        of_place.setdefault(one.place, {}).update(dict.fromkeys(answer.ids for answer in both))
    a, b = sides.values()
    trees = [TokenTree(a.prompts[place], tuple(ids), (True,) * len(ids), (), 0, 0) for place, ids in of_place.items()]
    logp_a, logp_b = (
        measured(side.policy, trees, lambda batch, policy=side.policy: response_logps(policy, batch), budget)
        for side in (a, b)
    )
    names = [(place, ids) for place, found in of_place.items() for ids in found]
    ratio = dict(zip(names, (logp_b - logp_a).tolist(), strict=True))
    return [(ratio[one.place, y.ids], ratio[one.place, x.ids]) for one, x, y in zip(asked, *answers, strict=True)]


def values_of(pairs: Sequence[Pair], config: DiffConfig) -> dict[str, Array]:
    """Figure -> what it is of each prompt, mean of its samples: [prompts, 2] of a and b; of one figure of both, both columns."""
    found: dict[str, list[tuple[float, float]]] = {}
    each = config.samples_per_prompt
    for start in range(0, len(pairs), each):
        mine = [_figures(pair, config.kl_clip) for pair in pairs[start : start + each]]
        for name in mine[0]:
            a, b = np.mean([one[name] for one in mine], axis=0).tolist()
            found.setdefault(name, []).append((a, b))
    return {name: np.array(rows) for name, rows in found.items()}


def _figures(pair: Pair, clip: float) -> dict[str, tuple[float, float]]:
    found = {name: (value, pair.b.signs[name]) for name, value in pair.a.signs.items() if name in pair.b.signs}
    if pair.reward is not None:
        won = float((np.sign(pair.reward[1] - pair.reward[0]) + 1) / 2)
        found["win"] = (won, won)
    if (ratios := per_token(pair)) is not None:
        kl, reverse = (float(np.clip(ratio, -clip, clip)) for ratio in (ratios[0], -ratios[1]))
        found |= {"kl": (kl, kl), "reverse_kl": (reverse, reverse)}
    return found


def per_token(pair: Pair) -> tuple[float, float] | None:
    """Log b - log a a token, of b's answer and of a's, nats."""
    if pair.log_ratio is None:
        return None
    return pair.log_ratio[0] / len(pair.b.ids), pair.log_ratio[1] / len(pair.a.ids)
