"""`favor lint`: read every row, run every check, write what was asked for.

In: LintConfig. Out: Findings; JSON, a page, a cleaned copy. Next: settings.py.
"""

import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from favor import output
from favor.data import sources
from favor.data.formats import RowError, columns_of
from favor.data.formats.fields import TEMPLATE_KWARGS
from favor.data.read import ReadReport, outcomes
from favor.data.settings import SourceConfig
from favor.data.types import Finding
from favor.errors import CheckpointError, ConfigError, DataError, in_texts
from favor.lint.cheap import Hit, Told, findings
from favor.lint.models import model_gaps, noise_checks, reward_gaps, token_checks
from favor.lint.page import page
from favor.lint.rows import Row, repaired, row_checks, row_of
from favor.lint.sets import set_checks
from favor.lint.settings import KINDS, ORDER, LintConfig, LintSettings
from favor.model.load import end_ids, load_policy, load_tokenizer
from favor.model.size import described_ends
from favor.output import Output
from favor.rewards.source import make_scorer, reads

_COLOURED = {"error": "[red]error[/red]", "warning": "[yellow]warning[/yellow]", "note": "note"}
# columns that every format reads
_ALWAYS_READ = frozenset({"weight", "tools", "ended", TEMPLATE_KWARGS})


def lint(config: LintConfig, recipe: Path | None = None) -> list[Finding]:
    """Every finding, the worst first. recipe: where the settings come from.

    Raises DataError when a source cannot be read at all; ConfigError for settings that clash.
    """
    settings, data = config.lint, config.data
    if settings.fix is not None and len(data.parts) > 1:
        raise ConfigError("lint.fix cleans one file; name it with data.train and clean each source by itself")
    read = [*(source.path for source in data.parts), data.eval, settings.reference, recipe and str(recipe)]
    read += [config.model and config.model.path, *(reads(config.reward) if config.reward else ())]
    outputs = _outputs(settings)
    with output.all_claimed(outputs, read):
        known: dict[str, frozenset[str]] = {}
        rows = [row for source in data.parts for row in _rows(config, source, "train", known)]
        if data.eval is not None:
            rows += _rows(config, SourceConfig(path=data.eval, split=data.eval_split), "eval", known)
        told = list(_checks(config, rows, known))
        found = sorted(findings(told, settings.examples), key=lambda finding: ORDER.index(finding.severity))
        texts = _texts(config, rows, told, found, recipe)
        # only when all is made
        for out in outputs:
            output.write(out, texts[out.key], None)
    return found


def fails(config: LintConfig, found: Sequence[Finding]) -> bool:
    """Whether a finding is as severe as lint.fail_on asks for."""
    bad = {"never": (), "error": ("error",), "warning": ("error", "warning")}[config.lint.fail_on]
    return any(finding.severity in bad for finding in found)


def findings_table(found: Sequence[Finding]) -> Table:
    """The findings for a terminal, the first examples beneath each."""
    table = Table("severity", "finding", "what", show_lines=False)
    for finding in found:
        lines = [finding.message, *(f"  {example}" for example in finding.examples)]
        table.add_row(_COLOURED[finding.severity], finding.kind, Text("\n".join(lines)))
    return table


def _outputs(settings: LintSettings) -> list[Output]:
    asked = {"lint.fix": settings.fix, "lint.out": settings.out, "lint.page": settings.page}
    return [
        Output(Path(path), key, settings.overwrite, (_actions_of(path),) if key == "lint.fix" else ())
        for key, path in asked.items()
        if path is not None
    ]


def _actions_of(fix: str) -> Path:
    return Path(fix).with_name(f"{Path(fix).stem}.actions.jsonl")


def _rows(config: LintConfig, source: SourceConfig, part: str, known: dict[str, frozenset[str]]) -> Iterator[Row]:
    """Every row of a source; `known` gets the columns that favor reads of it."""
    data, report, empty = config.data, ReadReport(source.path, config.data.format_of(source)), True
    for number, raw, _, judgment in outcomes(source, data, report):
        empty = False
        if isinstance(judgment, RowError):
            whole = raw if isinstance(raw, dict) else {} if isinstance(raw, RowError) else {"row": raw}
            yield row_of(part, (source.path, number), whole, judgment)
        else:
            yield row_of(part, (source.path, number), sources.as_object(raw), judgment)
    if empty:
        raise DataError(f"{source.path}: it holds no rows; name a file with rows")
    columns, verdict = data.columns_of(source), data.verdict_of(source)
    mapped = [*columns.values(), *((verdict.first, verdict.second, *verdict.columns) if verdict else ())]
    read = columns_of(report.format) if report.format != "auto" else frozenset[str]()
    known[source.path] = read | _ALWAYS_READ | {path.split(".")[0] for path in mapped}


def _checks(config: LintConfig, rows: Sequence[Row], known: Mapping[str, frozenset[str]]) -> Iterator[Told]:
    """Every check that the settings ask for."""
    settings, model = config.lint, config.model
    usable = [row for row in rows if not isinstance(row.said, RowError)]
    for row in rows:
        yield from row_checks(row)
    yield from set_checks(usable, settings, known)
    if model is not None and usable:
        try:
            tokenizer = load_tokenizer(model)
            ends = end_ids(tokenizer, described_ends(model))
            yield from token_checks(usable, tokenizer, ends, config.tokens, settings.cut_share)
        except CheckpointError as error:
            yield Finding("note", "tokenizer", f"checks with the tokenizer were left out: {error}")
    if config.reward is not None:
        yield from noise_checks(reward_gaps(usable, make_scorer(config.reward)), "the reward", settings.noise)
    if model is not None and settings.doubt:
        other, by = settings.reference, "the implicit reward" if settings.reference else "the model"
        reference = load_policy(model.model_copy(update={"path": other, "lora": None}), frozen=True) if other else None
        yield from noise_checks(
            model_gaps(usable, load_policy(model, frozen=True), reference, config.tokens), by, settings.noise
        )
    responses = sum(len(row.responses) for row in usable)
    yield Finding("note", "read", f"{len(rows)} rows, {len(usable)} of them usable, {responses} responses")


def _texts(
    config: LintConfig, rows: Sequence[Row], told: Sequence[Told], found: list[Finding], recipe: Path | None
) -> dict[str, dict[Path, str]]:
    """What is written, by the setting that names it; `found` gets a note on the cleaned copy."""
    settings, training = config.lint, config.data.training
    texts: dict[str, dict[Path, str]] = {}
    if settings.fix is not None:
        kept, actions = _clean([row for row in rows if row.part == "train"], told)
        if not kept:
            raise DataError(f"{training}: no row is left after cleaning; nothing was written")
        beside = _actions_of(settings.fix)
        texts["lint.fix"] = {Path(settings.fix): _lines(kept), beside: _lines(actions)}
        did = Counter(action["action"] for action in actions)
        text = f"{len(kept)} rows in {settings.fix}: {did['dropped']} dropped, {did['fixed']} fixed; every action in {beside}"
        found.append(Finding("note", "fix", text))
    if settings.out is not None:
        listed = {"findings": [finding._asdict() for finding in found]}
        texts["lint.out"] = {Path(settings.out): json.dumps(listed, indent=2, ensure_ascii=False) + "\n"}
    if settings.page is not None:
        texts["lint.page"] = {Path(settings.page): page(config, rows, told, found, recipe)}
    return texts


def _clean(rows: Sequence[Row], told: Sequence[Told]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that stay, fixed where that is safe, and what was done to every row that changed."""
    reasons: dict[tuple[str, int], str] = {}
    for hit in told:
        if isinstance(hit, Hit) and KINDS[hit.kind][2]:
            reasons.setdefault(hit.where, f"{hit.kind}: {hit.said}")
    kept: list[dict[str, Any]] = []
    actions: list[dict[str, Any]] = []
    for row in rows:
        reason, fixed = reasons.get(row.where, ""), in_texts(row.raw, repaired)
        if not reason:
            kept.append(fixed)
        if reason or fixed != row.raw:
            reason = reason or "encoding, entities, invisible characters or trailing blanks"
            actions.append(
                {"row": row.where[1], "action": "dropped" if row.where in reasons else "fixed", "reason": reason}
            )
    return kept, actions


def _lines(records: Sequence[dict[str, Any]]) -> str:
    """JSON lines; what a Parquet column may hold and JSON has not becomes text."""

    def written(value: object) -> str:
        return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)

    return "".join(json.dumps(record, ensure_ascii=False, default=written) + "\n" for record in records)
