"""Inputs on which TRL 1.16.0's losses break, trap or depend on the micro-batch; prints one line each. See docs/trl_differences.md.

python benchmarks/trl_faults.py
"""

import itertools
from collections.abc import Callable

import torch
from datasets import Dataset
from trl import unpair_preference_dataset
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl_losses import PAIRS, Batch, dpo, make_inputs, stub

INPUTS = make_inputs()
ALL = list(range(PAIRS))


def outcome(call: Callable[[], object]) -> str:
    """What came of it: a value or the first line of the error."""
    try:
        return str(call())
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"


def loss(types: str, rows: list[int], dtype: torch.dtype = torch.float64, **options) -> float:
    """DPOTrainer's loss of some of the pairs."""
    return dpo(Batch(INPUTS, rows, dtype), types, **options).item()


def halves(types: str) -> str:
    """The loss of 8 pairs at once, and the mean of two micro-batches of 4."""
    split = (loss(types, ALL[:4]) + loss(types, ALL[4:])) / 2
    return f"8 at once {loss(types, ALL):.6f}, 2 x 4 {split:.6f}"


def far_from_the_reference(types: str, chosen: float, rejected: float, **options) -> str:
    """One pair in float32 whose log-ratios are as given: loss and gradient."""
    batch = Batch(INPUTS, [0], torch.float32)
    batch.ref = batch.pi.detach().clone()
    batch.ref[:, 0] -= torch.tensor([chosen, rejected])
    value = dpo(batch, types, **options)
    value.backward()
    return f"loss {value.item()}, gradient {batch.pi.grad[:, 0].tolist()}"


def weighted_backward(types: str) -> str:
    """use_weighting: forward and backward on 8 pairs."""
    batch = Batch(INPUTS, ALL, torch.float64)
    value = dpo(batch, types, use_weighting=True)
    value.backward()
    return f"loss {value.item():.6f}"


def weights() -> str:
    """WPO's weight of every pair, from the loss with and without it."""
    pairs = [(loss("sigmoid", [i], use_weighting=True) / loss("sigmoid", [i])) for i in ALL]
    return " ".join(f"{x:.3g}" for x in pairs)


def alpha_po(total: float, loss_type: str) -> float:
    """CPOTrainer.cpo_loss with alpha 0.25 on a pair of summed float32 log-probs."""
    trainer = stub(alpha=0.25, loss_type=loss_type, beta=0.1, label_smoothing=0.0, simpo_gamma=0.5)
    return CPOTrainer.cpo_loss(trainer, torch.tensor([total]), torch.tensor([total - 5]))[0].item()


def orpo_certain(mean: float, other: float) -> str:
    """ORPOTrainer.odds_ratio_loss on given mean log-probs."""
    chosen = torch.tensor([mean], requires_grad=True)
    value = ORPOTrainer.odds_ratio_loss(stub(beta=0.1), chosen, torch.tensor([other]))[0]
    value.sum().backward()
    return f"beta log s {value.item()}, gradient {chosen.grad.item()}"


def thumbs_in_order(pairs: int) -> str:
    """The runs of equal labels that KTOTrainer, which must sample sequentially, sees of paired data."""
    column = [f"{i}" for i in range(pairs)]
    data = Dataset.from_dict({"prompt": column, "chosen": column, "rejected": column})
    labels = list(unpair_preference_dataset(data)["label"])
    return ", ".join(f"{len(list(run))} x {label}" for label, run in itertools.groupby(labels))


def main() -> None:
    """Print all."""
    found = {
        "trap, documented for robust and EXO only: sigmoid, label_smoothing 0 / 0.1": lambda: (
            loss("sigmoid", ALL),
            loss("sigmoid", ALL, label_smoothing=0.1),
        ),
        "robust, label_smoothing 0.5": lambda: loss("robust", ALL, label_smoothing=0.5),
        "sft + use_weighting, 8 pairs": lambda: weighted_backward("sft"),
        "hinge + use_weighting, backward": lambda: weighted_backward("hinge"),
        "sigmoid + use_weighting, backward": lambda: weighted_backward("sigmoid"),
        "WPO weights": weights,
        "alpha_divergence in float64": lambda: loss("sigmoid", ALL, f_divergence_type="alpha_divergence"),
        "forward_kl, float32, log-ratios -90": lambda: far_from_the_reference(
            "sigmoid", -90.0, -90.0, f_divergence_type="forward_kl"
        ),
        "alpha_divergence, float32, log-ratios -170 / -165": lambda: far_from_the_reference(
            "sigmoid", -170.0, -165.0, f_divergence_type="alpha_divergence"
        ),
        "discopop, float32, beta 0.5, h -160": lambda: far_from_the_reference("discopop", -80.0, 80.0, beta=0.5),
        "discopop, float32, beta 0.5, h -180": lambda: far_from_the_reference("discopop", -90.0, 90.0, beta=0.5),
        "CPO alpha 0.25 sigmoid, sums -60 / -65": lambda: alpha_po(-60.0, "sigmoid"),
        "CPO alpha 0.25 sigmoid, sums -120 / -125": lambda: alpha_po(-120.0, "sigmoid"),
        "ORPO, mean log-probs -1e-7, -1": lambda: orpo_certain(-1e-7, -1.0),
        "ORPO, mean log-probs 0, -1": lambda: orpo_certain(0.0, -1.0),
        "KTO on 2500 pairs, labels in order": lambda: thumbs_in_order(2500),
        "aot, micro-batches": lambda: halves("aot"),
        "aot_unpaired, micro-batches": lambda: halves("aot_unpaired"),
        "sft, micro-batches": lambda: halves("sft"),
        "sigmoid, micro-batches": lambda: halves("sigmoid"),
    }
    for name, call in found.items():
        print(f"{name}: {outcome(call)}")


if __name__ == "__main__":
    main()
