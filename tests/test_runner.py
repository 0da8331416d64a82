"""Which rows, splits, seeds and material each run of the study reads: the parts are replaced by ones that note what they are given."""

import csv
import dataclasses
import inspect
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from joblib import parallel_config
from sklearn.metrics import average_precision_score

from kklip_nb.data import Pairs, Split
from kklip_nb.evidence import runner as R
from kklip_nb.evidence import text_probe
from kklip_nb.evidence.one_word import WordPair
from kklip_nb.evidence.scenes import Scene, Thing
from kklip_nb.evidence.study import Row
from kklip_nb.recipe import LAPTOP
from kklip_nb.student import WordTable
from kklip_nb.training import Material

SPLITS = {0: Split(np.array([0, 5, 7]), np.array([1, 6]), np.array([2, 3, 4])), 1: Split(np.array([0, 2, 4]), np.array([5]), np.array([1, 3, 6, 7]))}
SPLITS[2] = SPLITS[0]
CAPTIONS = [f"caption {c}" for c in "abcdefgh"]
FEATURES = np.arange(16.0).reshape(8, 2)
RUN = SimpleNamespace(student="the student", image_features=FEATURES, text_features=FEATURES + 100)


class Notes(list):
    "What was called with what, by the names of the parameters."

    def spy(self, name, answer=None):
        shape = inspect.signature(getattr(R, name))
        def call(*args, **kwargs):
            bound = shape.bind(*args, **kwargs)
            bound.apply_defaults()
            self.append((name, bound.arguments))
            return answer(*args, **kwargs) if callable(answer) else answer
        return call

    def of(self, name): return [given for called, given in self if called == name]


@pytest.fixture
def notes(monkeypatch):
    "A way to replace parts of the runner; what depends on a seed is split by it."
    notes = Notes()
    notes.put = lambda **answers: [monkeypatch.setattr(R, name, notes.spy(name, answer)) for name, answer in answers.items()]
    notes.put(split_of=lambda dataset, seed: SPLITS[seed])
    return notes


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(R, "READER", dict(t5_steps=5, t5_lr=3e-3, probe_steps=7, probe_lr=1e-2, batch_size=16, word_pairs=2))
    monkeypatch.setattr(R, "SCENE_COUNT", 8)
    monkeypatch.setitem(R.SCENES, "words", 3)


def scene(noun, kind="object"): return Scene(kind, (Thing(noun),))


NOUNS = "anchor balloon banana bell bicycle bird bus cactus candle carrot cat chair crown dog fish frog ghost guitar horse house key mushroom pizza rabbit".split()


def same(found, wanted): return np.array_equal(np.asarray(found), np.asarray(wanted))


# --- scores

@pytest.mark.parametrize("seed, part", [(0, "val"), (1, "val"), (0, "test"), (1, "test")])
def test_a_student_of_scenes_is_scored_on_the_rows_of_its_part(notes, small, seed, part):
    notes.put(student_encoder=lambda s: f"encoder of {s}", retrieval_recall=dict(i2t_r1=0.1, t2i_r1=0.2), pair_metrics=dict(pairs_group=0.3),
              probe_metrics=dict(em_val=0.4) | (dict(em=0.5) if part == "test" else {}), all_scenes=[*NOUNS], scene_attributes="attributes", attribute_metrics=dict(attributes=0.6))
    found = R.score_scenes(RUN, seed, part)
    rows = getattr(SPLITS[seed], part)
    (recall,), (pairs,), (probe,) = notes.of("retrieval_recall"), notes.of("pair_metrics"), notes.of("probe_metrics")
    assert same(recall["image_features"], FEATURES[rows]) and same(recall["text_features"], FEATURES[rows] + 100) and recall["ks"] == (1,)
    assert list(pairs.values()) == ["the student", part, seed]
    assert list(probe.values()) == ["encoder of the student", seed, ("val",) if part == "val" else ("val", "test")]
    if part == "val": assert found == dict(em_val=0.4, em=0.4, i2t_r1=0.1, t2i_r1=0.2, pairs_group=0.3) and not notes.of("attribute_metrics")
    else:
        assert found == dict(em_val=0.4, em=0.5, i2t_r1=0.1, t2i_r1=0.2, pairs_group=0.3, attributes=0.6)
        (given,) = notes.of("attribute_metrics")
        assert given["encode"] == "encoder of the student" and given["attributes"] == "attributes" and given["split"] is SPLITS[seed] and same(given["images"], FEATURES)
        assert notes.of("scene_attributes")[0]["scenes"] == NOUNS[:8], "the scenes with pictures"


@pytest.mark.parametrize("seed, part", [(0, "val"), (1, "val"), (0, "test"), (1, "test")])
def test_a_student_of_openmoji_is_scored_on_the_rows_of_its_part(notes, seed, part):
    pairs = Pairs(None, CAPTIONS, CAPTIONS, None, [*"ppqqrrss"])
    queries = SimpleNamespace(words=["w", "v"])
    notes.put(base_material=SimpleNamespace(pairs=pairs), student_encoder=lambda s: lambda texts: (s, tuple(texts)), evaluate=dict(i2t_r5=0.1), _queries=(queries, {}),
              student_scores=lambda asked, images: ("scores", asked, images), other_words_metrics=dict(words=0.2), openmoji_attributes="attributes",
              seen_metrics=dict(seen=0.3), attribute_metrics=dict(attributes=0.4))
    found = R.score_openmoji(RUN, seed, part)
    split = SPLITS[seed]
    (given,), (words,), (asked,) = notes.of("evaluate"), notes.of("other_words_metrics"), notes.of("student_scores")
    images, texts, encode, classes, train, rows = given.values()
    assert same(images, FEATURES) and same(texts, FEATURES + 100) and encode("x") == ("the student", ("x",)) and classes == [*"ppqqrrss"]
    assert same(train, split.train) and same(rows, getattr(split, part)) and words["seed"] == seed and words["part"] == part
    assert asked["query_features"] == ("the student", ("w", "v")) and same(asked["features"], FEATURES)
    if part == "val": assert found == dict(i2t_r5=0.1, words=0.2) and not notes.of("attribute_metrics")
    else:
        assert found == dict(i2t_r5=0.1, words=0.2, seen=0.3, attributes=0.4)
        (seen,), (attributes,), (of,) = notes.of("seen_metrics"), notes.of("attribute_metrics"), notes.of("openmoji_attributes")
        assert same(of["pairs"].captions, CAPTIONS) and same([*of.values()][1], split.train)
        assert same(seen["rows"], split.test) and seen["split"] is split and same(seen["how"][0], FEATURES)
        assert attributes["split"] is split and same(attributes["images"], FEATURES) and attributes["attributes"] == "attributes"


def test_attributes_are_fitted_on_training_rows_and_scored_on_test_rows(notes, rng):
    names, truth = ["a", "b"], rng.random((8, 2)) < 0.5
    truth[:, 0], truth[:, 1] = np.arange(8) % 2 == 0, np.isin(np.arange(8), [0, 3, 5])
    images, texts = rng.normal(size=(8, 3)), rng.normal(size=(2, 3))
    probed = rng.normal(size=(3, 2))
    notes.put(linear_probe=probed)
    encode = lambda some: texts if some == names else None
    found = R.attribute_metrics(encode, images, SimpleNamespace(names=names, values=truth), SPLITS[0])
    (given,) = notes.of("linear_probe")
    train, test = SPLITS[0].train, SPLITS[0].test
    for got, wanted in zip(given.values(), (images[train], truth[train], images[test])): assert same(got, wanted)
    cosine = (images / np.linalg.norm(images, axis=1, keepdims=True)) @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    mean_ap = lambda scores: np.mean([average_precision_score(truth[test][:, i], scores[:, i]) for i in range(2)])
    assert found["attributes"] == pytest.approx(mean_ap(cosine[test])) and found["attributes_probe"] == pytest.approx(mean_ap(probed))
    assert set(found) == {"attributes", "attributes_chance", "attributes_probe"} and found["attributes_chance"] != found["attributes"]


@pytest.mark.parametrize("part", ["val", "test"])
def test_other_words_are_asked_among_seen_and_among_held_out_pictures(notes, part):
    notes.put(_queries=("queries", dict(val=[10, 11], test=[12])))
    def score(rows, pictures): return [dict(asked=a, ap=str((rows, pictures.tolist())), n=a) for a in ("yes", "all")]
    found = R.other_words_metrics(score, 1, part)
    rows, held_out = ([10, 11], [5]) if part == "val" else ([12], [1, 3, 6, 7])
    assert found == {f"words_{scope}_{a}_{k}": v for scope, where in (("seen", [0, 2, 4]), ("heldout", held_out)) for a in ("yes", "all")
                     for k, v in (("ap", str((rows, where))), ("n", a))}


def toy_queries(): return SimpleNamespace(words=["asked", "not asked", "nowhere"], right=np.array([[1, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0], [0] * 8], bool))


def test_a_query_is_scored_by_features_and_knows_whether_the_teacher_was_asked(notes):
    notes.put(_queries=(toy_queries(), {}), texts_of=dict(words=["asked"]), other_words_scores="lines")
    assert R.student_scores("queries", "pictures")("rows", "some") == "lines"
    (given,) = notes.of("other_words_scores")
    assert [*given.values()][:2] == ["queries", "pictures"] and [*given.values()][3:] == ["rows", "some", {"asked"}]
    assert given["queries"].words == toy_queries().words and notes.of("texts_of")[0]["dataset"] == "openmoji"


def test_guessing_in_other_words_has_its_closed_form(notes):
    notes.put(_queries=(toy_queries(), {}), texts_of=dict(words=["asked"]))
    lines = {line["asked"]: line for line in R._chance_lines(np.array([0, 1, 2]), np.array([0, 1, 2, 3]))}
    assert [lines[a]["n"] for a in ("yes", "no", "all")] == [1, 1, 2], "a query without a right picture is not asked"
    two_of_four = np.mean([1, 1, (1 / 1 + 2 / 4) / 2, (1 / 2 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2, (1 / 3 + 2 / 4) / 2]) - (1 - (1 + 2 / 3) / 2) / 6
    assert lines["no"]["r1"] == pytest.approx(1 / 4) and lines["yes"]["r1"] == pytest.approx(1 / 2)
    assert lines["no"]["ap"] == pytest.approx(np.mean([1, 1 / 2, 1 / 3, 1 / 4])) and lines["yes"]["ap"] == pytest.approx(two_of_four)


def test_the_teacher_s_vectors_are_centred_on_training_captions_and_guessing_knows_the_classes(notes, rng):
    queries, pairs = rng.normal(size=(3, 4)), rng.normal(size=(8, 4))
    notes.put(teacher_vectors=lambda dataset, which, part: dict(queries=queries, pairs=pairs)[part], student_scores="score", other_words_metrics=dict(x=1),
              base_material=SimpleNamespace(pairs=SimpleNamespace(subcategories=[*"ppqqrrss"])), chance_levels=dict(y=2))
    assert R.other_words_reference("teacher", 1) == dict(x=1)
    (given,) = notes.of("student_scores")
    mean = pairs[[0, 2, 4]].mean(0)
    for got, raw in zip(given.values(), (queries, pairs)):
        np.testing.assert_allclose(got, (raw - mean) / np.linalg.norm(raw - mean, axis=1, keepdims=True), atol=1e-6)
    assert {(g["dataset"], g["which"]) for g in notes.of("teacher_vectors")} == {("openmoji", "own")}
    assert R.other_words_reference("chance", 0) == dict(x=1, y=2)
    assert [(g["score"], g["seed"], g["part"]) for g in notes.of("other_words_metrics")] == [("score", 1, "test"), (R._chance_lines, 0, "test")]
    classes, test, train = notes.of("chance_levels")[0].values()
    assert classes == [*"ppqqrrss"] and same(test, SPLITS[0].test) and same(train, SPLITS[0].train)


def test_retrieval_by_words_seen_against_a_loop(notes):
    captions = ["a dog", "a cat", "a cow", "big dog", "new thing", "dog a", "x", "big"]
    items = {m: np.array([0.25, 0.5, 1.0]) + i for i, m in enumerate(("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5"))}
    notes.put(item_scores=items)
    found = R.seen_metrics(("images", "texts", "encode", "classes", "train"), SimpleNamespace(captions=captions), SPLITS[0], np.array([2, 3, 4]))
    # trained on: a dog, dog a, big; so of a cow some, of big dog all, of new thing none
    assert found == {f"{m}_{s}": v[i] for m, v in items.items() for s, i in (("some", 0), ("all", 1), ("none", 2))}
    assert [*notes.of("item_scores")[0].values()][:5] == ["images", "texts", "encode", "classes", "train"] and same([*notes.of("item_scores")[0].values()][5], [2, 3, 4])


@pytest.mark.parametrize("part, seed, asked", [("val", 1, 1), ("test", 1, 0)])
def test_pairs_of_the_test_are_the_same_for_all_seeds(notes, part, seed, asked):
    pairs = [WordPair(c, None, None) for c in ("noun", "colour", "noun", "colour")]
    scores = dict(text=np.array([1, 0, 1, 1.0]), image=np.array([0, 0, 0, 1.0]), group=np.array([0.5, 0, 1, 0.25]))
    notes.put(word_pairs=(pairs, "pictures"), cached_trunk_features=lambda student, pictures: (student, pictures), score_pairs=scores)
    found = R.pair_metrics("student", part, seed)
    assert found == {"pairs_text": 0.75, "pairs_image": 0.25, "pairs_group": 0.4375, "group: noun": 0.75, "group: colour": 0.125}
    assert list(notes.of("word_pairs")[0].values()) == [part, asked]
    assert list(notes.of("score_pairs")[0].values()) == ["student", pairs, ("student", "pictures")]


@pytest.mark.parametrize("part, held_out", [("val", [5]), ("test", [1, 3, 6, 7])])
def test_pairs_start_from_held_out_scenes_and_hold_no_other_caption(notes, small, part, held_out, monkeypatch):
    scenes = [scene(n) for n in NOUNS]
    pairs = [WordPair("noun", scene("dog"), scene("cat")), WordPair("noun", scene("key"), scene("bus"))]
    notes.put(all_scenes=scenes, one_word_pairs=pairs, split_scenes=lambda s, seed, *_: SPLITS[seed], draw_scene=lambda s: np.array([NOUNS.index(s.things[0].noun)]))
    found, pictures = R.word_pairs.__wrapped__(part, 1)
    (given,), (split,) = notes.of("one_word_pairs"), notes.of("split_scenes")
    assert found == pairs and pictures.ravel().tolist() == [NOUNS.index(n) for n in ("dog", "cat", "key", "bus")]
    assert given["scenes"] == [scenes[i] for i in held_out] and given["each"] == 2 and given["seed"] == 0
    article = lambda n: f"{'an' if n[0] in 'aeiou' else 'a'} {n}"
    assert set(given["seen"]) == {article(NOUNS[i]) for i in range(8) if i not in held_out}
    assert split["scenes"] == scenes[:8] and split["seed"] == 1


# --- reading captions back

def captions_of_parts(seed): return [[CAPTIONS[i] for i in part] for part in SPLITS[seed]]


@pytest.mark.parametrize("own", [False, True])
def test_the_probe_learns_from_training_captions_and_each_part_is_scored_by_itself(notes, small, own):
    kinds = [f"kind {i % 3}" for i in range(8)]
    def read(texts): return [t if t in ("caption b", "caption c", "caption d") else t + " and more" for t in texts]
    notes.put(texts_of=dict(pairs=CAPTIONS), reader=lambda seed: f"reader {seed}", autoencode=lambda t5, texts: read(texts), all_scenes=[scene("dog", k) for k in kinds],
              probe_captions=lambda t5, encode, train, test, **how: read(test))
    encode = None if own else "encode"
    found = R.probe_metrics(encode, 0)
    # validation: b and g; test: c, d and e, of the kinds 2, 0 and 1
    assert found == {"em_val": 0.5, "em": pytest.approx(2 / 3), "edit": pytest.approx(1 / 3 * 2 / 4), "em: kind 2": 1.0, "em: kind 0": 1.0, "em: kind 1": 0.0}
    train, val, test = captions_of_parts(0)
    if own: assert list(notes.of("autoencode")[0].values()) == ["reader 0", val + test]
    else:
        given = dict(notes.of("probe_captions")[0])
        assert given.pop("settings") == dict(steps=7, batch_size=16, lr=1e-2, seed=0)
        assert list(given.values()) == ["reader 0", "encode", train, val + test]
    assert R.probe_metrics(encode, 1, ("val",)) == dict(em_val=0.0), "f is not read"
    if not own: assert notes.of("probe_captions")[-1]["settings"]["seed"] == 1 and notes.of("probe_captions")[-1]["test"] == ["caption f"]


def test_what_each_encoder_without_training_is(notes, small):
    notes.put(texts_of=dict(pairs=CAPTIONS), probe_metrics=lambda encode, seed: (encode, seed), build_student=lambda *_, **how: how, student_encoder=lambda s: ("encoder", s),
              bag_of_words=lambda captions: ("bag", captions), lookup=lambda vectors, captions: (vectors, captions), other_words_reference=lambda name, seed: (name, seed),
              teacher_vectors=lambda *given: given)
    ask = lambda name, seed: R.score_encoder("scenes", name, seed)
    assert ask("T5", 1) == (None, 1)
    assert ask("random encoder", 1) == (("encoder", dict(imagenet=False, seed=1)), 1)
    assert ask("bag of words", 1) == (("bag", [CAPTIONS[i] for i in (0, 2, 4)]), 1)
    for name, which in (("teacher", "own"), ("teacher, other pooling", "other pooling"), ("MiniLM", "minilm")):
        assert ask(name, 0) == ((("scenes", which, "pairs"), CAPTIONS), 0)
    assert R.score_encoder("openmoji", "chance", 1) == ("chance", 1)


class Piece:
    def __init__(self, text): self.text = text
    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.text).write_text(self.text)


def test_the_reader_never_sees_a_held_out_caption_and_is_kept_by_all_that_it_reads(notes, small, monkeypatch, tmp_path):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    broken = []
    def build(captions, name=None, seed=0, device="cpu"):
        if broken and name: raise ValueError("cannot load T5 at all")
        return Piece("model"), Piece("tokenizer")
    monkeypatch.setattr(R, "scene_caption", lambda s: s)
    notes.put(all_scenes=[*CAPTIONS, "more", "caption c", "still more"], build_autoencoder=build, train_autoencoder=[])
    R.reader(0)
    (built,), (trained,) = notes.of("build_autoencoder"), notes.of("train_autoencoder")
    assert built["captions"] == trained["captions"] == ["caption a", "caption f", "caption h", "more", "still more"] and built["name"] is None and built["seed"] == 0
    assert [trained[k] for k in ("steps", "batch_size", "lr", "seed")] == [5, 16, 3e-3, 0]
    R.reader(0)
    again = notes.of("build_autoencoder")[-1]
    assert len(notes.of("train_autoencoder")) == 1 and sorted(p.name for p in tmp_path.joinpath(again["name"]).iterdir()) == ["model", "tokenizer"]
    R.reader(1)
    assert len(notes.of("train_autoencoder")) == 2 and notes.of("train_autoencoder")[-1]["seed"] == 1 and notes.of("build_autoencoder")[-1]["seed"] == 1
    R.reader(2)
    assert len(notes.of("train_autoencoder")) == 3, "of the same captions, but of another seed"
    for name, value in (("t5_steps", 6), ("t5_lr", 1e-3), ("batch_size", 8)):
        before = len(notes.of("train_autoencoder"))
        monkeypatch.setitem(R.READER, name, value)
        R.reader(0)
        assert len(notes.of("train_autoencoder")) == before + 1, name
    broken.append(True)
    folder = tmp_path / notes.of("build_autoencoder")[1]["name"]
    for damage in (lambda: (folder / "model").unlink(), lambda: (folder / "model").write_text("")):
        monkeypatch.setattr(R, "READER", dict(t5_steps=5, t5_lr=3e-3, probe_steps=7, probe_lr=1e-2, batch_size=16, word_pairs=2))
        damage()
        with pytest.warns(UserWarning, match="cannot load T5 at all; it is trained again"): R.reader(0)
        assert (folder / "model").read_text() == "model" and not list(tmp_path.glob("tmp*"))


# --- material

def test_texts_are_cut_at_the_number_of_pictures(notes, small):
    notes.put(all_scenes=[scene(n) for n in NOUNS])
    texts = R.texts_of.__wrapped__("scenes")
    assert [len(texts[k]) for k in ("pairs", "words")] == [8, 3] and texts["pairs"][0] == "an anchor" and texts["words"] == ["a candle", "a carrot", "a cat"]
    pairs = SimpleNamespace(captions=CAPTIONS)
    notes.put(base_material=SimpleNamespace(pairs=pairs, words=["w"]), load_queries=SimpleNamespace(words=["q"]))
    assert R.texts_of.__wrapped__("openmoji") == dict(pairs=CAPTIONS, words=["w"], queries=["q"]) and notes.of("load_queries")[0]["pairs"] is pairs


def test_as_many_scenes_again_and_the_same_ones_always(notes, small):
    notes.put(make_scenes="scenes")
    assert R.all_scenes.__wrapped__() == "scenes" and list(notes.of("make_scenes")[0].values()) == [24, 0]


@pytest.mark.parametrize("dataset, which, how", [
    ("openmoji", "own", dict(pooling="last", layer=29, prompt=LAPTOP.prompt)), ("openmoji", "other pooling", dict(pooling="mean", layer=-1, prompt="{}")),
    ("scenes", "own", dict(pooling="mean", layer=-1, prompt="{}")), ("scenes", "other pooling", dict(pooling="last", layer=29, prompt=LAPTOP.prompt)),
    ("scenes", "minilm", dict(pooling="mean", layer=-1, prompt="{}")), ("openmoji", "minilm", dict(pooling="mean", layer=-1, prompt="{}"))])
def test_how_the_teacher_reads(notes, dataset, which, how):
    notes.put(texts_of=dict(pairs=["p"], words=["w"]), cached_embeddings="vectors", packaged_source="smollm2 sha", _minilm="folder", load_teacher=lambda *given: given)
    assert R.teacher_vectors.__wrapped__(dataset, which, "words") == "vectors"
    (given,), (asked,) = notes.of("cached_embeddings"), notes.of("texts_of")
    assert given["captions"] == ["w"] and asked["dataset"] == dataset and {k: given[k] for k in how} == how and "{}" in how["prompt"]
    assert given["source"] == ("all-MiniLM-L6-v2 0.1.0" if which == "minilm" else "smollm2 sha")
    assert given["get_teacher"]() == (("folder",) if which == "minilm" else ())


def test_the_material_of_the_course_is_what_its_recipe_asks_for(notes):
    pairs = Pairs(None, ["a dog", "a cat"], ["dog", "cat"], None, ["animal", None])
    recipe = dataclasses.replace(LAPTOP, words=7, pooling="mean", layer=-3, prompt="say {}")
    notes.put(load_openmoji=pairs, load_words=["climb"], packaged_source="smollm2 sha", load_teacher=lambda name: SimpleNamespace(source=f"{name} sha"),
              cached_embeddings=lambda texts, *_, **__: ("vectors", texts), cached_word_table="table")
    found = R.load_material(recipe)
    assert found == Material(pairs, ("vectors", ["a dog", "a cat"]), ["climb"], ("vectors", ["climb"]), "table")
    assert list(notes.of("load_words")[0].values())[:2] == [7, {"a dog", "a cat", "dog", "cat"}]
    for given in notes.of("cached_embeddings"): assert [given[k] for k in ("source", "pooling", "layer", "prompt")] == ["smollm2 sha", "mean", -3, "say {}"]
    texts, teacher, source = notes.of("cached_word_table")[0].values()
    assert texts[:3] == ["a dog", "a cat", "climb"] and texts[3:] == [t.format("animal") for t in R.TEMPLATES] and source == "smollm2 sha"
    assert not notes.of("load_teacher") and teacher().source == "smollm2 sha" and len(notes.of("load_teacher")) == 1, "loaded only when asked for"
    R.load_material(dataclasses.replace(recipe, teacher="another"))
    assert notes.of("load_teacher")[-1]["name"] == "another" and notes.of("cached_word_table")[-1]["source"] == "another sha"


def test_the_word_table_is_kept_by_teacher_and_texts_and_made_again_where_it_is_damaged(notes, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    once = cache(R.open_clip.SimpleTokenizer)
    monkeypatch.setattr(R.open_clip, "SimpleTokenizer", lambda context_length: once(context_length=context_length))
    notes.put(input_embeddings=lambda teacher, texts: np.arange(4 * len(texts), dtype=np.float32).reshape(-1, 4),
              make_word_table=lambda ids, vectors, *_: WordTable(ids, vectors + 0.0001), load_teacher="teacher")
    ask = lambda texts=("a dog",), source="one": R.cached_word_table(texts, lambda: "teacher", source)
    first = ask()
    assert first.vectors.dtype == np.float32 and same(first.vectors, (np.arange(4 * len(first.ids)).reshape(-1, 4) + 0.0001).astype(np.float16))
    assert first.ids.tolist() == sorted(first.ids.tolist()) and 1929 in first.ids, "open_clip's token of 'dog'"
    made = lambda: len(notes.of("make_word_table"))
    assert same(ask().vectors, first.vectors) and made() == 1
    ask(source="two"), ask(texts=("a cat",))
    assert made() == 3
    from safetensors import safe_open
    (path,) = [p for p in tmp_path.glob("words-*") if 1929 in safe_open(p, "np").get_tensor("ids") and safe_open(p, "np").metadata()["teacher"] == "one"]
    whole = path.read_bytes()
    for damaged in (b"", whole[:30], whole[:-8], b"version https://git-lfs"):
        path.write_bytes(damaged)
        before = made()
        assert same(ask().vectors, first.vectors) and made() == before + 1


@pytest.fixture
def toy(notes, rng):
    "Eight pairs, six words, vectors of their own; words 2 and 5 have the words of test pair 2 and of validation pair 1."
    captions = ["dog a", "cat a", "cow red", "a hen", "a pig", "a red dog", "big", "a"]
    words = ["climb", "a dog", "red cow", "walk fast", "walk", "a cat"]
    vectors = dict(pairs=rng.normal(size=(8, 5)).astype(np.float32), words=rng.normal(size=(6, 5)).astype(np.float32))
    other = {k: v + 50 for k, v in vectors.items()}
    material = Material(Pairs(None, captions, captions, None, None), vectors["pairs"], words, None, "table")
    notes.put(base_material=material, texts_of=dict(pairs=captions, words=words), teacher_vectors=lambda dataset, which, part: (vectors if which == "own" else other)[part])
    R.allowed_words.cache_clear()
    yield SimpleNamespace(captions=captions, words=words, vectors=vectors, other=other, material=material)
    R.allowed_words.cache_clear()


def test_words_of_held_out_scenes_are_left_out_and_of_openmoji_none(toy):
    assert R.allowed_words("scenes", 0).tolist() == [0, 1, 3, 4]
    R.allowed_words.cache_clear()
    assert R.allowed_words("scenes", 1).tolist() == [0, 1, 2, 3, 4] and R.allowed_words("openmoji", 0).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("vectors", ["own", "other pooling", "minilm", "shuffled", "surface", "bag of words"])
def test_a_control_changes_the_vectors_that_it_names_and_nothing_else(toy, vectors):
    pairs, words = R.row_vectors(Row({}, vectors=vectors), "openmoji", 3, ["pairs", "words"])
    assert pairs.shape == (8, 5) and words.shape == (6, 5)
    if vectors in ("own", "other pooling", "minilm"):
        wanted = toy.vectors if vectors == "own" else toy.other
        assert same(pairs, wanted["pairs"]) and same(words, wanted["words"])
    if vectors == "shuffled":
        random = np.random.default_rng([3, 1])
        assert same(pairs, toy.vectors["pairs"][random.permutation(8)]) and same(words, toy.vectors["words"][random.permutation(6)])
    if vectors == "bag of words":
        known = sorted({w for t in toy.captions + toy.words for w in t.split()})
        matrix = np.random.default_rng([3, 2]).normal(size=(len(known), 5))
        counts = lambda texts: np.array([[t.split().count(w) for w in known] for t in texts])
        np.testing.assert_allclose(pairs, counts(toy.captions) @ matrix, atol=1e-5)
        np.testing.assert_allclose(words, counts(toy.words) @ matrix, atol=1e-5)
    if vectors == "surface": assert same(words, R.surface_form(toy.words, 5)) and same(pairs, R.surface_form(toy.captions, 5))
    material = R.row_material(Row({}, vectors=vectors), "openmoji", 3)
    assert material.pairs is toy.material.pairs and material.word_table == "table" and same(material.embeddings, pairs)
    assert material.words == toy.words and same(material.word_embeddings, words)
    (alone,) = R.row_vectors(Row({}, vectors=vectors), "openmoji", 3, ["pairs"])
    assert same(alone, pairs)


def test_spelling_is_pieces_of_two_to_four_letters_within_words():
    a, b, c, d = R.surface_form(["cat", "cat cat", "tac", "x cat"], 4096)
    assert same(a != 0, b != 0) and (a != 0).sum() == 9, "' c', 'ca', 'at', 't ', ' ca', 'cat', 'at ', ' cat', 'cat '"
    assert not np.array_equal(a, c) and (d != 0).sum() > (a != 0).sum() and np.linalg.norm(a) == pytest.approx(1)


def test_a_first_stage_reads_allowed_words_alone_and_a_run_without_reads_none(toy):
    scenes = R.row_material(Row({}), "scenes", 0)
    assert scenes.words == [toy.words[i] for i in (0, 1, 3, 4)] and same(scenes.word_embeddings, toy.vectors["words"][[0, 1, 3, 4]])
    without = R.row_material(Row(dict(first_steps=0)), "scenes", 0)
    assert len(without.words) == len(without.word_embeddings) == 1 and same(without.embeddings, toy.vectors["pairs"])


def test_scenes_are_made_from_the_teacher_s_vectors_of_their_captions(notes, small):
    notes.put(all_scenes=[scene(n) for n in NOUNS], teacher_vectors=lambda *given: given, texts_of=dict(words=["w"]), load_material="openmoji's",
              scene_material=lambda scenes, vectors, *_: Material(scenes, vectors, ["x"], None, None))
    found = R.base_material.__wrapped__("scenes")
    assert found.pairs == [scene(n) for n in NOUNS[:8]] and found.embeddings == ("scenes", "own", "pairs") and found.words == ["w"]
    assert R.base_material.__wrapped__("openmoji") == "openmoji's" and notes.of("load_material")[0]["recipe"] == LAPTOP


def test_a_split_is_of_its_data_set_and_seed(small, monkeypatch):
    monkeypatch.setattr(R, "base_material", lambda dataset: SimpleNamespace(pairs=SimpleNamespace(bases=["base"])))
    monkeypatch.setattr(R, "split_by_base", lambda bases, seed: (bases, seed))
    monkeypatch.setattr(R, "split_scenes", lambda scenes, seed: (scenes, seed))
    monkeypatch.setattr(R, "all_scenes", lambda: [*NOUNS])
    assert R.split_of("openmoji", 4) == (["base"], 4) and R.split_of("scenes", 3) == (NOUNS[:8], 3)


# --- one run, and many

@pytest.fixture
def lists(monkeypatch):
    rows = {"a": Row(dict(lr=0.1), None), "b": Row(dict(alpha=2.0, first_steps=0), "a", "shuffled", ("openmoji",)), "b, last": Row(dict(train_image="last"))}
    for study in ("choose", "study"): monkeypatch.setitem(R.LISTS, study, (rows, *R.LISTS[study][1:]))
    monkeypatch.setattr(R, "ROWS", rows)
    return rows


@pytest.mark.parametrize("study, dataset, name", [("choose", "openmoji", "b"), ("choose", "scenes", "a"), ("study", "openmoji", "b"), ("study", "scenes", "a"), ("study", "scenes", "T5")])
def test_a_line_says_what_was_run_and_with_which_settings(notes, lists, study, dataset, name):
    part = dict(choose="val", study="test")[study]
    notes.put(key_of="the key", settings_hash=lambda *given: str(given), score_encoder=dict(em=0.25), run_recipe="the run", row_material=lambda row, *where: (row, *where),
              score_scenes=dict(i2t_r1=1 / 3), score_openmoji=dict(i2t_r5=2 / 3))
    line = R.one_run(R.Task(study, dataset, name, 1))
    assert [line.pop(k) for k in ("dataset", "row", "seed", "key")] == [dataset, name, 1, "the key"]
    if study == "study": assert line.pop("settings_hash") == str((name, dataset, 1))
    else: assert [line.pop(k) for k in ("part", "n_rows")] == ["val", 1]
    if name == "T5": assert line.pop("em") == "0.25000" and list(notes.of("score_encoder")[0].values()) == ["scenes", "T5", 1] and not notes.of("run_recipe")
    else:
        row = lists[name]
        assert json.loads(line.pop("settings")) == row.settings | dict(vectors=row.vectors)
        scored, other = ("score_scenes", "score_openmoji") if dataset == "scenes" else ("score_openmoji", "score_scenes")
        assert list(notes.of(scored)[0].values()) == ["the run", 1, part] and not notes.of(other)
        assert line.pop("i2t_r1" if dataset == "scenes" else "i2t_r5") == ("0.33333" if dataset == "scenes" else "0.66667")
        (run,) = notes.of("run_recipe")
        of_data = R.SCENES if dataset == "scenes" else {}
        assert run["recipe"] == dataclasses.replace(LAPTOP, seed=1, **of_data | row.settings)
        assert run["material"] == (row, dataset, 1) and same([*run.values()][2], SPLITS[1].train)
    assert list(line) == ["seconds", "torch", "open_clip", "transformers", "machine"]


def test_a_key_changes_with_all_that_a_run_reads(notes, lists, small, monkeypatch, toy):
    monkeypatch.setattr(R, "row_material", lambda row, dataset, seed: Material(toy.material.pairs, toy.vectors["pairs"] + len(row.vectors), [], toy.vectors["words"], WordTable([1], np.ones((1, 2)))))
    task = R.Task("study", "scenes", "a", 0)
    others = [task, task._replace(seed=1), task._replace(name="T5"), task._replace(name="MiniLM"), task._replace(study="choose"),
              R.Task("study", "openmoji", "a", 0), R.Task("study", "openmoji", "b", 0), R.Task("study", "openmoji", "chance", 0)]
    keys = [R.key_of(t) for t in others]
    assert len(set(keys)) == len(keys) and keys == [R.key_of(t) for t in others] and all(len(k) == 16 for k in keys)
    def moved(change):
        with monkeypatch.context() as patch:
            change(patch)
            return [a != b for a, b in zip(keys, map(R.key_of, others))]
    of_scenes, trained = [True] * 5 + [False] * 3, [True, True, False, False, True, True, True, False]
    assert moved(lambda p: p.setattr(R, "SCENE_COUNT", 9)) == of_scenes and moved(lambda p: p.setitem(R.READER, "probe_lr", 1.0)) == of_scenes
    assert moved(lambda p: p.setattr(R, "LAPTOP", dataclasses.replace(LAPTOP, words=3)))[5:] == [True] * 3
    assert moved(lambda p: p.setitem(lists, "a", Row(dict(lr=0.2), None))) == [True, True, False, False, True, True, False, False]
    assert moved(lambda p: p.setitem(toy.vectors, "pairs", toy.vectors["pairs"] + 1)) == trained
    assert moved(lambda p: p.setattr(R, "split_of", lambda *_: SPLITS[1])) == [True, False, False, False, True, True, True, False]


@pytest.fixture
def together(monkeypatch, lists):
    "Runs in this process, which say how often they were done; keys are of the rows' settings."
    ran = []
    monkeypatch.setattr(R, "key_of", lambda t: f"{lists[t.name].settings}" if t.name in lists else t.name)
    def pretend(t):
        ran.append(t[1:])
        return dict(dataset=t.dataset, row=t.name, seed=t.seed, key=R.key_of(t), em=f"{len(ran)}") | (dict(knn="1") if t.dataset == "openmoji" else {})
    monkeypatch.setattr(R, "one_run", pretend)
    monkeypatch.setattr(R, "parallel_config", lambda *_, **__: parallel_config("sequential"))
    return ran


def test_what_is_missing_or_has_another_key_is_run_and_the_rest_is_kept(together, lists, monkeypatch, tmp_path):
    path, wanted = tmp_path / "runs.csv", R.tasks("choose")
    assert len(wanted) == 5 * 5 and [t[1:3] for t in wanted[::5]] == [("openmoji", "a"), ("openmoji", "b"), ("openmoji", "b, last"), ("scenes", "a"), ("scenes", "b, last")]
    some = R.run_tasks([wanted[7], wanted[3]], path)
    assert [(r["row"], r["seed"]) for r in some] == [("a", "3"), ("b", "2")], "in the order of the list"
    found = R.run_tasks(wanted, path)
    assert len(together) == 25 and [(r["dataset"], r["row"], int(r["seed"])) for r in found] == [t[1:] for t in wanted]
    assert list(found[0]) == ["dataset", "row", "seed", "key", "em", "knn"] and found[-1]["knn"] == "" and found[0]["knn"] == "1"
    monkeypatch.setitem(lists, "b", lists["b"]._replace(settings=dict(alpha=3.0)))
    assert R.run_tasks(wanted, path)[0] == found[0] and together[25:] == [("openmoji", "b", s) for s in range(5)]
    with open(path, encoding="utf-8", newline="") as file: lines = list(csv.reader(file))
    lines.insert(1, ["openmoji", "renamed", "0", "key", "1", "1"])
    with open(path, "w", encoding="utf-8", newline="") as file: csv.writer(file).writerows(lines)
    assert len(R.run_tasks(wanted[:1], path)) == 26 and len(together) == 30, "nothing to do, nothing written"
    path.write_bytes(path.read_bytes().replace(b"\r\nscenes,a,0", b"\r\nscenes,a,00"))
    assert len(R.run_tasks(wanted[15:16], path)) == 25 and len(together) == 31, "rows that are no longer there are dropped"


@pytest.mark.parametrize("content, said", [
    ("dataset,row,seed,key\nopenmoji,a,0", "line 2 has not as many cells"), ("dataset,row,seed,key\nopenmoji,a,0,k,5,6\n", "line 2 has not as many cells"),
    ("", "no column 'key'"), ("dataset;row;seed;key\n", "no column 'key'"), ("dataset,row,seed\nopenmoji,a,0\n", "no column 'key'"), ("row,seed,key\ncaf\xe9,0,k\n", "utf-8")])
def test_a_damaged_file_of_runs_is_named_and_left_as_it_is(together, tmp_path, content, said):
    path = tmp_path / "runs.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"runs.csv: .*{said}"): R.run_tasks(R.tasks("choose"), path)
    assert path.read_bytes() == content.encode("latin-1") and not together
    path.unlink(), path.mkdir()
    with pytest.raises(ValueError, match="cannot read .*runs.csv"): R.run_tasks(R.tasks("choose"), path)


def test_lists_are_not_mixed(together, tmp_path):
    with pytest.raises(ValueError, match="'choose', 'study'"): R.run_tasks([R.tasks("choose")[0], R.tasks("study")[0]], tmp_path / "runs.csv")
    with pytest.raises(ValueError, match="0 tasks"): R.run_tasks([], tmp_path / "runs.csv")
    with pytest.raises(ValueError, match="'chose'"): R.tasks("chose")


def test_each_list_has_its_file_and_its_part():
    assert {name: of for name, (_, *of) in R.LISTS.items()} == dict(choose=["runs-val.csv", "val"], study=["study.csv", "test"])
    assert R.LISTS["choose"][0] is R.CHOICES and R.LISTS["study"][0] is R.ROWS and R.tasks("choose", core=True) == []


def test_what_all_runs_share_is_made_before_they_start(notes, lists, monkeypatch):
    notes.put(row_material="material", teacher_vectors="vectors", build_student=lambda *given, **how: (*given, *how.items()), base_material=lambda d: SimpleNamespace(pairs=SimpleNamespace(images=f"pictures of {d}")),
              word_pairs=lambda part, seed: ("pairs", f"{part} {seed}"), cached_trunk_features="features", image_inputs="inputs", reader="reader")
    monkeypatch.setattr(R, "parallel_config", lambda *_, **__: parallel_config("sequential"))
    R.prepare([R.Task("study", "scenes", "a", 2), R.Task("study", "scenes", "MiniLM", 2), R.Task("study", "scenes", "T5", 3), R.Task("study", "openmoji", "teacher", 0), R.Task("study", "openmoji", "b", 4)], 1)
    assert [list(g.values()) for g in notes.of("row_material")] == [[lists["a"], "scenes", 2], [lists["b"], "openmoji", 4]]
    assert [tuple(g.values()) for g in notes.of("teacher_vectors")] == [("scenes", "minilm", "pairs"), ("openmoji", "own", "queries")]
    assert {g["images"] for g in notes.of("cached_trunk_features")} == {"pictures of scenes", "pictures of openmoji", "test 0"} and not notes.of("image_inputs")
    assert sorted(g["seed"] for g in notes.of("reader")) == [2, 3]
    R.prepare([R.Task("choose", "scenes", "a", 2), R.Task("choose", "openmoji", "b, last", 1)], 1)
    assert {g["images"] for g in notes.of("cached_trunk_features")[3:]} == {"pictures of scenes", "pictures of openmoji", "val 2"}
    (last,) = notes.of("image_inputs")
    assert last["images"] == "pictures of openmoji" and ("train_image", "last") in last["student"]
    assert all(g["student"] == (LAPTOP.student, ("imagenet", LAPTOP.imagenet)) for g in notes.of("cached_trunk_features"))


def test_the_readers_of_the_probe_are_those_of_the_text_probe():
    assert all(getattr(R, name) is getattr(text_probe, name) for name in ("autoencode", "edit_distances", "exact_matches", "probe_captions", "train_autoencoder"))
