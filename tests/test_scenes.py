"""Scenes: captions, drawings and splits, against hand-written ones and against their own description."""

import dataclasses
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kklip_nb.evidence import scenes as P
from kklip_nb.evidence.scenes import Scene, Thing, draw_scene, scene_caption

TINY = [f"a {colour} {noun}" for colour in P.COLOURS for noun in ("dog", "cat", "key", "bus", "house")]


# ---- scenes

@pytest.mark.parametrize("scene, caption", [
    (Scene("object", (Thing("dog"),)), "a dog"),
    (Scene("object", (Thing("umbrella"),)), "an umbrella"),
    (Scene("adjective", (Thing("dog", adjective="orange"),)), "an orange dog"),
    (Scene("adjective", (Thing("umbrella", adjective="big"),)), "a big umbrella"),
    (Scene("spatial", (Thing("cat"),), place="at the top"), "a cat at the top"),
    (Scene("temporal", (Thing("cat"),), time="at night"), "a cat at night"),
    (Scene("verb", (Thing("key", verb="running"),)), "a key running"),
    (Scene("two objects, one attribute", (Thing("dog"), Thing("cat")), "left of"), "a dog left of a cat"),
    (Scene("two objects, two attributes", (Thing("dog", adjective="red"), Thing("cat", verb="falling"))), "a red dog and a cat falling"),
    (Scene("plural", (Thing("bus", 2),)), "two buses"),
    (Scene("plural", (Thing("cactus", 4, "blue"), Thing("fish"))), "four blue cactuses and a fish"),
    (Scene("negation", (Thing("tree"),), absent="car"), "a tree but no car"),
])
def test_captions_by_hand(scene, caption):
    assert scene_caption(scene) == caption


def test_scenes_are_distinct_deterministic_and_of_every_kind():
    scenes = P.make_scenes(1500, 3)
    assert scenes == P.make_scenes(1500, 3) != P.make_scenes(1500, 4)
    assert scenes[:200] == P.make_scenes(200, 3), "more scenes begin with the same ones"
    assert len({scene_caption(s) for s in scenes}) == 1500
    counts = Counter(s.kind for s in scenes)
    assert set(counts) == set(P.KINDS) and counts["object"] <= len(P.NOUNS)
    assert counts.most_common(1)[0][0] == "two objects, two attributes"


@pytest.mark.parametrize("kind", P.KINDS)
def test_a_scene_has_what_its_kind_says(kind):
    random = Random(0)
    for scene in (P.random_scene(kind, random) for _ in range(100)):
        said = sum(x is not None for t in scene.things for x in (t.adjective, t.verb))
        said += (scene.relation != "and") + (scene.place is not None) + (scene.time is not None)
        counted = [t.count for t in scene.things if t.count > 1]
        nouns = [t.noun for t in scene.things] + [n for n in (scene.absent,) if n]
        assert len(set(nouns)) == len(nouns), "a noun is never said twice"
        if kind == "object": assert said == 0 and len(scene.things) == 1
        if kind in ("adjective", "spatial", "temporal", "verb"): assert said == 1 and len(scene.things) == 1
        if kind == "two objects, one attribute": assert said == 1 and len(scene.things) == 2
        if kind == "two objects, two attributes": assert said in (2, 3) and len(scene.things) == 2
        assert (len(counted) == 1) == (kind == "plural") and (scene.absent is not None) == (kind == "negation")


def test_words_of_the_captions_are_the_words_of_the_tables():
    words = {w for s in P.make_scenes(3000, 0) for w in scene_caption(s).split()}
    plurals = {P.PLURALS.get(n, n + "s") for n in P.NOUNS}
    phrases = [*P.PLACES, *P.TIMES, *P.RELATIONS, "a an and but no"]
    known = {*P.NOUNS, *plurals, *P.COLOURS, *P.SIZES, *P.VERBS, *P.COUNTS.values(), *(w for p in phrases for w in p.split())}
    assert words == known


def test_scenes_refuse():
    with pytest.raises(ValueError, match="kind='animal'"): P.random_scene("animal", Random(0))
    with pytest.raises(ValueError, match="count=0"): P.make_scenes(0, 0)
    with pytest.raises(ValueError, match="no scenes"): P.scene_pairs([])


# ---- split

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_is_disjoint_complete_and_covers_the_words(seed):
    scenes = P.make_scenes(900, 0)
    split = P.split_scenes(scenes, seed)
    assert sorted(np.concatenate(split)) == list(range(900))
    assert [len(s) for s in split] == [630, 90, 180]
    captions = [scene_caption(s) for s in scenes]
    words = [{w for i in part for w in captions[i].split()} for part in split]
    assert words[1] | words[2] <= words[0]


def test_the_seed_moves_validation_but_never_the_test_rows():
    scenes = P.make_scenes(500, 0)
    first, same, other = (P.split_scenes(scenes, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, same))
    assert np.array_equal(first.test, other.test) and not np.array_equal(first.val, other.val)


def test_rows_with_one_caption_stay_together_and_order_does_not_matter():
    captions = [scene_caption(s) for s in P.make_scenes(300, 0)]
    split = P.split_captions(captions * 2)
    for part in split: assert {captions[i % 300] for i in part} == {captions[i] for i in part[part < 300]}
    parts = [{captions[i] for i in part} for part in P.split_captions(captions)]
    assert parts == [{captions[::-1][i] for i in part} for part in P.split_captions(captions[::-1])]


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4).map(" ".join), min_size=8, max_size=40), st.integers(0, 5))
def test_split_properties_of_any_captions(captions, seed):
    try: split = P.split_captions(captions, seed, val=0.1, test=0.2)
    except ValueError as error: assert "new words" in str(error); return
    parts = [{captions[i] for i in part} for part in split]
    assert sorted(np.concatenate(split)) == list(range(len(captions)))
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert {w for c in parts[1] | parts[2] for w in c.split()} <= {w for c in parts[0] for w in c.split()}


@pytest.mark.parametrize("shares", [dict(val=0.5, test=0.6), dict(val=-0.1, test=0.2)])
def test_split_refuses(shares):
    with pytest.raises(ValueError, match="val="): P.split_captions(TINY, **shares)


# ---- pictures

CAT = Thing("cat")
PLAIN = Scene("object", (CAT,))


@pytest.mark.parametrize("other", [
    *(PLAIN._replace(things=(CAT._replace(adjective=a),)) for a in (*P.COLOURS, *P.SIZES)),
    *(PLAIN._replace(things=(CAT._replace(verb=v),)) for v in P.VERBS),
    *(PLAIN._replace(things=(CAT._replace(count=c),)) for c in P.COUNTS),
    *(PLAIN._replace(place=p) for p in P.PLACES), *(PLAIN._replace(time=t) for t in P.TIMES),
    PLAIN._replace(things=(CAT, Thing("dog"))),
], ids=scene_caption)
def test_every_attribute_is_to_be_seen(other):
    changed = (draw_scene(PLAIN, 64) != draw_scene(other, 64)).any(-1).mean()
    assert changed > 0.03


@pytest.mark.parametrize("table", [P.COLOURS, P.SIZES, P.VERBS])
def test_values_of_one_attribute_differ(table):
    key = "verb" if table is P.VERBS else "adjective"
    pictures = [draw_scene(PLAIN._replace(things=(CAT._replace(**{key: value}),)), 64) for value in table]
    for i, one in enumerate(pictures):
        for two in pictures[:i]: assert (one != two).any(-1).mean() > 0.02


@pytest.mark.parametrize("size", [32, 128])
def test_a_picture_is_deterministic_and_of_the_asked_size(size):
    for scene in P.make_scenes(40, 1):
        one = draw_scene(scene, size)
        assert one.shape == (size, size, 3) and one.dtype == np.uint8 and np.array_equal(one, draw_scene(scene, size))


def middle(scene: Scene) -> tuple[float, float]:
    "Centre (x, y) of what is not background, in 0 … 1."
    picture = draw_scene(scene, 96).astype(int)
    y, x = np.nonzero(np.abs(picture - picture[0, 0]).sum(-1) > 30)
    return x.mean() / 96, y.mean() / 96


def test_places_are_where_they_say():
    for place, (x, y) in P.PLACES.items():
        assert np.allclose(middle(PLAIN._replace(place=place)), (x, y), atol=0.1), place


@pytest.mark.parametrize("relation", P.RELATIONS)
def test_relations_put_the_first_thing_there(relation):
    def reddish(first, second):
        scene = Scene("", (Thing("balloon", adjective=first), Thing("balloon", adjective=second)), relation)
        picture = draw_scene(scene, 96).astype(int)
        y, x = np.nonzero(picture[..., 0] - picture[..., 2] > 60)
        return np.array([x.mean(), y.mean()]) / 96 - 0.5
    dx, dy = P.RELATIONS[relation]
    assert reddish("red", "blue") @ (dx, dy) > 0.15 > -0.15 > reddish("blue", "red") @ (dx, dy)


def test_the_sky_is_the_time_of_day():
    for time, colour in P.TIMES.items():
        assert "#{:02x}{:02x}{:02x}".format(*draw_scene(PLAIN._replace(time=time))[0, 0]) == colour


def test_negation_is_not_to_be_seen():
    said, plain = draw_scene(PLAIN._replace(absent="dog")), draw_scene(PLAIN)
    assert abs(said.astype(int).mean() - plain.mean()) < 2, "only the jitter differs"


def test_pairs_are_captions_and_their_pictures():
    scenes = P.make_scenes(7, 0)
    pairs = P.scene_pairs(scenes, 48)
    assert pairs.captions == pairs.bases == [scene_caption(s) for s in scenes]
    assert pairs.images.shape == (7, 48, 48, 3) and np.array_equal(pairs.images[5], draw_scene(scenes[5], 48))
    assert pairs.categories == pairs.subcategories == [None] * 7


# ---- a bag of words, and material

def test_bag_of_words_against_a_counter():
    encode = P.bag_of_words(TINY)
    words = sorted({w for c in TINY for w in c.split()})
    some = ["a red dog", "dog red a", "a a a", "unknown words"]
    assert encode(some).tolist() == [[c.split().count(w) for w in words] for c in some]


def test_material_without_a_teacher_holds_word_counts():
    some = P.make_scenes(20, seed=0)
    m = P.scene_material(some, size=32)
    assert m.pairs.captions == [scene_caption(s) for s in some] and m.pairs.images.shape == (20, 32, 32, 3)
    counts = [len(c.split()) for c in m.pairs.captions]
    np.testing.assert_array_equal(m.embeddings.sum(1), counts)
    assert m.word_embeddings.shape[1] == m.embeddings.shape[1] and len(m.words) == len(m.word_embeddings)


def test_material_with_a_teacher_is_checked(rng):
    some, x = P.make_scenes(5, seed=0), rng.normal(size=(5, 8)).astype(np.float32)
    m = P.scene_material(some, x, size=16)
    assert np.array_equal(m.embeddings, x) and m.word_embeddings.shape[1] == 8
    with pytest.raises(ValueError, match="4 embeddings for 5"):
        P.scene_material(some, x[:4], size=16)


def test_scenes_train_plain_clip_for_a_step(tmp_path, monkeypatch):
    from kklip_nb.training import LAPTOP, run_recipe

    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    some = P.make_scenes(12, seed=0)
    recipe = dataclasses.replace(LAPTOP, alpha=0.0, beta=0.0, words=0, first_steps=0, word_table=False, epochs=1, batch_size=8, k=3, imagenet=False)
    run = run_recipe(recipe, P.scene_material(some), np.arange(12))
    assert len(run.history) == 1 and run.image_features.shape == (12, 128)


# ---- captions of one's own

def test_captions_from_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa  dog\r\n\r\n  zwei Hündchen \na\tcat".encode())
    assert P.load_captions(path) == ["a dog", "zwei Hündchen", "a cat"]


def test_captions_file_refuses(tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n\n"), latin.write_bytes("Hündchen".encode("latin-1"))
    with pytest.raises(ValueError, match="no line with text"): P.load_captions(empty)
    with pytest.raises(ValueError, match="UTF-8"): P.load_captions(latin)
    with pytest.raises(ValueError, match=r"\.csv"): P.load_captions(tmp_path / "mine.csv")
    with pytest.raises(FileNotFoundError, match="missing.txt"): P.load_captions(tmp_path / "missing.txt")
