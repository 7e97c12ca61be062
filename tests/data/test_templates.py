"""Chat templates as a package ships them: what of today's data is exact in each, and what is refused."""

import copy
import json
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from test_trajectories import check_exact, ids

from favor.data.types import as_read
from favor.errors import DataError

USER = {"role": "user", "content": "What is 2 and 2?"}
FOUND = {"role": "tool", "content": "it is 4", "name": "add", "tool_call_id": "addcall00"}
ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "one"}, "b": {"type": "string", "description": "two"}},
        "required": ["a"],
    },
}
TOOLS = ({"type": "function", "function": ADD}, {"type": "function", "function": {**ADD, "name": "multiply"}})
TWO, THREE = {"a": 2, "b": "two"}, {"a": 3, "b": "three"}


class Case(NamedTuple):
    """A row: its prompt, what may follow, and whether tools are described."""

    prompt: tuple
    sides: tuple
    tools: bool = False


def say(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(*calls, **more):
    """A turn that calls one tool after the other, (name, arguments) each."""
    made = [
        {"type": "function", "id": f"{name[:3]}call{i:02}", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return say("", tool_calls=made, **more)


def found(name, text, i=0):
    """What a tool answers to the i-th call of a turn."""
    return {**FOUND, "name": name, "content": text, "tool_call_id": f"{name[:3]}call{i:02}"}


CASES = {
    "one turn": Case((USER,), ((say("4"),),)),
    "thought in the text": Case((USER,), ((say("<think>\nhm\n</think>\n\n4"),),)),
    "thought": Case((USER,), ((say("4", reasoning_content="hm"),),)),
    "after a thought": Case((USER, say("<think>\nhm\n</think>\n\n4"), USER), ((say("<think>\nso\n</think>\n\n5"),),)),
    "two turns": Case((USER,), ((say("4"), USER, say("5")),)),
    "two thoughts": Case((USER,), ((say("4", reasoning_content="hm"), USER, say("5", reasoning_content="so")),)),
    "a call": Case((USER,), ((call(("add", TWO)), FOUND, say("4")),), True),
    "a call as text": Case((USER,), ((call(("add", json.dumps(TWO))), FOUND, say("4")),), True),
    "a thoughtful call": Case(
        (USER,),
        ((call(("add", TWO), reasoning_content="hm"), FOUND, say("4", reasoning_content="so")),),
        True,
    ),
    # both at once, and both answered
    "two calls": Case(
        (USER,),
        ((call(("add", TWO), ("multiply", THREE)), FOUND, found("multiply", "it is 9", 1), say("4 and 9")),),
        True,
    ),
    "one tool twice": Case(
        (USER,),
        (
            (
                call(("add", json.dumps(TWO)), ("add", json.dumps(THREE))),
                FOUND,
                found("add", "it is 6", 1),
                say("4 and 6"),
            ),
        ),
        True,
    ),
    # an agent's next step: it calls another tool, or answers
    "a step": Case(
        (USER, call(("add", json.dumps(TWO))), FOUND), ((call(("multiply", json.dumps(THREE))),), (say("4"),)), True
    ),
    "a thoughtful step": Case(
        (USER, call(("add", TWO), reasoning_content="hm"), FOUND),
        ((call(("multiply", THREE), reasoning_content="so"),), (say("4", reasoning_content="ah"),)),
        True,
    ),
}
TEXT = {"one turn", "thought in the text", "after a thought", "two turns"}
CALLS = {"a call", "a call as text", "a step"}
BOTH = {"two calls", "one tool twice"}
THOUGHTS = {"thought", "a thoughtful call", "a thoughtful step"}
OPENED = {"thought in the text", "thought", "after a thought"}
# what is exact by each template; all else is refused
EXACT = {
    "qwen2_5": TEXT | CALLS | BOTH,
    "qwen3": TEXT | CALLS | BOTH | THOUGHTS,
    "qwen3_instruct_2507": TEXT | CALLS | BOTH,
    # its prompt opens <think>, so an answer without any begins by closing it; what was thought before the last question is gone
    "qwen3_6": TEXT - {"two turns"} | CALLS | BOTH | THOUGHTS,
    # its prompt opens <think>, and none of it is written afterwards
    "deepseek_r1_distill": OPENED,
    "glm4moe": TEXT | CALLS | BOTH | THOUGHTS,
    # an answer ends with <|return|> and stands as one that ends with <|end|> before the next question; reasoning is a channel
    # of its own, and that before a call is gone once an answer follows; of several calls it writes the first
    "gptoss": CALLS | OPENED | {"one turn"},
    "llama3": TEXT,
    # one call a turn, as it says itself
    "llama3_1": TEXT | CALLS,
    "llama3_2": TEXT | CALLS,
    "gemma": TEXT,
    "gemma3": TEXT,
    "phi3": TEXT,
}
# of the source package of llama-cpp-python: `make templates` gets it and sets FAVOR_TEMPLATES to where they lie
ELSEWHERE = {
    # as Qwen ships it; TRL's is a little changed
    "Qwen-Qwen3-0.6B": EXACT["qwen3"],
    # writes no tools' calls, and reasoning only as part of the text
    "HuggingFaceTB-SmolLM3-3B": TEXT,
    "mistralai-Mistral-Nemo-Instruct-2407": TEXT | CALLS | BOTH,
    "Mistral-Small-3.2-24B-Instruct-2506": TEXT | CALLS | BOTH,
    # it writes reasoning as a part of the content, of type "thinking", which is not read
    "mistralai-Ministral-3-14B-Reasoning-2512": TEXT | CALLS | BOTH,
    "unsloth-mistral-Devstral-Small-2507": TEXT | CALLS | BOTH,
    "google-gemma-2-2b-it": TEXT,
    # these two end the model's reasoning in every prompt that does not say enable_thinking, and never write it so afterwards
    "Qwen-QwQ-32B": set(),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": set(),
    "meta-llama-Llama-3.3-70B-Instruct": TEXT | CALLS,
    "GLM-4.6": EXACT["glm4moe"],
    "Qwen3-Coder": TEXT | CALLS | BOTH,
}
# those that read enable_thinking: what is exact where a row says true, and where it says false
SWITCHED = {
    # an empty <think></think> stands in the prompt, and not before earlier answers
    "qwen3": (EXACT["qwen3"], {"one turn", "a step"}),
    "qwen3_6": (EXACT["qwen3_6"], CALLS | BOTH | {"one turn"}),
    "glm4moe": (EXACT["glm4moe"], CALLS | BOTH | {"one turn", "two turns"}),
}
SWITCHED_ELSEWHERE = {
    "Qwen-Qwen3-0.6B": SWITCHED["qwen3"],
    "HuggingFaceTB-SmolLM3-3B": (TEXT, TEXT),
    # it writes <think> of the last answer's text although the prompt has opened it, and never reasoning_content
    "Qwen-QwQ-32B": ({"thought", "a thoughtful step"}, set()),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": (OPENED, set()),
    "GLM-4.6": SWITCHED["glm4moe"],
}
# a refusal says what to do
WAYS_OUT = (
    "use a(nother)? template|make a row of every turn|give it as reasoning_content|set enable_thinking=true|"
    "change the row as it says"
)
# how each ends a turn of the model's
ENDS = {
    "istral": "</s>",
    "deepseek": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "gptoss": "<|return|> <|call|>",
    "llama": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi": "<|end|> <|im_end|>",
    "glm": "<|user|> <|observation|> <|im_end|>",
}


def shipped(name):
    if name in ELSEWHERE:
        return Path(os.environ["FAVOR_TEMPLATES"], f"{name}.jinja").read_text("utf-8")
    found = find_spec("trl")
    assert found is not None, "the extra bench brings TRL, whose package holds templates"
    return Path(found.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text("utf-8")


@cache
def tokenizer_of(name):
    """The tiny tokenizer with the control tokens of a template; and the ids that end a turn."""
    template = shipped(name)
    made = tiny.tokenizer(template)
    ends = next((ends for key, ends in ENDS.items() if key in name.lower()), "<|im_end|>").split()
    written = re.findall(
        r"<[|\uff5c][^<>{}'\"\s]{1,30}[|\uff5c]>|</?(?:start_of_turn|end_of_turn)>|\[gMASK\]|<sop>|\[/?[A-Z_]{3,20}\]",
        template,
    )
    if "</s>" in ends:
        made.add_special_tokens({"eos_token": "</s>"})
    made.add_special_tokens({"additional_special_tokens": sorted({*written, *ends})})
    return made, frozenset(made.convert_tokens_to_ids(ends))


NEEDS_MORE = pytest.mark.skipif("FAVOR_TEMPLATES" not in os.environ, reason="make templates gets the templates")


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_exact_or_refused(name, case):
    check(name, case, EXACT[name])


@NEEDS_MORE
@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("case", CASES)
def test_others_exact_or_refused(name, case):
    check(name, case, ELSEWHERE[name])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", SWITCHED)
@pytest.mark.parametrize("case", CASES)
def test_exact_or_refused_with_thinking_on_and_off(name, case, thinking):
    check(name, case, SWITCHED[name][not thinking], enable_thinking=thinking)


@NEEDS_MORE
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", SWITCHED_ELSEWHERE)
@pytest.mark.parametrize("case", CASES)
def test_others_with_thinking_on_and_off(name, case, thinking):
    check(name, case, SWITCHED_ELSEWHERE[name][not thinking], enable_thinking=thinking)


@pytest.mark.parametrize(
    ("names", "switched"), [(EXACT, SWITCHED), pytest.param(ELSEWHERE, SWITCHED_ELSEWHERE, marks=NEEDS_MORE)]
)
def test_every_template_with_the_switch_is_tried_with_it(names, switched):
    assert {name for name in names if "enable_thinking" in shipped(name)} == set(switched)


@pytest.mark.parametrize("name", SWITCHED)
def test_reasoning_behind_a_prompt_that_ended_it_is_refused_with_the_way_out(name):
    """And that way out is one: the same row with the variable as the message says is exact."""
    with pytest.raises(DataError, match="row 4: the prompt ends the model's reasoning .* set enable_thinking=true"):
        rendered(name, "thought", enable_thinking=False)
    check(name, "thought", {"thought"}, enable_thinking=True)


def rendered(name, case, **variables):
    """The tree of ids that favor makes of a row."""
    tokenizer, ends = tokenizer_of(name)
    prompt, sides, tools = CASES[case]
    told = {"tools": TOOLS if tools else None, "variables": variables or None}
    (tree,), _ = ids(prompt, *sides, tokenizer=tokenizer, end_ids=ends, max_tokens=65536, **told)
    return tree


def check(name, case, exact, **variables):
    """Exact, or refused with a way out."""
    if case not in exact:
        with pytest.raises(DataError, match=f"row 4: .*({WAYS_OUT})"):
            rendered(name, case, **variables)
        return
    tree = rendered(name, case, **variables)
    tokenizer, ends = tokenizer_of(name)
    prompt, sides, tools = CASES[case]
    if tools:
        variables["tools"] = list(TOOLS)
    for i, side in enumerate(sides):
        check_exact(tree, tokenizer, plain(prompt), plain(side), i, end_ids=ends, **variables)
        spoken = tokenizer.decode([token for token in tree.response_ids[i] if token >= 0])
        assert all(text in spoken for turn in side if turn["role"] == "assistant" for text in told(turn))
        assert "it is" not in spoken


def told(turn):
    """What the model says in a turn: its words, its reasoning, the names and texts of its calls."""
    yield from turn["content"].removeprefix("<think>\n").split("\n</think>\n\n")
    yield turn.get("reasoning_content", "")
    for call in (call["function"] for call in plain([turn])[0].get("tool_calls", [])):
        yield from (call["name"], str(call["arguments"]["a"]), call["arguments"]["b"])


def plain(turns):
    """Turns as templates want them that write arguments as JSON themselves."""
    turns = copy.deepcopy(list(turns))
    for function in (call["function"] for turn in turns for call in turn.get("tool_calls", [])):
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
    return turns


@pytest.mark.parametrize("case", ["a call", "two calls", "a step"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_instruct_2507", "glm4moe"])
def test_the_last_turn_is_all_that_the_template_writes(name, case):
    """By a template that shows the model all it said, the ids are those of the whole conversation as it renders it."""
    tree, (tokenizer, ends) = rendered(name, case), tokenizer_of(name)
    prompt, sides, _ = CASES[case]
    for response, side in zip(tree.response_ids, sides, strict=True):
        turns = plain([*prompt, *side])
        text = tokenizer.apply_chat_template(turns, tools=list(TOOLS), tokenize=False)
        whole = tokenizer(text, add_special_tokens=False).input_ids
        path = tree.prompt_ids + as_read(response)
        assert list(path[: len(whole)]) == whole[: len(path)]
        assert path[-1] in ends
