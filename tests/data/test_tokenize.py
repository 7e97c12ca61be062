"""The boundary is exact, the end token is there once, and everything cut is counted."""

import re

import pytest
import tiny

from favor.data.tokenize import TokenReport, TokensConfig, prompt_encoder, tokenize
from favor.data.types import Comparison, PromptTree
from favor.errors import ConfigError, DataError
from favor.lint.cheap import of_split, truncation

END = frozenset({2})


def text_tree(prompt, *responses, order=(0, 1), row=1):
    return PromptTree(prompt, responses, (Comparison(order),), (row,), "rows.jsonl")


def chat(*turns):
    return tuple({"role": role, "content": content} for role, content in turns)


def one(tree, tokenizer=None, bad_rows="error", **settings):
    return tokenize([tree], tokenizer or tiny.tokenizer(), TokensConfig(**settings), END, bad_rows)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_boundary_and_end(template):
    tok = tiny.tokenizer()
    (tree,), report = one(text_tree("What is good?", " Paris", " bad\nlines"), tok, template=template)
    prompt = tok.decode(tree.prompt_ids)
    expected = (
        "<|im_start|>user\nWhat is good?<|im_end|>\n<|im_start|>assistant\n" if template == "chat" else "What is good?"
    )
    assert prompt == expected
    assert [tok.decode(r) for r in tree.response_ids] == [" Paris<|im_end|>", " bad\nlines<|im_end|>"]
    assert all(r[-1] == 2 and r.count(2) == 1 for r in tree.response_ids)
    assert tree.complete == (True, True)
    assert (report.appended_end, report.already_ended) == (0, 0)
    assert tree.prompt_ids == prompt_encoder(tok, TokensConfig(template=template))("What is good?")


def test_messages_as_plain_text():
    prompt = chat(("system", "Be kind."), ("user", "hi"), ("assistant", "yes"), ("user", "why"))
    tok = tiny.tokenizer()
    (tree,), _ = one(text_tree(prompt, chat(("assistant", "good")), chat(("assistant", "bad"))), tok, template="plain")
    assert tok.decode(tree.prompt_ids) == "Be kind.\n\nHuman: hi\n\nAssistant: yes\n\nHuman: why\n\nAssistant:"
    assert tok.decode(tree.response_ids[0]) == " good<|im_end|>"


def test_bos_stands_once():
    tok = tiny.tokenizer(bos=True)
    (tree,), _ = one(text_tree("hello", " yes", " no"), tok, template="plain")
    assert tree.prompt_ids[0] == 1
    assert (tree.prompt_ids + tree.response_ids[0]).count(1) == 1


def test_template_without_end_token_gets_one_and_says_so():
    tok = tiny.tokenizer(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (tree,), report = one(text_tree("hello", "yes", "no"), tok)
    assert [tok.decode(r) for r in tree.response_ids] == [" yes\n<|im_end|>", " no\n<|im_end|>"]
    assert report.appended_end == 2


def test_plain_end_is_not_doubled():
    tok = tiny.tokenizer()
    (tree,), report = one(text_tree("hello", " yes<|im_end|>", " no"), tok, template="plain")
    assert [tok.decode(r) for r in tree.response_ids] == [" yes<|im_end|>", " no<|im_end|>"]
    assert report.already_ended == 1


@pytest.mark.parametrize("where", ["prompt", "response"])
def test_forged_special_token_is_refused(where):
    tree = (
        text_tree("a <|im_start|> b", "yes", "no", row=7)
        if where == "prompt"
        else text_tree("a", "x<|im_end|>y", "no", row=7)
    )
    with pytest.raises(DataError, match=r"rows\.jsonl, row 7: it contains the text of the special token"):
        one(tree)


def test_template_that_renders_the_prompt_differently_is_refused():
    template = "{% for m in messages[-2:] %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    prompt = chat(("user", "one"), ("assistant", "two"), ("user", "three"))
    with pytest.raises(DataError, match="row 1: the chat template renders the prompt differently"):
        one(text_tree(prompt, "yes", "no"), tiny.tokenizer(template))


def test_token_across_the_boundary_is_refused():
    tok = tiny.tokenizer()
    assert len(tok("hello").input_ids) < len(tok("hell").input_ids) + len(tok("o").input_ids)
    tree = text_tree("hell", "o", "p", row=3)
    with pytest.raises(DataError, match="row 3: a token would straddle the boundary"):
        one(tree, tok, template="plain")
    with pytest.raises(DataError, match="nothing is left"):
        one(tree, tok, bad_rows="drop", template="plain")


def test_response_that_ends_with_another_is_refused():
    response = chat(("assistant", "a"), ("user", "b"))
    with pytest.raises(DataError, match="begin and end with a turn of the assistant"):
        one(text_tree(chat(("user", "x")), response, chat(("assistant", "d"))))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_empty_response_is_refused(template):
    with pytest.raises(DataError, match="row 1: its response has no tokens"):
        one(text_tree("hello", "", "no"), template=template)


def test_settings_that_cannot_work():
    tok = tiny.tokenizer(template=None)
    with pytest.raises(ConfigError, match="no chat template"):
        one(text_tree("a", " b", " c"), tok, template="chat")
    tok.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        one(text_tree("a", " b", " c"), tok, template="plain")


def lengths(tree):
    return len(tree.prompt_ids), [len(r) for r in tree.response_ids]


def test_truncation_drop_and_prompt_start():
    tok = tiny.tokenizer(bos=True)
    tree = text_tree("hello " * 8, " good good", " bad " + "worse " * 6)
    (whole,), _ = one(tree, tok, template="plain")
    prompt, responses = lengths(whole)
    limit = prompt + max(responses) - 5
    with pytest.raises(DataError, match="longer than tokens.max_tokens"):
        one(tree, tok, template="plain", max_tokens=limit)
    (cut,), report = one(tree, tok, template="plain", max_tokens=limit, truncation="prompt_start")
    assert cut.prompt_ids == whole.prompt_ids[:1] + whole.prompt_ids[6:]
    assert cut.response_ids == whole.response_ids
    assert cut.complete == (True, True)
    assert report.prompts_cut == 1


def test_truncation_response_end_is_symmetric_and_forges_no_end():
    tok = tiny.tokenizer()
    tree = PromptTree(
        "hello",
        (" good better good", " good better bad bad", " no"),
        (Comparison((0, 1)), Comparison((2, 0))),
        (4,),
        "rows.jsonl",
    )
    (whole,), _ = one(tree, tok, template="plain")
    same = next(i for i, (a, b) in enumerate(zip(*whole.response_ids[:2], strict=False)) if a != b)
    limit = max(8, len(whole.prompt_ids) + same)
    (cut,), report = one(tree, tok, template="plain", max_tokens=limit, truncation="response_end")
    room = limit - len(whole.prompt_ids)
    assert all(len(r) <= room for r in cut.response_ids)
    assert cut.response_ids[0] == whole.response_ids[0][:room]
    assert 2 not in cut.response_ids[0]
    assert cut.complete == (False, True)
    assert cut.response_ids[1] == whole.response_ids[2]
    assert cut.comparisons == (Comparison((1, 0)),)
    assert (report.responses_cut, report.responses_merged, report.comparisons_dropped) == (2, 1, 1)


def test_first_response_counts_on_over_dropped_trees():
    trees = [text_tree("a", "yes", "no"), text_tree("b " * 200, "yes", "no", row=2), text_tree("c", "yes", "no", row=3)]
    kept, report = tokenize(trees, tiny.tokenizer(), TokensConfig(max_tokens=64), END, "error")
    assert [(tree.row, tree.first_response) for tree in kept] == [(1, 0), (3, 2)]
    assert report.dropped == [(2, "longer than tokens.max_tokens = 64")]
    assert truncation(report)[0].severity == "warning"


def test_lint_finds_planted_faults():
    """The checks that training runs; 40 comparisons are enough to speak of a bias, and 30 of them favour the longer."""
    contradiction = PromptTree("p", ("a b", "c de"), (Comparison((0, 1)), Comparison((1, 0))), (9,), "f")
    longer = [text_tree(f"q{i}", "long answer here", "short one", row=i) for i in range(29)]
    shorter = [text_tree(f"r{i}", "short one", "long answer here", row=i) for i in range(8)]
    trees = [contradiction, *longer, *shorter, text_tree("s", "stub", "two words ", row=10)]
    found = {finding.kind: finding for finding in of_split(trees, TokenReport("plain"))}
    assert found["contradiction"].severity == "error"
    assert found["contradiction"].rows == (("f", 9),)
    assert found["length"].severity == "warning"
    assert re.search("in 75%", found["length"].message)
    assert found["stub"].rows == (("rows.jsonl", 10),)
    assert found["blanks"].rows == (("rows.jsonl", 10),)
    few = [text_tree("p", "a b", "cc dd"), text_tree("q", "aa bb", "c d")]
    assert [f.kind for f in of_split(few, TokenReport("plain"))] == ["length"]
