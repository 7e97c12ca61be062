"""Writes docs/settings.md from the code: `make settings-doc`."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from favor.cli import COMMANDS
from favor.settings import Setting, settings

PAGE = Path(__file__).with_suffix(".md")


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


if __name__ == "__main__":
    PAGE.write_text(text(), "utf-8")
