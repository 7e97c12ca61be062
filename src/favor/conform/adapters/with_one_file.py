"""examples/one_file_dpo.py: one user turn, no accumulation, no limit of length, no resume, one process.

In: what `favor conform` asks. Out: the folder of the trained model and its losses.
"""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).parents[4] / "examples/one_file_dpo.py"


def train(model: str, rows: list[dict[str, Any]], out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Its losses are those that it prints, to six digits."""
    lacking = {"accumulation": settings["accumulation"] > 1, "limit of length": settings["max_length"] is not None}
    lacking["resume"] = "stop_after" in settings
    if any(lacking.values()):
        raise NotImplementedError(f"it has no {' and no '.join(name for name in lacking if lacking[name])}")
    data = Path(f"{out}.jsonl")
    data.write_text("".join(json.dumps({key: _text(value) for key, value in row.items()}) + "\n" for row in rows))
    words = {"model": model, "data": data, "out": out} | {
        key: settings[key] for key in ("beta", "lr", "batch", "epochs", "clip")
    }
    sys.argv = [str(_SCRIPT), *(f"--{key}={value}" for key, value in words.items())]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(_SCRIPT), run_name="__main__")
    return {"model": out, "losses": re.findall(r"loss (\S+)", said.getvalue())}


def _text(said: Any) -> str:
    """Text as it is, of turns the only one."""
    if isinstance(said, str):
        return said
    if len(said) > 1:
        raise NotImplementedError("its prompts are one user turn")
    return said[0]["content"]
