"""Direct Preference Optimization in one file: the whole method, with nothing but torch and transformers.

A language model answers a prompt in many ways, and people prefer some answers to others. DPO (Rafailov et al. 2023,
arXiv 2305.18290) teaches the model that preference directly: no reward model, no sampling, only a classification loss on
pairs of answers. This file reads from top to bottom as the method does: text -> tokens -> log-probs -> loss -> step.

    python examples/one_file_dpo.py --model MODEL --data pairs.jsonl --out trained

`pairs.jsonl` has one JSON object a line: {"prompt": "...", "chosen": "...", "rejected": "..."}. `favor train` does the same
and more (a prompt shared by its answers is computed once, damaged data is refused, a stopped run resumes); a test holds
this file to it, loss by loss and weight by weight.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer


class Row(NamedTuple):
    """Token ids of one prompt and one answer behind it; the answer begins at `start`."""

    ids: list[int]
    start: int


def tokenize(tokenizer: Any, prompt: str, answer: str) -> Row:
    """Text -> ids. The answer ends with the end-of-turn token, or the model would never learn to stop."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        before = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        # templates write a line break after the last end-of-turn token: a model that has stopped does not say it
        whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    else:
        before, whole = prompt, prompt + answer
    # a template writes the beginning-of-sequence token itself; plain text gets it from the tokenizer
    special = not tokenizer.chat_template
    prompt_ids = tokenizer(before, add_special_tokens=special).input_ids
    ids = tokenizer(whole, add_special_tokens=special).input_ids
    # the loss must know to the token where the answer begins, so prompt + answer must start with the prompt's own tokens
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        raise SystemExit(f"no exact boundary between prompt and answer: {prompt[-40:]!r} | {answer[:40]!r}")
    return Row(ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id], len(prompt_ids))


def pad(rows: list[Row], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of several lengths as one batch [R, T]: ids, which of them are real, and which belong to an answer.

    Padding stands on the right, where a causal model's real tokens cannot see it; its id does not matter.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=device)
    place = torch.arange(longest, device=device)
    real = place < torch.tensor([[len(row.ids)] for row in rows], device=device)
    answer = real & (place >= torch.tensor([[row.start] for row in rows], device=device))
    return ids, real, answer


def answer_logps(model: Any, rows: list[Row], device: str) -> Tensor:
    """Log pi(answer | prompt) of every row [R], in nats, summed over the answer's tokens (end-of-turn token included)."""
    ids, real, answer = pad(rows, device)
    # the logits at place t are about the token at t + 1
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * answer[:, 1:]).sum(-1)


def dpo_loss(
    pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The loss of every pair [P] and the implicit reward of every answer [R]; the paper's equation 7, in its signature.

        loss = -log sigmoid(beta [log pi(w)/ref(w) - log pi(l)/ref(l)])

    w is the preferred answer, l the other. The log-ratio to the reference (the model before training) is the reward that
    the policy stands for; beta says how costly it is to move away from the reference. Where both models agree it is ln 2.
    """
    log_ratio = pi_logps - ref_logps
    losses = -logsigmoid(beta * (log_ratio[yw_idxs] - log_ratio[yl_idxs]))
    return losses, beta * log_ratio.detach()


def train(args: argparse.Namespace) -> None:
    """Read, tokenize, compute the reference once, then one optimizer step per batch of pairs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    # eval: dropout would make log-probs random, and the loss compares them with the reference's
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to(device).eval()

    pairs: list[tuple[Row, Row]] = []
    for line in Path(args.data).read_text("utf-8").split("\n"):
        if line.strip():
            pair = json.loads(line)
            chosen, rejected = (tokenize(tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
            pairs.append((chosen, rejected))
    # batches in the order of the file: shuffle it beforehand, if it is sorted in any way
    batches = [pairs[i : i + args.batch] for i in range(0, len(pairs), args.batch)]

    # The reference is the model as it is now. It never changes, so its log-probs are computed once and no copy is kept.
    def rows_of(batch: list[tuple[Row, Row]]) -> list[Row]:
        return [chosen for chosen, _ in batch] + [rejected for _, rejected in batch]

    with torch.no_grad():
        ref_logps = [answer_logps(model, rows_of(batch), device) for batch in batches]

    # decay pulls on matrices only: a norm's scale or a bias has no business at zero
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    total = args.epochs * len(batches)
    # the first step has the full rate, the one after the last would have none
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    for step in range(total):
        batch, ref = batches[step % len(batches)], ref_logps[step % len(batches)]
        yw_idxs = torch.arange(len(batch), device=device)
        yl_idxs = yw_idxs + len(batch)
        losses, rewards = dpo_loss(answer_logps(model, rows_of(batch), device), ref, yw_idxs, yl_idxs, args.beta)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        # in how many pairs the preferred answer has the higher reward, and by how much on average (beta x nats)
        margin = rewards[yw_idxs] - rewards[yl_idxs]
        share, mean = (margin > 0).float().mean().item(), margin.mean().item()
        print(f"step {step + 1}/{total}  loss {losses.mean().item():.6f}  accuracy {share:.2f}  margin {mean:+.4f}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Direct Preference Optimization in one file.")
    parser.add_argument("--model", required=True, help="a model folder or hub id")
    parser.add_argument("--data", required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--out", required=True, help="folder for the trained model")
    parser.add_argument("--beta", type=float, default=0.1, help="weight of staying near the reference")
    parser.add_argument("--lr", type=float, default=5e-6, help="learning rate of the first step, falling linearly to 0")
    parser.add_argument("--batch", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the data")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's, on matrices")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    train(parser.parse_args())
