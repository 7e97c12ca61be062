"""Which settings make PPO's target KL bind in the frontier? Held-out KL beside the target, by learning rate, rollouts and horizon.

    python benchmarks/ppo_targets.py --out FOLDER [--seed 90] [--targets 3 12]

A seed that the frontier itself does not use, so its own figures stay new. All settings start from one SFT model, one set
of labels and one reward model. A target binds where the KL ends within a quarter of it. What is there already is kept.
"""

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from favor_frontier.prepare import Places, settle_task
from favor_frontier.recipe import FrontierConfig, MethodStrengths, Point
from favor_frontier.run import work

import favor
from favor.config import dump
from favor.run import make_folder, write_text

SHARED = ("base", "sft")
WITHIN = 0.25


class Setting(NamedTuple):
    """One way to run PPO."""

    lr: float
    rollouts: int
    kl_horizon: int
    kl_coef: float = 0.2
    updates: int = 2
    batch_prompts: int = 16

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(f"{value:g}" for value in self[:5]) + f"-{self.batch_prompts}" * (self.batch_prompts != 16)


SEARCHED = (
    Setting(2e-4, 14, 128),
    Setting(2e-4, 14, 64),
    Setting(2e-4, 14, 32),
    Setting(2e-4, 14, 64, kl_coef=0.5),
    Setting(2e-4, 28, 32, batch_prompts=8),
)


def shared(out: Path, seed: int) -> FrontierConfig:
    """The start, the labels and the reward model that all settings read."""
    methods = {name: [] for name in MethodStrengths.model_fields} | {"best_of_n": [1]}
    config = FrontierConfig(run=str(out / "shared"), seeds=(seed,), methods=MethodStrengths.model_validate(methods))
    favor.frontier(out=out / "shared", seeds=[seed], methods=methods)
    return config


def placed(config: FrontierConfig, setting: Setting, out: Path) -> Path:
    """A setting's recipe, beside links to what is shared."""
    root = out / setting.name
    make_folder(root)
    for name in (*SHARED, f"seed-{config.seeds[0]}"):
        link, target = root / name, (out / "shared" / name).absolute()
        if target.exists() and not link.exists():
            link.symlink_to(target)
    sizes = config.ppo.model_copy(update=setting._asdict())
    write_text(root / "config.toml", dump(config.model_copy(update={"run": str(root), "ppo": sizes})))
    return root / "config.toml"


def row(root: Path, point: Point) -> dict[str, Any]:
    """KL and reward of a finished point."""
    found = json.loads((Places(root).point(point.name) / "point.json").read_text())
    mean = {key: sum(found[key]) / len(found[key]) for key in ("kl", "reward") if key in found}
    return {
        "method": point.method,
        "target": point.strength,
        "core_seconds": found["core_seconds"],
        "status": found["status"],
        **mean,
    }


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=90)
    parser.add_argument("--targets", type=float, nargs="+", default=[3.0, 12.0])
    parser.add_argument("--methods", nargs="+", default=["ppo", "ppo_true"])
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    config = shared(given.out, given.seed)
    task = settle_task(config, given.out / "shared", print)
    points = [Point(method, target, given.seed) for method in given.methods for target in given.targets]
    recipes = {setting: placed(config, setting, given.out) for setting in SEARCHED}
    columns = ("lr", "rollouts x prompts", "horizon", "first coefficient", "reward", "target", "KL, held-out")
    print(f"| {' | '.join(columns)} | ground-truth reward | core seconds | |\n|{'---|' * 10}")
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        todo = [
            (setting, point, pool.submit(work, recipes[setting], task, "point", point))
            for setting, point in itertools.product(SEARCHED, points)
        ]
        for setting, point, job in todo:
            job.result()
            r = row(recipes[setting].parent, point)
            kl = r.get("kl", float("nan"))
            said = f"{'binds' if abs(kl / point.strength - 1) <= WITHIN else 'does not bind'}, {r['status']}"
            how = (
                f"{setting.lr:g}",
                f"{setting.rollouts} x {setting.batch_prompts}",
                setting.kl_horizon,
                setting.kl_coef,
            )
            figures = (f"{kl:.2f}", f"{r.get('reward', float('nan')):.3f}", f"{r['core_seconds']:.0f}")
            print(f"| {' | '.join(map(str, (*how, point.method, point.strength, *figures, said)))} |", flush=True)


if __name__ == "__main__":
    main()
