"""A model card from what a run left behind: what it was made from and how, what it was measured to do, what nobody measured.

In: a run folder. Out: README.md in the form of the hub, its header in YAML; no path of this machine. Next: ../run.py.
"""

import tomllib
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from markupsafe import Markup

from favor.errors import in_texts, places_in, without_places
from favor.report.frame import rendered
from favor.report.table import figure_rows
from favor.rewards.model import RunRecipe
from favor.run import RunFolder, read_json, read_text

# who described what a kind of training does
_SOURCES = {
    "dpo": "Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv 2305.18290)",
}


def card(folder: RunFolder, recipe: RunRecipe, dtype: str, gguf: str | None) -> str:
    """The text of README.md. gguf: the name of the file, where the model is one."""
    text = read_text(folder.config)
    given = tomllib.loads(text)
    known = places_in(given)
    figures = read_json(folder.evaluation) if folder.evaluation.exists() else {}
    command, method = _made_by(given)
    said = {
        "name": folder.root.resolve().name,
        "base": _shown(recipe.model.path),
        "method": method,
        "command": command,
        "beta": recipe.beta,
        "data": [_shown(source) for source in _sources(given.get("data", {}))],
        "rows": figure_rows(figures),
        "config": without_places(text, known).strip(),
        "dtype": dtype,
        "gguf": gguf,
        "source": _SOURCES.get(method),
    }
    # Markdown, where nothing is to be escaped
    body = rendered("favor.export", "card.md.jinja", **in_texts(said, Markup))
    return f"---\n{_header(given, recipe, method, gguf).to_yaml()}\n---\n\n{body}\n"


def _header(given: dict[str, Any], recipe: RunRecipe, method: str, gguf: str | None) -> ModelCardData:
    """What the hub reads: a base or data set only where it is one of the hub's."""
    base, data = recipe.model.path, _sources(given.get("data", {}))
    on_hub = [name for name in data if _is_hub_id(name)]
    return ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        datasets=on_hub or None,
        library_name=None if gguf else "transformers",
        pipeline_tag="text-generation",
        tags=["favor", method, *(["gguf"] if gguf else [])],
    )


def _made_by(given: dict[str, Any]) -> tuple[str, str]:
    """(command, method) of a run, from what its recipe holds."""
    if "ppo" in given:
        return "ppo", str(given["ppo"].get("advantage", {}).get("kind", "ppo")).replace("gae", "ppo")
    if "loss" in given:
        return "train", str(given["loss"].get("kind", "dpo"))
    return "sft", "sft"


def _sources(data: dict[str, Any]) -> list[str]:
    named = [data.get("train"), *(source.get("path") for source in data.get("sources", ()))]
    return [name for name in named if isinstance(name, str)]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _shown(name: str) -> str:
    """A hub id as it is; of a path the last name that tells something: of runs/sft/model, sft."""
    path = Path(name)
    return name if _is_hub_id(name) else path.parent.name if path.name == "model" and path.parent.name else path.name
