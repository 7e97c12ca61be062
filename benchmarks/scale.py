"""What 1B, 8B and 70B take on 1 to 1,024 GPUs, computed: the tables of docs/scale.md. Nothing here was run on a GPU.

    python benchmarks/scale.py

Every constant says where it comes from: measured, published, or assumed.
"""

from typing import NamedTuple

from transformers import LlamaConfig

from favor.model.load import ModelConfig
from favor.model.size import GIB, parameters, sizes
from favor.train.packs import LEAST, LEAST_ON_A_GPU

# published: shapes of Llama 3.2 1B, 3.1 8B and 3.1 70B
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
HEADS = {"1B": 32, "8B": 32, "70B": 64}
VOCABULARY = 128_256
GPUS = (1, 8, 64, 1024)
# published: NVIDIA H100 SXM, bfloat16 products without sparsity, NVLink in one direction, one 400 Gb/s port for each GPU
PEAK_FLOPS, WITHIN_MACHINE, BETWEEN_MACHINES, CARD = 989e12, 450e9, 50e9, 80e9
PER_MACHINE = 8
# assumed: the share of those rates that is reached; sending overlaps with computing
COMPUTES, SENDS = 0.35, 0.7
# assumed: a data set of preferences, one pair a prompt; what is left of a card for what is not counted
PROMPTS, TOKENS, BATCH_PROMPTS, SPARE = 60_000, 700, 128, 0.9
# by construction: floating-point operations for each weight and token (forward, recomputed, backward), and bytes sent for
# each weight and pack (collected twice as float32, gradients summed once); adapters' own are left out
FLOPS = {"all weights": 2 + 2 + 4, "LoRA": 2 + 2 + 2}
SENT = {"all weights": 12, "LoRA": 8}
# by construction: bytes for each weight that is split (measured: docs/choose.md), collected outside of layers, and in layers
KEPT, OUTSIDE, LAYERS = {"all weights": 16, "LoRA": 4}, {"all weights": 8, "LoRA": 4}, {"all weights": 12, "LoRA": 8}


class Model(NamedTuple):
    """Numbers of the whole model, of a layer, of embedding and head; bytes of the activations of a token, of logits."""

    weights: int
    layer: int
    rest: int
    a_token: int
    logits: int


class Run(NamedTuple):
    """On so many GPUs: how it is split, tokens of a pack, bytes on each, seconds of its products and of sending, hours."""

    how: str
    tokens: int
    size: float
    compute: float
    network: float
    hours: float

    @property
    def fits(self) -> bool:
        """Whether a card holds it."""
        return self.size <= SPARE * CARD


def model(name: str) -> Model:
    """From the shapes, by favor's own estimate: layers recomputed, float32 activations, one layer's whole at a time."""
    heads = {"num_attention_heads": HEADS[name], "num_key_value_heads": 8, "vocab_size": VOCABULARY}
    shape = LlamaConfig(**SHAPES[name], **heads)
    total = parameters(shape)
    rest = VOCABULARY * shape.hidden_size * (1 if shape.tie_word_embeddings else 2) + shape.hidden_size
    found = sizes(shape, ModelConfig(path=name, gradient_checkpointing=True), LEAST_ON_A_GPU)
    one = 4 * (14 * shape.hidden_size + 4 * shape.intermediate_size)
    a_token = found.activations // LEAST_ON_A_GPU + one
    return Model(total, (total - rest) // shape.num_hidden_layers, rest, a_token, found.logits)


def run(it: Model, trains: str, gpus: int) -> Run:
    """`hybrid` where a machine holds the model, else `full`; one GPU holds everything. Packs as large as fit, as favor's are."""
    hows = ["none"] if gpus == 1 else ["full"] if gpus <= PER_MACHINE else ["hybrid", "full"]
    found: list[Run] = []
    for how in hows:
        most = LEAST_ON_A_GPU
        found.append(_run(it, trains, gpus, how, most))
        while not found[-1].fits and most > LEAST:
            most //= 2
            found.append(_run(it, trains, gpus, how, most))
    return next((one for one in found if one.fits), found[-1])


def _run(it: Model, trains: str, gpus: int, how: str, most: int) -> Run:
    parts = min(gpus, PER_MACHINE) if how == "hybrid" else gpus
    collected = OUTSIDE[trains] * it.rest + LAYERS[trains] * it.layer if parts > 1 else 0
    tokens = -(-BATCH_PROMPTS // gpus) * TOKENS
    size = KEPT[trains] * it.weights / parts + collected + min(tokens, most) * it.a_token + it.logits
    packs = -(-tokens // most)
    compute = FLOPS[trains] * it.weights * tokens / packs / (COMPUTES * PEAK_FLOPS)
    rate = WITHIN_MACHINE if parts <= PER_MACHINE else BETWEEN_MACHINES
    network = SENT[trains] * it.weights * (parts - 1) / parts / (SENDS * rate)
    if how == "hybrid" and trains == "all weights":
        # gradients once more over the machines, each GPU its part, there and back
        network += 2 * 4 * it.weights / parts / (SENDS * BETWEEN_MACHINES)
    steps = -(-PROMPTS // BATCH_PROMPTS)
    # the reference is a forward of everything, once
    reference = max(compute * 2 / FLOPS[trains], network * 4 / SENT[trains])
    return Run(how, tokens // packs, size, compute, network, steps * packs * (max(compute, network) + reference) / 3600)


def tables() -> list[str]:
    """GiB and time; then tokens of a pack, seconds of its products and of what is sent meanwhile."""
    models = {name: model(name) for name in SHAPES}
    head = " | ".join(f"{gpus:,} GPU{'s' * (gpus > 1)}" for gpus in GPUS)
    lines = [f"| model | trains | {head} |", "|---" * (2 + len(GPUS)) + "|"]
    found = {(name, trains): [run(it, trains, n) for n in GPUS] for name, it in models.items() for trains in FLOPS}
    for (name, trains), runs in found.items():
        cells = [f"{one.size / GIB:.0f} GiB, {_hours(one)}" for one in runs]
        lines.append(f"| {name} | {trains} | {' | '.join(cells)} |")
    lines += ["", f"| model | trains | {head} |", "|---" * (2 + len(GPUS)) + "|"]
    for (name, trains), runs in found.items():
        lines.append(f"| {name} | {trains} | {' | '.join(map(_sent, runs))} |")
    return lines


def _hours(found: Run) -> str:
    if not found.fits:
        return "too large"
    minutes = 60 * found.hours
    return (
        f"{found.hours:.1f} h" if minutes >= 60 else f"{minutes:.0f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"
    )


def _sent(found: Run) -> str:
    if not found.fits:
        return "-"
    return f"{found.how}, {found.tokens:,} tokens: {found.compute:.2g} / {found.network:.2g} s"


if __name__ == "__main__":
    print("\n".join(tables()))
