"""`favor chat`: what is streamed is what sampling gives, the figures are those of training, a vote is a labelled pair."""

import asyncio
import json
import threading

import httpx2
import pytest
import tiny
import torch
from chat_desk import a_run

pytest.importorskip("starlette", reason="favor[label] is not installed")

from favor.chat.run import chat
from favor.chat.server import application
from favor.chat.settings import ChatConfig
from favor.chat.talk import SIDES, Spelling, Turns, answers, load_models, pieces, token_logps
from favor.config import load
from favor.data.batches import build
from favor.data.read import DataConfig, read
from favor.data.types import TokenTree
from favor.errors import CheckpointError, ConfigError
from favor.label import store
from favor.label.export import exported
from favor.label.gate import Door
from favor.label.settings import LabelConfig
from favor.model.layout import settle
from favor.model.logprobs import plain_logp, response_logps
from favor.model.sample import SampleConfig, decode, sample

DOOR = Door(8123, "the-token", "chat")
HERE = "http://127.0.0.1:8123"
PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def models(run):
    return load_models(ChatConfig(run=str(run)))


def config_of(run, **more):
    return ChatConfig(run=str(run), **more)


def answered(models, seed, length=24, temperature=0.7, stop=None):
    """Both answers, and what was told of each while it came."""
    told = {side: [] for side in SIDES}
    how = SampleConfig(max_new_tokens=length, temperature=temperature)
    ids = models.encode(PROMPT)
    found = answers(models, ids, how, seed, lambda side, text: told[side].append(text), stop or threading.Event())
    sampled = {side: sample(models.of[side], [ids], [seed], how)[0] for side in SIDES}
    return found, told, sampled


@pytest.mark.parametrize("seed", range(5))
def test_what_is_streamed_is_what_sampling_gives(models, seed):
    found, told, sampled = answered(models, seed)
    for side in SIDES:
        (text,) = decode(models.after.tokenizer, [sampled[side]])
        assert found[side].text == "".join(told[side]) == text
        assert found[side].ended == (sampled[side][-1] in models.after.end_ids)
        # token by token, not at the end
        assert len(told[side]) > 3
    assert found["before"].text != found["after"].text


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_those_of_training(run, models, seed):
    """Shown log-probs sum to response_logps, by trees and by plain transformers; the reward is beta times the sum of ratios."""
    found, _, sampled = answered(models, seed)
    prompt = models.encode(PROMPT)
    tree = TokenTree(prompt, tuple(sampled[side] for side in SIDES), (True, True), (), 0, row=1)
    expected, others = {}, load_models(config_of(run)).of
    for side in SIDES:
        policy, _ = settle(others[side], "auto", [tree])
        assert policy.layout == "tree"
        expected[side] = response_logps(policy, build([tree], "tree")).tolist()
    for r, side in enumerate(SIDES):
        mine = {"before": sum(p.before for p in found[side].pieces), "after": sum(p.after for p in found[side].pieces)}
        for other in SIDES:
            assert mine[other] == pytest.approx(expected[other][r], abs=1e-3)
            row = torch.tensor([[*prompt, *sampled[side]]])
            with torch.no_grad():
                assert mine[other] == pytest.approx(float(plain_logp(models.of[other], row, len(prompt))), abs=1e-3)
        ratio = expected["after"][r] - expected["before"][r]
        assert abs(ratio) > 1
        assert found[side].reward == pytest.approx(0.3 * ratio, abs=1e-3)


def test_every_token_has_its_own_figures(models):
    _, _, sampled = answered(models, 0)
    prompt, response = models.encode(PROMPT), sampled["after"]
    found = token_logps(models, prompt, response)
    for row, side in enumerate(SIDES):
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logp = models.of[side].model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        torch.testing.assert_close(found[row], expected.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("text", ["Grüße, 😀 and 日本語", "\n\nhello  there \t", "", "e\u0301"])
def test_pieces_join_to_the_text(text):
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, 2]
    logps = torch.randn(2, len(ids), dtype=torch.float64)
    found = pieces(tokenizer, ids, logps)
    assert "".join(piece.text for piece in found) == text
    assert not any("\ufffd" in piece.text for piece in found)
    assert sum(piece.after for piece in found) == pytest.approx(float(logps[1].sum()))
    assert found[-1].text == ""


def test_an_answer_cut_within_a_letter_ends_as_its_text_does():
    tokenizer = tiny.tokenizer()
    ids = tokenizer("a😀", add_special_tokens=False).input_ids[:-1]
    spelling = Spelling(tokenizer)
    said = "".join(map(spelling.add, ids)) + spelling.rest()
    assert said == decode(tokenizer, [ids])[0]
    assert said.endswith("\ufffd")


def test_a_stop_ends_both_at_their_next_token(models):
    stop = threading.Event()
    stop.set()
    found, _, sampled = answered(models, 0, length=200, stop=stop)
    for side in SIDES:
        assert len(found[side].pieces) <= 1
        assert decode(models.after.tokenizer, [sampled[side]])[0].startswith(found[side].text)


def test_an_error_of_one_model_ends_both(models):
    """A length beyond the model's positions; the other one must not wait for its turn for ever."""
    broken = type(models)(models.before, models.after, models.beta, lambda text: (VOCAB,))
    with pytest.raises(CheckpointError, match="embedding"):
        answers(broken, (VOCAB,), SampleConfig(), 0, lambda side, text: None, threading.Event())


VOCAB = tiny.VOCAB + 5


def test_threads_take_turns():
    turns, done = Turns(["a", "b"]), []

    def work(name, times):
        turns.wait(name)
        for _ in range(times):
            done.append(name)
            turns.pass_on(name)
        turns.leave(name)

    threads = [threading.Thread(target=work, args=each) for each in (("a", 3), ("b", 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert "".join(done) == "abababbb"


# the page


class Browser:
    """Requests of one page, one after the other."""

    def __init__(self, client):
        self.client = client

    async def get(self, path):
        return await self.client.get(path)

    async def post(self, path, value):
        return await self.client.post(path, json=value, headers={"Origin": HERE})

    async def ask(self, prompt=PROMPT, seed=0, length=12, blind=False, temperature=0.7):
        sample = {"temperature": temperature, "max_new_tokens": length}
        reply = await self.post("/ask", {"prompt": prompt, "sample": sample, "seed": seed, "blind": blind})
        return [json.loads(line) for line in reply.text.splitlines()]


def visiting(run, models, path, story, cookies=None, **settings):
    """What a story (a coroutine of a Browser) returns, and the rows that its votes export."""

    async def told(db):
        app = application(db, config_of(run, **settings), models, DOOR)
        cookie = {DOOR.cookie: DOOR.token} if cookies is None else cookies
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url=HERE, cookies=cookie, timeout=60) as client:
            return await story(Browser(client))

    with store.opened(path / "labels.sqlite") as db:
        return asyncio.run(told(db)), exported(db)[0]


def test_a_question_streams_and_ends_with_figures(run, models, tmp_path):
    async def story(page):
        return await page.ask(), await page.ask(blind=True)

    (open_, blind), _ = visiting(run, models, tmp_path, story)
    *lines, last = open_
    for place, side in enumerate(SIDES):
        said = "".join(line["add"] for line in lines if line["place"] == place)
        assert said == last["texts"][place]["text"] == "".join(text for text, *_ in last["revealed"][place]["pieces"])
        assert last["revealed"][place]["side"] == side
    # nothing that tells which is which before the vote
    assert blind[-1]["revealed"] is None
    assert {key for line in blind[:-1] for key in line} == {"place", "add"}


@pytest.mark.parametrize("answer", ["first", "second", "tie", "both_bad"])
@pytest.mark.parametrize("blind", [False, True])
def test_a_vote_is_a_label_that_trains(run, models, tmp_path, answer, blind):
    async def story(page):
        found = []
        for seed in range(4):
            last = (await page.ask(seed=seed, blind=blind))[-1]
            reply = (await page.post("/vote", {"ask": last["done"], "answer": answer})).json()
            found.append((last, reply))
        return found

    found, rows = visiting(run, models, tmp_path, story, name="Ana")
    assert len(rows) == 4
    orders = set()
    for (last, reply), row in zip(found, rows, strict=True):
        texts = [one["text"] for one in last["texts"]]
        assert row["prompt"] == PROMPT
        assert {row["first"], row["second"]} == set(texts)
        chosen = {"first": texts[0], "second": texts[1]}.get(answer)
        assert row["verdict"] == ([("first", "second")[row["second"] == chosen]] if chosen else [answer])
        assert row["annotators"] == ["Ana"]
        assert reply["saved"]
        sides = [one["side"] for one in reply["revealed"]]
        orders.add(tuple(sides))
        # the source says which one is after
        after = texts[sides.index("after")]
        assert f": {'first' if row['first'] == after else 'second'} is after training" in row["source"]
        assert ("not blind" in row["source"]) is not blind
    assert len(orders) == (2 if blind else 1)
    with store.opened(tmp_path / "labels.sqlite") as db:
        for (last, _), (number, pair) in zip(found, store.pairs(db).items(), strict=True):
            assert store.is_swapped(db, number, 1) == (pair.second == last["texts"][0]["text"])
    assert found[-1][1]["tally"] == {
        **dict.fromkeys((*SIDES, "tie", "both_bad"), 0),
        **{
            side: sum(r["revealed"][("first", "second").index(answer)]["side"] == side for _, r in found)
            for side in SIDES
            if answer in ("first", "second")
        },
        **({answer: 4} if answer in ("tie", "both_bad") else {}),
    }
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees, _ = read(str(out), DataConfig(train=str(out)), "train")
    assert len(trees) == 1
    assert len(trees[0].comparisons) == (4 if answer in ("first", "second") else 0)


def test_a_second_vote_on_the_same_answers_changes_nothing_until_it_is_taken_back(run, models, tmp_path):
    async def story(page):
        first, again = (await page.ask())[-1]["done"], (await page.ask())[-1]["done"]
        replies = [await page.post("/vote", {"ask": first, "answer": "first"})]
        replies.append(await page.post("/vote", {"ask": again, "answer": "tie"}))
        replies.append(await page.post("/undo", {}))
        replies.append(await page.post("/vote", {"ask": again, "answer": "tie"}))
        replies += [await page.post("/undo", {}), await page.post("/undo", {})]
        replies.append(await page.post("/vote", {"ask": again, "answer": "second"}))
        return replies

    replies, rows = visiting(run, models, tmp_path, story)
    assert [reply.json().get("saved") for reply in replies] == [True, False, None, True, None, None, True]
    assert ["problem" in reply.json() for reply in replies] == [False, False, False, False, False, True, False]
    assert len(rows) == 1
    assert rows[0]["verdict"][0] in ("first", "second")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": 3}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a<|im_end|>b"}, "special"),
        ({"prompt": "a", "seed": -1}, "'seed'"),
        ({"prompt": "a", "seed": None}, "'seed'"),
        ({"prompt": "a", "sample": {"temperature": 0, "max_new_tokens": 3}}, "'sample.temperature'"),
        ({"prompt": "a", "sample": {"temperature": 1, "max_new_tokens": 1.5}}, "'sample.max_new_tokens'"),
        ({"prompt": "a", "blind": "x"}, "'blind'"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(run, models, tmp_path, value, said):
    filled = {"sample": {"temperature": 1, "max_new_tokens": 3}, "seed": 0, "blind": False} | value

    async def story(page):
        return await page.post("/ask", filled if value else {})

    reply, _ = visiting(run, models, tmp_path, story)
    assert said in reply.json()["problem"]
    assert "\n" not in reply.json()["problem"]


def test_answers_that_cannot_be_compared_are_refused(run, models, tmp_path):
    same = type(models)(models.before, models.before, models.beta, models.encode)

    async def story(page):
        last = (await page.ask())[-1]
        return [
            await page.post("/vote", value)
            for value in (
                {"ask": last["done"], "answer": "first"},
                {"ask": 99, "answer": "first"},
                {"ask": 1, "answer": "x"},
                [],
            )
        ]

    replies, rows = visiting(run, same, tmp_path, story)
    assert all(reply.json()["problem"] for reply in replies)
    assert "the same" in replies[0].json()["problem"]
    assert rows == []


def test_a_conversation_goes_on(run, models, tmp_path):
    turns = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Sure?"},
    ]

    async def story(page):
        last = (await page.ask(turns))[-1]
        await page.post("/vote", {"ask": last["done"], "answer": "second"})

    _, rows = visiting(run, models, tmp_path, story)
    assert [dict(turn) for turn in rows[0]["prompt"]] == turns
    assert len(models.encode(tuple(turns))) > len(models.encode(PROMPT))


def test_one_question_at_a_time(run, models, tmp_path, monkeypatch):
    monkeypatch.setattr("favor.chat.server._PATIENCE", 1)

    async def story(page):
        first = asyncio.ensure_future(page.ask(length=60))
        replies = []
        while not first.done():
            replies.append(await page.ask(length=1))
            await asyncio.sleep(0)
        return await first, replies, await page.ask(length=1)

    (first, replies, after), _ = visiting(run, models, tmp_path, story)
    assert "done" in first[-1]
    assert any("another question" in reply[-1].get("problem", "") for reply in replies)
    assert "done" in after[-1]


@pytest.mark.parametrize("path", ["/", "/chat.js", "/labels.jsonl"])
def test_without_the_token_nothing_is_shown(run, models, tmp_path, path):
    async def story(page):
        return await page.get(path), await page.post("/ask", {"prompt": "a"})

    replies, _ = visiting(run, models, tmp_path, story, cookies={})
    assert [reply.status_code for reply in replies] == [403, 403]
    assert replies[0].text.startswith("favor chat: refused: the token")


def test_the_page_shows_settings_and_no_text_as_html(run, models, tmp_path):
    async def story(page):
        return (await page.get("/")).text

    page, _ = visiting(run, models, tmp_path, story, name="<b>Ana", seed=7)
    assert "&lt;b&gt;Ana" in page
    assert 'value="0.7"' in page
    assert 'value="7"' in page


def test_without_the_extra_one_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr("favor.label.run.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(
        ConfigError, match=r"favor chat needs uvicorn, not installed here; run: pip install 'favor\[label\]'"
    ):
        chat(config_of(run), print)


def test_without_a_finished_run_one_line_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no finished run here"):
        chat(config_of(tmp_path), print)
    assert not (tmp_path / "labels.sqlite").exists()


def test_its_settings_are_read_as_those_of_other_commands():
    found = load(ChatConfig, None, ["run=runs/x", "sample.temperature=0.5"])
    assert found.sample.model_dump() == {"max_new_tokens": 128, "temperature": 0.5}
    with pytest.raises(ConfigError, match="letters"):
        load(ChatConfig, None, ["run=runs/x", "name=" + "x" * 61])
    assert LabelConfig().db == found.db
