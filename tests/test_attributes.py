"""Average precision, measured colours, truth of scenes, prompts and probes."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from kklip_nb.data import Pairs
from kklip_nb.evidence.attributes import (
    COLOUR_NAMES,
    Attributes,
    MeanAP,
    attribute_scores,
    average_precisions,
    chance_precision,
    colour_shares,
    dominant_colours,
    linear_probe,
    map_by_family,
    map_interval,
    mean_average_precision,
    openmoji_attributes,
    scene_attributes,
    signature_scores,
    taboo_prompts,
)
from kklip_nb.evidence.scenes import KINDS, Scene, Thing, make_scenes, random_scene, scene_caption

NAN = float("nan")


# ---- average precision


def slow_ap(scores, truth):
    positives = [s for s, y in zip(scores, truth) if y == 1]
    precision = [sum(s >= p for s, y in zip(scores, truth) if y == 1) / sum(s >= p for s in scores) for p in positives]
    return sum(precision) / len(precision)


@settings(max_examples=10)
@given(seed=st.integers(0, 9999), values=st.integers(1, 50))
def test_average_precision_is_the_naive_loop_and_scikit_learns(seed, values):
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(values, size=(25, 4)) / 7, rng.integers(2, size=(25, 4)).astype(float)
    truth[:2] = [[0] * 4, [1] * 4]  # one of each at least
    truth[2:][rng.random((23, 4)) < 0.3] = NAN
    got = average_precisions(scores, truth)
    for k in range(4):
        known = ~np.isnan(truth[:, k])
        assert got[k] == pytest.approx(slow_ap(scores[known, k], truth[known, k]))
        assert got[k] == pytest.approx(average_precision_score(truth[known, k], scores[known, k]))
    result = mean_average_precision(scores, truth)
    assert result.value == pytest.approx(got.mean()) and (result.scored, result.left_out) == (4, 0)


def test_attributes_that_cannot_be_judged_are_left_out_and_counted(rng):
    scores, truth = rng.normal(size=(20, 5)), rng.integers(2, size=(20, 5)).astype(float)
    truth[:, 0], truth[:, 1], truth[:, 2], scores[:, 3] = 0, 1, NAN, NAN
    values = average_precisions(scores, truth)
    assert np.isnan(values[:4]).all() and np.isfinite(values[4])
    result = mean_average_precision(scores, truth)
    assert isinstance(result, MeanAP) and (result.scored, result.left_out) == (1, 4)
    assert result.value == pytest.approx(values[4])
    with pytest.raises(ValueError, match="none of 4"):
        mean_average_precision(scores[:, :4], truth[:, :4])


def test_perfect_and_constant_scores(rng):
    truth = rng.integers(2, size=(30, 6)).astype(float)
    assert mean_average_precision(truth, truth).value == 1
    assert mean_average_precision(np.ones_like(truth), truth).value == pytest.approx(truth.mean())


def test_rounding_noise_does_not_break_ties(rng):
    truth = rng.integers(2, size=(30, 1)).astype(float)
    assert average_precisions(1 + 1e-13 * rng.normal(size=(30, 1)), truth)[0] == pytest.approx(truth.mean())


@pytest.mark.parametrize(
    "scores, truth, said",
    [
        (np.ones((3, 2)), np.ones((3, 1)), r"\(3, 2\), truth \(3, 1\)"),
        (np.ones(3), np.ones(3), r"\(3,\)"),
        (np.ones((3, 2)), np.full((3, 2), 0.5), "0.5"),
        (np.ones((3, 2)), -np.ones((3, 2)), "-1"),
        (np.array([[1.0, 1], [NAN, 1]]), np.ones((2, 2)), "whole column"),
        (np.full((2, 2), np.inf), np.ones((2, 2)), "infinite"),
    ],
)
def test_scores_and_truth_are_checked(scores, truth, said):
    with pytest.raises(ValueError, match=said):
        average_precisions(scores, truth)


def test_chance_is_the_mean_over_all_orders():
    for n in range(1, 7):
        for p in range(1, n + 1):
            orders = [slow_ap(list(order), [1] * p + [0] * (n - p)) for order in itertools.permutations(range(n))]
            assert chance_precision(p, n) == pytest.approx(np.mean(orders))


def test_chance_tends_to_the_positive_rate():
    assert chance_precision(10**5, 10**6) == pytest.approx(0.1, abs=1e-4)
    assert chance_precision(1, 1000) == pytest.approx((math.log(1000) + np.euler_gamma) / 1000, rel=1e-3)
    for p, n in ((0, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"{p} positives of {n}"):
            chance_precision(p, n)


def test_chance_of_a_table_counts_known_entries_alone(rng):
    truth = (rng.random((40, 3)) < 0.3).astype(float)
    truth[0], truth[1], truth[25:, 1] = 1, 0, NAN
    expected = [chance_precision(int(t.sum()), len(t)) for t in (c[~np.isnan(c)] for c in truth.T)]
    assert mean_average_precision(np.nan_to_num(truth), truth).chance == pytest.approx(np.mean(expected))


# ---- intervals of mAP


def test_the_interval_is_a_loop_over_scikit_learn(rng):
    truth = (rng.random((40, 3)) < 0.4).astype(float)
    scores = np.round(rng.normal(size=(40, 3)) + truth, 1)  # with ties
    picks = np.random.default_rng(5).integers(40, size=(25, 40))
    loop = [mean_average_precision(scores[p], truth[p]).value for p in picks]
    centred = np.array(loop) - np.mean(loop) + mean_average_precision(scores, truth).value
    assert map_interval(scores, truth, range(40), seed=5, draws=25) == pytest.approx(tuple(np.percentile(centred, [2.5, 97.5])))


def test_the_interval_draws_groups_and_leaves_missing_entries_out(rng):
    truth = (rng.random((30, 3)) < 0.4).astype(float)
    truth[rng.random((30, 3)) < 0.2] = NAN
    scores, groups = rng.normal(size=(30, 3)), np.array(list("abcdefghij") * 3)
    picks = np.random.default_rng(0).integers(10, size=(25, 10))
    rows = [np.concatenate([np.flatnonzero(groups == "abcdefghij"[g]) for g in p]) for p in picks]
    loop = [np.nanmean(average_precisions(scores[r], truth[r])) for r in rows]
    centred = np.array(loop) - np.mean(loop) + mean_average_precision(scores, truth).value
    assert map_interval(scores, truth, groups, draws=25) == pytest.approx(tuple(np.percentile(centred, [2.5, 97.5])))


def test_copies_drawn_together_do_not_narrow_the_interval(rng):
    truth = (rng.random((60, 4)) < 0.4).astype(float)
    scores, copies = rng.normal(size=(60, 4)) + truth, np.repeat(np.arange(60), 8)
    one, together, apart = (
        map_interval(scores, truth, range(60)),
        map_interval(scores[copies], truth[copies], copies),
        map_interval(scores[copies], truth[copies], range(480)),
    )
    assert one == pytest.approx(together)
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_a_model_differs_from_itself_by_nothing_and_from_noise_by_something(rng):
    truth = (rng.random((200, 4)) < 0.4).astype(float)
    good, noise = truth + 0.5 * rng.normal(size=truth.shape), rng.normal(size=truth.shape)
    assert map_interval(good, truth, range(200), minus=good) == (0, 0)
    assert map_interval(good, truth, range(200), minus=noise)[0] > 0.2
    with pytest.raises(ValueError, match="3 groups for 200"):
        map_interval(good, truth, range(3))


# ---- zero-shot


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_attribute_scores_are_cosines_less_their_mean(make, rng):
    images, texts = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    cosines = np.array([[cosine(i, t) for t in texts] for i in images])
    got = attribute_scores(make(3 * images), make(texts))
    np.testing.assert_allclose(got, cosines - cosines.mean(1, keepdims=True))


def test_an_image_that_is_near_to_every_text_does_not_win(rng):
    texts = np.eye(3) + 0.5
    images = np.array([[9.0, 1, 1], [5, 5, 5]])  # the second is near to all texts and to none in particular
    assert attribute_scores(images, texts)[0, 0] > attribute_scores(images, texts)[1, 0]


@pytest.mark.parametrize(
    "images, texts, said",
    [(np.ones((2, 3)), np.ones((2, 4)), "3 dimensions, text features 4"), (np.ones(3), np.ones((2, 3)), r"\(3,\)"), (np.full((2, 3), NAN), np.ones((2, 3)), "NaN")],
)
def test_features_are_checked(images, texts, said):
    with pytest.raises(ValueError, match=said):
        attribute_scores(images, texts)


def small_attributes(values):
    return Attributes(["red", "furry", "swims"], ["colour", "coat", "habit"], np.array(values, float))


def test_prompts_with_and_without_names():
    a = small_attributes([[1, 1, 0], [0, NAN, 0], [0, 0, 1]])
    assert taboo_prompts(["fox", "stone", "fish"], a, ()) == ["fox", "stone", "fish"]
    assert taboo_prompts(["fox", "stone", "fish"], a, ("colour", "habit")) == ["fox, red", "stone", "fish, swims"]
    assert taboo_prompts(None, a, ("colour", "coat")) == ["red, furry", "something", "something"]
    with pytest.raises(ValueError, match="empty"):
        taboo_prompts(None, a, ())
    with pytest.raises(ValueError, match="2 names for 3"):
        taboo_prompts(["fox", "stone"], a, ("coat",))


def test_tables_by_family(rng):
    values = rng.integers(2, size=(20, 3)).astype(float)
    values[:, 2] = 0
    a, scores = small_attributes(values), rng.normal(size=(20, 3))
    result = map_by_family(scores, a)
    assert list(result) == ["colour", "coat", "all"]  # nothing swims
    assert result["coat"].value == pytest.approx(average_precisions(scores, values)[1])
    assert result["all"].value == pytest.approx(average_precisions(scores, values)[:2].mean()) and result["all"].left_out == 1
    rows = np.arange(5, 20)
    assert map_by_family(scores[rows], a, rows)["coat"].value == pytest.approx(average_precisions(scores[rows], values[rows])[1])
    with pytest.raises(ValueError, match=r"\(20, 3\)"):
        map_by_family(scores[:5], a)


def test_classes_from_attributes_by_hand():
    signatures = np.array([[1, 0], [0, 1], [0, 0.0]])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.0]])
    assert signature_scores(scores, signatures).argmax(1).tolist() == [0, 1, 2]
    z = (scores - scores.mean(0)) / scores.std(0)
    centred = signatures - signatures.mean(0)
    np.testing.assert_allclose(signature_scores(scores, signatures), z @ (centred / np.linalg.norm(centred, axis=1, keepdims=True)).T)


def test_signatures_are_centred_and_keep_their_spread(rng):
    scores, strengths = rng.normal(size=(6, 3)) * [1, 20, 0.1] + [0, 5, -3], np.array([[10.0, 0, 50], [0, 2, 100], [3, 1, 75], [7, 1, 0]])
    z, centred = (scores - scores.mean(0)) / scores.std(0), strengths - strengths.mean(0)
    wanted = [[float(a @ b / np.linalg.norm(b)) for b in centred] for a in z]
    np.testing.assert_allclose(signature_scores(scores, strengths), wanted, atol=1e-12)


def test_missing_signatures_and_scores_do_not_vote():
    signatures = np.array([[1, NAN], [0, 1], [0, 0.0]])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.0]])
    with_hole = signature_scores(scores, signatures)
    changed = scores.copy()
    changed[:, 1] = changed[::-1, 1]
    np.testing.assert_allclose(signature_scores(changed, signatures)[:, 0], with_hole[:, 0])  # class 0 does not look at it
    unscored = np.column_stack([scores[:, 0], np.full(3, NAN)])
    assert np.isfinite(signature_scores(unscored, signatures)).all()
    assert signature_scores(np.ones((3, 2)), signatures) == pytest.approx(0)
    with pytest.raises(ValueError, match="same number of attributes"):
        signature_scores(scores, np.ones((3, 5)))


def test_perfect_scores_find_different_signatures(rng):
    signatures = np.array(list(itertools.product([0, 1], repeat=4)), float)
    images = rng.integers(16, size=100)
    assert (signature_scores(signatures[images], signatures).argmax(1) == images).mean() > 0.85
    strengths = 100 * signatures
    np.testing.assert_allclose(signature_scores(signatures[images], strengths), signature_scores(signatures[images], signatures))


# ---- linear probe


def test_the_probe_reads_what_a_plane_separates(rng):
    x = rng.normal(size=(300, 6))
    y = (x @ rng.normal(size=(6, 4)) > 0).astype(float)
    far = x + 0.3 * np.sign(x)
    assert mean_average_precision(linear_probe(far[:200], y[:200], far[200:]), y[200:]).value > 0.97
    clear = np.column_stack([2 * y - 1, rng.normal(size=300)]) + 0.05 * rng.normal(size=(300, 5))
    assert mean_average_precision(linear_probe(clear[:200], y[:200], torch.from_numpy(clear[200:])), y[200:]).value == 1.0


def test_the_probe_reads_nothing_from_shuffled_labels(rng):
    x, y = rng.normal(size=(400, 6)), (rng.random((400, 12)) < 0.3).astype(float)
    result = mean_average_precision(linear_probe(x[:200], y[:200], x[200:]), y[200:])
    assert result.value == pytest.approx(result.chance, abs=0.06)


def test_the_probe_leaves_out_missing_and_one_sided_labels(rng):
    x, y = rng.normal(size=(60, 4)), rng.integers(2, size=(60, 3)).astype(float)
    y[:, 0], y[40:, 1] = 1, NAN
    scores = linear_probe(x, y, x)
    assert np.isnan(scores[:, 0]).all()
    np.testing.assert_allclose(scores[:, 1], linear_probe(x[:40], y[:40, 1:2], x)[:, 0])
    with pytest.raises(ValueError, match="3 rows of attributes for 60"):
        linear_probe(x, y[:3], x)


def test_class_attributes_leak_when_images_are_split(rng):
    classes, coins = np.repeat(np.arange(30), 12), rng.integers(2, size=(30, 10)).astype(float)
    x = rng.normal(size=(30, 32))[classes] + 0.3 * rng.normal(size=(360, 32))
    values = {}
    for name, train in (("rows", rng.permutation(360) < 280), ("classes", classes < 22)):
        values[name] = mean_average_precision(linear_probe(x[train], coins[classes[train]], x[~train]), coins[classes[~train]])
    assert values["rows"].value > 0.95 and abs(values["classes"].value - values["classes"].chance) < 0.2


# ---- colours and drawings

PATCHES = {"red": (220, 40, 40), "orange": (240, 150, 30), "yellow": (250, 230, 40), "green": (90, 160, 50), "blue": (100, 180, 230),
           "purple": (140, 100, 170), "pink": (255, 167, 192), "brown": (106, 70, 47)}  # fmt: skip


@pytest.mark.parametrize("name", COLOUR_NAMES)
def test_a_patch_of_one_colour(name):
    image = np.full((1, 32, 32, 3), 255, np.uint8)
    image[0, :16] = PATCHES[name]
    np.testing.assert_allclose(colour_shares(image)[0], 0.5 * (np.array(COLOUR_NAMES) == name))
    assert dominant_colours(image)[0].tolist() == [n == name for n in COLOUR_NAMES]


@pytest.mark.parametrize("grey", [0, 60, 128, 255])
def test_black_grey_and_white_are_no_colours(grey):
    image = np.full((1, 32, 32, 3), grey, np.uint8)
    assert not colour_shares(image).any() and not dominant_colours(image).any()


def test_dominance_is_a_third_of_what_is_coloured():
    image = np.full((2, 80, 80, 3), 255, np.uint8)
    image[0, :20], image[0, 20:32], image[0, 32:36] = PATCHES["red"], PATCHES["blue"], PATCHES["green"]  # 20 : 12 : 4
    image[1, :4, :4] = PATCHES["green"]  # too small a dot
    assert [COLOUR_NAMES[k] for k in np.flatnonzero(dominant_colours(image)[0])] == ["red", "blue"]
    assert not dominant_colours(image)[1].any()
    with pytest.raises(ValueError, match="float64"):
        colour_shares(image / 255)


def test_attributes_of_drawings():
    n = 24
    names = [f"happy cat {i}" for i in range(12)] + [f"boat {i}" for i in range(12)]
    images = np.full((n, 16, 16, 3), PATCHES["blue"], np.uint8)
    subcategories = ["animal-mammal"] * 12 + ["sky & weather"] * 11 + [None]
    categories = ["Animals & Nature"] * 12 + ["Travel & Places"] * 11 + [None]
    pairs = Pairs(images, names, [f"b{i}" for i in range(n)], categories, subcategories)
    a = openmoji_attributes(pairs, np.arange(n))
    assert Counter(a.families) == {"category": 2, "subcategory": 1, "word": 3, "colour": 8}
    column = dict(zip(a.names, a.values.T))
    assert column["animals and nature"][:12].all() and not column["animals and nature"][12:23].any()
    assert np.isnan(column["animal mammal"][-1]) and np.isnan(column["travel and places"][-1])
    np.testing.assert_array_equal(column["cat"], [1.0] * 12 + [0.0] * 12)
    assert {"cat", "happy", "boat"} <= set(column) and column["blue"].all() and not column["red"].any()
    fewer = openmoji_attributes(pairs, np.arange(6, n))  # six training rows of mammals, six bases with 'cat'
    assert "animal mammal" not in fewer.names and "cat" not in fewer.names and "boat" in fewer.names


# ---- scenes


def truth(scene):
    a = scene_attributes([scene])
    return {(f, n): v for f, n, v in zip(a.families, a.names, a.values[0])}


def test_the_truth_of_one_thing():
    t = truth(Scene("spatial", (Thing("dog", 1, "red"),), place="at the top"))
    assert t["noun", "dog"] == t["colour", "red"] == t["place", "at the top"] == 1
    assert t["noun", "cat"] == t["colour", "blue"] == t["place", "on the left"] == t["count", "two"] == t["time", "at night"] == t["verb", "running"] == 0
    assert all(np.isnan(v) for (f, _), v in t.items() if f == "relation")


def test_what_is_not_said_may_be_missing():
    plain = truth(Scene("object", (Thing("banana"),)))
    assert all(np.isnan(v) for (f, _), v in plain.items() if f == "colour")
    assert [v for (f, _), v in plain.items() if f == "place"] == [0, 0, 0, 0]  # it stands in the middle
    two = truth(Scene("x", (Thing("dog", 1, "red"), Thing("cat"))))
    assert two["colour", "red"] == 1 and np.isnan(two["colour", "blue"])
    assert all(np.isnan(v) for (f, _), v in two.items() if f in ("relation", "place"))
    related = truth(Scene("x", (Thing("dog", 1, "red"), Thing("cat", 3, "green", "jumping")), "above", time="at dusk"))
    assert related["relation", "above"] == 1 and related["relation", "below"] == 0
    assert related["colour", "blue"] == 0 and related["count", "three"] == related["verb", "jumping"] == related["time", "at dusk"] == 1


def test_truth_agrees_with_captions():
    scenes = make_scenes(300, seed=7)
    a = scene_attributes(scenes)
    captions = [scene_caption(s) for s in scenes]
    for name, family, values in zip(a.names, a.families, a.values.T):
        if family == "noun":
            continue  # plurals and absent nouns
        for caption, value in zip(captions, values):
            said = f" {name} " in f" {caption} "
            assert value == 1 if said else value == 0 or np.isnan(value), (caption, name)
    with pytest.raises(ValueError, match="no scenes"):
        scene_attributes([])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scene_has_a_truth(kind):
    from random import Random

    a = scene_attributes([random_scene(kind, Random(s)) for s in range(5)])
    assert a.values.shape == (5, len(a.names)) and (np.nansum(a.values, axis=1) >= 1).all()


# ---- what numbers, groups, rows and pictures come as

FORMS = {
    "list": lambda x: x.tolist(), "float32": lambda x: x.astype(np.float32), "bfloat16": lambda x: torch.tensor(x).bfloat16(), "rows": lambda x: [torch.tensor(r, requires_grad=True) for r in x],
    "gradient": lambda x: torch.tensor(x, requires_grad=True), "columns": np.asfortranarray, "read-only": lambda x: np.frombuffer(x.tobytes()).reshape(x.shape),
}  # fmt: skip
SCORED = {  # scores or features, truth
    "average_precisions": average_precisions, "mean_average_precision": mean_average_precision, "map_interval": lambda s, t: [map_interval(s, t, range(12), minus=m, draws=20) for m in (None, s)],
    "signature_scores": signature_scores, "linear_probe": lambda s, t: linear_probe(s, t, s), "attribute_scores": lambda s, t: attribute_scores(s, s),
    "map_by_family": lambda s, t: map_by_family(s, Attributes(list("abc"), list("xxy"), t)), "taboo_prompts": lambda s, t: taboo_prompts(None, Attributes(list("abc"), list("xxy"), t), "x"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCORED)
def test_numbers_may_come_in_any_form(name, form, rng):
    scores, truth = rng.integers(-8, 9, size=(12, 3)) + 0.5, rng.integers(2, size=(12, 3)).astype(float)
    truth[:2], truth[3, 1] = [[0] * 3, [1] * 3], NAN
    wanted = SCORED[name](scores, truth)
    got = SCORED[name](FORMS[form](scores), FORMS[form](truth))
    if isinstance(wanted, np.ndarray): np.testing.assert_allclose(got, wanted, atol=1e-6)
    else: assert got == wanted
    missing = np.where(np.isnan(truth), None, truth).tolist()  # None is missing, too
    assert repr(SCORED[name](scores.tolist(), missing)) == repr(SCORED[name](scores.tolist(), truth))


@pytest.mark.parametrize("name", ["average_precisions", "mean_average_precision", "map_interval", "signature_scores", "linear_probe"])
@pytest.mark.parametrize("wrong", [np.ones(12), [[1.0, 2.0], [3.0]], [["a"] * 3] * 12, np.full((12, 3), np.inf), np.ones((12, 3, 1))])
def test_what_is_no_table_of_numbers_is_refused(name, wrong):
    with pytest.raises(ValueError, match="expected|infinite"): SCORED[name](wrong, np.eye(12)[:, :3])
    with pytest.raises(ValueError, match="expected|infinite|truth holds"): SCORED[name](np.eye(12)[:, :3], wrong)


def test_labels_of_a_probe_are_checked(rng):
    x = rng.normal(size=(8, 3))
    for odd in (2.0, -1.0, 0.5):
        truth = np.tile([[0.0], [1.0]], (4, 1))
        truth[3] = odd
        with pytest.raises(ValueError, match=f"truth holds {odd:g}; expected 0, 1"): linear_probe(x, truth, x)
    with pytest.raises(ValueError, match=r"\(8, 3\), features \(8, 2\); use one encoder"): linear_probe(x, np.eye(8)[:, :1], x[:, :2])


def test_a_draw_without_a_positive_is_left_out():
    "One positive among six images: a third of the draws have none."
    scores, truth = np.array([[5.0], [6], [4], [3], [2], [1]]), np.eye(6)[:, :1]
    picks = np.random.default_rng(0).integers(6, size=(40, 6))
    loop = [average_precision_score(truth[p, 0], scores[p, 0]) for p in picks if truth[p].any()]
    assert 20 < len(loop) < 35
    assert map_interval(scores, truth, range(6), draws=40) == pytest.approx(tuple(np.percentile(loop - np.mean(loop) + 0.5, [2.5, 97.5])))
    unlucky = next(s for s in range(99) if not truth[np.random.default_rng(s).integers(6, size=6)].any())
    with pytest.raises(ValueError, match="take more draws"): map_interval(scores, truth, range(6), draws=1, seed=unlucky)


def test_an_interval_of_a_difference_needs_scores_of_both(rng):
    truth = (rng.random((40, 3)) < 0.4).astype(float)
    good, other = truth + rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    other[:, 0] = NAN  # the other model says nothing of it
    assert map_interval(good, truth, range(40), minus=other) == map_interval(good[:, 1:], truth[:, 1:], range(40), minus=other[:, 1:])
    for nothing in (np.zeros((40, 3)), np.full((40, 3), NAN)):
        with pytest.raises(ValueError, match="none of 3 attributes"): map_interval(good, nothing, range(40))
    with pytest.raises(ValueError, match="none of 3 attributes"): map_interval(good, truth, range(40), minus=np.full((40, 3), NAN))
    with pytest.raises(ValueError, match="draws=0"): map_interval(good, truth, range(40), draws=0)


def test_groups_are_names(rng):
    truth, scores = (rng.random((12, 2)) < 0.5).astype(float), rng.normal(size=(12, 2))
    wanted = map_interval(scores, truth, np.arange(12) // 2, draws=30)
    for groups in ([("a", i // 2) for i in range(12)], iter([i // 2 for i in range(12)]), torch.arange(12) // 2, ["cafe\u0301" if i == 1 else "caf\u00e9" if i == 0 else "x" + str(i // 2) for i in range(12)]):
        assert map_interval(scores, truth, groups, draws=30) == wanted
    assert map_interval(scores, truth, ["a" + "\0" * i for i in range(12)], draws=30) == map_interval(scores, truth, range(12), draws=30)


@pytest.mark.parametrize("rows", [(1, 4, 5, 9), [1, 4, 5, 9], torch.tensor([1, 4, 5, 9]), np.isin(np.arange(10), [1, 4, 5, 9])])
def test_rows_of_a_table_are_numbers_or_a_mask(rows, rng):
    a, scores = small_attributes(np.tile([[0.0], [1.0]], (5, 3))), rng.normal(size=(4, 3))
    assert map_by_family(scores, a, rows) == map_by_family(scores, a._replace(values=a.values[[1, 4, 5, 9]]))
    with pytest.raises(ValueError, match="rows run from 10 to 10; expected 0 … 9"): map_by_family(scores[:1], a, [10])


def test_an_unnamed_family_counts_among_all(rng):
    a, scores = Attributes(list("ab"), ["", "x"], np.tile([[0.0], [1.0]], (4, 2))), rng.normal(size=(8, 2))
    result = map_by_family(scores, a)
    assert list(result) == ["", "x", "all"] and result["all"].scored == 2


def test_a_family_that_is_not_there_is_named():
    a = small_attributes([[1, 1, 0], [0, NAN, 0]])
    with pytest.raises(ValueError, match=r"no family 'color'; there are \['coat', 'colour', 'habit'\]"): taboo_prompts(None, a, ["color"])
    assert taboo_prompts(iter(["{}", "$x"]), a, "colour") == ["{}, red", "$x"]


@pytest.mark.parametrize("images", [np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), int)])
def test_pictures_of_another_shape_or_type_are_refused(images):
    for function in (colour_shares, dominant_colours):
        with pytest.raises(ValueError, match=r"expected uint8 \(n, h, w, 3\)"): function(images)


def test_pictures_may_be_tensors_and_smaller_than_a_step():
    image = np.array([[[PATCHES["green"]]]], np.uint8)
    assert dominant_colours(torch.from_numpy(image)).tolist() == dominant_colours(image).tolist() == [[n == "green" for n in COLOUR_NAMES]]
    with pytest.raises(ValueError, match="step=0"): colour_shares(image, step=0)


def test_attributes_of_drawings_in_any_script():
    names = [f"caf{'e' + chr(0x301) if i % 2 else chr(0xe9)} {i}" for i in range(8)]
    pairs = Pairs(np.zeros((8, 4, 4, 3), np.uint8), names, [f"b{i}" for i in range(8)], ["Drinks\u00a0", "Drinks"] * 4, [None, float("nan")] * 4)
    a = openmoji_attributes(pairs, np.ones(8, bool))
    assert list(zip(a.names, a.families))[:2] == [("drinks", "category"), ("caf\u00e9", "word")] and a.values[:, :2].all() and len(a.names) == 10
    with pytest.raises(ValueError, match="train run from 8 to 8; expected 0 … 7"): openmoji_attributes(pairs, [8])


# ---- from outside: loops, closed forms, literal colours


def test_the_interval_is_of_two_hundred_draws_of_seed_zero(rng):
    "A rare attribute is missing in some draws; the mean of a draw is over those that it has."
    truth = np.column_stack([np.arange(12) == 3, np.arange(12) % 2])[:, ::-1].astype(float)
    scores, groups = rng.normal(size=(12, 2)), list("ccabbbadddef")
    picks = np.random.default_rng(0).integers(6, size=(200, 6))
    loop = []
    for p in picks:
        rows = np.concatenate([np.flatnonzero(np.array(groups) == "abcdef"[g]) for g in p])
        each = [slow_ap(scores[rows, c], truth[rows, c]) for c in (0, 1) if truth[rows, c].any()]
        loop.append(np.mean(each))
    assert 20 < sum(truth[:, 1][np.isin(groups, ["abcdef"[g] for g in p])].any() for p in picks) < 180
    centre = np.mean([average_precision_score(truth[:, c], scores[:, c]) for c in (0, 1)])
    assert map_interval(scores, truth, groups) == pytest.approx(tuple(np.percentile(loop - np.mean(loop) + centre, [2.5, 97.5])), rel=1e-9)


def test_the_interval_of_a_difference_is_paired(rng):
    truth = (rng.random((30, 2)) < 0.5).astype(float)
    one, other = truth + rng.normal(size=(2, 30, 2))
    picks = np.random.default_rng(2).integers(30, size=(40, 30))
    loops = [np.array([np.mean([slow_ap(s[p, c], truth[p, c]) for c in (0, 1)]) for p in picks]) for s in (one, other)]
    moved = [x - x.mean() + average_precisions(s, truth).mean() for x, s in zip(loops, (one, other))]
    assert map_interval(one, truth, range(30), minus=other, seed=2, draws=40) == pytest.approx(tuple(np.percentile(moved[0] - moved[1], [2.5, 97.5])))


def test_mean_precision_is_over_attributes_and_chance_over_the_same(rng):
    truth, scores = (rng.random((30, 5)) < [0.1, 0.3, 0.5, 0.9, 0]).astype(float), rng.normal(size=(30, 5))
    truth[0], truth[1, :4], truth[5:20, 1] = 0, 1, NAN
    known = [~np.isnan(truth[:, c]) for c in range(4)]
    result = mean_average_precision(scores, truth)
    assert result.value == pytest.approx(np.mean([slow_ap(scores[k, c], truth[k, c]) for c, k in enumerate(known)]))
    shuffled = [np.mean([slow_ap(rng.permutation(30)[k], truth[k, c]) for _ in range(150)]) for c, k in enumerate(known)]
    assert result.chance == pytest.approx(np.mean(shuffled), abs=0.03) and (result.scored, result.left_out) == (4, 1)


def test_the_length_of_neither_features_counts(rng):
    images, texts, lengths = rng.normal(size=(5, 4)), rng.normal(size=(6, 4)), rng.uniform(0.1, 9, size=(6, 1))
    np.testing.assert_allclose(attribute_scores(lengths[:5] * images, lengths * texts), attribute_scores(images, texts))
    assert attribute_scores(images, texts).mean(1) == pytest.approx(0) and abs(attribute_scores(images, texts).mean(0)).max() > 0.1


def test_only_what_is_wholly_there_is_said():
    assert taboo_prompts(None, small_attributes([[0.5, 1, NAN], [0, 2, 1]]), ("colour", "coat", "habit")) == ["furry", "swims"]


def ridge_logit(x, y):
    "Newton's method for the sum of log losses + |w|² / 2, the intercept free: weights, then the intercept."
    x = np.column_stack([x, np.ones(len(x))])
    w, penalty = np.zeros(x.shape[1]), np.diag([*np.ones(x.shape[1] - 1), 0.0])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + penalty, x.T @ (p - y) + penalty @ w)
    return w


@pytest.fixture
def probed():
    "Overlapping labels, one in four positive; features of unequal spread and length; unknown labels."
    rng = np.random.default_rng(3)
    x = rng.normal(size=(90, 4)) * [1, 0.05, 4, 0.5] + [0, 0.3, 1, 0]
    x *= rng.uniform(0.5, 5, size=(90, 1))
    y = (x[:, :2] / [2, 0.5] + 0.8 * rng.normal(size=(90, 2)) > 0.9).astype(float)
    y[rng.random((90, 2)) < 0.2] = NAN
    return x[:60], y[:60], x[60:]


def test_the_probe_is_newtons_ridge_regression_on_standardised_unit_rows(probed):
    train, y, test = probed
    got, unit = linear_probe(*probed), lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    for column in range(2):
        known = ~np.isnan(y[:, column])
        mean, spread = unit(train)[known].mean(0), unit(train)[known].std(0)
        w = ridge_logit((unit(train)[known] - mean) / spread, y[known, column])
        np.testing.assert_allclose(got[:, column], (unit(test) - mean) / spread @ w[:-1] + w[-1], atol=2e-3)


def test_the_rows_that_are_scored_move_no_probe(probed):
    train, y, test = probed
    got = linear_probe(*probed)
    np.testing.assert_allclose(linear_probe(train, y, test[:1]), got[:1], atol=1e-12)
    spoiled = np.concatenate([test[:5], 1e3 * np.ones((40, 4)), -test[5:]])
    np.testing.assert_allclose(linear_probe(train, y, spoiled)[:5], got[:5], atol=1e-12)
    unknown = np.where(np.isnan(y[:, :1]), -50 * train[:, ::-1], train)  # spoil what has no label for the first
    np.testing.assert_allclose(linear_probe(unknown, y[:, :1], test), got[:, :1], atol=1e-12)


def from_hsv(hue, saturation, value):
    import colorsys

    return [round(255 * c) for c in colorsys.hsv_to_rgb(hue / 360, saturation, value)]


@pytest.mark.parametrize("hue, saturation, value, name", [
    (10, 1, 1, "red"), (14, 1, 1, "orange"), (43, 1, 1, "orange"), (47, 1, 1, "yellow"), (63, 1, 1, "yellow"), (67, 1, 1, "green"), (163, 1, 1, "green"),
    (167, 1, 1, "blue"), (253, 1, 1, "blue"), (257, 1, 1, "purple"), (308, 1, 1, "purple"), (312, 1, 1, "pink"), (343, 1, 1, "pink"), (347, 1, 1, "red"),
    (0, 0.57, 0.9, "pink"), (0, 0.63, 0.9, "red"), (0, 0.57, 0.82, "red"), (30, 0.9, 0.69, "brown"), (30, 0.9, 0.75, "orange"), (55, 0.9, 0.5, "yellow"),
    (120, 0.12, 1, None), (120, 0.18, 1, "green"), (120, 1, 0.17, None), (120, 1, 0.23, "green"), (30, 1, 0.17, None),
])  # fmt: skip
def test_a_colours_name_by_hue_saturation_and_value(hue, saturation, value, name):
    shares = colour_shares(np.full((1, 2, 2, 3), from_hsv(hue, saturation, value), np.uint8))
    assert shares[0].tolist() == [float(n == name) for n in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")]


def test_every_fourth_pixel_of_every_fourth_row_is_read():
    image = np.full((1, 24, 36, 3), 255, np.uint8)
    image[0, :8, ::4], image[0, ::4, 1:4] = PATCHES["red"], PATCHES["blue"]  # rows 0 and 4 of 0, 4 … 20
    assert colour_shares(image)[0, 0] == pytest.approx(2 / 6) and colour_shares(image)[0, 4] == 0
    rows, columns = np.meshgrid(range(0, 24, 3), range(0, 36, 3), indexing="ij")
    blue = (image[0, rows, columns] == PATCHES["blue"]).all(-1).mean()
    assert colour_shares(image, step=3)[0, 4] == blue > 0


@pytest.mark.parametrize("coloured, expected", [(1, False), (2, True), (8, True)])
def test_two_per_cent_of_colour_are_enough(coloured, expected):
    image = np.full((1, 40, 40, 3), 255, np.uint8)
    image[0, :4, : 4 * coloured] = PATCHES["green"]  # of 100 pixels that are read
    assert dominant_colours(image)[0, 3] == expected and dominant_colours(image).sum() == expected


@pytest.mark.parametrize("dominant, other, expected", [(6, 12, True), (5, 12, False), (9, 12, True)])
def test_a_third_of_what_is_coloured_is_dominant(dominant, other, expected):
    image = np.full((1, 4, 4 * 25, 3), 255, np.uint8)
    image[0, :, : 4 * dominant], image[0, :, 4 * dominant : 4 * (dominant + other)] = PATCHES["green"], PATCHES["blue"]
    assert dominant_colours(image)[0, 3] == expected and dominant_colours(image)[0, 4]


def made_drawings(rows):
    "White pictures of rows (base, caption, category, subcategory)."
    bases, captions, *classes = ([*column] for column in zip(*rows))
    return Pairs(np.full((len(rows), 4, 4, 3), 255, np.uint8), captions, bases, *classes)


def test_words_of_eight_bases_and_classes_of_twelve_rows_are_kept_by_the_training_rows_alone():
    rows = [(f"b{i}", f"apple {'pear' if i < 8 else ''} {'plum' if i < 7 else ''} kiwi", "Fruit", "twelve" if i < 12 else "eleven") for i in range(23)]
    rows += [("one", "berry", "Fruit", None)] * 9  # nine rows of one base
    held_out = [(f"h{i}", "plum berry eleven", "Else", "eleven") for i in range(20)]
    pairs, train = made_drawings(rows + held_out), np.arange(32)
    a = openmoji_attributes(pairs, train)
    named = {f: [n for n, other in zip(a.names, a.families) if other == f] for f in ("category", "subcategory", "word")}
    assert named == {"category": ["else", "fruit"], "subcategory": ["twelve"], "word": ["apple", "kiwi", "pear"]}
    truth = dict(zip(a.names, a.values.T))
    assert truth["pear"].tolist() == [1.0] * 8 + [0.0] * 44 and truth["twelve"][:23].tolist() == [1.0] * 12 + [0.0] * 11
    assert np.isnan(truth["twelve"][23:32]).all() and not truth["twelve"][32:].any()
    everything = openmoji_attributes(pairs, np.arange(52))
    assert {"plum", "berry", "eleven"} <= {*everything.names}
    spoiled = made_drawings(rows + [(f"b{i}", "apples pineapple", "Fruit", "twelve") for i in range(20)])
    other = openmoji_attributes(spoiled, train)
    assert [n for n in other.names if n != "else"] == [n for n in a.names if n != "else"]
    assert not other.values[32:, other.names.index("apple")].any()  # whole words
