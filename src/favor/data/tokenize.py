"""Prompt trees as text -> token ids with an exact boundary between prompt and response.

In: PromptTrees and a fast tokenizer. Out: TokenTrees and a TokenReport that counts every cut and drop. A response
ends with its end-of-turn token unless it was cut. Next: batches.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, pairwise
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from favor.config import STRICT
from favor.data.encode import Encoder
from favor.data.formats.fields import brief
from favor.data.read import refused
from favor.data.readers import Kind, RowError
from favor.data.render import Rendered, Renderer, Variables
from favor.data.sight import Sight
from favor.data.types import Comparison, PromptTree, Text, TokenTree, until_said
from favor.errors import ConfigError, DataError

# Trees handed to the tokenizer at once: enough for its threads, little enough to hold as text.
_BATCH = 512


class TokensConfig(BaseModel):
    """Section [tokens]: how text becomes token ids."""

    model_config = STRICT
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's; plain: text as it is; auto: chat where the tokenizer has a template."""
    max_tokens: int = Field(default=1024, ge=8)
    """The longest prompt and response together, in tokens."""
    truncation: Literal["drop", "prompt_start", "response_end"] = "drop"
    """What happens to longer ones: drop them, or cut the prompt's start or the response's end."""
    special_text: Literal["refuse", "allow"] = "refuse"
    """Whether rows that hold the text of a special token or turn mark are refused as forgeries."""


@dataclass
class TokenReport:
    """What tokenisation and truncation did. Counts are of trees, responses and comparisons; rows name the trees.

    tokens and pairs (comparisons) are those before truncation, `_lost` what it took of them. responses_trimmed: the template
    took blanks around their text; reasoning_rewritten: it puts other blanks around their <think>...</think>; tools_unread:
    it leaves out the tools of the row; variables_unread: it has no variable of that name. several_turns: responses in which
    others speak too, tokens_read: tokens of those, which are not scored. pictures: in all prompts. kinds: of each one dropped,
    why.
    """

    template: str = "plain"
    trees: int = 0
    trees_dropped: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    responses_merged: int = 0
    comparisons_dropped: int = 0
    appended_end: int = 0
    already_ended: int = 0
    several_turns: int = 0
    tokens_read: int = 0
    responses_trimmed: int = 0
    reasoning_rewritten: int = 0
    tools_unread: int = 0
    variables_unread: int = 0
    pictures: int = 0
    tokens: int = 0
    tokens_lost: int = 0
    pairs: int = 0
    pairs_lost: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    kinds: list[Kind] = field(default_factory=list[Kind])

    def drop(self, row: int, reason: str, kind: Kind) -> None:
        """A tree is left out."""
        self.trees_dropped += 1
        self.dropped.append((row, reason))
        self.kinds.append(kind)

    def see_truncated(self, before: TokenTree, after: TokenTree | None) -> None:
        """Count what truncation takes of a tree, in tokens and comparisons."""
        self.tokens += before.num_tokens
        self.pairs += len(before.comparisons)
        self.tokens_lost += before.num_tokens - (after.num_tokens if after else 0)
        self.pairs_lost += len(before.comparisons) - (len(after.comparisons) if after else 0)


class _Tools(NamedTuple):
    """What turns text into ids here."""

    encoder: Encoder
    renderer: Renderer
    chat: bool
    end_ids: frozenset[int]
    bos: tuple[int, ...]
    eos: int | None
    sight: Sight | None = None


def tokenize(
    trees: Sequence[PromptTree],
    tokenizer: PreTrainedTokenizerBase,
    config: TokensConfig,
    end_ids: frozenset[int],
    bad_rows: str,
    sight: Sight | None = None,
) -> tuple[list[TokenTree], TokenReport]:
    """Tokenise, place the boundary, end the turns, truncate. sight: of a model that reads pictures.

    Raises ConfigError when template and tokenizer do not go together; DataError for the first tree that
    cannot be tokenised exactly, unless `bad_rows` is "drop"; and DataError when nothing is left.
    """
    report = TokenReport()
    return list(tokenized(trees, tokenizer, config, end_ids, bad_rows, report, sight)), report


def tokenized(
    trees: Iterable[PromptTree],
    tokenizer: PreTrainedTokenizerBase,
    config: TokensConfig,
    end_ids: frozenset[int],
    bad_rows: str,
    report: TokenReport,
    sight: Sight | None = None,
) -> Iterator[TokenTree]:
    """As `tokenize`, one tree after the other; the report is whole when the last has been taken."""
    tools = _tools(tokenizer, config, end_ids, sight)
    report.template = "chat" if tools.chat else "plain"
    source, first = "", 0
    for tree, result in _encoded(trees, tools, report):
        source = source or tree.source
        report.trees += 1
        if isinstance(result, RowError):
            row = tree.first_rows[result.place] if tree.first_rows else tree.rows[0]
            if bad_rows == "error":
                raise refused(tree.source, row, result)
            others = [str(number) for number in tree.rows if number != row]
            also = f" (with it rows {', '.join(others[:20])} of the same prompt)" if others else ""
            # what cannot be rendered does not come through the template
            report.drop(row, f"{result}{also}", "round_trip" if result.kind == "malformed" else result.kind)
            continue
        cut = _truncate(result, config, len(tools.bos), report)
        report.see_truncated(result, cut)
        if cut is None:
            report.drop(tree.rows[0], f"longer than tokens.max_tokens = {config.max_tokens}", "truncation")
            continue
        # dropped trees take no number, so the store of reference log-probs has no holes
        yield replace(cut, first_response=first)
        first += len(cut.response_ids)
    if not first:
        reason = f"the first: row {report.dropped[0][0]}: {report.dropped[0][1]}" if report.dropped else "no rows"
        remedy = "raise tokens.max_tokens" if report.kinds[:1] == ["truncation"] else "fix the rows"
        raise DataError(f"{source}: nothing is left after tokenising ({reason}); {remedy}")


def prompt_encoder(tokenizer: PreTrainedTokenizerBase, config: TokensConfig) -> Callable[..., tuple[int, ...]]:
    """Prompt, variables of the template -> its ids, as a model sees it before it answers; a RowError when it cannot be rendered."""
    tools = _tools(tokenizer, config, frozenset())

    def encode(prompt: Text, *variables: Variables) -> tuple[int, ...]:
        return tools.bos + tuple(tools.encoder.ids([tools.renderer.prompt(prompt, *variables)])[0])

    return encode


def _tools(
    tokenizer: PreTrainedTokenizerBase, config: TokensConfig, end_ids: frozenset[int], sight: Sight | None = None
) -> _Tools:
    chat = config.template == "chat" or (config.template == "auto" and tokenizer.chat_template is not None)
    if sight is not None and not chat:
        raise ConfigError("a model that reads pictures needs its template, which places them; set tokens.template=chat")
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
    # a template writes its own beginning of sequence; in plain text the tokenizer's call shows whether it wants one
    if not chat and isinstance(first, int) and tokenizer("x").input_ids[:1] == [first]:
        bos = (first,)
    renderer = Renderer(tokenizer, chat, config.special_text == "refuse", sight is not None)
    return _Tools(Encoder(tokenizer), renderer, chat, end_ids, bos, eos if isinstance(eos, int) else None, sight)


def _encoded(
    trees: Iterable[PromptTree], tools: _Tools, report: TokenReport
) -> Iterator[tuple[PromptTree, TokenTree | RowError]]:
    """Each tree with its untruncated ids, or with why it cannot have them."""
    iterator = iter(trees)
    # the tokenizer takes a whole window at once, so prompt and response of many trees go in together
    while window := list(islice(iterator, _BATCH)):
        rendered = [_try_render(tree, tools) for tree in window]
        texts = [text for item in rendered if isinstance(item, Rendered) for text in (item.prompt, *chain(*item.full))]
        encoded = iter(tools.encoder.ids(texts))
        for tree, item in zip(window, rendered, strict=True):
            if isinstance(item, RowError):
                yield tree, item
                continue
            # in the order in which the texts were handed over
            prompt_ids = next(encoded)
            full = [[next(encoded) for _ in texts] for texts in item.full]
            try:
                yield tree, _assemble(tree, item, prompt_ids, full, tools, report)
            except RowError as error:
                yield tree, error


def _try_render(tree: PromptTree, tools: _Tools) -> Rendered | RowError:
    try:
        whole = tools.renderer.tree(tree)
        return tools.sight.written(whole, tree.prompt) if tools.sight else whole
    except RowError as error:
        return error


def _assemble(
    tree: PromptTree,
    rendered: Rendered,
    prompt_ids: list[int],
    full: list[list[list[int]]],
    tools: _Tools,
    report: TokenReport,
) -> TokenTree:
    """Cut every full sequence at the boundary and end its turns."""
    responses: list[tuple[int, ...]] = []
    for i, texts in enumerate(rendered.full):
        try:
            ids = _turns((rendered.prompt, *texts), (prompt_ids, *full[i]), rendered.gaps[i], tools, report)
        except RowError as error:
            raise RowError(str(error), error.kind, i) from None
        # a response that was cut must not learn to end where it was cut
        responses.append(tuple(ids[:-1] if i in tree.cut else ids))
    # only now is it known that all of it can be used, so only now is it counted
    _refuse_equal(tree, responses)
    seen = tools.sight.placed(tree.prompt, prompt_ids, responses) if tools.sight else {}
    report.pictures += len(seen.get("pictures", ()))
    report.several_turns += sum(len(texts) > 1 for texts in rendered.full)
    report.tokens_read += sum(i < 0 for ids in responses for i in ids)
    report.responses_trimmed += rendered.trimmed
    report.reasoning_rewritten += rendered.rewritten
    report.tools_unread += rendered.tools_unread
    report.variables_unread += rendered.variables_unread
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
        **seen,
    )


def _turns(
    texts: Sequence[str],
    encoded: Sequence[list[int]],
    gaps: Sequence[tuple[int, int]],
    tools: _Tools,
    report: TokenReport,
) -> list[int]:
    """The ids of a response behind its prompt, every turn that the model says ended; what it only reads stands as ~id.

    texts, encoded: of the prompt, then as Rendered has them, with its gaps.
    """
    found: list[int] = []
    for place, ((before, text), (known, ids)) in enumerate(zip(pairwise(texts), pairwise(encoded), strict=True)):
        _check_ids(text, ids, before, known, tools)
        new = ids[len(known) :]
        if place == len(gaps):
            return found + _end_turn(text, len(known), new, tools, report)
        # the model ended its turn where its end token stands; the rest is what others say, and the next header
        low, high = gaps[place]
        offsets = tools.encoder.offsets(text)[len(known) :]
        ends = (
            i for i, token in enumerate(new) if token in tools.end_ids and low <= offsets[i][0] < offsets[i][1] <= high
        )
        stop = next(ends, -1) + 1
        if not stop:
            raise RowError(
                "the chat template ends no turn with an end-of-turn token, so the model could not have ended one within a "
                "response of several turns; make a row of every turn, with those before it as its prompt"
            )
        found += [*new[:stop], *(~token for token in new[stop:])]
    return found


def _check_ids(text: str, ids: list[int], prompt: str, prompt_ids: list[int], tools: _Tools) -> None:
    """The prompt's ids must open those of the whole, which must say the same as the text."""
    # a merge of the last letter of the prompt with the first of the response gives other ids than either alone
    if ids[: len(prompt_ids)] != prompt_ids:
        raise RowError("a token would straddle the boundary between prompt and response, so neither has exact ids")
    if len(ids) == len(prompt_ids) or not text[len(prompt) :].strip():
        raise RowError("its response has no tokens")
    if not tools.encoder.comes_back(text):
        back = tools.encoder.decoded(ids)
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), 0)
        raise RowError(f"the tokenizer loses text: {brief(text[at:], 40)} comes back from it as {brief(back[at:], 40)}")


def _refuse_equal(tree: PromptTree, responses: Sequence[tuple[int, ...]]) -> None:
    """Responses that are compared must differ in what the model sees."""
    for comparison in (*tree.comparisons, *tree.ties):
        order = comparison.order
        if len({responses[i] for i in order}) < len(order):
            same = next(i for k, i in enumerate(order) if responses[i] in {responses[j] for j in order[:k]})
            raise RowError(
                "two responses that it compares become the same tokens (the template or the tokenizer leaves out what "
                f"tells them apart): {brief(tree.responses[same])}",
                "equal_ids",
                same,
            )


def _end_turn(text: str, before: int, ids: list[int], tools: _Tools, report: TokenReport) -> list[int]:
    """Let the response end with its end-of-turn token: the template's own, or the tokenizer's where there is none."""
    last = _before_blanks(text, before, ids, tools)
    ended = last > 0 and ids[last - 1] in tools.end_ids
    if last - ended <= 0:
        raise RowError("its response has no tokens")
    if ended:
        report.already_ended += not tools.chat
        return ids[:last]
    if tools.eos is None:
        raise RowError("the chat template adds no end-of-turn token and the tokenizer has none")
    report.appended_end += tools.chat
    return [*ids, tools.eos]


def _before_blanks(text: str, before: int, ids: list[int], tools: _Tools) -> int:
    """How many tokens the response has up to its end token, or up to its last word. `before`: tokens of the prompt."""
    last = len(ids)
    while last and ids[last - 1] not in tools.end_ids and tools.encoder.is_blank(ids[last - 1]):
        last -= 1
    if tools.end_ids.isdisjoint(ids):
        return last
    first = 1 + next(i for i, token in enumerate(ids) if token in tools.end_ids)
    # some templates write another end behind the turn's, which a model that has ended it does not come to
    if all(token in tools.end_ids or tools.encoder.is_blank(token) for token in ids[first:last]):
        return first
    if last and ids[last - 1] in tools.end_ids:
        return last
    # what a token alone does not tell (a blank of several tokens), its place in the text does
    offsets, last = tools.encoder.offsets(text)[before:], len(ids)
    while last and ids[last - 1] not in tools.end_ids and not text[slice(*offsets[last - 1])].strip():
        last -= 1
    return last


def _truncate(tree: TokenTree, config: TokensConfig, num_bos: int, report: TokenReport) -> TokenTree | None:
    """Make every response of the tree fit by the same rule; None when the tree must go."""
    longest = max(map(len, tree.response_ids))
    # the longest response decides, so that chosen and rejected lose the same part of the prompt
    excess = len(tree.prompt_ids) + longest - config.max_tokens
    if excess <= 0:
        return tree
    # a part of a picture would be cut off: such a tree goes as a whole
    if config.truncation == "prompt_start" and excess < len(tree.prompt_ids) - num_bos and not tree.pictures:
        report.prompts_cut += 1
        return replace(tree, prompt_ids=tree.prompt_ids[:num_bos] + tree.prompt_ids[num_bos + excess :])
    room = config.max_tokens - len(tree.prompt_ids)
    if config.truncation == "response_end" and room >= 1:
        return _cut_responses(tree, room, report)
    return None


def _cut_responses(tree: TokenTree, room: int, report: TokenReport) -> TokenTree | None:
    """Cut every response to `room` tokens (no end token is forged), then merge what became equal."""
    cut = [until_said(response[:room]) for response in tree.response_ids]
    report.responses_cut += sum(len(response) > room for response in tree.response_ids)
    unique = list(dict.fromkeys(cut))
    report.responses_merged += len(cut) - len(unique)
    index = [unique.index(response) for response in cut]
    comparisons, ties = _mapped(tree.comparisons, index), _mapped(tree.ties, index)
    report.comparisons_dropped += len(tree.comparisons) + len(tree.ties) - len(comparisons) - len(ties)
    # everything that told the responses apart was cut off
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
