"""What people said -> rows that `favor train` reads: every vote kept, edits as new answers, and a tally of it all.

In: the store. Out: lines of format verdict (or votes, of posteriors), Exported. Next: server.py.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from favor import output
from favor.data.types import Text
from favor.errors import DataError
from favor.label import ability, store
from favor.label.agreement import as_numbers
from favor.label.settings import LabelConfig
from favor.label.store import Db, Pair, Vote
from favor.output import Output
from favor.run import jsonl

Row = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """What became of pairs and votes.

    edits: edited answers, each preferred to both of its pair. mostly_bad: pairs that more than half of the votes call bad on
    both sides: no comparison, a thumb down for each. Left out: gold, skips, pairs without a vote, and, of posteriors, pairs
    that are mostly bad.
    """

    rows: int = 0
    pairs: int = 0
    votes: int = 0
    people: int = 0
    ties: int = 0
    both_bad: int = 0
    mostly_bad: int = 0
    edits: int = 0
    gold: int = 0
    skips: int = 0
    unvoted: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rows} rows from {self.votes} votes of {self.people} people on {self.pairs} pairs; ties: {self.ties}; both "
            f"bad: {self.both_bad}, pairs mostly so: {self.mostly_bad}; edited answers: {self.edits}; left out: gold pairs "
            f"{self.gold}, skips {self.skips}, pairs without a vote {self.unvoted}"
        )


def export(config: LabelConfig, recipe: Path | None = None) -> Exported:
    """Write `out`. The same labels again leave the file as it is.

    Raises DataError without any vote, ConfigError for an `out` that is not to be replaced, or without a store.
    """
    assert config.out is not None, "only then is anything written"
    claim = Output(Path(config.out), "out", config.overwrite)
    with output.claimed(claim, (config.db, recipe and str(recipe))), store.opened(Path(config.db), new=False) as db:
        rows, told = exported(db, config.labels)
        if not rows:
            raise DataError(f"db={config.db}: no pair has a vote yet; open the page with favor label db={config.db}")
        out = Output(Path(config.out), "out", config.overwrite, settings=output.hashes({"set of votes": rows}))
        if output.finished(out) is None:
            output.write(out, {out.path: jsonl(rows)}, asdict(told))
        return told


def exported(db: Db, labels: Literal["votes", "posterior"] = "votes") -> tuple[list[Row], Exported]:
    """The rows, and what became of everything."""
    pairs, names, every = store.pairs(db), store.names(db), store.votes(db)
    said = [vote for vote in every if vote.verdict != "skip"]
    usable = [vote for vote in said if not pairs[vote.pair].gold]
    by_pair: dict[int, list[Vote]] = {}
    for vote in usable:
        by_pair.setdefault(vote.pair, []).append(vote)
    posterior = _posterior(db, said) if labels == "posterior" else None
    rows: list[Row] = []
    for number, mine in sorted(by_pair.items()):
        row = _voted(pairs[number], mine, names)
        if posterior is not None:
            row = {} if _mostly_bad(mine) else _weighed(row, posterior[number])
        rows += [row] if row else []
        rows += _edited(pairs[number], mine, names, as_votes=posterior is not None)
    counts = Counter(vote.verdict for vote in usable)
    return rows, Exported(
        rows=len(rows),
        pairs=len(by_pair),
        votes=len(usable),
        people=len({vote.annotator for vote in usable}),
        ties=counts["tie"],
        both_bad=counts["both_bad"],
        mostly_bad=sum(map(_mostly_bad, by_pair.values())),
        edits=sum(vote.edit is not None for vote in usable),
        gold=sum(pair.gold is not None for pair in pairs.values()),
        skips=len(every) - len(said),
        unvoted=sum(pair.gold is None and number not in by_pair for number, pair in pairs.items()),
    )


def _mostly_bad(votes: Sequence[Vote]) -> bool:
    return sum(vote.verdict == "both_bad" for vote in votes) * 2 > len(votes)


def _voted(pair: Pair, votes: Iterable[Vote], names: Mapping[int, str]) -> Row:
    """A row of format verdict: one verdict a person, in the order of the votes."""
    mine = list(votes)
    row: Row = {"prompt": pair.prompt, "first": pair.first, "second": pair.second, "verdict": [v.verdict for v in mine]}
    row |= {"tools": list(pair.tools)} if pair.tools else {}
    row |= {} if all(pair.ended) else {"ended": list(pair.ended)}
    row |= {"annotators": [names[v.annotator] for v in mine], "source": pair.source}
    comments = [v.comment for v in mine]
    return row | ({"comments": comments} if any(comments) else {})


def _weighed(row: Row, posterior: Sequence[float]) -> Row:
    """The same row in format votes: the probability that each answer is the better one, ties shared out equally."""
    first, second, neither = (round(float(p), 6) for p in posterior)
    sides = {"responses": [row["first"], row["second"]], "votes": [first + neither / 2, second + neither / 2]}
    return {
        "prompt": row["prompt"],
        **sides,
        **{k: v for k, v in row.items() if k not in ("prompt", "first", "second", "verdict")},
    }


def _edited(pair: Pair, votes: Iterable[Vote], names: Mapping[int, str], *, as_votes: bool) -> list[Row]:
    """Edits as new answers, preferred to both answers of the pair."""
    rows: list[Row] = []
    for vote in votes:
        if vote.edit is None:
            continue
        better = pair.first if vote.verdict == "first" else pair.second
        for old, ended in zip((pair.first, pair.second), pair.ended, strict=True):
            made = Pair(pair.prompt, as_edit(vote.edit, better), old, pair.tools, (True, ended), pair.source, "first")
            made = store.ordered(made)
            row = _voted(made, [vote._replace(verdict=made.gold or "first")], names) | {"edited": True}
            wins = (1.0, 0.0, 0.0) if made.gold == "first" else (0.0, 1.0, 0.0)
            rows.append(_weighed(row, wins) if as_votes else row)
    return rows


def as_edit(text: str, better: Text) -> Text:
    """An edited answer in the shape of the one it is made from."""
    return text if isinstance(better, str) else ({**better[-1], "content": text},)


def _posterior(db: Db, said: Sequence[Vote]) -> dict[int, list[float]]:
    golds = store.golds(db)
    fitted = ability.fit(as_numbers(golds, store.names(db), said))
    return dict(zip(golds, fitted.posterior.tolist(), strict=True))
