"""The first screen of a run that was evaluated: held-out pairs before and after, its own answers, KL and length.

In: a RunRecord with eval.json. Out: Found. Next: verdict.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from favor.eval.intervals import mean_interval, sign_share
from favor.report.found import Found, Light, count, place, side_of, sureness
from favor.report.records import RunRecord
from favor.report.words import between, percent, plural

# a KL beyond which answers are hardly those of the same model, nats an answer; a change of length that is worth a word
_FAR, _LONGER = 20.0, 0.25
# samples this close to the limit were mostly cut
_AT_LIMIT = 0.9


def held_out(run: RunRecord) -> Found:
    """A run with held-out pairs in eval.json, with or without samples."""
    e = run.evaluation
    light, headline = _of_pairs(e)
    return Found(
        light,
        headline,
        changed=[*_right(e), *_paired(run), *_score(e)],
        sure=sureness(e),
        cost=_cost(e),
        wrong=_limits(e),
        next=[*_remedies(run, light), *_after(run)],
    )


def _of_pairs(e: Mapping[str, Any]) -> tuple[Light, str]:
    way, score = side_of(e["accuracy_interval"], 0.5), e.get("score")
    if way == 0:
        return "unsure", f"No clear effect: {plural(e['pairs'], 'held-out pair')} cannot tell this from chance."
    if way < 0:
        return "bad", "It went the wrong way: preferred answers lost against the others on held-out pairs."
    if not score:
        return "good", "It worked on held-out pairs: the model moved towards the answers people preferred."
    better, moved = side_of(score["interval"], 0.0), "moved towards the preferred answers"
    if better > 0:
        return "good", f"It worked: the model {moved}, and its own answers score better."
    if better < 0:
        return "bad", f"Careful: the model {moved}, but its own answers score worse."
    return "unsure", f"The model {moved}; whether its own answers got better is not settled."


def _right(e: Mapping[str, Any]) -> list[str]:
    pairs, gained = e["pairs"], _share(e, "accuracy")
    said = [
        f"Moved the right way on {count(e['accuracy'], pairs)} of {pairs} held-out pairs: there the preferred answer "
        f"gained more than the other ({gained}; chance is 50 %)."
    ]
    if "policy_accuracy" in e and "reference_accuracy" in e:
        now, then = (count(e[f"{side}_accuracy"], pairs) for side in ("policy", "reference"))
        said.append(
            f"Right on {now} of {pairs}: there the preferred answer is now the likelier one ({_share(e, 'policy_accuracy')}); "
            f"before, {then} ({_share(e, 'reference_accuracy')})."
        )
    return said


def _share(e: Mapping[str, Any], name: str) -> str:
    return f"{percent(e[name])}, {between(e[f'{name}_interval'])}"


def _paired(run: RunRecord) -> list[str]:
    """After against before on the same pairs."""
    both = [
        (r["policy_gap"], r["reference_gap"], r["prompt"])
        for r in run.pairs
        if "policy_gap" in r and "reference_gap" in r
    ]
    if not both:
        return []
    after, before, prompt = (np.array(column, np.float64) for column in zip(*both, strict=True))
    shift = mean_interval(sign_share(after) - sign_share(before), clusters=prompt.astype(np.int64), bounds=(-1.0, 1.0))
    ends = "no interval: all alike" if shift.ends is None else between([100 * end for end in shift.ends], "+.0f")
    return [f"On the same pairs that is {100 * shift.mean:+.0f} percentage points ({ends})."]


def _score(e: Mapping[str, Any]) -> list[str]:
    if not (score := e.get("score")):
        return []
    return [
        f"Its own answers score {score['policy']:.3f} on {score['name']}, before {score['reference']:.3f}: "
        f"{score['difference']:+.3f} ({between(score['interval'], '+.3f')})."
    ]


def _cost(e: Mapping[str, Any]) -> list[str]:
    said: list[str] = []
    if kl := e.get("kl"):
        error = "" if kl["se"] is None else f" ± {kl['se']:.2f}"
        times = f"{math.exp(min(kl['mean'], 30.0)):,.0f}" if kl["mean"] < 12 else "over 100,000"
        said.append(
            f"KL {kl['mean']:.2f}{error} nats an answer: an answer of its own is typically {times} times as likely as before."
        )
    if length := e.get("length"):
        change = length["policy"] / max(length["reference"], 1e-9) - 1
        said.append(
            f"Answers have {length['policy']:.1f} tokens, before {length['reference']:.1f} ({100 * change:+.0f} %)."
        )
    return said or ["Not measured: samples were left out."]


def _limits(e: Mapping[str, Any]) -> list[str]:
    said: list[str] = []
    kl, length = e.get("kl"), e.get("length")
    if side_of(e.get("policy_accuracy_interval"), 0.5) < 0:
        said.append("It still finds the other answer likelier on most pairs: the preferred one gained, but not enough.")
    if kl and kl["mean"] > _FAR:
        said.append(
            f"The model moved far (KL above {_FAR:g} nats an answer): look whether its answers still make sense."
        )
    if length and abs(length["policy"] / max(length["reference"], 1e-9) - 1) > _LONGER:
        said.append("The length of its answers changed by more than a quarter: preferences may have taught length.")
    if kl and length and length["policy"] > _AT_LIMIT * kl["max_new_tokens"]:
        said.append(
            f"Most samples reach the limit of {kl['max_new_tokens']} tokens (sample.max_new_tokens) and are cut."
        )
    return said


def _remedies(run: RunRecord, light: Light) -> list[tuple[str, str]]:
    if light == "bad":
        return [(f"favor lint {place(run)}/config.toml", "looks for labels that are the wrong way round")]
    if light == "unsure":
        return [("", "Hold out more pairs, or train longer or with a larger optim.lr, before you believe either way.")]
    return []


def _after(run: RunRecord) -> list[tuple[str, str]]:
    command = (
        f"favor winrate a.model.path={place(run)}/model b.model.path=OTHER prompts=FILE judge.kind=... run=runs/duel"
    )
    asked = (f"favor chat run={place(run)}", "lets you ask it, beside the model it started from")
    return [(command, "has its answers judged against another model's"), asked]
