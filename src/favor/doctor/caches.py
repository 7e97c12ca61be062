"""The caches: what lies in favor's own and in the hub's, how large it is, what of it is damaged; whether the hub answers.

In: folders; with leave, the hub. Out: Signs. Next: subject.py.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_token, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from safetensors import SafetensorError, safe_open

from favor.doctor.settings import Sign, size
from favor.errors import clipped, first_line, without_secrets
from favor.run import cache_folder

# the largest are named
_SHOWN = 5
_TIMEOUT_S = 10


def hub_folder() -> Path:
    """Where huggingface_hub keeps models and data sets."""
    return Path(constants.HF_HUB_CACHE)


def caches() -> Iterator[Sign]:
    """Both caches, then what is damaged in them."""
    own = cache_folder()
    kept = {path.name: _weight(path) for path in sorted(own.iterdir())} if own.is_dir() else {}
    yield Sign("ok", "favor's cache", f"{own}: {_listed(kept)}", figures=kept)
    damaged = [f"{path.relative_to(own)} ({why})" for path, why in _damaged(own)]
    for said in damaged:
        yield Sign("note", "favor's cache", f"damaged: {said}", f"remove its folder below {own}; it is made again")
    yield from _hub_cache()


def _hub_cache() -> Iterator[Sign]:
    place = hub_folder()
    try:
        found = scan_cache_dir(place)
    except CacheNotFound:
        yield Sign("ok", "hub's cache", f"{place}: empty")
        return
    except (OSError, ValueError) as error:
        said = f"{place}: cannot be read ({first_line(error)})"
        yield Sign("note", "hub's cache", said, "check its rights, or set HF_HOME to another place")
        return
    kept = {repo.repo_id: repo.size_on_disk for repo in found.repos}
    yield Sign("ok", "hub's cache", f"{place}: {_listed(kept)}", figures=kept)
    for warning in found.warnings:
        said = f"damaged: {clipped(str(warning), 300)}"
        yield Sign("note", "hub's cache", said, "remove its folder models--OWNER--NAME; it is fetched again")
    for repo in found.repos:
        for path, why in _damaged(repo.repo_path):
            said = f"damaged: {repo.repo_id}, {path.name} ({why})"
            yield Sign("note", "hub's cache", said, f"hf cache rm {repo.repo_type}/{repo.repo_id}; it is fetched again")
    broken = list(place.rglob("*.incomplete"))
    if broken:
        said = f"{len(broken)} downloads were not finished, {size(sum(map(_weight, broken)))}"
        yield Sign("note", "hub's cache", said, "hf cache prune removes them; the next download starts again")


def _damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    """Weights that are cut off or are none; only the heads of files are read."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                yield path, first_line(error)


def _weight(path: Path) -> int:
    """Bytes of a file, or of everything in a folder; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        return sum(map(_weight, path.iterdir()))
    return path.lstat().st_size


def _listed(kept: dict[str, int]) -> str:
    if not kept:
        return "empty"
    largest = sorted(kept, key=lambda name: -kept[name])
    more = f" and {len(kept) - _SHOWN} more" if len(kept) > _SHOWN else ""
    named = ", ".join(f"{name} {size(kept[name])}" for name in largest[:_SHOWN])
    return f"{size(sum(kept.values()))} ({named}{more})"


def hub(*, asked: bool) -> Sign:
    """Whether the hub answers; without leave nothing is sent."""
    told = "a token is set" if get_token() else "no token is set (gated models need one: hf auth login)"
    if constants.HF_HUB_OFFLINE:
        return Sign(
            "note",
            "hub",
            "offline, as HF_HUB_OFFLINE asks: only models that are here can be used",
            "unset it to fetch others",
        )
    if not asked:
        return Sign("ok", "hub", f"not asked, so nothing left this machine; {told}", "favor doctor --hub asks")
    began = time.monotonic()
    try:
        httpx2.head(constants.ENDPOINT, timeout=_TIMEOUT_S, follow_redirects=True)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        said = f"{constants.ENDPOINT} does not answer ({type(error).__name__}: {without_secrets(first_line(error))})"
        todo = "check network and proxy (HTTPS_PROXY), or fetch models elsewhere and name their folders"
        return Sign("note", "hub", said, todo)
    return Sign("ok", "hub", f"{constants.ENDPOINT} answers in {time.monotonic() - began:.1f} s; {told}")
