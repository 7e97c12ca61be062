"""Writes docs/settings.md and src/favor/help.json from the code: `make settings-doc`."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from favor.cli import COMMANDS
from favor.settings import Setting, settings
from favor.words import OF_A_RUN, SHORT

PAGE = Path(__file__).with_suffix(".md")
HELP = PAGE.parent.parent / "src/favor/help.json"


def page(commands: Mapping[str, type[BaseModel]]) -> str:
    """docs/settings.md: every setting of every command, those of a section that several commands share once."""
    lines = [
        "# Settings",
        "",
        "Made from the code by `make settings-doc`. `favor COMMAND --settings` shows those of a plain run and of what you choose",
        "(`favor train loss.kind=kto --settings`); `favor schema COMMAND` prints a JSON schema for editors.",
    ]
    # of a key, what stands first and in which command; another command may have another default
    seen: dict[tuple[object, ...], tuple[Setting, str]] = {}
    for command, schema in commands.items():
        lines += [
            "",
            f"## favor {command}",
            "",
            "| setting | type | default | allowed | what it does | kinds |",
            "|---|---|---|---|---|---|",
        ]
        elsewhere: dict[str, list[str]] = {}
        for setting in settings(schema, every=True):
            first, other = seen.setdefault((setting.key, setting.kinds), (setting, command))
            if other != command and first == setting and "." in setting.key:
                elsewhere.setdefault(other, []).append(setting.key.split(".")[0])
                continue
            cells = (
                f"`{setting.key}`",
                setting.type,
                setting.default,
                setting.allowed,
                setting.sentence,
                ", ".join(setting.kinds),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        for other, keys in elsewhere.items():
            lines += ["", f"As in `favor {other}`: " + ", ".join(f"`[{key}]`" for key in dict.fromkeys(keys)) + "."]
    return "\n".join(lines) + "\n"


def text() -> str:
    """The page as it should be."""
    return page({name: make().config for name, make in COMMANDS.items()})


def help_text() -> str:
    """What `favor COMMAND --help` and the shell know: the short names of a command, then a line a setting."""
    told: dict[str, list[list[object]]] = {}
    for command, make in COMMANDS.items():
        plain = {setting.key: setting for setting in settings(make().config)}
        every = {setting.key: setting for setting in settings(make().config, every=True)}
        told[command] = []
        for key, setting in {**plain, **{key: every[key] for key in every if key not in plain}}.items():
            shown, values = setting.allowed or setting.type, []
            if setting.type in ("choice", "true or false"):
                values = shown.split(", ") if setting.type == "choice" else ["true", "false"]
            told[command].append([key, shown, setting.default, setting.sentence, values, key in plain])
    lines = [f"{json.dumps(command)}: [\n{_rows([_short(command), *found])}\n]" for command, found in told.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _short(command: str) -> list[object]:
    """Pairs of a short name and what stands for it."""
    of_a_run = [["run", "what a finished run trained"]] if command in OF_A_RUN else []
    return [*([name, f"{key}="] for name, key in SHORT.get(command, {}).items()), *of_a_run]


def _rows(found: list[list[object]]) -> str:
    return ",\n".join(json.dumps(row, ensure_ascii=False) for row in found)


if __name__ == "__main__":
    PAGE.write_text(text(), "utf-8")
    HELP.write_text(help_text(), "utf-8")
