"""The command line: `favor COMMAND recipe.toml key=value ...`. Heavy imports wait until a command runs.

In: words. Out: one call per command; errors become one line and an exit code. Next: train/preference.py.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from favor import closing
from favor.closing import Done, Speech, ended, typed
from favor.command import Command, Terminal
from favor.commands import OTHERS
from favor.plain import Json, Quiet, from_trl, init, report, runs, watch

if TYPE_CHECKING:
    from rich.console import Console


def _completed(ctx: typer.Context, incomplete: str) -> list[str]:
    """What the shell offers for a word of a command."""
    from favor.help import completions

    return completions(str(ctx.info_name), ctx.params.get("words") or [], incomplete)


def _show_help(ctx: typer.Context, asked: bool) -> None:
    """The usual page, and below it settings by section, an example and the next steps."""
    if asked and not ctx.resilient_parsing:
        from favor.help import below

        print(ctx.get_help())
        print(below(str(ctx.info_name), shutil.get_terminal_size().columns), end="")
        raise typer.Exit


Help = Annotated[
    bool, typer.Option("--help", is_eager=True, expose_value=False, callback=_show_help, help="Show this page.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE.toml] [KEY=VALUE]...",
        help="A recipe and settings that replace its own.",
        autocompletion=_completed,
    ),
]
Listed = Annotated[
    bool, typer.Option("--settings", help="List the settings: key, type, default, what is allowed, a sentence each.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be trained; read the data, load no weights.")]
Measure = Annotated[
    bool, typer.Option("--measure", help="With --dry-run: load the model, compute a few steps, say memory and time.")
]
Card = Annotated[float | None, typer.Option("--card", min=0.1, help="As --measure, for a card: GiB of its memory.")]
Fix = Annotated[str | None, typer.Option("--fix", help="Write a cleaned copy of the training rows here.")]
Hub = Annotated[bool, typer.Option("--hub", help="Ask the hub, too; nothing leaves the machine without it.")]
# the parts of `favor --help`
_BEGIN, _TRAIN, _DATA, _LOOK, _OUT = "Begin", "Train", "Make preferences", "Look at what came of it", "Hand it on"
_PARTS: Mapping[str, str] = {
    **dict.fromkeys(("lint", "demo", "doctor"), _BEGIN),
    **dict.fromkeys(("sft", "reward", "ppo", "loop"), _TRAIN),
    **dict.fromkeys(("label", "sample", "prefer", "score", "value", "ask"), _DATA),
    **dict.fromkeys(("eval", "chat", "winrate", "diff", "audit", "realign", "frontier", "conform"), _LOOK),
    "export": _OUT,
}
app = typer.Typer(
    help="favor: teach a language model what people favor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"favor {version('favor')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version it is, and end.")
]


@app.callback()
def favor(version: Version = False) -> None:
    """favor: teach a language model what people favor."""


def _train() -> Command:
    from favor.train.preference import TrainConfig, train
    from favor.train.session import in_session

    def run(config: TrainConfig, terminal: Terminal) -> Done:
        in_session(lambda opened: train(config, opened), console=terminal.console)
        run = f"run={config.run}"
        return closing.training(config.run, [["eval", run], ["report", config.run], ["chat", run]])

    return Command(TrainConfig, run)


def _dry_run(*, measured: bool = False, card: float | None = None) -> Command:
    from favor.train.dryrun import describe
    from favor.train.preference import TrainConfig

    def run(config: TrainConfig, terminal: Terminal) -> Done:
        print(text := describe(config))
        then: tuple[str, ...] = (typed("train", *terminal.words),)
        found: dict[str, Any] = {name: said for name, _, said in (line.partition(": ") for line in text.splitlines())}
        if measured:
            from favor.train.fit import report

            lines, figures = report(config, card, terminal.recipe, terminal.overrides)
            print("\n".join(lines))
            found |= figures
            if not found["fits"]:
                then = (typed("train", *terminal.words, *found["fits_with"]),) if found["fits_with"] else ()
        return Done(("nothing was trained",), found, {}, then)

    return Command(TrainConfig, run)


# what several processes do together
_SHARED = ("train", "sft", "reward", "ppo", "eval")
# every command that takes a recipe; what it needs is imported when it runs
COMMANDS: Mapping[str, Callable[[], Command]] = {"train": _train, **OTHERS}


def _call(make: Callable[[], Command], words: Sequence[str], speech: Speech, *, listed: bool = False) -> None:
    """Run a command on its words, or list its settings."""
    from rich.console import Console

    from favor.config import load, read, split_arguments
    from favor.errors import ConfigError
    from favor.words import expanded, whole

    if speech.command not in _SHARED and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        raise ConfigError(f"favor {speech.command} runs in one process; start it without torchrun")
    command, (recipe, overrides), console = (
        make(),
        split_arguments(expanded(speech.command, words)),
        Console(highlight=False, quiet=not closing.speaks()),
    )
    overrides = whole(command.config, read(recipe), overrides)
    if listed:
        from favor.settings import settings, table

        console.print(table(settings(command.config, read(recipe, overrides))))
        return
    terminal = Terminal(recipe, console, _progress(console), speech, tuple(words), tuple(overrides))
    ended(speech, lambda: command.run(load(command.config, recipe, overrides), terminal))


def _plain(name: str) -> None:
    def command(
        words: Words = None, settings: Listed = False, quiet: Quiet = False, as_json: Json = False, _page: Help = False
    ) -> None:
        _call(COMMANDS[name], words or [], Speech(name, quiet, as_json), listed=settings)

    app.command(name, help=COMMANDS[name].__doc__, add_help_option=False, rich_help_panel=_PARTS[name])(command)


app.command(rich_help_panel=_BEGIN)(init)


@app.command(add_help_option=False, rich_help_panel=_TRAIN)
def train(
    words: Words = None,
    settings: Listed = False,
    dry_run: DryRun = False,
    measured: Measure = False,
    card: Card = None,
    quiet: Quiet = False,
    as_json: Json = False,
    _page: Help = False,
) -> None:
    """Train on preferences: DPO and its family, on prompt trees."""
    if (measured or card is not None) and not dry_run:
        raise typer.BadParameter("it measures a run before it is begun; add --dry-run", param_hint="--measure, --card")
    make = partial(_dry_run, measured=measured or card is not None, card=card) if dry_run else _train
    _call(make, words or [], Speech("train", quiet, as_json), listed=settings)


@app.command(help=OTHERS["lint"].__doc__, add_help_option=False, rich_help_panel=_PARTS["lint"])
def lint(
    words: Words = None,
    settings: Listed = False,
    fix: Fix = None,
    quiet: Quiet = False,
    as_json: Json = False,
    _page: Help = False,
) -> None:
    """Declare the command, which alone has an option --fix."""
    fixing = [f"lint.fix={fix}"] if fix is not None else []
    _call(OTHERS["lint"], [*(words or []), *fixing], Speech("lint", quiet, as_json), listed=settings)


@app.command(help=OTHERS["doctor"].__doc__, add_help_option=False, rich_help_panel=_PARTS["doctor"])
def doctor(
    words: Words = None,
    settings: Listed = False,
    hub: Hub = False,
    quiet: Quiet = False,
    as_json: Json = False,
    _page: Help = False,
) -> None:
    """Declare the command, which alone has an option --hub."""
    asking = ["hub=true"] if hub else []
    _call(OTHERS["doctor"], [*(words or []), *asking], Speech("doctor", quiet, as_json), listed=settings)


for _name in (name for name in OTHERS if name not in ("lint", "doctor")):
    _plain(_name)
for _own, _part in ((report, _LOOK), (watch, _LOOK), (runs, _LOOK), (from_trl, _BEGIN)):
    app.command(rich_help_panel=_part)(_own)


@app.command(rich_help_panel=_BEGIN)
def schema(
    command: Annotated[str, typer.Argument(help="The command whose recipe it describes.")] = "train",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print the JSON schema of a recipe, for editors that complete and check TOML."""
    from favor.errors import ConfigError

    def work() -> Done:
        from favor.settings import schema_of

        if command not in COMMANDS:
            raise ConfigError(f"{command}: not a command with a recipe; name one of {', '.join(COMMANDS)}")
        text = json.dumps(schema_of(COMMANDS[command]().config), indent=1) + "\n"
        said = f"the schema of favor {command}; with it in schema.json, a recipe begins with #:schema schema.json"
        return Done((said,), {}, {}, (f"{typed('schema', command)} > schema.json",), product=text)

    ended(Speech("schema", quiet, as_json), work)


def main() -> None:
    """Entry point: every error that is meant for people becomes one line on stderr, and so does every signal."""
    from favor import errors
    from favor.errors import FavorError
    from favor.stop import StoppedAtOnceError, stop_signals

    _quiet()
    sys.excepthook = errors.our_mistake
    try:
        with stop_signals("nothing unfinished was kept; run the same command again"):
            app()
    except FavorError as error:
        _end(*(error.each or (str(error),)), code=error.exit_code)
    except StoppedAtOnceError as error:
        _end(str(error), code=error.exit_code, at_once=True)
    except errors.EXPECTED as error:
        said = errors.explained(error)
        if said is None:
            raise
        _end(said, code=FavorError.exit_code)
    finally:
        _flush()


def _end(*messages: str, code: int, at_once: bool = False) -> NoReturn:
    """A line for each message, without what nobody may see, and the exit code."""
    from favor.errors import clipped, without_secrets

    with contextlib.suppress(OSError):
        for message in messages:
            print(f"favor: {clipped(' '.join(without_secrets(message).splitlines()), 1400)}", file=sys.stderr)
    _flush()
    if at_once and threading.active_count() > 1:
        # the interpreter would wait for threads that wait for a server
        os._exit(code)
    sys.exit(code)


def _flush() -> None:
    """Write out what is left. A reader that has gone (`| head`) is no error, so nothing may be left for the exit either."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _quiet() -> None:
    """Progress bars and advice of libraries would drown our own lines; their errors still come through."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        # a terminal or locale that lacks a letter shows its number instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _progress(console: "Console") -> Callable[[str, int, int], None]:
    """A line per kind of work that takes its time: (label, done since the last call, total)."""
    done_of: dict[str, int] = {}

    def advance(label: str, done: int, total: int) -> None:
        done_of[label] = done_of.get(label, 0) + done
        end = "\n" if done_of[label] >= total else "\r"
        if console.is_terminal or end == "\n":
            console.print(f"{label} {done_of[label]}/{total}", end=end)

    return advance


if __name__ == "__main__":
    main()
