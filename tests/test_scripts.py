"""The comparison's arithmetic, and that a start without the environment is safe to interrupt."""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


def runs() -> list[dict]:
    with open(ROOT / "results" / "runs.csv", encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def test_the_committed_table_follows_from_the_committed_runs():
    import compare
    table = compare.summarise(runs())
    with open(ROOT / "results" / "comparison.csv", encoding="utf-8", newline="") as file: committed = list(csv.DictReader(file))
    assert [(e["row"], e["metric"], f"{e['mean']:.5f}", f"{e['difference']:.5f}") for e in table] == [
        (c["row"], c["metric"], c["mean"], c["difference"]) for c in committed]


def test_differences_are_paired_by_seed_with_student_s_interval():
    import compare
    table = {(e["row"], e["metric"]): e for e in compare.summarise(runs())}
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
    assert {r["part"] for r in runs()} == {"test"} and len({r["n_test"] for r in runs()}) == 1


def test_the_committed_runs_belong_to_the_committed_recipe():
    import compare
    from kklip_nb.data import split_by_base
    from kklip_nb.training import LAPTOP, recorded_material, run_key
    material = recorded_material(ROOT / "nbs" / "recorded", LAPTOP)
    for run in runs():
        train = split_by_base(material.pairs.bases, int(run["seed"])).train
        assert run["key"] == run_key(compare.recipe_of(run["row"], int(run["seed"])), material.embeddings, train), run["row"]


def test_the_extra_words_share_nothing_with_validation_and_test():
    from kklip_nb.data import base_concept, openmoji_table
    from kklip_nb.training import LAPTOP, recorded_material
    material = recorded_material(ROOT / "nbs" / "recorded", LAPTOP)
    names = {r["caption"].lower() for r in openmoji_table()} | {r["base"] for r in openmoji_table()}
    assert len(material.words) == LAPTOP.words == len(set(material.words))
    for word in material.words:
        assert not {word, word + "s", re.sub("s$", "", word)} & names and base_concept(word) not in names, word
