"""The first screen of a page: what changed, how sure that is, what it cost, whether anything is wrong, what to do next.

In: a RunRecord. Out: Verdict, in plain words. One function for each kind of run; KINDS_OF_RUN says which is asked. Next: words.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from favor.report.found import Found, Light, Verdict, card, count, place, side_of, sureness
from favor.report.held_out import held_out
from favor.report.records import RunRecord
from favor.report.words import between, percent, plural, rounded

# a difference of predicted and true shares that is worth a word
_OFF = 0.02


def verdict(run: RunRecord) -> Verdict:
    """The card of a run, from whatever it left behind."""
    found = found_of(run)
    return card(found._replace(wrong=[*found.wrong, *_told(run)]))


def found_of(run: RunRecord) -> Found:
    """What its kind of run has to say."""
    return next(say(run) for has, say in KINDS_OF_RUN if has(run))


def warnings(run: RunRecord) -> list[str]:
    """What was warned of during the run, each once."""
    said = (str(event["message"]) for event in run.events)
    return list(dict.fromkeys(text for text in said if is_warning(text)))


def is_warning(message: str) -> bool:
    """Whether an event's message is one that somebody should act on."""
    return "warning" in message or "FALL-BACK" in message


def _told(run: RunRecord, most: int = 5) -> list[str]:
    said = [text.removeprefix("warning: ") for text in warnings(run)]
    more = [f"And {plural(len(said) - most, 'warning')} more, under What happened."] if len(said) > most else []
    return [text[:1].upper() + text[1:] + "." * (not text.endswith(".")) for text in said[:most]] + more


def _watched(run: RunRecord) -> Found:
    """A training run that was not evaluated, with held-out figures along the way."""
    first, last = run.evals[0], run.evals[-1]
    said = f"Moved the right way on {percent(last['accuracy'])} of the held-out pairs after step {last['step']}"
    before = f"; after step {first['step']} it was {percent(first['accuracy'])}" if first is not last else ""
    return Found(
        "none",
        "Trained and watched on held-out pairs; how sure the figures are is not known yet.",
        changed=[f"{said}{before} (chance is 50 %)."],
        sure=["There is no interval yet: the command below computes it, with samples and KL."],
        cost=_moved(run),
        next=_evaluated(run),
    )


def _trained(run: RunRecord) -> Found:
    """A training run of which only the training figures are known."""
    first, last = run.steps[0], run.steps[-1]
    names = {
        "accuracy": "accuracy on training pairs",
        "margin": "margin",
        "gap": "reward gap",
        "reward": "mean reward",
        "loss": "loss",
    }
    said = [
        "{}: {} at the first step, {} at the last.".format(text[:1].upper() + text[1:], *rounded(first[key], last[key]))
        for key, text in names.items()
        if key in first and key in last
    ]
    return Found(
        "none",
        f"Trained {plural(last['step'], 'step')}; nothing was measured on held-out examples.",
        changed=said,
        sure=[
            "These are figures of single training steps: they say little about examples that the model has not seen."
        ],
        cost=_moved(run),
        next=_evaluated(run) if "accuracy" in last and "gap" not in last else [],
    )


def _moved(run: RunRecord) -> list[str]:
    found = [step["kl"] for step in run.steps if "kl" in step]
    return [f"KL {found[-1]:.2f} nats an answer at the last probe."] if found else []


def _evaluated(run: RunRecord) -> list[tuple[str, str]]:
    # without pairs of its own it needs some
    data = "" if run.evals or "eval" in run.data else " data=FILE"
    measure = (f"favor eval run={place(run)}{data}", "measures it on held-out pairs, with intervals, samples and KL")
    return [measure, (f"favor chat run={place(run)}", "lets you ask it, beside the model it started from")]


def _reward(run: RunRecord) -> Found:
    """A reward model with held-out calibration."""
    c = run.evaluation["calibration"]
    side = side_of(c["accuracy_interval"], 0.5)
    light: Light = "good" if side > 0 else "bad" if side else "unsure"
    headline = {
        1: "The reward model ranks held-out answers as people did, better than chance.",
        0: f"No clear effect: {plural(c['pairs'], 'held-out pair')} cannot tell this reward model from chance.",
        -1: "The reward model ranks against people: its labels may be the wrong way round.",
    }[side]
    prompts = c.get("prompts", c["pairs"])
    right = f"{percent(c['accuracy'])}, {between(c['accuracy_interval'])}; chance is 50 %"
    return Found(
        light,
        headline,
        changed=[
            f"Right on {count(c['accuracy'], c['pairs'])} of {c['pairs']} held-out pairs ({right}).",
            _confidence(c),
        ],
        sure=sureness({"pairs": prompts}),
        next=[
            (
                f"favor score reward.kind=model reward.path={place(run)}/model data=FILE out=scores.jsonl",
                "scores answers by it",
            )
        ],
    )


def _confidence(c: Mapping[str, Any]) -> str:
    predicted, observed = (
        sum(part["num_pairs"] * part[name] for part in c["curve"]) / c["pairs"] for name in ("predicted", "observed")
    )
    off = predicted - observed
    over = (
        "more sure than it should be"
        if off > _OFF
        else "less sure than it could be"
        if off < -_OFF
        else "as sure as it should be"
    )
    return f"It is {over}: it predicts {percent(predicted)} right where {percent(observed)} are (ECE {c['ece']:.3f})."


def _winrate(run: RunRecord) -> Found:
    """Two sides compared by a judge."""
    w = run.winrate
    a, b = sides_of(w)
    side = side_of(w["win_rate_interval"], 0.5)
    light: Light = "settled" if side else "unsure"
    headline = {
        1: f"{a} wins against {b}.",
        0: f"Neither is better: {a} and {b} cannot be told apart.",
        -1: f"{b} wins against {a}.",
    }[side]
    said = [
        f"{a} wins {percent(w['win_rate'])} ({between(w['win_rate_interval'])}) of {plural(w['pairs'], 'pair')}: "
        f"{w['wins']} won, {w['ties']} tied, {w['losses']} lost."
    ]
    wrong = []
    if w["lc_win_rate"] is not None:
        said.append(
            f"With answers of equal length it would win {percent(w['lc_win_rate'])} ({between(w['lc_win_rate_interval'])})."
        )
        if side and side_of(w["lc_win_rate_interval"], 0.5) != side:
            wrong.append("At equal lengths the winner is not settled: length may have decided.")
    if side_of(w["position_bias_interval"], 0.0):
        wrong.append(
            f"The judge has a position bias of {w['position_bias']:+.2f}; both orders were judged, which takes it out."
        )
    if w["invalid"]:
        wrong.append(f"{plural(w['invalid'], 'pair')} left out: the judge's answer could not be read.")
    more = [("", "Judge more prompts, or more answers a prompt, before you believe either way.")] if not side else []
    return Found(light, headline, said, sureness(w), wrong=wrong, next=more)


def sides_of(winrate: Mapping[str, Any]) -> tuple[str, str]:
    """The names of both sides, as short as they can be told apart."""
    a, b = ([part for part in str(winrate[side]).split("/") if part] or ["?"] for side in ("a", "b"))
    for depth in range(1, max(len(a), len(b)) + 1):
        first, second = "/".join(a[-depth:]), "/".join(b[-depth:])
        if first != second:
            return first, second
    return f"a ({a[-1]})", f"b ({b[-1]})"


def _loop(run: RunRecord) -> Found:
    """Rounds of sampling, ranking and training."""
    first, last = run.rounds[0], run.rounds[-1]
    scores = [each["mean_score"] for each in run.rounds]
    change = scores[-1] - scores[0]
    trend = "rose" if change > 0 else "fell" if change < 0 else "stayed the same"
    return Found(
        "none",
        f"Over {plural(len(scores), 'round')} the mean score of the model's own answers {trend}.",
        changed=[
            f"Mean score {scores[0]:.4g} in round {first['round']}, {scores[-1]:.4g} in round {last['round']} ({change:+.4g}); "
            "each round samples before it trains, so the last training is not in these figures."
        ],
        sure=[
            "Rounds have different prompts, so a part of every step is chance: measure the last model by favor winrate."
        ],
        next=[
            (
                f"favor winrate a.model.path={place(run)}/round-{last['round']}/train/model b.model.path=START prompts=FILE "
                "judge.kind=... run=runs/duel",
                "compares the last model with the first",
            )
        ],
    )


def _nothing(run: RunRecord) -> Found:
    return Found(
        "none", "Nothing was measured yet.", next=[(f"favor eval run={place(run)}", "measures a finished run")]
    )


# the first that fits is asked
KINDS_OF_RUN: Sequence[tuple[Callable[[RunRecord], Any], Callable[[RunRecord], Found]]] = (
    (lambda run: run.winrate, _winrate),
    (lambda run: "accuracy" in run.evaluation, held_out),
    (lambda run: run.evaluation.get("calibration"), _reward),
    (lambda run: run.rounds, _loop),
    (lambda run: run.evals and "accuracy" in run.evals[-1] and "accuracy" in run.evals[0], _watched),
    (lambda run: run.steps, _trained),
    (lambda run: True, _nothing),
)
