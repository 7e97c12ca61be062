"""The data of a run: sources -> token trees of the training and the held-out split, with a report. Knows no session.

In: sections [data] and [tokens], a tokenizer. Out: Splits. Small sources are read and tokenised in memory; large ones
(data.cache) go through files, with the same result. Next: read.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from favor.data import sources
from favor.data.read import DataConfig, read_split, splits_of
from favor.data.sight import Sight
from favor.data.splits import Checks, OnMain, Prepared, Recipe, Splits, refuse_changed, stamps_of
from favor.data.tokenize import TokensConfig, tokenize
from favor.data.types import PromptTree

# From here on data.cache = "auto" keeps token ids in a file.
_LARGE = 50 * 1024**2


class Vocabulary(NamedTuple):
    """What makes ids of text: a tokenizer, its end-of-turn ids, and what sees the pictures of a model that reads them."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    sight: Sight | None = None


def check_sources(data: DataConfig) -> None:
    """Look for the files before a model is fetched or loaded. Raises DataError for one that is not there."""
    for split in splits_of(data):
        for source in split.sources:
            sources.check(source.path)


def alone(work: Callable[[], object]) -> None:
    """Run it: the `on_main` of a run of one process."""
    work()


def prepare(
    data: DataConfig,
    tokens: TokensConfig,
    vocabulary: Vocabulary,
    checks: Checks,
    say: Callable[[str], None],
    on_main: OnMain = alone,
) -> Splits:
    """Read and tokenise both splits; `say` gets a line on each, and on what the checks find.

    on_main: a cache of token ids is built once.
    Raises DataError when a split cannot be used.
    """
    found: dict[str, Prepared] = {}
    specs = splits_of(data)
    before = stamps_of(specs)
    for spec in specs:
        split = found[spec.name] = prepare_split(Recipe(spec, data, tokens, *vocabulary), checks, say, on_main)
        say(f"{spec.name}: {summary(split.read, split.tokens)}")
    # both halves of a file must be halves of the same
    refuse_changed(specs, before)
    # of two splits each says which it is
    of = {name: f"{name} rows: " if len(found) > 1 else "" for name in found}
    findings = [(of[name], finding) for name, split in found.items() for finding in split.findings]
    if "eval" in found:
        findings += [("", finding) for finding in checks.leaks(found["train"].prompts, found["eval"].prompts)]
    for where, finding in findings:
        # how often the longer one is preferred is always shown: labels that are read wrongly show there
        if finding.severity != "note" or finding.kind == "length":
            say(f"{finding.severity}: {where}{finding.message}")
    listed = [{"severity": f.severity, "kind": f.kind, "message": where + f.message} for where, f in findings]
    report = {name: {"read": split.read, "tokens": split.tokens} for name, split in found.items()}
    prompts = {name: split.prompts for name, split in found.items()}
    held_out = found["eval"].trees if "eval" in found else ()
    return Splits(found["train"].trees, held_out, prompts, {**report, "lint": listed})


def prepare_split(recipe: Recipe, checks: Checks, say: Callable[[str], None], on_main: OnMain = alone) -> Prepared:
    """One split, from the cache where that is wanted. Raises DataError as reading and tokenising do."""
    if _large(recipe):
        from favor.data import store  # which small sources do not need

        return store.prepare_split(recipe, checks, say, on_main)
    texts, read_report = read_split(recipe.split, recipe.data, sees=recipe.sight is not None)
    how = (recipe.tokenizer, recipe.tokens, recipe.end_ids, recipe.data.bad_rows, recipe.sight)
    trees, report = tokenize(texts, *how)
    prompts = [PromptTree(tree.prompt, (), (), tree.rows[:1], tree.source) for tree in texts]
    return Prepared(trees, prompts, asdict(read_report), asdict(report), checks.split(texts, report))


def _large(recipe: Recipe) -> bool:
    if recipe.data.cache != "auto":
        return recipe.data.cache
    return recipe.data.streaming or sum(sources.size(source.path) or 0 for source in recipe.split.sources) > _LARGE


def summary(read_report: Mapping[str, Any], token_report: Mapping[str, Any]) -> str:
    """One line: what was read, and everything that was cut or dropped."""
    shown = [f"{read_report[key]} {label}" for key, label in _READ.items()]
    if read_report.get("num_ties"):
        shown.append(f"{read_report['num_ties']} ties (read by losses rao_kupper and davidson, and by favor reward)")
    shown += _counted(read_report, _MORE)
    if placed := read_report.get("num_placed"):
        shown.append(f"the first response preferred in {read_report['first_preferred'] / placed:.0%} of {placed}")
    shown += _counted(token_report, _TOKENS)
    if dropped := read_report.get("dropped"):
        shown.append(f"{len(dropped)} bad rows dropped")
    return ", ".join(shown)


def _counted(report: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    return [f"{report[key]} {label}" for key, label in labels.items() if report.get(key)]


_MORE = {
    "num_thumbs": "thumbs",
    "close_pairs": "pairs closer than data.compare.min_gap left out",
    "unasked_pairs": "pairs left out by data.compare.pairing",
    "unchecked_gaps": "comparisons without scores, to which data.compare.min_gap does not apply",
    "lone_scores": "scored responses without another to compare with",
    "both_bad": "rows that judge both responses bad: thumbs down, no comparison",
}
_READ = {"num_rows": "rows", "num_trees": "prompts", "num_responses": "responses", "num_comparisons": "comparisons"}
_TOKENS = {
    "trees_dropped": "prompts dropped in tokenising",
    "prompts_cut": "prompts cut",
    "responses_cut": "responses cut",
    "comparisons_dropped": "comparisons dropped",
    "appended_end": "end tokens appended",
    "already_ended": "already ended",
    "several_turns": "responses of several turns",
    "tokens_read": "tokens of theirs that others say, read and not scored",
    "responses_trimmed": "responses lose blanks around their text in the template",
    "reasoning_rewritten": "responses with the template's own blanks around their reasoning",
    "tools_unread": "prompts whose tools the template leaves out",
    "variables_unread": "prompts with chat_template_kwargs that the template does not read",
    "pictures": "pictures",
}
