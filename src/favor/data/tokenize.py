"""Prompt trees as text -> token ids with an exact boundary between prompt and response.

In: PromptTrees and a fast tokenizer. Out: TokenTrees and a TokenReport that counts every cut and drop. A response
ends with its end-of-turn token unless it was cut. Next: pack.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from favor.config import STRICT
from favor.data import sources
from favor.data.encode import Encoder
from favor.data.formats import RowError
from favor.data.types import Comparison, Message, PromptTree, Text, TokenTree
from favor.errors import ConfigError, DataError

# Trees handed to the tokenizer at once: enough for its threads, little enough to hold as text.
_BATCH = 512


class TokensConfig(BaseModel):
    """Section [tokens]. max_tokens bounds prompt + response; `truncation` says what happens beyond it.

    template: chat (the tokenizer's), plain (text as it is), auto (chat when the tokenizer has a template).
    special_text: rows that contain the text of a special token are refused as forgeries, or allowed (for text
    to which a template has been applied already).
    """

    model_config = STRICT
    template: Literal["auto", "chat", "plain"] = "auto"
    max_tokens: int = Field(default=1024, ge=8)
    truncation: Literal["drop", "prompt_start", "response_end"] = "drop"
    special_text: Literal["refuse", "allow"] = "refuse"


@dataclass
class TokenReport:
    """What tokenisation and truncation did. Counts are of trees, responses and comparisons; rows name the trees.

    tokens and pairs (comparisons) are those before truncation, `_lost` what it took of them.
    """

    template: str
    trees: int = 0
    trees_dropped: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    responses_merged: int = 0
    comparisons_dropped: int = 0
    appended_end: int = 0
    already_ended: int = 0
    tokens: int = 0
    tokens_lost: int = 0
    pairs: int = 0
    pairs_lost: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def as_json(self) -> dict[str, Any]:
        """For data.json."""
        return asdict(self)


class _Tools(NamedTuple):
    """What turns text into ids here."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    chat: bool
    end_ids: frozenset[int]
    bos: tuple[int, ...]
    special: tuple[str, ...]
    eos: int | None


class _Rendered(NamedTuple):
    """The prompt and every response behind it as text."""

    prompt: str
    full: tuple[str, ...]


def tokenize(
    trees: Sequence[PromptTree],
    tokenizer: PreTrainedTokenizerBase,
    config: TokensConfig,
    end_ids: frozenset[int],
    bad_rows: str,
) -> tuple[list[TokenTree], TokenReport]:
    """Tokenise, place the boundary, end the turns, truncate.

    Raises ConfigError when template and tokenizer do not go together; DataError for the first tree that
    cannot be tokenised exactly, unless `bad_rows` is "drop"; and DataError when nothing is left.
    """
    found, report = tokenized(trees, tokenizer, config, end_ids, bad_rows)
    return list(found), report


def tokenized(
    trees: Sequence[PromptTree],
    tokenizer: PreTrainedTokenizerBase,
    config: TokensConfig,
    end_ids: frozenset[int],
    bad_rows: str,
) -> tuple[Iterator[TokenTree], TokenReport]:
    """As `tokenize`, one tree after the other; the report is whole when the last has been taken."""
    tools = _tools(tokenizer, config, end_ids)
    report = TokenReport("chat" if tools.chat else "plain", trees=len(trees))
    return _kept(trees, tools, config, bad_rows, report), report


def _kept(
    trees: Sequence[PromptTree], tools: _Tools, config: TokensConfig, bad_rows: str, report: TokenReport
) -> Iterator[TokenTree]:
    first = 0
    for tree, result in _encoded(trees, tools, report):
        if isinstance(result, RowError):
            if bad_rows == "error":
                raise DataError(
                    f"{sources.where(tree.source, tree.rows[0])}: {result}; mend the row, or leave such rows out with "
                    "data.bad_rows=drop"
                )
            _drop(report, tree, str(result))
            continue
        cut = _truncate(result, config, len(tools.bos), report)
        _count_lost(report, result, cut)
        if cut is None:
            _drop(report, tree, f"longer than tokens.max_tokens = {config.max_tokens}")
            continue
        yield replace(cut, first_response=first)
        first += len(cut.response_ids)
    if not first:
        reason = f"the first: row {report.dropped[0][0]}: {report.dropped[0][1]}" if report.dropped else "no rows"
        raise DataError(
            f"{trees[0].source}: nothing is left after tokenising ({reason}); raise tokens.max_tokens or mend the rows"
        )


def encode_prompt(prompt: Text, tokenizer: PreTrainedTokenizerBase, config: TokensConfig) -> tuple[int, ...]:
    """The ids of a prompt alone, as a model sees it before it answers. Raises RowError when it cannot be rendered."""
    tools = _tools(tokenizer, config, frozenset())
    _refuse_special(prompt, tools)
    return tools.bos + tuple(tools.encoder.ids([_render_prompt(prompt, None, tools)])[0])


def _tools(tokenizer: PreTrainedTokenizerBase, config: TokensConfig, end_ids: frozenset[int]) -> _Tools:
    chat = config.template == "chat" or (config.template == "auto" and tokenizer.chat_template is not None)
    if chat and tokenizer.chat_template is None:
        raise ConfigError(
            "tokens.template is 'chat', but this tokenizer has no chat template; set tokens.template=plain"
        )
    eos, first = tokenizer.eos_token_id, tokenizer.bos_token_id
    if not chat and not isinstance(eos, int):
        raise ConfigError(
            "this tokenizer has no end-of-sequence token, so plain responses could not end; use a chat template"
        )
    bos: tuple[int, ...] = ()
    if not chat and isinstance(first, int) and tokenizer("x").input_ids[:1] == [first]:
        bos = (first,)
    special = tuple(tokenizer.all_special_tokens) if config.special_text == "refuse" else ()
    return _Tools(tokenizer, Encoder(tokenizer), chat, end_ids, bos, special, eos if isinstance(eos, int) else None)


def _encoded(
    trees: Sequence[PromptTree], tools: _Tools, report: TokenReport
) -> Iterator[tuple[PromptTree, TokenTree | RowError]]:
    """Each tree with its untruncated ids, or with why it cannot have them."""
    for start in range(0, len(trees), _BATCH):
        window = trees[start : start + _BATCH]
        rendered = [_try_render(tree, tools) for tree in window]
        texts = [text for item in rendered if isinstance(item, _Rendered) for text in (item.prompt, *item.full)]
        encoded = iter(tools.encoder.ids(texts))
        for tree, item in zip(window, rendered, strict=True):
            if isinstance(item, RowError):
                yield tree, item
                continue
            prompt_ids = next(encoded)
            full = [next(encoded) for _ in item.full]
            try:
                yield tree, _assemble(tree, item, prompt_ids, full, tools, report)
            except RowError as error:
                yield tree, error


def _try_render(tree: PromptTree, tools: _Tools) -> _Rendered | RowError:
    try:
        return _render(tree, tools)
    except RowError as error:
        return error


def _render(tree: PromptTree, tools: _Tools) -> _Rendered:
    """Text of the prompt and of prompt + response. A response of several turns must be the assistant's throughout."""
    _refuse_special(tree.prompt, tools)
    for response in tree.responses:
        _refuse_special(_without_end(response, tools), tools)
    prompt = _render_prompt(tree.prompt, tree.tools, tools)
    full = tuple(_render_full(tree, response, prompt, tools) for response in tree.responses)
    return _Rendered(prompt, full)


def _render_prompt(prompt: Text, tool_list: tuple[dict[str, Any], ...] | None, tools: _Tools) -> str:
    if not tools.chat:
        return plain_prompt(prompt)
    return _apply(tools, _as_messages(prompt, "user"), tool_list, generation=True)


def plain_prompt(prompt: Text) -> str:
    """A prompt where no chat template is used: text as it is, messages as a transcript. Raises RowError."""
    return prompt if isinstance(prompt, str) else _plain(prompt) + "\n\nAssistant:"


def _render_full(tree: PromptTree, response: Text, prompt: str, tools: _Tools) -> str:
    if not tools.chat:
        if isinstance(response, str):
            return prompt + response
        _assistant_only(response)
        return prompt + "".join(f" {message['content']}" for message in response)
    turns = _as_messages(response, "assistant")
    _assistant_only(turns)
    full = _apply(tools, _as_messages(tree.prompt, "user") + turns, tree.tools, generation=False)
    if not full.startswith(prompt):
        raise RowError(
            "the chat template renders the prompt differently once the response follows, so no exact boundary exists"
        )
    return full


def _apply(
    tools: _Tools, messages: list[Message], tool_list: tuple[dict[str, Any], ...] | None, *, generation: bool
) -> str:
    try:
        text = tools.tokenizer.apply_chat_template(
            messages,
            tools=list(tool_list) if tool_list else None,
            tokenize=False,
            add_generation_prompt=generation,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise RowError(f"the chat template refuses it ({error})") from None
    assert isinstance(text, str)
    return text


def _as_messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _assistant_only(messages: Sequence[Message]) -> None:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowError("a response must be one assistant turn; move what comes before it into the prompt")


def _plain(messages: Sequence[Message]) -> str:
    """Messages as the transcript text of the DPO paper's dialogue task."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    unknown = [m["role"] for m in messages if m["role"] not in names]
    if unknown:
        raise RowError(f"a turn of '{unknown[0]}' has no plain form; use a chat template")
    return "".join(names[m["role"]] + m["content"] for m in messages)


def _without_end(response: Text, tools: _Tools) -> Text:
    """A plain response may already carry the end-of-sequence text; then it must not be taken for a forgery."""
    eos = tools.tokenizer.eos_token
    if isinstance(response, str) and not tools.chat and isinstance(eos, str):
        return response.removesuffix(eos)
    return response


def _refuse_special(text: Text, tools: _Tools) -> None:
    contents = [text] if isinstance(text, str) else [m["content"] for m in text if isinstance(m.get("content"), str)]
    for content in contents:
        for special in tools.special:
            if special in content:
                raise RowError(
                    f"it contains the text of the special token {special}, which would be read as the token; "
                    "if that is meant, set tokens.special_text=allow"
                )


def _assemble(
    tree: PromptTree,
    rendered: _Rendered,
    prompt_ids: list[int],
    full: list[list[int]],
    tools: _Tools,
    report: TokenReport,
) -> TokenTree:
    """Cut every full sequence at the boundary and end its turn."""
    responses: list[tuple[int, ...]] = []
    for i, (text, ids) in enumerate(zip(rendered.full, full, strict=True)):
        if ids[: len(prompt_ids)] != prompt_ids:
            raise RowError("a token would straddle the boundary between prompt and response, so neither has exact ids")
        body = ids[len(prompt_ids) :]
        if not body or not text[len(rendered.prompt) :].strip():
            raise RowError("its response has no tokens")
        closed = _end_turn(text, len(prompt_ids), body, tools, report)
        # a response that was cut must not learn to end where it was cut
        responses.append(tuple(closed[:-1] if i in tree.cut else closed))
    return TokenTree(
        prompt_ids=tools.bos + tuple(prompt_ids),
        response_ids=tuple(responses),
        complete=tuple(i not in tree.cut for i in range(len(responses))),
        comparisons=tree.comparisons,
        first_response=0,
        row=tree.rows[0],
        ties=tree.ties,
        thumbs=tree.thumbs,
        source=tree.source,
    )


def _end_turn(text: str, before: int, ids: list[int], tools: _Tools, report: TokenReport) -> list[int]:
    """Let the response end with its end-of-turn token: the template's own, or the tokenizer's where there is none."""
    last = _before_blanks(text, before, ids, tools)
    if last and ids[last - 1] in tools.end_ids:
        if last == 1:
            raise RowError("its response has no tokens")
        report.already_ended += not tools.chat
        return ids[:last]
    if not last:
        raise RowError("its response has no tokens")
    if tools.eos is None:
        raise RowError("the chat template adds no end-of-turn token and the tokenizer has none")
    report.appended_end += tools.chat
    return [*ids, tools.eos]


def _before_blanks(text: str, before: int, ids: list[int], tools: _Tools) -> int:
    """How many tokens the response has up to its end token, or up to its last word. `before`: tokens of the prompt."""
    last = len(ids)
    while last and ids[last - 1] not in tools.end_ids and tools.encoder.is_blank(ids[last - 1]):
        last -= 1
    if (last and ids[last - 1] in tools.end_ids) or tools.end_ids.isdisjoint(ids):
        return last
    # what a token alone does not tell (a blank of several tokens), its place in the text does
    offsets, last = tools.encoder.offsets(text)[before:], len(ids)
    while last and ids[last - 1] not in tools.end_ids and not text[slice(*offsets[last - 1])].strip():
        last -= 1
    return last


def _truncate(tree: TokenTree, config: TokensConfig, num_bos: int, report: TokenReport) -> TokenTree | None:
    """Make every response of the tree fit by the same rule; None when the tree must go."""
    longest = max(map(len, tree.response_ids))
    excess = len(tree.prompt_ids) + longest - config.max_tokens
    if excess <= 0:
        return tree
    if config.truncation == "prompt_start" and excess < len(tree.prompt_ids) - num_bos:
        report.prompts_cut += 1
        return replace(tree, prompt_ids=tree.prompt_ids[:num_bos] + tree.prompt_ids[num_bos + excess :])
    room = config.max_tokens - len(tree.prompt_ids)
    if config.truncation == "response_end" and room >= 1:
        return _cut_responses(tree, room, report)
    return None


def _cut_responses(tree: TokenTree, room: int, report: TokenReport) -> TokenTree | None:
    """Cut every response to `room` tokens (no end token is forged), then merge what became equal."""
    cut = [response[:room] for response in tree.response_ids]
    report.responses_cut += sum(len(response) > room for response in tree.response_ids)
    unique = list(dict.fromkeys(cut))
    report.responses_merged += len(cut) - len(unique)
    index = [unique.index(response) for response in cut]
    comparisons, ties = _mapped(tree.comparisons, index), _mapped(tree.ties, index)
    report.comparisons_dropped += len(tree.comparisons) + len(tree.ties) - len(comparisons) - len(ties)
    if tree.comparisons and not comparisons:
        return None
    thumbs = tuple(thumb._replace(response=index[thumb.response]) for thumb in tree.thumbs)
    whole = [len(r) <= room and done for r, done in zip(tree.response_ids, tree.complete, strict=True)]
    complete = tuple(any(w for w, c in zip(whole, cut, strict=True) if c == u) for u in unique)
    return replace(
        tree, response_ids=tuple(unique), complete=complete, comparisons=comparisons, ties=ties, thumbs=thumbs
    )


def _mapped(comparisons: Sequence[Comparison], index: Sequence[int]) -> tuple[Comparison, ...]:
    """Comparisons among merged responses; those whose members became equal are left out."""
    mapped = [comparison._replace(order=tuple(index[i] for i in comparison.order)) for comparison in comparisons]
    return tuple(comparison for comparison in mapped if len(set(comparison.order)) == len(comparison.order))


def _count_lost(report: TokenReport, before: TokenTree, after: TokenTree | None) -> None:
    """What truncation takes, in tokens and comparisons."""
    report.tokens += before.num_tokens
    report.pairs += len(before.comparisons)
    report.tokens_lost += before.num_tokens - (after.num_tokens if after else 0)
    report.pairs_lost += len(before.comparisons) - (len(after.comparisons) if after else 0)


def _drop(report: TokenReport, tree: PromptTree, reason: str) -> None:
    report.trees_dropped += 1
    report.dropped.append((tree.rows[0], reason))
