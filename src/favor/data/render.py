"""Prompt trees -> text, by the chat template or plain, with proof that no word of a response is lost or forged.

In: a PromptTree and a tokenizer's template. Out: Rendered, or a RowError: a template that drops, alters or hides a part of
a response, text that would be read as a control token, text that is not Unicode. Next: encode.py.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from favor.data.formats.fields import SAID, RowError, checked_texts, shown
from favor.data.shapes import MARK, MARKED, Shapes
from favor.data.types import Message, PromptTree, Text

Tools = tuple[dict[str, Any], ...] | None

# a template is a program over the row: these are the ways in which it can fail
_FAILS = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# what looks like a control token although the tokenizer does not know it as one
_CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?[A-Z_]{3,}\]|<</?[A-Z]{2,}>>")
# added tokens that are part of what a model says, not of the turns around it
_SPOKEN = re.compile(r"[<\[]/?(?:think|tool|reason)", re.IGNORECASE)
_ENDS = re.compile(r"end|eo[st]|</s>", re.IGNORECASE)
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
# parts of a tool call that are not said
_UNSAID = frozenset(("type", "id", "index"))
_NO_PLAIN = "; use a chat template that renders it, or write it into the content"


class Rendered(NamedTuple):
    """The prompt and every response behind it as text; whether blanks around a response's text, or its tools, got lost."""

    prompt: str
    full: tuple[str, ...]
    trimmed: int = 0
    tools_unread: bool = False


@dataclass(frozen=True)
class Renderer:
    """A tokenizer's way to put turns into text. special: refuse texts that would be read as control tokens."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    special: bool

    def tree(self, tree: PromptTree) -> Rendered:
        """Text of the prompt and of prompt + response. Raises RowError (its place is the response's, if it is one's)."""
        prompt, chat = self.prompt(tree.prompt, tree.tools, proven=False), self.chat
        full: list[str] = []
        trimmed = 0
        for place, response in enumerate(tree.responses):
            try:
                text, blanks = self._full(tree, response, prompt)
            except RowError as error:
                raise RowError(str(error), error.kind, place) from None
            full.append(text)
            trimmed += blanks
        if chat:
            _check_prompt(tree.prompt, prompt)
        unread = tree.tools is not None and not (chat and _names(tree.tools) <= set(re.findall(r"[\w.-]+", prompt)))
        return Rendered(prompt, tuple(full), trimmed, unread)

    def prompt(self, prompt: Text, tools: Tools = None, *, proven: bool = True) -> str:
        """Text of a prompt alone. Raises RowError; `proven`: also when the template leaves out a turn of it."""
        self._refuse_forged((prompt, tools))
        if not self.chat:
            return plain_prompt(prompt)
        text = self._apply(_turns(prompt, "user"), tools, generation=True)
        if proven:
            _check_prompt(prompt, text)
        return text

    def _full(self, tree: PromptTree, response: Text, prompt: str) -> tuple[str, bool]:
        """Prompt and response, and whether blanks around the response were lost."""
        self._refuse_forged(self._without_end(response))
        if not self.chat:
            return prompt + _plain_response(response), False
        turns = _turns(response, "assistant")
        _assistant_only(turns)
        full = self._apply(_turns(tree.prompt, "user") + turns, tree.tools, generation=False)
        if not full.startswith(prompt):
            raise RowError(
                "the chat template renders the prompt differently once the response follows, so no exact boundary exists; "
                "use another template, or tokens.template=plain"
            )
        return full, self._survives(tree, turns[0], prompt, full[len(prompt) :])

    def _survives(self, tree: PromptTree, turn: Message, prompt: str, tail: str) -> bool:
        """Whether only blanks around the text are lost. Raises RowError for any other loss or change."""
        said = {name for name in SAID if turn.get(name)}
        start, end = self._frame
        if said == {"content"} and tail == f"{start}{turn['content']}{end}":
            return False
        values: list[str] = []
        marked = {name: _mark(value, values) if name in said else value for name, value in turn.items()}
        shape = self._shape(tree, marked, prompt)
        places = [int(place) for place in shape[1::2]]
        missing = {i for i, value in enumerate(values) if value.strip()}.difference(places)
        if missing:
            raise RowError(f"the chat template leaves out {shown(values[min(missing)])} of the response{_REMEDY}")
        if len(set(places)) < len(places):
            raise RowError(f"the chat template changes its response: it writes a part of it twice{_REMEDY}")
        pieces = [values[int(piece)] if i % 2 else piece for i, piece in enumerate(shape)]
        # reasoning inside the text may replace what the template would write before it
        if not _fits(tail, pieces) and not _fits(tail, pieces[1:]):
            raise RowError(f"the chat template changes its response: it becomes {_end_of(tail)}{_REMEDY}")
        return "".join(pieces) != tail and any(v != v.strip() and v not in tail for v in values)

    def _shape(self, tree: PromptTree, marked: Message, prompt: str) -> list[str]:
        """What the template writes behind the prompt: its own text and, at odd places, the numbers of marked texts."""
        full = self._apply([*_turns(tree.prompt, "user"), marked], tree.tools, generation=False)
        return MARKED.split(full[len(prompt) :])

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the template usually writes before and after a response."""
        try:
            prompt = self._apply(_turns("hi", "user"), None, generation=True)
            full = self._apply([*_turns("hi", "user"), *_turns(MARK, "assistant")], None, generation=False)
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
                return self._apply(turns, None, generation=False)
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
        return Shapes(self.tokenizer.chat_template, lambda turns, generation: self._render(turns, None, generation))

    def _apply(self, messages: list[Message], tools: Tools, *, generation: bool) -> str:
        """What the template makes of turns. Raises RowError."""
        filled = None if tools else self._shapes.fill(messages, generation=generation)
        return self._render(messages, tools, generation) if filled is None else filled

    def _render(self, messages: list[Message], tools: Tools, generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except _FAILS as error:
            raise RowError(f"the chat template refuses it ({type(error).__name__}: {error})") from None
        assert isinstance(text, str)
        return text


_REMEDY = "; use a template that keeps it, set tokens.template=plain, or change the row to the form in which the template writes it"


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
    _assistant_only(response)
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


def _assistant_only(messages: Sequence[Message]) -> None:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowError("a response must be one assistant turn; move what comes before it into the prompt")


def _turns(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _check_prompt(prompt: Text, rendered: str) -> None:
    """Every turn's text must stand in the prompt; of the assistant's earlier turns what follows their reasoning."""
    for turn in _turns(prompt, "user"):
        text = str(turn.get("content") or "")
        if turn.get("role") == "assistant":
            text = text.rpartition("</think>")[2]
        said = [text]
        _mark([turn.get("tool_calls"), turn.get("function_call")], said)
        lost = next((text for text in said if not any(form.strip() in rendered for form in _forms(text))), None)
        if lost is not None:
            raise RowError(f"the chat template leaves out or changes {shown(lost)} of the prompt{_REMEDY}")


def _names(tools: Sequence[dict[str, Any]]) -> set[str]:
    """The names of the tools that a prompt describes."""
    described = [tool.get("function", tool) for tool in tools]
    return {str(tool["name"]) for tool in described if isinstance(tool, dict) and tool.get("name")}


def _mark(value: Any, values: list[str], *, keys: bool = False) -> Any:
    """A value with a mark for every text that is said in it (in arguments of a call names too); the texts join `values`."""
    if isinstance(value, str):
        values.append(value)
        return MARK.format(len(values) - 1)
    if isinstance(value, dict):
        return {
            (_mark(name, values) if keys else name): inner
            if name in _UNSAID and not keys
            else _mark(inner, values, keys=keys or name == "arguments")
            for name, inner in value.items()
        }
    return [_mark(inner, values, keys=keys) for inner in value] if isinstance(value, list | tuple) else value


def _fits(tail: str, pieces: Sequence[str]) -> bool:
    """Whether a text is these pieces one after the other, blanks between them apart; texts may be written as JSON."""
    at = 0
    for piece in pieces:
        start = len(tail) - len(tail[at:].lstrip())
        form = next((form for form in _forms(piece) if tail.startswith(form.strip(), start)), None)
        if form is None:
            return False
        at = start + len(form.strip())
    return not tail[at:].strip()


def _forms(text: str) -> Iterator[str]:
    """A text as a template may write it: as it is, inside JSON, or as Python writes it."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]


def _end_of(tail: str) -> str:
    """Both ends of a text, for a message."""
    return repr(tail if len(tail) <= 90 else f"{tail[:40]} ... {tail[-40:]}")


def _forged(forged: str) -> RowError:
    return RowError(
        f"it contains the text of the special token {forged}, which would be read as the token; "
        "if that is meant, set tokens.special_text=allow",
        "special_text",
    )
