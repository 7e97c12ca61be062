"""Chat templates that do no more with the texts of turns than write them: rendered once for each order of roles, then filled in.

In: a template's source, turns. Out: the text that the template makes of them, or None where its source does not prove that
the texts are only written: then it must be rendered for every row. Next: render.py.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from jinja2 import Environment, TemplateError, nodes

from favor.data.types import Message

# stands for a text while a template is looked at
MARK = "zq{}favorqz"
MARKED = re.compile(r"zq(\d+)favorqz")
# orders of roles that are remembered
_MOST = 2048
# what a template may be made of; in particular no macro, block, slice or text taken aside, through which a turn could go
_KNOWN = (
    *(nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.Name, nodes.NSRef, nodes.Const),
    *(nodes.Getitem, nodes.Getattr, nodes.Add, nodes.Sub, nodes.Mod, nodes.Concat, nodes.Compare, nodes.Operand),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword),
    *(nodes.Tuple, nodes.List, nodes.Break, nodes.Continue),
)
# these make the same of the same: no clock, no chance
_CALLS = {"raise_exception", "namespace"}
_FILTERS = {"trim", "length", "count", "upper", "lower", "capitalize", "title", "default", "string", "tojson"}
_COUNTS = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}


def only_written(template: str) -> set[bool] | None:
    """How a template writes the `content` of turns: {True} without the blanks around it, {False} as it is; None: not proven.

    Proven is that the content of a turn is written, or asked whether it is empty, and that turns go nowhere else: what the
    template writes around contents then hangs on the roles, and on which contents are empty. It holds for turns that have
    no other field.
    """
    if MARKED.search(template):
        return None
    try:
        return _how(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))
    except (TemplateError, RecursionError):
        return None


def _how(tree: nodes.Template) -> set[bool] | None:
    loops = [loop for loop in tree.find_all(nodes.For) if _is_name(loop.iter, "messages")]
    turns = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
    written = [(node, trimmed) for node, trimmed in _written(tree) if _field(node, turns) == "content"]
    tested = [node for node in _tested(tree) if _field(node, turns) == "content"]
    fields = tree.find_all((nodes.Getitem, nodes.Getattr))
    # a field that no turn has is undefined; what every dict has is none
    others = [node for node in fields if _field(node, turns) not in (None, "content", *dir(dict))]
    allowed = {id(_whose(node)) for node in (*(node for node, _ in written), *tested, *others)}
    allowed |= {id(part) for loop in loops for part in (loop.iter, loop.target)}
    allowed |= {id(node.node) for node in tree.find_all(nodes.Filter) if node.name in ("length", "count")}
    counts = {id(node.node) for node in tree.find_all(nodes.Getattr) if node.attr in _COUNTS}
    allowed |= {id(node) for node in tree.find_all(nodes.Name) if node.name == "loop" and id(node) in counts}
    held = turns | {"messages", "loop"}
    how = {trimmed for _, trimmed in written}
    return how if len(how) == 1 and all(_harmless(node, held, allowed) for node in tree.find_all(nodes.Node)) else None


def _harmless(node: nodes.Node, held: set[str], allowed: set[int]) -> bool:
    """Whether a part of a template cannot take a turn anywhere, and makes the same of the same."""
    if isinstance(node, nodes.Name) and node.name in held:
        return id(node) in allowed
    if isinstance(node, nodes.Call):
        return isinstance(node.node, nodes.Name) and node.node.name in _CALLS
    if isinstance(node, nodes.Filter):
        return node.name in _FILTERS
    return isinstance(node, _KNOWN)


def _written(tree: nodes.Template) -> Iterator[tuple[nodes.Node, bool]]:
    """What is written, alone or joined to other texts, and whether the blanks around it are taken off first."""
    waiting = [node for output in tree.find_all(nodes.Output) for node in output.nodes]
    while waiting:
        node: nodes.Node | None = waiting.pop()
        if isinstance(node, nodes.Add):
            waiting += [node.left, node.right]
        elif isinstance(node, nodes.Concat):
            waiting += node.nodes
        elif isinstance(node, nodes.Filter) and node.name == "trim" and node.node and not (node.args or node.kwargs):
            yield node.node, True
        else:
            yield node, False


def _tested(tree: nodes.Template) -> Iterator[nodes.Node]:
    """What is asked whether it is empty."""
    waiting = [node.test for node in tree.find_all((nodes.If, nodes.CondExpr))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, nodes.And | nodes.Or):
            waiting += [node.left, node.right]
        elif isinstance(node, nodes.Not):
            waiting.append(node.node)
        else:
            yield node


def _field(node: nodes.Node, turns: set[str]) -> str | None:
    """The name of the field of a turn that is read here; None when it is something else."""
    if not isinstance(node, nodes.Getitem | nodes.Getattr):
        return None
    whose = node.node
    one = isinstance(whose, nodes.Getitem) and _is_name(whose.node, "messages")
    if not one and not (isinstance(whose, nodes.Name) and whose.name in turns):
        return None
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) else None


def _whose(node: nodes.Node) -> nodes.Node:
    """The name behind a field: of a turn, or `messages`."""
    while isinstance(node, nodes.Getitem | nodes.Getattr):
        node = node.node
    return node


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


class Shapes:
    """What a template writes around the texts of turns, by the order of roles.

    `render` is the template itself: every shape is compared with what it makes of the first turns that come in it.
    """

    def __init__(self, template: object, render: Callable[[list[Message], bool], str]) -> None:
        how = only_written(template) if isinstance(template, str) else None
        self._render, self._proven, self._trims = render, how is not None, how == {True}
        self._known: dict[tuple[bool, tuple[tuple[str, bool], ...]], list[str | int] | None] = {}

    def fill(self, turns: list[Message], *, generation: bool) -> str | None:
        """The text of turns that have a role and a content and nothing else; None when they must be rendered."""
        if not self._proven or not all(map(_is_plain, turns)):
            return None
        key = generation, tuple([(turn["role"], bool(turn["content"])) for turn in turns])
        if key not in self._known:
            if len(self._known) >= _MOST:
                return None
            self._known[key] = self._shape(turns, generation)
        shape = self._known[key]
        return None if shape is None else self._filled(shape, turns)

    def _shape(self, turns: list[Message], generation: bool) -> list[str | int] | None:
        marked = [{**turn, "content": turn["content"] and MARK.format(i)} for i, turn in enumerate(turns)]
        pieces = MARKED.split(self._render(marked, generation))
        shape = [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]
        return shape if self._filled(shape, turns) == self._render(turns, generation) else None

    def _filled(self, shape: Sequence[str | int], turns: list[Message]) -> str:
        texts = [turn["content"].strip() if self._trims else turn["content"] for turn in turns]
        return "".join([texts[piece] if isinstance(piece, int) else piece for piece in shape])


def _is_plain(turn: Message) -> bool:
    return len(turn) == 2 and type(turn.get("role")) is str and type(turn.get("content")) is str
