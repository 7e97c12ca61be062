"""The parts of a page: plots, verdicts in words, differences between runs, words that changed, and what a page weighs."""

import itertools
import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from test_report import a_picture, a_run

from favor.errors import ConfigError
from favor.eval.intervals import mean_interval
from favor.pages import write_report
from favor.report.compare import differences, figure_rows, settings_rows, write_comparison
from favor.report.curves import curves, smoothed, thinned
from favor.report.labels import Box, free_place
from favor.report.page import page, write_page
from favor.report.plot import Axes, Line, bars, chart, standalone, ticks
from favor.report.records import anywhere, collect
from favor.report.samples import difference, shown
from favor.report.verdict import sides_of, verdict
from favor.report.words import TERMS, explained
from favor.run import RunFolder, append, write_json, write_jsonl

SVG = "{http://www.w3.org/2000/svg}"
MOST = 400_000


def tree(svg):
    """The elements of a plot; fails where it is not well-formed."""
    return ElementTree.fromstring(standalone(svg))


def points(svg):
    """The (x, y) of each drawn line, in pixels."""
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        for line in tree(svg).iter(f"{SVG}polyline")
    ]


# plots


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 0.4), (1e-6, 3e-5), (0, 12345), (5, 5.001)])
def test_ticks_are_round_few_and_inside(low, high):
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 5
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    assert all(float(f"{value:.3g}") == pytest.approx(value, abs=1e-12) or value > 1 for value in found)


def test_a_line_lies_where_its_values_are():
    svg = chart(Axes("what", "step", "nats", x_range=(0, 4), y_range=(0, 4)), [Line([0, 1, 2, 4], [0, 1, 2, 4])])
    (line,) = points(svg)
    across, up = ({round(b[i] - a[i], 1) for a, b in itertools.pairwise(line[:3])} for i in (0, 1))
    # equal steps, y upwards
    assert len(across) == len(up) == 1
    assert up.pop() < 0 < across.pop()
    assert line[3][0] == pytest.approx(line[0][0] + 4 * (line[1][0] - line[0][0]), abs=0.5)


def test_a_root_axis_and_what_leaves_it():
    line = Line([0, 1, 4, 100], [0, 1, 2, 3], "far", marks=True)
    svg = chart(Axes("what", "KL", "y", scale="sqrt", x_range=(0, 9), y_range=(0, 4), inside=True), [line])
    (drawn,) = points(svg)
    assert len(drawn) == 3
    assert drawn[2][0] - drawn[0][0] == pytest.approx(2 * (drawn[1][0] - drawn[0][0]), abs=0.3)
    assert len(list(tree(svg).iter(f"{SVG}circle"))) == 3
    assert "m-6 -4" in svg
    assert "far" in "".join(tree(svg).itertext())


def test_labels_of_lines_that_end_together_do_not_cover_each_other():
    lines = [Line([0, 1], [0, 0.5 + i / 1000], f"run {i}", i) for i in range(6)]
    heights = sorted(
        float(text.get("y"))
        for text in tree(chart(Axes("a", "b", "c"), lines)).iter(f"{SVG}text")
        if text.get("class") == "n"
    )
    assert len(heights) == 6
    assert all(b - a >= 12 for a, b in itertools.pairwise(heights))
    taken = []
    for _ in range(5):
        taken.append(free_place((100, 100), 40, taken, Box(0, 0, 300, 300)))
    assert not any(a.covered(b) for i, a in enumerate(taken) for b in taken[:i])


def test_values_that_are_no_numbers_are_left_out_and_names_are_escaped():
    svg = chart(Axes("<w>", "x", "y"), [Line([0, 1, 2], [1, math.nan, 3], "<b>", behind=[1, 2, 3], marks=True)])
    assert "nan" not in svg.lower()
    assert "<b>" not in svg
    assert len(points(svg)[0]) == 2
    assert chart(Axes("w", "x", "y"), [Line([], [])]) == ""


def test_steps_are_counted_in_whole_numbers():
    def at_x(**more):
        svg = chart(Axes("w", "step", "y", **more), [Line([1, 2, 3], [0.1, 0.2, 0.3])])
        return {text.text for text in tree(svg).iter(f"{SVG}text") if text.get("class") == "t m"} - {"step", "y"}

    assert at_x(whole=True) == {"1", "2", "3"}
    assert "1.5" in at_x()


def test_long_numbers_have_room_left_of_the_axis():
    (axis,) = {
        float(left)
        for left in re.findall(
            r'class="a" d="M([\d.]+) 10.0V', chart(Axes("w", "x", "y"), [Line([0, 1], [0.69301, 0.69315])])
        )
    }
    assert axis > 60
    for text in tree(chart(Axes("w", "x", "y"), [Line([0, 1], [0.69301, 0.69315])])).iter(f"{SVG}text"):
        if text.get("class") == "t e":
            # right of the axis' name, which stands upright at 11
            assert float(text.get("x")) - 5.4 * len(text.text) > 17


def test_a_histogram_counts_every_value():
    svg = bars(Axes("what", "x", "y"), [-1, 0, 1], [3, 5], 0.0)
    found = list(tree(svg).iter(f"{SVG}rect"))
    assert [rect.get("class") for rect in found] == ["f1", "f0"]
    assert float(found[1].get("height")) == pytest.approx(5 / 3 * float(found[0].get("height")), rel=0.01)


def test_smoothing_keeps_a_constant_and_the_mean_of_neighbours():
    assert smoothed([2.0] * 9, 5) == [2.0] * 9
    assert smoothed([0, 3, 0, 3, 0], 3) == [1.5, 1, 2, 1, 1.5]
    assert thinned(1000, 5)[0] == 0
    assert thinned(1000, 5)[-1] == 999
    assert thinned(4, 9) == [0, 1, 2, 3]


def test_curves_have_the_chance_line_the_held_out_values_and_the_raw_line_behind(tmp_path):
    root = a_run(tmp_path / "run", steps=40)
    for step, value in ((0, 0.5), (40, 0.75)):
        append(RunFolder(root).metrics, {"kind": "eval", "step": step, "loss": 0.6, "accuracy": value, "margin": 0.1})
    drawn = {plot.title: plot.svg for plot in curves([collect(root)], "step", inner=False)}
    accuracy = drawn["Preference accuracy"]
    assert "0.5: chance" in accuracy
    assert "held out" in accuracy
    assert 'class="r c0' in accuracy
    assert "ln 2" in drawn["Loss: dpo"]
    # over tokens the held-out values lie where that many were computed
    over = next(
        plot.svg for plot in curves([collect(root)], "tokens", inner=False) if plot.title == "Preference accuracy"
    )
    assert points(over)[-1][-1][0] == pytest.approx(points(over)[0][-1][0], abs=0.2)
    # a loss that does not begin at ln 2 has no such line
    (root / "config.toml").write_text('run = "x"\n[loss]\nkind = "ipo"\n')
    assert "ln 2" not in next(p.svg for p in curves([collect(root)], "step", inner=False) if p.title == "Loss: ipo")


def test_a_run_has_one_colour_in_every_plot(tmp_path):
    for name in ("one", "two", "three"):
        append(
            RunFolder(a_run(tmp_path / name, steps=5)).metrics,
            {"kind": "eval", "step": 5, "loss": 0.6, "accuracy": 0.7},
        )
    runs = [collect(tmp_path / name) for name in ("one", "two", "three")]
    for plot in curves(runs, "step", inner=False):
        for number, run in enumerate(runs):
            leaders = re.findall(rf'<path class="j c(\d)"[^>]*/><text class="n"[^>]*>{run.name}', plot.svg)
            assert set(leaders) == {str(number)}, plot.title


# the verdict


def judged(tmp_path, **figures):
    root = a_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
    folder = RunFolder(root)
    write_json(folder.evaluation, json.loads(folder.evaluation.read_text()) | figures)
    return verdict(anywhere(collect(root)))


def test_the_verdict_follows_the_intervals(tmp_path):
    score = json.loads((a_run(tmp_path / "first") / "eval.json").read_text())["score"]
    cases = [
        ({}, "good"),
        ({"score": None}, "good"),
        ({"accuracy_interval": [0.45, 0.9]}, "unsure"),
        ({"accuracy_interval": None}, "unsure"),
        ({"accuracy": 0.2, "accuracy_interval": [0.1, 0.4]}, "bad"),
        ({"score": score | {"interval": [-0.1, 0.2]}}, "unsure"),
        ({"score": score | {"interval": [-0.3, -0.1]}}, "bad"),
    ]
    for figures, light in cases:
        assert judged(tmp_path, **figures).light == light, figures


def words_of(found):
    return " ".join([found.headline, *(sentence for _, said in found.facts for sentence in said)])


def test_the_verdict_says_what_it_cost_and_what_is_wrong(tmp_path):
    kl = {"mean": 2.0, "se": 0.1, "num_samples": 40, "max_new_tokens": 40}
    quiet = judged(tmp_path, prompts=100, kl=kl, length={"reference": 30.0, "policy": 31.0})
    assert "typically 7 times as likely" in words_of(quiet)
    assert "31.0 tokens, before 30.0 (+3 %)" in words_of(quiet)
    # one warning of the run itself
    assert quiet.warned == 1
    loud = judged(tmp_path, prompts=12, kl=kl | {"mean": 25.0}, length={"reference": 20.0, "policy": 39.5})
    assert loud.warned == 4
    for part in ("moved far", "changed by more than a quarter", "limit of 40 tokens", "under 30 prompts"):
        assert part in words_of(loud), part


def test_a_model_that_still_prefers_the_other_answers_is_told(tmp_path):
    said = words_of(judged(tmp_path, policy_accuracy=0.1, policy_accuracy_interval=[0.05, 0.2]))
    assert "still finds the other answer likelier" in said
    assert "Right on 10 of 100" in said


def test_the_paired_difference_is_that_of_the_pairs(tmp_path):
    root = a_run(tmp_path / "run")
    rows = [
        {"pair": str(i), "prompt": i // 2, "margin": 1.0, "policy_gap": 1.0 - (i % 3), "reference_gap": -1.0}
        for i in range(40)
    ]
    write_jsonl(RunFolder(root).pairs, rows)
    right = np.array([{0: 1.0, 1: 0.5, 2: 0.0}[i % 3] for i in range(40)])
    expected = mean_interval(right, clusters=np.arange(40) // 2, bounds=(-1.0, 1.0))
    said = words_of(verdict(collect(root)))
    assert (
        f"that is {100 * expected.mean:+.0f} percentage points ({100 * expected.low:+.0f} to {100 * expected.high:+.0f})"
        in said
    )


def test_a_run_that_was_not_evaluated_says_what_is_known(tmp_path):
    root = a_run(tmp_path / "run")
    folder = RunFolder(root)
    folder.evaluation.unlink()
    trained = verdict(collect(root))
    assert trained.light == "none"
    assert "nothing was measured on held-out" in trained.headline
    # what was not held out must be given
    assert trained.next[0][0] == "favor eval run=x data=FILE"
    held = replace(collect(root), data={"train": {}, "eval": {}})
    assert verdict(held).next[0][0] == "favor eval run=x"
    for step, value in ((0, 0.5), (12, 0.75)):
        append(folder.metrics, {"kind": "eval", "step": step, "loss": 0.6, "accuracy": value, "margin": 0.1})
    assert "75 % of the held-out pairs after step 12; after step 0 it was 50 %" in words_of(verdict(collect(root)))


def test_a_win_rate_names_the_winner(tmp_path):
    root = a_picture(tmp_path / "run", evil="plain")
    folder = RunFolder(root)
    figures = json.loads(folder.winrate.read_text()) | {"a": "/home/me/runs/dpo/model", "b": "runs/sft/model"}
    for ends, headline in (([0.5, 0.7], "Neither"), ([0.55, 0.7], "dpo/model wins"), ([0.2, 0.45], "sft/model wins")):
        write_json(folder.winrate, figures | {"win_rate_interval": ends})
        run = collect(root)
        assert verdict(run).headline.startswith(headline)
    assert sides_of({"a": "x/model", "b": "x/model"}) == ("a (model)", "b (model)")
    text = page(anywhere(run))
    assert "home/me" not in text
    assert 'class="won-b" style="width:33.33%"' in text


def test_a_loop_shows_its_rounds(tmp_path):
    root = tmp_path / "loop"
    root.mkdir()
    (root / "config.toml").write_text('run = "loop"\n')
    rounds = [{"round": i, "mean_score": i / 2, "prompts": 3, "samples": 12, "comparisons": 5} for i in (1, 2, 3)]
    write_jsonl(root / "rounds.jsonl", rounds)
    run = collect(root)
    assert "3 rounds the mean score of the model's own answers rose" in verdict(run).headline
    text = page(run)
    assert text.count('<svg class="plot"') == 1
    assert "No steps were recorded" not in text
    assert "No held-out figures" not in text


def test_a_reward_model_shows_margins_and_calibration_with_counts(tmp_path):
    root = a_picture(tmp_path / "run")
    RunFolder(root).winrate.unlink()
    rows = [{"pair": str(i), "prompt": i, "margin": (i - 20) / 10} for i in range(60)]
    write_jsonl(RunFolder(root).pairs, rows)
    run = collect(root)
    text = page(run)
    assert "60 pairs; left of 0 the other answer is ahead (20 pairs)" in text
    assert "n=5" in text
    assert "before (reference)" not in text.split("Words on this page")[0]
    assert verdict(run).light == "good"


def test_terms_are_explained_once_where_they_stand():
    said = explained("KL in nats, KL again, <b> & 95 % held-out")
    assert said.count("<abbr") == 4
    assert said.count(TERMS["nats"][:20]) == 1
    assert "&lt;b&gt; &amp;" in said
    assert explained("nothing") == "nothing"


# samples


def test_a_difference_marks_the_words_that_changed_and_nothing_else():
    before, after = difference("a good <film> indeed", "a great <film> indeed")
    assert (before, after) == ("a <del>good </del>&lt;film&gt; indeed", "a <ins>great </ins>&lt;film&gt; indeed")
    strip = re.compile(r"</?(?:ins|del)>")
    for a, b in (("x y z", "z y x"), ("", "new"), ("same", "same"), ("  two  blanks ", "two blanks")):
        assert [strip.sub("", text) for text in difference(a, b)] == [a, b]


def test_samples_are_sorted_by_change_and_cut_ones_are_marked(tmp_path):
    def record(name, before, after, **more):
        return {
            "prompt": name,
            "reference": ["x"],
            "policy": ["y"],
            "reference_scores": [before],
            "policy_scores": [after],
            **more,
        }

    records = [
        record("same", 0.5, 0.5),
        record("worse", 0.9, 0.1),
        record("better", 0.1, 0.9, policy_cut=[True], reference_cut=[False]),
    ]
    found, left_out = shown(records)
    assert [one.prompt for one in found] == ["better", "same", "worse"]
    assert left_out == 0
    assert [[pair.before.cut, pair.after.cut] for pair in found[0].pairs] == [[False, True]]
    unscored, _ = shown(
        [{"prompt": "p", "reference": ["a b"], "policy": ["a c"]}, {"prompt": "q", "reference": ["a"], "policy": ["a"]}]
    )
    assert [one.change for one in unscored] == [0.5, 0.0]


# several runs


@pytest.fixture
def pair_of_runs(tmp_path):
    for number, name in enumerate(("one", "two")):
        folder = RunFolder(a_run(tmp_path / name, steps=5))
        folder.config.write_text(
            f'run = "{name}"\n[optim]\nlr = {1 + number}e-5\nschedule = "linear"\n[model]\npath = "/home/me/m"\n'
        )
        rows = [
            {
                "pair": f"p{i + 3 * number}",
                "prompt": i + 3 * number,
                "margin": number * 0.5 + i % 2,
                "policy_gap": 1.0,
                "reference_gap": 1.0,
            }
            for i in range(30)
        ]
        write_jsonl(folder.pairs, rows)
        figures = json.loads(folder.evaluation.read_text()) | {"accuracy": 0.8 + number / 10, "score": None}
        write_json(folder.evaluation, figures)
    return [tmp_path / "one", tmp_path / "two"]


def test_runs_are_compared_on_the_pairs_that_both_have(pair_of_runs):
    runs = [collect(root) for root in pair_of_runs]
    found = {d.what: d for d in differences(runs)}
    # 27 of the 30 pairs are the same; the later number sees each with the other's place
    first = {record["pair"]: record["margin"] for record in runs[0].pairs}
    values = np.array([r["margin"] - first[r["pair"]] for r in runs[1].pairs if r["pair"] in first])
    expected = mean_interval(values)
    margin = found["implicit reward margin"]
    assert margin.on == "27 pairs"
    assert margin.text == f"{expected.mean:+.3f} ({expected.low:+.3f} to {expected.high:+.3f})"
    rows = {name: cells for name, _, cells in figure_rows(runs)}
    assert [cell.best for cell in rows["implicit reward accuracy, held-out"]] == [False, True]
    assert settings_rows([run.settings for run in runs]) == [("optim.lr", "1e-05", "2e-05")]


def test_a_comparison_never_replaces_a_run_s_page(pair_of_runs, tmp_path):
    own = write_report(pair_of_runs[:1])
    before = own.read_bytes()
    both = write_report(pair_of_runs)
    assert both == pair_of_runs[0] / "compare.html"
    assert own.read_bytes() == before
    text = both.read_text()
    for part in ("Paired differences", "Settings that differ", "optim.lr", "27 pairs"):
        assert part in text, part
    assert "/home/me" not in text
    # nor anything that is not a comparison; its own page it does
    (tmp_path / "notes.html").write_text("mine")
    for path in (own, tmp_path / "notes.html", tmp_path):
        with pytest.raises(ConfigError, match="left as it is"):
            write_report(pair_of_runs, path)
    with pytest.raises(ConfigError, match="left as it is"):
        write_report(pair_of_runs[:1], both)
    assert own.read_bytes() == before
    assert write_report(pair_of_runs, tmp_path / "out.html") == write_report(pair_of_runs, tmp_path / "out.html")


def test_runs_without_common_pairs_and_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        a_run(tmp_path / name / "run", steps=3)
    RunFolder(tmp_path / "b/run").evaluation.unlink()
    write_comparison([collect(tmp_path / name / "run") for name in ("a", "b")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "run (2)" in text
    assert "no held-out pairs are shared" in text
    assert "run (2) was not evaluated" in text


# what a page weighs, and what is in it


def test_the_largest_runs_stay_under_400_kb(tmp_path):
    root = a_run(tmp_path / "run", steps=4000)
    folder = RunFolder(root)
    with folder.metrics.open("a") as file:
        for step in range(2000):
            file.write(
                json.dumps({"kind": "event", "step": step, "name": "x", "message": f"warning: {step} " + "words " * 50})
                + "\n"
            )
    text = " ".join(f"word{i}" for i in range(400))
    write_jsonl(
        folder.samples,
        [{"prompt": f"{i} {text}", "reference": [text] * 4, "policy": [text[::-1]] * 4} for i in range(300)],
    )
    write_jsonl(folder.pairs, [{"pair": str(i), "prompt": i, "margin": float(i)} for i in range(20000)])
    folder.config.write_text('run = "x"\n' + "# long\n" * 20000)
    write_json(folder.data_report, {f"k{i}": {"n": 1} for i in range(5000)})
    write_page(collect(root), tmp_path / "page.html")
    assert 50_000 < (tmp_path / "page.html").stat().st_size <= MOST
    # texts of any length, as a prompt, an answer and what a judge saw
    long = "letters " * 200_000
    write_jsonl(
        folder.samples,
        [{"prompt": long, "reference": [long], "policy": [long[::-1]], "read": [{"reference": long, "policy": "x"}]}]
        * 3,
    )
    write_jsonl(folder.winrate_samples, [{"prompt": long, "a": long, "b": long, "verdict": 1.0}] * 20)
    picture = RunFolder(a_picture(tmp_path / "picture"))
    write_json(folder.winrate, json.loads(picture.winrate.read_text()))
    write_page(collect(root), tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size <= MOST
    assert "more letters]" in (tmp_path / "long.html").read_text()
    runs = [collect(root) for _ in range(8)]
    write_comparison(runs, tmp_path / "all.html")
    assert (tmp_path / "all.html").stat().st_size <= MOST


def test_zeros_of_the_data_are_hidden_and_every_id_is_there_once(tmp_path):
    from favor_frontier.page import SECTIONS

    root = a_picture(tmp_path / "run")
    write_json(RunFolder(root).data_report, {"train": {"read": {"num_rows": 7, "close_pairs": 0, "sources": []}}})
    text = page(collect(root, SECTIONS))
    assert "num rows" in text
    assert "close pairs" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', text)
    assert len(targets) > 5
    assert set(targets) <= set(ids)


def test_a_probe_of_kl_shows_its_error(tmp_path):
    root = a_run(tmp_path / "run", steps=0)
    for step, kl in ((1, 1.0), (2, 1.0), (3, 2.0)):
        append(RunFolder(root).metrics, {"kind": "step", "step": step, "kl": kl, "kl_se": 0.1 * step})
    (plot,) = curves([collect(root)], "step", inner=False)
    # two probes, one whisker each, the second three times as long
    ends = re.findall(r'<path class="w c0 d0" d="M[\d.]+ ([\d.]+)V([\d.]+)"', plot.svg)
    lengths = [abs(float(a) - float(b)) for a, b in ends]
    assert len(lengths) == 2
    assert lengths[1] == pytest.approx(3 * lengths[0], abs=0.4)
