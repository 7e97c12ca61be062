"""Chat templates as a package ships them: what of today's data is exact in each, and what is refused."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from test_trajectories import check_exact, ids

from favor.data.types import as_read
from favor.errors import DataError

USER = {"role": "user", "content": "What is 2 and 2?"}
FOUND = {"role": "tool", "content": "it is 4", "name": "add", "tool_call_id": "abcdefghi"}
ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "one"}, "b": {"type": "string", "description": "two"}},
        "required": ["a"],
    },
}
TOOLS = ({"type": "function", "function": ADD},)


def say(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(arguments, **more):
    return say(
        "",
        tool_calls=[{"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": arguments}}],
        **more,
    )


# prompt, response, tools
CASES = {
    "one turn": ((USER,), (say("4"),), None),
    "thought in the text": ((USER,), (say("<think>\nhm\n</think>\n\n4"),), None),
    "thought": ((USER,), (say("4", reasoning_content="hm"),), None),
    "after a thought": ((USER, say("<think>\nhm\n</think>\n\n4"), USER), (say("<think>\nso\n</think>\n\n5"),), None),
    "two turns": ((USER,), (say("4"), USER, say("5")), None),
    "two thoughts": ((USER,), (say("4", reasoning_content="hm"), USER, say("5", reasoning_content="so")), None),
    "a call": ((USER,), (call({"a": 2, "b": "two"}), FOUND, say("4")), TOOLS),
    "a call as text": ((USER,), (call('{"a": 2, "b": "two"}'), FOUND, say("4")), TOOLS),
    "a thoughtful call": (
        (USER,),
        (call({"a": 2, "b": "two"}, reasoning_content="hm"), FOUND, say("4", reasoning_content="so")),
        TOOLS,
    ),
}
TEXT = {"one turn", "thought in the text", "after a thought", "two turns"}
CALLS = {"a call", "a call as text"}
# what is exact by each template; all else is refused
EXACT = {
    "qwen2_5": TEXT | CALLS,
    "qwen3": TEXT | CALLS | {"thought", "a thoughtful call"},
    "qwen3_instruct_2507": TEXT | CALLS,
    # its prompt opens <think>, so an answer without any begins by closing it; what was thought before the last question is gone
    "qwen3_6": CALLS | {"one turn", "thought in the text", "after a thought", "thought", "a thoughtful call"},
    # its prompt opens <think>, and none of it is written afterwards
    "deepseek_r1_distill": {"thought in the text", "after a thought", "thought"},
    "glm4moe": TEXT | CALLS | {"thought", "a thoughtful call"},
    # an answer ends with <|return|> and stands as one that ends with <|end|> before the next question; reasoning is a channel
    # of its own, and that before a call is gone once an answer follows
    "gptoss": CALLS | {"one turn", "thought in the text", "after a thought", "thought"},
    "llama3": TEXT,
    "llama3_1": TEXT | CALLS,
    "llama3_2": TEXT | CALLS,
    "gemma": TEXT,
    "gemma3": TEXT,
    "phi3": TEXT,
}
# of the source package of llama-cpp-python: `make templates` gets it and sets FAVOR_TEMPLATES to where they lie
ELSEWHERE = {
    # writes no tools' calls, and reasoning only as part of the text
    "HuggingFaceTB-SmolLM3-3B": TEXT,
    "mistralai-Mistral-Nemo-Instruct-2407": TEXT | CALLS,
    "Mistral-Small-3.2-24B-Instruct-2506": TEXT | CALLS,
    # it writes reasoning as a part of the content, of type "thinking", which is not read
    "mistralai-Ministral-3-14B-Reasoning-2512": TEXT | CALLS,
    "unsloth-mistral-Devstral-Small-2507": TEXT | CALLS,
    "google-gemma-2-2b-it": TEXT,
    # opens <think> for every prompt and cuts all reasoning afterwards, that of the last answer too
    "Qwen-QwQ-32B": set(),
    "meta-llama-Llama-3.3-70B-Instruct": TEXT | CALLS,
    "GLM-4.6": TEXT | CALLS | {"thought", "a thoughtful call"},
    "Qwen3-Coder": TEXT | CALLS,
}
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


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_exact_or_refused(name, case):
    check(name, case)


@pytest.mark.skipif("FAVOR_TEMPLATES" not in os.environ, reason="make templates gets the templates")
@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("case", CASES)
def test_others_exact_or_refused(name, case):
    check(name, case)


def check(name, case):
    tokenizer, ends = tokenizer_of(name)
    prompt, response, tools = CASES[case]
    variables = {"tools": list(tools)} if tools else {}
    if case not in {**EXACT, **ELSEWHERE}[name]:
        with pytest.raises(DataError, match="row 4: .*(template|reasoning)"):
            ids(prompt, response, tokenizer=tokenizer, tools=tools, end_ids=ends, max_tokens=65536)
        return
    (tree,), _ = ids(prompt, response, tokenizer=tokenizer, tools=tools, end_ids=ends, max_tokens=65536)
    plain = [with_object(turn) for turn in response]
    check_exact(tree, tokenizer, prompt, plain, end_ids=ends, **variables)
    spoken = tokenizer.decode([token for token in tree.response_ids[0] if token >= 0])
    for turn in response:
        if turn["role"] == "assistant":
            told = (turn["content"].removeprefix("<think>\n"), turn.get("reasoning_content", ""))
            assert all(part in spoken for text in told for part in text.split("\n</think>\n\n"))
    assert "it is 4" not in spoken


def with_object(turn):
    """The turn as templates want it that write arguments as JSON themselves."""
    if "tool_calls" not in turn:
        return turn
    return call({"a": 2, "b": "two"}, **{k: v for k, v in turn.items() if k == "reasoning_content"})


def test_the_last_turn_is_all_that_the_template_writes():
    """By a template that shows the model all it said, the ids are those of the whole conversation as it renders it."""
    for name in ("qwen3", "llama3_1", "glm4moe"):
        tokenizer, ends = tokenizer_of(name)
        prompt, response, tools = CASES["a call"]
        (tree,), _ = ids(prompt, response, tokenizer=tokenizer, tools=tools, end_ids=ends, max_tokens=65536)
        text = tokenizer.apply_chat_template([*prompt, *response], tools=list(tools), tokenize=False)
        whole = tokenizer(text, add_special_tokens=False).input_ids
        path = tree.prompt_ids + as_read(tree.response_ids[0])
        assert list(path[: len(whole)]) == whole[: len(path)]
        assert path[-1] in ends
