"""`favor lint`: read every row, run every check, write what was asked for.

In: LintConfig. Out: Findings; JSON, a page, a cleaned copy. Next: page.py.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from favor import output
from favor.data import sources
from favor.data.formats import FORMATS, RowError, check_order, columns_of, recognise
from favor.data.read import named
from favor.data.settings import SourceConfig
from favor.errors import CheckpointError, ConfigError, DataError
from favor.hide import places_in
from favor.lint import fix
from favor.lint.noise import model_gaps, noise_findings, reward_gaps
from favor.lint.page import page_of
from favor.lint.rows import row_findings
from favor.lint.sets import set_findings
from favor.lint.settings import ORDER, Finding, LintConfig, Row
from favor.lint.tokens import token_findings
from favor.model.load import ModelConfig, end_ids, load_policy, load_tokenizer
from favor.output import Output
from favor.rewards.source import make_scorer


def lint(config: LintConfig, recipe: Path | None = None) -> list[Finding]:
    """Every finding, the worst first. recipe: where the settings come from.

    Raises DataError when a source cannot be read at all; ConfigError for settings that clash.
    """
    settings, data = config.lint, config.data
    if settings.fix is not None and len(data.parts) > 1:
        raise ConfigError("lint.fix cleans one file; name it with data.train and clean each source by itself")
    with contextlib.ExitStack() as claims:
        outputs = _outputs(config)
        output.refuse_shared(outputs)
        for out in outputs:
            output.known(claims.enter_context(output.claimed(out, [*_inputs(config), recipe and str(recipe)])))
        return _lint(config)


def _inputs(config: LintConfig) -> list[str | None]:
    named = [source.path for source in config.data.parts] + [config.data.eval, config.lint.reference]
    return [*named, config.model.path if config.model else None, config.reward.path if config.reward else None]


def _outputs(config: LintConfig) -> list[Output]:
    """The files that are asked for."""
    settings = config.lint
    named = {"lint.fix": settings.fix, "lint.out": settings.out, "lint.page": settings.page}
    also = () if settings.fix is None else (fix.actions_of(Path(settings.fix)),)
    return [
        Output(Path(path), key, settings.overwrite, also if key == "lint.fix" else ())
        for key, path in named.items()
        if path is not None
    ]


def _lint(config: LintConfig) -> list[Finding]:
    settings, data = config.lint, config.data
    known: dict[str, frozenset[str]] = {}
    rows = [row for source in data.parts for row in _rows(config, source, "train", known)]
    if data.eval is not None:
        held_out = SourceConfig(path=data.eval, split=data.eval_split)
        rows += _rows(config, held_out, "eval", known)
    found = [*row_findings(rows, settings), *set_findings(rows, settings, known)]
    if config.model is not None:
        found += _tokens(config, config.model, rows)
    if config.reward is not None:
        found += noise_findings(reward_gaps(rows, make_scorer(config.reward)), "the reward", settings)
    if settings.doubt:
        found += _doubted(config, rows)
    found.append(_summary(rows))
    found.sort(key=lambda finding: ORDER.index(finding.severity))
    _write(config, rows, found)
    return found


def _tokens(config: LintConfig, model: ModelConfig, rows: list[Row]) -> list[Finding]:
    """Checks with the model's tokenizer; without it the rest is still worth having."""
    try:
        tokenizer = load_tokenizer(model)
    except CheckpointError as error:
        return [Finding("note", "tokenizer", f"checks with the tokenizer were left out: {error}")]
    return token_findings(rows, tokenizer, config.tokens, end_ids(tokenizer, None), config.lint)


def _doubted(config: LintConfig, rows: list[Row]) -> list[Finding]:
    """Labels that the model itself, or its log-ratio to a reference, is strongly against."""
    if config.model is None:
        raise ConfigError("lint.doubt asks a model about the labels; name it with model.path")
    policy = load_policy(config.model)
    path = config.lint.reference
    reference = None if path is None else load_policy(config.model.model_copy(update={"path": path, "lora": None}))
    by = "the model" if path is None else "the implicit reward"
    return noise_findings(model_gaps(rows, policy, reference, config.tokens), by, config.lint)


def fails(config: LintConfig, findings: list[Finding]) -> bool:
    """Whether a finding is as severe as lint.fail_on asks for."""
    bad = {"never": (), "error": ("error",), "warning": ("error", "warning")}[config.lint.fail_on]
    return any(finding.severity in bad for finding in findings)


def _rows(config: LintConfig, source: SourceConfig, part: str, known: dict[str, frozenset[str]]) -> Iterator[Row]:
    name = asked = config.data.format_of(source)
    columns = config.data.columns if source.columns is None else source.columns
    found = sources.rows(source.path, source.split or config.data.split, streaming=config.data.streaming)
    count = 0
    for number, raw in sources.limited(found, source.max_rows or config.data.max_rows):
        count += 1
        try:
            row, whole = named(raw, source, config.data), sources.as_object(raw)
            name = recognise(row) if name == "auto" else name
            if asked == "auto":
                check_order(row, name)
            yield Row(part, source.path, number, whole, FORMATS[name](row), None)
        except RowError as error:
            known_row = raw if isinstance(raw, dict) else {} if isinstance(raw, RowError) else {"row": raw}
            yield Row(part, source.path, number, known_row, None, str(error))
    if not count:
        raise DataError(f"{source.path}: it holds no rows; name a file with rows")
    read = columns_of(name) if name != "auto" else frozenset[str]()
    verdict = config.data.verdict_of(source)
    mapped = [*columns.values(), *((verdict.first, verdict.second, *verdict.columns) if verdict else ())]
    known[source.path] = read | {path.split(".")[0] for path in mapped}


def _summary(rows: list[Row]) -> Finding:
    read = [row for row in rows if row.judgment is not None]
    responses = sum(len(row.judgment.responses) for row in read if row.judgment)
    text = f"{len(rows)} rows, {len(read)} of them usable, {responses} responses"
    return Finding("note", "read", text)


def _write(config: LintConfig, rows: list[Row], found: list[Finding]) -> None:
    settings = config.lint
    texts: dict[str, dict[Path, str]] = {}
    if settings.fix is not None:
        train = [row for row in rows if row.part == "train"]
        kept, actions = fix.clean(train, found)
        if not kept:
            raise DataError(f"{config.data.training}: no row is left after cleaning; nothing was written")
        texts["lint.fix"] = fix.texts(kept, actions, Path(settings.fix))
        dropped = sum(action.action == "dropped" for action in actions)
        text = f"{len(kept)} rows in {settings.fix}: {dropped} dropped, {len(actions) - dropped} mended; "
        found.append(Finding("note", "fix", f"{text}every action in {fix.actions_of(Path(settings.fix))}"))
    if settings.out is not None:
        told = {"findings": [finding._asdict() for finding in found]}
        texts["lint.out"] = {Path(settings.out): json.dumps(told, indent=2, ensure_ascii=False) + "\n"}
    if settings.page is not None:
        known = places_in(config.model_dump(mode="json"))
        texts["lint.page"] = {Path(settings.page): page_of(found, config.data.training, known)}
    # only when all is made
    for out in _outputs(config):
        output.write(out, texts[out.key], None)
