"""Below the options of `favor COMMAND --help`: settings by section, an example, the next steps; and what the shell completes.

In: help.json, made from the sections of settings by `make settings-doc` (the sections themselves would import torch). Out: text;
words for the shell. Next: cli.py.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

# command -> an example, then what to do next
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "train": (
        "favor train model.path=MODEL data.train=prefs.jsonl data.hold_out.share=0.1 run=runs/dpo",
        "favor eval run=runs/dpo",
        "favor report runs/dpo",
    ),
    "sft": (
        "favor sft model.path=MODEL data.train=prefs.jsonl run=runs/sft",
        "favor train model.path=runs/sft/model data.train=prefs.jsonl run=runs/dpo",
    ),
    "reward": (
        "favor reward model.path=MODEL data.train=prefs.jsonl data.hold_out.share=0.1 run=runs/reward",
        "favor score run=runs/reward data=samples.jsonl out=scores.jsonl",
        "favor report runs/reward",
    ),
    "ppo": (
        "favor ppo model.path=runs/sft/model data.train=prefs.jsonl reward.kind=model reward.path=runs/reward/model run=runs/ppo",
        "favor report runs/ppo",
    ),
    "score": (
        "favor score run=runs/dpo data=prefs.jsonl out=scores.jsonl",
        "favor winrate a.file=samples.jsonl b.file=others.jsonl judge.kind=reward judge.reward.kind=implicit "
        "judge.reward.path=runs/dpo run=runs/winrate",
    ),
    "frontier": ("favor frontier recipes/frontier.toml run=runs/frontier", "favor report runs/frontier"),
    "eval": ("favor eval run=runs/dpo", "favor report runs/dpo"),
    "winrate": ("favor winrate recipes/winrate.toml run=runs/winrate", "favor report runs/winrate"),
    "diff": (
        "favor diff runs/sft runs/dpo prompts=test.jsonl page=diff.html",
        "favor diff recipes/diff.toml a.path=runs/sft/model b.path=runs/dpo/model prompts=test.jsonl out=diff.json",
        "favor winrate recipes/winrate.toml run=runs/winrate",
    ),
    "realign": (
        "favor realign run=runs/dpo",
        "favor realign run=runs/dpo lambdas=[0.5] bake=0.5 bake_to=milder",
    ),
    "audit": (
        "favor audit data=prefs.jsonl human=prefs.jsonl judge.kind=reward judge.reward.kind=implicit "
        "judge.reward.path=runs/dpo run=runs/audit",
        "favor train model=MODEL data=runs/audit/soft-labels.jsonl run=runs/soft",
    ),
    "sample": (
        "favor sample run=runs/dpo prompts=prefs.jsonl out=samples.jsonl sample.temperature=0.7",
        "favor score run=runs/reward data=samples.jsonl out=scores.jsonl",
    ),
    "prefer": (
        "favor prefer recipes/prefer.toml model=MODEL prompts=prompts.jsonl out=made.jsonl",
        "favor lint data=made.jsonl",
        "favor train model=MODEL data=made.jsonl run=runs/dpo",
    ),
    "loop": ("favor loop recipes/loop.toml model=MODEL prompts=prompts.jsonl run=runs/loop",),
    "lint": (
        "favor lint data=prefs.jsonl lint.page=lint.html --fix clean.jsonl",
        "favor train model=MODEL data=clean.jsonl run=runs/dpo",
    ),
    "value": (
        "favor value model=MODEL data=prefs.jsonl value.out=worth.jsonl value.page=worth.html value.clean=clean.jsonl",
        "favor train model=MODEL data=clean.jsonl run=runs/dpo",
    ),
    "ask": (
        "favor ask model=MODEL pool=samples.jsonl data=labels.jsonl out=ask.jsonl",
        "favor label data=ask.jsonl db=labels.sqlite",
        "favor label db=labels.sqlite out=labels.jsonl",
    ),
    "label": (
        "favor label data=samples.jsonl db=labels.sqlite",
        "favor label db=labels.sqlite out=labels.jsonl",
        "favor train model=MODEL data=labels.jsonl run=runs/dpo",
    ),
    "export": ("favor export run=runs/dpo out=exported format=gguf",),
    "chat": ("favor chat run=runs/dpo", "favor label db=labels.sqlite out=labels.jsonl"),
    "demo": ("favor demo", "favor report runs/demo-1/dpo"),
    "conform": (
        "favor conform adapter=favor page=conform.html",
        "favor conform adapter=favor cases=step,padding out=found.json",
    ),
    "doctor": ("favor doctor model=MODEL", "favor doctor --hub", "favor doctor --json"),
}
_WIDTH = 100


class Entry(NamedTuple):
    """A setting in help.json; plain: of a run that chooses nothing, so help lists it."""

    key: str
    allowed: str
    default: str
    sentence: str
    values: tuple[str, ...]
    plain: bool


def entries(command: str) -> list[Entry]:
    """The settings of a command; none for a command without a recipe."""
    _, *found = _told(command)
    return [
        Entry(key, allowed, default, said, tuple(values), plain) for key, allowed, default, said, values, plain in found
    ]


def short_names(command: str) -> dict[str, str]:
    """What a command takes beside its own keys, and what each stands for."""
    return dict(_told(command)[0])


def _told(command: str) -> list[Any]:
    """The short names, then a row a setting. The file was made from the code, as words.py would import pydantic."""
    return json.loads(files("favor").joinpath("help.json").read_text("utf-8")).get(command, [[]])


def below(command: str, width: int) -> str:
    """What stands below the options: settings by section, the example and the next steps."""
    known = entries(command)
    lines = [line for section in _sections(known) for line in _section(section, [e for e in known if e.plain], width)]
    example, *following = EXAMPLES[command]
    lines += [
        "",
        *_short(command, width),
        f"More of a choice: favor {command} SECTION.kind=... --settings",
        "",
        f"Example: {example}",
    ]
    lines += [f"{'Next:   ' if number == 0 else '        '} {line}" for number, line in enumerate(following)]
    return "\n".join(lines) + "\n"


def _short(command: str, width: int) -> list[str]:
    """What may be typed in place of longer keys, and a run in place of a model."""
    said = [f"{name}= for {meant}" for name, meant in short_names(command).items()]
    return textwrap.wrap(f"Short: {', '.join(said)}", min(width, _WIDTH)) if said else []


def _sections(found: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(_section_of(entry) for entry in found if entry.plain))


def _section_of(entry: Entry) -> str:
    return entry.key.rpartition(".")[0]


def _section(section: str, plain: Sequence[Entry], width: int) -> Iterator[str]:
    yield ""
    yield f"[{section}]" if section else "Settings, as KEY=VALUE:"
    for entry in plain:
        if _section_of(entry) == section:
            head = f"  {entry.key}  {entry.allowed} ({entry.default})"
            sentence = textwrap.fill(
                entry.sentence, min(width, _WIDTH), initial_indent=" " * 6, subsequent_indent=" " * 6
            )
            yield from (head, sentence)


def completions(command: str, before: Sequence[str], incomplete: str) -> list[str]:
    """Words that may stand here: keys with their `=`, the values of a key, recipe files.

    bash breaks a word at `=`, so the key may be the word before and `=` a word of its own, which typer hands on as nothing.
    """
    short = [f"{name}=" for name in short_names(command)]
    known = {entry.key: entry.values for entry in entries(command) if not entry.key.endswith("*")}
    *_, last = ("", *before)
    if not incomplete and last in known:
        return list(known[last])
    if last == "=" and len(before) > 1:
        return [value for value in known.get(before[-2], ()) if value.startswith(incomplete)]
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={each}" for each in known.get(key, ()) if each.startswith(value)]
    keys = sorted({*(f"{key}=" for key in known), *short})
    return [word for word in (*keys, *_recipes(incomplete)) if word.startswith(incomplete)]


def _recipes(incomplete: str) -> list[str]:
    place = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    if not place.is_dir():
        return []
    return sorted(
        f"{path}/" if path.is_dir() else str(path) for path in place.iterdir() if path.suffix in ("", ".toml")
    )
