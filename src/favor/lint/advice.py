"""What each finding means for whoever trains on the data: a sentence, why it matters, what to do. docs/lint.md has the thresholds.

In: the kind of a finding. Out: Advice. Next: page.py.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Advice(NamedTuple):
    """A finding as a sentence, why it matters, and what to do where `--fix` does nothing about it."""

    title: str
    why: str
    remedy: str = ""


_PRIVACY = "A model can learn it by heart and say it to anybody."
_LEAK = "Held-out figures flatter a model that has seen the question in training."
_NOISE = "A wrong label teaches the opposite of what is wanted, and DPO has no way to see that."
_CHARACTERS = "The model would learn to write these characters."
_TOKENS = "What training would compute is not what the row says."

ADVICE: Mapping[str, Advice] = {
    "identical": Advice(
        "Both answers are the same text", "There is nothing to prefer: the pair costs time and teaches nothing."
    ),
    "empty": Advice(
        "An answer or a prompt is missing", "Half a comparison teaches nothing; training refuses such a row."
    ),
    "malformed": Advice("The row cannot be read", "Training refuses it, with the reason shown."),
    "encoding": Advice("Text was decoded wrongly", _CHARACTERS),
    "lost_characters": Advice("Letters were lost in an earlier conversion", _CHARACTERS),
    "invisible": Advice("Text holds invisible or control characters", _CHARACTERS),
    "entities": Advice("Text holds HTML entities such as &amp;", _CHARACTERS),
    "markup": Advice(
        "Text holds HTML tags",
        "Fine where it is meant, as in code; else the model learns to write tags.",
        "Strip the tags at the source if they are not meant.",
    ),
    "secret": Advice("Text holds what looks like a key", _PRIVACY),
    "personal": Advice("Text holds what looks like personal data", _PRIVACY),
    "echo": Advice("An answer begins by repeating the prompt", "The model would learn to repeat what it is asked."),
    "repeated_turn": Advice(
        "A turn of the conversation stands there twice",
        "It is mostly a fault of the export, and the model learns the repetition.",
    ),
    "blanks": Advice("An answer ends in blanks", "The model would learn to end so."),
    "stub": Advice(
        "An answer is a single word",
        "Often an export that broke off; fine where one word is an answer.",
        "Look at the rows below.",
    ),
    "calls": Advice(
        "A preferred answer calls what no tool takes",
        "The model learns to call so.",
        "Write the call as the tool's schema says, or take the row out.",
    ),
    "refusal": Advice(
        "The preferred answer refuses, the other does not",
        "Many such rows teach the model to refuse.",
        "Keep them if refusing was right.",
    ),
    "contradiction": Advice(
        "Two rows say the opposite of each other", "They cancel out, and nobody can tell which is right."
    ),
    "contradicted": Advice(
        "A row is contradicted by a later one", "They cancel out, and nobody can tell which is right."
    ),
    "duplicate": Advice("A row repeats an earlier one", "It counts twice in training."),
    "leak": Advice(
        "A held-out prompt is also a training prompt",
        _LEAK,
        "Take these rows out of one of the two files, or let favor split: data.hold_out.share=0.1 keeps prompts apart.",
    ),
    "near_duplicate": Advice(
        "A row nearly repeats another",
        "It counts nearly twice; in data made from templates that may be meant (lint.near=0 turns this off).",
    ),
    "near_leak": Advice(
        "A held-out prompt is nearly a training prompt", _LEAK, "Take these rows out of one of the two files."
    ),
    "language": Advice("An answer is in another language than most", "The model may answer in the wrong language."),
    "special_text": Advice(
        "Text spells out a special token of the tokenizer", "It could end a turn or begin one: training refuses it."
    ),
    "round_trip": Advice("Text does not survive the chat template and the tokenizer", _TOKENS),
    "equal_ids": Advice("Two different answers become the same tokens", "There is nothing to prefer between them."),
    "doubled_special": Advice("A special token stands there twice", _TOKENS),
    "truncation": Advice(
        "Rows are longer than tokens.max_tokens",
        "What is cut is not learnt, and an answer without its end teaches not to end.",
        "Raise tokens.max_tokens if memory allows.",
    ),
    "missing_end": Advice(
        "The chat template ends no turn",
        "A model that never sees an end never stops; favor adds the tokenizer's end token.",
    ),
    "trimmed": Advice("The chat template takes blanks around answers away", "Harmless where the blanks mean nothing."),
    "tools": Advice(
        "The chat template leaves out the tools of a row",
        "The model would not see what it may call.",
        "Use a template that renders tools (tokens.template).",
    ),
    "variables": Advice(
        "The chat template does not read a row's chat_template_kwargs",
        "What they ask for does not happen.",
        "Correct the name, or use a template that has it.",
    ),
    "label_noise": Advice(
        "A label is strongly doubted", _NOISE, "Read the rows below, and turn round or remove those that are wrong."
    ),
    "agreement": Advice(
        "How many labels a reward or a model agrees with",
        _NOISE,
        "Far under 50 % means that chosen and rejected are exchanged.",
    ),
    "length": Advice(
        "How often the preferred answer is the longer one",
        "Where length tells the label, a model learns to write long rather than well.",
        "Add pairs where the shorter answer is preferred; watch the length figure of favor eval.",
    ),
    "position": Advice(
        "How often the first answer is preferred",
        "Where the place decides, the label is about the place.",
        "Check what the verdict's column means (verdict.values).",
    ),
    "opening": Advice(
        "Many answers begin alike",
        "The model may learn the opening and nothing else.",
        "Vary the openings, or take some of these rows out.",
    ),
    "unread_column": Advice(
        "Columns are not read",
        "Harmless, unless one of them was meant to count.",
        "Give it favor's name with columns={...} if it was.",
    ),
    "read": Advice("What was read", ""),
    "tokenizer": Advice(
        "The tokenizer was not tried", "Faults that only a tokenizer shows were not looked for.", "Give model.path."
    ),
    "fix": Advice("What was cleaned", ""),
    "tokens": Advice(
        "Nothing is left after tokenising",
        "There would be nothing to train on.",
        "See the reason; mostly tokens.max_tokens is too small.",
    ),
}
