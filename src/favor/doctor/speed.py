"""What torch can compute with here, whether it computes rightly, and how fast: a probe of under 2 seconds.

In: torch, imported by now. Out: Signs. Next: caches.py.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from favor.doctor.machine import cores
from favor.doctor.settings import Sign, size
from favor.model.room import Room, memory

# side of the matrices of the probe, bytes that are copied, seconds of each part
_SIDE, _COPIED, _SECONDS = 1024, 64 << 20, 0.3
# operations a token and parameter: forward and backward of the policy, one forward of the reference
_TRAINING = 8
# of the rate of bare matrix products, what training reaches (docs/log.md: its blocks ran at 76 to 81 %)
_REACHED = 0.8
# parameters
_SIZES = {"135M": 135e6, "1B": 1e9}
# tokens a second below which training is slow
_SLOW = 100
_NVIDIA = Path("/dev/nvidia0")
_INEXACT = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
_FAILURES = (RuntimeError, OSError, NotImplementedError)


class Speed(NamedTuple):
    """Operations a second of products in float32 and bfloat16; bytes a second of a copy, read and written."""

    float32: float
    bfloat16: float
    copied: float


def devices() -> Iterator[Sign]:
    """What `model.device = auto` takes, and what is there beside it."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            kind = f"compute capability {found.major}.{found.minor}, {size(found.total_memory)}"
            taken = "model.device=auto takes it" if number == 0 else "for torchrun; one process takes one GPU"
            yield Sign("ok", f"GPU {number}", f"{found.name}, {kind}; {taken}")
    elif torch.version.cuda is None and _NVIDIA.exists():
        said = f"an NVIDIA GPU is here, but torch {torch.__version__} is built without CUDA, so the CPU is used"
        yield Sign("note", "GPU", said, "install torch with CUDA, see https://pytorch.org/get-started/locally/")
    elif torch.version.cuda is not None:
        said = f"torch is built for CUDA {torch.version.cuda} and sees no GPU, so the CPU is used"
        yield Sign("note", "GPU", said, "look at nvidia-smi and CUDA_VISIBLE_DEVICES, if there should be one")
    elif torch.backends.mps.is_available():
        yield Sign("note", "GPU", "an Apple GPU is here; favor computes on CPUs and NVIDIA GPUs, so the CPU is used")
    else:
        yield Sign("ok", "GPU", "none; model.device=auto takes the CPU")


def room() -> Room:
    """Memory where models are computed."""
    if not torch.cuda.is_available():
        return memory()
    free, total = torch.cuda.mem_get_info()
    return Room(total, free, "memory of GPU 0")


def threads() -> Sign:
    """Threads of torch beside the cores."""
    count, allowed = torch.get_num_threads(), cores()
    if count == allowed:
        return Sign("ok", "threads", f"torch computes with {count}, one a core")
    less = "some cores stay idle" if count < allowed else "threads wait for each other, which is slow"
    return Sign(
        "note", "threads", f"torch computes with {count} on {allowed} cores: {less}", f"set OMP_NUM_THREADS={allowed}"
    )


def exact() -> Sign:
    """Whether float32 products are float32: on GPUs, TF32 keeps 10 bits of 23."""
    forced = [name for name in _INEXACT if os.environ.get(name, "0") not in ("", "0")]
    if torch.cuda.is_available() and (forced or torch.get_float32_matmul_precision() != "highest"):
        why = f"{forced[0]} is set" if forced else "torch's float32 matmul precision is not 'highest'"
        said = f"{why}: float32 products are rounded to TF32, so figures are not those of float32"
        return Sign("note", "float32", said, f"unset {forced[0]}" if forced else "leave it at 'highest'")
    if torch.cuda.is_available():
        return Sign("ok", "float32", "products are full float32; TF32 is off, as favor wants it")
    return Sign("ok", "float32", "products are full float32; TF32 settings matter on NVIDIA GPUs only")


def computed() -> Sign | None:
    """A product with its gradient, held against float64 on the CPU; None where they agree."""
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).unbind()
    try:
        mine = a.to(_device()).requires_grad_()
        product = mine @ b.to(_device())
        (gradient,) = torch.autograd.grad(product.sum(), mine)
        found = [product.detach().cpu().double(), gradient.cpu().double()]
    except _FAILURES as error:
        return Sign(
            "broken", "torch", f"cannot compute ({type(error).__name__}: {str(error)[:200]})", "install it anew"
        )
    expected = [a.double() @ b.double(), torch.ones(64, 64, dtype=torch.float64) @ b.double().T]
    worst = max((x - y).abs().max().item() for x, y in zip(found, expected, strict=True))
    if worst <= 1e-2:
        return None
    said = f"computes wrongly: a product of matrices is off by {worst:.2g}"
    return Sign("broken", "torch", said, "install it anew; if it stays, suspect the hardware or its driver")


def measured() -> Speed:
    """The probe."""
    device = _device()
    a = torch.randn(_SIDE, _SIDE, device=device)
    half, bytes_ = a.bfloat16(), torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(bytes_)
    work = 2.0 * _SIDE**3
    return Speed(
        _rate(lambda: a @ a, work), _rate(lambda: half @ half, work), _rate(lambda: target.copy_(bytes_), 2.0 * _COPIED)
    )


def _rate(work: Callable[[], Tensor], amount: float) -> float:
    """Amount a second, of the fastest time: another program can only make it slower. Once before the clock, then for a while."""
    work()
    _wait()
    began, best = time.perf_counter(), float("inf")
    while (start := time.perf_counter()) - began < _SECONDS:
        work()
        _wait()
        best = min(best, time.perf_counter() - start)
    return amount / best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(speed: Speed) -> Sign:
    """What model.dtype takes, and whether the other would be faster."""
    times = speed.bfloat16 / speed.float32
    said = "float32, the default of model.dtype on every machine, and what every figure is measured in"
    if times >= 1.3:
        said += f"; model.dtype=bfloat16 multiplies {times:.1f} x faster here, but rounds while training"
    else:
        said += "; model.dtype=bfloat16 is no faster here"
    return Sign("ok", "precision", said, figures={"bfloat16_over_float32": times})


def estimates(speed: Speed) -> Sign:
    """Tokens a second of training and of sampling, by model size."""
    trained = {name: _REACHED * speed.float32 / (_TRAINING * count) for name, count in _SIZES.items()}
    sampled = {name: speed.copied / (4 * count) for name, count in _SIZES.items()}
    rates = f"{speed.float32 / 1e9:.0f} GFLOP/s in float32, {speed.copied / 1e9:.0f} GB/s"
    told = "; ".join(
        f"{name} model: {_round(trained[name])} tokens/s of DPO, {_round(sampled[name])} of one sampled answer"
        for name in _SIZES
    )
    figures = {"gflops": speed.float32 / 1e9, "gbytes_per_s": speed.copied / 1e9}
    figures |= {"train_tokens_per_s": trained, "sample_tokens_per_s": sampled}
    said = f"{rates}: estimate, within a factor of 2 or so: {told}"
    slow = [name for name in _SIZES if trained[name] < _SLOW]
    if not slow:
        return Sign("ok", "speed", said, figures=figures)
    hour = _round(3600 * trained[slow[0]])
    todo = (
        f"training a {slow[0]} model is slow here ({hour} tokens an hour): take a smaller model or fewer rows, or a GPU"
    )
    return Sign("note", "speed", said, todo, figures)


def _round(value: float) -> str:
    """Two digits: more would be untrue."""
    return f"{float(f'{value:.2g}'):,.10g}"
