"""What every page has in common: the frame with its style, the verdict card, templates filled in.

In: a template of a package and its values. Out: Markup that needs nothing else, no network and no other file. Next: page.py.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from favor.errors import ConfigError
from favor.report.words import TERMS, explained

# what a page says it is in its head; by this a page is known again before it is replaced
KINDS = {
    "run": "favor report",
    "comparison": "favor report, comparison",
    "lint": "favor lint",
    "value": "favor value",
    "realign": "favor realign",
    "conform": "favor conform",
    "audit": "favor audit",
    "diff": "favor diff",
}


def rendered(package: str, template: str, **values: Any) -> Markup:
    """A template of a package, filled in; values are escaped, but for Markup. The templates of this package can be built on."""
    loader = ChoiceLoader([PackageLoader(name, "") for name in dict.fromkeys((package, "favor.report"))])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["explained"] = explained
    common = {"style": _own("plot.css") + _own("style.css"), "script": _own("page.js"), "terms": TERMS, "kinds": KINDS}
    return Markup(environment.get_template(template).render(**common, **values))


def replaceable(path: Path, kind: str) -> None:
    """Raises ConfigError when something is there that is not a page of this kind: it would be lost."""
    if not path.exists():
        return
    head = path.read_bytes()[:1000] if path.is_file() else b""
    if f'content="{KINDS[kind]}"'.encode() not in head and not (kind == "run" and _earlier(head)):
        raise ConfigError(
            f"{path}: is there, and is no page of this kind, so it is left as it is; name another file by --out"
        )


def _earlier(head: bytes) -> bool:
    """Whether it is a run's page of an earlier version, which did not say what it is."""
    return b"<title>favor: " in head and b'name="generator"' not in head


def _own(name: str) -> Markup:
    """A file of this package that goes into the page as it is."""
    return Markup(files("favor.report").joinpath(name).read_text("utf-8"))
