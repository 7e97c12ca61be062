"""`favor doctor`: every fault is planted, and is a line that says what to do; what is sound is said to be."""

import http.server
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import constants

from favor.doctor import caches, machine, software, speed, subject
from favor.doctor.settings import DoctorConfig, Sign, size
from favor.model import room
from favor.model.room import Room

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRES = [*PROJECT["dependencies"], *(f'{each}; extra == "{name}"' for name in EXTRAS for each in EXTRAS[name])]
PLENTY = Room(64 << 30, 32 << 30, "memory")


@pytest.fixture(autouse=True)
def _places(monkeypatch, tmp_path):
    """Caches of the test's own; the project's packages, whatever was installed when this environment was made."""
    monkeypatch.setattr(software, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(software, "metadata", lambda name: {"Requires-Python": PROJECT["requires-python"]})
    monkeypatch.setenv("FAVOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def by_topic(signs):
    return {sign.topic: sign for sign in signs}


def test_a_sound_machine(favor, tmp_path, monkeypatch):
    """Exit code 0, a line each, nothing sent anywhere, nothing written."""
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("it opened a connection"))
    monkeypatch.setattr(speed, "_SECONDS", 0.02)
    code, out, err = favor("doctor")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    *findings, done, following, last = lines
    assert all(re.match(r"(ok|note)   ? *[^:]+: \S", line) for line in findings), lines
    assert re.fullmatch(r"done in .+; \d+ ok, \d+ note, 0 broken", done)
    assert (following, last) == ("next: favor doctor model=MODEL", "      favor demo")
    assert f"favor: {version('favor')}, Python 3." in out
    for topic in (
        "packages",
        "imports",
        "CPU",
        "GPU",
        "threads",
        "float32",
        "precision",
        "memory",
        "speed",
        "disk of runs",
    ):
        assert re.search(rf"^(ok|note) +{topic}: ", out, re.MULTILINE), topic
    assert "hub: not asked, so nothing left this machine" in out
    assert "estimate" in next(line for line in lines if " speed: " in line)
    assert list(tmp_path.iterdir()) == []


def test_json_holds_every_finding(favor, monkeypatch):
    monkeypatch.setattr(speed, "_SECONDS", 0.02)
    code, out, _ = favor("doctor", "--json")
    assert code == 0
    told = json.loads(out)
    found = {one["topic"]: one for one in told["figures"]["findings"]}
    assert found["speed"]["figures"]["gflops"] > 0
    assert 0 < found["memory"]["figures"]["free"] <= found["memory"]["figures"]["total"]
    assert told["figures"]["counts"]["ok"] == sum(one["level"] == "ok" for one in found.values())


def broken_package(folder, name, line):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(line + "\n")


def in_a_process(tmp_path, *words, **more):
    """`favor doctor` with what is planted in tmp_path/planted before every package."""
    code = "import sys; sys.argv = ['favor', 'doctor', *sys.argv[1:]]; from favor.cli import main; main()"
    path = os.pathsep.join([str(tmp_path / "planted"), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        **more,
    )


def test_a_torch_that_cannot_be_loaded_leaves_the_rest(tmp_path):
    """And a disk that takes nothing: every write of the process fails."""
    broken_package(tmp_path / "planted", "torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    done = in_a_process(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    assert done.returncode == 1
    assert done.stderr == ""
    assert "broken imports: torch cannot be imported (OSError: libcudart.so.13" in done.stdout
    assert "--force-reinstall torch" in done.stdout
    for topic, todo in (("runs", "run="), ("favor's cache", "FAVOR_CACHE"), ("the hub's cache", "HF_HOME")):
        (line,) = (line for line in done.stdout.splitlines() if f"broken disk of {topic}: " in line)
        assert "cannot be written (File too large)" in line
        assert todo in line
    assert "ok     CPU: " in done.stdout or "note   CPU: " in done.stdout
    assert "speed" not in done.stdout
    assert "4 broken" in done.stdout


def test_a_disk_that_is_nearly_full(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for free, level in ((1 << 20, "broken"), (5 << 30, "note"), (90 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        for sign in machine.disks(tmp_path / "hub"):
            assert (sign.level, sign.figures["free"]) == (level, free)
            assert bool(sign.todo) == (level != "ok")


def without(monkeypatch, name, found=None):
    def planted(asked):
        if asked != name:
            return version(asked)
        if found is None:
            raise PackageNotFoundError(asked)
        return found

    monkeypatch.setattr(software, "version", planted)


def test_a_missing_extra_comes_with_its_pip_line(monkeypatch):
    without(monkeypatch, "starlette")
    sign = by_topic(software.software())["extra label"]
    assert sign.level == "note"
    assert "starlette>=1.10 (here: none)" in sign.said
    assert "favor chat" in sign.said
    assert sign.todo == "pip install 'favor[label]'"
    without(monkeypatch, "starlette", "0.9")
    assert "starlette>=1.10 (here: 0.9)" in by_topic(software.software())["extra label"].said


def test_a_missing_package_is_broken_a_wrong_version_is_told(monkeypatch, favor):
    without(monkeypatch, "peft")
    signs = by_topic(software.software())
    assert (signs["peft"].level, signs["packages"].level) == ("broken", "note")
    assert re.fullmatch(r"pip install 'peft>=[\d.]+'", signs["peft"].todo)
    without(monkeypatch, "transformers", "4.40.0")
    signs = by_topic(software.software())
    assert signs["transformers"].level == "note"
    assert "4.40.0 is installed, favor needs" in signs["transformers"].said
    assert "transformers 4.40.0" in signs["packages"].said
    monkeypatch.setattr(software, "imported", lambda: Sign("ok", "imports", ""))
    without(monkeypatch, "peft")
    monkeypatch.setattr(speed, "_SECONDS", 0.02)
    code, out, err = favor("doctor")
    assert (code, err) == (1, "")
    assert "1 broken" in out


def test_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(software, "metadata", lambda name: {"Requires-Python": ">=3.99"})
    sign = by_topic(software.software())["favor"]
    assert sign.level == "broken"
    assert "it needs Python >=3.99" in sign.said


def test_favor_without_its_package(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(software, "requires", missing)
    (sign,) = software.software()
    assert (sign.level, sign.todo) == ("note", "pip install . makes it a package")


def test_the_extras_are_those_of_the_project(monkeypatch):
    assert EXTRAS.keys() - {"dev", "bench", "docs", "serving"} == software.EXTRAS.keys()
    assert by_topic(software.software())["extra label"].level == "ok"
    # installed before there was such an extra
    monkeypatch.setattr(software, "requires", lambda name: PROJECT["dependencies"])
    assert by_topic(software.software())["extra label"].todo == "pip install favor anew"


def test_torch_that_computes_wrongly_is_broken(monkeypatch, favor):
    assert speed.computed() is None
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        return right(a, b) * (1.01 if a.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    code, out, err = favor("doctor")
    assert (code, err) == (1, "")
    assert "broken torch: computes wrongly: a product of matrices is off by " in out

    def failing(a, b):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.Tensor, "__matmul__", failing)
    assert "cannot compute (RuntimeError: CUDA error" in speed.computed().said


def test_the_estimates_are_arithmetic_on_the_probe():
    """8 operations a token and parameter, at 80 % of the rate; sampling reads 4 bytes a parameter a token."""
    sign = speed.estimates(speed.Speed(float32=8e12, bfloat16=1e12, copied=40e9))
    assert sign.level == "ok"
    assert sign.figures["train_tokens_per_s"]["1B"] == pytest.approx(800)
    assert sign.figures["sample_tokens_per_s"]["1B"] == pytest.approx(10)
    assert "1B model: 800 tokens/s of DPO, 10 of one sampled answer" in sign.said
    slow = speed.estimates(speed.Speed(8e9, 8e9, 1e9))
    assert slow.level == "note"
    assert "training a 135M model is slow here" in slow.todo
    assert "bfloat16 multiplies 2.0 x faster here" in speed.precision(speed.Speed(1, 2, 1)).said
    assert "bfloat16 is no faster here" in speed.precision(speed.Speed(2, 1, 1)).said


def test_the_probe_takes_under_two_seconds_of_its_own():
    assert 3 * speed._SECONDS < 2
    assert all(rate > 1e6 for rate in speed.measured())


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_container_may_use(monkeypatch, tmp_path, version):
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    whole = room.memory()
    assert whole.name == "memory"
    cores = machine.cores()
    if version == 2:
        write(tmp_path / "cpu.max", "100000 100000\n")
        write(tmp_path / "memory.max", f"{1 << 30}\n")
        write(tmp_path / "memory.current", f"{3 << 28}\n")
        write(tmp_path / "memory.stat", f"anon 1\ninactive_file {1 << 28}\n")
    else:
        write(tmp_path / "cpu/cpu.cfs_quota_us", "100000\n")
        write(tmp_path / "cpu/cpu.cfs_period_us", "100000\n")
        write(tmp_path / "memory/memory.limit_in_bytes", f"{1 << 30}\n")
        write(tmp_path / "memory/memory.usage_in_bytes", f"{3 << 28}\n")
        write(tmp_path / "memory/memory.stat", f"anon 1\ninactive_file {1 << 28}\n")
    assert machine.cores() == 1 <= cores
    assert room.memory() == Room(1 << 30, 1 << 29, "memory that this container may use")
    for name in ("cpu.max", "memory.max"):
        (tmp_path / name).unlink(missing_ok=True)
        write(tmp_path / name, "max 100000\n")
    if version == 2:
        assert (machine.cores(), room.memory().total) == (cores, whole.total)


def test_threads_and_cores(monkeypatch):
    monkeypatch.setattr(speed, "cores", lambda: torch.get_num_threads())
    assert speed.threads().level == "ok"
    monkeypatch.setattr(speed, "cores", lambda: 64)
    assert speed.threads().todo == "set OMP_NUM_THREADS=64"
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine.psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert machine.processor().level == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sign = machine.processor()
    assert "OMP_NUM_THREADS=1, so some stay idle" in sign.said
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine.psutil, "getloadavg", lambda: (7.5, 0.0, 0.0))
    assert "7.5 programs wanted one" in machine.processor().said


def test_memory_says_what_fits():
    sign = machine.room_said(Room(64 << 30, 16 * 10**9, "memory"))
    assert "up to about 1B parameters train in full, 4B with LoRA" in sign.said
    assert machine.room_said(Room(8 << 30, 1 << 30, "memory")).level == "note"


def test_a_gpu_by_a_stand_in(monkeypatch):
    """No GPU is at hand in the tests: what torch would say of one is put in its place."""
    found = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    first, second = speed.devices()
    assert "NVIDIA H100, compute capability 9.0, 80.0 GiB; model.device=auto takes it" in first.said
    assert (first.topic, second.topic) == ("GPU 0", "GPU 1")
    assert speed.room() == Room(80 << 30, 70 << 30, "memory of GPU 0")
    assert speed.exact().level == "ok"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert (speed.exact().level, speed.exact().todo) == ("note", "unset NVIDIA_TF32_OVERRIDE")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert "rounded to TF32" in speed.exact().said


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (sign,) = speed.devices()
    assert "built for CUDA 13.0 and sees no GPU" in sign.said
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(speed, "_NVIDIA", Path(__file__))
    (sign,) = speed.devices()
    assert "an NVIDIA GPU is here" in sign.said
    assert sign.level == "note"


def hub_model(folder, name, made):
    """A model as the hub's cache keeps it: links in a snapshot, the files beside it."""
    place = folder / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots/0123456789012345678901234567890123456789"
    (place / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(place / "refs/main", snapshot.name)
    for number, file in enumerate(sorted(made.iterdir())):
        shutil.copy(file, place / f"blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return place, snapshot


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "model"
    tiny.save(folder)
    return folder


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_caches_and_what_is_damaged_in_them(model, tmp_path):
    assert [sign.level for sign in caches.caches()] == ["ok", "ok"]
    assert all("empty" in sign.said for sign in caches.caches())
    shutil.copytree(model, tmp_path / "cache/small")
    place, snapshot = hub_model(tmp_path / "hub", "owner/name", model)
    own, hubs = caches.caches()
    weight = sum(path.stat().st_size for path in model.iterdir())
    assert own.figures == {"small": weight}
    assert hubs.figures == {"owner/name": weight}
    assert f"{size(weight)} (owner/name {size(weight)})" in hubs.said
    cut_off(tmp_path / "cache/small/model.safetensors")
    cut_off(snapshot / "model.safetensors")
    (place / "blobs/1.incomplete").write_bytes(bytes(500))
    _, other = hub_model(tmp_path / "hub", "owner/other", model)
    (other / "config.json").resolve().unlink()
    said = [f"{sign.topic}: {sign.said}; {sign.todo}" for sign in caches.caches() if sign.level == "note"]
    own, gone, cut, unfinished = said
    assert "favor's cache: damaged: small/model.safetensors (" in own
    assert "damaged: Blob missing (broken symlink)" in gone
    assert "models--owner--other" in gone
    assert "damaged: owner/name, model.safetensors (" in cut
    assert "hf cache rm model/owner/name" in cut
    assert "1 downloads were not finished, 500 bytes; hf cache prune" in unfinished
    (tmp_path / "hub/models--what").mkdir()
    assert any("models--what" in sign.said for sign in caches.caches())


def test_the_hub_is_asked_when_asked(monkeypatch, favor):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    asked = []
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert caches.hub(asked=False).level == "ok"
        assert asked == []
        sign = caches.hub(asked=True)
        assert asked
        assert "answers in 0." in sign.said
    sign = caches.hub(asked=True)
    assert sign.level == "note"
    assert "does not answer (ConnectError" in sign.said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in caches.hub(asked=True).said


def looked_at(path, room=PLENTY, *, hub=False):
    return by_topic(subject.model_signs(str(path), room, hub=hub))


def copied(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_a_model_that_would_train(model, favor, monkeypatch):
    monkeypatch.setattr(speed, "_SECONDS", 0.02)
    signs = looked_at(model)
    assert {sign.level for sign in signs.values()} == {"ok"}
    made = sum(parameter.numel() for parameter in tiny.model().parameters())
    assert f"LlamaForCausalLM, {made:,} parameters, 2 layers" in signs["model"].said
    assert signs["fits"].figures["full"] > signs["fits"].figures["lora"] > 4 * made
    assert "prompt trees" in signs["layout"].said
    assert "chat template" in signs["tokenizer"].said
    code, out, _ = favor("doctor", f"model={model}")
    assert code == 0
    assert f"next: favor init --model {model} --data FILE --out recipe.toml" in out


def test_a_model_that_does_not_fit(model):
    full, lora = (looked_at(model)["fits"].figures[name] for name in ("full", "lora"))
    assert looked_at(model, Room(full, full, "memory"))["fits"].level == "ok"
    between = looked_at(model, Room(full, full - 1, "memory"))["fits"]
    assert (between.level, between.todo) == ("note", "train adapters: model.lora.rank=16")
    assert "it does not" in looked_at(model, Room(full, lora - 1, "memory"))["fits"].said


def test_models_that_are_broken(model, tmp_path):
    def spoilt(change):
        folder = copied(model, tmp_path)
        change(folder)
        found = looked_at(folder)
        shutil.rmtree(folder)
        return [sign for sign in found.values() if sign.level == "broken"]

    def settings(**more):
        def change(folder):
            found = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(found | more))

        return change

    cases = {
        "no such model folder": lambda folder: shutil.rmtree(folder) or folder.with_name("copy").mkdir(),
        "no config.json": lambda folder: (folder / "config.json").unlink(),
        "no safetensors file": lambda folder: (folder / "model.safetensors").unlink(),
        "cannot be loaded": lambda folder: cut_off(folder / "model.safetensors"),
        "quantized": settings(quantization_config={"quant_method": "gptq"}),
        "they do not belong together": settings(vocab_size=100),
        "lacks b.safetensors": lambda folder: write(
            folder / "model.safetensors.index.json", json.dumps({"weight_map": {"x": "b.safetensors"}})
        ),
        "tokenizer cannot be loaded": lambda folder: (folder / "tokenizer.json").unlink(),
        "language model cannot be loaded": settings(model_type="t5", architectures=["T5Model"]),
    }
    cases.pop("no such model folder")
    for said, change in cases.items():
        (sign,) = spoilt(change)
        assert said in sign.said, (said, sign)
    (sign,) = looked_at("./nowhere").values()
    assert (sign.level, "no such model folder" in sign.said) == ("broken", True)


def test_what_is_slower_or_plain_is_told(model, tmp_path):
    folder = copied(model, tmp_path)
    found = json.loads((folder / "config.json").read_text())
    found |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(found))
    (folder / "chat_template.jinja").unlink()
    signs = looked_at(folder)
    assert "one row an answer, which is slower: its sliding_window of 64 tokens" in signs["layout"].said
    assert "no chat template" in signs["tokenizer"].said


def test_an_adapter_is_looked_at_with_its_base(model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    found = list(subject.model_signs(str(tmp_path / "adapter"), PLENTY, hub=False))
    assert f"is an adapter of {model}" in found[0].said
    assert {sign.level for sign in found} == {"ok"}
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    (sign,) = looked_at(tmp_path / "adapter").values()
    assert "no adapter_model.safetensors" in sign.said


def test_a_hub_id_is_found_in_the_cache_or_not_at_all(model, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("it opened a connection"))
    (sign,) = looked_at("owner/name").values()
    assert (sign.level, "not in the cache, and the hub is not asked" in sign.said) == ("note", True)
    hub_model(tmp_path / "hub", "owner/name", model)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert {sign.level for sign in looked_at("owner/name").values()} == {"ok"}


def test_runs(model, tmp_path):
    def found(run):
        return list(subject.run_signs(str(run), PLENTY, hub=False))

    (sign,) = found(tmp_path / "none")
    assert (sign.level, "no config.toml" in sign.said) == ("broken", True)
    run = tmp_path / "run"
    write(run / "config.toml", f'run = "run"\n[model]\npath = "{model}"\n')
    first, *rest = found(run)
    assert (first.level, first.said) == ("note", f"{run} is not finished; it has no checkpoint")
    assert {sign.level for sign in rest} == {"ok"}
    for step in ("step-000002", "step-000010"):
        (run / "checkpoints" / step).mkdir(parents=True)
    assert "its newest checkpoint is step-000010" in found(run)[0].said
    shutil.copytree(model, run / "model")
    first, *rest = found(run)
    assert "is finished" in first.said
    assert str(run / "model") in rest[0].said
    (run / "config.toml").write_text("run = ")
    (sign,) = found(run)
    assert "not valid TOML" in sign.said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB"), (1 << 40, "1024.0 GiB")],
)
def test_sizes(count, said):
    assert size(count) == said


def test_the_settings_are_what_the_page_says():
    page = (ROOT / "docs/doctor.md").read_text("utf-8")
    assert all(f"`{name}=" in page or f"{name}=" in page for name in DoctorConfig.model_fields if name != "hub")
    assert "--hub" in page
    for extra in software.EXTRAS:
        assert f"favor[{extra}]" in page
