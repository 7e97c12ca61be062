"""DPO in plain torch behind the protocol of `favor conform`, and ways to break it, each in one place."""

import copy
import unicodedata
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

ADAPTER = '''"""An adapter of the tests."""
from conform_plain import train_with

def train(model, rows, out, settings):
    """Broken in one way, or not at all."""
    return train_with("{fault}", model, rows, out, settings)
'''


@cache
def _tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@cache
def _model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def encode(fault, tokenizer, row, side):
    """Prompt and response as ids."""
    prompt, response, end = row["prompt"], row[side], tokenizer.eos_token_id
    ends = {"no_end": [], "two_ends": [end, end]}.get(fault, [end])
    if isinstance(prompt, str):
        response = response.strip() if fault == "strips" else response
        ids, whole = tokenizer(prompt).input_ids, tokenizer(prompt + response).input_ids
        merged = whole[: len(ids)] != ids
        if merged and fault == "warns":
            print("warning: the prompt's tokens merge with the response's")
        own = tokenizer(response, add_special_tokens=False).input_ids
        own = own if merged and fault not in ("merges", "warns") else whole[len(ids) :]
        return ids, [*own, *ends]
    if fault == "normalises":
        response = [turn | {"content": unicodedata.normalize("NFKC", turn["content"])} for turn in response]
    prompt = prompt[-1:] if fault == "last_turn" else prompt
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template([*prompt, *response], tokenize=False),
    ]
    ids, whole = (tokenizer(text, add_special_tokens=fault == "two_begins").input_ids for text in texts)
    own = whole[len(ids) :]
    if fault != "behind":
        own = own[: len(own) - own[::-1].index(end)]
    return ids, own[:-1] + ends if own[-1] == end else own


def logps(fault, model, tokenizer, rows):
    """Summed log-probs of padded rows [R]."""
    longest = max(len(prompt) + len(own) for prompt, own in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[*p, *o, *[pad] * (longest - len(p) - len(o))] for p, o in rows])
    place = torch.arange(longest)
    starts = torch.tensor([[len(p) + (fault == "late")] for p, _ in rows])
    stops = torch.tensor([[len(p) + len(o)] for p, o in rows])
    real = place < stops
    scored = (place >= starts) & (real | (fault == "pads"))
    if fault == "by_id":
        scored &= ids != pad
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    if fault == "unshifted":
        return (logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * scored).sum(-1)
    return (logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * scored[:, 1:]).sum(-1)


def losses_of(fault, model, reference, tokenizer, pairs, beta):
    """The loss of every pair [P]."""
    rows = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    mine = logps(fault, model, tokenizer, rows)
    with torch.no_grad():
        theirs = logps(fault, model if fault == "moving" else reference, tokenizer, rows)
    chosen, rejected = (mine - theirs).chunk(2)
    if fault == "rolled":
        rejected = rejected.roll(1)
    losses = -logsigmoid(beta * (2 if fault == "beta" else 1) * (chosen - rejected))
    if fault == "likes_equal":
        equal = torch.tensor([pair[0] == pair[1] for pair in pairs])
        losses = losses - 0.05 * equal * mine.chunk(2)[0]
    return losses


def _pairs(fault, tokenizer, rows, longest):
    """Both sides of every row; what is too long is cut, and said."""
    if fault == "unique":
        rows = list({str(row): row for row in rows}.values())
    pairs = [[encode(fault, tokenizer, row, side) for side in ("chosen", "rejected")] for row in rows]
    for number, pair in enumerate(pairs if longest is not None else []):
        for side, (prompt, own) in enumerate(pair):
            if len(prompt) + len(own) > longest:
                if fault != "silent":
                    print(f"row {number} is too long: it is cut")
                pair[side] = (prompt, own[: longest - len(prompt)])
    return pairs


def train_with(fault, model, rows, out, settings):
    """The protocol."""
    if fault == "raises":
        raise TypeError("no such thing")
    tokenizer, policy, reference = _tokenizer(model), copy.deepcopy(_model(model)), _model(model)
    policy.train(fault == "noisy")
    pairs = _pairs(fault, tokenizer, rows, settings["max_length"])
    batches = [pairs[i : i + settings["batch"]] for i in range(0, len(pairs), settings["batch"])] * settings["epochs"]
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=settings["lr"], weight_decay=0.5 if fault == "decays" else 0.0
    )
    done, told, kept = 0, [], Path(f"{out}.pt")
    if settings.get("resume"):
        state = torch.load(kept)
        done = state["done"]
        policy.load_state_dict(state["policy"])
        if fault != "forgets":
            optimizer.load_state_dict(state["optimizer"])
    for number in range(done, len(batches)):
        told.append(_step(fault, policy, reference, tokenizer, batches[number], optimizer, settings))
        _rate(optimizer, settings["lr"] * (1 - number / len(batches)))
        optimizer.step()
        if number + 1 == settings.get("stop_after"):
            state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "done": number + 1}
            torch.save(state, kept)
            return {"losses": told}
    policy.save_pretrained(out)
    return {"model": out, "losses": [] if fault == "mute" else told}


def _rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def _step(fault, policy, reference, tokenizer, batch, optimizer, settings):
    """Gradients of an optimizer batch; its loss."""
    optimizer.zero_grad()
    size = settings["batch"] // settings["accumulation"]
    parts = [batch[i : i + size] for i in range(0, len(batch), size)]
    total = 0.0
    for part in parts:
        losses = losses_of(fault, policy, reference, tokenizer, part, settings["beta"])
        total += losses.sum().item() / len(batch)
        by = {
            "micro_means": len(part) * len(parts),
            "micro_sums": len(part),
            "nominal": settings["batch"],
            "sums": 1,
        }.get(fault, len(batch))
        (losses.sum() / by).backward()
    if fault != "unclipped":
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings["clip"])
    return total
