"""Pictures: tokens as the processor's, log-probs and gradients as plain transformers', each picture seen once, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest

pytest.importorskip("PIL", reason="favor[vision] is not installed")

import pictured
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from favor.data import pictures
from favor.data.batches import build, shared_tokens
from favor.data.prepare import prepare
from favor.data.read import DataConfig, read
from favor.data.splits import hash_ids
from favor.data.tokenize import TokensConfig, tokenize
from favor.data.types import unseen
from favor.errors import CheckpointError, ConfigError, DataError, NumericsError
from favor.lint.cheap import CHECKS
from favor.losses.table import make_loss
from favor.model import vision
from favor.model.layout import settle
from favor.model.load import ModelConfig, load_policy
from favor.model.logprobs import response_logps
from favor.train.coupled import branches, kto_zero


@pytest.fixture(autouse=True)
def _one_thread(_deterministic):
    """Products this small gain nothing from a second one, and wait for it where the machine is busy."""
    torch.set_num_threads(1)


SIZES = {"a": (100, 150), "b": (64, 64), "c": (200, 90)}
ASK = "What is in the picture?"


def user(*content):
    """A turn of the user: names of pictures, and texts."""
    parts = [
        {"type": "image", "path": f"{item}.png"} if item in SIZES else {"type": "text", "text": item}
        for item in content
    ]
    return [{"role": "user", "content": parts}]


def says(text):
    return [{"role": "assistant", "content": text}]


# two pictures in a prompt, one picture under two prompts, a text under two pictures, no picture, three answers
ROWS = [
    (user("a", ASK), ["a good film", "a bad film", "nothing"]),
    (user("Compare ", "b", " and ", "c", " please"), ["both are good", "both are bad"]),
    (user("b", ASK), ["a good film", "a bad film"]),
    (user(ASK), ["no picture here", "a bad film"]),
    (user("a", ASK, "again"), ["yes", "no"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """MODEL, pictures and pairs.jsonl."""
    where = tmp_path_factory.mktemp("pictured")
    pictured.save(where / "MODEL")
    for seed, (name, size) in enumerate(SIZES.items()):
        pictured.picture(where / f"{name}.png", *size, seed)
    rows = [
        {"prompt": prompt, "responses": list(map(says, answers)), "ranking": list(range(len(answers)))}
        for prompt, answers in ROWS
    ]
    write(where / "rows.jsonl", rows)
    write(where / "pairs.jsonl", [pair(prompt, *answers[:2]) for prompt, answers in ROWS])
    return where


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": says(chosen), "rejected": says(rejected), **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def policy_of(folder, layout="tree", **settings):
    policy = load_policy(ModelConfig(path=str(folder / "MODEL"), **settings), sees=True)
    trees = trees_of(folder, policy)
    return settle(policy, layout, trees, train=True)[0], trees


def trees_of(folder, policy, name="rows.jsonl", **tokens):
    texts, _ = read(str(folder / name), DataConfig(train=str(folder / name)), "train", sees=True)
    config = TokensConfig(**{"max_tokens": 2048, **tokens})
    return tokenize(texts, policy.tokenizer, config, policy.end_ids, "error", policy.sight)[0]


def oracle(folder, trains=()):
    """Plain transformers, a row at a time by its processor: log-probs of every response, and ids of every whole row."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "MODEL", dtype=torch.float32).eval()
    made = AutoProcessor.from_pretrained(folder / "MODEL")
    logps, rows = [], []
    for prompt, answers in ROWS:
        turns = [{**turn, "content": [at(folder, part) for part in turn["content"]]} for turn in prompt]
        start = len(made.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)[0])
        for answer in answers:
            said = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            given = made.apply_chat_template(turns + said, tokenize=True, return_dict=True, return_tensors="pt")
            ids = given["input_ids"][0]
            # the template writes a line break behind the end of the turn
            stop = int((ids == made.tokenizer.eos_token_id).nonzero()[-1]) + 1
            logits = model(**given).logits[0].log_softmax(-1)
            logps.append(logits[start - 1 : stop - 1].gather(1, ids[start:stop, None]).double().sum())
            rows.append(ids[:stop].tolist())
    return model, torch.stack(logps), rows


def at(folder, part):
    return {**part, "path": str(folder / part["path"])} if part["type"] == "image" else part


# --- tokens and pixels ---


def test_ids_are_the_processors_own(folder):
    policy = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
    trees = trees_of(folder, policy)
    ours = [[*tree.prompt_ids, *response] for tree in trees for response in tree.response_ids]
    assert ours == oracle(folder)[2]
    # tiles, then the whole: (2 x 3 + 1) of 100 x 150, 1 of 64 x 64, (3 x 2 + 1) of 200 x 90
    counts = [[picture.tokens // pictured.PARTS for picture in tree.pictures] for tree in trees]
    assert counts == [[7], [10, 7], [10], [], [7]]
    assert trees[0].picture_id == policy.sight.token_id


@pytest.mark.parametrize("how", [{}, {"splitting": False}, {"longest": 4 * pictured.TILE}])
def test_the_cuts_of_a_picture_follow_from_its_size(tmp_path, how):
    """What a blank picture of the size gives is what the processor makes of the real one, and so are the pixels."""
    made = pictured.processor(**how)
    sight = vision.Sight(made, made.image_token, made.image_token_id)
    for seed, size in enumerate([(1, 1), (64, 64), (65, 64), (300, 40), (40, 300), (191, 193), (500, 333), (129, 64)]):
        pictured.picture(tmp_path / "p.png", *size, seed)
        picture = pictures.marked({"prompt": "x", "image": str(tmp_path / "p.png")}, None)["prompt"]
        (picture,) = pictures.pictures_of(picture)
        assert (picture.height, picture.width) == size
        whole = made(text=["<image>"], images=[[pictures.opened(picture)]], return_tensors="pt")
        ids = made.tokenizer(sight.text_of(picture), add_special_tokens=False).input_ids
        assert ids == whole["input_ids"][0].tolist(), size
        values, mask = sight.pixels(picture)
        assert torch.equal(values, whole["pixel_values"])
        assert torch.equal(mask, whole["pixel_attention_mask"])


# --- log-probs and gradients against plain transformers ---


def relative(found, truth):
    return float((found - truth).norm() / truth.norm().clamp_min(1e-12))


@pytest.mark.parametrize(("layout", "tower"), [("tree", "train"), ("tree", "frozen"), ("rows", "train")])
def test_exact_against_plain_transformers(folder, layout, tower):
    policy, trees = policy_of(folder, layout, vision=tower)
    assert policy.layout == layout
    model, truth_R, _ = oracle(folder)
    found_R = response_logps(policy, build(trees, layout))
    assert float(((found_R - truth_R) / truth_R).detach().abs().max()) < 1e-5
    share_R = torch.linspace(-1, 2, len(truth_R), dtype=torch.float64)
    (share_R * truth_R).sum().backward()
    (share_R * found_R).sum().backward()
    ours = dict(policy.model.named_parameters())
    moved = {name for name, parameter in ours.items() if parameter.grad is not None}
    assert any("connector" in name for name in moved)
    assert any("vision_model" in name for name in moved) == (tower == "train")
    largest = max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is None or float(parameter.grad.norm()) < 1e-6 * largest:
            continue
        if tower == "train" or "vision_model" not in name:
            assert relative(ours[name].grad, parameter.grad) < 1e-5, name


def test_every_way_through_the_batch_gives_the_same(folder):
    """Alone, all together, in another order, and response by response (as losses in two passes do)."""
    policy, trees = policy_of(folder)
    with torch.no_grad():
        whole_R = response_logps(policy, build(trees, "tree"))
        alone_R = torch.cat([response_logps(policy, build([tree], "tree")) for tree in trees])
        single_R = torch.cat([response_logps(policy, build([tree], "tree")) for tree in branches(trees)])
        turned_R = response_logps(policy, build(trees[::-1], "tree"))
        base = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
    assert torch.allclose(alone_R, whole_R, rtol=1e-5)
    assert torch.allclose(single_R, whole_R, rtol=1e-5)
    order = torch.cat([build([tree], "tree").index_R for tree in trees[::-1]])
    assert torch.allclose(turned_R, whole_R[order], rtol=1e-5)
    # the mismatched pairs of KTO keep their pictures
    live = settle(base, "tree", trees)[0]
    with torch.no_grad():
        zero = kto_zero(policy, lambda batch: response_logps(live, batch), trees, 4096, vision_world())
    assert abs(zero) < 1e-4


def vision_world():
    from favor.ranks import World

    return World()


def test_equal_texts_under_other_pictures_share_nothing_of_them(folder):
    policy, trees = policy_of(folder)
    # trees 0 and 2: the same words; 0 and 4: the same picture, then the same words
    first = trees[0].prompt_ids.index(policy.sight.token_id)
    shared = shared_tokens(trees)
    assert shared[0, 2] <= first
    assert shared[0, 4] > first + trees[0].pictures[0].tokens
    batch = build(trees, "tree")
    assert [picture.path.rsplit("/")[-1] for picture in batch.pictures] == ["a.png", "b.png", "c.png"]
    assert int(batch.ids_BT.min()) >= 0
    # of a the features stand once although two prompts open with it, b's once in each of its two prompts
    parts = {p.path.rsplit("/")[-1][0]: p.tokens for p in batch.pictures}
    assert len(batch.seen_J) == parts["a"] + 2 * parts["b"] + parts["c"]
    assert torch.equal(batch.feature_J.unique(), torch.arange(sum(parts.values())))


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_a_picture_is_seen_once_in_a_batch(folder, layout, monkeypatch):
    policy, trees = policy_of(folder, layout)
    tiles, files = [], []
    tower, opened = policy.backbone.vision_model, pictures.opened
    handle = tower.register_forward_pre_hook(
        lambda module, args, given: tiles.append(len(given["pixel_values"])), with_kwargs=True
    )
    monkeypatch.setattr("favor.data.sight.opened", lambda picture: files.append(picture.path) or opened(picture))
    with torch.no_grad():
        response_logps(policy, build(trees, layout))
    handle.remove()
    assert len(files) == 3
    assert tiles == [p.tokens // pictured.PARTS for p in build(trees, layout).pictures]


@pytest.mark.parametrize("fault", ["shifted", "swapped", "lost"])
def test_the_self_check_sees_features_in_wrong_places(folder, monkeypatch, fault):
    policy = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
    trees = trees_of(folder, policy)
    if fault == "lost":
        with pytest.raises(AssertionError, match="every picture of a batch"):
            response_logps(policy, build([unpictured(tree) for tree in trees], "rows"))
        return
    wrong = {"shifted": lambda order_J: order_J.roll(1), "swapped": lambda order_J: order_J.flip(0)}[fault]
    seen = vision.seen
    monkeypatch.setattr(vision, "seen", lambda features, order_J: seen(features, wrong(order_J)))
    with pytest.raises(NumericsError, match="do not give what plain transformers gives"):
        settle(policy, "auto", trees)


def unpictured(tree):
    from dataclasses import replace

    return replace(tree, pictures=())


def test_a_length_check_needs_no_pictures(folder):
    policy = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
    for tree in trees_of(folder, policy):
        bare = unseen(tree)
        assert len(bare.prompt_ids) == len(tree.prompt_ids)
        assert policy.sight.token_id not in bare.prompt_ids
        assert bare.pictures == ()


# --- training ---


def train(favor, folder, tmp_path, *words, data="pairs.jsonl"):
    return favor(
        "train",
        f"run={tmp_path / 'run'}",
        f"model.path={folder / 'MODEL'}",
        f"data.train={folder / data}",
        "train.max_steps=2",
        "train.batch_prompts=3",
        "tokens.max_tokens=512",
        "optim.lr=1e-3",
        *words,
    )


def steps(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize(
    ("words", "moves"),
    [
        ((), ("text_model", "connector", "lm_head")),
        (("model.vision=train",), ("text_model", "connector", "lm_head", "vision_model")),
        (("reference.mode=live", "loss.kind=aot"), ("text_model", "connector", "lm_head")),
    ],
)
def test_what_trains_and_what_is_saved(favor, folder, tmp_path, words, moves):
    code, out, err = train(favor, folder, tmp_path, *words)
    assert code == 0, err
    assert "5 pictures" in out
    assert "prompt trees, checked" in out
    if "loss.kind=aot" not in words:
        assert steps(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    before = AutoModelForImageTextToText.from_pretrained(folder / "MODEL", dtype=torch.float32).state_dict()
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    for part in ("text_model", "connector", "lm_head", "vision_model"):
        assert any(part in name for name in changed) == (part in moves), part
    # the processor is there too: what transformers computes with both is what favor does
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(tmp_path / "run/model", copy / "MODEL")
    for name in (*(f"{name}.png" for name in SIZES), "rows.jsonl"):
        shutil.copy(folder / name, copy / name)
    policy, trees = policy_of(copy)
    _, truth_R, rows = oracle(copy)
    assert [[*tree.prompt_ids, *ids] for tree in trees for ids in tree.response_ids] == rows
    with torch.no_grad():
        assert torch.allclose(response_logps(policy, build(trees, "tree")), truth_R.detach(), rtol=1e-5)


def test_adapters_go_on_the_language_model_alone(favor, folder, tmp_path):
    code, _, err = train(favor, folder, tmp_path, "model.lora.rank=2", "data.eval=" + str(folder / "pairs.jsonl"))
    assert code == 0, err
    assert steps(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    from safetensors import safe_open

    with safe_open(tmp_path / "run/model/adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names
    assert all("text_model" in name for name in names)
    assert AutoProcessor.from_pretrained(tmp_path / "run/model").image_seq_len == pictured.PARTS
    code, _, err = favor("eval", f"run={tmp_path / 'run'}", "sample_prompts=0")
    assert code == 0, err
    figures = json.loads((tmp_path / "run/eval.json").read_text())
    assert figures["pairs"] == len(ROWS)
    code, _, err = favor("eval", f"run={tmp_path / 'run'}")
    assert code == 2
    assert "set sample_prompts=0" in err


def test_the_reference_store_knows_its_pictures(favor, folder, tmp_path):
    place = tmp_path / "data"
    shutil.copytree(folder, place)
    store = f"reference.store={tmp_path / 'ref.safetensors'}"
    assert train(favor, place, tmp_path / "1", store)[0] == 0
    code, out, _ = train(favor, place, tmp_path / "2", store)
    assert code == 0
    assert "reference: reused" in out
    pictured.picture(place / "c.png", *SIZES["c"], seed=99)
    code, _, err = train(favor, place, tmp_path / "3", store)
    assert code == 2
    assert "belongs to another token ids" in err
    # in another folder it is the same data
    shutil.copytree(folder, tmp_path / "elsewhere")
    code, out, err = train(favor, tmp_path / "elsewhere", tmp_path / "4", store)
    assert code == 0, err
    # and another processor makes another of it
    made = json.loads((place / "MODEL/processor_config.json").read_text())
    made["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    (tmp_path / "elsewhere/MODEL/processor_config.json").write_text(json.dumps(made))
    code, _, err = train(favor, tmp_path / "elsewhere", tmp_path / "5", store)
    assert "belongs to another pictures" in err


def test_a_picture_that_changes_while_it_trains_ends_the_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    policy = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
    trees = trees_of(tmp_path / "data", policy)
    pictured.picture(tmp_path / "data/a.png", *SIZES["a"], seed=5)
    with pytest.raises(DataError, match=r"a\.png: is another picture than when the rows were read"):
        policy.sight.pixels(trees[0].pictures[0])


# --- rows ---


def prompts(folder, rows, **config):
    path = write(folder / "some.jsonl", rows)
    return [tree.prompt for tree in read(str(path), DataConfig(train=str(path), **config), "train", sees=True)[0]]


def names(prompt):
    return [picture.path.rsplit("/")[-1] for picture in pictures.pictures_of(prompt)]


HOLD = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASK}]}]
FORMS = {
    "placeholder": pair(HOLD, "x", "y", images=["a.png"]),
    "one": pair(HOLD, "x", "y", image="a.png"),
    "as datasets has it": pair(HOLD, "x", "y", images=[{"path": "a.png", "bytes": None}]),
    "in the part": pair(user("a", ASK), "x", "y"),
    "text alone, as TRL": pair([{"role": "user", "content": ASK}], "x", "y", images=["a.png"]),
    "plain text": {"prompt": ASK, "chosen": "x", "rejected": "y", "images": ["a.png"]},
    "whole conversations": {"chosen": HOLD + says("x"), "rejected": HOLD + says("y"), "images": ["a.png"]},
    "thumb": {"prompt": HOLD, "completion": says("x"), "label": True, "images": ["a.png"]},
    "ranking": {"prompt": ASK, "responses": ["x", "y", "z"], "ranking": [1, 0, 2], "image": "a.png"},
    "other names": {"q": HOLD, "chosen": says("x"), "rejected": says("y"), "photos": ["a.png"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_pictures(folder, form):
    how = {"columns": {"prompt": "q", "images": "photos"}} if form == "other names" else {}
    (prompt,) = prompts(folder, [FORMS[form]], **how)
    assert names(prompt) == ["a.png"]
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    assert pictures.MARK.sub("", text) == ASK


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_pictures_inside_a_table(folder, tmp_path, kind, monkeypatch):
    """Bytes become files of the cache, by their content; what trains is the same as from a path."""
    import datasets

    monkeypatch.setenv("FAVOR_CACHE", str(tmp_path / "cache"))
    content = (folder / "a.png").read_bytes()
    column = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "chosen": datasets.Value("string"),
            "rejected": datasets.Value("string"),
        }
    )
    row = {"prompt": [{"role": "user", "content": ASK}], "chosen": "x", "rejected": "y"}
    table = datasets.Dataset.from_list([row | {"images": [{"bytes": content, "path": "a.png"}]}], features=column)
    place = tmp_path / ("t.parquet" if kind == "parquet" else "saved")
    table.to_parquet(place) if kind == "parquet" else table.save_to_disk(place)
    trees, _ = read(str(place), DataConfig(train=str(place)), "train", sees=True)
    (picture,) = pictures.pictures_of(trees[0].prompt)
    assert picture.path.startswith(str(tmp_path / "cache"))
    assert np.array_equal(np.asarray(pictures.opened(picture)), pixels_of(folder / "a.png"))


def pixels_of(path):
    from PIL import Image

    return np.asarray(Image.open(path))


BAD = {
    "no such file": (pair(HOLD, "x", "y", images=["gone.png"]), r"gone\.png cannot be read \(No such file"),
    "no picture": (pair(HOLD, "x", "y", images=["some.jsonl"]), "is no picture that can be read"),
    "torn": (pair(HOLD, "x", "y", images=["torn.png"]), "is no picture that can be read"),
    "torn JPEG": (pair(HOLD, "x", "y", images=["torn.jpg"]), "is no picture that can be read"),
    "web": (pair(HOLD, "x", "y", images=["https://x.org/a.png"]), "is not a file: nothing is fetched"),
    "web in a part": (
        pair([{"role": "user", "content": [{"type": "image", "url": "http://x.org/a.png"}]}], "x", "y"),
        "is not a file: nothing is fetched",
    ),
    "too few": (pair(HOLD, "x", "y"), "more places for pictures"),
    "too many": (pair(HOLD, "x", "y", images=["a.png", "b.png"]), "has 1 places for pictures .* the row has 2"),
    "in an answer": (
        {"prompt": ASK, "chosen": [{"role": "assistant", "content": user("a")[0]["content"]}], "rejected": says("y")},
        "a picture stands in a response",
    ),
    "no place": ({"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "y", "image": "a.png"}, "have no place"),
    "a number": (pair(HOLD, "x", "y", images=[3]), "a picture is given as int"),
    "a mark": (pair(user("a", "\ufdd0"), "x", "y"), r"U\+FDD0"),
    "both columns": (pair(HOLD, "x", "y", images=["a.png"], image="a.png"), "both images and image"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_row_that_cannot_be_used_is_named(folder, fault):
    whole = pictured.picture(folder / "torn.png", 90, 90)
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    whole = pictured.picture(folder / "torn.jpg", 90, 90, kind="JPEG")
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    row, said = BAD[fault]
    with pytest.raises(DataError, match=rf"some\.jsonl, row 2: .*{said}"):
        prompts(folder, [FORMS["placeholder"], row])
    assert len(prompts(folder, [FORMS["placeholder"], row], bad_rows="drop")) == 1


def test_turned_pictures_are_upright(folder, tmp_path):
    from PIL import Image

    turned = Image.new("RGB", (120, 60))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    (prompt,) = prompts(tmp_path, [pair(HOLD, "x", "y", images=["t.jpg"])])
    (picture,) = pictures.pictures_of(prompt)
    assert (picture.height, picture.width) == (120, 60)
    assert pictures.opened(picture).size == (60, 120)


def test_text_that_looks_like_a_picture_is_refused(folder):
    policy = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
    write(folder / "forged.jsonl", [pair(user("a", "and <image>"), "x", "y")])
    with pytest.raises(DataError, match="row 1: .*special token <image>"):
        trees_of(folder, policy, "forged.jsonl")
    with pytest.raises(DataError, match="row 1: .*2 times <image> and 1 pictures"):
        trees_of(folder, policy, "forged.jsonl", special_text="allow")
    write(folder / "forged.jsonl", [pair(user("a", ASK), "an <image>", "y")])
    with pytest.raises(DataError, match="row 1: .*2 times <image> and 1 pictures"):
        trees_of(folder, policy, "forged.jsonl", special_text="allow")


def test_no_cut_goes_through_a_picture(folder):
    policy = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
    whole = trees_of(folder, policy)
    longest = max(len(tree.prompt_ids) for tree in whole)
    kept = trees_of(folder, policy, max_tokens=longest, truncation="prompt_start")
    assert len(kept) == len(whole) - 1
    assert all(sum(p.tokens for p in t.pictures) == t.prompt_ids.count(policy.sight.token_id) for t in kept)


def test_the_held_out_half_does_not_depend_on_where_files_lie(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "there")
    halves = []
    for place in (folder, tmp_path / "there"):
        rows = [pair(user(name, f"question {i}"), "x", "y") for i in range(20) for name in "ab"]
        path = write(place / "many.jsonl", rows)
        data = DataConfig(train=str(path), hold_out={"share": 0.4})
        policy = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
        vocabulary = (policy.tokenizer, policy.end_ids, policy.sight)
        found = prepare(data, TokensConfig(), vocabulary, CHECKS, lambda said: None)
        halves.append([tree.row for tree in found.eval])
    assert halves[0] == halves[1]
    assert 0 < len(halves[0]) < 40


def test_cached_tokens_know_their_pictures(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FAVOR_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folder, tmp_path / "data")
    policy = load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)
    path, said = tmp_path / "data/rows.jsonl", []

    def splits(cache, sight=policy.sight):
        how = DataConfig(train=str(path), cache=cache)
        return prepare(
            how, TokensConfig(max_tokens=2048), (policy.tokenizer, policy.end_ids, sight), CHECKS, said.append
        )

    kept = list(splits(True).train)
    assert kept == list(splits(False).train)
    assert hash_ids({"train": splits(True).train}) == hash_ids({"train": kept})

    def built():
        said.clear()
        splits(True)
        return any("tokenising into" in line for line in said)

    assert not built()
    pictured.picture(tmp_path / "data/c.png", *SIZES["c"], seed=7)
    assert built()
    assert not built()
    other = pictured.processor(longest=2 * pictured.TILE)
    said.clear()
    splits(True, vision.Sight(other, other.image_token, other.image_token_id))
    assert any("tokenising into" in line for line in said)


# --- what is refused ---


def test_other_commands_refuse_such_models_and_rows(favor, folder, tmp_path):
    model, data = f"model.path={folder / 'MODEL'}", f"data.train={folder / 'pairs.jsonl'}"
    code, _, err = favor("sft", f"run={tmp_path / 'sft'}", model, data)
    assert code == 2
    assert "reads pictures, and this command works on text alone" in err
    code, _, err = favor("reward", f"run={tmp_path / 'reward'}", model, data)
    assert code == 2
    assert "cannot be loaded" in err
    write(folder / "columns.jsonl", [FORMS["plain text"]])
    with pytest.raises(
        DataError, match=r"row 1: it has pictures \(column 'images'\), which favor train and favor eval"
    ):
        read(str(folder / "columns.jsonl"), DataConfig(train=str(folder / "columns.jsonl")), "train")
    with pytest.raises(CheckpointError, match="reads pictures, and this command works on text alone"):
        load_policy(ModelConfig(path=str(folder / "MODEL")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("watch.kl.every=1",), "take samples, which favor does not with pictures"),
        (("model.dtype=bfloat16x2",), "was not tried with a model that reads pictures"),
        (("model.vision=train", "model.lora.rank=2"), "adapters go on the language model"),
        (("tokens.template=plain",), "needs its template, which places them"),
    ],
)
def test_settings_that_do_not_go_with_pictures(favor, folder, tmp_path, words, said):
    code, _, err = train(favor, folder, tmp_path, *words)
    assert code == 2
    assert said in " ".join(err.split())


def test_a_tower_is_not_there_in_every_model(folder, tmp_path):
    import tiny

    with pytest.raises(ConfigError, match="reads no pictures"):
        load_policy(ModelConfig(path=str(tiny.save(tmp_path / "text")), vision="train"))


def test_without_pillow_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(vision, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'favor\[vision\]'"):
        load_policy(ModelConfig(path=str(folder / "MODEL")), sees=True)


def test_a_dry_run_counts_picture_tokens(favor, folder, tmp_path):
    code, out, err = favor(
        *("train", "--dry-run", f"run={tmp_path / 'run'}", f"model.path={folder / 'MODEL'}"),
        f"data.train={folder / 'pairs.jsonl'}",
    )
    assert code == 0, err
    assert "5 pictures" in out
    assert "memory (estimate)" in out
    assert make_loss().kind == "dpo"
