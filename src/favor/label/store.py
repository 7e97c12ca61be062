"""Pairs, people and votes in one SQLite file: what was acknowledged is there, whenever the process dies.

In: a path. Out: a connection (WAL, every commit on the disk before it returns), and the few questions and changes there are.
Several processes may use one file. Next: intake.py.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from favor.data.types import Message, Text
from favor.errors import ConfigError
from favor.guard import sha

Verdict: TypeAlias = Literal["first", "second", "tie", "both_bad"]
Db: TypeAlias = sqlite3.Connection

# what says that an SQLite file is ours, and of which layout
_APPLICATION, _VERSION = 0x66617672, 1
_TABLES = """
CREATE TABLE pair (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL,
  tools TEXT NOT NULL, ended TEXT NOT NULL, source TEXT NOT NULL,
  gold TEXT CHECK (gold IN ('first', 'second', 'tie', 'both_bad')));
CREATE TABLE annotator (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE shown (
  pair INTEGER NOT NULL REFERENCES pair, annotator INTEGER NOT NULL REFERENCES annotator,
  swapped INTEGER NOT NULL CHECK (swapped IN (0, 1)), at REAL NOT NULL, PRIMARY KEY (pair, annotator));
CREATE TABLE vote (
  id INTEGER PRIMARY KEY, pair INTEGER NOT NULL, annotator INTEGER NOT NULL,
  verdict TEXT NOT NULL CHECK (verdict IN ('first', 'second', 'tie', 'both_bad', 'skip')),
  edit TEXT CHECK (edit IS NULL OR verdict IN ('first', 'second')), comment TEXT NOT NULL, at REAL NOT NULL, withdrawn REAL,
  FOREIGN KEY (pair, annotator) REFERENCES shown);
CREATE UNIQUE INDEX one_vote ON vote (pair, annotator) WHERE withdrawn IS NULL;
"""


class Pair(NamedTuple):
    """Two answers to one prompt, in an order that says nothing about them (`ordered`).

    ended: which came to their end (samples may be cut at a length limit). gold: the verdict, where it is known.
    """

    prompt: Text
    first: Text
    second: Text
    tools: tuple[dict[str, Any], ...] | None = None
    ended: tuple[bool, bool] = (True, True)
    source: str = ""
    gold: Verdict | None = None

    @property
    def key(self) -> str:
        """What makes it this pair and no other."""
        return sha(json.dumps([self.prompt, self.tools, self.first, self.second, self.ended], sort_keys=True))


class Vote(NamedTuple):
    """What one person said of a pair. edit: a better version of the answer that the verdict prefers."""

    pair: int
    annotator: int
    verdict: Literal["first", "second", "tie", "both_bad", "skip"]
    edit: str | None = None
    comment: str = ""


def ordered(pair: Pair) -> Pair:
    """The pair with its answers in the order of their hashes, so that neither files nor models decide which is first."""
    marks = [sha(json.dumps(side, sort_keys=True)) for side in (pair.first, pair.second)]
    if marks[0] <= marks[1]:
        return pair
    turned: dict[Verdict, Verdict] = {"first": "second", "second": "first"}
    gold = turned.get(pair.gold, pair.gold) if pair.gold else None
    return pair._replace(first=pair.second, second=pair.first, ended=pair.ended[::-1], gold=gold)


@contextlib.contextmanager
def opened(path: Path, *, new: bool = True) -> Generator[Db]:
    """The store, made if it is not there and `new`. Raises ConfigError for another kind of file, or one that cannot be used."""
    if not new and not path.exists():
        raise ConfigError(f"db={path}: no such file; favor label data=FILE db={path} makes it")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
            _prepare(db, path)
            yield db
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"db={path}: SQLite says: {error}; check the file and its disk, or choose another db=FILE (acknowledged votes are kept)"
        ) from None


def _prepare(db: Db, path: Path) -> None:
    (application,), (version,) = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    if not empty and application != _APPLICATION:
        raise ConfigError(f"db={path}: an SQLite file, but not one of favor label; choose another db=FILE")
    if version > _VERSION:
        raise ConfigError(
            f"db={path}: made by a newer favor (layout {version}); use that one, or choose another db=FILE"
        )
    if db.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
        raise ConfigError(f"db={path}: this disk does not allow SQLite's WAL; choose a local disk")
    # a commit returns when it is on the disk, and the page is answered after that
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=ON")
    with writing(db):
        # another process may have made them meanwhile
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            for statement in filter(str.strip, _TABLES.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA application_id={_APPLICATION}")
            db.execute(f"PRAGMA user_version={_VERSION}")


@contextlib.contextmanager
def writing(db: Db) -> Generator[None]:
    """A change that happens whole or not at all; it is on the disk when the block ends."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def add_pairs(db: Db, found: Iterable[Pair]) -> int:
    """Add pairs, and return how many are new; a known one only learns its gold verdict."""
    mine = [ordered(pair) for pair in found]
    before = db.total_changes
    with writing(db):
        for pair in mine:
            said = (*map(json.dumps, (pair.prompt, pair.first, pair.second, pair.tools, pair.ended)), pair.source)
            db.execute(
                "INSERT OR IGNORE INTO pair (key, prompt, first, second, tools, ended, source) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (pair.key, *said),
            )
        new = db.total_changes - before
        golden = [(pair.gold, pair.key) for pair in mine if pair.gold]
        db.executemany("UPDATE pair SET gold = ? WHERE key = ?", golden)
    return new


def pair_at(db: Db, number: int) -> Pair | None:
    """A pair by its number."""
    row = db.execute(
        "SELECT prompt, first, second, tools, ended, source, gold FROM pair WHERE id = ?", (number,)
    ).fetchone()
    return None if row is None else _pair(row)


def number_of(db: Db, pair: Pair) -> int | None:
    """The number of a pair that was added, in whichever order its answers are given."""
    row = db.execute("SELECT id FROM pair WHERE key = ?", (ordered(pair).key,)).fetchone()
    return row and row[0]


def pairs(db: Db) -> dict[int, Pair]:
    """Every pair by its number."""
    found = db.execute("SELECT id, prompt, first, second, tools, ended, source, gold FROM pair ORDER BY id")
    return {number: _pair(row) for number, *row in found}


def golds(db: Db) -> dict[int, Verdict | None]:
    """Every pair's known verdict, or None, by the pair's number."""
    return dict(db.execute("SELECT id, gold FROM pair ORDER BY id"))


def _pair(row: Iterable[Any]) -> Pair:
    *texts, source, gold = row
    prompt, first, second, tools, ended = map(json.loads, texts)
    return Pair(_text(prompt), _text(first), _text(second), tools and tuple(tools), tuple(ended), source, gold)


def _text(value: str | list[Message]) -> Text:
    return value if isinstance(value, str) else tuple(value)


def annotator(db: Db, name: str) -> int:
    """The number of a person, who is added if not known."""
    with writing(db):
        db.execute("INSERT OR IGNORE INTO annotator (name) VALUES (?)", (name,))
    return db.execute("SELECT id FROM annotator WHERE name = ?", (name,)).fetchone()[0]


def names(db: Db) -> dict[int, str]:
    """People by number."""
    return dict(db.execute("SELECT id, name FROM annotator ORDER BY id"))


def show(db: Db, pair: int, person: int, *, swapped: bool) -> None:
    """Remember that a pair is before somebody, and which answer stands left."""
    with writing(db):
        db.execute("INSERT OR IGNORE INTO shown VALUES (?, ?, ?, ?)", (pair, person, swapped, time.time()))


def open_pair(db: Db, person: int) -> tuple[int, bool] | None:
    """The pair that is before somebody: (number, whether the second answer stands left)."""
    row = db.execute(
        "SELECT pair, swapped FROM shown WHERE annotator = ?1 AND NOT EXISTS (SELECT 1 FROM vote WHERE vote.pair = shown.pair "
        "AND vote.annotator = ?1 AND withdrawn IS NULL) ORDER BY at DESC LIMIT 1",
        (person,),
    ).fetchone()
    return row and (row[0], bool(row[1]))


def is_swapped(db: Db, pair: int, person: int) -> bool | None:
    """Whether the second answer stood left when somebody was shown a pair; None when they were not."""
    row = db.execute("SELECT swapped FROM shown WHERE pair = ? AND annotator = ?", (pair, person)).fetchone()
    return row and bool(row[0])


def add_vote(db: Db, vote: Vote) -> bool:
    """Keep a vote; False when this person's vote on this pair is there already, and then that one stands."""
    with writing(db):
        done = db.execute(
            "INSERT INTO vote (pair, annotator, verdict, edit, comment, at) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (pair, annotator) WHERE withdrawn IS NULL DO NOTHING",
            (*vote, time.time()),
        )
        return done.rowcount == 1


def withdraw(db: Db, person: int) -> bool:
    """Take back somebody's last vote; its pair is before them again. The vote stays in the file, marked."""
    with writing(db):
        row = db.execute(
            "SELECT id, pair FROM vote WHERE annotator = ? AND withdrawn IS NULL ORDER BY id DESC LIMIT 1", (person,)
        ).fetchone()
        if row is None:
            return False
        now = time.time()
        db.execute("UPDATE vote SET withdrawn = ? WHERE id = ?", (now, row[0]))
        db.execute("UPDATE shown SET at = ? WHERE pair = ? AND annotator = ?", (now, row[1], person))
    return True


def votes(db: Db) -> list[Vote]:
    """Every vote that stands, skips too, in order."""
    found = db.execute("SELECT pair, annotator, verdict, edit, comment FROM vote WHERE withdrawn IS NULL ORDER BY id")
    return [Vote(*row) for row in found]


def open_since(db: Db, person: int, seconds: float) -> list[int]:
    """Pairs that have been before somebody else for less than so long, without a vote."""
    found = db.execute(
        "SELECT pair FROM shown WHERE annotator != ?1 AND at > ?2 AND NOT EXISTS (SELECT 1 FROM vote WHERE vote.pair = shown.pair "
        "AND vote.annotator = shown.annotator AND withdrawn IS NULL)",
        (person, time.time() - seconds),
    )
    return [pair for (pair,) in found]


def left_chosen(db: Db) -> tuple[int, int]:
    """(how often the answer on the left was preferred, how often one of the two was)."""
    return db.execute(
        "SELECT coalesce(sum((verdict = 'second') = swapped), 0), count(*) FROM vote JOIN shown USING (pair, annotator) "
        "WHERE withdrawn IS NULL AND verdict IN ('first', 'second')"
    ).fetchone()
