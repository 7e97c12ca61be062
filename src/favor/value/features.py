"""What a model that never saw the labels knows of every response: its states and log-probs, from one forward.

In: a Policy and token trees. Out: one vector a response. Next: cheap.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from favor.data.types import Batch, TokenTree
from favor.model.batched import measured
from favor.model.load import Policy
from favor.model.logprobs import edge_logps, head_states, logps_of_states, sum_tokens, within

# the last columns: log-prob of the response in nats, and its scored tokens
NUMBERS = 2


def features(
    policy: Policy, trees: Sequence[TokenTree], budget: int, progress: Callable[[int], None]
) -> NDArray[np.float32]:
    """[R, 2 hidden + 2] of every response, as `measured` orders them.

    The mean over its scored tokens of the last hidden state in which each was chosen, the state at its last token, the sum of
    its tokens' log-probs (nats), and how many tokens were scored.
    """

    def measure(batch: Batch) -> Tensor:
        return within(policy, lambda: _features(policy, batch))

    return measured(policy, trees, measure, budget, progress=progress).numpy().T.astype(np.float32)


def _features(policy: Policy, batch: Batch) -> Tensor:
    """[2 hidden + 2, R]."""
    heads = batch.head_N.shape[0]
    states = head_states(policy, batch, torch.cat([batch.head_N, batch.last_R])).float()
    states_NH, last_RH = states[:heads], states[heads:]
    logp_E = edge_logps(policy, batch) if policy.fast_head is None else logps_of_states(policy, batch, states_NH)
    chosen_in_MH = states_NH[batch.edge_head_E[batch.member_edge_M]]
    sum_RH = torch.zeros_like(last_RH).index_add(0, batch.member_response_M, chosen_in_MH)
    length_R1 = batch.length_R[:, None]
    found = [sum_RH / length_R1, last_RH, sum_tokens(batch, logp_E)[:, None], length_R1]
    return torch.cat([part.double() for part in found], 1).T
