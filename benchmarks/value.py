"""Does `favor value` count planted wrong labels, find them, and does it help to act on it? Held against simple baselines.

    python benchmarks/value.py [--data FILE] [--held-out FILE] [--pairs 600] [--parts noise train gradients] [--out FOLDER]

noise: labels turned round by chance; the share estimated, with its interval, by the mixture, beside trusted pairs, and by
the closed form of Hoelder-DPO (arXiv 2505.17859) on heads trained by its loss; AUC of which labels are wrong, by the heads'
margin and by the reference's log-prob margin; what the command flips. train: DPO in full on what each rule keeps, accuracy
on held-out pairs with right labels; by margin (P(wrong) falls with it) at several shares kept it is the curve that
`favor value` draws by heads. gradients: AUC of the cosines of value.gradients, beside the margin. Default data: the demo's
film quotes. What is there is kept, so a stopped call goes on.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import favor
from favor.data.settings import DataConfig
from favor.data.tokenize import TokensConfig
from favor.data.types import Text
from favor.demo import model_folder, review_files
from favor.eval.intervals import mean_interval
from favor.model.load import ModelConfig
from favor.model.room import memory_settings
from favor.run import RunFolder, cache_folder, write_jsonl
from favor.value.cheap import Cases, margins
from favor.value.noise import Noise, beside_trusted, mixture
from favor.value.run import read_parts, value
from favor.value.settings import ValueConfig, ValueSettings
from favor.value.verdict import Judged, judge

Array = NDArray[np.float64]
GAMMA = 2.0
MODELS, FOLDS = 10, 5
KEPT = 0.6


class Known(NamedTuple):
    """Pairs of a file with right labels: rows, numbers, the reference's margins."""

    rows: list[dict[str, Any]]
    cases: Cases
    logp_gap: Array


def main() -> None:
    """Print each table."""
    args = parse()
    memory_settings()
    known = read(args)
    if "noise" in args.parts:
        noise_table(known["train"], known["eval"], args)
    if "train" in args.parts:
        write_jsonl(args.out / "held.jsonl", known["eval"].rows[: args.held])
        train_table(known["train"], args)
    if "gradients" in args.parts:
        gradient_table(known["train"], known["eval"], args)


def parse() -> argparse.Namespace:
    """The words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    add_training(parser)
    parser.add_argument("--trusted", type=int, default=100, help="held-out pairs whose labels are trusted")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-pairs", type=int, default=240)
    parser.add_argument("--train-shares", type=float, nargs="+", default=[0.2])
    parser.add_argument("--train-seeds", type=int, default=3)
    parser.add_argument(
        "--rules", nargs="+", type=int, default=list(range(len(RULES))), help="numbers of RULES; 0 is all pairs"
    )
    parts = ["noise", "train", "gradients"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    return parser.parse_args()


def add_data(parser: argparse.ArgumentParser) -> None:
    """What says which pairs, and by which model."""
    parser.add_argument("--data", help="preferences with right labels")
    parser.add_argument("--held-out", help="others of the same kind")
    parser.add_argument("--model", help="model folder; default the embedded one")
    parser.add_argument("--out", type=Path, default=Path("runs/value"))
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--template", default="auto", help="tokens.template")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longer pairs are left out")


def add_training(parser: argparse.ArgumentParser) -> None:
    """What says how DPO is trained, and on what it is measured."""
    parser.add_argument("--policy", help="model folder that is trained; default: the one that is asked")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--held", type=int, default=200, help="held-out pairs that say how good the trained models are")


def read(args: argparse.Namespace) -> dict[str, Known]:
    """Both files as numbers, computed once."""
    files = review_files(cache_folder(), print)
    args.data = args.data or str(files / "train.jsonl")
    args.held_out = args.held_out or str(files / "test.jsonl")
    args.model = args.model or str(model_folder(cache_folder(), print))
    args.out.mkdir(parents=True, exist_ok=True)
    data = DataConfig(train=args.data, eval=args.held_out, max_rows=args.pairs, bad_rows="drop")
    config = asking(args, ModelConfig(path=args.model), data)
    kept = args.out / "features.npz"
    texts = args.out / "rows.json"
    if not kept.exists():
        found = read_parts(config, lambda *told: None)
        listed = {
            name: [
                {
                    "prompt": plain(pair.text.prompt),
                    "chosen": plain(pair.text.responses[pair.chosen]),
                    "rejected": plain(pair.text.responses[pair.rejected]),
                }
                for pair in part.pairs
            ]
            for name, part in found.items()
        }
        texts.write_text(json.dumps(listed))
        np.savez(
            kept,
            **{f"{name}_gap": part.cases.gap_PF for name, part in found.items()},
            **{f"{name}_prompt": part.cases.prompt_P for name, part in found.items()},
            **{f"{name}_logp": part.logp_gap_P for name, part in found.items()},
        )
    stored, rows = np.load(kept), json.loads(texts.read_text())
    return {
        name: Known(
            rows[name],
            Cases(stored[f"{name}_gap"], np.ones(len(rows[name])), stored[f"{name}_prompt"]),
            stored[f"{name}_logp"],
        )
        for name in rows
    }


def asking(args: argparse.Namespace, model: ModelConfig, data: DataConfig, **more: Any) -> ValueConfig:
    """A recipe of `favor value`, texts laid out as the words say."""
    tokens = TokensConfig(max_tokens=args.max_tokens, template=args.template)
    return ValueConfig(model=model, data=data, tokens=tokens, **more)


def plain(text: Text) -> Any:
    """A text as JSON holds it."""
    return text if isinstance(text, str) else list(text)


def noise_table(mine: Known, held: Known, args: argparse.Namespace) -> None:
    """A row for each planted share: estimates over seeds, how many intervals hold the truth, AUC."""
    print(
        f"{len(mine.rows)} pairs, {len(np.unique(mine.cases.prompt_P))} prompts, {args.seeds} seeds; {args.trusted} trusted pairs"
    )
    print(
        "| planted | mixture | 95 % holds it | beside trusted | 95 % holds it | Hölder, gamma 2 | AUC, heads' margin "
        "| AUC, reference's margin | flipped (wrong among them) by draw |"
        "\n|---|---|---|---|---|---|---|---|---|"
    )
    for share in args.shares:
        found = [estimates(mine, held, share, seed, args) for seed in range(args.seeds)]
        truth, mixed, beside, holder, auc, simple, flips = zip(*found, strict=True)
        cells = [
            shown(truth),
            *(cell for noises in (mixed, beside) for cell in noise_cells(noises, truth)),
            shown(holder),
            *(shown(values) if share else "" for values in (auc, simple)),
            ", ".join(f"{count} ({wrong})" for count, wrong in flips),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def estimates(
    mine: Known, held: Known, share: float, seed: int, args: argparse.Namespace
) -> tuple[float, Noise, Noise, float, float, float, tuple[int, int]]:
    """Truth, mixture, beside trusted, Hölder, two AUCs, and how many labels the command flips, how many of them wrong."""
    rng = np.random.default_rng(seed)
    sign_P, cases = turned(mine, len(mine.rows), share, seed)
    trusted = held.cases.some(rng.permutation(len(held.rows))[: args.trusted])
    said = margins(cases, trusted.gap_PF, MODELS, FOLDS, seed)
    margin_P = said.out_MP.mean(0)
    mixed = mixture(said.out_MP, cases.prompt_P)
    beside = beside_trusted(said.out_MP, cases.prompt_P, said.other_HT, trusted.prompt_P)
    wrong = sign_P < 0
    scores = (margin_P, mine.logp_gap * sign_P)
    aucs = [float(roc_auc_score(wrong, -score)) if wrong.any() else float("nan") for score in scores]
    verdicts = judge(mixed.wrong(margin_P), said.out_MP, ValueSettings())
    flipped = np.array([one.verdict == "flip" for one in verdicts])
    flips = int(flipped.sum()), int((flipped & wrong).sum())
    return float(wrong.mean()), mixed, beside, holder_share(cases, said.strength, seed), aucs[0], aucs[1], flips


def turned(mine: Known, count: int, share: float, seed: int) -> tuple[Array, Cases]:
    """The first pairs by labels of which a share is turned round by chance; -1 for these, 1 for the others."""
    sign_P = np.where(np.random.default_rng(1000 + seed).random(count) < share, -1.0, 1.0)
    some = mine.cases.some(np.arange(count))
    return sign_P, some._replace(gap_PF=some.gap_PF * sign_P[:, None])


def noise_cells(noises: tuple[Noise, ...], truth: tuple[float, ...]) -> tuple[str, str]:
    """The estimates, and how many intervals hold the truth and how wide they are."""
    held = sum(one.low <= true <= one.high for one, true in zip(noises, truth, strict=True))
    width = float(np.median([one.high - one.low for one in noises]))
    return shown([one.share for one in noises]), f"{held} of {len(noises)}, width {width:.2f}"


def shown(values: Any) -> str:
    """Mean and range."""
    return f"{np.mean(values):.3f} [{np.min(values):.3f}, {np.max(values):.3f}]"


def holder_share(cases: Cases, strength: float, seed: int) -> float:
    """1 - xi of Hölder-DPO's closed form, xi = mean s(m)^g / mean (s(m)^(1+g) + s(-m)^(1+g)), m out of fold, heads of its loss."""
    rng = np.random.default_rng(seed)
    names, place_P = np.unique(cases.prompt_P, return_inverse=True)
    fold_P = (rng.permutation(len(names)) % FOLDS)[place_P]
    scale = np.sqrt((cases.gap_PF**2).mean(0) * cases.gap_PF.shape[1]) + 1e-12
    gap_PF = cases.gap_PF / scale
    margin_P = np.zeros(len(fold_P))
    for fold in range(FOLDS):
        inside = fold_P != fold
        theta = holder_head(gap_PF[inside], strength)
        margin_P[~inside] = gap_PF[~inside] @ theta
    top, bottom = sums(margin_P)
    return float(np.clip(1 - top / bottom, 0, 1))


def sums(margin_P: Array) -> tuple[float, float]:
    """The two means of the closed form."""
    yes, no = expit(margin_P), expit(-margin_P)
    return float((yes**GAMMA).mean()), float((yes ** (1 + GAMMA) + no ** (1 + GAMMA)).mean())


def holder_head(gap_PF: Array, strength: float) -> Array:
    """The head that maximises (1 + g) ln S2 - g ln S1: Hölder's loss with the best xi put in, and the same ridge."""
    count = len(gap_PF)

    def loss(theta: Array) -> tuple[float, Array]:
        margin = gap_PF @ theta
        yes, no = expit(margin), expit(-margin)
        top, bottom = sums(margin)
        by_top = GAMMA * yes**GAMMA * no / count / top
        by_bottom = (1 + GAMMA) * (yes ** (1 + GAMMA) * no - no ** (1 + GAMMA) * yes) / count / bottom
        value = (1 + GAMMA) * np.log(top) - GAMMA * np.log(bottom)
        slope = gap_PF.T @ ((1 + GAMMA) * by_top - GAMMA * by_bottom)
        return -value + theta @ theta / (2 * strength * count), -slope + theta / (strength * count)

    # the start of a policy is its reference: all margins 0
    found = minimize(loss, np.zeros(gap_PF.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.asarray(found.x)


def train_table(mine: Known, args: argparse.Namespace) -> None:
    """A row for each rule: held-out accuracy of DPO on what it keeps, over seeds."""
    print(
        f"\nDPO on {args.train_pairs} pairs, lr {args.lr}, {args.dtype}; accuracy on {args.held} held-out pairs with right labels"
    )
    print(
        "| planted | rule | pairs | wrong among them | accuracy by seed | less all, 95 % over seeds |\n|---|---|---|---|---|---|"
    )
    for share in args.train_shares:
        base: list[float] = []
        seen = [looked_at(mine, share, seed, args) for seed in range(args.train_seeds)]
        for name in [list(RULES)[number] for number in args.rules]:
            found = [trained(mine, one, share, name, args) for one in seen]
            accuracy = [one["accuracy"] for one in found]
            base = base or accuracy
            difference = mean_interval(np.array(accuracy) - np.array(base))
            cells = (
                f"{share:.0%}",
                name,
                f"{np.mean([one['pairs'] for one in found]):.0f}",
                f"{np.mean([one['wrong'] for one in found]):.1%}",
                ", ".join(f"{value:.3f}" for value in accuracy),
                "" if accuracy == base else f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
            )
            print("| " + " | ".join(cells) + " |", flush=True)


class Choice(NamedTuple):
    """What a rule sees of a seed: margins by the labels, the reference's own, verdicts. sign: -1 where a label is turned round."""

    seed: int
    sign: Array
    margin: Array
    logp_gap: Array
    verdicts: list[Judged]
    noise: Noise

    @property
    def chance(self) -> Array:
        """A number drawn for every pair, the same for every rule."""
        return np.random.default_rng(self.seed).random(len(self.margin))

    def top(self, score: Array, share: float = KEPT) -> Array:
        """1 for the share with the highest score, else 0."""
        used = np.zeros(len(score))
        used[np.argsort(-score, kind="stable")[: round(share * len(score))]] = 1
        return used


# rule -> 1 keep, 0 leave out, -1 turn round
RULES: dict[str, Callable[[Choice], Array]] = {
    "all": lambda c: np.ones(len(c.margin)),
    "all, robust loss with the measured share": lambda c: np.ones(len(c.margin)),
    "60 % by chance": lambda c: c.top(c.chance),
    "60 % by the reference's margin": lambda c: c.top(c.logp_gap),
    "60 % with the smallest margin (2508.04149)": lambda c: c.top(-np.abs(c.margin)),
    "80 % by margin": lambda c: c.top(c.margin, 0.8),
    "60 % by margin": lambda c: c.top(c.margin),
    "40 % by margin": lambda c: c.top(c.margin, 0.4),
    "cleaned: keep and flip": lambda c: np.array(
        [{"keep": 1.0, "flip": -1.0}.get(one.verdict, 0.0) for one in c.verdicts]
    ),
    "80 % by chance": lambda c: c.top(c.chance, 0.8),
    "40 % by chance": lambda c: c.top(c.chance, 0.4),
}


def looked_at(mine: Known, share: float, seed: int, args: argparse.Namespace) -> Choice:
    """What the rules see of the labels of a seed, of which a share is turned round."""
    sign_P, cases = turned(mine, args.train_pairs, share, seed)
    said = margins(cases, cases.gap_PF[:0], MODELS, FOLDS, seed)
    noise = mixture(said.out_MP, cases.prompt_P)
    verdicts = judge(noise.wrong(said.out_MP.mean(0)), said.out_MP, ValueSettings())
    logp_gap = mine.logp_gap[: args.train_pairs] * sign_P
    return Choice(seed, sign_P, said.out_MP.mean(0), logp_gap, verdicts, noise)


def trained(mine: Known, seen: Choice, share: float, name: str, args: argparse.Namespace) -> dict[str, float]:
    """One run of DPO on what a rule keeps of labels of which a share was turned round."""
    use_P = RULES[name](seen)
    final_P, noise = use_P * seen.sign, seen.noise
    rows = [row if final > 0 else swapped(row) for row, final in zip(mine.rows, final_P, strict=False) if final]
    robust = {"kind": "robust", "label_smoothing": min(noise.certain, 0.45)} if "robust" in name else {"kind": "dpo"}
    accuracy = fitted(rows, f"{share:g}-{seen.seed}-{list(RULES).index(name)}", seen.seed, args, robust)
    wrong = float((final_P[use_P != 0] < 0).mean())
    return {"accuracy": accuracy, "pairs": float((use_P != 0).sum()), "wrong": wrong}


def fitted(rows: list[dict[str, Any]], name: str, seed: int, args: argparse.Namespace, loss: dict[str, Any]) -> float:
    """Held-out accuracy of DPO trained on these rows; the run is kept under this name."""
    folder = args.out / name
    run = RunFolder(folder / "run")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "accuracy.json"
    if kept.exists():
        return float(json.loads(kept.read_text()))
    write_jsonl(folder / "train.jsonl", rows)
    if not run.model.exists():
        # of a call that was stopped
        shutil.rmtree(run.root, ignore_errors=True)
        favor.train(
            args.policy or args.model,
            str(folder / "train.jsonl"),
            out=run.root,
            seed=seed,
            lr=args.lr,
            dtype=args.dtype,
            epochs=args.epochs,
            batch_prompts=8,
            tokens={"max_tokens": args.max_tokens, "template": args.template},
            loss={**loss, "beta": 0.1},
            save={"every": 0},
            quiet=True,
        )
    kept.write_text(json.dumps(held_accuracy(run.model, args)))
    return float(json.loads(kept.read_text()))


def held_accuracy(model: Path, args: argparse.Namespace) -> float:
    """Share of the held-out pairs whose implicit reward is right, ties half: log-prob margin less the start's."""
    kept = args.out / "held_gap.npy"
    if not kept.exists():
        np.save(kept, held_gap(args.policy or args.model, args))
    gain_P = held_gap(str(model), args) - np.load(kept)
    return float(((gain_P > 0) + 0.5 * (gain_P == 0)).mean())


def held_gap(model: str, args: argparse.Namespace) -> Array:
    """log pi(chosen) - log pi(rejected) of every held-out pair."""
    data = DataConfig(train=str(args.out / "held.jsonl"))
    config = asking(args, ModelConfig(path=model, dtype=args.dtype), data)
    return read_parts(config, lambda *told: None)["train"].logp_gap_P


def gradient_table(mine: Known, held: Known, args: argparse.Namespace) -> None:
    """AUC of which labels are wrong, over draws: by the cosine with trusted gradients, and by margins of the same pairs.

    A label turned round turns its pair's gradient round, so one pass serves every draw.
    """
    kept = args.out / "cosines.json"
    count = min(args.train_pairs, len(mine.rows))
    if not kept.exists():
        write_jsonl(args.out / "asked.jsonl", mine.rows[:count])
        write_jsonl(args.out / "trusted.jsonl", held.rows[: args.trusted])
        asked = ValueSettings(
            trusted=str(args.out / "trusted.jsonl"), gradients=True, out=str(args.out / "value.jsonl"), overwrite=True
        )
        data = DataConfig(train=str(args.out / "asked.jsonl"))
        config = asking(args, ModelConfig(path=args.model, dtype=args.dtype), data, value=asked)
        value(config, lambda *told: None)
        lines = (args.out / "value.jsonl").read_text("utf-8").splitlines()
        kept.write_text(json.dumps([json.loads(line)["gradient"] for line in lines]))
    cosine_P = np.array(json.loads(kept.read_text()))
    print(f"\n{count} pairs, {args.trusted} trusted; AUC of which labels are wrong, {args.seeds} draws")
    print("| planted | cosine with trusted gradients | heads' margin | reference's margin |\n|---|---|---|---|")
    for share in (share for share in args.shares if share):
        found = [gradient_aucs(mine, cosine_P, share, seed) for seed in range(args.seeds)]
        print(f"| {share:.0%} | " + " | ".join(shown(values) for values in zip(*found, strict=True)) + " |", flush=True)


def gradient_aucs(mine: Known, cosine_P: Array, share: float, seed: int) -> tuple[float, float, float]:
    """By cosine, by the heads' margin, by the reference's margin."""
    count = len(cosine_P)
    sign_P, cases = turned(mine, count, share, seed)
    said = margins(cases, cases.gap_PF[:0], MODELS, FOLDS, seed)
    scores = (cosine_P * sign_P, said.out_MP.mean(0), mine.logp_gap[:count] * sign_P)
    auc = [float(roc_auc_score(sign_P < 0, -score)) for score in scores]
    return auc[0], auc[1], auc[2]


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its label turned round."""
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


if __name__ == "__main__":
    main()
