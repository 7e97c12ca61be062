"""A template that is rendered once and filled in says what it says when it is rendered for every row, or it is not filled in."""

import random

import pytest
import tiny
from test_render import REASONING, STRIPPING, TRIMMING

from favor.data import shapes
from favor.data.formats import RowError
from favor.data.render import Renderer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN25 = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}"
    "{%- endif %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- else %}{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}{%- endif %}{%- for message in messages %}"
    '{%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" '
    "and not message.tool_calls) %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == \"assistant\" %}{{- '<|im_start|>' + message.role }}{%- if message.content %}"
    "{{- '\n' + message.content }}{%- endif %}{%- for tool_call in message.tool_calls %}{%- if tool_call.function is defined %}"
    "{%- set tool_call = tool_call.function %}{%- endif %}{{- tool_call.name }}{{- tool_call.arguments | tojson }}{%- endfor %}"
    '{%- elif message.role == "tool" %}{%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}'
    "{{- '<|im_start|>user' }}{%- endif %}{{- '\n<tool_response>\n' }}{{- message.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
ASKING = (
    "{% for m in messages %}[{{ m.role ~ ':' }}{% if not m.content %}nothing{% endif %}{{ m.content }}]{% endfor %}"
)
ONLY_WRITTEN = {
    "chatml": tiny.CHATML,
    "smollm2": SMOLLM2,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "qwen2.5": QWEN25,
    "asking": ASKING,
    "trimming": TRIMMING,
}


def turns(inside, before="", of="messages"):
    return f"{before}{{% for m in {of} %}}{inside}{{% endfor %}}{{% if add_generation_prompt %}}>{{% endif %}}"


# what a text can do to a template besides being written; two texts that tell
USED = {
    "asked for a word": (turns("{{ m.role }}{% if 'x' in m.content %}!{% endif %}{{ m.content }}"), "a", "x"),
    "counted": (turns("{{ m.content | length }}{{ m.content }}"), "a", "xx"),
    "changed": (turns("{{ m.content | upper }}{{ m.content }}"), "a", "b"),
    "cut": (turns("{{ m.content[:2] }}"), "abc", "xyz"),
    "split": (STRIPPING, "a", "b</think>c"),
    "trimmed and not": (turns("{{ m.content | trim }}{{ m.content }}"), "a", " b "),
    "trimmed at one place": (turns("{{ m.content | trim('a') }}"), "b", "ab"),
    "trimmed behind a word": (turns("{{ (m.content + '.') | trim }}"), "a", " b"),
    "taken aside": (turns("{% set c = m.content %}{{ c | upper }}{{ m.content }}"), "a", "b"),
    "kept": (
        turns("{% set ns.c = m %}{{ m.content }}", "{% set ns = namespace(c='') %}") + "{{ ns.c.content | upper }}",
        "a",
        "b",
    ),
    "of the turn before": (turns("{{ '' if loop.first else loop.previtem.content | upper }}{{ m.content }}"), "a", "b"),
    "of the turns again": (
        turns("{{ m.content }}", "{% set all = messages %}") + "{{ all[0].content | upper }}",
        "a",
        "b",
    ),
    "of other turns": (turns("{{ m.content | upper }}{{ messages[0].content }}", of="messages[1:]"), "a", "b"),
    "all at once": (turns("{{ m.content }}") + "{{ messages | tojson | length }}", "a", "bb"),
    "in a block": (turns("{{ m.content }}{% filter upper %}{{ m.content }}{% endfilter %}"), "a", "b"),
    "in a macro": (
        turns("{{ say(m.content) }}{{ m.content }}", "{% macro say(c) %}{{ c | upper }}{% endmacro %}"),
        "a",
        "b",
    ),
    "set aside in a block": (turns("{% set c %}{{ m.content }}{% endset %}{{ c | upper }}"), "a", "b"),
    "multiplied": (turns("{{ m.content * 2 }}{{ m.content | length }}{{ m.content }}"), "a", "bb"),
    "one of two": (turns("{{ m.content or 'nothing' }}{{ m.content if m.content > 'm' else '' }}"), "a", "z"),
    "looked up": (turns("{{ {'a': 1}[m.content] }}{{ m.content }}"), "a", "b"),
    "refused": (turns("{% if m.content == 'b' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"), "a", "b"),
    "said in a refusal": (turns("{{ raise_exception(m.content) }}{{ m.content }}"), "a", "b"),
    "of every field": (turns("{% for k in m %}{{ m[k] | upper }}{% endfor %}{{ m.content }}"), "a", "b"),
    "by a method": (turns("{{ m.get('content') | upper }}{{ m.content }}"), "a", "b"),
    "reasoning": (REASONING, "a", "<think>b</think>c"),
}
# what is another text every time
CHANCE = {
    "clock": turns("{{ strftime_now('%f') }}{{ m.content }}"),
    "chance": turns("{{ [1, 2, 3, 4] | random }}{{ m.content }}"),
}
TEXTS = [
    "",
    " ",
    "a",
    " a\n",
    "zq0favorqz",
    "{{ m.role }}",
    "<|im_end|>",
    "é\u2028",
    "</think>",
    "x" * 50,
    "\\",
    "{% raw %}",
]


def rendered(how, messages, generation):
    try:
        return Renderer(tiny.tokenizer(how), True, True)._apply(messages, {}, generation=generation)
    except RowError as error:
        return str(error)


def plainly(monkeypatch, *asked):
    with monkeypatch.context() as without:
        without.setattr(shapes, "only_written", lambda _: None)
        return rendered(*asked)


@pytest.mark.parametrize("name", ONLY_WRITTEN)
def test_filled_in_is_rendered(name, monkeypatch):
    how, rng = ONLY_WRITTEN[name], random.Random(0)
    assert shapes.only_written(how) == {name in ("gemma", "trimming")}
    filling = Renderer(tiny.tokenizer(how), True, True)
    with monkeypatch.context() as without:
        without.setattr(shapes, "only_written", lambda _: None)
        plain = Renderer(tiny.tokenizer(how), True, True)
        assert not plain._shapes._proven
    for _ in range(400):
        roles = rng.choice(
            [["user"], ["user", "assistant"], ["system", "user"], ["user", "assistant", "user", "assistant"], ["tool"]]
        )
        messages = [{"role": role, "content": rng.choice(TEXTS)} for role in roles]
        if rng.random() < 0.1:
            messages[0] |= {"name": "zq1favorqz"}
        generation = rng.random() < 0.5
        assert _said(filling, messages, generation) == _said(plain, messages, generation)


def _said(renderer, messages, generation):
    try:
        return renderer._apply(messages, {}, generation=generation)
    except RowError as error:
        return str(error)


def test_a_template_is_rendered_twice_for_many_rows():
    calls = []
    filling = shapes.Shapes(
        SMOLLM2, lambda turns, _: calls.append(turns) or "".join(f"[{t['content']}]" for t in turns)
    )
    for i in range(50):
        turns = [{"role": "user", "content": f"hi {i}"}]
        assert filling.fill(turns, generation=True) == f"[hi {i}]"
    assert len(calls) == 2
    # another order of roles, an empty text, another end
    filling.fill([*turns, *turns], generation=True)
    filling.fill([{"role": "user", "content": ""}], generation=True)
    filling.fill(turns, generation=False)
    assert len(calls) == 8


@pytest.mark.parametrize("name", USED)
def test_a_template_in_which_texts_do_more_is_not_filled_in(name, monkeypatch):
    how, first, second = USED[name]
    assert shapes.only_written(how) is None
    asked = [
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}], False) for text in (first, second)
    ]
    assert [rendered(how, *one) for one in asked] == [plainly(monkeypatch, how, *one) for one in asked]


@pytest.mark.parametrize("name", CHANCE)
def test_a_template_with_a_clock_or_chance_is_not_filled_in(name):
    assert shapes.only_written(CHANCE[name]) is None


def test_a_shape_that_the_first_turns_contradict_is_not_used():
    """As when a role looks like the mark of a text."""
    odd = [{"role": "zq0favorqz", "content": "a"}]
    assert rendered(tiny.CHATML, odd, False) == "<|im_start|>zq0favorqz\na<|im_end|>\n"
