"""Section [judge]: which of two responses is better, behind one signature; verdicts that were paid for are kept.

In: a judge's settings and duels. Out: a verdict each: "A" (shown first), "B", "tie", or "invalid" when the judge said nothing
that can be read. A further judge is a section of settings here, one function, and one row of JUDGES. Next: stats.py.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, Field, Tag

from favor.config import STRICT, by_kind
from favor.data.types import Text
from favor.errors import ConfigError, DataError
from favor.generate.engines import ModelAt
from favor.generate.samples import read_sealed
from favor.guard import content, seal, sha
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import check_path, load_policy
from favor.model.logprobs import response_logps
from favor.rewards.model import ScoredTokens, encode
from favor.rewards.source import RewardConfig, check_scorer, make_scorer, reads
from favor.rewards.user import check_function, find_function
from favor.run import append, cut_torn_line
from favor.server import ServerConfig, answer, parallel
from favor.winrate.stats import Verdict

S = TypeVar("S")
PROMPT = """Compare two responses to the same prompt. Judge how well each one does what the prompt asks: whether it is \
correct, helpful, relevant and clear. Neither the order in which they are shown nor their length speaks for a response.

<prompt>
{prompt}
</prompt>

<response A>
{first}
</response A>

<response B>
{second}
</response B>

Which response is better? Answer with the verdict alone: [[A]] if response A is better, [[B]] if response B is better, \
[[C]] if they are equally good."""
_MARKS: dict[str, Verdict] = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
_VERDICTS: tuple[Verdict, ...] = ("A", "B", "tie", "invalid")
# Duels handed to a model at once: both orders of a pair are neighbours, so what they share is computed once.
_BATCH = 128
# Tokens computed at once by a model that judges.
_BUDGET = 4096
# What of a section decides the verdict: not how long to wait for a server, or on which device to compute.
_COUNTS = {"server": ("url", "model"), "model": ("path", "revision", "dtype")}


class Duel(NamedTuple):
    """Two responses to a prompt in the order in which the judge sees them."""

    prompt: Text
    first: str
    second: str


Done: TypeAlias = Callable[[int, Verdict], None]
Judge: TypeAlias = Callable[[Sequence[Duel], Done], None]


def _shows_all(prompt: str) -> str:
    missing = [part for part in ("{prompt}", "{first}", "{second}", "[[A]]", "[[B]]") if part not in prompt]
    if missing:
        raise ValueError(f"does not contain {missing[0]}; the judge must be shown it")
    return prompt


JudgePrompt = Annotated[
    str,
    AfterValidator(_shows_all),
    Field(
        description="What the judge is asked: {prompt}, {first}, {second} are filled in, [[A]] and [[B]] are the verdicts, "
        "[[C]] is a tie where it is named."
    ),
]


class RewardJudge(BaseModel):
    """Section [judge], kind "reward": the higher score of any reward."""

    model_config = STRICT
    kind: Literal["reward"]
    reward: RewardConfig
    tie_margin: float = Field(default=0.0, ge=0)
    """Scores that differ by this or less are a tie."""


class CallableJudge(BaseModel):
    """Section [judge], kind "callable": a function of yours."""

    model_config = STRICT
    kind: Literal["callable"]
    path: str
    """file.py:function, called with (prompt, a, b); it returns "A", "B", "tie" or "invalid"."""


class ModelJudge(BaseModel):
    """Section [judge], kind "hf": a chat model in this process; the likeliest of the replies [[A]], [[B]], [[C]]."""

    model_config = STRICT
    kind: Literal["hf"]
    model: ModelAt
    max_prompt_tokens: int = Field(default=4096, ge=1)
    """A longer comparison is an error."""
    prompt: JudgePrompt = PROMPT


class ServerJudge(BaseModel):
    """Section [judge], kind "openai": a chat model at any server that speaks the OpenAI protocol."""

    model_config = STRICT
    kind: Literal["openai"]
    server: ServerConfig
    max_reply_tokens: int = Field(default=256, ge=1)
    """A reply is cut after this many tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """Temperature of the first attempt."""
    attempts: int = Field(default=3, ge=1)
    """Attempts in all: an unreadable reply is asked for again at temperature 1, each time with a new seed; then it is "invalid"."""
    prompt: JudgePrompt = PROMPT


JudgeConfig: TypeAlias = Annotated[
    Annotated[RewardJudge, Tag("reward")]
    | Annotated[CallableJudge, Tag("callable")]
    | Annotated[ModelJudge, Tag("hf")]
    | Annotated[ServerJudge, Tag("openai")],
    by_kind(),
]


def verdicts(
    config: JudgeConfig,
    duels: Sequence[Duel],
    path: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> list[Verdict]:
    """A verdict for every duel, from the file `path` where it is there; new ones are added to it one by one.

    The judge is loaded only when something is missing. What it raises comes through; the verdicts so far are kept.
    """
    settings = identity(config)
    keys = [key_of(settings, duel) for duel in duels]
    cut_torn_line(path)
    known: dict[str, Verdict] = {r["key"]: r["verdict"] for r in read_sealed(path)}
    missing = {key: duel for key, duel in zip(keys, duels, strict=True) if key not in known}
    say(f"judgments: {len(missing)} to make, {len(set(keys)) - len(missing)} kept in {path}")
    names = list(missing)

    def done(index: int, verdict: Verdict) -> None:
        known[names[index]] = verdict
        append(path, seal({"key": names[index], "verdict": verdict}))
        progress(1, len(names))

    if missing:
        JUDGES[config.kind].make(config)(list(missing.values()), done)
    return [known[key] for key in keys]


def key_of(settings: dict[str, Any], duel: Duel) -> str:
    """SHA-256 over the judge's settings and the texts in their order."""
    return sha(json.dumps([settings, duel], sort_keys=True))


def identity(config: JudgeConfig) -> dict[str, Any]:
    """The settings that decide a verdict, with the content of the files they name: an edited judge is another judge."""
    found = config.model_dump(mode="json")
    found |= {name: {key: found[name][key] for key in keys} for name, keys in _COUNTS.items() if name in found}
    return found | {"content": [content(path) for path in JUDGES[config.kind].files(config)]}


def ask(template: str, duel: Duel) -> str:
    """The judge prompt of a duel, filled in at one go, so that braces in a response stay what they are."""
    parts = {"{prompt}": as_one_text(duel.prompt), "{first}": duel.first, "{second}": duel.second}
    return re.sub(r"\{(?:prompt|first|second)\}", lambda found: parts[found[0]], template)


def read_verdict(reply: str, template: str) -> Verdict:
    """The one verdict of those the template names that a reply contains; none, or two different ones: "invalid"."""
    found = {mark for mark in _MARKS if mark in template and mark in reply}
    return _MARKS[found.pop()] if len(found) == 1 else "invalid"


def as_one_text(prompt: Text) -> str:
    """A prompt as a judge reads it: text, a single user turn's content, or the turns one after another."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)


def _in_batches(decide: Callable[[Sequence[Duel]], list[Verdict]], size: int) -> Judge:
    def judge(duels: Sequence[Duel], done: Done) -> None:
        for start in range(0, len(duels), size):
            for i, verdict in enumerate(decide(duels[start : start + size]), start):
                done(i, verdict)

    return judge


def _reward(config: RewardJudge) -> Judge:
    scorer = make_scorer(config.reward)

    def decide(duels: Sequence[Duel]) -> list[Verdict]:
        # each response is scored once, although it is shown in both places
        asked = {(as_one_text(d.prompt), text): (d.prompt, text) for d in duels for text in (d.first, d.second)}
        prompts, responses = zip(*asked.values(), strict=True)
        score = dict(zip(asked, scorer(prompts, responses), strict=True))
        gaps = [score[as_one_text(d.prompt), d.first] - score[as_one_text(d.prompt), d.second] for d in duels]
        return ["tie" if abs(gap) <= config.tie_margin else "A" if gap > 0 else "B" for gap in gaps]

    return _in_batches(decide, _BATCH)


def _callable(config: CallableJudge) -> Judge:
    function = find_function(config.path)

    def decide(duels: Sequence[Duel]) -> list[Verdict]:
        (duel,) = duels
        prompt = duel.prompt if isinstance(duel.prompt, str) else list(duel.prompt)
        found = function(prompt, duel.first, duel.second)
        # by type first: an array answers "is it one of these" with an array
        if not isinstance(found, str) or found not in _VERDICTS:
            raise DataError(f"judge {config.path}: returned {found!r:.80}; return one of {', '.join(_VERDICTS)}")
        return [found]

    return _in_batches(decide, 1)


def _hf(config: ModelJudge) -> Judge:
    """Log-probs of whole replies, end of turn included, so no tokenisation of the letters has to be guessed."""
    policy, layout = load_policy(config.model, frozen=True), config.model.layout
    marks = [mark for mark in _MARKS if mark in config.prompt]
    special = [text for text in policy.tokenizer.all_special_tokens if text.strip()]
    if policy.tokenizer.chat_template is None:
        raise ConfigError(
            f"{config.model.path}: its tokenizer has no chat template; judge.kind 'hf' needs a chat model"
        )

    def forges(duel: Duel) -> bool:
        """Whether a text contains the judge's turns, and could give the verdict itself."""
        return any(s in text for s in special for text in (as_one_text(duel.prompt), duel.first, duel.second))

    def decide(duels: Sequence[Duel]) -> list[Verdict]:
        verdicts: list[Verdict] = ["invalid"] * len(duels)
        fair = [i for i, duel in enumerate(duels) if not forges(duel)]
        if not fair:
            return verdicts
        messages = [({"role": "user", "content": ask(config.prompt, duels[i])},) for i in fair for _ in marks]
        trees, place = encode(messages, marks * len(fair), policy, ScoredTokens(max_tokens=1 << 30))
        longest = max(len(tree.prompt_ids) for tree in trees)
        if longest > config.max_prompt_tokens:
            raise DataError(
                f"judge {policy.source}: a comparison has {longest} tokens, judge.max_prompt_tokens is "
                f"{config.max_prompt_tokens}; raise it if the model can read that much, or shorten the responses"
            )
        settled, _ = settle(policy, layout, trees)
        logps = measured(settled, trees, lambda batch: response_logps(settled, batch), _BUDGET)
        for i, row in zip(fair, logps[place].view(-1, len(marks)).tolist(), strict=True):
            best = [mark for mark, logp in zip(marks, row, strict=True) if logp == max(row)]
            verdicts[i] = _MARKS[best[0]] if len(best) == 1 else "tie"
        return verdicts

    return _in_batches(decide, _BATCH)


def _openai(config: ServerJudge) -> Judge:
    def decide(duel: Duel) -> Verdict:
        messages = [{"role": "user", "content": ask(config.prompt, duel)}]
        limit = config.max_reply_tokens
        for attempt in range(config.attempts):
            # the same question at temperature 0 would get the same unreadable reply again
            temperature, seed = (1.0, attempt) if attempt else (config.temperature, 0)
            reply = answer(config.server, messages, max_tokens=limit, temperature=temperature, seed=seed)
            verdict = read_verdict(reply.text, config.prompt)
            if verdict != "invalid":
                return verdict
        return "invalid"

    return lambda duels, done: parallel(config.server, [partial(decide, duel) for duel in duels], done)


@dataclass(frozen=True)
class Kind(Generic[S]):
    """A kind of judge, as functions of its settings: load it, look for it without loading it, name it in tables, its files.

    The first two raise ConfigError, DataError or CheckpointError when it cannot be used.
    """

    make: Callable[[S], Judge]
    check: Callable[[S], None]
    name: Callable[[S], str]
    files: Callable[[S], Sequence[str]]


JUDGES: dict[str, Kind[Any]] = {
    "reward": Kind[RewardJudge](
        _reward,
        lambda x: check_scorer(x.reward),
        lambda x: f"{x.reward.kind} {x.reward.path}",
        lambda x: reads(x.reward),
    ),
    "callable": Kind[CallableJudge](_callable, lambda x: check_function(x.path), lambda x: x.path, lambda x: (x.path,)),
    "hf": Kind[ModelJudge](_hf, lambda x: check_path(x.model.path), lambda x: x.model.path, lambda x: (x.model.path,)),
    "openai": Kind[ServerJudge](_openai, lambda x: None, lambda x: f"{x.server.model} at {x.server.url}", lambda x: ()),
}
