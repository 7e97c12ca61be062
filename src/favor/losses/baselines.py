"""The paper's baselines as losses of a pair, and KTO, which asks whether each response is good rather than which is better.

In: log-ratios log pi/ref of chosen and rejected, nats, summed over tokens. Out: loss_P. Next: ../train/step.py.
"""

from torch import Tensor


def preferred_ft(chosen_P: Tensor) -> Tensor:
    """Preferred-FT: -log pi(y_w|x), less the constant -log ref(y_w|x): 0 at the start. arXiv 2305.18290, section 6."""
    return -chosen_P


def unlikelihood(chosen_P: Tensor, rejected_P: Tensor, alpha: float) -> Tensor:
    """-(log pi(y_w|x) - alpha log pi(y_l|x)), less the reference's constants. arXiv 2305.18290, section 6; Welleck et al. 2019.

    It has no floor: alpha = 1 drives log pi(y_l) to minus infinity, which is the paper's point.
    """
    return alpha * rejected_P - chosen_P


def kto(chosen_P: Tensor, rejected_P: Tensor, beta: float, zero: Tensor, weights: tuple[float, float]) -> Tensor:
    """KTO on the two responses of a pair, each judged alone: half of w_D (1 - s(b (r_w - z0))) + w_U (1 - s(b (z0 - r_l))).

    r = log pi/ref; zero is z0 = max(0, KL(pi || ref)), estimated on mismatched prompts and responses of the whole
    optimizer batch and taken as a constant. Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8.
    Worked number: at pi = ref with weights 1 -> 0.5.
    """
    good, bad = weights
    return (good * (1 - (beta * (chosen_P - zero)).sigmoid()) + bad * (1 - (beta * (zero - rejected_P)).sigmoid())) / 2
