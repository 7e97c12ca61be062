"""Does asking beat labelling by chance? Rounds of labels on pairs whose labels are known; accuracy on held-out pairs.

    python benchmarks/ask.py [--out FOLDER of benchmarks/value.py] [--seeds 5] [--train 0]

Stopping: after how many labels `favor ask` says that it is enough. Heads: a cheap model fitted to the labels so far, as
`favor ask` does. --train N: DPO in full on the first N labels of each rule. Features and rows are those of
benchmarks/value.py (made if they are not there).
"""

import argparse

import numpy as np
from numpy.typing import NDArray
from value import Known, add_data, add_training, fitted, read

from favor.ask.choose import by_margin, spread_out
from favor.eval.intervals import mean_interval, sign_share
from favor.eval.sequence import sequence
from favor.model.room import memory_settings
from favor.run import write_jsonl
from favor.value.cheap import Cases, head, margins

Array = NDArray[np.float64]
ROUNDS = (20, 40, 60, 80, 120, 160, 240, 320)
RULES = ("by chance", "least certain", "least certain and different", "different", "favor ask")
BY_CHANCE = 0.2


def main() -> None:
    """Print the table of heads, then that of DPO."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    add_training(parser)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=0, help="labels to train DPO on; 0: none")
    args = parser.parse_args()
    memory_settings()
    known = read(args)
    labelled = {(rule, seed): rounds(known["train"], rule, seed) for rule in RULES for seed in range(args.seeds)}
    held = known["eval"].cases
    pool = len(known["train"].rows)
    print(f"held-out accuracy of a head, {pool} pairs in the pool, {args.seeds} seeds: mean (paired gain over chance)")
    print(f"| labels | {' | '.join(RULES)} |\n|---{'|---' * len(RULES)}|")
    for count in ROUNDS:
        scores = {
            rule: np.array(
                [accuracy(known["train"].cases, labelled[rule, seed][:count], held) for seed in range(args.seeds)]
            )
            for rule in RULES
        }
        print(f"| {count} | " + " | ".join(cell(scores[rule], scores[RULES[0]]) for rule in RULES) + " |", flush=True)
    stop_table(known["train"], held, args.seeds)
    if args.train:
        write_jsonl(args.out / "held.jsonl", known["eval"].rows[: args.held])
        train(known["train"], labelled, args)


def cell(mine: Array, chance: Array) -> str:
    """Mean, and the mean paired difference with its interval over seeds."""
    if mine is chance:
        return f"{mine.mean():.3f}"
    found = mean_interval(mine - chance)
    return f"{mine.mean():.3f} ({found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}])"


def rounds(pool: Known, rule: str, seed: int) -> list[int]:
    """The pairs in the order in which they are labelled: the first 20 by chance, alike for all rules of a seed.

    "favor ask" is what the command does: a share by chance in every round.
    """
    rng = np.random.default_rng(seed)
    taken: list[int] = rng.permutation(len(pool.rows))[: ROUNDS[0]].tolist()
    scaled_TF = pool.cases.gap_PF / np.sqrt((pool.cases.gap_PF**2).mean(0))
    for count in ROUNDS[1:]:
        rest = rng.permutation(np.setdiff1d(np.arange(len(pool.rows)), taken))
        wanted = count - len(taken)
        if rule == "favor ask":
            chance = round(BY_CHANCE * wanted)
            taken += rest[:chance].tolist()
            rest, wanted = rest[chance:], wanted - chance
        if rule == "by chance":
            new = np.arange(wanted)
        elif rule == "different":
            new = np.array(spread_out(scaled_TF[rest], wanted))
        else:
            margin_T = margins(pool.cases.some(np.array(taken)), pool.cases.gap_PF[rest], 10, 5, seed).other_HT.mean(0)
            certain = np.argsort(np.abs(margin_T), kind="stable")[:wanted]
            new = certain if rule == "least certain" else np.array(by_margin(margin_T, scaled_TF[rest], wanted))
        taken += rest[new].tolist()
    return taken


def accuracy(pool: Cases, labelled: list[int], held: Cases) -> float:
    """Of a head of these labels, its ridge by cross-validation."""
    some = pool.some(np.array(labelled))
    strength = margins(some, some.gap_PF[:0], 2, 5, 0).strength
    return float(sign_share(head(some, strength)(held.gap_PF)).mean())


def stop_table(pool: Known, held: Cases, seeds: int) -> None:
    """Labels until both rules of `favor ask` are settled, a row for each share drawn by chance."""
    print(
        "\nrounds of 20 labels until it is settled, by seed: labels (held-out accuracy then); -: not with all of the pool"
    )
    print(
        "| by_chance | accuracy surely 0.75 | the second half of the labels surely gained less than 0.05 |\n|---|---|---|"
    )
    for share in (0.2, 1.0):
        found = [settled(pool, share, seed) for seed in range(seeds)]
        cells = [
            ", ".join(
                f"{len(one[rule])} ({accuracy(pool.cases, one[rule], held):.3f})" if one[rule] else "-" for one in found
            )
            for rule in ("enough", "gain")
        ]
        print(f"| {share:g} | {' | '.join(cells)} |", flush=True)


def settled(pool: Known, share: float, seed: int) -> dict[str, list[int]]:
    """The labels that there were when each rule was settled first; none where it never was."""
    rng, cases = np.random.default_rng(seed), pool.cases
    scaled_TF = cases.gap_PF / np.sqrt((cases.gap_PF**2).mean(0))
    taken: list[int] = rng.permutation(len(pool.rows))[:20].tolist()
    right, gain, found = list[float](), list[float](), dict[str, list[int]](enough=[], gain=[])
    while len(taken) + 20 <= len(pool.rows) and not all(found.values()):
        rest = rng.permutation(np.setdiff1d(np.arange(len(pool.rows)), taken))
        half = rng.permutation(taken)[: len(taken) // 2]
        whole_T, half_T = (
            margins(cases.some(np.array(some)), cases.gap_PF[rest], 10, 5, seed).other_HT.mean(0)
            for some in (taken, half)
        )
        by_chance = round(share * 20)
        # the answer that people prefer is the first of every pair
        right += (whole_T[:by_chance] > 0).astype(float).tolist()
        gain += ((whole_T[:by_chance] > 0) * 1.0 - (half_T[:by_chance] > 0)).tolist()
        taken += rest[:by_chance].tolist()
        if by_chance < 20:
            least = by_margin(whole_T[by_chance:], scaled_TF[rest[by_chance:]], 20 - by_chance)
            taken += rest[by_chance:][least].tolist()
        now = {"enough": sequence(np.array(right))[0] >= 0.75, "gain": sequence(np.array(gain), -1.0, 1.0)[1] < 0.05}
        found = {rule: found[rule] or (list(taken) if now[rule] else []) for rule in found}
    return found


def train(pool: Known, labelled: dict[tuple[str, int], list[int]], args: argparse.Namespace) -> None:
    """DPO on the first labels of two rules."""
    print(f"\nDPO on {args.train} labels, lr {args.lr}, {args.dtype}; accuracy on {args.held} held-out pairs")
    print("| rule | accuracy by seed | mean (paired gain over chance) |\n|---|---|---|")
    base = np.zeros(0)
    for rule in (RULES[0], RULES[-1]):
        found = np.array(
            [dpo(pool, labelled[rule, seed][: args.train], rule, seed, args) for seed in range(args.seeds)]
        )
        base = base if len(base) else found
        print(f"| {rule} | {', '.join(f'{one:.3f}' for one in found)} | {cell(found, base)} |", flush=True)


def dpo(pool: Known, labels: list[int], rule: str, seed: int, args: argparse.Namespace) -> float:
    """Held-out accuracy of DPO on these labels."""
    rows = [pool.rows[place] for place in labels]
    return fitted(rows, f"ask-{rule.replace(' ', '-')}-{seed}-{len(labels)}", seed, args, {"kind": "dpo"})


if __name__ == "__main__":
    main()
