"""What a prompt with a picture costs: favor's tree (tower once) beside plain transformers, a row for every answer.

A random model with the widths, tile size and vocabulary of SmolVLM-256M-Instruct and a quarter of its depth (3 of 12 layers of the
tower, 7 of 30 of the language model), so tower and language model keep their shares. Forward and backward of one prompt.
Usage: python benchmarks/pictures.py --longest 1024
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import pictured

from favor.data.batches import build
from favor.data.pictures import marked, pictures_of
from favor.data.types import TokenTree
from favor.model import vision
from favor.model.layout import settle
from favor.model.load import ModelConfig, load_policy
from favor.model.logprobs import plain_logp, response_logps

TILE, PARTS = 512, 64


def save(folder, longest):
    """The model and its processor, which cuts a picture into up to (longest / 512)^2 tiles and the whole."""
    made = pictured.processor(longest=longest, tile=TILE, parts=PARTS)
    torch.manual_seed(0)
    tower = {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 3, "num_attention_heads": 12},
        **{"image_size": TILE, "patch_size": 16},
    }
    text = {
        **{"model_type": "llama", "vocab_size": pictured.VOCAB, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 7, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"max_position_embeddings": 8192, "pad_token_id": 0, "tie_word_embeddings": True},
    }
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=tower,
            text_config=text,
            scale_factor=4,
            image_token_id=made.image_token_id,
            tie_word_embeddings=True,
        )
    )
    model.generation_config.eos_token_id = made.tokenizer.eos_token_id
    model.save_pretrained(folder)
    made.save_pretrained(folder)


def tree_of(policy, file, answers, words):
    """One prompt with the picture, so many random answers of so many tokens."""
    text = marked({"prompt": "", "image": str(file)}, None)["prompt"]
    (picture,) = pictures_of(text)
    stands = policy.tokenizer(policy.sight.text_of(picture), add_special_tokens=False).input_ids
    asked = policy.tokenizer("What is the capital of France? " * 3, add_special_tokens=False).input_ids
    random = torch.Generator().manual_seed(1)
    said = [tuple(torch.randint(4, 300, (words,), generator=random).tolist()) for _ in range(answers)]
    placed = policy.sight.placed(text, stands + asked, said)
    return TokenTree(tuple(stands + asked), tuple(said), (True,) * answers, (), 0, 1, **placed)


def gradients(policy):
    found = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    for parameter in policy.model.parameters():
        parameter.grad = None
    return found


def by_tree(policy, tree, share_R):
    found_R = response_logps(policy, build([tree], policy.layout))
    (share_R * found_R).sum().backward()
    return found_R.detach()


def by_rows(policy, tree, share_R):
    found = []
    for share, response in zip(share_R, tree.response_ids, strict=True):
        ids = torch.tensor([tree.prompt_ids + response])
        value = plain_logp(policy, ids, len(tree.prompt_ids), tree.pictures)
        (share * value).backward()
        found.append(value.detach())
    return torch.stack(found)


def timed(work, times):
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        found = work()
        taken.append(time.perf_counter() - began)
    return found, statistics.median(taken), max(taken) - min(taken)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--words", type=int, default=64, help="tokens of an answer")
    parser.add_argument(
        "--longest", type=int, nargs="+", default=[1024], help="longest edge in pixels, 2048 in SmolVLM"
    )
    parser.add_argument("--towers", nargs="+", default=["frozen", "train"])
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("tiles answers tower   tokens rows/tree  s rows (spread)  s tree (spread)  times   logp     gradient")
    for longest in args.longest:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            save(root / "MODEL", longest)
            pictured.picture(root / "p.png", 480, 640)
            for tower in args.towers:
                policy = load_policy(ModelConfig(path=str(root / "MODEL"), vision=tower), sees=True)
                vision.freeze(policy.causal_lm, tower)
                for answers in args.answers:
                    tree = tree_of(policy, root / "p.png", answers, args.words)
                    plain, _ = settle(policy, "rows", [tree])
                    share_R = torch.linspace(-1, 1, answers, dtype=torch.float64)
                    truth_R, slow, slow_off = timed(partial(by_rows, plain, tree, share_R), args.times)
                    truth = gradients(plain)
                    ours, _ = settle(policy, "tree", [tree])
                    found_R, fast, fast_off = timed(partial(by_tree, ours, tree, share_R), args.times)
                    # both were added up equally often
                    found = gradients(ours)
                    off = float(((found_R - truth_R) / truth_R).abs().max())
                    # keys' biases have no gradient but rounding's: relative to a hundredth of the largest at least
                    floor = 1e-2 * max(float(g.norm()) for g in truth.values())
                    worst = max(float((found[n] - g).norm()) / max(float(g.norm()), floor) for n, g in truth.items())
                    batch = build([tree], "tree")
                    tokens = f"{batch.num_naive_tokens} / {batch.num_tokens}"
                    tiles = tree.pictures[0].tokens // PARTS
                    print(
                        f"{tiles:5} {answers:7} {tower:7} {tokens:>16}  {slow:6.2f} ({slow_off:.2f})    "
                        f"{fast:6.2f} ({fast_off:.2f})     {slow / fast:5.2f}   {off:.1e}  {worst:.1e}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
