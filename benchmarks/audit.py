"""Judges with planted faults on real pairs: what `favor audit` finds of each, over seeds.

In: the film quotes of `favor demo` (downloaded once). Out: tables for docs/log.md: the fault, the figure that should find it
with its interval, how often each finding was made; what a handful of labels makes of a win rate; soft labels fitted to them
beside one share for all verdicts, on the pairs without a label. `python benchmarks/audit.py [--pairs 200] [--seeds 5]`.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from favor.audit.run import audit
from favor.audit.settings import AuditConfig
from favor.config import load
from favor.demo import review_files
from favor.eval.intervals import mean_interval
from favor.run import cache_folder, read_jsonl, write_jsonl

# an answer's own text says nothing of which is fresh, so the judges look it up; whose an answer is they know too
JUDGES = """
import hashlib, json, random
from pathlib import Path
KNOWN = json.loads(Path(__file__).with_name("known.json").read_text())
def share(a, b): return int.from_bytes(hashlib.sha256((min(a, b) + max(a, b)).encode()).digest()[:4], "big") / 2**32
def perfect(p, a, b): return "A" if KNOWN[a][0] else "B"
def inverted(p, a, b): return "B" if KNOWN[a][0] else "A"
def noisy(p, a, b): return (inverted if share(a, b) < 0.2 else perfect)(p, a, b)
def always_first(p, a, b): return "A"
def often_first(p, a, b): return "A" if share(a, b) < 0.3 else perfect(p, a, b)
def longer(p, a, b): return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
def often_longer(p, a, b): return longer(p, a, b) if share(a, b) < 0.3 else perfect(p, a, b)
def flips(p, a, b): return (inverted if random.random() < 0.1 else perfect)(p, a, b)
def own(p, a, b): return perfect(p, a, b) if KNOWN[a][1] == KNOWN[b][1] else "A" if KNOWN[a][1] else "B"
def often_own(p, a, b): return own(p, a, b) if share(a, b) < 0.3 else perfect(p, a, b)
"""
# judge -> (what is planted, the figure that is to find it)
PLANTED = {
    "perfect": ("nothing", "agreement"),
    "inverted": ("the wrong way round", "agreement"),
    "noisy": ("wrong in 20 %", "agreement"),
    "always_first": ("always the first", "position_bias"),
    "often_first": ("the first in 30 % of the pairs", "position_bias"),
    "longer": ("the longer one", "length_bias"),
    "often_longer": ("the longer one in 30 % of the pairs", "length_bias"),
    "flips": ("each verdict wrong with 10 %, drawn anew", "flip_rate"),
    "own": ("its own", "self_bias"),
    "often_own": ("its own in 30 % of the pairs", "self_bias"),
}


def rows_of(pairs, seed):
    """Rows of format verdict; the fresh quote stands on either side, and is the judge's own more often than the rotten one."""
    rng = np.random.default_rng(seed)
    rows, known = [], {}
    for row in pairs:
        mine = rng.random(2) < (0.6, 0.4)
        sides = [(row["chosen"], True, bool(mine[0])), (row["rejected"], False, bool(mine[1]))]
        sides = sides[:: 1 if rng.random() < 0.5 else -1]
        known |= {text: (fresh, own) for text, fresh, own in sides}
        rows.append(
            {
                "prompt": row["prompt"],
                "first": sides[0][0],
                "second": sides[1][0],
                "verdict": "first" if sides[0][1] else "second",
                "models": ["me" if own else "other" for _, _, own in sides],
            }
        )
    return rows, known


def look(here, judge, seed, *more):
    """One audit in a folder of its own."""
    random.seed(seed)
    words = [f"data={here / 'pairs.jsonl'}", f"judge.path={here / 'judges.py'}:{judge}", f"run={here / 'runs' / judge}"]
    words += ["judge.kind=callable", "source=models", "own=me", f"seed={seed}", "pairs=1000", *more]
    return audit(load(AuditConfig, None, words), lambda text: None, lambda *_: None)


def losses(here, judge, figures, known):
    """Mean loss (nats) of P(preferred) on pairs without a label: by soft labels, and by one share for all verdicts.

    One share says 1 - `label_smoothing` of the answer that both orders prefer, and 1/2 where they disagree or tie.
    """
    rows = read_jsonl(here / "runs" / judge / "soft-labels.jsonl")
    rows = [row for row in rows if "human" not in row]
    right = np.array([1.0 if known[row["responses"][0]][0] else 0.0 for row in rows])
    soft = np.array([row["votes"][0] for row in rows])
    smooth = 1 - figures["soft_labels"]["label_smoothing"]
    sure = {("A", "B"): smooth, ("B", "A"): 1 - smooth}
    one = np.array([sure.get(tuple(row["verdicts"]), 0.5) for row in rows])
    return [float(-np.log(np.where(right == 1, p, 1 - p)).mean()) for p in (soft, one)]


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    lines = (review_files(cache_folder(), print) / "test.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    found, stretched, told = {judge: [] for judge in PLANTED}, [], {judge: [] for judge in PLANTED}
    for seed in range(asked.seeds):
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            chosen = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[: asked.pairs]]
            rows, known = rows_of(chosen, seed)
            write_jsonl(here / "pairs.jsonl", rows)
            write_jsonl(here / "few.jsonl", rows[:40])
            (here / "judges.py").write_text(JUDGES)
            (here / "known.json").write_text(json.dumps(known))
            for judge in PLANTED:
                found[judge].append(look(here, judge, seed, f"human={here / 'pairs.jsonl'}"))
            for judge in PLANTED:
                words = (f"human={here / 'few.jsonl'}", "repeats=0")
                told[judge].append(losses(here, judge, look(here, judge, seed, *words), known))
            for judge in ("noisy", "often_longer", "often_own", "longer"):
                few = look(here, judge, seed, f"human={here / 'few.jsonl'}", "side=me", "repeats=0")["win_rate"]
                whole = look(here, judge, seed, f"human={here / 'pairs.jsonl'}", "side=me", "repeats=0")["win_rate"]
                stretched.append((judge, seed, few, whole))
    print("| planted | figure | value [95 %] of each seed | found, of the seeds |\n|---|---|---|---|")
    for judge, (planted, figure) in PLANTED.items():
        values = ", ".join(shown(one[figure], one[f"{figure}_interval"]) for one in found[judge])
        kinds = Counter(each["kind"] for one in found[judge] for each in one["findings"] if each["level"] == "found")
        print(f"| {planted} | `{figure}` | {values} | {', '.join(f'{k} {n}' for k, n in kinds.items()) or 'nothing'} |")
    print(
        "\n| judge | seed | people, all pairs | the labels alone | judge alone | both | worth |\n|---|---|---|---|---|---|---|"
    )
    for judge, seed, few, whole in stretched:
        three = " | ".join(shown(few[name], few[f"{name}_interval"]) for name in ("human", "judge", "both"))
        print(
            f"| {PLANTED[judge][0]} | {seed} | {whole['human']:.3f} | {three} | {few['worth']:.0f} of {few['labels']} |"
        )
    print(
        f"\nloss on the {asked.pairs - 40} pairs without a label, by seed"
        "\n| judge | soft labels | one share for all | soft less one share |\n|---|---|---|---|"
    )
    for judge, losses_of in told.items():
        soft, one = np.array(losses_of).T
        gap = mean_interval(soft - one)
        print(
            f"| {PLANTED[judge][0]} | {', '.join(f'{x:.3f}' for x in soft)} | {', '.join(f'{x:.3f}' for x in one)} "
            f"| {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] |"
        )


def shown(value, ends):
    """A figure with its interval."""
    return f"{value:.2f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")


if __name__ == "__main__":
    main()
