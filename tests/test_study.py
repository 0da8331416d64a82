"""The study's statistics against scipy and the definitions, its file against the committed settings, and one run in miniature."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kklip_nb.evidence import runner
from kklip_nb.evidence import study as ablation
from kklip_nb.evidence.study import (COLUMNS, CONTROLS, CORE, ENCODERS, LADDER, PAIRS_ALONE, PLAIN, ROWS, SCENES, SEEDS, STEPS, Difference, Row, compare_rows,
                                     gap_closed, holm, ladder_table, level, load_study, markdown_table, other_words_lines, paired_difference, row_recipe,
                                     seed_values, settings_hash, star_table, study_table)
from kklip_nb.recipe import CLIP, LAPTOP

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "results" / "study.csv"


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    with open(STUDY, encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


# --- rows

def changed(one: Row, other: Row, dataset: str) -> set[str]:
    a, b = (row_recipe(row, dataset, 1) for row in (one, other))
    return {f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)}


def test_one_step_at_a_time_up_the_ladder():
    steps = [changed(ROWS[a], ROWS[b], "openmoji") for a, b in zip(LADDER, LADDER[1:])]
    assert steps == [{"word_table"}, {"first_steps"}, {"alpha"}, {"beta"}]
    ladder = [n for n in LADDER if "scenes" in ROWS[n].datasets]
    assert [changed(ROWS[a], ROWS[b], "scenes") for a, b in zip(ladder, ladder[1:])] == [{"first_steps"}, {"alpha"}, {"beta"}]


def test_plain_clip_has_nothing_of_the_teacher():
    assert row_recipe(ROWS["CLIP"], "openmoji", 0) == CLIP == dataclasses.replace(LAPTOP, **PLAIN, **PAIRS_ALONE)
    for dataset in ROWS["CLIP"].datasets:
        recipe = row_recipe(ROWS["CLIP"], dataset, 0)
        assert recipe.alpha == recipe.beta == recipe.first_steps == 0 and not recipe.word_table


def test_all_else_is_kklip_with_one_thing_changed():
    for name, row in ROWS.items():
        for dataset in row.datasets:
            differs = changed(row, ROWS["KKLIP"], dataset)
            if row.vectors != "own": assert not differs, name
            elif name == "the paper's weights": assert differs == {"alpha", "beta"}
            elif name.startswith("three losses"): assert differs == set(PAIRS_ALONE) & (differs | {"first_steps"})
            elif name not in LADDER and not name.startswith("CLIP"): assert len(differs) == 1, name
    assert changed(ROWS["CLIP, last image stages"], ROWS["CLIP"], "openmoji") == {"train_image"}
    assert [ROWS[n].vectors for n in CONTROLS] == ["shuffled", "surface", "bag of words"]


def test_the_openmoji_rows_start_from_the_committed_recipe():
    assert row_recipe(ROWS["KKLIP"], "openmoji", 3) == dataclasses.replace(LAPTOP, seed=3)
    assert row_recipe(ROWS["KKLIP"], "scenes", 3) == dataclasses.replace(LAPTOP, seed=3, **SCENES)


def test_a_row_is_refused_on_a_data_set_where_it_is_not_run():
    with pytest.raises(ValueError, match="openmoji"): row_recipe(Row({}, datasets=("openmoji",)), "scenes", 0)


def test_every_setting_moves_the_hash(monkeypatch):
    hashes = {settings_hash(n, w, s) for n, r in ROWS.items() for w in r.datasets for s in SEEDS} | {settings_hash("T5", "scenes", s) for s in SEEDS}
    assert len(hashes) == len(SEEDS) * (1 + sum(len(r.datasets) for r in ROWS.values()))
    before = settings_hash("KKLIP", "scenes", 0), settings_hash("KKLIP", "openmoji", 0), settings_hash("T5", "scenes", 0)
    monkeypatch.setitem(ablation.READER, "probe_steps", 1)
    assert settings_hash("KKLIP", "scenes", 0) != before[0] and settings_hash("T5", "scenes", 0) != before[2]
    assert settings_hash("KKLIP", "openmoji", 0) == before[1], "OpenMoji does not use the reader"
    monkeypatch.setitem(ablation.ROWS, "KKLIP", Row({}, vectors="shuffled"))
    assert settings_hash("KKLIP", "openmoji", 0) != before[1]


# --- the committed file

def test_the_committed_runs_belong_to_the_committed_settings(lines):
    assert load_study(STUDY) == lines
    assert len({(r["dataset"], r["row"], r["seed"]) for r in lines}) == len(lines), "no run twice"
    assert len({r["key"] for r in lines}) == len(lines)


def test_the_core_is_complete_and_every_number_a_number(lines):
    have = {(r["dataset"], r["row"], int(r["seed"])) for r in lines}
    assert {t[1:] for t in runner.tasks("study", core=True)} <= have
    for r in lines:
        wanted = [m for w, m in COLUMNS if w == r["dataset"]] if r["row"] in ROWS else ["em", "em_val", "edit"] if r["dataset"] == "scenes" else ["words_seen_all_ap"]
        assert all(0 <= float(r[m]) <= 1 for m in wanted), (r["row"], r["seed"])


def test_other_words_are_the_study_s_in_a_file_of_their_own(lines):
    with open(ROOT / "results" / "other_words.csv", encoding="utf-8", newline="") as file: committed = list(csv.DictReader(file))
    assert committed == other_words_lines(lines)
    assert list(committed[0])[:10] == ["student", "seed", "split", "scope", "asked", "ap", "r1", "r5", "median_rank", "n"]
    of = {(r["student"], r["seed"], r["scope"], r["asked"]): r for r in committed}
    assert {s for s, *_ in of} >= {*CORE, "teacher", "chance"} and len(of) == len(committed) and {r["split"] for r in committed} == {"test"}
    for (student, seed, scope, asked), r in of.items():
        if asked != "all": continue
        yes, no = of[student, seed, scope, "yes"], of[student, seed, scope, "no"]
        assert int(r["n"]) == int(yes["n"]) + int(no["n"])
        for m in ("ap", "r1", "r5"):
            pooled = (float(yes[m]) * int(yes["n"]) + float(no[m]) * int(no["n"])) / int(r["n"])
            assert float(r[m]) == pytest.approx(pooled, abs=2e-5)


def test_the_ladder_s_table_holds_levels_and_holm_s_stars(lines):
    table = (ROOT / "results" / "ladder.md").read_text(encoding="utf-8")
    assert table == ladder_table(lines)
    rows = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in table.splitlines()[2:]}
    names = [n for n in (*LADDER, "three losses on pairs alone", *CONTROLS)]
    assert [n for n in rows if not n.startswith("*")] == names
    values = {(n, m): (1 if "rank" in m else 100) * seed_values(lines, "openmoji", n, m) for n in names for m in STEPS}
    cells = [(n, m) for n in names[1:] for m in STEPS]
    adjusted = holm([stats.ttest_rel(values[c], values["CLIP", c[1]]).pvalue for c in cells])
    starred = {(n, m) for n in names for m, cell in zip(STEPS, rows[n]) if cell.endswith("*")}
    assert starred == {c for c, p in zip(cells, adjusted) if p < 0.05}
    for (n, m), x in values.items():
        half = stats.t.ppf(0.975, 4) * x.std(ddof=1) / 5**0.5
        assert rows[n][list(STEPS).index(m)].removesuffix("*") == f"{x.mean():.1f} ± {half:.1f}"


def test_the_notebook_s_answers_are_those_of_the_file(lines):
    "Told first and in words: each number in them is computed again here."
    cells = json.loads((ROOT / "nbs" / "evidence" / "06_study.ipynb").read_text(encoding="utf-8"))["cells"]
    (told,) = ["".join(c["source"]) for c in cells if "".join(c["source"]).startswith("## The answers")]
    answers = [line.split(" | ") for line in told.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(answers) == 5
    def points(name, base, dataset, metric):
        d = compare_rows(lines, {name: base}, [(dataset, metric)])[name, dataset, metric]
        return f"{d.mean:+.1f} ± {d.half:.1f}"
    words, names = "words_seen_all_ap", ("i2t_r5", "t2i_r5")
    first, step, knowledge, image, sentences = (a[2] for a in answers)
    assert all(level(lines, "openmoji", n, words).split(" ± ")[0] + " %" in first for n in ("CLIP", "KKLIP"))
    assert points("KKLIP", "CLIP", "openmoji", words) in first
    assert [points(b, a, "openmoji", words) in step for a, b in zip(LADDER[1:], LADDER[2:])] == [True] * 3
    above = [points("KKLIP", c, "openmoji", words) for c in CONTROLS]
    assert min(above, key=lambda t: float(t.split(" ± ")[0])) in knowledge
    close = sorted((points("KKLIP", c, "openmoji", m) for c in CONTROLS[1:] for m in names), key=lambda t: float(t.split(" ± ")[0]))
    assert close[0] in knowledge and close[-1] in knowledge
    assert points("KKLIP", "CLIP", "openmoji", "knn_image") in image
    assert all(points("KKLIP", "CLIP", "scenes", m) in sentences for m in ("em", "pairs_group"))
    mean, half = zip(*(points("KKLIP", "CLIP", "openmoji", m).removeprefix("+").split(" ± ") for m in names))
    assert f"by {mean[0]} points from pictures to captions and by {mean[1]} the other way, both ± {half[0]}" in told and half[0] == half[1]


def test_the_answers_stars_and_hints_are_those_of_the_tables(lines):
    stars = lambda bases, columns: {k for k, t in star_table(compare_rows(lines, bases, columns)).items() if t.endswith("*")}
    words, names = ("openmoji", "words_seen_all_ap"), [("openmoji", m) for m in ("i2t_r5", "t2i_r5")]
    columns = [("openmoji", m) for m in STEPS]
    to_clip = stars({n: "CLIP" for n in CORE if n != "CLIP"}, columns)
    assert ("KKLIP", *words) in to_clip and not {("KKLIP", *c) for c in [*names, ("openmoji", "knn_image")]} & to_clip
    assert {(n, *words) for n in LADDER} & stars(dict(zip(LADDER[1:], LADDER)), columns) == {("+ first stage", *words)}
    found = {(c, *k): d for c in CONTROLS for k, d in compare_rows(lines, {"KKLIP": c}, [c for c in COLUMNS if c[0] == "openmoji"]).items()}
    above = {k for k, t in star_table(found).items() if t.endswith("*")}
    assert {(c, "KKLIP", *words) for c in CONTROLS} <= above
    assert len(above & {(c, "KKLIP", *n) for c in CONTROLS[1:] for n in names}) == 1
    of_scenes = [c for c in COLUMNS if c[0] == "scenes"]
    assert {("KKLIP", "scenes", m) for m in ("em", "pairs_group")} <= stars({n: "CLIP" for n in LADDER[2:]}, of_scenes)


def test_a_file_of_other_settings_is_refused(tmp_path, lines):
    def written(change):
        copy = [dict(r) for r in lines[:3]] + [dict(next(r for r in lines if r["row"] == "KKLIP"))]
        change(copy[-1])
        with open(tmp_path / "study.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(copy[0]))
            writer.writeheader()
            writer.writerows(copy)
        return tmp_path / "study.csv"
    assert len(load_study(written(lambda r: None))) == 4
    for change, words in ((dict(settings_hash="0" * 12), "other settings"), (dict(seed="77"), "other settings"),
                          (dict(row="CLIP"), "other settings"), (dict(row="telepathy"), "no row 'telepathy'")):
        with pytest.raises(ValueError, match=f"line 5.*{words}"): load_study(written(lambda r, change=change: r.update(change)))
    with pytest.raises(FileNotFoundError, match="make study-core"): load_study(tmp_path / "none.csv")


# --- statistics

def test_paired_difference_is_scipy_s():
    rng = np.random.default_rng(0)
    for n in (2, 5, 9):
        a, b = rng.normal(size=(2, n))
        reference = stats.ttest_rel(a, b)
        d, interval = paired_difference(a, b), reference.confidence_interval(0.95)
        assert d == pytest.approx((np.mean(a - b), (interval.high - interval.low) / 2, reference.pvalue))
    assert paired_difference(a, a) == Difference(0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="same seeds"): paired_difference(a, b[:3])
    with pytest.raises(ValueError, match="at least two"): paired_difference(a[:1], b[:1])


def test_holm_by_its_definition():
    rng = np.random.default_rng(0)
    for size in (1, 3, 12):
        p = rng.random(size) ** 2
        adjusted = holm(p)
        for alpha in rng.random(30):
            order, fallen = np.argsort(p), np.zeros(size, bool)
            for step, i in enumerate(order):
                if p[i] > alpha / (size - step): break
                fallen[i] = True
            assert np.array_equal(adjusted <= alpha, fallen)
    assert (holm(p) >= p).all() and (holm(p) <= np.minimum(1, size * p)).all()
    assert holm(p.reshape(3, 4)).tolist() == holm(p).reshape(3, 4).tolist()
    for bad in ([], [1.1], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match="from 0 to 1"): holm(bad)


def test_holm_keeps_false_stars_rare():
    rng = np.random.default_rng(0)
    studies = [holm(stats.ttest_1samp(rng.normal(size=(5, 30)), 0).pvalue).min() < 0.05 for _ in range(800)]
    assert np.mean(studies) < 0.07


def toy_runs() -> list[dict]:
    rng = np.random.default_rng(1)
    return [dict(row=n, dataset="openmoji", seed=str(s), knn_text=f"{rng.random():.5f}", em="") for n in ("CLIP", "KKLIP", "k 16") for s in reversed(SEEDS)]


def test_values_come_in_the_order_of_the_seeds():
    runs = toy_runs()
    values = seed_values(runs, "openmoji", "KKLIP", "knn_text")
    assert values.tolist() == [float(next(r["knn_text"] for r in runs if r["row"] == "KKLIP" and r["seed"] == str(s))) for s in SEEDS]
    for world, name, metric in (("scenes", "KKLIP", "knn_text"), ("openmoji", "nobody", "knn_text"), ("openmoji", "KKLIP", "em")):
        assert not len(seed_values(runs, world, name, metric))
    assert not len(seed_values(runs[1:], "openmoji", "CLIP", "knn_text")), "a row with a seed missing is left out"


def test_rows_are_compared_with_the_base_that_is_asked_for():
    runs, column = toy_runs(), [("openmoji", "knn_text")]
    value = lambda n: 100 * seed_values(runs, "openmoji", n, "knn_text")
    found = compare_rows(runs, {"CLIP": "KKLIP", "k 16": "KKLIP"}, [*column, ("scenes", "em")])
    assert list(found) == [("CLIP", *column[0]), ("k 16", *column[0])]
    assert found["k 16", "openmoji", "knn_text"] == paired_difference(value("k 16"), value("KKLIP"))


def test_two_metrics_are_averaged_seed_by_seed_and_lines_without_a_data_set_are_of_openmoji():
    runs = [{"row": "a", "seed": str(s), "x": f"{s}", "y": f"{3 * s}"} for s in SEEDS]
    assert seed_values(runs, "openmoji", "a", "x+y").tolist() == [2.0 * s for s in SEEDS]
    assert not len(seed_values(runs, "scenes", "a", "x"))


def test_one_star_and_only_after_holm():
    found = {(str(i), "x", "y"): Difference(2.0, 1.0, p) for i, p in enumerate((0.001, 0.02, 0.03, 0.2))}
    assert [t.removeprefix("+2.0 ± 1.0") for t in star_table(found).values()] == ["*", "", "", ""]


def test_a_level_is_scipy_s_interval_in_points():
    runs = toy_runs()
    values = 100 * seed_values(runs, "openmoji", "KKLIP", "knn_text")
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert level(runs, "openmoji", "KKLIP", "knn_text") == f"{values.mean():.1f} ± {(reference.high - reference.low) / 2:.1f}"


def test_a_table_of_differences_leaves_out_what_was_not_run():
    runs = [dict(row=n, dataset="openmoji", seed=str(s), knn_text=str(v + d * s)) for n, v, d in (("CLIP", 0.1, 0.02), ("KKLIP", 0.3, 0.01)) for s in SEEDS]
    assert study_table(runs, ["KKLIP", "k 16"]) == "| | CLIP | KKLIP |\n|---|---|---|\n| kNN, text | 14.0 | +18.0 ± 2.0* |\n"
    assert study_table(runs, ["KKLIP"], dataset="openmoji") == study_table(runs, ["KKLIP"])
    with pytest.raises(ValueError, match="make study"): study_table(runs, ["k 16"])


def test_a_table_in_markdown():
    assert markdown_table(["", "a"], [["b", "1"], ["", ""]]) == "| | a |\n|---|---|\n| b | 1 |\n| | |\n"


def test_gap_closed():
    assert gap_closed(35.8, 44.4, 52.5) == pytest.approx(8.6 / 16.7)
    assert [gap_closed(0.2, x, 0.7) for x in (0.2, 0.7)] == [0, 1]
    with pytest.raises(ValueError, match="no gap"): gap_closed(0.5, 0.6, 0.5)


# --- one run in miniature

CACHED = ("all_scenes", "texts_of", "allowed_words", "base_material", "word_pairs")


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(runner, "SCENE_COUNT", 240)
    monkeypatch.setitem(runner.SCENES, "words", 240)
    monkeypatch.setattr(runner, "READER", dict(t5_steps=5, t5_lr=3e-3, probe_steps=3, probe_lr=1e-2, batch_size=16, word_pairs=2))
    recipe = runner.row_recipe
    monkeypatch.setattr(runner, "row_recipe", lambda row, dataset, seed: dataclasses.replace(recipe(row, dataset, seed), epochs=1, k=4, batch_size=32, warmup=1, first_steps=min(2, recipe(row, dataset, seed).first_steps)))
    vectors = lambda dataset, which, part: np.random.default_rng(len(which)).normal(size=(len(runner.texts_of(dataset)[part]), 16)).astype(np.float32)
    monkeypatch.setattr(runner, "teacher_vectors", vectors)
    for f in CACHED: getattr(runner, f).cache_clear()
    yield runner
    for f in CACHED: getattr(runner, f).cache_clear()


def task(name: str, seed: int = 0) -> runner.Task: return runner.Task("study", "scenes", name, seed)


def test_a_run_fills_every_column_of_its_data_set_and_its_key_covers_what_it_reads(small, monkeypatch):
    line = small.one_run(task("KKLIP"))
    assert {m for w, m in COLUMNS if w == "scenes"} <= set(line) and {f"group: {c}" for c in ("noun", "relation")} <= set(line)
    assert (tmp := list(small.cache_dir().glob("t5-*"))) and small.one_run(task("T5"))["em"] <= "0.5"
    assert small.one_run(task("KKLIP"))["em"] == line["em"] and list(small.cache_dir().glob("t5-*")) == tmp, "the reader is kept"
    keys = {small.key_of(task(n, s)) for n in ("KKLIP", "CLIP", "shuffled teacher", "bag of words as teacher", "MiniLM as teacher") for s in (0, 1)}
    assert len(keys) == 10 and line["key"] in keys
    monkeypatch.setitem(small.READER, "probe_steps", 4)
    assert small.key_of(task("KKLIP")) not in keys


def test_controls_know_what_they_should(small):
    own = small.row_material(ROWS["KKLIP"], "scenes", 0)
    mixed, again, other = (small.row_material(ROWS["shuffled teacher"], "scenes", s).embeddings for s in (0, 0, 1))
    assert np.array_equal(mixed, again) and not np.array_equal(mixed, other) and not np.array_equal(mixed, own.embeddings)
    assert np.array_equal(np.sort(mixed, 0), np.sort(own.embeddings, 0)), "the same cloud of points"
    bags = small.row_material(ROWS["bag of words as teacher"], "scenes", 0)
    same = {}
    for caption, vector in zip(bags.pairs.captions, bags.embeddings): same.setdefault(tuple(sorted(caption.split())), []).append(vector)
    assert all(np.allclose(v[0], w, atol=1e-4) for v in same.values() for w in v), "order means nothing"
    assert bags.embeddings.shape == own.embeddings.shape
    spelling = small.row_material(ROWS["surface form as teacher"], "scenes", 0)
    cosine = lambda a, b: float(np.dot(*(x / np.linalg.norm(x) for x in runner.surface_form([a, b], 576))))
    assert cosine("climb", "climber") > 0.5 > 0.2 > abs(cosine("car", "vehicle")) and spelling.embeddings.shape == own.embeddings.shape


def test_no_caption_of_the_first_stage_has_the_words_of_a_held_out_one(small):
    for seed in (0, 1):
        material, split = small.row_material(ROWS["KKLIP"], "scenes", seed), small.split_of("scenes", seed)
        bags = {tuple(sorted(material.pairs.captions[i].split())) for i in (*split.val, *split.test)}
        assert len(material.words) == len(material.word_embeddings) > 200 and not {tuple(sorted(w.split())) for w in material.words} & bags
        everything = runner.texts_of("scenes")["words"]
        assert len(everything) - len(material.words) == sum(tuple(sorted(w.split())) in bags for w in everything)
    assert len(small.row_material(ROWS["CLIP"], "scenes", 0).words) == 1, "a run without a first stage reads none"


def test_the_order_of_the_runs():
    core, everything = ([t[1:] for t in runner.tasks("study", core=c)] for c in (True, False))
    assert set(core) < set(everything) and len(set(everything)) == len(everything)
    rows = {(w, n, s) for n, r in ROWS.items() for w in r.datasets for s in SEEDS}
    assert set(everything) == rows | {(w, n, s) for w in ENCODERS for n in ENCODERS[w] for s in SEEDS}
    assert {n for w, n, _ in core if w == "openmoji"} == {*CORE, *ENCODERS["openmoji"]}
    assert {n for w, n, _ in core if w == "scenes"} == {*CORE, *ENCODERS["scenes"][:4]} - {n for n in CORE if "scenes" not in ROWS[n].datasets} - {*CONTROLS}
    assert everything[:len(core)] == core, "the core first"


def test_the_committed_lines_stand_in_the_order_of_the_runs(lines):
    have = [(r["dataset"], r["row"], int(r["seed"])) for r in lines]
    assert have == [t[1:] for t in runner.tasks("study") if t[1:] in set(have)]


def test_the_keys_of_what_is_not_trained_are_the_committed_ones(lines):
    untrained = {w: set(names) for w, names in ENCODERS.items()}
    keys = {(r["dataset"], r["row"], int(r["seed"])): r["key"] for r in lines if r["row"] in untrained[r["dataset"]]}
    assert keys and all(key == runner.key_of(runner.Task("study", *place)) for place, key in keys.items())


def test_lines_share_their_columns():
    lines = runner.same_columns([dict(dataset="a", em=1, seconds=2, torch="x"), dict(dataset="b", knn=3, seconds=4, torch="x", machine="m")])
    assert [list(r) for r in lines] == [["dataset", "em", "knn", "seconds", "torch", "machine"]] * 2
    assert lines[0]["knn"] == lines[1]["em"] == ""
