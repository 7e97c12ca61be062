"""Files of any kind that favor reads -> pairs to compare: samples, answers to one prompt, preferences; gold keeps its verdict.

In: a source. Out: Pairs, and a tally of what became of its rows. Next: ability.py.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

from favor.data import sources
from favor.data.formats import FORMATS, Judgment, RowError, check_order, fields, recognise
from favor.data.formats.columns import named
from favor.data.formats.fields import TEMPLATE_KWARGS
from favor.errors import DataError
from favor.label.settings import LabelConfig
from favor.label.store import Pair, Verdict


@dataclass
class Tally:
    """What became of a source: rows read, pairs found; blank and repeated answers, which make no pair."""

    source: str
    rows: int = 0
    pairs: int = 0
    blank: int = 0
    same: int = 0

    def __str__(self) -> str:
        left_out = ", ".join(f"{n} {what}" for n, what in ((self.blank, "blank"), (self.same, "repeated")) if n)
        return f"{self.source}: {self.rows} rows, {self.pairs} pairs" + (
            f" ({left_out} answers left out)" if left_out else ""
        )


def take_in(config: LabelConfig) -> list[tuple[Tally, list[Pair]]]:
    """The pairs of `data` and of `gold`. Raises DataError, naming the row, for what cannot be read or compared."""
    found: list[tuple[Tally, list[Pair]]] = []
    if config.data is not None:
        tally = Tally(config.data)
        by_prompt: dict[str, list[Pair]] = {}
        for pair in _data(config.data, config, tally):
            by_prompt.setdefault(json.dumps([pair.prompt, pair.tools], sort_keys=True), []).append(pair)
        found.append((tally, [pair for prompt, mine in by_prompt.items() for pair in _some(mine, config, prompt)]))
    if config.gold is not None:
        tally = Tally(config.gold)
        found.append((tally, list(_gold(config.gold, config, tally))))
    for tally, pairs in found:
        tally.pairs = len(pairs)
        if not pairs:
            raise DataError(
                f"{tally.source}: nothing to compare: no prompt has two different answers; name a file whose prompts do"
            )
    return found


def _some(pairs: list[Pair], config: LabelConfig, prompt: str) -> list[Pair]:
    if config.pairs_per_prompt is None or len(pairs) <= config.pairs_per_prompt:
        return pairs
    return random.Random(f"{config.seed} {prompt}").sample(pairs, config.pairs_per_prompt)


def _data(source: str, config: LabelConfig, tally: Tally) -> Iterator[Pair]:
    # answers that stand alone in their row wait for others to their prompt
    alone: dict[str, list[tuple[Judgment, str]]] = {}
    for number, row in _rows(source, config, tally):
        try:
            row = named(row, config.columns, None)
            _refuse_variables(row)
            said = _said(row, config.format)
        except RowError as error:
            _leave_out(error, source, number, tally)
            continue
        place = f"{source}, row {number}"
        if len(said.responses) == 1:
            alone.setdefault(json.dumps([said.prompt, said.tools], sort_keys=True), []).append((said, place))
        else:
            yield from _pairs(said, [place] * len(said.responses), tally)
    for mine in alone.values():
        first = mine[0][0]
        cut = tuple(i for i, (each, _) in enumerate(mine) if each.cut)
        together = Judgment(first.prompt, tuple(each.responses[0] for each, _ in mine), tools=first.tools, cut=cut)
        yield from _pairs(together, [place for _, place in mine], tally)


def _gold(source: str, config: LabelConfig, tally: Tally) -> Iterator[Pair]:
    for number, row in _rows(source, config, tally):
        try:
            _refuse_variables(row)
            form = recognise(row)
            check_order(row, form)
            said = FORMATS[form](row)
            known = _known(said)
            if not known:
                raise RowError("it says of no two answers which is better, so it is no gold")
        except RowError as error:
            _leave_out(error, source, number, tally)
            continue
        for (i, j), gold in known.items():
            yield _pair(said, i, j, f"{source}, row {number}")._replace(gold=gold)


def _refuse_variables(row: dict[str, Any]) -> None:
    if row.get(TEMPLATE_KWARGS):
        raise RowError(
            f"labels do not keep {TEMPLATE_KWARGS}; leave the column out, and set model.template_kwargs later"
        )


def _rows(source: str, config: LabelConfig, tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in islice(sources.read_objects(source, config.split), config.max_rows):
        tally.rows += 1
        yield number, row


def _leave_out(error: RowError, source: str, number: int, tally: Tally) -> None:
    """A row of equal answers is counted; anything else that is wrong with a row ends the work."""
    if error.kind != "identical":
        fix = "" if error.of_names else "; fix the row"
        raise DataError(f"{sources.where(source, number)}: {error}{fix}") from None
    tally.same += 1


def _said(row: dict[str, Any], form: str) -> Judgment:
    """Prompt and answers of a row; what it says of them does not matter here. Raises RowError."""
    if form != "auto":
        return FORMATS[form](row)
    if "prompt" in row and "first" in row and "second" in row:
        return FORMATS["verdict"]({**row, "verdict": "tie"})
    name = next((name for name in ("responses", "response", "completion") if "prompt" in row and name in row), "")
    # of answers in columns of these names, equal scores, blank ones and repetitions are no faults here
    if name and ("responses" in row or recognise(row) == "sft"):
        return _answers(row, name)
    return FORMATS[recognise(row)](row)


def _answers(row: dict[str, Any], name: str) -> Judgment:
    """A line of `favor sample`, or of any file with a prompt and an answer or several; they may be blank."""
    prompt, values = fields.text(row, "prompt"), row[name]
    values = values if name == "responses" and isinstance(values, list) else [values]
    ended = row.get("ended", [True] * len(values))
    if not isinstance(ended, list) or len(ended) != len(values):
        raise RowError(f"ended must be a list of {len(values)} true or false, one per response")
    answers = tuple("" if value == "" else fields.as_response(value, name, prompt) for value in map(_bare, values))
    fields.checked_texts((prompt, answers))
    cut = tuple(i for i, whole in enumerate(ended) if not whole)
    return Judgment(prompt, answers, tools=fields.tools_of(row), cut=cut)


def _pairs(said: Judgment, places: list[str], tally: Tally) -> Iterator[Pair]:
    """Every two of the answers that say something different."""
    first: dict[str, int] = {}
    for i, answer in enumerate(said.responses):
        if answer == "":
            tally.blank += 1
        elif (
            first.setdefault(json.dumps(answer, sort_keys=True) if not isinstance(answer, str) else answer.strip(), i)
            != i
        ):
            tally.same += 1
    for i, j in combinations(first.values(), 2):
        where = places[i] if places[i] == places[j] else f"{places[i]}; {places[j]}"
        yield _pair(said, i, j, where)


def _bare(answer: Any) -> Any:
    """Nothing, of an answer that is only white space."""
    return "" if isinstance(answer, str) and not answer.strip() else answer


def _pair(said: Judgment, i: int, j: int, where: str) -> Pair:
    ended = (i not in said.cut, j not in said.cut)
    return Pair(said.prompt, said.responses[i], said.responses[j], said.tools, ended, where)


def _known(said: Judgment) -> dict[tuple[int, int], Verdict]:
    """What a row says of each two of its answers."""
    known: dict[tuple[int, int], Verdict] = {pair: "first" for order in said.orders for pair in combinations(order, 2)}
    known |= dict.fromkeys(said.ties, "tie")
    if not known and len(said.responses) == 2 and {(0, False), (1, False)} <= set(said.thumbs):
        known[0, 1] = "both_bad"
    return known
