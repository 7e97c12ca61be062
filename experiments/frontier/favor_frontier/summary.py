"""All points -> one picture: reward and KL of every method and strength with intervals, and who dominates whom.

In: point.json files. Out: frontier.json. Next: page.py.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from favor.eval.intervals import Array
from favor_frontier.point import curve
from favor_frontier.prepare import Places
from favor_frontier.recipe import BUDGETED, FrontierConfig, middle, points

_GRID = 25
# the upper end of the middle 95 %
_UPPER = 0.975
# wrong verdicts among all pairs; the smallest p that is told
_FAMILY, _LEAST = 0.05, 1e-9


@dataclass(frozen=True)
class Cell:
    """One method at one strength: per seed (rows) and held-out prompt (columns), mean reward and mean KL."""

    strength: float
    reward_SP: Array
    kl_SP: Array


def summarise(config: FrontierConfig, places: Places) -> dict[str, Any]:
    """The content of frontier.json, from the points that are there; unfinished ones are counted."""
    found = _records(config, places)
    cells = _cells(config, found)
    start = cells.pop("start", [])
    wanted = points(config)
    return {
        "points": {name: [_point(cell) for cell in members] for name, members in ({"start": start} | cells).items()},
        "dominance": dominance(start, cells),
        "budgets": _budgets(config, found),
        "stability": _stability(config, places),
        "stopped": [{"point": n, "why": r["status"]} for n, r in found.items() if r.get("status", "ok") != "ok"],
        "samples": [
            {"method": r["method"], "strength": r["strength"], "samples": r["samples"]}
            for r in found.values()
            if r["seed"] == config.seeds[0] and "samples" in r
        ],
        "core_seconds": {name: _typical(found, name) for name in cells},
        "finished": sum(p.name in found for p in wanted),
        "wanted": len(wanted),
        "num_prompts": config.evaluate.prompts,
        "samples_per_prompt": config.evaluate.samples,
        "seeds": list(config.seeds),
        "intervals": "crossed",
        "correction": "holm",
    }


def _typical(found: Mapping[str, dict[str, Any]], method: str) -> float:
    """The median over a method's points: one seed's probes do not move it."""
    return float(np.median([r["core_seconds"] for r in found.values() if r["method"] == method and r["share"] == 1]))


def _budgets(config: FrontierConfig, found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What a method reaches for how many calls of the ground truth and seconds of a core, at its middle strength."""
    return [
        _point(_cell(strength, records))
        | {"method": method, "share": share, "calls": records[0]["calls"]}
        | {"core_seconds": float(np.median([r["core_seconds"] for r in records]))}
        for (method, strength, share), records in sorted(_whole(config, found).items())
        if method in BUDGETED and strength == middle(vars(config.methods)[method])
    ]


def dominance(start: Sequence[Cell], frontiers: Mapping[str, Sequence[Cell]]) -> list[dict[str, Any]]:
    """For every two methods, the mean reward difference at equal KL, over the KL range that both reach.

    Each frontier (method -> its strengths, behind the start that all share) is the best reward at or below a KL, straight
    between points. low to high is each pair's own 95 % interval, `together` those that hold for all pairs at once in 95 %
    of pictures (Bonferroni). A method dominates only where the difference stands after Holm's correction over all pairs
    (Holm 1979, Scand. J. Statist. 6): no pair is wrongly called in 95 % of pictures. One seed decides nothing. Where the
    methods have no KL range in common the difference is None.
    """
    influences = {
        (a, b): _influence(start, frontiers[a], frontiers[b]) for a, b in itertools.combinations(frontiers, 2)
    }
    looked_at = sum(influence is not None for influence in influences.values())
    found = [_compared(*names, influence, looked_at) for names, influence in influences.items()]
    for said in _settled([said for said in found if said["p"] is not None and said["wins"] == "neither"]):
        said["wins"] = said["a"] if said["difference"] > 0 else said["b"]
    return found


def _compared(a: str, b: str, influence: tuple[float, Array] | None, looked_at: int) -> dict[str, Any]:
    """A pair of methods, without a verdict. looked_at: how many pairs have a difference."""
    said: dict[str, Any] = {"a": a, "b": b, "difference": None, "low": None, "high": None, "together": None, "p": None}
    if influence is None:
        return said | {"wins": "neither"}
    difference, influence_SP = influence
    reach, wide = crossed_reach(influence_SP), crossed_reach(influence_SP, 1 - _FAMILY / 2 / looked_at)
    said |= {"difference": difference, "low": difference - reach, "high": difference + reach}
    said["together"] = (difference - wide, difference + wide)
    # equal values everywhere have no spread to judge by
    said["p"] = p_value(difference, influence_SP) if reach > 0 else None
    return said | {"wins": "neither" if len(influence_SP) > 1 or reach == 0 else "one seed"}


def _settled(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that stand at a family-wise 5 %: by rising p, up to the first that is above 5 % over the pairs left."""
    kept: list[dict[str, Any]] = []
    for place, said in enumerate(sorted(pairs, key=lambda said: said["p"])):
        if said["p"] > _FAMILY / (len(pairs) - place):
            break
        kept.append(said)
    return kept


def p_value(difference: float, influence_SP: Array) -> float:
    """One less the confidence of the widest `crossed_reach` that leaves out 0; 1e-9 at least."""
    low, high = 0.5, 1 - _LEAST / 2
    if crossed_reach(influence_SP, high) < abs(difference):
        return _LEAST
    # 40 halvings of the confidence
    for _ in range(40):
        upper = (low + high) / 2
        low, high = (upper, high) if crossed_reach(influence_SP, upper) < abs(difference) else (low, upper)
    return 2 * (1 - high)


def envelope(kl: Array, reward: Array, grid: Array) -> Array:
    """Best reward reached at or below each KL of the grid, straight lines between points."""
    order = np.argsort(kl, kind="stable")
    best = np.maximum.accumulate(reward[order])
    return np.interp(grid, kl[order], best)


def _influence(start: Sequence[Cell], a: Sequence[Cell], b: Sequence[Cell]) -> tuple[float, Array] | None:
    """The difference, and what moves it (seeds x prompts), by the delta method: its slope in every mean weighs that mean's values.

    A slope is taken over one standard error to either side, because the frontier has corners.
    """
    values_2CSP = np.array([[cell.kl_SP, cell.reward_SP] for cell in (*start, *a, *b)]).swapaxes(0, 1)
    means_2C = values_2CSP.mean((2, 3))
    of_a, of_b = np.split(np.arange(means_2C.shape[1]), [len(start) + len(a)])
    of_b = np.concatenate([of_a[: len(start)], of_b])

    def between(means_2C: Array) -> float:
        return _at_equal_kl(means_2C[:, of_a], means_2C[:, of_b])

    if min(means_2C[0, of_a].max(), means_2C[0, of_b].max()) <= 0:
        return None
    influence_SP = np.zeros(values_2CSP.shape[2:])
    for place, mean in np.ndenumerate(means_2C):
        values_SP = values_2CSP[place]
        step = np.zeros_like(means_2C)
        step[place] = np.sqrt(sum(values_SP.mean(axis).var() / values_SP.shape[1 - axis] for axis in (0, 1)))
        if step[place] > 0:
            slope = (between(means_2C + step) - between(means_2C - step)) / (2 * step[place])
            influence_SP += slope * (values_SP - mean)
    return between(means_2C), influence_SP


def _at_equal_kl(a_2C: Array, b_2C: Array) -> float:
    """Mean of frontier a less frontier b over the KL range of both, each (KL, reward) of its points."""
    grid = np.linspace(0.0, max(min(a_2C[0].max(), b_2C[0].max()), 0.0), _GRID)
    return float((envelope(a_2C[0], a_2C[1], grid) - envelope(b_2C[0], b_2C[1], grid)).mean())


def _records(config: FrontierConfig, places: Places) -> dict[str, dict[str, Any]]:
    names = [point.name for point in points(config)] + [f"start-0-seed{seed}" for seed in config.seeds]
    paths = {name: places.point(name) / "point.json" for name in names}
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()}


def _whole(
    config: FrontierConfig, found: Mapping[str, dict[str, Any]]
) -> dict[tuple[str, float, float], list[dict[str, Any]]]:
    """(method, strength, share) -> its records, of those for which every seed has figures (a stopped run may have none)."""
    groups: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for record in found.values():
        if "reward" in record:
            groups.setdefault((record["method"], record["strength"], record["share"]), []).append(record)
    return {key: records for key, records in groups.items() if len(records) == len(config.seeds)}


def _cells(config: FrontierConfig, found: Mapping[str, dict[str, Any]]) -> dict[str, list[Cell]]:
    """Method -> its strengths, with all calls."""
    cells: dict[str, list[Cell]] = {}
    for (method, strength, share), records in _whole(config, found).items():
        if share == 1:
            cells.setdefault(method, []).append(_cell(strength, records))
    return cells


def _cell(strength: float, records: Sequence[Mapping[str, Any]]) -> Cell:
    reward_SP, kl_SP = (np.stack([_by_prompt(r["prompt"], r[key]) for r in records]) for key in ("reward", "kl"))
    return Cell(strength, reward_SP, kl_SP)


def _by_prompt(prompts: Sequence[int], values: Sequence[float]) -> Array:
    index = np.asarray(prompts)
    return np.bincount(index, weights=np.asarray(values, np.float64)) / np.bincount(index)


def _point(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = {"strength": cell.strength}
    for name, values_SP in (("reward", cell.reward_SP), ("kl", cell.kl_SP)):
        mean, reach = float(values_SP.mean()), crossed_reach(values_SP)
        seeds = values_SP.mean(1).tolist()
        found[name] = {"mean": mean, "low": mean - reach, "high": mean + reach, "seeds": seeds}
    return found


def _stability(config: FrontierConfig, places: Places) -> list[dict[str, Any]]:
    """KL and reward over training of every DPO and PPO run."""
    shown = [p for p in points(config) if p.method in ("dpo", "ppo", "ppo_true")]
    curves = [
        {"method": p.method, "strength": p.strength, "seed": p.seed, "curve": curve(places.point(p.name))}
        for p in shown
    ]
    return [item for item in curves if item["curve"]]


def crossed_reach(values_SP: Array, upper: float = _UPPER) -> float:
    """Half the interval, by default 95 %, of the mean of `values_SP` [seeds, prompts], every seed having the same prompts.

    reach^2 = t(S-1)^2 V_S + t(P-1)^2 max(V_P - V_SP, 0), with V_S = var(seed means)/S, V_P = var(prompt means)/P and V_SP
    that of seed x prompt noise, which V_S and V_P both hold. Each part has its own t (Howe 1974, JASA 69), which keeps
    95 % with 2 seeds too. It is never less than t(P-1) sqrt(V_P), the reach when the seeds are taken as given; one seed
    says nothing of other seeds, and the reach is then that.
    """
    seeds, prompts = values_SP.shape
    over_prompts = values_SP.mean(0).var(ddof=1) / prompts if prompts > 1 else 0.0
    t_prompts = stdtrit(max(prompts - 1, 1), upper)
    given = float(t_prompts * np.sqrt(over_prompts))
    if seeds == 1:
        return given
    over_seeds = values_SP.mean(1).var(ddof=1) / seeds
    rest_SP = values_SP - values_SP.mean(1, keepdims=True) - values_SP.mean(0) + values_SP.mean()
    noise = (rest_SP**2).sum() / ((seeds - 1) * max(prompts - 1, 1) * seeds * prompts)
    both = stdtrit(seeds - 1, upper) ** 2 * over_seeds + t_prompts**2 * max(over_prompts - noise, 0.0)
    return max(given, float(np.sqrt(both)))
