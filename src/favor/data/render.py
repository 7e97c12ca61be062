"""Prompt trees -> text, by the chat template or plain, with proof that no word of a response is lost or forged.

In: a PromptTree and a tokenizer's template. Out: Rendered, or a RowError: a template that drops, alters or hides a part of
a response, text that would be read as a control token, text that is not Unicode. Next: encode.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from favor.data.formats.fields import SAID, RowError, checked_texts
from favor.data.pictures import as_parts
from favor.data.shapes import MARK, MARKED, Shapes
from favor.data.turns import ARGUMENTS, REMEDY, apart, called, check_heard, differs, left_out, mark, placed, reasoned
from favor.data.types import Message, PromptTree, Text

# a turn of the model's and what others say behind it -> all up to there
Written: TypeAlias = Callable[[Message, list[Message]], str]
# what the template is given beside turns
Variables: TypeAlias = Mapping[str, Any]
_NONE: Variables = MappingProxyType({})

# a template is a program over the row: these are the ways in which it can fail
_FAILS = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# what looks like a control token although the tokenizer does not know it as one
_CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?[A-Z_]{3,}\]|<</?[A-Z]{2,}>>")
# added tokens that are part of what a model says, not of the turns around it
_SPOKEN = re.compile(r"[<\[]/?(?:think|tool|reason)", re.IGNORECASE)
_ENDS = re.compile(r"end|eo[st]|</s>", re.IGNORECASE)
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
# reasoning that a prompt opens
_OPENED = re.compile(r"<think>\s*\Z")
_NO_PLAIN = "; use a chat template that renders it, or write it into the content"


class Rendered(NamedTuple):
    """The prompt and every response behind it as text; how many are not written as they were, what got lost.

    A response is texts, each the beginning of the next: all up to where the model begins its next turn, at last the whole.
    Most are one turn, so one text. gaps: of each text but the last, from where the model has said all of its turn to where
    others begin, in characters; its end token stands between.
    """

    prompt: str
    full: tuple[tuple[str, ...], ...]
    gaps: tuple[tuple[tuple[int, int], ...], ...]
    trimmed: int = 0
    rewritten: int = 0
    tools_unread: bool = False
    variables_unread: bool = False


class _Kept(NamedTuple):
    """What is not written as it was: blanks around what is said are lost, or reasoning is in the template's form of it."""

    trimmed: bool = False
    rewritten: bool = False
    # where its words end, and where those of others begin
    gap: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Renderer:
    """A tokenizer's way to put turns into text. special: refuse texts that would be read as control tokens.

    parts: the template takes a turn's content as a list of parts, among them pictures.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    special: bool
    parts: bool = False

    def tree(self, tree: PromptTree) -> Rendered:
        """Text of the prompt and of prompt + response. Raises RowError (its place is the response's, if it is one's)."""
        variables, chat = _variables(tree), self.chat
        prompt = self.prompt(tree.prompt, variables, proven=False)
        full: list[tuple[str, ...]] = []
        kept: list[list[_Kept]] = []
        for place, response in enumerate(tree.responses):
            try:
                texts, how = self._full(tree.prompt, response, variables, prompt)
            except RowError as error:
                raise RowError(str(error), error.kind, place) from None
            full.append(texts)
            kept.append(how)
        if chat:
            check_heard(self._turns(tree.prompt, "user"), prompt, "prompt")
        unread = tree.tools is not None and not (chat and _names(tree.tools) <= set(re.findall(r"[\w.-]+", prompt)))
        gaps = tuple(tuple(how.gap for how in each[:-1]) for each in kept)
        trimmed, rewritten = (sum(any(how[i] for how in each) for each in kept) for i in (0, 1))
        strange = not self._words.issuperset(tree.template_kwargs or ())
        return Rendered(prompt, tuple(full), gaps, trimmed, rewritten, unread, strange)

    def prompt(self, prompt: Text, variables: Variables = _NONE, *, proven: bool = True) -> str:
        """Text of a prompt alone. Raises RowError; `proven`: also when the template leaves out a turn of it."""
        if not self.chat:
            self._refuse_forged((prompt, dict(variables)))
            if variables.keys() - {"tools"}:
                raise RowError(f"chat_template_kwargs has no plain form{_NO_PLAIN.partition(',')[0]}, or leave it out")
            return plain_prompt(prompt)
        turns = self._turns(prompt, "user")
        self._refuse_forged((tuple(turns), dict(variables)))
        text = self._apply(turns, variables, generation=True)
        if proven:
            check_heard(turns, text, "prompt")
        return text

    def _full(
        self, asked: Text, response: Text, variables: Variables, prompt: str
    ) -> tuple[tuple[str, ...], list[_Kept]]:
        """The texts of a response behind its prompt, and how what each turn says is kept."""
        if not self.chat:
            self._refuse_forged(self._without_end(response))
            return (prompt + _plain_response(response),), [_Kept()]
        turns, before = self._turns(response, "assistant"), self._turns(asked, "user")
        self._refuse_forged((tuple(turns),))
        if turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
            raise RowError(
                "a response must begin and end with a turn of the assistant; move what comes before it into the prompt"
            )
        if len(turns) > 1 and any(
            turn["role"] == "assistant" and not any(turn.get(name) for name in SAID) for turn in turns
        ):
            raise RowError("a turn of the assistant in a response says nothing", "empty")
        said = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        texts, kept = [prompt], list[_Kept]()
        for start, stop in pairwise([*said, len(turns)]):
            # what others say between this turn of the model's and its next
            turn, heard = turns[start], turns[start + 1 : stop]
            written = partial(self._written, [*before, *turns[:start]], variables, goes_on=stop < len(turns))
            text, how = self._then(turn, heard, written, texts[-1], last=stop == len(turns))
            texts.append(text)
            kept.append(how)
        return tuple(texts[1:]), kept

    def _written(
        self, before: list[Message], variables: Variables, turn: Message, heard: list[Message], *, goes_on: bool
    ) -> str:
        """All up to a turn and what others say behind it; `goes_on`: up to where the model says its next."""
        return self._apply([*before, turn, *heard], variables, generation=goes_on)

    def _then(
        self, turn: Message, heard: list[Message], written: Written, known: str, *, last: bool
    ) -> tuple[str, _Kept]:
        """What the model sees after its turn: where it says another, all up to that one, as it was. And as `_survives`."""
        text = written(turn, heard)
        if text.startswith(known):
            check_heard(heard, text[len(known) :], "response")
            return text, self._survives(turn, heard, written, (known, text), last=last)
        base = _OPENED.sub("", known)
        if not last or base == known or not text.startswith(base):
            raise differs(known, last=last)
        # the prompt opens the model's reasoning, and the template writes none of it where it was said before
        reasoning, answer = reasoned(turn, known[len(base) :])
        if not reasoning:
            raise RowError(
                "the model's turn begins inside its reasoning (the prompt ends with <think>) and the response has none; give it "
                "as reasoning_content, or before the answer as <think>...</think>"
            )
        if written(answer, []) != text:
            raise RowError(f"the chat template changes its response: it becomes {_end_of(text[len(base) :])}{REMEDY}")
        return f"{known}{reasoning}{text[len(base) :]}", self._survives(answer, [], written, (base, text), last=last)

    def _survives(
        self, turn: Message, heard: list[Message], written: Written, texts: Sequence[str], *, last: bool
    ) -> _Kept:
        """How what the turn says is kept. Raises RowError for a loss or change of more than blanks.

        texts: up to the turn, and behind it.
        """
        said, tail = {name for name in SAID if turn.get(name)}, texts[1][len(texts[0]) :]
        start, end = self._frame
        if last and said == {"content"} and tail == f"{start}{turn['content']}{end}":
            return _Kept()
        other = apart(turn)
        # marks of a reasoning that says nothing are lost, not rewritten, where the template writes none
        marked_off = other is not None and (other["reasoning_content"] or "</think>" in tail)
        if other is not None and marked_off and turn["content"].strip() not in tail:
            return self._survives(other, heard, written, texts, last=last)._replace(rewritten=True)
        values: list[str] = []
        marked = {name: mark(value, values) if name in said else value for name, value in turn.items()}
        # the template's own text and, at odd places, the numbers of marked texts
        own = len(values)
        others = [{**turn, "content": mark(turn.get("content") or "", values)} for turn in heard]
        shape = MARKED.split(written(marked, others)[len(texts[0]) :])
        places = [int(place) for place in shape[1::2]]
        missing = {i for i, value in enumerate(values[:own]) if value.strip()}.difference(places)
        if missing:
            raise left_out(values[min(missing)], turn, last=last)
        # the header of a tool's answer may name the call again
        again = {place for place in places if places.count(place) > 1}
        if any(last or values[place] not in called(turn) for place in again):
            raise RowError(f"the chat template changes its response: it writes a part of it twice{REMEDY}")
        pieces = [values[int(piece)] if i % 2 else piece for i, piece in enumerate(shape)]
        # reasoning inside the text may replace what the template would write before it
        found = placed(tail, pieces) or [(0, 0), *(placed(tail, pieces[1:]) or ())]
        if len(found) < len(pieces):
            raise RowError(f"the chat template changes its response: it becomes {_end_of(tail)}{REMEDY}")
        trimmed = "".join(pieces) != tail and any(v != v.strip() and v not in tail for v in values[:own])
        # a tool's header may name the call again, so the first place of each counts
        first = {place: found[2 * i + 1] for i, place in reversed(list(enumerate(places)))}
        end = max((stop for place, (_, stop) in first.items() if place < own), default=0)
        begin = min((start for place, (start, _) in first.items() if place >= own), default=len(tail))
        return _Kept(trimmed, gap=(len(texts[0]) + end, len(texts[0]) + begin))

    def _turns(self, text: Text, role: str) -> list[Message]:
        """Turns, the arguments of their calls in the form that the template writes as JSON."""
        turns = [{"role": role, "content": text}] if isinstance(text, str) else list(text)
        return [self._called(turn) if turn.get("tool_calls") else turn for turn in turns]

    def _called(self, turn: Message) -> Message:
        calls = turn["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            return turn
        made: list[dict[str, Any]] = []
        for call in calls:
            inner = call.get("function", call)
            if isinstance(inner, dict) and "arguments" in inner:
                inner = {**inner, "arguments": self._arguments(inner["arguments"])}
            made.append({**call, "function": inner} if "function" in call else inner)
        return {**turn, "tool_calls": made}

    @cached_property
    def _words(self) -> set[str]:
        """Every word of the template, the names of its variables among them."""
        return set(re.findall(r"\w+", str(self.tokenizer.chat_template)))

    @cached_property
    def _arguments(self) -> Callable[[Any], Any]:
        """What makes of a call's arguments what the template wants: an object, or JSON text."""
        for form in ARGUMENTS:
            function = {"name": "f", "arguments": form({"a": MARK})}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            turns: list[Message] = [{"role": "user", "content": "hi"}]
            try:
                text = self._render([*turns, {"role": "assistant", "content": "", "tool_calls": [call]}], _NONE, False)
            except RowError:
                continue
            if MARK in text and "{'a'" not in text:
                return form
        return lambda given: given

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the template usually writes before and after a response."""
        try:
            prompt = self._apply(self._turns("hi", "user"), _NONE, generation=True)
            full = self._apply([*self._turns("hi", "user"), *self._turns(MARK, "assistant")], _NONE, generation=False)
        except RowError:
            return "", MARK
        start, _, end = full[len(prompt) :].partition(MARK)
        return start, end

    @cached_property
    def _forgeries(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Texts that are read as control tokens: special tokens, and what stands around the turns of the template.

        The first of the two are their openings, which are looked for first.
        """
        if not self.special:
            return (), ()
        added = self.tokenizer.added_tokens_decoder.values()
        found = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        if self.chat:
            around = self._around()
            found.update(t.content for t in added if t.content in around and not _SPOKEN.match(t.content))
            found.update(_CONTROL.findall(around))
        found = {text for text in found if text.strip()}
        return tuple({text[:2] for text in found}), tuple(sorted(found, key=len, reverse=True))

    def _around(self) -> str:
        """What the template writes around the turns of a conversation, as long a one as it takes."""
        user, assistant = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}
        for turns in ([{"role": "system", "content": MARK}, user, assistant, user], [user, assistant, user], [user]):
            try:
                return self._apply(turns, _NONE, generation=False)
            except RowError:
                continue
        return ""

    def _refuse_forged(self, value: Any) -> None:
        """Look for control tokens in every text inside a value, and for roles that a template could make one of."""
        openings, forgeries = self._forgeries
        normalizer = self._normalizer
        for text in checked_texts(value):
            seen = text if normalizer is None else f"{text}\n{normalizer.normalize_str(text)}"
            if any(opening in seen for opening in openings):
                for forged in forgeries:
                    if forged in seen:
                        raise _forged(forged)
        for turn in (turn for part in value if isinstance(part, tuple) for turn in part):
            # some templates write <|role|>: a role must not make an end token of it
            role = str(turn.get("role", "user"))
            if role not in _ROLES and (made := [f for f in forgeries if role in f and _ENDS.search(f)]):
                raise _forged(made[0])

    @cached_property
    def _normalizer(self) -> Any:
        """The tokenizer's normalizer, where it works on the text of added tokens too."""
        normalizes = any(token.normalized for token in self.tokenizer.added_tokens_decoder.values())
        return cast(PreTrainedTokenizerFast, self.tokenizer).backend_tokenizer.normalizer if normalizes else None

    def _without_end(self, response: Text) -> tuple[Text]:
        """A plain response may already carry the end-of-sequence text; then it must not be taken for a forgery."""
        eos = self.tokenizer.eos_token
        if isinstance(response, str) and not self.chat and isinstance(eos, str):
            return (response.removesuffix(eos),)
        return (response,)

    @cached_property
    def _shapes(self) -> Shapes:
        return Shapes(self.tokenizer.chat_template, lambda turns, generation: self._render(turns, _NONE, generation))

    def _apply(self, messages: list[Message], variables: Variables, *, generation: bool) -> str:
        """What the template makes of turns. Raises RowError."""
        filled = None if variables else self._shapes.fill(messages, generation=generation)
        return self._render(messages, variables, generation) if filled is None else filled

    def _render(self, messages: list[Message], variables: Variables, generation: bool) -> str:
        try:
            turns = [as_parts(turn) for turn in messages] if self.parts else messages
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation, **variables
            )
        except _FAILS as error:
            raise RowError(f"the chat template refuses it ({type(error).__name__}: {error}); {_REFUSES}") from None
        assert isinstance(text, str)
        return text


_REFUSES = "change the row as it says, or use a template that takes it"


def _variables(tree: PromptTree) -> Variables:
    tools = {"tools": list(tree.tools)} if tree.tools else {}
    return {**tools, **(tree.template_kwargs or {})}


def plain_prompt(prompt: Text) -> str:
    """A prompt where no chat template is used: text as it is, messages as a transcript. Raises RowError.

    The transcript is that of the DPO paper's dialogue task.
    """
    if isinstance(prompt, str):
        return prompt
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    unknown = [m["role"] for m in prompt if m["role"] not in names]
    if unknown:
        raise RowError(f"a turn of '{unknown[0]}' has no plain form; use a chat template")
    return "".join(names[m["role"]] + _plain_content(m) for m in prompt) + "\n\nAssistant:"


def _plain_response(response: Text) -> str:
    if isinstance(response, str):
        return response
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise RowError(f"a response of several turns has no plain form{_NO_PLAIN.partition(',')[0]}")
    return f" {_plain_content(response[0])}"


def _plain_content(message: Message) -> str:
    more = [name for name in SAID if name != "content" and message.get(name)]
    if more:
        raise RowError(f"{more[0]} of a message has no plain form{_NO_PLAIN}")
    content = str(message.get("content") or "")
    if "\n\nHuman:" in content or "\n\nAssistant:" in content:
        raise RowError(
            "a message holds '\\n\\nHuman:' or '\\n\\nAssistant:', which would be read as a turn; take it out"
        )
    return content


def _names(tools: Sequence[dict[str, Any]]) -> set[str]:
    """The names of the tools that a prompt describes."""
    described = [tool.get("function", tool) for tool in tools]
    return {str(tool["name"]) for tool in described if isinstance(tool, dict) and tool.get("name")}


def _end_of(tail: str) -> str:
    """Both ends of a text, for a message."""
    return repr(tail if len(tail) <= 90 else f"{tail[:40]} ... {tail[-40:]}")


def _forged(forged: str) -> RowError:
    return RowError(
        f"it contains the text of the special token {forged}, which would be read as the token; "
        "if that is meant, set tokens.special_text=allow",
        "special_text",
    )
