"""Coverage of every interval that favor prints, by simulation: how often a 95 % interval holds the true value.

Run as a program it prints the table: `cd tests && python -W ignore interval_coverage.py [TRIALS]`. Every interval comes from the function
that the product calls, so clusters, bounds and pairing are as in the figures that people see.
"""

import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from favor_frontier import summary
from favor_frontier.summary import Cell
from scipy.stats import norm

from favor.audit.figures import Judged, length_figures, self_figures
from favor.audit.powered import powered
from favor.diff.figures import ERROR, Values, measured
from favor.eval import figures
from favor.eval.evaluate import score_samples
from favor.eval.figures import PairFigures, calibrate
from favor.eval.intervals import mean_interval, t_quantile
from favor.model.sample import SampleConfig
from favor.value.noise import mixture
from favor.winrate import stats as winstats
from favor.winrate.stats import JudgedPair, win_figures

# name of the interval -> (its ends or None, the true value)
Trial = dict[str, tuple[tuple[float, float] | None, float]]


class Setting(NamedTuple):
    """Where intervals are tried: a trial's draw, what it costs (trials are divided by it), and what is promised per interval."""

    name: str
    trial: Callable[[np.random.Generator], Trial]
    cost: int = 1
    # where normal theory does not hold: interval -> the coverage that docs/metrics.md owns up to
    less: dict[str, float] | None = None


class Covered(NamedTuple):
    """One row of the table."""

    interval: str
    setting: str
    truth: float
    coverage: float
    error: float
    width: float
    without: float
    promised: float


def sizes(rng: np.random.Generator, prompts: int, each: int) -> np.ndarray:
    """The prompt of every pair: `each` pairs a prompt, or with 0 of very unequal numbers."""
    counts = rng.choice([1, 1, 1, 2, 3, 6, 10], prompts) if each == 0 else np.full(prompts, each)
    return np.repeat(np.arange(prompts), counts)


def latent(rng: np.random.Generator, prompt: np.ndarray, share: float, within: float) -> np.ndarray:
    """Normal gaps, of which `share` are positive, with a correlation of `within` inside a prompt."""
    shared = rng.normal(size=prompt.max() + 1)[prompt]
    return norm.ppf(share) + np.sqrt(within) * shared + np.sqrt(1 - within) * rng.normal(size=len(prompt))


def pairs(share: float, prompts: int, each: int, within: float):
    """favor eval on held-out pairs; favor reward and favor score on the same gaps."""

    def trial(rng: np.random.Generator) -> Trial:
        prompt = sizes(rng, prompts, each)
        margin, gap = latent(rng, prompt, share, within), latent(rng, prompt, 1 - share, within)
        found = PairFigures(margin, gap, gap, prompt, 0.0, []).as_json()
        return {
            "accuracy": (found["accuracy_interval"], share),
            "reference accuracy": (found["reference_accuracy_interval"], 1 - share),
            "margin": (found["margin_interval"], norm.ppf(share)),
            "calibration accuracy": (calibrate(latent(rng, prompt, share, within), prompt).accuracy_interval, share),
        }

    return trial


class Duel(NamedTuple):
    """Judged pairs: quality and its deviation over prompts, pull of the first place, length effect and mean, share of ties."""

    quality: float
    spread: float = 0.0
    first: float = 0.0
    length: float = 0.0
    longer: float = 0.0
    ties: float = 0.0

    def draw(self, rng: np.random.Generator, prompts: int, each: int) -> list[JudgedPair]:
        prompt = sizes(rng, prompts, each)
        difference = np.round(rng.normal(40 * self.longer, 40, len(prompt)))
        quality = self.quality + self.spread * rng.normal(size=prompts)[prompt]
        quality = quality + self.length * np.tanh(difference / 40)
        verdicts = []
        for sign in (1, -1):
            wins = rng.random(len(prompt)) < 1 / (1 + np.exp(-(quality + sign * self.first)))
            verdict = np.where(wins == (sign == 1), "A", "B")
            verdicts.append(np.where(rng.random(len(prompt)) < self.ties, "tie", verdict))
        rows = zip(prompt, *verdicts, difference, strict=True)
        return [JudgedPair(int(p), str(a), str(b), 500 + int(d), 500) for p, a, b, d in rows]


@lru_cache
def true_rates(duel: Duel) -> winstats.WinFigures:
    """What endless data would say."""
    return win_figures(duel.draw(np.random.default_rng(1), 30_000, 1))


def duels(duel: Duel, prompts: int, each: int):
    """favor winrate."""

    def trial(rng: np.random.Generator) -> Trial:
        found, true = win_figures(duel.draw(rng, prompts, each)), true_rates(duel)
        return {
            "win rate": (found.win_rate_interval, true.win_rate),
            "length-controlled win rate": (found.lc_win_rate_interval, true.lc_win_rate),
            "position bias": (found.position_bias_interval, true.position_bias),
        }

    return trial


def scores(prompts: int, each: int, draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray], mean: float):
    """favor eval with a scorer: the policy draws from `draw` + 0.1, or with zero-one scores (`draw` gives chances) from it."""

    def trial(rng: np.random.Generator) -> Trial:
        shared = draw(rng, (prompts, 1))
        chance = mean > 0
        sides = [
            (rng.random((prompts, each)) < shared) * 1.0 if chance else shared + draw(rng, (prompts, each)) + 0.1 * side
            for side in (0, 1)
        ]
        records = [{"reference": list(a), "policy": list(b)} for a, b in zip(*sides, strict=True)]
        found = score_samples(records, ("score", lambda texts: texts))
        gap = 0.0 if chance else 0.1
        return {
            "policy score": (found["policy_interval"], mean + gap),
            "reference score": (found["reference_interval"], mean),
            "score difference": (found["interval"], gap),
        }

    return trial


def divergences(prompts: int, each: int, shape: float):
    """Sampled KL: log-ratios of mean 4 and standard deviation 3 and the skewness of a gamma; mean +- t s.e."""

    def trial(rng: np.random.Generator) -> Trial:
        parts = [rng.gamma(shape / 2, 1, size) for size in ((prompts, 1), (prompts, each))]
        ratio = torch.from_numpy(4 + 3 * ((parts[0] + parts[1]) - shape) / np.sqrt(shape)).ravel()
        before, figures.log_ratios = figures.log_ratios, lambda *_: ratio
        try:
            asked = [(i,) for i in range(prompts) for _ in range(each)]
            found = figures.kl_of_samples(None, None, asked, [(0,)] * len(asked), SampleConfig())
        finally:
            figures.log_ratios = before
        reach = t_quantile(np.ones(prompts)) * found.se
        return {"KL, mean ± t s.e.": ((found.mean - reach, found.mean + reach), 4.0)}

    return trial


# (KL, reward) of a method's points, much as in docs/log.md
METHODS = {
    "a": [(3.8, 0.79), (8.4, 0.85), (17.9, 0.855)],
    "b": [(2.4, 0.735), (5.1, 0.81), (13.0, 0.854)],
    "c": [(5.5, 0.72), (6.5, 0.75), (8.0, 0.79)],
}
START = (0.0, 0.55)


class Spread(NamedTuple):
    """Standard deviations: of the reward over seeds, prompts and seed x prompt; of log KL over seeds."""

    seed: float
    prompt: float
    noise: float
    kl_seed: float


def frontiers(seeds: int, prompts: int, spread: Spread):
    """favor frontier: seeds crossed with prompts, both partly shared by the methods. One seed is its own truth."""

    def cell(rng, kl, reward, shared):
        seed = np.zeros((seeds, 1)) if kl == 0 else spread.seed * (0.3 * shared[0] + 0.95 * rng.normal(size=(seeds, 1)))
        scale = np.exp(spread.kl_seed * rng.normal(size=(seeds, 1)) - spread.kl_seed**2 / 2)
        if seeds == 1:
            seed, scale = 0 * seed, np.ones((1, 1))
        noise = rng.normal(size=(2, seeds, prompts))
        reward_SP = reward + seed + spread.prompt * (1 - (reward - 0.55)) * shared[1] + spread.noise * noise[0]
        return Cell(kl, reward_SP, kl * scale * (1 + 0.1 * shared[2] + 0.45 * noise[1]))

    def trial(rng: np.random.Generator) -> Trial:
        shared = rng.normal(size=(seeds, 1)), *rng.normal(size=(2, 1, prompts))
        start = [cell(rng, *START, shared)]
        cells = {name: [cell(rng, *point, shared) for point in points] for name, points in METHODS.items()}
        point = summary._point(cells["a"][1])
        found: Trial = {
            f"frontier {name}": ((point[name]["low"], point[name]["high"]), true)
            for name, true in zip(("kl", "reward"), METHODS["a"][1], strict=True)
        }
        for pair in summary.dominance(start, cells):
            true = summary._at_equal_kl(*(np.array([START, *METHODS[pair[side]]]).T for side in "ab"))
            found[f"frontier difference, {pair['a']} - {pair['b']}"] = ((pair["low"], pair["high"]), true)
        return found

    return trial


class Asked(NamedTuple):
    """Labels of people on some pairs, a judge's verdicts on all: the share of wins, the judge's accuracy, its pull to a, ties."""

    share: float
    accuracy: float
    pull: float = 0.0
    ties: float = 0.0

    def draw(self, rng: np.random.Generator, prompts: int, each: int) -> tuple[np.ndarray, ...]:
        """People's verdicts, the judge's, the prompts; half of what makes a win is the prompt's."""
        prompt = sizes(rng, prompts, each)
        human = (latent(rng, prompt, self.share, 0.5 if each != 1 else 0.0) > 0) * 1.0
        human = np.where(rng.random(len(human)) < self.ties, 0.5, human)
        judge = np.where(rng.random(len(human)) < self.accuracy, human, 1 - human)
        return human, np.where(rng.random(len(human)) < self.pull, 1.0, judge), prompt


def stretched(asked: Asked, prompts: int, each: int, labels: int):
    """favor audit: a win rate from a handful of labels and many verdicts."""

    def trial(rng: np.random.Generator) -> Trial:
        human, judge, prompt = asked.draw(rng, prompts, each)
        shown = np.full(len(human), np.nan)
        places = rng.permutation(len(human))[:labels]
        shown[places] = human[places]
        both, true = powered(judge, shown, prompt).both, asked.share * (1 - asked.ties) + asked.ties / 2
        return {"prediction-powered win rate": ((both.low, both.high), true)}

    return trial


def biases(prompts: int, each: int, length: float, own: float):
    """favor audit: pulls on verdicts beside people's, who prefer longer answers and the judge's own."""

    def trial(rng: np.random.Generator) -> Trial:
        prompt = sizes(rng, prompts, each)
        mine = rng.choice([-1.0, 1.0], len(prompt))
        longer = np.tanh(rng.normal(size=len(prompt)))
        human = (0.8 * longer + 0.3 * mine + rng.normal(size=len(prompt)) > 0) * 1.0
        chance = 1 / (1 + np.exp(-(1.5 * (2 * human - 1) + length * longer + own * mine)))
        judge = (rng.random((2, len(prompt))) < chance).mean(0)
        votes = np.stack([human, np.zeros_like(human), 1 - human], 1)
        found = Judged(judge, human, votes, longer, mine, prompt, np.zeros(len(prompt), bool))
        return {
            "length bias": (length_figures(found)["length_bias_interval"], length),
            "self-preference": (self_figures(found)["self_bias_interval"], own),
        }

    return trial


class Peeked(NamedTuple):
    """A figure of favor diff by prompt: its name, what draws (a, b), the bounds of its values, the true change."""

    figure: str
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    bounds: tuple[float, float]
    truth: float


def peeks(peeked: Peeked, prompts: int, every: int, naive: bool = False):
    """favor diff, looked at after every batch: what all looks together leave. naive: by the t interval of each look."""

    def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        if naive:
            ends = mean_interval(b - a).ends
            return (-np.inf, np.inf) if ends is None else ends
        return measured(peeked.figure, Values(a, b), peeked.bounds, None, ERROR).interval

    def trial(rng: np.random.Generator) -> Trial:
        a, b = peeked.draw(rng, prompts)
        low, high = np.array([interval(a[:n], b[:n]) for n in range(every, prompts + 1, every)]).T
        what = "t interval, ever outside" if naive else "confidence sequence, ever outside"
        return {what: ((low.max(), high.min()), peeked.truth)}

    return trial


def shares(a: float, b: float, kept: float = 0.0):
    """Whether an answer has something: of a and of b, of which this share of prompts is decided by the prompt alone."""

    def draw(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
        alike, chance = rng.random(prompts) < kept, rng.random((2, prompts))
        return (chance[0] < a) * 1.0, (np.where(alike, chance[0], chance[1]) < np.where(alike, a, b)) * 1.0

    return draw


def lengths(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of answers cut at 64, the longer ones at the limit: b has more by 64 (3/5 - 2/5)."""
    return 64 * rng.beta(0.8, 1.2, prompts), 64 * rng.beta(1.2, 0.8, prompts)


def ratios(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Clipped log-ratios a token: mostly near 0, a few at the clip; mean 0.9 (2/12 - 0.1) + 0.1."""
    found = np.where(rng.random(prompts) < 0.1, 1.0, rng.beta(2, 10, prompts) - 0.1)
    return found, found


PEEKED = {
    "refusals 0.02 to 0.04": Peeked("refused", shares(0.02, 0.04), (0.0, 1.0), 0.02),
    "half of the answers, nothing changes": Peeked("lists", shares(0.5, 0.5), (0.0, 1.0), 0.0),
    "ends 0.9 to 0.7, half of the prompts alike": Peeked("ended", shares(0.9, 0.7, 0.5), (0.0, 1.0), -0.1),
    "lengths at both ends": Peeked("length", lengths, (0.0, 64.0), 64 * 0.2),
    "KL a token, skewed": Peeked("kl", ratios, (-1.0, 1.0), 0.9 * (2 / 12 - 0.1) + 0.1),
}
# why a usual interval does not do: it promises nothing where one looks so often
NAIVE = tuple(
    Setting(
        f"200 prompts, looked at every 10, {name}",
        peeks(one, 200, 10, naive=True),
        5,
        {"t interval, ever outside": 0.0},
    )
    for name, one in PEEKED.items()
    if one.figure != "kl"
)


def mistaken(share: float, prompts: int, each: int, known: float):
    """favor value: a share of the labels flipped by chance. known: the deviation of how well the heads tell the answers apart."""

    def trial(rng: np.random.Generator) -> Trial:
        prompt = np.repeat(np.arange(prompts), each)
        logit = known * latent(rng, prompt, 0.5, 0.3)
        right = np.where(rng.random(len(prompt)) < 1 / (1 + np.exp(-logit)), 1.0, -1.0)
        found = mixture((logit * right * np.where(rng.random(len(prompt)) < share, -1.0, 1.0))[None], prompt)
        return {"share of wrong labels": ((found.low, found.high), share)}

    return trial


def normal(rng, size):
    """Scores without bounds."""
    return rng.normal(0, 0.2, size)


def skewed(rng, size):
    """Chances of a good text: bunched below 1, as the demo's scores are after training."""
    return rng.beta(6, 1.2, size) - 6 / 7.2


def heavy(rng, size):
    """Log-normal: skewness 6, a few values carry the mean."""
    return np.exp(rng.normal(size=size)) - np.exp(0.5)


def chances(rng, size):
    """A pass rate that differs by prompt."""
    return rng.beta(9, 1, size)


def settings() -> Iterator[Setting]:
    """All settings of the table."""
    for share, prompts, each, within in (
        (0.8, 12, 1, 0.0),
        (0.99, 12, 1, 0.0),
        (0.5, 20, 3, 0.3),
        (0.8, 80, 1, 0.0),
        (0.95, 80, 3, 0.3),
        (0.99, 80, 1, 0.0),
        (0.8, 80, 0, 0.3),
        (0.99, 300, 0, 0.3),
    ):
        number = f"{each} a prompt" if each else "1 to 10 a prompt"
        name = f"{prompts} prompts, {number}, right {share:g}, within-prompt correlation {within:g}"
        yield Setting(name, pairs(share, prompts, each, within))
    for prompts, each, name, duel in (
        (12, 1, "fair judge", Duel(0)),
        (12, 1, "a wins nearly always", Duel(4.6)),
        (20, 2, "two in five tied", Duel(0.8, ties=0.4, spread=0.7)),
        (60, 1, "longer wins, a longer", Duel(0.5, length=1.5, longer=0.5)),
        (60, 1, "a much longer, longer wins", Duel(0, length=2, longer=1.5)),
        (20, 1, "a much longer, longer wins", Duel(0, length=2, longer=1.5)),
        (80, 1, "always the first", Duel(0, first=8)),
        (80, 4, "first preferred, prompts differ", Duel(0.8, first=0.5, spread=1)),
        (200, 1, "a wins nearly always", Duel(4.6)),
    ):
        less = {"length-controlled win rate": 0.88} if duel.longer > 1 else {}
        yield Setting(f"{prompts} prompts, {each} a prompt, {name}", duels(duel, prompts, each), 5, less)
    for asked, prompts, each, labels in (
        (Asked(0.6, 0.85), 300, 1, 10),
        (Asked(0.5, 0.9), 300, 1, 20),
        (Asked(0.6, 0.8, pull=0.2), 300, 1, 20),
        (Asked(0.6, 0.98), 300, 1, 20),
        (Asked(0.9, 0.9), 300, 1, 20),
        (Asked(0.6, 0.85, pull=0.1, ties=0.3), 300, 1, 20),
        (Asked(0.6, 0.9), 40, 1, 20),
        (Asked(0.6, 0.9), 60, 5, 20),
        (Asked(0.6, 0.9, pull=0.1), 300, 1, 50),
        (Asked(0.95, 0.95), 300, 1, 50),
        (Asked(0.6, 0.9), 60, 0, 50),
        (Asked(0.6, 0.85, pull=0.1), 20, 10, 50),
    ):
        number = f"{each} a prompt" if each else "1 to 10 a prompt"
        judge = f"judge right {asked.accuracy:g}, pull {asked.pull:g}, ties {asked.ties:g}"
        name = f"{labels} labels of {prompts} prompts, {number}, {asked.share:g} wins, {judge}"
        yield Setting(name, stretched(asked, prompts, each, labels), 5)
    for prompts, each, length, own in ((30, 1, 0.0, 0.0), (60, 1, 1.0, 0.5), (40, 3, 0.5, 0.0), (200, 1, 0.0, 1.0)):
        name = f"{prompts} labelled prompts, {each} a prompt, length {length:g}, own {own:g}"
        yield Setting(name, biases(prompts, each, length, own), 5)
    for prompts, every in ((40, 4), (200, 10)):
        promised = {"confidence sequence, ever outside": 0.95}
        for name, one in PEEKED.items():
            yield Setting(
                f"{prompts} prompts, looked at every {every}, {name}", peeks(one, prompts, every), 5, promised
            )
    yield from mistakes()
    for prompts, each in ((12, 2), (20, 4), (80, 2)):
        yield Setting(f"{prompts} prompts x {each}, normal", scores(prompts, each, normal, 0.0))
        yield Setting(f"{prompts} prompts x {each}, skewed", scores(prompts, each, skewed, 0.0))
        yield Setting(f"{prompts} prompts x {each}, passed or not", scores(prompts, each, chances, 0.9))
    less = dict.fromkeys(("policy score", "reference score"), 0.88)
    yield Setting("20 prompts x 1, log-normal", scores(20, 1, heavy, 0.0), less=less)
    for prompts, each, shape in ((12, 2, 8.0), (20, 2, 8.0), (20, 4, 2.0), (64, 1, 2.0)):
        name = f"{prompts} prompts x {each}, skewness {2 / np.sqrt(shape):.1f}"
        less = {"KL, mean ± t s.e.": 0.91} if prompts < 30 and shape < 4 else {}
        yield Setting(name, divergences(prompts, each, shape), less=less)
    for seeds, prompts, spread in (
        (1, 64, Spread(0.0, 0.05, 0.13, 0.0)),
        (2, 64, Spread(0.02, 0.05, 0.13, 0.25)),
        (3, 64, Spread(0.0, 0.05, 0.13, 0.0)),
        (3, 64, Spread(0.008, 0.05, 0.13, 0.15)),
        (3, 64, Spread(0.02, 0.05, 0.13, 0.25)),
        (3, 64, Spread(0.03, 0.1, 0.1, 0.25)),
        (3, 16, Spread(0.008, 0.05, 0.13, 0.15)),
        (5, 64, Spread(0.02, 0.05, 0.13, 0.25)),
    ):
        spreads = f"deviations: seed {spread.seed:g}, prompt {spread.prompt:g}, noise {spread.noise:g}, log KL {spread.kl_seed:g}"
        yield Setting(
            f"{seeds} seed{'s' * (seeds > 1)} x {prompts} prompts, {spreads}", frontiers(seeds, prompts, spread), 5
        )


def mistakes() -> Iterator[Setting]:
    """Those of favor value."""
    for share, prompts, each, known in ((0.0, 300, 1, 3.0), (0.1, 150, 2, 3.0), (0.2, 300, 1, 1.5), (0.4, 100, 4, 3.0)):
        name = f"{share:.0%} wrong, {prompts} prompts x {each}, heads know {known:g}"
        yield Setting(name, mistaken(share, prompts, each, known), 5)


SETTINGS = tuple(settings())


def measure(setting: Setting, trials: int) -> list[Covered]:
    """How often each interval of a setting holds the truth, with the Monte-Carlo error of that share."""
    rng = np.random.default_rng(0)
    drawn = [setting.trial(rng) for _ in range(max(trials // setting.cost, 2))]
    found = []
    for name, (_, truth) in drawn[0].items():
        ends = [ends for trial in drawn if (ends := trial[name][0]) is not None]
        low, high = np.array(ends).T
        coverage = float(((low <= truth) & (truth <= high)).mean())
        error = float(np.sqrt(max(coverage * (1 - coverage), 1 / len(ends)) / len(ends)))
        promised = (setting.less or {}).get(name, 0.93)
        without = 1 - len(ends) / len(drawn)
        found.append(Covered(name, setting.name, truth, coverage, error, float((high - low).mean()), without, promised))
    return found


def main():
    """Print the table as Markdown."""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
    print(
        "| interval | setting | truth | coverage ± Monte-Carlo error | mean width | promised |\n|---|---|---|---|---|---|"
    )
    worst = 1.0
    for row in sorted(
        (row for setting in (*SETTINGS, *NAIVE) for row in measure(setting, trials)), key=lambda row: row.interval
    ):
        mark = "" if row.coverage >= row.promised else " **below**"
        none = f" (no interval in {row.without:.1%})" if row.without else ""
        print(
            f"| {row.interval} | {row.setting} | {row.truth:.3f} | {row.coverage:.3f} ± {row.error:.3f}{mark}{none} "
            f"| {row.width:.3f} | {row.promised:g} |"
        )
        worst = min(worst, row.coverage if row.promised else 1.0)
    print(f"\nsmallest coverage {worst:.3f}")


if __name__ == "__main__":
    main()
