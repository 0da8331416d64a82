"""The study's statistics against scipy and the definitions, its file against the committed settings, and one run in miniature."""

import csv
import dataclasses
import inspect
import json
import random
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from kklip_nb.evidence import runner
from kklip_nb.evidence import study as ablation
from kklip_nb.evidence.choices import CHOICES, SCORES, choices_table
from kklip_nb.evidence.study import (COLUMNS, CONTROLS, CORE, DATASETS, ENCODERS, LADDER, PAIRS_ALONE, PLAIN, ROWS, SCENES, SEEDS, STEPS, Difference, Row, compare_rows,
                                     gap_closed, holm, ladder_table, level, load_study, markdown_table, markdown_text, other_words_lines, paired_difference,
                                     plot_differences, points, read_rows, row_recipe, seed_values, settings_hash, star_table, starred, study_table, write_rows)
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


def saved(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("damage, said", [
    (lambda text: text[:-20], "line 4 has not as many cells"), (lambda text: text.rstrip() + ",1\n", "line 4 has not as many cells"), (lambda text: text.replace("settings_hash", "hash", 1), "no column 'settings_hash'"), (lambda text: "", "no column"),
    (lambda text: text.replace(",", ";"), "no column"), (lambda text: text + text.splitlines()[1] + "\n", "line 5: a second line of"), (lambda text: text.replace("openmoji", "emoji"), "no row .* in 'emoji'"),
    (lambda text: text, None), (lambda text: text.replace(",0,", ",zero,", 1), "seed zero was run with other settings")])
def test_a_damaged_file_says_where(tmp_path, lines, damage, said):
    path = saved(tmp_path / "study.csv", [r for r in lines if r["row"] == "CLIP"][:3])
    path.write_text("\ufeff" + damage(path.read_text(encoding="utf-8")), encoding="utf-8")  # as some editors save it
    if said is None: assert len(load_study(path)) == 3
    else:
        with pytest.raises(ValueError, match=f"study.csv.*{said}"): load_study(path)


def test_what_is_no_file_of_text_is_named(tmp_path):
    (tmp_path / "latin.csv").write_bytes("row\ncaf\xe9\n".encode("latin-1"))
    (tmp_path / "folder.csv").mkdir()
    for name in ("latin.csv", "folder.csv"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}"): read_rows(tmp_path / name)
    assert read_rows(tmp_path / "none.csv") == []
    with pytest.raises(ValueError, match="no lines to write into .*new.csv"): write_rows(tmp_path / "new.csv", [])
    write_rows(tmp_path / "new.csv", rows := [dict(a="1, 2", b="two\nlines"), dict(a="é", b="")])
    assert read_rows(tmp_path / "new.csv") == rows and [p.name for p in tmp_path.iterdir() if "new" in p.name] == ["new.csv"]
    with pytest.raises(UnicodeEncodeError): write_rows(tmp_path / "new.csv", [dict(a="1"), dict(a="\ud800")])
    assert read_rows(tmp_path / "new.csv") == rows  # a write that fails half way leaves what was there


def test_the_order_of_the_lines_does_not_matter(lines):
    other = random.Random(0).sample(lines, len(lines))
    assert ladder_table(other) == ladder_table(lines) and study_table(other, list(ROWS)[1:]) == study_table(lines, list(ROWS)[1:])
    with open(ROOT / "results" / "runs-val.csv", encoding="utf-8", newline="") as file: chosen = list(csv.DictReader(file))
    for dataset in SCORES: assert choices_table(random.Random(1).sample(chosen, len(chosen)), dataset) == choices_table(chosen, dataset)


# --- statistics

def test_paired_difference_is_scipy_s():
    rng = np.random.default_rng(0)
    for n in (2, 5, 9):
        a, b = rng.normal(size=(2, n))
        reference = stats.ttest_rel(a, b)
        d, interval = paired_difference(a, b), reference.confidence_interval(0.95)
        assert d == pytest.approx((np.mean(a - b), (interval.high - interval.low) / 2, reference.pvalue))
    assert paired_difference(a, a) == Difference(0.0, 0.0, 1.0)
    small = np.array([1e-9, 3e-9, 2e-9])
    assert paired_difference(small, np.zeros(3)) == pytest.approx((2e-9, stats.t.ppf(0.975, 2) * 1e-9 / 3**0.5, stats.ttest_1samp(small, 0).pvalue)), "small is not nothing"
    with pytest.raises(ValueError, match="NaN"): paired_difference([1.0, float("nan")], [0.0, 1.0])
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


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and holm([0.9, 0.8]).tolist() == [1, 1] and holm([0.04]).tolist() == [0.04]


def test_holm_keeps_false_stars_rare():
    rng = np.random.default_rng(0)
    studies = [holm(stats.ttest_1samp(rng.normal(size=(5, 30)), 0).pvalue).min() < 0.05 for _ in range(300)]
    assert 0.02 < np.mean(studies) < 0.08


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


def test_a_blank_is_missing_a_zero_is_not_and_a_diverged_run_is_named():
    runs = [dict(row="a", dataset="openmoji", seed=s, zero=0.0, blank="" if s == 2 else "1", none=None, nan=float("nan"), diverged="nan") for s in SEEDS]  # as pandas gives them, too
    assert seed_values(runs, "openmoji", "a", "zero").tolist() == [0] * 5
    for metric in ("blank", "none", "nan", "absent", "zero+blank"): assert not len(seed_values(runs, "openmoji", "a", metric))
    with pytest.raises(ValueError, match="diverged of 'a' on openmoji holds NaN"): seed_values(runs, "openmoji", "a", "diverged")


def test_seeds_are_paired_by_number_and_a_row_without_one_is_left_out():
    runs = toy_runs()
    whole = compare_rows(runs, {"KKLIP": "CLIP"}, [("openmoji", "knn_text")])
    by_seed = {(r["row"], r["seed"]): 100 * float(r["knn_text"]) for r in runs}
    differences = [by_seed["KKLIP", str(s)] - by_seed["CLIP", str(s)] for s in range(5)]
    d = whole["KKLIP", "openmoji", "knn_text"]
    assert d.mean == pytest.approx(np.mean(differences)) and d.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert compare_rows(random.Random(2).sample(runs, len(runs)), {"KKLIP": "CLIP"}, [("openmoji", "knn_text")]) == whole
    for lost in (("CLIP", "3"), ("KKLIP", "0")):
        assert compare_rows([r for r in runs if (r["row"], r["seed"]) != lost], {"KKLIP": "CLIP"}, [("openmoji", "knn_text")]) == {}


def test_ranks_are_no_shares():
    runs = [dict(row=n, dataset="openmoji", seed=str(s), t2i_median_rank=str(v + s + (s == 2) * (v - 40) / 10), knn_text="0.5") for n, v in (("CLIP", 40), ("KKLIP", 30)) for s in SEEDS]
    assert [points(m) for m in ("t2i_median_rank", "words_seen_all_median_rank", "knn_text", "em+i2t_r1")] == [1, 1, 100, 100]
    assert compare_rows(runs, {"KKLIP": "CLIP"}, [("openmoji", "t2i_median_rank")])["KKLIP", "openmoji", "t2i_median_rank"].mean == pytest.approx(-10.2)
    assert level(runs, "openmoji", "CLIP", "t2i_median_rank") == "42.0 ± 2.0" and level(runs, "openmoji", "CLIP", "knn_text") == "50.0 ± 0.0"


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
    assert star_table({"one": Difference(-2.04, 1.06, 0.024), "two": Difference(0.0, 0.0, 1.0)}) == {"one": "-2.0 ± 1.1*", "two": "+0.0 ± 0.0"}
    assert starred({"one": Difference(1, 1, 0.049)}) == {"one"} and starred({"one": Difference(1, 1, 0.05)}) == set() == starred({})


def test_a_level_is_scipy_s_interval_in_points():
    runs = toy_runs()
    values = 100 * seed_values(runs, "openmoji", "KKLIP", "knn_text")
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert level(runs, "openmoji", "KKLIP", "knn_text") == f"{values.mean():.1f} ± {(reference.high - reference.low) / 2:.1f}"


def test_a_table_of_differences_leaves_out_what_was_not_run():
    runs = [dict(row=n, dataset="openmoji", seed=str(s), knn_text=str(v + d * s)) for n, v, d in (("CLIP", 0.1, 0.02), ("KKLIP", 0.3, 0.01)) for s in SEEDS]
    assert study_table(runs, ["KKLIP", "k 16"]) == "| | CLIP | KKLIP |\n|---|---|---|\n| kNN, text | 14.0 | +18.0 ± 2.0* |\n"
    assert study_table(runs, ["KKLIP"], dataset="openmoji") == study_table(runs, ["KKLIP"])
    assert study_table(runs, ["CLIP"], base="KKLIP").endswith("| kNN, text | 32.0 | -18.0 ± 2.0* |\n")
    with pytest.raises(ValueError, match="make study"): study_table(runs, ["k 16"])
    with pytest.raises(ValueError, match="beside 'k 16'"): study_table(runs, ["KKLIP"], base="k 16")
    with pytest.raises(ValueError, match="dataset='emoji'"): study_table(runs, ["KKLIP"], dataset="emoji")


def test_a_table_in_markdown():
    assert markdown_table(["", "a"], [["b", "1"], ["", ""]]) == "| | a |\n|---|---|\n| b | 1 |\n| | |\n"


def html_of(text):
    import mistune
    return mistune.create_markdown(plugins=["table", "strikethrough"])(text)


def test_a_name_is_shown_as_it_is_written():
    names = ["a|b", "cost $5 or $6", "*new* `x`", "<b>_x_</b>", "[link](http://x)", "two\nlines", "back\\slash", "&lt;"]
    assert markdown_text("plain name, 2 → 3 (x)") == "plain name, 2 → 3 (x)"
    html = html_of(markdown_table(["", *map(markdown_text, names)], [["x"] * 9]))
    cells = html.split("<th>")[1:]
    assert [re.sub("<[^>]*>", "", c).strip() for c in cells[1:8]] == ["a|b", "cost $5 or $6", "*new* `x`", "&lt;b&gt;_x_&lt;/b&gt;", "[link](http://x)", "two lines", "back\\slash"]
    assert "&amp;lt;" in cells[8] and not re.search(r"<(em|b|code|a)\b", html)
    runs = [dict(row=n, dataset="openmoji", seed=str(s), knn_text=str(v + d * s), **{m: "0.5" for m in STEPS if m != "knn_text"}) for n, v, d in (("CLIP", 0.1, 0.02), ("*new* $|$", 0.3, 0.01)) for s in SEEDS]
    assert study_table(runs, ["*new* $|$"]).splitlines()[0] == r"| | CLIP | \*new\* \$\|\$ |"
    assert ladder_table(runs, ["CLIP", "*new* $|$"]).splitlines()[3].startswith(r"| \*new\* \$\|\$ | 50.0 ± 0.0 |")


def test_a_table_is_of_its_data_set_and_begins_with_the_mean_of_its_base(lines):
    for dataset in DATASETS:
        rows = [line.strip("| ").split(" | ") for line in study_table(lines, ["KKLIP"], "+ first stage", dataset).splitlines()[2:]]
        assert [r[:2] for r in rows] == [[title, f"{100 * np.mean([float(r[m]) for r in lines if (r['dataset'], r['row']) == (dataset, '+ first stage')]):.1f}"]
                                         for (d, m), title in COLUMNS.items() if d == dataset]


def test_a_table_has_as_many_cells_in_each_row():
    assert markdown_table(["a"], [[0]]) == "| a |\n|---|\n| 0 |\n" and markdown_table(["a|b"], [[r"c\|d"]]) == "| a\\|b |\n|---|\n| c\\|d |\n"
    with pytest.raises(ValueError, match="1 cells, .*expected 2"): markdown_table(["a", "b"], [["x"]])


def test_differences_are_drawn_where_they_are():
    columns = {("openmoji", "a"): "costs $5", ("scenes", "b"): "or $6"}
    found = {(n, *c): Difference(10.0 * i + j, 1.0 + i, 0.1) for i, n in enumerate(("one $1", "two", "three")) for j, c in enumerate(columns)}
    figure, ax = plt.subplots()
    plot_differences(found, columns, ax)
    figure.canvas.draw()  # a formula would be an error here
    assert [t.get_text() for t in ax.get_yticklabels()] == [r"costs \$5", r"or \$6"] and ax.yaxis_inverted()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [r"one \$1", "two", "three"]
    for i, drawn in enumerate(ax.containers):
        line, _, (bars,) = drawn
        assert line.get_xdata().tolist() == [10 * i, 10 * i + 1] and np.allclose(line.get_ydata(), [0.16 * (i - 1), 1 + 0.16 * (i - 1)])
        assert np.allclose([s[:, 0] for s in bars.get_segments()], [[9 * i - 1, 11 * i + 1], [9 * i, 11 * i + 2]])
    assert len({c[0].get_color() for c in ax.containers}) == len({c[0].get_marker() for c in ax.containers}) == 3
    for wrong, said in (({}, "0 rows"), ({(str(i), *c): d for i in range(6) for c, d in zip(columns, found.values())}, "6 rows"), (dict(list(found.items())[1:]), "not all with")):
        with pytest.raises(ValueError, match=said): plot_differences(wrong, columns, ax)
    plt.close(figure)


def test_other_words_lines_by_hand():
    measures = ("ap", "r1", "r5", "median_rank", "n")
    cells = {f"words_{scope}_{asked}_{m}": f"{i}{j}{k}" for i, scope in enumerate(("seen", "heldout")) for j, asked in enumerate(("yes", "no", "all")) for k, m in enumerate(measures)}
    runs = [dict(row="KKLIP", seed="3", settings_hash="h") | cells, dict(row="T5", seed="0", settings_hash="g", words_seen_all_ap="")]
    assert other_words_lines(runs) == [
        dict(student="KKLIP", seed="3", split="test", scope=scope, asked=asked, **{m: f"{i}{j}{k}" for k, m in enumerate(measures[:4])}, n=f"{int(f'{i}{j}4')}", settings_hash="h")
        for i, scope in enumerate(("seen", "heldout")) for j, asked in enumerate(("yes", "no", "all"))]


def test_a_choice_is_judged_against_its_base_on_validation_alone():
    rng = np.random.default_rng(0)
    steady, wild = np.array([1, 2, 1, 2, 1.5]), np.array([9, -8, 7, -9, 8.0])
    shift = {"CLIP": 0, "KKLIP": 20, "alpha 0": 20 + steady, "alpha 8": 20 + wild, "CLIP, lr halved": -steady, "CLIP, lr doubled": 20 + steady / 100}
    noise, measures = rng.normal(size=5), ("words_seen_all_ap", "i2t_r5", "t2i_r5")
    runs = [dict(row=n, dataset="openmoji", part="val", seed=str(s)) | {m: f"{(30 + k + noise[s] + np.broadcast_to(v, 5)[s]) / 100:.12f}" for k, m in enumerate(measures)} for n, v in shift.items() for s in SEEDS]
    rows = [line.strip("| ").split(" | ") for line in choices_table(runs, "openmoji").splitlines()]
    assert rows[0] == ["validation", *measures, "their mean", "difference", "to", "interval above 0"]
    half = lambda x: f"{stats.t.ppf(0.975, 4) * x.std(ddof=1) / 5**0.5:.1f}"
    assert {r[0]: r[5:] for r in rows[2:]} == {"CLIP": ["–"] * 3, "KKLIP": ["–"] * 3, "alpha 0": [f"+1.5 ± {half(steady)}", "KKLIP", "yes"], "alpha 8": [f"+1.4 ± {half(wild)}", "KKLIP", "no"],
                                              "CLIP, lr halved": [f"-1.5 ± {half(steady)}", "CLIP", "no"], "CLIP, lr doubled": ["+20.0 ± 0.0", "CLIP", "yes"]}
    assert rows[2][1:4] == [f"{30 + k + noise.mean():.1f}" for k in range(3)] and rows[2][4] == f"{31 + noise.mean():.1f} ± {half(noise)}"
    for wrong in (runs + [dict(runs[0], part="test")], [{k: v for k, v in r.items() if k != "part"} for r in runs]):
        with pytest.raises(ValueError, match="not on 'val'"): choices_table(wrong, "openmoji")
    with pytest.raises(ValueError, match="dataset='emoji'"): choices_table(runs, "emoji")


def test_what_is_tried_and_by_what_it_is_measured():
    assert SCORES == dict(openmoji="words_seen_all_ap+i2t_r5+t2i_r5", scenes="em+i2t_r1+pairs_group")
    assert {n: (r.base, r.datasets) for n, r in CHOICES.items()} == {
        "CLIP": (None, ("openmoji", "scenes")), "KKLIP": (None, ("openmoji", "scenes")), **{n: ("KKLIP", ("openmoji",)) for n in ("first stage, a third", "alpha 0", "alpha 8")},
        **{n: ("CLIP", ("openmoji",)) for n in ("CLIP, lr halved", "CLIP, lr doubled")}, **{n: ("KKLIP", ("scenes",)) for n in ("alpha 0.3", "alpha 3")}}
    clip = PLAIN | PAIRS_ALONE
    assert clip == dict(alpha=0.0, beta=0.0, word_table=False, first_steps=0) and all(r.vectors == "own" for r in CHOICES.values())
    assert {n: r.settings for n, r in CHOICES.items()} == {
        "CLIP": clip, "KKLIP": {}, "first stage, a third": dict(first_steps=LAPTOP.first_steps // 3), "alpha 0": dict(alpha=0.0), "alpha 8": dict(alpha=8.0),
        "CLIP, lr halved": clip | dict(lr=LAPTOP.lr / 2), "CLIP, lr doubled": clip | dict(lr=LAPTOP.lr * 2), "alpha 0.3": dict(alpha=0.3), "alpha 3": dict(alpha=3.0)}


def test_every_field_of_the_recipe_is_in_the_hash_and_in_the_run(monkeypatch):
    other, tried = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2}, 0
    before = settings_hash("KKLIP", "openmoji", 0)
    for field in dataclasses.fields(LAPTOP):
        value = getattr(LAPTOP, field.name)
        if type(value) not in other or field.name == "seed": continue
        row = Row({field.name: other[type(value)](value)})
        try: recipe = row_recipe(row, "openmoji", 0)
        except ValueError: continue  # the recipe has no such value
        monkeypatch.setitem(ablation.ROWS, "KKLIP", row)
        assert getattr(recipe, field.name) == row.settings[field.name] and settings_hash("KKLIP", "openmoji", 0) != before, field.name
        tried += 1
    assert tried > 12


@pytest.mark.parametrize("function, defaults", [
    (compare_rows, dict(columns=tuple(COLUMNS))), (study_table, dict(base="CLIP", dataset=None)), (ladder_table, dict(names=(*LADDER, "three losses on pairs alone", *CONTROLS))),
    (Row, dict(base="CLIP", vectors="own", datasets=("openmoji", "scenes")))])
def test_what_is_done_unless_said_otherwise(function, defaults):
    assert {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty} == defaults


def test_gap_closed():
    assert gap_closed(35.8, 44.4, 52.5) == pytest.approx(8.6 / 16.7)
    assert [gap_closed(0.2, x, 0.7) for x in (0.2, 0.7)] == [0, 1]
    with pytest.raises(ValueError, match="no gap"): gap_closed(0.5, 0.6, 0.5)


# --- one run in miniature

CACHED = ("all_scenes", "texts_of", "allowed_words", "base_material", "word_pairs")


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(runner, "SCENE_COUNT", 200)
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


def test_a_run_fills_every_column_of_its_data_set(small):
    line = small.one_run(task("KKLIP"))
    assert {m for w, m in COLUMNS if w == "scenes"} <= set(line) and {f"group: {c}" for c in ("noun", "relation")} <= set(line)
    scores = {k: float(v) for k, v in line.items() if k.startswith(("em", "edit", "i2t", "t2i", "pairs", "group", "attributes"))}
    assert len(scores) > 20 and all(0 <= v <= 1 for v in scores.values()) and len(set(scores.values())) > 6
    (reader,) = small.cache_dir().glob("t5-*")
    made = reader.stat().st_mtime_ns
    assert float(small.one_run(task("T5"))["em"]) < 0.2, "five steps teach nothing"
    assert [p.stat().st_mtime_ns for p in small.cache_dir().glob("t5-*")] == [made], "the reader is kept"


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
