"""Which language a text is in, where there is enough of it to be sure.

In: text. Out: a code such as "en", or "". Next: sets.py.
"""

from collections.abc import Callable

# words and probability from which a language is sure; letters that are looked at
_WORDS, _SURE, _LETTERS = 6, 0.95, 500


def identifier() -> Callable[[str], str]:
    """Text -> the code of its language, "" where that is not sure (few words, code, lists of names)."""
    import py3langid.langid as langid

    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)

    def language(text: str) -> str:
        if len(text.split()) < _WORDS:
            return ""
        found, sure = model.classify(text[:_LETTERS])
        return str(found) if sure >= _SURE else ""

    return language
