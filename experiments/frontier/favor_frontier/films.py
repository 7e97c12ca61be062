"""The experiment's own files about films: what its start learns to write from, and prompts that nothing trains on.

In: a cache folder. Out: sft.jsonl and eval.jsonl. Next: prepare.py.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from favor.demo import film_parts, title
from favor.run import atomic_folder, write_jsonl

_SHORT_WORDS = 14
_PROMPT = "One-line review of the film {title}:\n"


def film_files(cache: Path, say: Callable[[str], None]) -> Path:
    """The folder with sft.jsonl and eval.jsonl; made once.

    sft.jsonl: short quotes of training and classifier films, whatever their verdict, to learn to write reviews from;
    eval.jsonl: prompts of test films, which nothing trains on. Raises what `favor.demo.fetch` raises.
    """
    folder = cache / "reviews-frontier"
    if folder.exists():
        return folder
    say("fetching the film reviews (9 MB, once)")
    parts = film_parts(cache)
    short = [q for name in ("train", "classifier") for q in parts[name] if len(q.text.split()) <= _SHORT_WORDS]
    films = sorted({q.film for q in parts["test"]}, key=lambda film: hashlib.sha256(film.encode()).hexdigest())
    rows = [{"prompt": _PROMPT.format(title=title(q.film)), "completion": q.text} for q in short]
    with atomic_folder(folder) as aside:
        write_jsonl(aside / "sft.jsonl", rows)
        write_jsonl(aside / "eval.jsonl", [{"prompt": _PROMPT.format(title=title(film))} for film in films])
    return folder
