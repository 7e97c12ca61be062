"""A person's whole way in a browser: two people label, the labels train, both models are asked, a vote is kept, the report is read."""

import json
import re
import shlex
import signal
import sqlite3
from collections import Counter
from contextlib import contextmanager

import pytest
import tiny
from label_desk import running, serving, write_jsonl
from page_desk import LOOKS, browser, expect, inaccessible, listened, overflows

pytest.importorskip("starlette", reason="favor[label] is not installed")

FILMS = range(10)
ANSWERS = {"warm": "A warm, funny film about dog {}.", "dull": "It is film {}. It has a dog. I sat until it was over."}
# what somebody says of a film, where it is not that the warm answer is better
SAID = {"Ana": {3: "tie", 8: "dull"}, "Ben": {3: "tie", 4: "dull", 6: "both_bad"}}
EDITS = {("Ana", 5): "A warm film that I would see again.", ("Ben", 9): "See it, and bring a dog."}
COMMENTS = {("Ana", 2): "Short & <b>kind</b>, a b t x s u.", ("Ben", 7): "Better, but a little long."}
# films of which somebody first says the opposite, and takes it back
SLIPS = {("Ana", 1), ("Ben", 2)}
# of ten pairs, those on which votes weigh for the warm answer; of the others as many for each
WON = {0, 1, 2, 5, 6, 7, 9}
QUESTION = "Write one line about film 7, the one with the dog."
LARGEST = 400_000
# what a button says, and its key
WORDS = {"tie": ("As good", "t"), "both_bad": ("Both bad", "x")}


def text_of(film, which):
    return ANSWERS[which].format(film)


def wished(name, film):
    return SAID[name].get(film, "warm")


# at the desk


class Person:
    """Somebody before the page, who uses keys or the mouse."""

    def __init__(self, page, name, keys):
        self.page, self.name, self.keys = page, name, keys
        page.keyboard.type(name)
        page.keyboard.press("Enter") if keys else page.click("text=Begin")
        page.wait_for_selector("#vote")

    def film(self):
        return int(re.search(r"film (\d)", self.page.inner_text("section.prompt"))[1])

    def letter(self, which):
        """A or B: where an answer stands."""
        left = self.page.inner_text("section[aria-labelledby=left-name] .text")
        return "A" if left == text_of(self.film(), which) else "B"

    @contextmanager
    def next_pair(self, expected):
        """Wait until what is done in the block was saved and another pair, or none, is there."""
        before = self.page.input_value("[name=pair]")
        yield
        self.page.wait_for_selector(f"[name=pair][value='{before}']", state="detached")
        expect(self.page, expected)

    def says(self, what):
        letter = self.letter(what) if what in ANSWERS else None
        word, key = WORDS[what] if letter is None else (f"{letter} is better", {"A": "a", "B": "ArrowRight"}[letter])
        with self.next_pair(f"Saved: {word[:1].lower() + word[1:] if letter is None else word}."):
            if self.keys:
                self.page.keyboard.press(key)
            else:
                self.page.click(f"#answer button:has-text('{word}')")

    def slips(self):
        """The opposite, taken back: the same pair comes again, as it stood."""
        film, letter = self.film(), self.letter("warm")
        self.says("dull")
        with self.next_pair("Taken back"):
            self.page.keyboard.press("u") if self.keys else self.page.click("text=Take back my last answer")
        assert (self.film(), self.letter("warm")) == (film, letter)

    def writes(self, comment):
        if self.keys:
            self.page.keyboard.press("c")
            self.page.keyboard.type(comment)
            self.page.keyboard.press("Escape")
        else:
            self.page.click("#comment")
            self.page.keyboard.type(comment)

    def edits(self, text):
        """The warm answer, and choose it as edited."""
        letter = self.letter("warm")
        if self.keys:
            self.page.keyboard.press(f"Shift+{letter}")
        else:
            self.page.click(f"summary:has-text('Edit {letter}')")
            self.page.click("details[open] textarea")
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)
        with self.next_pair(f"Saved: {letter} is better"):
            self.page.keyboard.press("Control+Enter") if self.keys else self.page.click("details[open] button")

    def answers(self):
        """One pair."""
        film = self.film()
        if (self.name, film) in SLIPS:
            self.slips()
        if (self.name, film) in COMMENTS:
            self.writes(COMMENTS[self.name, film])
        if (self.name, film) in EDITS:
            self.edits(EDITS[self.name, film])
        else:
            self.says(wished(self.name, film))
        return film


def labelled(opened, address, said):
    """Two people judge ten pairs side by side; what the page then says of their votes, and the download."""
    ana = Person(listened(opened, address, said), "Ana", keys=True)
    ben = Person(listened(opened, address, said, 390, "dark"), "Ben", keys=False)
    assert inaccessible(ana.page) == inaccessible(ben.page) == []
    met = {"Ana": [], "Ben": []}
    for _ in FILMS:
        for person in (ana, ben):
            met[person.name].append(person.answers())
    assert sorted(met["Ana"]) == sorted(met["Ben"]) == list(FILMS)
    for person in (ana, ben):
        assert "You have answered 10" in person.page.inner_text("main")
        assert person.page.locator("#vote").count() == 0
        assert inaccessible(person.page) == []
        assert not overflows(person.page)
    ana.page.click("nav >> text=Results")
    ana.page.wait_for_selector("table")
    assert inaccessible(ana.page) == []
    with ana.page.expect_download() as download:
        ana.page.click("text=Download labels.jsonl")
    return ana.page.inner_text("main"), download.value.path().read_text("utf-8")


# what is in the files, without favor's own reading


def rows_of(db, query):
    with sqlite3.connect(db) as opened:
        return opened.execute(query).fetchall()


VOTES = (
    "SELECT name, prompt, first, second, verdict, edit, comment FROM vote JOIN annotator ON annotator.id = vote.annotator "
    "JOIN pair ON pair.id = vote.pair WHERE withdrawn IS NULL ORDER BY vote.id"
)


def kept(db):
    """(name, film) -> what was said: warm, dull, tie or both_bad; edits and comments; the verdicts of each film as stored."""
    heard, edits, comments, stored = {}, {}, {}, {}
    for name, prompt, first, second, verdict, edit, comment in rows_of(db, VOTES):
        film = int(re.search(r"film (\d)", prompt)[1])
        texts = {"first": json.loads(first), "second": json.loads(second)}
        named = {text_of(film, which): which for which in ANSWERS}
        heard[name, film] = named[texts[verdict]] if verdict in texts else verdict
        stored.setdefault(film, []).append(verdict)
        edits |= {(name, film): edit} if edit else {}
        comments |= {(name, film): comment} if comment else {}
    return heard, edits, comments, stored


def alpha(units):
    """Krippendorff's alpha of nominal data by two people, from its definition."""
    values = Counter(value for unit in units for value in unit)
    count = sum(values.values())
    observed = sum(a != b for a, b in units) / len(units)
    expected = 1 - sum(n * (n - 1) for n in values.values()) / (count * (count - 1))
    return 1 - observed / expected


def told(row):
    """A row of the export: its prompt, its two answers, and the texts or words that people chose."""
    texts = {"first": row["first"], "second": row["second"]}
    votes = zip(row["annotators"], (texts.get(said, said) for said in row["verdict"]), strict=True)
    return row["prompt"], sorted(texts.values()), dict(sorted(votes)), row.get("edited", False)


def expected_rows():
    """What must be exported: a row a pair with both votes, and two rows for each edited answer."""
    rows = []
    for film in FILMS:
        both = sorted(text_of(film, which) for which in ANSWERS)
        prompt = f"Write one line about film {film}, the one with the dog."
        said = {name: wished(name, film) for name in SAID}
        rows.append((prompt, both, {n: text_of(film, w) if w in ANSWERS else w for n, w in said.items()}, False))
        for (name, edited), text in EDITS.items():
            if edited == film:
                rows += [(prompt, sorted((text, old)), {name: text}, True) for old in both]
    return rows


def in_order(rows):
    return sorted(rows, key=repr)


# from one command to the next


def following(said, command, part=""):
    """The words of a command that the lines after `next:` show."""
    lines = [line.removeprefix("next:").strip() for line in said.splitlines()]
    (words,) = {tuple(shlex.split(line)) for line in lines if line.startswith(f"favor {command} ") and part in line}
    return list(words[1:])


def done(favor, *words):
    code, out, err = favor(*words)
    assert (code, err) == (0, ""), (words, out, err)
    return out


def train_on_labels(favor, folder, exported):
    """As the export says: lint, then train; what train said."""
    tiny.save(folder / "model")
    linted = done(favor, *following(exported, "lint"))
    assert "0 errors, 0 warnings" in linted
    planned, words = ([word.replace("MODEL", "model") for word in following(s, "train")] for s in (linted, exported))
    assert "14 rows" in done(favor, *planned)
    more = ("model.dtype=float32", "optim.lr=1e-3", "optim.warmup=0", "train.batch_prompts=4", "train.epochs=8")
    said = done(favor, *words, *more)
    read = json.loads((folder / "runs/dpo/data.json").read_text())["train"]["read"]
    # an edit is one answer preferred to two; of three films as many votes say one thing as the other
    assert {name: read[name] for name in ("num_rows", "num_trees", "num_responses", "num_comparisons", "num_ties")} == {
        "num_rows": 14,
        "num_trees": 10,
        "num_responses": 22,
        "num_comparisons": 11,
        "num_ties": 3,
    }
    return said


def learnt(favor, folder):
    """The model now finds likelier what people preferred, pair by pair; by how much, in beta x nats."""
    done(favor, "score", "run=runs/dpo", "data=labels.jsonl", "out=scores.jsonl")
    gained = {}
    for row in map(json.loads, (folder / "scores.jsonl").read_text().splitlines()):
        film = int(re.search(r"film (\d)", row["prompt"])[1])
        for text, score in zip(row["responses"], row["scores"], strict=True):
            gained[film, text] = score
    for film in WON:
        assert gained[film, text_of(film, "warm")] > gained[film, text_of(film, "dull")] + 0.1, film
    for (_, film), text in EDITS.items():
        assert gained[film, text] > max(gained[film, text_of(film, which)] for which in ANSWERS), film


# the run before and after


def votes_in_chat(opened, address, said, db):
    """Ask, see both answers come, vote for the second one with the mouse; again until both stored orders were met.

    The texts that stood there at each vote, and the rewards of the first two answers.
    """
    page = listened(opened, address, said)
    page.evaluate(
        """() => { window.came = [[], []]; for (const n of [1, 2]) new MutationObserver(() => { window.came[n - 1].push(
        document.getElementById("text-" + n).textContent.length); }).observe(document.getElementById("text-" + n), { childList: true }); }"""
    )
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    expect(page, "Both answers are there")
    voted, orders = [], set()

    def in_pieces():
        """Some answer of each side was seen before it was whole; a busy machine may show one of them at once."""
        seen = page.evaluate("window.came")
        return all(min(filter(None, lengths)) < min(len(texts[n]) for texts in voted) for n, lengths in enumerate(seen))

    rewards = [float(page.inner_text(f"#reward-{n}").split()[-1]) for n in (1, 2)]
    while not voted or ((len(orders) < 2 or not in_pieces()) and len(voted) < 12):
        texts = ["".join(page.locator(f"#text-{n} .t:not(.end)").all_text_contents()) for n in (1, 2)]
        voted.append(texts)
        assert page.inner_text("#name-2") == "Answer 2: after training"
        page.click("text=2 is better")
        expect(page, "Saved: answer 2 is better. 1 was before training, 2 was after training.")
        assert page.inner_text("#tally-after") == str(len(voted))
        *_, (_, _, first, second, verdict, _, _) = rows_of(db, VOTES)
        # the vote is in the same file, for the answer that was pointed at, in whichever order the pair is kept
        assert json.loads({"first": first, "second": second}[verdict]) == texts[1]
        assert {json.loads(first), json.loads(second)} == set(texts)
        orders.add(verdict)
        if len(orders) < 2 or not in_pieces():
            page.click("text=Again, next seed")
            expect(page, "Both answers are there")
    assert len(orders) == 2, "pairs were kept in one order alone"
    assert in_pieces(), page.evaluate("window.came")
    assert [page.inner_text(f"#tally-{name}") for name in ("before", "tie", "both_bad")] == list("000")
    assert inaccessible(page) == []
    return voted, rewards


def reads_report(opened, path, said):
    """Open the page in four looks; what it says."""
    for width, scheme in LOOKS:
        page = listened(opened, path.as_uri(), said, width, scheme)
        assert not overflows(page), width
        assert inaccessible(page) == [], (width, scheme)
        assert page.locator("svg").first.is_visible()
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert inaccessible(page) == [], (width, scheme)
    return page.inner_text("main")


@pytest.mark.slow
def test_two_people_label_the_labels_train_and_the_run_is_asked_and_read(favor, tmp_path):
    db, said = tmp_path / "labels.sqlite", []
    prompts = [f"Write one line about film {film}, the one with the dog." for film in FILMS]
    answers = [[text_of(film, which) for which in ANSWERS] for film in FILMS]
    rows = [{"prompt": prompt, "responses": both} for prompt, both in zip(prompts, answers, strict=True)]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    with browser() as opened:
        with running(tmp_path, "data=samples.jsonl") as (process, address):
            results, downloaded = labelled(opened, address, said)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 128 + signal.SIGINT
            ended = process.stdout.read()
        assert "; 20 answers in labels.sqlite" in ended
        # 20 votes, each of what the person saw and said; two were taken back
        heard, edits, comments, stored = kept(db)
        assert heard == {(name, film): wished(name, film) for name in SAID for film in FILMS}
        assert (edits, comments) == (EDITS, COMMENTS)
        assert rows_of(db, "SELECT count(*) FROM vote WHERE withdrawn IS NOT NULL") == [(2,)]
        assert "10 of 10; 10 have two or more" in results
        assert "17 prefer an answer, 2 as good, 1 both bad" in results
        assert f"{alpha(list(stored.values())):.2f} (1: everybody agrees" in results
        assert "the same in 70 %" in results
        # every vote is in the file, and nothing else
        exported = done(favor, *following(ended, "label", "out="))
        assert "14 rows from 20 votes of 2 people on 10 pairs; ties: 2; both bad: 1" in exported
        labels = (tmp_path / "labels.jsonl").read_text("utf-8")
        assert labels == downloaded
        assert in_order(map(told, map(json.loads, labels.splitlines()))) == in_order(expected_rows())
        trained = train_on_labels(favor, tmp_path, exported)
        learnt(favor, tmp_path)
        with serving(tmp_path, *following(trained, "chat"), "sample.max_new_tokens=24", "name=Ana") as (_, address):
            voted, rewards = votes_in_chat(opened, address, said, db)
        assert rewards[1] > rewards[0]
        more = rows_of(db, VOTES)[20:]
        assert [(name, json.loads(prompt)) for name, prompt, *_ in more] == [("Ana", QUESTION)] * len(voted)
        again = done(favor, "label", f"db={db.name}", "out=more.jsonl")
        assert f"{14 + len(voted)} rows from {20 + len(voted)} votes of 2 people on {10 + len(voted)} pairs" in again
        rows = [told(json.loads(line)) for line in (tmp_path / "more.jsonl").read_text("utf-8").splitlines()]
        assert [row[2] for row in rows[14:]] == [{"Ana": texts[1]} for texts in voted]
        # the page of the run
        written = done(favor, *following(trained, "report"))
        path = tmp_path / re.search(r"^report: (.+)$", written, re.MULTILINE)[1]
        assert path.stat().st_size <= LARGEST
        page = reads_report(opened, path, said)
    steps = [json.loads(line) for line in (tmp_path / "runs/dpo/metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["kind"] == "step"]
    assert f"Trained {len(steps)} steps" in page
    assert f"Loss: {steps[0]['loss']:.4f} at the first step, {steps[-1]['loss']:.4f} at the last." in page
    assert said == []
