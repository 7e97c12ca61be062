"""The data of a run: sources -> token trees of the training and the held-out split, with a report. Knows no session.

In: sections [data] and [tokens], a tokenizer. Out: Splits. Small sources are read and tokenised in memory; large ones
(data.cache) go through files, with the same result. Next: read.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

from favor.data import sources
from favor.data.digest import hash_all
from favor.data.read import LEFT_OUT, DataConfig, SplitSpec, read_split, splits_of
from favor.data.tokenize import TokenReport, TokensConfig, tokenize
from favor.data.types import Finding, PromptTree, Text, TokenTree
from favor.errors import DataError

# From here on data.cache = "auto" keeps token ids in a file.
_LARGE = 50 * 1024**2
# runs a function in the main process while the others wait
OnMain: TypeAlias = Callable[[Callable[[], object]], None]


class Checks(NamedTuple):
    """What looks for faults in the data: of a split, and of the prompts of two splits.

    The trees of a split can be gone through once; its token report is whole only then.
    """

    split: Callable[[Iterable[PromptTree], TokenReport], Sequence[Finding]]
    leaks: Callable[[Iterable[PromptTree], Iterable[PromptTree]], Sequence[Finding]]


class Recipe(NamedTuple):
    """What a split is made from."""

    split: SplitSpec
    data: DataConfig
    tokens: TokensConfig
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]

    @property
    def names(self) -> str:
        """The sources, for messages."""
        return ", ".join(source.path for source in self.split.sources)


@dataclass(frozen=True)
class Prepared:
    """One split: token trees; what they came from, as trees of nothing but their prompts; reports, findings."""

    trees: Sequence[TokenTree]
    prompts: Sequence[PromptTree]
    read: Mapping[str, Any]
    tokens: Mapping[str, Any]
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Splits:
    """Token trees of the training split and of the held-out one (empty when the recipe names none).

    prompts: of each split the prompts as text, in the order of its trees. report: what became of the rows, for data.json.
    """

    train: Sequence[TokenTree]
    eval: Sequence[TokenTree]
    prompts: Mapping[str, Sequence[PromptTree]]
    report: Mapping[str, Any]

    @property
    def by_name(self) -> dict[str, Sequence[TokenTree]]:
        """The splits that hold anything."""
        splits = {"train": self.train, "eval": self.eval}
        return {name: trees for name, trees in splits.items() if trees}

    @cached_property
    def identity(self) -> str:
        """A hash of every token id and comparison."""
        return hash_all({"train": self.train, "eval": self.eval})

    def prompts_of(self, name: str, trees: Sequence[TokenTree]) -> list[Text]:
        """The prompts of some trees of a split, as text."""
        wanted = {(tree.source, tree.row) for tree in trees}
        keyed = (((text.source, text.rows[0]), text.prompt) for text in self.prompts[name])
        # no further than the last of them
        found = dict(islice(((key, prompt) for key, prompt in keyed if key in wanted), len(wanted)))
        return [found[tree.source, tree.row] for tree in trees]

    def need_comparisons(self) -> None:
        """Raises DataError when a split holds no comparison."""
        for name, trees in {"train": self.train, "eval": self.eval}.items():
            if name in self.report and not any(tree.comparisons for tree in trees):
                names = self.report[name]["read"]["source"]
                raise DataError(
                    f"{names}: no comparison left to train on; give chosen and rejected, a ranking or scores"
                )


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
    vocabulary: tuple[PreTrainedTokenizerBase, frozenset[int]],
    checks: Checks,
    say: Callable[[str], None],
    on_main: OnMain = alone,
) -> Splits:
    """Read and tokenise both splits; `say` gets a line on each, and on what the checks find.

    vocabulary: a tokenizer and its end-of-turn ids. on_main: a cache of token ids is built once.
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
    findings = [finding for split in found.values() for finding in split.findings]
    if "eval" in found:
        findings += checks.leaks(found["train"].prompts, found["eval"].prompts)
    for finding in findings:
        # how often the longer one is preferred is always shown: labels that are read wrongly show there
        if finding.severity != "note" or finding.kind == "length":
            say(f"{finding.severity}: {finding.message}")
    listed = [{"severity": f.severity, "kind": f.kind, "message": f.message} for f in findings]
    report = {name: {"read": split.read, "tokens": split.tokens} for name, split in found.items()}
    prompts = {name: split.prompts for name, split in found.items()}
    held_out = found["eval"].trees if "eval" in found else ()
    return Splits(found["train"].trees, held_out, prompts, {**report, "lint": listed})


def prepare_split(
    recipe: Recipe,
    checks: Checks,
    say: Callable[[str], None],
    on_main: OnMain = alone,
) -> Prepared:
    """One split, from the cache where that is wanted. Raises DataError as reading and tokenising do."""
    if _large(recipe):
        from favor.data import store  # which small sources do not need

        return store.prepare_split(recipe, checks, say, on_main)
    texts, read_report = read_split(recipe.split, recipe.data)
    trees, report = tokenize(texts, recipe.tokenizer, recipe.tokens, recipe.end_ids, recipe.data.bad_rows)
    prompts = [PromptTree(tree.prompt, (), (), tree.rows[:1], tree.source) for tree in texts]
    return Prepared(trees, prompts, read_report.as_json(), report.as_json(), checks.split(texts, report))


def _large(recipe: Recipe) -> bool:
    if recipe.data.cache != "auto":
        return recipe.data.cache
    return recipe.data.streaming or sum(sources.size(source.path) or 0 for source in recipe.split.sources) > _LARGE


def stamps_of(splits: Sequence[SplitSpec]) -> list[list[sources.Stamp]]:
    """What the file system says of every local file of the splits; a write changes it, also one that is taken back."""
    return [sources.stamps(sources.local_files(source.path) or ()) for split in splits for source in split.sources]


def refuse_changed(splits: Sequence[SplitSpec], before: list[list[sources.Stamp]]) -> None:
    """Raises DataError when the files of the splits are not what they were at `before`."""
    if stamps_of(splits) != before:
        raise sources.changed(", ".join(dict.fromkeys(source.path for split in splits for source in split.sources)))


def summary(read_report: Mapping[str, Any], token_report: Mapping[str, Any]) -> str:
    """One line: what was read, and everything that was cut or dropped."""
    shown = [f"{read_report[key]} {label}" for key, label in _READ.items()]
    if read_report.get("num_ties"):
        shown.append(f"{read_report['num_ties']} ties (read by losses rao_kupper and davidson, and by favor reward)")
    shown += _counted(read_report, {"num_thumbs": "thumbs"} | LEFT_OUT)
    if placed := read_report.get("num_placed"):
        shown.append(f"the first response preferred in {read_report['first_preferred'] / placed:.0%} of {placed}")
    shown += _counted(token_report, _TOKENS)
    if dropped := read_report.get("dropped"):
        shown.append(f"{len(dropped)} bad rows dropped")
    return ", ".join(shown)


def _counted(report: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    return [f"{report[key]} {label}" for key, label in labels.items() if report.get(key)]


_READ = {"num_rows": "rows", "num_trees": "prompts", "num_responses": "responses", "num_comparisons": "comparisons"}
_TOKENS = {
    "trees_dropped": "prompts dropped in tokenising",
    "prompts_cut": "prompts cut",
    "responses_cut": "responses cut",
    "comparisons_dropped": "comparisons dropped",
    "appended_end": "end tokens appended",
    "already_ended": "already ended",
    "responses_trimmed": "responses lose blanks around their text in the template",
    "tools_unread": "prompts whose tools the template leaves out",
}
