"""What TRL's own loss code gives on fixed inputs: writes tests/golden/trl_losses.json for the tests of favor's losses.

Runs where trl 1.16.0 is installed; the trainers' methods are called on stand-in objects, so nothing is transcribed.
    python benchmarks/trl_losses.py [--openrlhf DIR_OF_THE_UNZIPPED_WHEEL]
"""

import argparse
import ast
import json
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PROMPT = 3
PAIRS = 8
OUT = Path(__file__).resolve().parent.parent / "tests/golden/trl_losses.json"
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
BETAS = (0.1, 0.5)


def make_inputs(seed: int = 20261123) -> dict:
    """Log-probs per token of 8 pairs; every sum is that of the rounded tokens, so the file is self-contained."""
    rng = random.Random(seed)
    found: dict = {"seed": seed, "prompt_tokens": PROMPT}
    for side in ("chosen", "rejected"):
        pi, ref, overlap = [], [], []
        for pair, length in enumerate(rng.sample(range(3, 13), PAIRS)):
            share = [rng.uniform(0.3, 1.7) for _ in range(length)]
            total, gap = rng.uniform(-60, -5), rng.uniform(-3, 3)
            pi.append([round(total * x / sum(share), 5) for x in share])
            drift = [gap / length + rng.uniform(-0.2, 0.2) for _ in range(length)]
            ref.append([round(min(p - d, -0.001), 5) for p, d in zip(pi[-1], drift, strict=True)])
            # log sum_v pi(v)^2: mostly above log pi(y), below it for every third pair, where WPO's weight exceeds 1
            above = -1.5 if pair % 3 == 0 else 0.0
            overlap.append([round(min(p + above + rng.uniform(-0.5, 1.5), -0.01), 5) for p in pi[-1]])
        prompt = [[round(rng.uniform(-4, -0.5), 5) for _ in range(PROMPT - 1)] for _ in range(PAIRS)]
        for name, rows in (("pi", pi), ("ref", ref), ("log_sum_sq", overlap), ("prompt_pi", prompt)):
            found[f"{name}_{side}_tokens"] = rows
        for name, rows in (("pi", pi), ("ref", ref)):
            found[f"{name}_{side}"] = [round(sum(row), 5) for row in rows]
        found[f"length_{side}"] = [len(row) for row in pi]
    found["kl_pi"] = [round(rng.uniform(-60, -5), 5) for _ in range(PAIRS)]
    found["kl_ref"] = [round(x - rng.uniform(-1, 3), 5) for x in found["kl_pi"]]
    return found


class Batch:
    """The inputs as padded tensors, chosen first; `pi` is the leaf of the gradient."""

    def __init__(self, inputs: dict, rows: list[int], dtype: torch.dtype) -> None:
        self.rows, self.pairs = rows, len(rows)
        self.pi = self._padded(inputs, "pi", dtype).requires_grad_()
        self.ref = self._padded(inputs, "ref", dtype)
        self.overlap = self._padded(inputs, "log_sum_sq", dtype)
        prompts = [inputs[f"prompt_pi_{side}_tokens"][i] for side in ("chosen", "rejected") for i in rows]
        self.prompt = torch.tensor(prompts, dtype=dtype)
        self.length = torch.tensor([inputs[f"length_{side}"][i] for side in ("chosen", "rejected") for i in rows])
        positions = torch.arange(PROMPT + self.pi.shape[1])
        self.mask = ((positions >= PROMPT) & (positions < PROMPT + self.length[:, None])).long()
        self.attention = (positions < PROMPT + self.length[:, None]).long()
        self.ids = torch.zeros_like(self.mask)

    def _padded(self, inputs: dict, name: str, dtype: torch.dtype) -> torch.Tensor:
        rows = [inputs[f"{name}_{side}_tokens"][i] for side in ("chosen", "rejected") for i in self.rows]
        return nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)

    def shifted(self, tokens: torch.Tensor) -> torch.Tensor:
        """Responses behind the prompt's predictions, zero as TRL's fused head leaves what carries no label."""
        return functional.pad(tokens, (PROMPT - 1, 0))


class Model(nn.Module):
    """Answers like a model with TRL's fused head: per-token log-probs of a batch."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: torch.Tensor, overlap: torch.Tensor | None = None) -> None:
        super().__init__()
        zeros = torch.zeros_like(log_probs)
        self.answer = SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=overlap,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    def forward(self, **kwargs) -> SimpleNamespace:
        return self.answer


def stub(**fields) -> SimpleNamespace:
    """A stand-in for a trainer: what its loss methods read."""
    return SimpleNamespace(
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        precompute_ref_logps=False,
        **fields,
    )


def dpo(batch: Batch, types: str, **options) -> torch.Tensor:
    """DPOTrainer._compute_loss. types: loss types joined by +."""
    model = Model(batch.shifted(batch.pi), batch.shifted(batch.overlap))
    loss_types = types.split("+")
    trainer = stub(
        model=model,
        ref_model=Model(batch.shifted(batch.ref)),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.get("discopop_tau", 0.05)),
        loss_types=loss_types,
        loss_weights=options.get("loss_weights", [1.0] * len(loss_types)),
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        ld_alpha=options.get("ld_alpha"),
        use_weighting=options.get("use_weighting", False),
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
    )
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention, "completion_mask": batch.mask}
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def centred_bco(batch: Batch, types: str, **options) -> torch.Tensor:
    """bco_pair of log-ratios shifted by BCO's delta (a constant of all 8 pairs), which TRL's loss leaves out."""
    shifted = batch.pi.detach().sum(1) - batch.ref.sum(1)
    middle = (shifted[: batch.pairs].mean() + shifted[batch.pairs :].mean()) / 2
    delta = options.pop("delta", float(middle))
    batch.ref[:, 0] += delta
    return dpo(batch, "bco_pair", **options)


def kto(batch: Batch, types: str, **options) -> torch.Tensor:
    """KTOTrainer._compute_loss: chosen are thumbs up, rejected thumbs down; the KL batch is the inputs' kl_*."""
    kl = {name: torch.tensor(options[f"kl_{name}"], dtype=batch.pi.dtype)[:, None] for name in ("pi", "ref")}
    model, ref_model = Model(batch.shifted(batch.pi)), Model(batch.shifted(batch.ref))
    answers = {id(model): kl["pi"], id(ref_model): kl["ref"]}
    trainer = stub(
        model=model,
        ref_model=ref_model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=True,
        loss_type=types,
        beta=options["beta"],
        desirable_weight=options["desirable_weight"],
        undesirable_weight=options["undesirable_weight"],
    )

    def kl_logps(policy, inputs):
        fake = Model(answers[id(policy)])
        ids = torch.zeros(kl["pi"].shape[0], 2, dtype=torch.long)
        names = ("KL_input_ids", "KL_attention_mask", "KL_completion_mask")
        return KTOTrainer._compute_kl_logps(trainer, fake, dict.fromkeys(names, ids))

    trainer._compute_kl_logps = kl_logps
    label = torch.arange(2 * batch.pairs) < batch.pairs
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention, "completion_mask": batch.mask, "label": label}
    return KTOTrainer._compute_loss(trainer, model, inputs, False)


def reference_free(batch: Batch, trainer_class: type, **options) -> torch.Tensor:
    """get_batch_loss_metrics of CPO or ORPO, with logits over two tokens whose log-softmax is the given log-probs."""
    tokens = torch.cat([batch.prompt, batch.pi], dim=1)
    real = batch.attention[:, 1:].bool()
    tokens = torch.where(real, tokens, tokens.new_tensor(-1.0))
    logits = torch.stack([tokens, torch.log(-torch.expm1(tokens))], dim=-1)
    logits = functional.pad(logits, (0, 0, 0, 1))
    pairs = batch.pairs
    inputs = {}
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    for side, rows in (("chosen", slice(None, pairs)), ("rejected", slice(pairs, None))):
        inputs[f"{side}_input_ids"] = batch.ids[rows]
        inputs[f"{side}_attention_mask"] = batch.attention[rows]
        inputs[f"{side}_labels"] = labels[rows]
    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "loss_type": "sigmoid", "cpo_alpha": 1.0, "simpo_gamma": 0.5}
    trainer = stub(is_encoder_decoder=False, pad_token_id=0, padding_value=0, **{**defaults, **options})
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, name):
            setattr(trainer, name, getattr(trainer_class, name).__get__(trainer))
    trainer.concatenated_inputs = trainer_class.concatenated_inputs
    trainer.get_batch_logps = trainer_class.get_batch_logps
    return trainer_class.get_batch_loss_metrics(trainer, lambda *a, **k: SimpleNamespace(logits=logits), inputs)[0]


def ratio_cpo(batch: Batch, types: str, **options) -> torch.Tensor:
    """CPOTrainer.cpo_loss called with log-ratios in the place of log-probs: the loss with a reference."""
    ratios = (batch.pi - batch.ref).sum(1)
    trainer = stub(alpha=0.0, loss_type=types, **options)
    return CPOTrainer.cpo_loss(trainer, ratios[: batch.pairs], ratios[batch.pairs :])[0].mean()


def ratio_orpo(batch: Batch, types: str, **options) -> torch.Tensor:
    """ORPOTrainer.odds_ratio_loss on means over the response: ORPO without its likelihood term."""
    means = batch.pi.sum(1) / batch.length
    return -ORPOTrainer.odds_ratio_loss(stub(**options), means[: batch.pairs], means[batch.pairs :])[0].mean()


def openrlhf(batch: Batch, folder: str, **options) -> torch.Tensor:
    """DPOLoss of OpenRLHF, taken out of its file: the package itself needs DeepSpeed and Ray."""
    path = next(Path(folder).rglob("openrlhf/models/loss.py"))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DPOLoss"]
    scope = {"nn": nn, "torch": torch, "F": functional, "Tuple": tuple}
    exec(compile(tree, str(path), "exec"), scope)
    pi, ref, pairs = batch.pi.sum(1), batch.ref.sum(1), batch.pairs
    return scope["DPOLoss"](**options)(pi[:pairs], pi[pairs:], ref[:pairs], ref[pairs:])[0]


def plan() -> list[tuple]:
    """(favor's loss, favor's options, what of TRL, function, TRL's options, note) of every case."""
    cases = []
    gap = (("dpo", "sigmoid", {}), ("hinge", "hinge", {}), ("ipo", "ipo", {"length_normalized": True}))
    gap += (("dpo", "sigmoid_norm", {"length_normalized": True}), ("nca", "nca_pair", {}))
    gap += (("sppo_hard", "sppo_hard", {}), ("apo_zero", "apo_zero", {}), ("apo_down", "apo_down", {}))
    gap += (("discopop", "discopop", {}), ("aot", "aot", {}), ("aot_unpaired", "aot_unpaired", {}))
    sorts = "sorted over the 8 pairs of the batch: the mean only"
    for beta in BETAS:
        for name, kind, extra in gap:
            note = sorts if kind.startswith("aot") else ""
            cases.append((name, {"beta": beta, **extra}, f"dpo:{kind}", {"beta": beta}, note))
        for name, kind in (("robust", "robust"), ("exo", "exo_pair")):
            options = {"beta": beta, "label_smoothing": 0.1}
            cases.append((name, options, f"dpo:{kind}", options, "log of a float32 epsilon" if name == "exo" else ""))
        bco = "per pair, chosen plus rejected: favor's mean over responses is half of it; delta is taken out beforehand"
        cases.append(("bco", {"beta": beta}, "centred_bco:bco_pair", {"beta": beta}, bco))
        raw = "delta 0: not favor's bco, but TRL's as it is"
        cases.append((None, {"beta": beta}, "dpo:bco_pair", {"beta": beta}, raw))
        instead = "log-ratios passed as log-probs; DPOTrainer has no such loss"
        smooth = {"beta": beta, "label_smoothing": 0.1}
        cases.append(("cdpo", smooth, "ratio_cpo:sigmoid", smooth, instead))
        cases.append(("ipo", {"beta": beta}, "ratio_cpo:ipo", {"beta": beta, "label_smoothing": 0.0}, instead))
        cases.extend(_divergences(beta))
        cases.extend(_token_level(beta))
        cases.extend(_unpaired(beta))
        whole = "its NLL is a mean over the tokens of prompts and chosen responses: not favor's orpo"
        cases.append((None, {"beta": beta}, "ORPOTrainer", {"beta": beta}, whole))
        cases.append(("orpo - sft", {"beta": beta}, "ratio_orpo:", {"beta": beta}, "float32 inside"))
        cpo = {"beta": beta, "cpo_alpha": 0.0}
        cases.append(("cpo", {"beta": beta, "nll_weight": 0.0}, "CPOTrainer:sigmoid", cpo, ""))
    cases.append((None, {"beta": 0.1}, "CPOTrainer:sigmoid", {"beta": 0.1, "cpo_alpha": 1.0}, "NLL a mean over tokens"))
    for beta, gamma in ((2.0, 0.5), (2.5, 1.4)):
        options = {"beta": beta, "simpo_gamma": gamma, "cpo_alpha": 0.0}
        cases.append(("simpo", {"beta": beta, "gamma": gamma}, "CPOTrainer:simpo", options, "gamma is not times beta"))
    return cases


def _divergences(beta: float) -> list[tuple]:
    found = []
    for name, kind in (("forward_kl", "forward_kl"), ("jensen_shannon", "js_divergence")):
        for loss, theirs in (("dpo", "sigmoid"), ("hinge", "hinge")):
            options = {"beta": beta, "f_divergence_type": kind}
            found.append((loss, {"beta": beta, "divergence": {"kind": name}}, f"dpo:{theirs}", options, ""))
    for coefficient in (0.5, 0.7):
        ours = {"beta": beta, "divergence": {"kind": "alpha", "alpha": round(1 - coefficient, 1)}}
        theirs = {"beta": beta, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
        note = "float32 (float64 is a KeyError); TRL's coefficient is one minus the paper's alpha"
        found.append(("dpo", ours, "dpo:sigmoid", theirs, note))
    return found


def _token_level(beta: float) -> list[tuple]:
    found = []
    for alpha in (0.0, 0.5):
        options = {"beta": beta, "ld_alpha": alpha}
        found.append(("dpo", options, "dpo:sigmoid", options, ""))
    for loss, kind, ours in (
        ("dpo", "sigmoid", {}),
        ("ipo", "ipo", {"length_normalized": True}),
        ("apo_zero", "apo_zero", None),
    ):
        theirs = {"beta": beta, "use_weighting": True}
        note = "TRL does not cap the weight at 1: pairs whose weight exceeds 1 differ"
        name, options = (loss, {"beta": beta, "wpo": "aligned", **ours}) if ours is not None else (None, {})
        found.append((name, options, f"dpo:{kind}", theirs, note))
    rpo = {"beta": beta, "loss_weights": [1.0, 0.5]}
    per_token = "the sft part is a mean over the batch's tokens, so mean differs from the mean of per_item"
    found.append(("dpo + 0.5 sft", {"beta": beta}, "dpo:sigmoid+sft", rpo, per_token))
    if beta == BETAS[0]:
        found.append(("sft", {}, "dpo:sft", {}, per_token))
    return found


def _unpaired(beta: float) -> list[tuple]:
    found = []
    for desirable, undesirable in ((1.0, 1.0), (1.0, 1.33)):
        options = {"beta": beta, "desirable_weight": desirable, "undesirable_weight": undesirable}
        note = "z0 = max(0, mean(kl_pi - kl_ref)); per_item is the mean of a pair's two responses"
        found.append(("kto", options, "kto:kto", options, note))
    options = {"beta": beta, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    half = "mean over the two responses: half of apo_zero"
    found.append((None, {"beta": beta}, "kto:apo_zero_unpaired", options, half))
    return found


def call(what: str, batch: Batch, inputs: dict, options: dict) -> torch.Tensor:
    """The loss of a batch by the named piece of TRL."""
    target, _, kind = what.partition(":")
    if target == "CPOTrainer":
        return reference_free(batch, CPOTrainer, **{**options, "loss_type": kind})
    if target == "ORPOTrainer":
        return reference_free(batch, ORPOTrainer, **options)
    if target == "kto":
        return kto(batch, kind, kl_pi=inputs["kl_pi"], kl_ref=inputs["kl_ref"], **options)
    if target == "centred_bco" and batch.pairs != PAIRS:
        options = {**options, "delta": _delta(inputs)}
    functions = {"dpo": dpo, "centred_bco": centred_bco, "ratio_cpo": ratio_cpo, "ratio_orpo": ratio_orpo}
    return {**functions, "openrlhf": openrlhf}[target](batch, kind, **options)


def _delta(inputs: dict) -> float:
    means = [
        sum(p - r for p, r in zip(inputs[f"pi_{side}"], inputs[f"ref_{side}"], strict=True)) / PAIRS
        for side in ("chosen", "rejected")
    ]
    return sum(means) / 2


LABELS = {
    "dpo": "DPOTrainer._compute_loss",
    "kto": "KTOTrainer._compute_loss",
    "centred_bco": "DPOTrainer._compute_loss, ref shifted by delta",
    "ratio_cpo": "CPOTrainer.cpo_loss",
    "ratio_orpo": "ORPOTrainer.odds_ratio_loss",
    "CPOTrainer": "CPOTrainer.get_batch_loss_metrics",
    "ORPOTrainer": "ORPOTrainer.get_batch_loss_metrics",
    "openrlhf": "openrlhf 0.11.2 DPOLoss",
}


def run_case(case: tuple, inputs: dict) -> dict:
    """One entry of the file: the mean, every pair alone, and the mean's gradient per token."""
    name, favor_options, what, options, note = case
    dtype = torch.float32 if options.get("f_divergence_type") == "alpha_divergence" else torch.float64
    whole = Batch(inputs, list(range(PAIRS)), dtype)
    mean = call(what, whole, inputs, options)
    (grad,) = torch.autograd.grad(mean, whole.pi)
    first, last = grad[:, 0], grad[torch.arange(2 * PAIRS), whole.length - 1]
    target, _, kind = what.partition(":")
    shown = "" if target == "openrlhf" else f" {kind}"
    entry = {"favor_loss": name, "favor_options": favor_options, "trl": f"{LABELS[target]}{shown}".strip()}
    entry |= {"options": options, "compare": agreement(case), "mean": short(mean)}
    if not kind.startswith("aot"):
        entry["per_item"] = [short(call(what, Batch(inputs, [i], dtype), inputs, options)) for i in range(PAIRS)]
    entry["grad_first"] = [short(x) for x in first]
    if not torch.equal(first, last):
        entry["grad_last"] = [short(x) for x in last]
    return entry | ({"notes": note} if note else {})


def agreement(case: tuple) -> str:
    """What of an entry an implementation of the paper's loss should reproduce; half: TRL's is twice favor's."""
    name, _, what, options, _ = case
    if name is None:
        return "nothing"
    if options.get("use_weighting"):
        return "per_item where the weight is at most 1"
    if what.startswith("centred_bco"):
        return "half"
    return "per_item" if "sft" in what else "all"


def short(value: torch.Tensor) -> float:
    """Ten significant digits."""
    return float(f"{float(value.detach()):.10g}")


def dump(found: dict) -> str:
    """JSON with one line a case."""
    lines = [json.dumps(case, separators=(",", ":")) for case in found["cases"]]
    head = json.dumps({key: value for key, value in found.items() if key != "cases"}, separators=(",", ":"))
    return head[:-1] + ',"cases":[\n' + ",\n".join(lines) + "\n]}\n"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--openrlhf", help="folder of the unzipped openrlhf wheel")
    args = parser.parse_args()
    inputs, cases = make_inputs(), plan()
    found = {"trl": "1.16.0", "about": "grad_*: d mean/d (first, last token's log pi), chosen then rejected"}
    entries = [run_case(case, inputs) for case in cases]
    for beta in BETAS if args.openrlhf else ():
        for name, extra in (("dpo", {}), ("cdpo", {"label_smoothing": 0.1}), ("ipo", {"ipo": True})):
            ours = {"beta": beta, **{key: value for key, value in extra.items() if key != "ipo"}}
            entries.append(run_case((name, ours, f"openrlhf:{args.openrlhf}", {"beta": beta, **extra}, ""), inputs))
    text = dump({**found, "inputs": inputs, "cases": entries})
    OUT.write_text(text, encoding="utf-8")
    print(f"{len(entries)} cases, {len(text)} bytes: {OUT}")


if __name__ == "__main__":
    main()
