"""The slow oracle: DPO in plain torch and transformers, a response at a time, nothing padded, packed, shared or stored.

In: a model folder, rows, settings. Out: the losses and the change of every weight that are right. Next: cases.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

Row: TypeAlias = Mapping[str, Any]
Weights: TypeAlias = dict[str, Tensor]
_BETAS, _EPS = (0.9, 0.999), 1e-8


class Scored(NamedTuple):
    """Which tokens count; the defaults are right, other values are faults that can be told by their result.

    skipped: the response's first tokens that are left out; ends: how many end tokens stand and count; shifted: each token is
    looked up in the prediction of the next one; behind: what the template writes behind the end token counts, too.
    """

    skipped: int = 0
    ends: int = 1
    shifted: bool = False
    behind: bool = False


RIGHT = Scored()


class Tokens(NamedTuple):
    """A prompt and its response as ids. The response ends with its end token; behind: what the template writes after it."""

    prompt: list[int]
    response: list[int]
    behind: list[int]


class Expected(NamedTuple):
    """What is right. losses: of every step, the mean over its pairs, nats; change: of every weight; norms: of every gradient."""

    losses: list[float]
    change: Weights
    norms: list[float]


@dataclass(frozen=True)
class Steps:
    """What a trainer is asked for: AdamW (betas 0.9 and 0.999, eps 1e-8, no decay), a rate that falls linearly from lr to 0.

    batch: pairs of an optimizer step; accumulation: micro-batches that a step is cut into; clip: the gradient's largest norm.
    """

    lr: float = 1e-3
    beta: float = 0.1
    batch: int = 4
    accumulation: int = 1
    epochs: int = 1
    clip: float = 1e9
    max_length: int | None = None
    seed: int = 0


def load(folder: Path) -> Any:
    """A causal model in float32 whose dropout is off."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def weights_of(model: Any) -> Weights:
    """A copy of every parameter by its name, float64."""
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


def tokens_of(tokenizer: Any, row: Row, side: str) -> Tokens:
    """Ids of a row: text as it is with the end token behind it, turns by the chat template.

    What follows a prompt is the response's own ids, also where a tokenizer would merge letters over the boundary: the model
    is asked behind the prompt's own.
    """
    prompt, response = row["prompt"], row[side]
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        whole = tokenizer(prompt + response).input_ids
        exact = whole[: len(ids)] == ids
        own = whole[len(ids) :] if exact else tokenizer(response, add_special_tokens=False).input_ids
        return Tokens(ids, [*own, tokenizer.eos_token_id], [])
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template([*prompt, *response], tokenize=False),
    ]
    ids, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    assert whole[: len(ids)] == ids, "the template says the prompt in another way once it is answered"
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    return Tokens(ids, whole[len(ids) : end], whole[end:])


def expected(folder: Path, rows: Sequence[Row], steps: Steps, scored: Scored = RIGHT) -> Expected:
    """Train on the rows in their order.

        loss = mean over the step's pairs of -log sigmoid(beta [log pi(w)/ref(w) - log pi(l)/ref(l)])

    (Rafailov et al. 2023, eq. 7; sums over the response's tokens, nats), the reference being the model before the first step.
    """
    tokenizer, model, reference = AutoTokenizer.from_pretrained(folder), load(folder), load(folder)
    pairs = [[tokens_of(tokenizer, row, side) for side in ("chosen", "rejected")] for row in rows]
    batches = [pairs[i : i + steps.batch] for i in range(0, len(pairs), steps.batch)] * steps.epochs
    start, parameters = weights_of(model), dict(model.named_parameters())
    means = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    losses: list[float] = []
    norms: list[float] = []
    for number, batch in enumerate(batches):
        each = [_pair_loss(model, reference, pair, steps.beta, scored) for pair in batch]
        loss = torch.stack(each).mean()
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        norm = torch.stack([gradient.norm() for gradient in found]).norm()
        rate, shrunk = steps.lr * (1 - number / len(batches)), min(1.0, steps.clip / (norm.item() + 1e-6))
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            _adamw(parameter, gradient * shrunk, means[name], number + 1, rate)
        losses.append(loss.item())
        norms.append(norm.item())
    return Expected(losses, change(start, weights_of(model)), norms)


def change(start: Weights, end: Weights) -> Weights:
    """What training added to every weight."""
    return {name: end[name] - start[name] for name in start}


def gap(found: Weights, right: Weights) -> float:
    """Norm of the difference of two changes over the norm of the right one; inf where a weight is missing."""
    if found.keys() != right.keys():
        return float("inf")
    off = torch.stack([(found[name] - right[name]).norm() for name in right]).norm()
    return (off / torch.stack([part.norm() for part in right.values()]).norm()).item()


def _pair_loss(model: Any, reference: Any, pair: Sequence[Tokens], beta: float, scored: Scored) -> Tensor:
    chosen, rejected = (_logp(model, one, scored) for one in pair)
    with torch.no_grad():
        ref_chosen, ref_rejected = (_logp(reference, one, scored) for one in pair)
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def _logp(model: Any, one: Tokens, scored: Scored) -> Tensor:
    """Log-prob of a response, nats, of the tokens that `scored` says; by one row without padding, float32."""
    own = [*one.response[:-1], *one.response[-1:] * scored.ends, *(one.behind if scored.behind else ())]
    ids = torch.tensor([*one.prompt, *own])
    logps = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    at = torch.arange(len(one.prompt) + scored.skipped, len(ids))
    # the prediction of the token at t stands at t - 1
    return logps[at if scored.shifted else at - 1, ids[at]].sum()


def _adamw(parameter: Tensor, gradient: Tensor, means: tuple[Tensor, Tensor], step: int, rate: float) -> None:
    """Kingma and Ba 2015, algorithm 1; both means are moved in place."""
    for mean, new, keep in zip(means, (gradient, gradient.square()), _BETAS, strict=True):
        mean.mul_(keep).add_(new, alpha=1 - keep)
    first, second = (mean / (1 - keep**step) for mean, keep in zip(means, _BETAS, strict=True))
    with torch.no_grad():
        parameter.sub_(rate * first / (second.sqrt() + _EPS))
