"""The paper's baselines as losses of a pair.

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
