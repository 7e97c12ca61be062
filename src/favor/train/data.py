"""The data of a training run: read, tokenised, checked, and reported into the run folder.

In: sections [data] and [tokens]. Out: Splits. Next: ../data/read.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from favor.data.read import LEFT_OUT, DataConfig, read_parts
from favor.data.tokenize import TokensConfig, tokenize
from favor.data.types import PromptTree, Text, TokenTree
from favor.errors import DataError
from favor.lint import brief as lint
from favor.model.load import Policy
from favor.run import write_json
from favor.train.session import Session


@dataclass(frozen=True)
class Splits:
    """Token trees of the training part and of the held-out part (empty when the recipe names none).

    prompts: part -> (source, row) -> the prompt as text.
    """

    train: list[TokenTree]
    eval: list[TokenTree]
    prompts: Mapping[str, Mapping[tuple[str, int], Text]]

    @property
    def by_name(self) -> dict[str, Sequence[TokenTree]]:
        """The parts that hold anything."""
        parts = {"train": self.train, "eval": self.eval}
        return {name: trees for name, trees in parts.items() if trees}

    @property
    def identity(self) -> str:
        """A hash of every token id and comparison."""
        content = [
            [tree.prompt_ids, tree.response_ids, tree.comparisons, tree.ties, tree.thumbs]
            for trees in (self.train, self.eval)
            for tree in trees
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_splits(
    data: DataConfig, tokens: TokensConfig, policy: Policy, session: Session, *, need_comparisons: bool
) -> Splits:
    """Read and tokenise both parts; the report goes to data.json, a summary to the user.

    Raises DataError when a part cannot be used, or holds no comparison where one is needed.
    """
    reports: dict[str, object] = {}
    texts: dict[str, list[PromptTree]] = {}
    trees: dict[str, list[TokenTree]] = {"train": [], "eval": []}
    findings: list[lint.Finding] = []
    for name, (found, read_report) in read_parts(data).items():
        texts[name] = found
        trees[name], token_report = tokenize(texts[name], policy.tokenizer, tokens, policy.end_ids, data.bad_rows)
        if need_comparisons and not any(tree.comparisons for tree in trees[name]):
            raise DataError(
                f"{read_report.source}: no comparison left to train on; give chosen and rejected, a ranking or scores"
            )
        reports[name] = {"read": read_report.as_json(), "tokens": token_report.as_json()}
        findings += [*lint.lint(texts[name]), *lint.lint_tokens(token_report)]
        session.say(f"{name}: {summary(read_report.as_json(), token_report.as_json())}")
    if "eval" in texts:
        findings += lint.leaks(texts["train"], texts["eval"])
    for finding in findings:
        if finding.severity != "note":
            session.say(f"{finding.severity}: {finding.message}")
    if session.world.is_main:
        lines = [{"severity": f.severity, "name": f.name, "message": f.message} for f in findings]
        write_json(session.folder.data_report, {**reports, "lint": lines})
    prompts = {name: {(tree.source, tree.rows[0]): tree.prompt for tree in found} for name, found in texts.items()}
    return Splits(trees["train"], trees["eval"], prompts)


def summary(read_report: Mapping[str, object], token_report: Mapping[str, object]) -> str:
    """One line: what was read, and everything that was cut or dropped."""
    shown = [f"{read_report[key]} {label}" for key, label in _READ.items()]
    if read_report.get("num_ties"):
        shown.append(f"{read_report['num_ties']} ties (read by `favor reward` only)")
    shown += [
        f"{read_report[key]} {label}"
        for key, label in ({"num_thumbs": "thumbs"} | LEFT_OUT).items()
        if read_report.get(key)
    ]
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
}
