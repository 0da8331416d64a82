"""Pairs one word apart and Winoground's scores, against the definitions."""

import inspect
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kklip_nb.evidence.one_word import (
    CHANGES,
    WordPair,
    changed_scenes,
    one_word_apart,
    one_word_pairs,
    pair_similarities,
    score_pairs,
    winoground,
)
from kklip_nb.evidence.scenes import Scene, Thing, draw_scene, make_scenes, scene_caption

NAN = float("nan")


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


# ---- one word


@pytest.mark.parametrize(
    "a, b, one",
    [("a dog", "a cat", True), ("a dog", "a dog", False), ("a dog", "an owl", False), ("a dog left of a cat", "a dog above a cat", False),
     ("two dogs", "three dogs", True), ("a", "a b", False), ("a caf\u00e9", "a cafe\u0301", False), ("A dog", "a\u00a0dog ", False),
     ("a\u0301 b", "\u00e1 c", True), ("a b c", "a x y", False), ("b a", "a b", False), ("a b", "c b d", False)],
)  # fmt: skip
def test_one_word_apart(a, b, one):
    assert one_word_apart(a, b) == one_word_apart(b, a) == one


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(1500, seed=3)


@pytest.fixture(scope="module")
def pairs(scenes):
    seen = {scene_caption(s) for s in scenes[:400]}
    return one_word_pairs(scenes, 6, seed=0, seen=seen), seen


def test_pairs_differ_in_one_word_of_their_kind_and_in_the_drawing(pairs):
    found, seen = pairs
    assert list(dict.fromkeys(p.change for p in found)) == list(CHANGES)
    assert max(Counter(p.change for p in found).values()) <= 6
    captions = [scene_caption(s) for p in found for s in (p.first, p.second)]
    assert len(set(captions)) == len(captions) and not set(captions) & seen
    from kklip_nb.evidence.scenes import COLOURS, COUNTS, NOUNS, PLACES, PLURALS, RELATIONS, SIZES, TIMES, VERBS

    words = {"noun": {*NOUNS, *PLURALS.values(), *(n + "s" for n in NOUNS)}, "colour": set(COLOURS), "size": set(SIZES),
             "count": set(COUNTS.values()), "verb": set(VERBS)}  # fmt: skip
    words |= {k: {w for t in table for w in t.split()} for k, table in (("relation", RELATIONS), ("place", PLACES), ("time", TIMES))}
    for pair in found:
        a, b = (scene_caption(s).split() for s in (pair.first, pair.second))
        assert len(a) == len(b)
        differ = [(x, y) for x, y in zip(a, b) if x != y]
        assert len(differ) == 1 and set(differ[0]) <= words[pair.change]
        assert (draw_scene(pair.first, 64) != draw_scene(pair.second, 64)).any()


def test_as_many_pairs_as_asked_for_of_each_change_in_their_order(scenes):
    for each in (1, 4): assert [p.change for p in one_word_pairs(scenes, each, seed=0)] == [c for c in ("noun", "colour", "size", "count", "relation", "place", "time", "verb") for _ in range(each)]
    with pytest.raises(ValueError, match="each=0"): one_word_pairs(scenes, 0, seed=0)


def test_neither_caption_of_a_pair_may_have_been_seen(scenes):
    some = scenes[:300]
    all_pairs = one_word_pairs(some, 3, seed=0)
    changed = {scene_caption(s) for p in all_pairs for s in (p.first, p.second)} - {scene_caption(s) for s in some}
    started = {scene_caption(s) for p in all_pairs for s in (p.first, p.second)} - changed
    assert len(changed) > 5 and len(started) > 5
    for seen in (changed, started):
        for form in (seen, sorted(seen), iter(seen), [f" {c.upper()}\u00a0" for c in seen]):
            assert not seen & {scene_caption(s) for p in one_word_pairs(some, 3, seed=0, seen=form) for s in (p.first, p.second)}
    one = min(started)
    assert one not in {scene_caption(s) for p in one_word_pairs(some, 3, seed=0, seen=one) for s in (p.first, p.second)}


def test_pairs_start_anywhere_in_the_list(scenes):
    place = {scene_caption(s): i for i, s in enumerate(scenes)}
    told = [place[c] for p in one_word_pairs(scenes, 4, seed=0) for c in map(scene_caption, (p.first, p.second)) if c in place]
    assert 500 < np.median(told) < 1000


def test_scenes_may_come_one_by_one_and_the_seed_from_numpy(scenes):
    assert one_word_pairs(iter(scenes), 2, seed=np.int64(1)) == one_word_pairs(tuple(scenes), 2, seed=1)


@pytest.mark.parametrize("function, defaults", [(one_word_pairs, dict(seen=())), (score_pairs, dict(images=None))])
def test_what_is_done_unless_said_otherwise(function, defaults):
    assert {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty} == defaults


def test_pairs_are_the_same_for_the_same_seed(scenes):
    assert one_word_pairs(scenes, 3, seed=1) == one_word_pairs(scenes, 3, seed=1) != one_word_pairs(scenes, 3, seed=2)


def test_neither_side_of_a_pair_is_the_usual_one(scenes):
    drawn = {scene_caption(s) for s in scenes}
    told = [[scene_caption(s) in drawn for s in (p.first, p.second)] for p in one_word_pairs(scenes, 40, seed=0)]
    firsts = [first for first, second in told if first != second]
    assert len(firsts) > 100 and 0.4 < np.mean(firsts) < 0.6


def test_all_ways_to_change_a_word_are_used(scenes):
    found = [p for p in one_word_pairs(scenes, 40, seed=0) if p.change == "noun"]
    told = [[{t.noun for t in s.things} for s in (p.first, p.second)] for p in found]
    assert len({n for a, b in told for n in a ^ b}) > 20, "not always the first of the list"
    places = [{i for i, (x, y) in enumerate(zip(p.first.things, p.second.things)) if x != y} for p in found]
    assert {0} in places and {1} in places


def captions_of(scene, change): return {scene_caption(s) for s in changed_scenes(scene, change)}


def test_changes_are_complete_for_a_scene_by_hand():
    scene = Scene("x", (Thing("dog", 1, "red"), Thing("cat", 1, "big")), "left of")
    captions = lambda change: {scene_caption(s) for s in changed_scenes(scene, change)}
    assert captions("relation") == {"a red dog right of a big cat"}
    assert captions("size") == {"a red dog left of a small cat"}
    assert captions("colour") == {f"a {c} dog left of a big cat" for c in ("yellow", "green", "blue", "purple")}  # an orange dog: two words
    assert captions("count") == captions("verb") == captions("place") == captions("time") == set()
    assert "a red bird left of a big cat" in captions("noun") and "a red cat left of a big cat" not in captions("noun")
    pair = Scene("x", (Thing("dog", 2), Thing("cat", verb="falling")), time="at night")
    assert captions_of(pair, "count") == {"three dogs and a cat falling at night", "four dogs and a cat falling at night"}
    assert captions_of(pair, "verb") == {f"two dogs and a cat {v} at night" for v in ("running", "jumping", "sleeping")}
    assert captions_of(pair, "time") == {f"two dogs and a cat falling at {t}" for t in ("dawn", "noon", "dusk")}
    place = Scene("x", (Thing("dog"),), place="on the left")
    assert captions_of(place, "place") == {"a dog on the right"} and captions_of(place._replace(place="at the top"), "place") == {"a dog at the bottom"}
    assert captions_of(Scene("x", (Thing("dog"), Thing("cat")), "above"), "relation") == {"a dog below a cat"}
    nouns = captions_of(Scene("x", (Thing("dog"),)), "noun")
    assert len(nouns) == 29 and {"a cat", "a fish", "a car"} <= nouns and not {"a dog", "an umbrella"} & nouns, "'an' would be a second word"
    with pytest.raises(ValueError, match="'mood'"):
        changed_scenes(scene, "mood")


def test_an_absent_noun_is_never_exchanged():
    scene = Scene("negation", (Thing("dog"),), absent="cat")
    changed = changed_scenes(scene, "noun")
    assert changed and all(s.absent == "cat" and s.things[0].noun != "cat" for s in changed)


def test_pairs_that_cannot_be_had_are_an_error():
    with pytest.raises(ValueError, match="'colour' among 1 scenes"):
        one_word_pairs([Scene("object", (Thing("dog"),))], 2, seed=0)


# ---- Winoground


def slow_winoground(s):
    text = s[0][0] > s[1][0] and s[1][1] > s[0][1]
    image = s[0][0] > s[0][1] and s[1][1] > s[1][0]
    return [float(text), float(image), float(text and image)]


def columns(scores):
    return np.stack([scores[k] for k in ("text", "image", "group")], axis=1)


def test_scores_are_the_naive_loop_and_chance_is_known(rng):
    s = rng.normal(size=(3000, 2, 2))
    got = columns(winoground(s))
    np.testing.assert_array_equal(got, [slow_winoground(x) for x in s])
    for mean, chance in zip(got.mean(0), (1 / 4, 1 / 4, 1 / 6)):
        assert mean == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 3000))
    orders = [[o[:2], o[2:]] for o in itertools.permutations(range(4))]
    np.testing.assert_allclose(columns(winoground(np.array(orders))).mean(0), [1 / 4, 1 / 4, 1 / 6])


@given(values=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_a_tie_counts_its_mean_over_all_ways_to_break_it(values):
    s = np.array(values, float)
    broken = [slow_winoground((s + 0.01 * np.array(o)).reshape(2, 2)) for o in itertools.permutations(range(4))]
    np.testing.assert_allclose(columns(winoground(s.reshape(1, 2, 2)))[0], np.mean(broken, axis=0))


def test_models_that_see_one_side_alone(rng):
    captions_only = np.repeat(rng.normal(size=(500, 2, 1)), 2, axis=2)
    got = columns(winoground(captions_only)).mean(0)
    assert got[0] == got[2] == 0 and got[1] == pytest.approx(1 / 4)
    images_only = captions_only.transpose(0, 2, 1)
    got = columns(winoground(images_only)).mean(0)
    assert got[1] == got[2] == 0 and got[0] == pytest.approx(1 / 4)


def test_rounding_noise_leaves_a_tie():
    s = np.array([[[0.3, 0.3 + 1e-14], [0.3 - 1e-14, 0.3]]])
    np.testing.assert_allclose(columns(winoground(s))[0], [1 / 4, 1 / 4, 1 / 6])
    assert columns(winoground(np.array([[[0.3, 0.3], [0.3, 0.3]]]) + 1e-9 * np.eye(2))).tolist() == [[1, 1, 1]], "a small difference is none"


@pytest.mark.parametrize("s, text, image", [([[0.9, 0.8], [0.1, 0.2]], 0, 1), ([[0.9, 0.1], [0.8, 0.2]], 1, 0), ([[0.2, 0.1], [0.1, 0.2]], 1, 1), ([[0.1, 0.2], [0.2, 0.1]], 0, 0)])
def test_the_text_score_compares_captions_and_the_image_score_pictures(s, text, image):
    assert {k: v.tolist() for k, v in winoground([s]).items()} == dict(text=[text], image=[image], group=[text * image])


@pytest.mark.parametrize("s, said", [(np.ones((2, 2)), r"\(2, 2\)"), (np.ones((3, 2, 3)), r"\(3, 2, 3\)"), (np.full((1, 2, 2), NAN), "NaN"), (np.ones((0, 2, 2)), "shape"), (np.full((1, 2, 2), np.inf), "infinite")])
def test_winoground_refuses_what_is_no_pair(s, said):
    with pytest.raises(ValueError, match=said):
        winoground(s)


def test_similarities_are_caption_by_image(rng):
    images, texts = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    got = pair_similarities(torch.from_numpy(images), texts)
    for n, c, i in itertools.product(range(3), range(2), range(2)):
        assert got[n, c, i] == pytest.approx(cosine(texts[2 * n + c], images[2 * n + i]))
    images[1], large = 0, 1e4 * np.ones((2, 4), np.float16)
    assert np.isfinite(pair_similarities(images, texts)).all() and (pair_similarities(images, texts)[0, :, 1] == 0).all()
    np.testing.assert_allclose(pair_similarities(large, large), 1, atol=1e-6)
    for a, b in ((images[:5], texts[:5]), (images, texts[:4])):
        with pytest.raises(ValueError, match="two rows a pair"):
            pair_similarities(a, b)


def test_score_pairs_encodes_both_scenes(monkeypatch, pairs):
    import kklip_nb.evidence.one_word as module

    found = pairs[0][:4]
    monkeypatch.setattr(module, "prepare_images", lambda _, images: torch.from_numpy(np.array(images)))
    monkeypatch.setattr(module, "tokenize", lambda _, captions: list(captions))
    drawings = {draw_scene(s).tobytes(): scene_caption(s) for p in found for s in (p.first, p.second)}
    names = list(drawings.values())

    def encode(_, images, tokens):  # a student that knows every scene
        rows = [names.index(drawings[i.tobytes()]) for i in images.numpy()]
        return torch.eye(len(names))[rows], torch.eye(len(names))[[names.index(t) for t in tokens]]

    monkeypatch.setattr(module, "encode_all", encode)
    assert columns(score_pairs(None, found)).min() == 1
    swapped = [WordPair(p.change, p.second, p.first) for p in found]
    images = torch.from_numpy(np.stack([draw_scene(s) for p in found for s in (p.first, p.second)]))
    assert columns(score_pairs(None, swapped, images)).max() == 0  # the wrong picture beside each caption
    with pytest.raises(ValueError, match="no pairs"): score_pairs(None, [])


@pytest.mark.parametrize("alike, text, image", [("pictures", 0, 1 / 4), ("captions", 1 / 4, 0)])
def test_a_student_that_is_blind_on_one_side(monkeypatch, pairs, alike, text, image):
    import kklip_nb.evidence.one_word as module

    def encode(_, images, tokens):
        features = torch.randn(len(tokens), 30, generator=torch.Generator().manual_seed(0))
        same = features[torch.arange(len(tokens)) // 2 * 2]
        return (same, features) if alike == "pictures" else (features, same)
    monkeypatch.setattr(module, "tokenize", lambda _, captions: torch.arange(len(captions)))
    monkeypatch.setattr(module, "encode_all", encode)
    np.testing.assert_allclose(columns(score_pairs(None, pairs[0], "pictures")).mean(0), [text, image, 0])
