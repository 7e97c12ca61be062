"""The machine's matrix-product rate at the shapes of a small language model's blocks, in GFLOP/s, and its memory's."""

import time

import torch

SHAPES = ((1024, 576, 576), (1024, 576, 1536), (1024, 1536, 576))


def rate(seconds: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """FLOPs of the products over the time they take, each shape weighted by its work."""
    pairs = [(torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype).T) for m, k, n in SHAPES]
    flops = sum(2.0 * m * k * n for m, k, n in SHAPES)
    for a, b in pairs:
        a @ b
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for a, b in pairs:
            a @ b
        rounds += 1
    return flops * rounds / (time.perf_counter() - began) / 1e9


def bandwidth() -> float:
    """Bytes a second that a product with a single row reads: the weights of a model that says one token."""
    matrix, row = torch.randn(16384, 8192), torch.randn(8192)
    matrix @ row
    began = time.perf_counter()
    for _ in range(5):
        matrix @ row
    return 5 * matrix.nbytes / (time.perf_counter() - began)


if __name__ == "__main__":
    print(f"{rate():.0f} GFLOP/s with {torch.get_num_threads()} threads")
