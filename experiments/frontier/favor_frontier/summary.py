"""All points -> one picture: reward and KL of every method and strength with intervals, and who dominates whom.

In: point.json files. Out: frontier.json. Next: page.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from favor.eval.intervals import Array, Interval
from favor_frontier.point import curve
from favor_frontier.prepare import Places
from favor_frontier.recipe import FrontierConfig, points

_GRID = 25
# the upper end of the middle 95 %
_UPPER = 0.975


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
        "stability": _stability(config, places),
        "stopped": [{"point": n, "why": r["status"]} for n, r in found.items() if r.get("status", "ok") != "ok"],
        "samples": [
            {"method": r["method"], "strength": r["strength"], "samples": r["samples"]}
            for r in found.values()
            if r["seed"] == config.seeds[0] and "samples" in r
        ],
        "seconds": {name: sum(r["seconds"] for r in found.values() if r["method"] == name) for name in cells},
        "finished": sum(p.name in found for p in wanted),
        "wanted": len(wanted),
        "num_prompts": config.evaluate.prompts,
        "samples_per_prompt": config.evaluate.samples,
        "seeds": list(config.seeds),
        "intervals": "crossed",
    }


def dominance(start: Sequence[Cell], frontiers: Mapping[str, Sequence[Cell]]) -> list[dict[str, Any]]:
    """For every two methods, the mean reward difference at equal KL, over the KL range that both reach.

    Each frontier (method -> its strengths, behind the start that all share) is the best reward at or below a KL, straight
    between points. A method dominates when the 95 % interval of the difference is above 0; one seed decides nothing.
    Where the methods have no KL range in common the difference is None.
    """
    names, found = list(frontiers), []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            difference, low, high = _difference(start, frontiers[a], frontiers[b]) or (None, None, None)
            verdict = "neither"
            if low is not None and high is not None and low < high:
                verdict = a if low > 0 else b if high < 0 else "neither"
                verdict = verdict if len(frontiers[a][0].reward_SP) > 1 else "one seed"
            found.append({"a": a, "b": b, "difference": difference, "low": low, "high": high, "wins": verdict})
    return found


def envelope(kl: Array, reward: Array, grid: Array) -> Array:
    """Best reward reached at or below each KL of the grid, straight lines between points."""
    order = np.argsort(kl, kind="stable")
    best = np.maximum.accumulate(reward[order])
    return np.interp(grid, kl[order], best)


def _difference(start: Sequence[Cell], a: Sequence[Cell], b: Sequence[Cell]) -> Interval | None:
    """The difference with its interval by the delta method: its slope in every mean weighs that mean's values.

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
    difference, reach = between(means_2C), crossed_reach(influence_SP)
    return Interval(difference, difference - reach, difference + reach)


def _at_equal_kl(a_2C: Array, b_2C: Array) -> float:
    """Mean of frontier a less frontier b over the KL range of both, each (KL, reward) of its points."""
    grid = np.linspace(0.0, max(min(a_2C[0].max(), b_2C[0].max()), 0.0), _GRID)
    return float((envelope(a_2C[0], a_2C[1], grid) - envelope(b_2C[0], b_2C[1], grid)).mean())


def _records(config: FrontierConfig, places: Places) -> dict[str, dict[str, Any]]:
    names = [point.name for point in points(config)] + [f"start-0-seed{seed}" for seed in config.seeds]
    paths = {name: places.point(name) / "point.json" for name in names}
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()}


def _cells(config: FrontierConfig, found: Mapping[str, dict[str, Any]]) -> dict[str, list[Cell]]:
    """Method -> its strengths, those for which every seed has figures (a stopped run may have none)."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in found.values():
        if "reward" in record:
            groups.setdefault((record["method"], record["strength"]), []).append(record)
    cells: dict[str, list[Cell]] = {}
    for (method, strength), records in groups.items():
        if len(records) == len(config.seeds):
            reward_SP = np.stack([_by_prompt(r["prompt"], r["reward"]) for r in records])
            kl_SP = np.stack([_by_prompt(r["prompt"], r["kl"]) for r in records])
            cells.setdefault(method, []).append(Cell(strength, reward_SP, kl_SP))
    return cells


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


def crossed_reach(values_SP: Array) -> float:
    """Half the 95 % interval of the mean of `values_SP` [seeds, prompts], every seed having the same prompts.

    reach^2 = t(S-1)^2 V_S + t(P-1)^2 max(V_P - V_SP, 0), with V_S = var(seed means)/S, V_P = var(prompt means)/P and V_SP
    that of seed x prompt noise, which V_S and V_P both hold. Each part has its own t (Howe 1974, JASA 69), which keeps
    95 % with 2 seeds too. It is never less than t(P-1) sqrt(V_P), the reach when the seeds are taken as given; one seed
    says nothing of other seeds, and the reach is then that.
    """
    seeds, prompts = values_SP.shape
    over_prompts = values_SP.mean(0).var(ddof=1) / prompts if prompts > 1 else 0.0
    t_prompts = stdtrit(max(prompts - 1, 1), _UPPER)
    given = float(t_prompts * np.sqrt(over_prompts))
    if seeds == 1:
        return given
    over_seeds = values_SP.mean(1).var(ddof=1) / seeds
    rest_SP = values_SP - values_SP.mean(1, keepdims=True) - values_SP.mean(0) + values_SP.mean()
    noise = (rest_SP**2).sum() / ((seeds - 1) * max(prompts - 1, 1) * seeds * prompts)
    both = stdtrit(seeds - 1, _UPPER) ** 2 * over_seeds + t_prompts**2 * max(over_prompts - noise, 0.0)
    return max(given, float(np.sqrt(both)))
