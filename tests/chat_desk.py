"""What the tests of `favor chat` and `favor watch` share: a run of tiny models, a command that serves a page."""

import subprocess
import sys
import threading
from contextlib import contextmanager

import tiny


def a_run(folder, family="llama", template=tiny.CHATML):
    """A finished run whose two models differ much: base/ before, run/model after; beta 0.3."""
    tiny.save(folder / "base", family, template)
    tiny.model(family, seed=1).save_pretrained(folder / "run/model")
    tiny.tokenizer(template).save_pretrained(folder / "run/model")
    loss = '[loss]\nkind = "dpo"\nbeta = 0.3\n'
    (folder / "run/config.toml").write_text(f'run = "run"\n[model]\npath = "{folder / "base"}"\n{loss}')
    return folder / "run"


@contextmanager
def serving(folder, *words):
    """A command in a process: (process, the address that it shows); killed at the end."""
    command = [sys.executable, "-m", "favor.cli", *map(str, words)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    try:
        address = next((line.strip() for line in process.stdout if line.startswith("http://")), None)
        assert address, process.stderr.read()
        yield process, address
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
