"""The data of a training run: read, tokenised, checked, and reported into the run folder.

In: sections [data] and [tokens]. Out: Splits. Next: ../data/read.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from favor.data import sources
from favor.data.digest import hash_all
from favor.data.read import LEFT_OUT, DataConfig, parts_of
from favor.data.tokenize import TokensConfig
from favor.data.types import Text, TokenTree
from favor.errors import DataError
from favor.lint import brief as lint
from favor.model.load import Policy
from favor.run import write_json
from favor.train.prepared import Part, Recipe, prepare, refuse_changed, stamps_of
from favor.train.session import Session


@dataclass(frozen=True)
class Splits:
    """Token trees of the training part and of the held-out part (empty when the recipe names none).

    prompts: part -> (source, row) -> the prompt as text.
    """

    train: Sequence[TokenTree]
    eval: Sequence[TokenTree]
    prompts: Mapping[str, Mapping[tuple[str, int], Text]]

    @property
    def by_name(self) -> dict[str, Sequence[TokenTree]]:
        """The parts that hold anything."""
        parts = {"train": self.train, "eval": self.eval}
        return {name: trees for name, trees in parts.items() if trees}

    @cached_property
    def identity(self) -> str:
        """A hash of every token id and comparison."""
        return hash_all({"train": self.train, "eval": self.eval})


def check_sources(data: DataConfig) -> None:
    """Look for the files before a model is fetched or loaded. Raises DataError for one that is not there."""
    for part in parts_of(data):
        for source in part.sources:
            sources.check(source.path)


def load_splits(
    data: DataConfig, tokens: TokensConfig, policy: Policy, session: Session, *, need_comparisons: bool
) -> Splits:
    """Read and tokenise both parts; the report goes to data.json, a summary to the user.

    Raises DataError when a part cannot be used, or holds no comparison where one is needed.
    """
    parts: dict[str, Part] = {}
    wanted_parts = parts_of(data)
    before = stamps_of(wanted_parts)
    for wanted in wanted_parts:
        recipe = Recipe(wanted, data, tokens, policy.tokenizer, policy.end_ids)
        part = parts[wanted.name] = prepare(recipe, session.world, session.say)
        if need_comparisons and not any(tree.comparisons for tree in part.trees):
            raise DataError(
                f"{recipe.names}: no comparison left to train on; give chosen and rejected, a ranking or scores"
            )
        session.say(f"{wanted.name}: {summary(part.read, part.tokens)}")
    # both halves of a file must be halves of the same
    refuse_changed(wanted_parts, before)
    findings = [finding for part in parts.values() for finding in part.findings]
    if "eval" in parts:
        findings += lint.leaks(parts["train"].texts, parts["eval"].texts)
    for finding in findings:
        # how often the longer one is preferred is always shown: labels that are read wrongly show there
        if finding.severity != "note" or finding.name == "length":
            session.say(f"{finding.severity}: {finding.message}")
    if session.world.is_main:
        lines = [{"severity": f.severity, "name": f.name, "message": f.message} for f in findings]
        reports = {name: {"read": part.read, "tokens": part.tokens} for name, part in parts.items()}
        write_json(session.folder.data_report, {**reports, "lint": lines})
    prompts = {name: part.prompts for name, part in parts.items()}
    return Splits(parts["train"].trees, parts["eval"].trees if "eval" in parts else (), prompts)


def summary(read_report: Mapping[str, object], token_report: Mapping[str, object]) -> str:
    """One line: what was read, and everything that was cut or dropped."""
    shown = [f"{read_report[key]} {label}" for key, label in _READ.items()]
    if read_report.get("num_ties"):
        shown.append(f"{read_report['num_ties']} ties (read by losses rao_kupper and davidson, and by favor reward)")
    shown += [
        f"{read_report[key]} {label}"
        for key, label in ({"num_thumbs": "thumbs"} | LEFT_OUT).items()
        if read_report.get(key)
    ]
    placed, first = read_report.get("num_placed"), read_report.get("first_preferred")
    if isinstance(placed, int) and isinstance(first, int) and placed:
        shown.append(f"the first response preferred in {first / placed:.0%} of {placed}")
    shown += [f"{token_report[key]} {label}" for key, label in _TOKENS.items() if token_report.get(key)]
    dropped = read_report.get("dropped")
    if isinstance(dropped, list) and dropped:
        shown.append(f"{len(dropped)} bad rows dropped")
    return ", ".join(shown)


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
