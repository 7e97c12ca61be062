"""Section [judge]: which of two responses is better, behind one signature.

In: JudgeConfig. Out: a Judge, (duels, done) -> a verdict each: "A" (shown first), "B", "tie", or "invalid" when the judge
said nothing that can be read. Next: ../scoring/source.py.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import BaseModel, Field, field_validator, model_validator

from favor.config import STRICT
from favor.data.tokenize import TokensConfig
from favor.data.types import Text
from favor.errors import ConfigError, DataError
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import ModelConfig, check_path, load_policy
from favor.model.logprobs import response_logps
from favor.rewards.model import encode
from favor.rewards.source import RewardConfig, check_scorer, make_scorer
from favor.rewards.user import check_function, find_function
from favor.server import ServerConfig, chat, parallel
from favor.winrate.stats import Verdict

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
# Tokens of a batch of replies.
_BUDGET = 4096


class Duel(NamedTuple):
    """Two responses to a prompt in the order in which the judge sees them."""

    prompt: Text
    first: str
    second: str


Done: TypeAlias = Callable[[int, Verdict], None]
Judge: TypeAlias = Callable[[Sequence[Duel], Done], list[Verdict]]


class JudgeConfig(BaseModel):
    """Section [judge].

    kind: reward (any scorer of section [reward], here [judge.reward]; a tie when the scores differ by `tie_margin` or
    less), callable (`path` = file.py:function, called with (prompt, a, b), returns "A", "B", "tie" or "invalid"), hf (a
    chat model, `model`: the likeliest of the replies [[A]], [[B]], [[C]]), openai (`server`, any OpenAI-compatible one).
    `prompt` is what hf and openai are asked: {prompt}, {first}, {second} are filled in, [[A]] and [[B]] must be named as
    the verdicts, [[C]] is a tie where it is named. An unreadable reply of a server is asked for again, `attempts` times in
    all, from the second on at temperature 1 with seeds of their own; then the verdict is "invalid".
    """

    model_config = STRICT
    kind: Literal["reward", "callable", "hf", "openai"]
    reward: RewardConfig | None = None
    tie_margin: float = Field(default=0.0, ge=0)
    path: str | None = None
    model: ModelConfig | None = None
    max_prompt_tokens: int = Field(default=4096, ge=1)
    server: ServerConfig | None = None
    max_reply_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    attempts: int = Field(default=3, ge=1)
    prompt: str = PROMPT

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return path_as_section(value)

    @model_validator(mode="after")
    def _every_option_is_read(self) -> "JudgeConfig":
        needed, read = _OPTIONS[self.kind]
        # a recipe written by config.dump names every option: at its default it asks for nothing
        given = {name for name, value in self if value != JudgeConfig.model_fields[name].default}
        if needed not in given:
            raise ValueError(f"judge.{needed} is not set, and kind '{self.kind}' needs it")
        if unread := sorted(given - read - {needed, "kind"}):
            raise ValueError(f"judge.{unread[0]} is not read by kind '{self.kind}'; remove it")
        if missing := [
            part for part in ("{prompt}", "{first}", "{second}", "[[A]]", "[[B]]") if part not in self.prompt
        ]:
            raise ValueError(f"judge.prompt does not contain {missing[0]}; the judge must be shown it")
        return self


# kind -> the option it needs, and those it reads besides
_OPTIONS: dict[str, tuple[str, set[str]]] = {
    "reward": ("reward", {"tie_margin"}),
    "callable": ("path", set()),
    "hf": ("model", {"prompt", "max_prompt_tokens"}),
    "openai": ("server", {"prompt", "max_reply_tokens", "temperature", "attempts"}),
}


def path_as_section(value: Any) -> Any:
    """`model=PATH` is short for `model.path=PATH`."""
    return {"path": value} if isinstance(value, str) else value


def make_judge(config: JudgeConfig) -> Judge:
    """Load what judges. Raises ConfigError, DataError or CheckpointError when it cannot be had.

    The judge returns the verdicts in the order of the duels and hands each to `done` as soon as it has it.
    """
    makers = {"reward": _reward, "callable": _callable, "hf": _hf, "openai": _openai}
    return makers[config.kind](config)


def check_judge(config: JudgeConfig) -> None:
    """Look for what judges without loading it: before anything is sampled for it. Raises as `make_judge`."""
    if config.reward is not None:
        check_scorer(config.reward)
    elif config.path is not None:
        check_function(config.path)
    elif config.model is not None:
        check_path(config.model.path)


def describe(config: JudgeConfig) -> str:
    """The judge in a few words, for tables."""
    if config.reward:
        return f"reward {config.reward.kind} {config.reward.path}"
    if config.server:
        return f"{config.server.model} at {config.server.url}"
    return f"{config.kind} {config.model.path if config.model else config.path}"


def settings_that_count(config: JudgeConfig) -> dict[str, Any]:
    """The options that can change a verdict: not how long to wait for a server, or with how many threads."""
    needed, read = _OPTIONS[config.kind]
    found = config.model_dump(mode="json", include=read | {needed, "kind"})
    if config.server:
        found["server"] = {"url": config.server.url, "model": config.server.model}
    if config.model:
        found["model"] = {"path": config.model.path, "revision": config.model.revision, "dtype": config.model.dtype}
    return found


def ask(template: str, duel: Duel) -> str:
    """The judge prompt of a duel, filled in at one go, so that braces in a response stay what they are."""
    parts = {"{prompt}": as_text(duel.prompt), "{first}": duel.first, "{second}": duel.second}
    return re.sub(r"\{(?:prompt|first|second)\}", lambda found: parts[found[0]], template)


def read_verdict(reply: str, template: str) -> Verdict:
    """The one verdict of those the template names that a reply contains; none, or two different ones: "invalid"."""
    found = {mark for mark in offered(template) if mark in reply}
    return _MARKS[found.pop()] if len(found) == 1 else "invalid"


def offered(template: str) -> list[str]:
    """The verdicts a judge prompt asks for."""
    return [mark for mark in _MARKS if mark in template]


def as_text(prompt: Text) -> str:
    """A prompt as a judge reads it: text, a single user turn's content, or the turns one after another."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)


def _in_batches(judge: Callable[[Sequence[Duel]], list[Verdict]], size: int) -> Judge:
    def judge_all(duels: Sequence[Duel], done: Done) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for start in range(0, len(duels), size):
            for verdict in judge(duels[start : start + size]):
                done(len(verdicts), verdict)
                verdicts.append(verdict)
        return verdicts

    return judge_all


def _reward(config: JudgeConfig) -> Judge:
    assert config.reward is not None
    scorer = make_scorer(config.reward)

    def judge(duels: Sequence[Duel]) -> list[Verdict]:
        # each response is scored once, although it is shown in both places
        asked = {(as_text(d.prompt), text): (d.prompt, text) for d in duels for text in (d.first, d.second)}
        prompts, responses = zip(*asked.values(), strict=True)
        score = dict(zip(asked, scorer(prompts, responses), strict=True))
        gaps = [score[as_text(d.prompt), d.first] - score[as_text(d.prompt), d.second] for d in duels]
        return ["tie" if abs(gap) <= config.tie_margin else "A" if gap > 0 else "B" for gap in gaps]

    return _in_batches(judge, _BATCH)


def _callable(config: JudgeConfig) -> Judge:
    assert config.path is not None
    function = find_function(config.path)

    def judge(duels: Sequence[Duel]) -> list[Verdict]:
        (duel,) = duels
        prompt = duel.prompt if isinstance(duel.prompt, str) else list(duel.prompt)
        found = function(prompt, duel.first, duel.second)
        # by type first: an array answers "is it one of these" with an array
        if not isinstance(found, str) or found not in _VERDICTS:
            raise DataError(f"judge {config.path}: returned {found!r:.80}; return one of {', '.join(_VERDICTS)}")
        return [found]

    return _in_batches(judge, 1)


def _hf(config: JudgeConfig) -> Judge:
    """Log-probs of whole replies, end of turn included, so no tokenisation of the letters has to be guessed."""
    assert config.model is not None
    policy, layout = load_policy(config.model), config.model.layout
    marks = offered(config.prompt)
    special = [text for text in policy.tokenizer.all_special_tokens if text.strip()]
    if policy.tokenizer.chat_template is None:
        raise ConfigError(
            f"{config.model.path}: its tokenizer has no chat template; judge.kind 'hf' needs a chat model"
        )

    def judge(duels: Sequence[Duel]) -> list[Verdict]:
        asked = [ask(config.prompt, duel) for duel in duels]
        # a text that forges the judge's turns could give the verdict itself
        fair = [
            i
            for i, duel in enumerate(duels)
            if not any(s in t for s in special for t in (as_text(duel.prompt), *duel[1:]))
        ]
        verdicts: list[Verdict] = ["invalid"] * len(duels)
        if not fair:
            return verdicts
        texts = [asked[i] for i in fair]
        messages = [({"role": "user", "content": text},) for text in texts for _ in marks]
        trees, place = encode(messages, marks * len(texts), policy, TokensConfig(max_tokens=1 << 30))
        longest = max(len(tree.prompt_ids) for tree in trees)
        if longest > config.max_prompt_tokens:
            raise DataError(
                f"judge {policy.source}: a comparison has {longest} tokens, judge.max_prompt_tokens is "
                f"{config.max_prompt_tokens}; raise it if the model can read that much, or shorten the responses"
            )
        settled, _ = settle(policy, layout, trees)
        logps = measured(settled, trees, lambda batch: response_logps(settled, batch), _BUDGET)[place].view(
            -1, len(marks)
        )
        for i, row in zip(fair, logps, strict=True):
            verdicts[i] = _likeliest(row, marks)
        return verdicts

    return _in_batches(judge, _BATCH)


def _likeliest(logps: torch.Tensor, marks: Sequence[str]) -> Verdict:
    best = [mark for mark, logp in zip(marks, logps.tolist(), strict=True) if logp == float(logps.max())]
    return _MARKS[best[0]] if len(best) == 1 else "tie"


def _openai(config: JudgeConfig) -> Judge:
    assert config.server is not None
    server = config.server

    def one(duel: Duel) -> Verdict:
        messages = [{"role": "user", "content": ask(config.prompt, duel)}]
        for attempt in range(config.attempts):
            # the same question at temperature 0 would get the same unreadable reply again
            temperature, seed = (1.0, attempt) if attempt else (config.temperature, 0)
            reply = chat(server, messages, max_tokens=config.max_reply_tokens, temperature=temperature, seed=seed).text
            verdict = read_verdict(reply, config.prompt)
            if verdict != "invalid":
                return verdict
        return "invalid"

    def judge_all(duels: Sequence[Duel], done: Done) -> list[Verdict]:
        verdicts: list[Verdict] = ["invalid"] * len(duels)

        def keep(index: int, verdict: Verdict) -> None:
            verdicts[index] = verdict
            done(index, verdict)

        def job(duel: Duel) -> Callable[[], Verdict]:
            return lambda: one(duel)

        parallel(server, [job(duel) for duel in duels], keep)
        return verdicts

    return judge_all
