"""The commands without a recipe: each declares its own words, and ends as every command does.

In: words. Out: files and lines for the user. What a command needs is imported when it runs. Next: closing.py.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from favor.closing import Done, Speech, ended, typed
from favor.pages import reported, served

Quiet = Annotated[
    bool,
    typer.Option("--quiet", help="Print nothing but errors, what is to be printed, and the address of a page."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, figures and paths; everything else goes to stderr.")
]


def _folder(given: str) -> Path:
    """A run folder, also as the other commands name it: run=FOLDER."""
    return Path(given.removeprefix("run="))


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(parser=_folder, metavar="RUN...", help="Run folders; several are compared with the first."),
    ],
    out: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a page: of one run its report.html, of several a compare.html in the first folder, which leaves their pages alone."""

    def work() -> Done:
        page, found = reported(runs, out)
        print(f"report: {page}")
        figures = {"light": found.light, "headline": found.headline, "changed": list(found.changed)}
        following = (command for command, _ in found.next if command)
        return Done((found.headline.rstrip("."),), figures, {"report": str(page)}, tuple(following))

    ended(Speech("report", quiet, as_json), work)


def watch(
    run: Annotated[Path, typer.Argument(parser=_folder, metavar="RUN", help="The run folder.")],
    port: Annotated[int, typer.Option(help="The port on 127.0.0.1; 0 takes a free one.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show the report of a run in the browser while it trains; the page follows what the run writes."""
    from favor_frontier.page import SECTIONS

    from favor.live.run import follow
    from favor.report.page import page_html
    from favor.report.records import collect

    speech = Speech("watch", quiet, as_json)

    def serve() -> None:
        follow(run, lambda: page_html(collect(run, SECTIONS)), port, speech.address)

    def done() -> Done:
        return Done(("the page is closed",), {}, {"run": str(run)}, (typed("report", str(run)),))

    ended(speech, lambda: served(serve, "the run itself goes on", speech, done))


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"),
    sort: Annotated[str, typer.Option(help="name, loss, accuracy or time; the best or newest first.")] = "name",
    settings: Annotated[bool, typer.Option("--settings", help="Show the settings that differ, too.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the runs of a folder: state, steps, loss, held-out accuracy, time; with --settings, how they differ."""

    def work() -> Done:
        from rich.console import Console

        from favor.report.runs import differing, listed, runs_table

        found, console = listed(folder, sort), Console(highlight=False)
        console.print(runs_table(found))
        if settings and len(found) > 1:
            console.print(differing(found))
        finished = [run.path for run in found if run.state == "finished"]
        following = (typed("report", *finished[:3]),) if finished else ()
        said = f"{len(found)} run{'s' * (len(found) != 1)}, {len(finished)} finished"
        return Done((said,), {"runs": [run._asdict() for run in found]}, {}, following)

    ended(Speech("runs", quiet, as_json), work)


def init(
    model: Annotated[str, typer.Option(help="A model folder or a hub id.")],
    data: Annotated[str, typer.Option(help="A file of preferences.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that the recipe shall have.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write it here; the file must not be there yet.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print a commented recipe for your model and your file, or write it to a file."""

    def work() -> Done:
        if out is not None:
            # before the imports, which take seconds
            _refuse_there(out)
        from favor.init import recipe_for

        command, text, mapped = recipe_for(model, data, out or Path("recipe.toml"), words or [])
        said = [mapped] if mapped else []
        if out is None:
            return Done(("a recipe; keep it with --out recipe.toml", *said), {"command": command}, {}, (), product=text)
        write_new(out, text)
        print(f"recipe: {out}")
        following = (typed("lint", str(out)), typed(command, str(out)))
        return Done((f"a recipe of favor {command}", *said), {"command": command}, {"recipe": str(out)}, following)

    ended(Speech("init", quiet, as_json), work)


def _refuse_there(out: Path) -> None:
    from favor.errors import ConfigError

    if os.path.lexists(out):
        raise ConfigError(f"{out}: it is there already, and was left unchanged; name another file with --out")


def write_new(out: Path, text: str) -> None:
    """Write a file that is not there yet, also when another process makes it now."""
    from favor.errors import ConfigError

    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        _refuse_there(out)
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from None


def from_trl(
    file: Annotated[Path, typer.Argument(help="A script with a DPOConfig, a dict, or the YAML or JSON of one.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print a configuration of TRL as a recipe, with comments on what has no equal; the file is read, never run."""

    def work() -> Done:
        from favor.trl.recipe import recipe_of

        kept = f"{typed('from-trl', str(file))} > recipe.toml"
        text = recipe_of(file)
        following = (kept, typed("train", "recipe.toml", "--dry-run"))
        return Done((f"a recipe of {text.count(chr(10))} lines",), {}, {}, following, product=text)

    ended(Speech("from-trl", quiet, as_json), work)
