"""Scores from models: a reward model's scalar, or the implicit reward of a trained policy; on prompt trees.

In: a model folder, prompts and responses as text. Out: one score per response. Next: ../model/heads.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from favor.config import STRICT, load
from favor.data.formats import RowError
from favor.data.tokenize import TokensConfig, prompt_encoder, tokenize
from favor.data.types import Batch, PromptTree, Text, TokenTree, longest_path
from favor.errors import CheckpointError, ConfigError, DataError
from favor.losses.table import beta_of, make_loss
from favor.model.batched import measured
from favor.model.heads import load_scalar_model, response_scores, settle_scores
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy, weights_hash
from favor.model.logprobs import response_logps
from favor.ranks import Shard
from favor.run import RunFolder, read_json

Scorer: TypeAlias = Callable[[Sequence[Text], Sequence[str]], list[float]]
# Tokens computed at once; there is no gradient, so this bounds the memory of one forward only.
_BUDGET = 4096
# settings of a run's model that every machine has
_ANYWHERE = {"layout": ("auto", "tree", "rows"), "device": ("auto", "cpu")}


class ScoredTokens(BaseModel):
    """Section [reward.tokens]: how text that is scored becomes token ids. None of it is cut, and any text can be scored."""

    model_config = STRICT
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's; plain: text as it is; auto: chat where the tokenizer has a template."""
    max_tokens: int = Field(default=4096, ge=8)
    """The longest prompt and response together, in tokens; a longer one is refused."""


class RunRecipe(BaseModel):
    """What of a run's config.toml is read again: its model in float32, how text became tokens, its loss and data."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    model: ModelConfig
    tokens: TokensConfig = TokensConfig()
    loss: dict[str, Any] = {}
    data: dict[str, Any] = {}

    @field_validator("model", mode="before")
    @classmethod
    def _measured_anywhere(cls, model: Any) -> Any:
        """In float32 whatever training used, and where there may be no GPU: what only that has is left open."""
        if not isinstance(model, dict):
            return model
        of_gpus = {key for key, able in _ANYWHERE.items() if key in model and model[key] not in able}
        return model | {"dtype": "float32"} | dict.fromkeys(of_gpus, "auto")

    @property
    def beta(self) -> float | None:
        """The beta of its loss; of a sum of losses, that of the first term which has one."""
        terms = (self.loss, *self.loss.get("terms", ()))
        return next((term["beta"] for term in terms if "beta" in term), None)

    @property
    def scale(self) -> float:
        """The beta of its implicit reward: that of its loss, else DPO's default."""
        return self.beta or beta_of(make_loss(**self.loss))


def read_run(run: str) -> tuple[RunFolder, RunRecipe]:
    """A finished run of `favor train`. Raises CheckpointError when there is none, ConfigError for a damaged recipe."""
    folder = RunFolder(Path(run))
    if not folder.config.exists() or not folder.model.exists():
        raise CheckpointError(
            f"{run}: no finished run here (config.toml and model/); train first, or name a folder of favor train"
        )
    return folder, load(RunRecipe, folder.config)


def base_of(run: str) -> str | None:
    """The model that a run started from, if there is one to read."""
    folder = RunFolder(Path(run))
    return load(RunRecipe, folder.config).model.path if folder.config.exists() else None


def load_pair(run: str, reference: str | None, shard: Shard = "none", *, sees: bool = False) -> tuple[Policy, Policy]:
    """A run's trained policy and its reference (the model it started from, or another one), in float32.

    shard, sees: as `load_policy` has them.
    """
    folder, recipe = read_run(run)
    start = recipe.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
    # what was trained, and any other model, may hold numbers that bfloat16 has not
    whole = start.model_copy(update={"weights": "float32", "revision": None})
    if recipe.model.lora is None:
        start = start.model_copy(update={"weights": "float32"})
    policy = load_policy(whole.model_copy(update={"path": str(folder.model)}), shard=shard, sees=sees)
    other = start if reference is None else whole.model_copy(update={"path": reference})
    base = load_policy(other, shard=shard, frozen=True, sees=sees)
    began = read_json(folder.inputs).get("weights") if folder.inputs.exists() else None
    if reference is None and began not in (None, weights_hash(base)):
        raise CheckpointError(
            f"{start.path}: its weights are not those that {run} started from, so figures against it would be wrong; put them "
            "back, or name the model to compare with by reference=FOLDER"
        )
    return policy, base


def model_scorer(path: str, tokens: ScoredTokens, weights: Literal["float32", "bfloat16"] = "float32") -> Scorer:
    """The scalar of a sequence classifier with one output at each response's last token, float32; weights: as they are kept."""
    policy = load_scalar_model(ModelConfig(path=path, weights=weights), frozen=True)
    settled = _settled_once(lambda trees: settle_scores(policy, "auto", trees)[0])

    def score(prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
        trees, place = encode(prompts, responses, policy, tokens)
        ready = settled(trees)
        return measured(ready, trees, lambda batch: response_scores(ready, batch), _BUDGET)[place].tolist()

    return score


def implicit_scorer(run: str, reference: str | None, beta: float | None, tokens: ScoredTokens | None) -> Scorer:
    """r(x, y) = beta log(pi(y|x) / ref(y|x)), nats x beta, float32; policy, and what is None here, are the run's."""
    _, recipe = read_run(run)
    used = beta or recipe.beta
    if used is None:
        raise ConfigError(f"{run}: its recipe has no loss.beta; give reward.beta")
    longest = max(ScoredTokens().max_tokens, recipe.tokens.max_tokens)
    how = tokens or ScoredTokens(template=recipe.tokens.template, max_tokens=longest)
    policy, base = load_pair(run, reference)
    settled = _settled_once(lambda trees: settle(policy, "auto", trees)[0])
    settled_base = _settled_once(lambda trees: settle(base, settled(trees).layout, trees)[0])

    def score(prompts: Sequence[Text], responses: Sequence[str]) -> list[float]:
        trees, place = encode(prompts, responses, policy, how)
        first, second = settled(trees), settled_base(trees)

        def log_ratio(batch: Batch) -> Tensor:
            return response_logps(first, batch) - response_logps(second, batch)

        return (used * measured(first, trees, log_ratio, _BUDGET))[place].tolist()

    return score


def _settled_once(settle_for: Callable[[Sequence[TokenTree]], Policy]) -> Callable[[Sequence[TokenTree]], Policy]:
    """The settled policy, checked again only when a longer path comes than any before."""
    longest = 0
    found: Policy | None = None

    def settled(trees: Sequence[TokenTree]) -> Policy:
        nonlocal longest, found
        here = max(map(longest_path, trees))
        if found is None or here > longest:
            longest, found = here, settle_for(trees)
        return found

    return settled


def encode(
    prompts: Sequence[Text], responses: Sequence[str], policy: Policy, tokens: ScoredTokens
) -> tuple[list[TokenTree], list[int]]:
    """One tree per distinct prompt and, for every (prompt, response), the index of its value among all trees' responses.

    Text is tokenised as in training; where a token would straddle the boundary (samples can do that) prompt and
    response are tokenised apart, which is how the sampled text came about. A blank response is its end token alone.
    Raises DataError for a prompt that cannot be rendered or is too long.
    """
    keys = [json.dumps(prompt) for prompt in prompts]
    groups: dict[str, tuple[Text, dict[str, None]]] = {}
    for key, prompt, response in zip(keys, prompts, responses, strict=True):
        groups.setdefault(key, (prompt, {}))[1][response] = None
    trees: list[TokenTree] = []
    place: dict[tuple[str, str], int] = {}
    for key, (prompt, texts) in groups.items():
        first = len(place)
        trees.append(_tree(prompt, list(texts), policy, tokens, first))
        place.update(((key, text), first + i) for i, text in enumerate(texts))
    return trees, [place[each] for each in zip(keys, responses, strict=True)]


def _tree(prompt: Text, texts: list[str], policy: Policy, tokens: ScoredTokens, first: int) -> TokenTree:
    # what is too long is refused here, by what it is
    settings = TokensConfig(template=tokens.template, special_text="allow", max_tokens=1 << 30)
    try:
        ids = prompt_encoder(policy.tokenizer, settings)(prompt)
    except RowError as error:
        raise DataError(f"the prompt {prompt!r:.80} cannot be scored: {error}") from None
    told = [text for text in texts if text.strip()]
    together = _exact(prompt, told, policy, settings) if told else None
    # one that cannot be exact must not change how the others are scored
    known = together or {k: v for text in told for k, v in (_exact(prompt, [text], policy, settings) or {}).items()}
    if len(known) < len(texts):
        end = _end_of_turn(prompt, policy, settings)
        apart = policy.tokenizer([text.strip() and text for text in texts], add_special_tokens=False).input_ids
        known = {text: (*said, end) for text, said in zip(texts, apart, strict=True)} | known
    found = tuple(known[text] for text in texts)
    longest = len(ids) + max(map(len, found))
    if longest > tokens.max_tokens:
        raise DataError(
            f"the prompt {prompt!r:.80} and a response have {longest} tokens, more than tokens.max_tokens = "
            f"{tokens.max_tokens} of the reward; raise reward.tokens.max_tokens, or shorten them"
        )
    return TokenTree(ids, found, (True,) * len(found), (), first, row=1)


def _end_of_turn(prompt: Text, policy: Policy, settings: TokensConfig) -> int:
    """The token with which an answer to this prompt ends: the template's own, of several that could."""
    if exact := _exact(prompt, ["a"], policy, settings):
        return exact["a"][-1]
    # no answer to it has exact ids by this template: the tokenizer's own end
    eos = policy.tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(
            f"the prompt {prompt!r:.80} cannot be scored: neither template nor tokenizer ends an answer to it"
        )
    return eos


def _exact(prompt: Text, texts: list[str], policy: Policy, settings: TokensConfig) -> dict[str, tuple[int, ...]] | None:
    """The ids of each response as training sees them; None when one of them has none."""
    sides = tuple(texts) if isinstance(prompt, str) else tuple(({"role": "assistant", "content": t},) for t in texts)
    tree = PromptTree(prompt, sides, (), (1,), "scored text")
    try:
        (exact,), report = tokenize([tree], policy.tokenizer, settings, policy.end_ids, "error")
    except DataError:
        return None
    # a sample is scored as it was said
    if report.reasoning_rewritten:
        return None
    return dict(zip(texts, exact.response_ids, strict=True))
