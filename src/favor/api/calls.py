"""`favor.evaluate`, `sample`, `score`, `winrate`, `diff` and `frontier`: what is done with models that are there.

In: models, rows and prompts in memory or by name, settings as keywords. Out: figures or rows. What runs is what the command
line runs. Next: answers.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from favor.api.inputs import Given, lay, lay_in_run
from favor.api.keywords import put
from favor.api.parts import (
    fresh,
    judge_of,
    keywords_of,
    prompts_of,
    put_model,
    reward_of,
    run_of,
    side_of,
    speaking,
    staged,
    with_reward,
)
from favor.api.show import calling
from favor.config import checked
from favor.run import RunFolder, read_jsonl
from favor.train.session import in_session
from favor.words import model_of


class Scores(NamedTuple):
    """What `favor.score` gives: a row a prompt (prompt, responses, scores), and figures where the rows compare anything."""

    rows: list[dict[str, Any]]
    figures: dict[str, Any] | None


def evaluate(
    run: Any, data: Any = None, *, reference: Any = None, tokenizer: Any = None, quiet: bool = False, **settings: Any
) -> dict[str, Any]:
    """Held-out accuracy, margins, KL and samples of a run of `favor.train`, as `favor eval` writes them into eval.json.

    run: a Run or its folder. data: other held-out rows than the run's. reference: another model to compare with (tokenizer:
    of a loaded one). settings: those of `favor eval --settings`. Raises ConfigError when the run has no held-out data and
    none is given, CheckpointError when it is not finished or its start has changed.
    """
    from favor.eval import evaluate as evaluating
    from favor.ranks import world
    from favor.report.table import figures_table

    with staged(evaluating.EvalConfig) as given, calling(quiet=quiet) as (console, advance):
        tree = keywords_of(evaluating.EvalConfig, settings, "favor.evaluate", run=str(run_of(run).path))
        if data is not None:
            tree["data"] = given.rows("held-out", data)
        if reference is not None:
            tree["reference"] = given.model("reference", reference, tokenizer)
        config = checked(evaluating.EvalConfig, tree, "favor.evaluate")
        lay(given)
        with world() as members:
            figures = evaluating.evaluate(config, console.print, advance, members=members)
        console.print(figures_table(figures))
    return figures


def sample(
    model: Any, prompts: Any, *, tokenizer: Any = None, out: Any = None, quiet: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    """Sample responses: a row a prompt, with prompt, responses (a list) and ended (whether each came to its end).

    model: as in `favor.train`; None with an engine of your own (`engine={"kind": "openai", ...}`). prompts: a text, a list of
    texts or conversations, rows with a prompt, or the name of a file. Equal prompts are sampled once. out: a file to keep.
    settings: those of `favor sample --settings` (`samples_per_prompt=4, temperature=0.7, max_new_tokens=100`).
    """
    from favor.generate.samples import SamplesConfig, write_samples

    with staged(SamplesConfig) as given, calling(quiet=quiet) as (_, advance):
        kept = given.place / "samples.jsonl" if out is None else Path(out)
        tree = keywords_of(
            SamplesConfig, with_reward(settings, given, kept=out is not None), "favor.sample", out=str(kept)
        )
        if model is not None:
            put_model(tree, "engine.model", model, given, tokenizer)
        tree["prompts"] = prompts_of(prompts, given)
        config = checked(SamplesConfig, tree, "favor.sample")
        lay(given)
        write_samples(config, advance)
        return read_jsonl(kept)


def score(
    rows: Any, reward: Any, *, tokenizer: Any = None, out: Any = None, quiet: bool = False, **settings: Any
) -> Scores:
    """Score responses by a reward; of preferences also its accuracy and calibration.

    rows: preferences or samples (prompt and responses), in memory or a file. reward: a Run (of `favor.reward`: its score; of
    `favor.train`: its implicit reward), a function of (prompts, responses), a loaded or named reward model, or a dict of
    section [reward]. settings: those of `favor score --settings`.
    """
    from favor.eval import score as scoring

    with staged(scoring.ScoreConfig) as given, calling(quiet=quiet) as (_, advance):
        kept = given.place / "scores.jsonl" if out is None else Path(out)
        tree = keywords_of(scoring.ScoreConfig, settings, "favor.score", out=str(kept))
        tree["data"] = given.rows("rows", rows)
        tree["reward"] = reward_of(reward, given, tokenizer, kept=out is not None)
        config = checked(scoring.ScoreConfig, tree, "favor.score")
        lay(given)
        figures = scoring.score(config, advance)
        return Scores(read_jsonl(kept), figures)


def winrate(
    a: Any,
    b: Any,
    prompts: Any = None,
    *,
    judge: Any,
    out: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Compare two models, or two sets of responses, by a judge: win rates with position and length taken out.

    a, b: a Run, a folder or hub id, a loaded model, rows with prompt and responses, or a file of them. prompts: what models
    answer, as in `favor.sample`. judge: a function of (prompt, first, second) that gives "A", "B", "tie" or "invalid", a Run or
    reward whose higher score wins, or a dict of section [judge]. out: the folder that keeps responses and verdicts; without it
    a fresh one, runs/winrate-N. settings: those of `favor winrate --settings`.
    """
    from favor.report.table import winrate_table
    from favor.winrate import run as winning

    root = fresh("runs/winrate") if out is None else Path(out)
    given = Given(RunFolder(root).given)
    with speaking(winning.WinrateConfig, given), calling(quiet=quiet) as (console, advance):
        tree = keywords_of(winning.WinrateConfig, settings, "favor.winrate", run=str(root))
        tree["judge"] = judge_of(judge, given, kept=out is not None)
        for name, side in (("a", a), ("b", b)):
            put(tree, name, side_of(name, side, given), "favor.winrate")
        if prompts is not None:
            tree["prompts"] = prompts_of(prompts, given)
        config = checked(winning.WinrateConfig, tree, "favor.winrate")
        lay_in_run(root, given)
        figures = winning.winrate(config, console.print, advance)
        console.print(winrate_table(figures))
    return figures


def diff(a: Any, b: Any, prompts: Any, *, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """What changed between two models on the same prompts; the content of the JSON file of `favor diff`.

    a, b: a Run, a folder or hub id, a loaded model, or a dict of section [model]. prompts: as in `favor.sample`. settings: those
    of `favor diff --settings` (`gate={"refused": {"max_rise": 0.02}}, stop_early=True, page="diff.html"`); ["verdict"] says
    whether the gates pass.
    """
    from favor.diff import run as comparing
    from favor.diff.settings import DiffConfig
    from favor.report.table import diff_table

    with staged(DiffConfig) as given, calling(quiet=quiet) as (console, advance):
        tree = keywords_of(DiffConfig, with_reward(settings, given), "favor.diff")
        for name, side in (("a", a), ("b", b)):
            model = model_of(os.fspath(side)) if isinstance(side, str | os.PathLike) else side
            section = dict(side) if isinstance(side, Mapping) else {"path": given.model(name, model)}
            put(tree, name, section, "favor.diff")
        tree["prompts"] = prompts_of(prompts, given)
        config = checked(DiffConfig, tree, "favor.diff")
        lay(given)
        figures = comparing.diff(config, console.print, advance)
        console.print(diff_table(figures))
    return figures


def frontier(*, out: Any, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Reward against KL of DPO, IPO, KTO, PPO and the baselines on one task; the content of frontier.json.

    settings: those of `favor frontier --settings` (`seeds=[0], methods={"dpo": [0.1]}`). It starts processes, so a script calls
    it under `if __name__ == "__main__":`.
    """
    from favor_frontier.recipe import FrontierConfig
    from favor_frontier.run import frontier as compare

    with calling(quiet=quiet) as (console, _):
        tree = keywords_of(FrontierConfig, settings, "favor.frontier", run=os.fspath(out))
        config = checked(FrontierConfig, tree, "favor.frontier")
        return in_session(lambda opened: compare(config, opened), console=console)
