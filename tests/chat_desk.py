"""What the tests of `favor chat` and `favor watch` share: a run of tiny models."""

import tiny


def a_run(folder, family="llama", template=tiny.CHATML):
    """A finished run whose two models differ much: base/ before, run/model after; beta 0.3."""
    tiny.save(folder / "base", family, template)
    tiny.model(family, seed=1).save_pretrained(folder / "run/model")
    tiny.tokenizer(template).save_pretrained(folder / "run/model")
    loss = '[loss]\nkind = "dpo"\nbeta = 0.3\n'
    (folder / "run/config.toml").write_text(f'run = "run"\n[model]\npath = "{folder / "base"}"\n{loss}')
    return folder / "run"
