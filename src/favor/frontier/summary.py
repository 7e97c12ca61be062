"""All points -> one picture: reward and KL of every method and strength with intervals, and who dominates whom.

In: point.json files. Out: frontier.json. Next: ../report/frontier.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from favor.eval.intervals import Array
from favor.frontier.point import curve
from favor.frontier.prepare import Places
from favor.frontier.recipe import FrontierConfig, points

# Draws of the two-level bootstrap: seeds first, then prompts within each.
_DRAWS = 1000
_GRID = 25


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
    draws = _draws(len(config.seeds), config.evaluate.prompts)
    frontiers = {name: _drawn(start + members, draws) for name, members in cells.items()}
    wanted = points(config)
    return {
        "points": {name: [_point(cell) for cell in members] for name, members in ({"start": start} | cells).items()},
        "dominance": dominance(frontiers),
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
    }


def dominance(frontiers: Mapping[str, tuple[Array, Array]]) -> list[dict[str, Any]]:
    """For every two methods, the mean reward difference at equal KL, over the KL range that both reach.

    frontiers: method -> (kl, reward), each [draws, strengths], the first draw being the data itself. Each frontier is
    the best reward at or below a KL, straight between points. A method dominates when the 95 % interval of the
    difference is above 0.
    """
    names, found = list(frontiers), []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            difference = _difference(frontiers[a], frontiers[b])
            low, high = np.nanquantile(difference[1:], [0.025, 0.975])
            verdict = a if low > 0 else b if high < 0 else "neither"
            found.append(
                {"a": a, "b": b, "difference": float(difference[0]), "low": low, "high": high, "wins": verdict}
            )
    return found


def envelope(kl: Array, reward: Array, grid: Array) -> Array:
    """Best reward reached at or below each KL of the grid, straight lines between points."""
    order = np.argsort(kl, kind="stable")
    best = np.maximum.accumulate(reward[order])
    return np.interp(grid, kl[order], best)


def _difference(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    found = np.full(len(a[0]), np.nan)
    for draw, ((kl_a, reward_a), (kl_b, reward_b)) in enumerate(
        zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
    ):
        top = min(kl_a.max(), kl_b.max())
        if top > 0:
            grid = np.linspace(0.0, top, _GRID)
            found[draw] = (envelope(kl_a, reward_a, grid) - envelope(kl_b, reward_b, grid)).mean()
    return found


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


def _draws(num_seeds: int, num_prompts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which seeds and, for each drawn seed, which prompts: the same for all cells, so that differences are paired."""
    generator = np.random.default_rng(0)
    seeds = generator.integers(num_seeds, size=(_DRAWS, num_seeds))
    return seeds, generator.integers(num_prompts, size=(_DRAWS, num_seeds, num_prompts))


def _drawn(cells: Sequence[Cell], draws: tuple[NDArray[np.int64], NDArray[np.int64]]) -> tuple[Array, Array]:
    """(kl, reward) [1 + draws, strengths]: the data itself first, then the bootstrap."""
    kl = np.stack([_means(cell.kl_SP, draws) for cell in cells], 1)
    return kl, np.stack([_means(cell.reward_SP, draws) for cell in cells], 1)


def _means(values_SP: Array, draws: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Array:
    seeds, prompts = draws
    # a file with fewer prompts than asked for
    drawn = values_SP[seeds[:, :, None], prompts % values_SP.shape[1]].mean((1, 2))
    return np.concatenate([[values_SP.mean()], drawn])


def _point(cell: Cell) -> dict[str, Any]:
    draws = _draws(*cell.reward_SP.shape)
    found: dict[str, Any] = {"strength": cell.strength}
    for name, values in (("reward", cell.reward_SP), ("kl", cell.kl_SP)):
        mean, *drawn = _means(values, draws)
        low, high = np.quantile(drawn, [0.025, 0.975])
        found[name] = {"mean": mean, "low": low, "high": high, "seeds": values.mean(1).tolist()}
    return found


def _stability(config: FrontierConfig, places: Places) -> list[dict[str, Any]]:
    """KL and reward over training of every DPO and PPO run."""
    shown = [p for p in points(config) if p.method in ("dpo", "ppo", "ppo_true")]
    curves = [
        {"method": p.method, "strength": p.strength, "seed": p.seed, "curve": curve(places.point(p.name))}
        for p in shown
    ]
    return [item for item in curves if item["curve"]]
