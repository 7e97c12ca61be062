"""What the tests of `favor label` share: a store with pairs, votes by name, a running server."""

import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager

from favor.label import store
from favor.label.store import Pair, Vote

SAID = ("first", "second", "tie", "both_bad", "skip")


def some_pairs(count, gold=None):
    return [Pair(f"Prompt {i}?", f"good {i}", f"bad {i}", gold=gold) for i in range(count)]


def said(db, pair, name, verdict, edit=None, comment=""):
    """A vote by somebody, shown to them first; the verdict is of first and second as they are stored."""
    person = store.annotator(db, name)
    store.show(db, pair, person, swapped=False)
    assert store.add_vote(db, Vote(pair, person, verdict, edit, comment))


def prefers(db, pair, name, text, **more):
    """A vote for the answer with this text."""
    side = "first" if store.pair_at(db, pair).first == text else "second"
    said(db, pair, name, side, **more)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def pair_in(html):
    return int(re.search(r'name="pair" value="(\d+)"', html)[1])


@contextmanager
def serving(folder, *words):
    """A command in a process: (process, the address that it shows); killed at the end."""
    command = [sys.executable, "-m", "favor.cli", *map(str, words)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    try:
        address = next((line.strip() for line in process.stdout if line.startswith("http://")), None)
        assert address, process.stderr.read()
        yield process, address
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def running(folder, *words):
    """`favor label` in a process, as `serving`."""
    return serving(folder, "label", *words)
