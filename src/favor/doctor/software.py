"""Versions: favor, Python, and the packages that favor asks for, its extras among them.

In: what pip knows. Out: Signs. Nothing is imported but by `imported`, so that a broken package is a finding. Next: machine.py.
"""

import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from favor.doctor.settings import Sign
from favor.errors import first_line

# extra -> what it is for; those of developers are left out
EXTRAS: Mapping[str, str] = {
    "label": "favor label, favor chat, favor watch",
    "tensorboard": "watch.logger=tensorboard",
    "wandb": "watch.logger=wandb",
    "mlflow": "watch.logger=mlflow",
    "trackio": "watch.logger=trackio",
    "vision": "models that read pictures",
    "vllm": "engine.kind=vllm",
    "bitsandbytes": "model.weights=nf4, optim.kind=adamw8bit",
}
_SHOWN = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "huggingface_hub")
# what favor cannot do without, in the order in which they need each other
_IMPORTED = ("torch", "transformers.models.auto", "peft")
# what a package that is half installed, or was built for another one, raises at its import
_FAILURES = (ImportError, OSError, RuntimeError, ValueError, AttributeError, TypeError, SyntaxError)
# imports that take longer make every command slow
_LONG_S = 30


def software() -> Iterator[Sign]:
    """Favor itself and Python; the packages that favor needs; the extras."""
    where = f"Python {platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    try:
        asked, own, python = requires("favor") or [], version("favor"), metadata("favor")["Requires-Python"]
    except PackageNotFoundError:
        yield Sign("note", "favor", f"runs from its source, {where}", "pip install . makes it a package")
        return
    if python and not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        yield Sign("broken", "favor", f"{own}, {where}: it needs Python {python}", "install it with a newer Python")
    else:
        yield Sign("ok", "favor", f"{own}, {where}")
    found = [Requirement(line) for line in asked]
    yield from _core([each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})])
    yield from (_extra(name, what, found) for name, what in EXTRAS.items())


def _core(needed: Sequence[Requirement]) -> Iterator[Sign]:
    """The versions in a line, and a line for each package that is missing or of a version that favor was not made for."""
    shown = ", ".join(f"{name} {_installed(name)}" for name in _SHOWN if _installed(name))
    wrong = [each for each in needed if not _fits(each)]
    rest = (
        f"all {len(needed)} packages are as favor needs them" if not wrong else f"{len(wrong)} of {len(needed)} are not"
    )
    yield Sign("ok" if not wrong else "note", "packages", f"{shown}; {rest}")
    for each in wrong:
        here = _installed(each.name)
        said = f"{here} is installed, favor needs {each.specifier}" if here else "is not installed, favor needs it"
        yield Sign("note" if here else "broken", each.name, said, f"pip install '{each.name}{each.specifier}'")


def _extra(name: str, what: str, found: Sequence[Requirement]) -> Sign:
    asked = [each for each in found if each.marker is not None and each.marker.evaluate({"extra": name})]
    if not asked:
        return Sign(
            "note", f"extra {name}", f"unknown to the favor that pip knows; for {what}", "pip install favor anew"
        )
    wrong = [each for each in asked if not _fits(each)]
    if not wrong:
        return Sign("ok", f"extra {name}", f"installed, for {what}")
    missing = ", ".join(f"{each.name}{each.specifier} (here: {_installed(each.name) or 'none'})" for each in wrong)
    return Sign("note", f"extra {name}", f"lacks {missing}; only {what} needs it", f"pip install 'favor[{name}]'")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(asked: Requirement) -> bool:
    here = _installed(asked.name)
    return here is not None and asked.specifier.contains(here, prereleases=True)


def imported() -> Sign:
    """Import what every command needs; a package that cannot be is broken."""
    began = time.monotonic()
    for name in _IMPORTED:
        package = name.partition(".")[0]
        try:
            import_module(name)
        except _FAILURES as error:
            said = f"{package} cannot be imported ({type(error).__name__}: {first_line(error)})"
            return Sign("broken", "imports", said, f"{sys.executable} -m pip install --force-reinstall {package}")
    took = time.monotonic() - began
    said = f"{', '.join(name.partition('.')[0] for name in _IMPORTED)} in {took:.1f} s"
    if took < _LONG_S:
        return Sign("ok", "imports", said, figures={"seconds": took})
    todo = "every command waits for it: put the environment on a faster disk, or wait until the machine has less to do"
    return Sign("note", "imports", said, todo, {"seconds": took})
