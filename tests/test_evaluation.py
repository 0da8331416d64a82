"""Fast metrics against the obvious slow ones."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kklip_nb.evaluation import (
    TEMPLATES,
    alignment,
    bootstrap_interval,
    chance_levels,
    class_features,
    evaluate,
    first_place,
    hits_at_k,
    item_scores,
    knn_hits,
    median_rank,
    retrieval_recall,
    seed_interval,
    seed_table,
    uniformity,
    words_seen,
    zero_shot_hits,
)

NAN, INF = float("nan"), float("inf")


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def orders_of(scores):
    "Every order of the candidates that sorts them by falling score: ties come in all their orders."
    return [
        p
        for p in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(p))
    ]


def first_right(scores, right):
    "Places (from 1) of the first right answer over all orders of a query's candidates."
    return [next(place for place, j in enumerate(order, 1) if right[j]) for order in orders_of(scores)]


def tied_features(seed, n=5):
    "Features from a tiny alphabet, so that many cosines tie exactly."
    rng = np.random.default_rng(seed)
    choices = np.array([[1.0, 0], [0, 1], [-1, 0], [0.6, 0.8]])
    return choices[rng.integers(4, size=n)], choices[rng.integers(4, size=n)]


# ---- retrieval_recall and median_rank


@settings(max_examples=12)
@given(seed=st.integers(0, 9999), ids=st.none() | st.lists(st.sampled_from("abc"), min_size=5, max_size=5))
def test_recall_and_median_rank_are_averages_over_all_orders_of_ties(seed, ids):
    images, texts = tied_features(seed)
    scores = images @ texts.T
    right = np.eye(5, dtype=bool) if ids is None else np.array([[a == b for b in ids] for a in ids])
    recall = retrieval_recall(images, texts, ks=(1, 2, 3, 5), text_ids=ids)
    ranks = median_rank(images, texts, text_ids=ids)
    for way, s, r in (("i2t", scores, right), ("t2i", scores.T, right.T)):
        places = np.array([np.resize(first_right(a, b), 120) for a, b in zip(np.round(s, 9), r)])  # 120: all orders, or each of fewer several times
        for k in (1, 2, 3, 5):
            assert recall[f"{way}_r{k}"] == pytest.approx((places <= k).mean())
        assert ranks[f"{way}_median_rank"] == pytest.approx(np.median(places.mean(1)))


def test_hits_at_k_is_the_chance_for_each_query():
    scores = np.array([[3.0, 2, 1], [1, 1, 1], [0, 5, 5]])
    right = np.array([[0, 1, 0], [1, 0, 1], [1, 0, 0]], bool)
    for k in (1, 2, 3):
        expected = [np.mean([place <= k for place in first_right(s, r)]) for s, r in zip(scores, right)]
        np.testing.assert_allclose(hits_at_k(scores, right, k), expected)


def test_keys_and_types_are_plain():
    recall = retrieval_recall(np.eye(12), np.eye(12))
    assert set(recall) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert all(type(v) is float and v == 1.0 for v in recall.values())
    ranks = median_rank(torch.eye(12), torch.eye(12))
    assert ranks == {"i2t_median_rank": 1.0, "t2i_median_rank": 1.0} and all(type(v) is float for v in ranks.values())


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_features_give_k_of_n(n, dtype, rng):
    x = np.tile(rng.normal(size=(1, 7)).astype(dtype), (n, 1))
    recall = retrieval_recall(x, x)
    for k in (1, 5, 10):
        assert recall[f"i2t_r{k}"] == recall[f"t2i_r{k}"] == pytest.approx(min(1, k / n))
    assert median_rank(x, x)["i2t_median_rank"] == pytest.approx((n + 1) / 2)


@pytest.mark.parametrize("make", [lambda x: x.astype(np.float32), lambda x: torch.from_numpy(x).float(), lambda x: x])
def test_exact_duplicates_tie_whatever_the_precision(make, rng):
    x = np.repeat(rng.normal(size=(8, 33)), 2, axis=0)  # each pair occurs twice
    recall = retrieval_recall(make(x), make(x), ks=(1, 2))
    assert recall == pytest.approx({"i2t_r1": 0.5, "t2i_r1": 0.5, "i2t_r2": 1.0, "t2i_r2": 1.0})


def test_rows_with_equal_ids_are_right_for_each_other():
    images, texts = np.eye(3), np.eye(3)[[1, 0, 2]]  # the first two captions are swapped
    assert retrieval_recall(images, texts, ks=(1,))["i2t_r1"] == pytest.approx(1 / 3)
    for ids in (["a", "a", "b"], [7, 7, 8], np.array([7, 7, 8]), torch.tensor([7, 7, 8])):
        assert retrieval_recall(images, texts, ks=(1,), text_ids=ids)["i2t_r1"] == 1
    assert retrieval_recall(images, texts, ks=(1,), text_ids=["a", "b", "c"])["i2t_r1"] == pytest.approx(1 / 3)


@given(order=st.permutations(range(7)), seed=st.integers(0, 999))
def test_permuting_the_rows_changes_no_metric(order, seed):
    rng, order = np.random.default_rng(seed), list(order)
    images, texts, ids = rng.normal(size=(7, 3)), rng.normal(size=(7, 3)), rng.integers(4, size=7)
    for metric in (retrieval_recall, median_rank):
        assert metric(images, texts, text_ids=ids) == pytest.approx(
            metric(images[order], texts[order], text_ids=ids[order])
        )


@given(seed=st.integers(0, 999), a=st.floats(1e-3, 1e3))
def test_the_length_of_features_changes_no_recall(seed, a):
    rng = np.random.default_rng(seed)
    images, texts = rng.normal(size=(2, 7, 3))
    lengths = a * rng.uniform(0.1, 9, size=(7, 1))
    assert retrieval_recall(images * lengths, texts) == retrieval_recall(images, texts)


@pytest.mark.parametrize("metric", [retrieval_recall, median_rank, alignment])
@pytest.mark.parametrize(
    "images, texts, said",
    [
        (np.ones((3, 2)), np.ones((4, 2)), ["(3, 2)", "(4, 2)"]),
        (np.ones((3, 2)), np.ones((1, 2)), ["(3, 2)", "(1, 2)"]),
        (np.ones((3, 2)), np.ones((3, 5)), ["(3, 2)", "(3, 5)"]),
        (np.ones(3), np.ones(3), ["(3,)"]),
        (np.ones((0, 2)), np.ones((0, 2)), ["(0, 2)"]),
        (np.full((3, 2), NAN), np.ones((3, 2)), ["image", "NaN"]),
        (np.ones((3, 2)), np.full((3, 2), INF), ["text", "inf"]),
    ],
)
def test_pair_metrics_refuse_features_that_do_not_match(metric, images, texts, said):
    with pytest.raises(ValueError) as error:
        metric(images, texts)
    for word in said:
        assert word in str(error.value)


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_a_k_that_is_no_count_is_refused(k):
    with pytest.raises(ValueError, match=str(k)):
        retrieval_recall(np.eye(3), np.eye(3), ks=(k,))


@pytest.mark.parametrize("metric", [retrieval_recall, median_rank])
def test_one_id_a_pair_is_asked_for(metric):
    with pytest.raises(ValueError, match="2(?s:.*)3"):
        metric(np.eye(3), np.eye(3), text_ids=["a", "b"])


# ---- classification


def toy_encode(captions):
    "A text encoder of six dimensions that looks at letters only."
    return np.array([[1 + c.count(letter) for letter in "aeiort"] for c in captions], float)


def test_class_features_are_the_mean_of_unit_prompts():
    classes, templates = ["dog", "cat", "tree"], ["{}", "a photo of {}", "the art of {}"]
    naive = []
    for name in classes:
        vectors = [toy_encode([t.format(name)])[0] for t in templates]
        mean = sum(v / np.linalg.norm(v) for v in vectors) / len(templates)
        naive.append(mean / np.linalg.norm(mean))
    for encode in (toy_encode, lambda captions: torch.from_numpy(toy_encode(captions))):
        np.testing.assert_allclose(class_features(encode, classes, templates), naive)
    assert all("{}" in t for t in TEMPLATES)


def test_zero_shot_takes_the_most_similar_class(rng):
    images, classifier, classes = rng.normal(size=(30, 4)), unit(rng.normal(size=(5, 4))), list("abcde")
    truth = [classes[i] for i in rng.integers(5, size=30)]
    naive = [
        float(classes[max(range(5), key=lambda j: float(np.dot(x, classifier[j])))] == t) for x, t in zip(images, truth)
    ]
    np.testing.assert_array_equal(zero_shot_hits(images, classifier, classes, truth), naive)
    np.testing.assert_array_equal(zero_shot_hits(1000 * images, classifier, classes, truth), naive)


@pytest.mark.parametrize("truth", [["a"], ["a", "b"], ["a", "b", "a", "b"]])
def test_zero_shot_asks_for_one_true_class_an_image(truth):
    with pytest.raises(ValueError, match=str(len(truth))):
        zero_shot_hits(np.eye(3), np.eye(3), list("abc"), truth)


@pytest.mark.parametrize("neighbours", [1, 5, 100])
def test_knn_equals_a_naive_vote(neighbours, rng):
    train, test = rng.normal(size=(40, 3)), rng.normal(size=(25, 3))
    train_classes, classes = rng.choice(list("abc"), 40), rng.choice(list("abc"), 25)
    naive = []
    for x, true in zip(unit(test), classes):
        distances = [1 - float(np.dot(x, y)) for y in unit(train)]
        votes = dict.fromkeys("abc", 0.0)
        for j in sorted(range(40), key=distances.__getitem__)[:neighbours]:
            votes[train_classes[j]] += 1 / distances[j]
        naive.append(float(max(votes, key=votes.get) == true))
    np.testing.assert_array_equal(knn_hits(train, list(train_classes), test, list(classes), neighbours), naive)


def test_knn_is_perfect_on_its_own_rows_and_on_far_groups(rng):
    train = rng.normal(size=(20, 4))
    assert knn_hits(train, [str(i) for i in range(20)], train, [str(i) for i in range(20)], 1).mean() == 1
    x = np.repeat(np.eye(3), 10, axis=0) + 0.05 * rng.normal(size=(30, 3))
    assert knn_hits(x, list("a" * 10 + "b" * 10 + "c" * 10), np.eye(3), list("abc")).mean() == 1


@pytest.mark.parametrize(
    "train_classes, classes, said", [(["a"] * 3, ["a"] * 2, "3"), (["a"] * 4, ["a"], "1"), (["a"] * 4, ["a"] * 3, "3")]
)
def test_knn_asks_for_one_class_a_row(train_classes, classes, said):
    with pytest.raises(ValueError, match=said):
        knn_hits(np.eye(4), train_classes, np.eye(4)[:2], classes)


# ---- alignment and uniformity


def test_alignment_and_uniformity_equal_naive_loops(rng):
    images, texts = rng.normal(size=(2, 9, 4))
    a, b = unit(images), unit(texts)
    assert alignment(images, texts) == pytest.approx(sum(math.dist(p, q) ** 2 for p, q in zip(a, b)) / 9)
    for t in (2.0, 0.5):
        energies = [math.exp(-t * math.dist(a[i], a[j]) ** 2) for i in range(9) for j in range(9) if i != j]
        assert uniformity(images, t) == pytest.approx(math.log(sum(energies) / len(energies)))
    assert uniformity(images) == pytest.approx(uniformity(torch.from_numpy(images)))


def test_closed_forms_of_alignment_and_uniformity():
    poles = np.array([[0.0, 3], [0, -5]])
    assert alignment(poles, poles) == pytest.approx(0)
    assert alignment(poles, -poles) == pytest.approx(4)
    assert alignment(poles, poles[:, ::-1]) == pytest.approx(2)  # right angles
    assert uniformity(poles) == pytest.approx(-8)  # squared distance 4 at t = 2
    assert uniformity(np.eye(6)) == pytest.approx(-4)  # squared distance 2 at t = 2
    assert uniformity(np.ones((5, 3))) == pytest.approx(0)


@pytest.mark.parametrize(
    "features, said", [(np.ones((1, 4)), "one|1"), (np.ones(4), r"\(4,\)"), (np.full((2, 2), NAN), "NaN")]
)
def test_uniformity_refuses_what_has_no_pairs(features, said):
    with pytest.raises(ValueError, match=said):
        uniformity(features)


# ---- intervals and chance


def test_the_bootstrap_interval_agrees_with_the_normal_one(rng):
    values = rng.normal(3, 2, size=400)
    low, high = bootstrap_interval(values)
    error = 1.96 * values.std() / math.sqrt(400)
    assert low < values.mean() < high
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval([0.25] * 10) == pytest.approx((0.25, 0.25))


def test_the_bootstrap_interval_covers_the_truth_about_95_times_in_100(rng):
    covered = [
        low <= 0.3 <= high for low, high in (bootstrap_interval(rng.random(60) < 0.3, draws=400) for _ in range(200))
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_items_that_stand_and_fall_together_widen_the_interval(rng):
    values, groups = np.repeat(rng.normal(size=30), 10), np.repeat(np.arange(30), 10)
    alone, together = bootstrap_interval(values), bootstrap_interval(values, groups)
    ratio = (together[1] - together[0]) / (alone[1] - alone[0])
    assert ratio == pytest.approx(math.sqrt(10), rel=0.25)
    names = [f"base {g}" for g in groups]
    assert together[0] < values.mean() < together[1] and bootstrap_interval(values, names)[0] < values.mean()


def test_each_item_its_own_group_is_the_plain_bootstrap(rng):
    values = rng.normal(size=50)
    plain, grouped = bootstrap_interval(values), bootstrap_interval(values, list(range(50)))
    assert plain == pytest.approx(grouped, abs=0.05)


def test_groups_of_any_size_are_drawn_together_as_a_loop_draws_them():
    groups = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 7, size=30))
    values = np.random.default_rng(1).normal(size=30)[groups]
    members = [np.flatnonzero(groups == g) for g in range(30)]
    draws = [np.concatenate([members[g] for g in picks]) for picks in np.random.default_rng(5).integers(30, size=(500, 30))]
    wanted = np.percentile([values[rows].mean() for rows in draws], [2.5, 97.5])
    assert bootstrap_interval(values, groups, seed=5, draws=500) == pytest.approx(tuple(wanted))


@pytest.mark.parametrize(
    "values, groups, said",
    [([], None, "0|empty|no values"), ([1.0, 2, 3], ["a", "b"], "2"), ([1.0, NAN], None, "(?i)nan")],
)
def test_the_bootstrap_refuses_what_has_no_mean(values, groups, said):
    with pytest.raises(ValueError, match=said):
        bootstrap_interval(values, groups)


def test_the_seed_interval_is_students():
    values = [0.31, 0.35, 0.29, 0.40, 0.33]
    mean, half = seed_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert seed_interval([2.0, 2.0]) == pytest.approx((2, 0))


@pytest.mark.parametrize("values", [[], [0.5]])
def test_one_seed_gives_no_interval(values):
    with pytest.raises(ValueError, match=str(len(values))):
        seed_interval(values)


def test_chance_is_what_random_features_get(rng):
    classes, test = [None] * 5 + list("abcd") * 10, np.arange(5, 45)
    chance = chance_levels(classes, test)
    runs = []
    for _ in range(150):
        images, texts = rng.normal(size=(2, 40, 8))
        guess = zero_shot_hits(images, unit(rng.normal(size=(4, 8))), list("abcd"), [classes[i] for i in test]).mean()
        runs.append(retrieval_recall(images, texts) | median_rank(images, texts) | {"zero_shot": guess})
    for name, level in chance.items():
        if name not in runs[0]:
            continue
        got = np.array([r[name] for r in runs])
        assert abs(got.mean() - level) < 5 * stats.sem(got) + 1e-9, name
    assert set(runs[0]) <= set(chance)


def test_chance_never_passes_one():
    assert chance_levels(["a", "b", "c"], np.arange(3))["i2t_r10"] == 1


# ---- evaluate


def test_a_perfect_student_scores_full_marks():
    names = ["dog", "cat", "tree", "boat"]
    codes = np.eye(4)
    classes = [names[i % 4] for i in range(24)]
    features = np.stack(
        [codes[i % 4] + 0.01 * np.sin(np.arange(4) + i) for i in range(24)]
    )  # each row a little its own

    def encode(captions):
        return np.array([next(codes[j] for j, n in enumerate(names) if n in c) for c in captions])

    scores = evaluate(features, features, encode, classes, np.arange(12), np.arange(12, 24))
    for name in ("i2t_r1", "t2i_r1", "i2t_median_rank", "t2i_median_rank", "zero_shot", "knn_image", "knn_text"):
        assert scores[name] == 1, name
    assert scores["alignment"] == pytest.approx(0) and all(type(v) is float for v in scores.values())
    assert scores["uniformity_image"] == pytest.approx(uniformity(features[12:]))


def test_training_rows_and_unknown_classes_do_not_count(rng):
    classes = [None, "dog", "cat", "dog", "cat", None, "dog", "cat"]
    features, train, test = rng.normal(size=(8, 3)), np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7])
    encode = lambda captions: np.array([[1.0, 0, 0] if "dog" in c else [0, 1.0, 0] for c in captions])
    scores = evaluate(features, features[::-1].copy(), encode, classes, train, test)
    changed = features.copy()
    changed[train] = 99.0
    assert evaluate(changed, features[::-1].copy(), encode, classes, train, test)["i2t_r1"] == scores["i2t_r1"]
    guesses = ["dog" if x[0] > x[1] else "cat" for x in features[[4, 6, 7]]]
    assert scores["zero_shot"] == pytest.approx(np.mean([g == classes[i] for g, i in zip(guesses, (4, 6, 7))]))


def test_chance_of_one_neighbour_is_exact_and_each_encoder_is_scored_on_its_own(rng):
    classes, train, test = list("aaab" * 20) + [None] * 3, np.arange(40), np.arange(40, 83)
    level = chance_levels(classes, test, train)["knn_image"]
    voters, truth = [classes[i] for i in train], [classes[i] for i in test if classes[i]]
    got = [knn_hits(rng.normal(size=(40, 8)), voters, rng.normal(size=(40, 8)), truth, 1).mean() for _ in range(60)]
    assert abs(np.mean(got) - level) < 4 * stats.sem(got) and "knn_text" not in chance_levels(classes, test)
    codes = np.eye(3)[[2 if c is None else "ab".index(c) for c in classes]]
    turned = np.roll(codes, 1, axis=0)
    encode = lambda captions: np.eye(3)[["ab".index(c[-1]) for c in captions]]
    full, mixed = (evaluate(codes, texts, encode, classes, train, test) for texts in (codes, turned))
    assert full["zero_shot"] == full["knn_image"] == full["knn_text"] == mixed["knn_image"] == 1
    assert mixed["knn_text"] < 1 and mixed["i2t_r1"] < full["i2t_r1"]


def test_near_votes_count_more_and_few_rows_may_vote():
    near = np.array([[0.9, 0.19**0.5], [0.75, 0.4375**0.5], [0.75, -(0.4375**0.5)]])  # a vote of 1/0.1 against two of 1/0.25
    assert knn_hits(near, ["a", "b", "b"], np.eye(2)[:1], ["a"], 3) == 1
    assert knn_hits(near[:2], ["a", "b"], near[:2], ["a", "b"]).all()


# ---- what features and values come as

FORMS = {
    "float32": lambda x: np.asarray(x, np.float32),
    "float16": lambda x: np.asarray(x, np.float16),
    "list": lambda x: x.tolist(),
    "bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "with a gradient": lambda x: torch.tensor(x, requires_grad=True),
}
CLASSES = list("ababab")
METRICS = {
    "recall": lambda a, b: retrieval_recall(a, b, ks=(1, 3)),
    "rank": median_rank,
    "alignment": alignment,
    "uniformity": lambda a, b: uniformity(a),
    "knn": lambda a, b: knn_hits(a, CLASSES, b, CLASSES, 2).tolist(),
    "zero-shot": lambda a, b: zero_shot_hits(a, b, list("abcdef"), list("abcdef")).tolist(),
    "classes": lambda a, b: class_features(lambda captions: b, list("abcdef"), ["{}"]).ravel().tolist(),
    "evaluate": lambda a, b: evaluate(a, b, lambda captions: b[:2], CLASSES, [0, 1, 2, 3], [2, 3, 4, 5]),
    "hits": lambda a, b: hits_at_k(a, np.eye(6, dtype=bool), 2).tolist(),
    "places": lambda a, b: first_place(a, np.eye(6, dtype=bool)).tolist(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", METRICS)
def test_features_may_come_in_any_form(metric, form, rng):
    images, texts = rng.integers(-4, 5, size=(2, 6, 6)) + 0.5  # exact in every form
    wanted = METRICS[metric](images, texts)
    assert METRICS[metric](FORMS[form](images), FORMS[form](texts)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_values_may_come_in_any_form(form, rng):
    values = rng.integers(0, 5, size=12) / 4
    assert bootstrap_interval(FORMS[form](values)) == bootstrap_interval(values)
    assert seed_interval(FORMS[form](values)) == pytest.approx(seed_interval(values))
    assert bootstrap_interval(values > 0.3, torch.arange(12) // 2) == bootstrap_interval((values > 0.3) + 0.0, np.arange(12) // 2)


@pytest.mark.parametrize("broken", [[[1.0, 2.0], [3.0]], [["a", "b"]], np.eye(3) * 1j, None, np.ones((2, 2, 2))])
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_no_matrix_of_numbers_is_refused(metric, broken):
    with pytest.raises(ValueError, match="expected|inhomogeneous"):
        METRICS[metric](broken, broken)


@pytest.mark.parametrize("values", [[[1.0, 2.0], [3.0, 4.0]], [1.0, INF], torch.tensor([1.0, NAN])])
def test_values_that_have_no_mean_are_refused(values):
    for interval in (bootstrap_interval, seed_interval):
        with pytest.raises(ValueError, match="expected|NaN"):
            interval(values)


def test_a_classifier_of_another_size_and_a_query_without_an_answer_are_refused():
    for classifier, classes in ((np.eye(3), list("ab")), (np.eye(4), list("abcd"))):
        with pytest.raises(ValueError, match="text_classifier"):
            zero_shot_hits(np.eye(3), classifier, classes, list("aab"))
    for function in (lambda *args: hits_at_k(*args, 1), first_place):
        with pytest.raises(ValueError, match="right"):
            function(np.eye(2), np.array([[True, False], [False, False]]))
        with pytest.raises(ValueError, match="right"):
            function(np.eye(2), np.ones((2, 3), bool))


def test_items_are_what_all_metrics_are_means_of(rng):
    features, captions = rng.normal(size=(30, 6)), rng.normal(size=(30, 6))
    classes = [None if i % 7 == 0 else "ab"[i % 2] for i in range(30)]
    names = {"a": captions[1], "b": captions[2]}
    encode = lambda prompts: np.stack([names[p.split()[-1]] for p in prompts])
    train, test = np.arange(15), np.arange(15, 30)
    items, scores = (f(features, captions, encode, classes, train, test) for f in (item_scores, evaluate))
    assert {k: len(v) for k, v in items.items()} == {k: sum(classes[i] is not None for i in test) if k[:3] in ("zer", "knn") else 15 for k in items}
    assert all(scores[k] == (np.median(v) if "rank" in k else v.mean()) for k, v in items.items())
    assert retrieval_recall(features[test], captions[test]).items() <= scores.items() and median_rank(features[test], captions[test]).items() <= scores.items()
    assert scores["alignment"] == pytest.approx(alignment(features[test], captions[test]))
    assert scores["uniformity_text"] == pytest.approx(uniformity(captions[test]))


# ---- words seen, and the table over seeds


def test_words_seen_by_hand():
    known = ["red car", "Bus: stop", "man’s hat"]
    captions = {"red bus": "all", "STOP, car!": "all", "red fox": "some", "blue whale": "none", "red-hot": "some", "redder": "none",
                "ｒｅｄ": "all", "man’s": "all", "red red fox": "some"}
    assert words_seen([*captions], known).tolist() == [*captions.values()]


@given(captions=st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6),
       known=st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4).map(" ".join), max_size=4))
def test_words_seen_equals_a_naive_count(captions, known):
    words = [w for c in known for w in c.split()]
    for caption, found in zip(captions, words_seen(captions, known), strict=True):
        hits = [w in words for w in caption.split()]
        assert found == ("all" if all(hits) else "some" if any(hits) else "none")
    assert set(words_seen(captions, captions)) == {"all"} and set(words_seen(captions, [])) == {"none"}


def test_what_holds_no_word_is_not_seen_and_no_captions_have_no_strata():
    assert words_seen(["", "!?", "🍕"], ["red car"]).tolist() == ["none"] * 3
    assert words_seen([], ["red car"]).shape == (0,)


def runs_of(column, clip, kklip, **more):
    return [dict(dataset="openmoji", row=row, seed=str(s)) | {column: str(v)} | more
            for row, values in (("CLIP", clip), ("KKLIP", kklip)) for s, v in enumerate(values)]


def test_the_table_over_seeds_is_the_paired_t_interval():
    clip, kklip = [0.10, 0.12, 0.11], [0.15, 0.19, 0.14]
    runs = runs_of("hits", clip, kklip)
    wanted = []
    for values, sign in ((clip, ""), (kklip, ""), (np.subtract(kklip, clip), "+")):
        half = (stats.ttest_1samp(values, 0).confidence_interval(0.95).high - np.mean(values)) * 100
        wanted.append(f"{100 * np.mean(values):{sign}.1f} ± {half:.1f}")
    line = f"| found | {' | '.join(wanted)} | 3 |"
    for order in (runs, runs[::-1]): assert seed_table(order, {"hits": "found"}).splitlines()[2:] == [line]
    ranks = runs_of("t2i_median_rank", [10, 10], [8, 8])
    assert "| rank | 10.0 ± 0.0 | 8.0 ± 0.0 | -2.0 ± 0.0 | 2 |" in seed_table(ranks, {"t2i_median_rank": "rank"})


def test_the_table_over_seeds_says_nothing_of_what_is_not_there():
    runs = runs_of("hits", [0.1, 0.2], [0.3, 0.4]) + runs_of("hits", [9.0] * 3, [9.0] * 3, dataset="scenes")
    others = [dict(dataset="openmoji", row="shuffled teacher", seed="0", hits="7")]
    table = seed_table(runs + others, {"absent": "a", "hits": "h"})
    assert len(table.splitlines()) == 3 and "| h | 15.0" in table
    alone = runs_of("hits", [0.1, 0.2], [0.3])  # one seed in common
    for rest in (runs[:2], alone, [r | dict(hits="") for r in runs], []): assert seed_table(rest, {"hits": "h"}) == ""
    assert seed_table(runs, {}) == ""


# ---- names, rows, counts and templates as people give them

COMPOSED, APART = "caf\u00e9", "cafe\u0301"  # é in one code point and in two
PAIRS_OF_NAMES = {  # do the two name one thing?
    "composed": (COMPOSED, APART, True), "spaces": ("fire engine", " fire\u00a0 engine", True), "NUL": ("a", "a\0", False), "number": (1, "1", False),
    "tuples": (("a", 1), ("a", 1), True), "tensor": (torch.tensor(3), 3, True),
    "numpy": (np.str_("a"), "a", True), "letter case": ("Polish", "polish", False),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS_OF_NAMES)
def test_names_are_compared_as_they_read(case):
    one, other, same = PAIRS_OF_NAMES[case]
    assert retrieval_recall(np.eye(3), np.eye(3)[[1, 0, 2]], ks=(1,), text_ids=[one, other, "z"])["i2t_r1"] == (1 if same else pytest.approx(1 / 3))
    assert median_rank(np.eye(3), np.eye(3)[[1, 0, 2]], text_ids=iter([one, other, "z"]))["t2i_median_rank"] == (1 if same else 2.5)
    assert knn_hits(np.eye(2), [one, "z"], np.eye(2), [other, "z"], 1).tolist() == [same, 1]
    assert zero_shot_hits(np.eye(2), np.eye(2), [one, other], [one, other]).tolist() == [1, 1]
    assert bootstrap_interval([0.0, 4.0], [one, other]) == ((2, 2) if same else (0, 4))


def test_groups_are_drawn_in_the_order_of_their_names():
    "The resampling draws sorted groups; the interval belongs to the seed, not to the order of the rows."
    picks = np.random.default_rng(4).integers(4, size=(50, 4))
    groups = list("dbcadcbd")
    values = np.array([9.0, 4, 6, 3.5, 3, 1, 1, 6])
    wanted = [np.percentile([np.concatenate([values[[g == "abcd"[p] for g in groups]] for p in row]).mean() for row in picks], q) for q in (2.5, 97.5)]
    assert bootstrap_interval(values, groups, seed=4, draws=50) == pytest.approx(tuple(wanted))
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    assert bootstrap_interval(values[order], [groups[i] for i in order], seed=4, draws=50) == pytest.approx(tuple(wanted))
    assert bootstrap_interval(values, ["a", 0, "b", 1, ("c", 2), "b", 1, 0], draws=50)[0] <= values.mean()


@pytest.mark.parametrize("missing", [None, NAN])
def test_a_missing_id_is_nobody_s(missing):
    for name, call in (("text_ids", lambda ids: retrieval_recall(np.eye(3), np.eye(3), text_ids=ids)), ("groups", lambda ids: bootstrap_interval([0.0, 1.0, 0.5], ids))):
        with pytest.raises(ValueError, match=f"{name} hold missing values"): call([missing, "a", "b"])


def test_rows_of_zeros_lie_in_one_point():
    assert uniformity(np.zeros((4, 3))) == 0.0 and uniformity(np.ones((4, 3))) == pytest.approx(0.0, abs=1e-12)
    assert uniformity([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]) == pytest.approx(np.log((2 * np.exp(-2) + np.exp(-4)) / 3))


@pytest.mark.parametrize("rows", [(2, 3, 5), [2, 3, 5], np.array([2, 3, 5], np.uint8), torch.tensor([2, 3, 5]), np.array([0, 0, 1, 1, 0, 1], bool), [False, False, True, True, False, True]])
def test_rows_are_numbers_or_a_mask(rows, rng):
    features, classes, train = rng.normal(size=(2, 6, 4)), list("abaabb"), [0, 1, 4]
    encode = lambda prompts: np.eye(4)[["ab".index(p[-1]) for p in prompts]]
    wanted, got = (item_scores(*features, encode, classes, train, r) for r in ([2, 3, 5], rows))
    assert all((wanted[k] == got[k]).all() for k in wanted) and chance_levels(classes, rows, train) == chance_levels(classes, [2, 3, 5], train)
    turned = item_scores(*features, encode, classes, rows, train)
    assert all((v == item_scores(*features, encode, classes, [2, 3, 5], train)[k]).all() for k, v in turned.items())
    assert evaluate(*features, encode, classes, iter(train), rows) == evaluate(*features, encode, classes, train, [2, 3, 5])


@pytest.mark.parametrize("rows, said", [([6], "0 … 5"), ([-1], "0 … 5"), ([0.0, 1.0], "numbers of rows"), (["a"], "numbers of rows"), ([[0, 1]], "numbers of rows")])
def test_rows_that_are_not_there_are_named(rows, said):
    six = np.eye(6)
    for which in ("train", "test"):
        given = dict(train=[0, 1], test=[2, 3]) | {which: rows}
        for score in (item_scores, evaluate):
            with pytest.raises(ValueError, match=f"{which} .*{said}"): score(six, six, lambda p: np.ones((len(p), 6)), list("ababab"), **given)
        with pytest.raises(ValueError, match=f"{which} .*{said}"): chance_levels(list("ababab"), **given)
    with pytest.raises(ValueError, match="5 classes for 6 pairs"): item_scores(six, six, None, list("ababa"), [0], [1])


def test_pairs_without_classes_are_scored_without_classification(rng):
    images, texts = rng.normal(size=(2, 8, 3))
    refuse = lambda prompts: pytest.fail("no class name to encode")
    none, rest = [None, NAN] * 4, {f"{way}_{m}" for way in ("i2t", "t2i") for m in ("r1", "r5", "r10", "median_rank")}
    assert item_scores(images, texts, refuse, none, [0, 1, 2], [3, 4, 5, 6]).keys() == chance_levels(none, [3, 4, 5, 6], [0, 1, 2]).keys() == rest
    assert evaluate(images, texts, refuse, none, [0, 1, 2], [3, 4, 5, 6]).keys() == rest | {"alignment", "uniformity_image", "uniformity_text"}
    some = [None] * 4 + list("abab")  # classes, but no voter
    encode = lambda prompts: np.eye(3)[["ab".index(p[-1]) for p in prompts]]
    assert item_scores(images, texts, encode, some, [0, 1, 2], [5, 6]).keys() == chance_levels(some, [5, 6], [0, 1, 2]).keys() == rest | {"zero_shot"}
    with pytest.raises(ValueError, match="no rows to score"): chance_levels(some, [])


def test_classes_that_read_the_same_are_one_class():
    seen = []
    encode = lambda prompts: seen.append(prompts) or np.eye(4)[[0 if COMPOSED in p else 1 for p in prompts]]
    classes = [COMPOSED, APART, "tea", "tea ", np.str_("tea"), APART]
    items = item_scores(np.eye(4)[[0, 0, 1, 1, 1, 0]], np.eye(4)[[0, 0, 1, 1, 1, 0]], encode, classes, [0, 2], [1, 3, 4, 5])
    assert seen == [[t.replace("{}", c) for c in (COMPOSED, "tea")] for t in TEMPLATES]
    assert items["zero_shot"].tolist() == items["knn_image"].tolist() == [1] * 4
    chance = chance_levels(classes, [1, 3, 4, 5], [0, 2, 3])
    assert chance["zero_shot"] == 0.5 and chance["knn_text"] == pytest.approx((2 * 1 + 2 * 2) / 12)


def test_a_class_that_no_name_stands_for_is_named():
    with pytest.raises(ValueError, match="'fox' is a true class, but not in classes"):
        zero_shot_hits(np.eye(3), np.eye(3), ["dog", "cat", "tree"], ["dog", "fox", "cat"])


def test_class_names_and_templates_are_no_format_strings():
    seen = []
    encode = lambda prompts: seen.extend(prompts) or np.ones((len(prompts), 2))
    class_features(encode, iter(["a {0}", "{b}", 7]), iter(["{}: {}", "{x} {}"]))
    assert seen == ["a {0}: a {0}", "{b}: {b}", "7: 7", "{x} a {0}", "{x} {b}", "{x} 7"]
    for wrong in (["a photo"], ["{}", "{0}"], "a {}", [None]):
        with pytest.raises(ValueError, match="has no {} where the class name would stand"): class_features(encode, ["dog"], wrong)
    for classes, templates in (([], ["{}"]), (["dog"], [])):
        with pytest.raises(ValueError, match="no classes or no templates"): class_features(encode, classes, templates)
    with pytest.raises(ValueError, match=r"encode gave \[1\] rows.*expected 2"): class_features(lambda prompts: np.ones((1, 3)), ["dog", "cat"], ["{}"])


@pytest.mark.parametrize("k", [0, -1, 1.5, NAN, INF, None, "2"])
def test_counts_are_whole_numbers_from_one(k):
    for call in (lambda: hits_at_k(np.eye(3), np.eye(3, dtype=bool), k), lambda: retrieval_recall(np.eye(3), np.eye(3), ks=[1, k]),
                 lambda: knn_hits(np.eye(3), "abc", np.eye(3), "abc", k), lambda: bootstrap_interval([1.0, 2.0], draws=k)):  # fmt: skip
        with pytest.raises(ValueError, match=f"{k!r}; expected a whole number of at least 1"): call()


def test_ks_may_be_anything_that_can_be_counted_through():
    images, texts = np.eye(4), np.eye(4)[[1, 0, 2, 3]]
    for ks in (iter([1, 2]), np.array([1, 2]), torch.tensor([1, 2]), [1.0, 2.0], (True, 2)):
        assert retrieval_recall(images, texts, ks=ks) == {"i2t_r1": 0.5, "i2t_r2": pytest.approx(2 / 3), "t2i_r1": 0.5, "t2i_r2": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="ks=5; expected several"): retrieval_recall(images, texts, ks=5)


@pytest.mark.parametrize("right", [np.where(np.eye(3), 1, NAN), [["yes"] * 3] * 3, np.full((3, 3), 0.5), [[1], [0, 1]]])
def test_right_answers_are_booleans(right):
    for function in (lambda *args: hits_at_k(*args, 1), first_place):
        with pytest.raises(ValueError, match="right.*expected booleans"): function(np.eye(3), right)
    assert first_place(np.eye(3), np.eye(3).tolist()).tolist() == hits_at_k(np.eye(3), torch.eye(3).int(), 1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("length", [1e-300, 1e-20, 1e-13, 1e200])
def test_rows_of_any_length_become_unit_rows(length, rng):
    images, texts = rng.normal(size=(2, 6, 4))
    assert retrieval_recall(length * images, texts) == retrieval_recall(images, texts)
    assert alignment(length * images, texts) == pytest.approx(alignment(images, texts))
    assert alignment(np.zeros((2, 3)), np.eye(3)[:2]) == 1  # a row of zeros stays one


def test_words_of_any_script_are_whole():
    assert words_seen(["हिन्दी", "हद", "भाषा हिन्दी"], ["हिन्दी", "ह न द"]).tolist() == ["all", "none", "some"]  # vowel signs belong to a word
    assert words_seen([APART.upper(), "ไทย", "汽车"], [COMPOSED, "ภาษา ไทย", "红色 汽车"]).tolist() == ["all"] * 3
    assert words_seen(iter(["a_b"]), iter(["a b"])).tolist() == ["none"]


def test_a_table_of_other_numbers_and_names():
    rows = [dict(dataset="openmoji", row=row, seed=seed, hits=value, rank_share=3) for row in ("CLIP", "KKLIP") for seed, value in ((0, 0.0), (1, 0.0), (2, NAN))]
    assert "| a\\|b | 0.0 ± 0.0 | 0.0 ± 0.0 | +0.0 ± 0.0 | 2 |" in seed_table(iter(rows), {"hits": "a|b"})
    with pytest.raises(ValueError, match="runs without row, seed; give lines of results/study.csv"): seed_table([dict(dataset="openmoji")], {"a": "b"})


# ---- which rows, which encoder, which default: everything anew from scikit-learn and loops


@pytest.fixture(scope="module")
def mixed():
    "Overlapping classes, each encoder with its own mistakes; three parts, and a class that no scored pair has."
    rng = np.random.default_rng(11)
    classes = [*rng.choice(["ant", "bee", "cat"], 68), "owl", "owl", None, "ant", None, "bee", "cat", "bee"]
    meaning = dict(zip(["ant", "bee", "cat", "owl", None], rng.normal(size=(5, 6))))
    centre = np.stack([meaning[c] for c in classes])
    images, texts = centre + 1.6 * rng.normal(size=(76, 6)), 0.7 * centre + 1.3 * rng.normal(size=(76, 6))
    prompts = {t.replace("{}", c): length * (meaning[c] + 0.8 * rng.normal(size=6)) for c in ("ant", "bee", "cat", "owl") for t, length in zip(TEMPLATES, (1, 2, 5, 0.1))}
    encode = lambda texts: np.stack([prompts[t] for t in texts])
    train, test = rng.permutation(np.arange(4, 70))[:36], np.array([70, 71, 72, 3, 73, 74, 75, *range(3)])
    return images, texts, encode, classes, np.append(train, [68, 69]), np.append(test, np.setdiff1d(np.arange(4, 68), train)[:20])


def slow_items(images, texts, encode, classes, train, test, neighbours=5):
    from sklearn.neighbors import KNeighborsClassifier

    a, b = unit(images), unit(texts)
    items = {}
    for way, queries, candidates in (("i2t", a, b), ("t2i", b, a)):
        places = [1 + sum(float(queries[i] @ candidates[j]) > float(queries[i] @ candidates[i]) for j in test) for i in test]
        items |= {f"{way}_r{k}": [float(p <= k) for p in places] for k in (1, 5, 10)} | {f"{way}_median_rank": places}
    known, voters = [i for i in test if classes[i]], [i for i in train if classes[i]]
    names = sorted({c for c in classes if c})
    heads = unit(np.stack([sum(unit(encode([t.replace("{}", c)]))[0] for t in ("{}", "a drawing of {}", "an emoji of {}", "a picture of {}")) for c in names]))
    items["zero_shot"] = [float(names[int(np.argmax(heads @ a[i]))] == classes[i]) for i in known]
    for kind, x in (("image", images), ("text", texts)):
        knn = KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute", weights="distance").fit(x[voters], [classes[i] for i in voters])
        items[f"knn_{kind}"] = (knn.predict(x[known]) == np.array([classes[i] for i in known])).astype(float).tolist()
    return items


def test_items_and_means_are_those_of_scikit_learn_and_loops(mixed):
    wanted = slow_items(*mixed)
    got, scores = item_scores(*mixed), evaluate(*mixed)
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert got[name].tolist() == values, name
        assert scores[name] == pytest.approx(np.median(values) if "rank" in name else np.mean(values)), name
    a, b = (unit(x[mixed[5]]) for x in mixed[:2])
    assert scores["alignment"] == pytest.approx(np.mean([math.dist(p, q) ** 2 for p, q in zip(a, b)]))
    for kind, x in (("image", a), ("text", b)):
        assert scores[f"uniformity_{kind}"] == pytest.approx(math.log(np.mean([math.exp(-2 * math.dist(p, q) ** 2) for p, q in itertools.combinations(x, 2)])))
    by_ways = [[wanted[k] for k in wanted if k.startswith(way)] for way in ("i2t", "t2i", "knn_image", "knn_text")]
    assert by_ways[0] != by_ways[1] and by_ways[2] != by_ways[3]  # or a mix-up would not show


def test_five_neighbours_vote_by_default(mixed):
    images, _, _, classes, train, test = mixed
    known = [i for i in test if classes[i]]
    given = images[train], [classes[i] for i in train], images[known], [classes[i] for i in known]
    votes = {n: slow_items(*mixed, neighbours=n)["knn_image"] for n in (1, 4, 5, 6, 10)}
    assert all(knn_hits(*given, n).tolist() == v for n, v in votes.items()) and knn_hits(*given).tolist() == votes[5]
    assert all(votes[5] != v for n, v in votes.items() if n != 5)


def test_what_is_not_scored_moves_nothing(mixed):
    images, texts, encode, classes, train, test = mixed
    scores, rest = item_scores(*mixed), np.setdiff1d(np.arange(76), [*train, *test])
    assert len(rest) > 5
    spoiled = [x.copy() for x in (images, texts)]
    for x in spoiled: x[rest] = 99.0
    assert all((v == scores[k]).all() for k, v in item_scores(*spoiled, encode, classes, train, test).items())
    for x in spoiled: x[train] = -7.0
    moved = {k for k, v in item_scores(*spoiled, encode, classes, train, test).items() if (v != scores[k]).any()}
    assert moved == {"knn_image", "knn_text"}  # training rows vote, and do nothing else


def test_zero_shot_chooses_among_all_classes_not_among_those_scored():
    encode = lambda prompts: np.eye(3)[["abc".index(p[-1]) for p in prompts]]
    images = np.array([[1.0, 0, 0], [0, 0.5, 0.6], [0, 0, 1]])
    assert item_scores(images, images, encode, list("abc"), [2], [0, 1])["zero_shot"].tolist() == [1, 0]
    assert chance_levels(list("abc"), [0, 1], [2])["zero_shot"] == pytest.approx(1 / 3)


def test_the_templates_are_four():
    assert TEMPLATES == ("{}", "a drawing of {}", "an emoji of {}", "a picture of {}")
    seen = []
    class_features(lambda prompts: seen.append(prompts) or np.ones((1, 2)), ["dog"])
    assert seen == [["dog"], ["a drawing of dog"], ["an emoji of dog"], ["a picture of dog"]]


def test_equal_directions_tie_whatever_their_lengths(rng):
    "Unit rows of x and 3x differ in the last digit; a third of the answers are right by chance."
    x = rng.normal(size=(12, 33))
    three = np.concatenate([x, 3 * x, 0.7 * x])
    assert retrieval_recall(three, three[::-1].copy()[::-1] * 1.3, ks=(1,)) == pytest.approx({"i2t_r1": 1 / 3, "t2i_r1": 1 / 3})
    names = [f"{i} {j}" for j in range(3) for i in range(12)]
    np.testing.assert_allclose(zero_shot_hits(1.7 * three, three, names, names), 1 / 3)


def test_the_length_of_a_class_feature_does_not_count(rng):
    images, heads, names = rng.normal(size=(20, 4)), rng.normal(size=(5, 4)), list("abcde")
    truth = [names[int(np.argmax(unit(heads) @ x))] for x in images]
    assert zero_shot_hits(images, heads * np.array([[1], [50], [0.02], [3], [7]]), names, truth).all()
    lengths = np.array([[1e-200], [1.0], [1e150], [1e-9]])  # each row by itself
    assert retrieval_recall(lengths * np.eye(4), np.eye(4) / lengths, ks=(1,)) == {"i2t_r1": 1, "t2i_r1": 1}


# ---- chance: closed forms, and all orders


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_chance_of_recall_and_rank_is_the_mean_over_all_orders(n):
    "Every order of n texts, the right one at each place: n even and odd."
    level = chance_levels(list("abcdefg"), np.arange(7 - n, 7))
    places = [order.index(0) + 1 for order in itertools.permutations(range(n))]
    for way in ("i2t", "t2i"):
        assert level[f"{way}_median_rank"] == np.median(places) == (n + 1) / 2
        for k in (1, 5, 10): assert level[f"{way}_r{k}"] == pytest.approx(np.mean([p <= k for p in places]))
    assert level["zero_shot"] == pytest.approx(1 / 7) and "knn_text" not in level


def test_chance_of_neighbours_counts_pairs_of_a_training_and_a_scored_row(mixed):
    *_, classes, train, test = mixed
    pairs = [classes[i] == classes[j] for i in train for j in test if classes[i] and classes[j]]
    level = chance_levels(classes, test, train)
    assert level["knn_image"] == level["knn_text"] == pytest.approx(np.mean(pairs)) and level["zero_shot"] == 1 / 4
    assert level["i2t_r5"] == 5 / len(test) and abs(chance_levels(classes, train, test)["i2t_r5"] - 5 / len(train)) < 1e-12
    by_label = [np.mean([classes[i] == classes[j] for i in a for j in b if classes[i] and classes[j]]) for a, b in ((train, train), (test, test), ([*train, *test], test))]
    assert all(abs(level["knn_text"] - other) > 1e-3 for other in by_label)


@pytest.mark.parametrize("m, good", [(4, 1), (5, 2), (6, 3), (3, 3)])
def test_several_right_answers_by_all_orders(m, good):
    right = np.arange(m)[None] < good
    orders = list(itertools.permutations(range(m)))
    for k in range(1, m + 2): assert hits_at_k(np.zeros((1, m)), right, k)[0] == pytest.approx(np.mean([min(o[:k]) < good for o in orders]))
    assert first_place(np.zeros((1, m)), right)[0] == pytest.approx(np.mean([1 + min(o.index(g) for g in range(good)) for o in orders]))


def test_both_ways_are_each_their_own():
    images, texts = np.random.default_rng(0).normal(size=(2, 6, 3))
    cosines = unit(images) @ unit(texts).T
    places = {way: [1 + sum(row > row[i]) for i, row in enumerate(s)] for way, s in (("i2t", cosines), ("t2i", cosines.T))}
    assert all(f(places["i2t"]) != f(places["t2i"]) for f in (np.median, lambda p: p.count(1), lambda p: sum(x <= 2 for x in p)))
    recall, ranks = retrieval_recall(images, texts, ks=(1, 2)), median_rank(images, texts)
    for way, p in places.items():
        assert [recall[f"{way}_r{k}"] for k in (1, 2)] == [np.mean(np.array(p) <= k) for k in (1, 2)]
        assert ranks[f"{way}_median_rank"] == np.median(p)


# ---- intervals: the seed, the draws, the percentiles, the degrees of freedom


def test_the_plain_bootstrap_is_two_thousand_means_of_seed_zero(rng):
    values = rng.normal(size=37) ** 3
    for options, seed, draws in (({}, 0, 2000), (dict(seed=7), 7, 2000), (dict(draws=300), 0, 300)):
        picks = np.random.default_rng(seed).integers(37, size=(draws, 37))
        wanted = [np.quantile([values[p].mean() for p in picks], q) for q in (0.025, 0.975)]
        assert bootstrap_interval(values, **options) == pytest.approx(tuple(wanted), rel=1e-12)


@pytest.mark.parametrize("n, c", [(2, 12.706205), (3, 4.302653), (5, 2.776445), (10, 2.262157)])
def test_the_seed_interval_has_the_tables_quantile_of_n_minus_one(n, c):
    values = [((7 * i) % n + i * i / 10) for i in range(n)]
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    assert seed_interval(values) == pytest.approx((mean, c * spread / math.sqrt(n)), rel=1e-6)


def test_the_table_pairs_by_seed_and_takes_openmoji_alone():
    "Seeds in another order, one that only one of both has, another data set and another row."
    clip, kklip = {"0": 0.10, "1": 0.30, "2": 0.20, "9": 0.9}, {"2": 0.26, "0": 0.15, "7": 0.8, "1": 0.38}
    runs = [dict(dataset="openmoji", row=row, seed=s, hits=str(v), mean_rank=str(10 * v)) for row, values in (("KKLIP", kklip), ("CLIP", clip)) for s, v in values.items()]
    runs += [dict(dataset="scenes", row=row, seed=s, hits="0.5", mean_rank="1") for row in ("CLIP", "KKLIP") for s in "012"]
    gains = [5.0, 8.0, 6.0]
    half = 4.302653 * np.std(gains, ddof=1) / math.sqrt(3)
    lines = seed_table(runs, {"mean_rank": "r", "hits": "h"}).splitlines()
    assert lines[3].startswith("| h | 20.0 ± 24.8 | 26.3 ± 28.6 |") and lines[3].endswith(f"| +6.3 ± {half:.1f} | 3 |")
    assert lines[2].startswith("| r | 2.0 ± 2.5 | 2.6 ± 2.9 | +0.6 ± ") and lines[0] == "| | CLIP | KKLIP | KKLIP − CLIP | seeds |"


@pytest.mark.parametrize("caption, seen", [("red car", "all"), ("red bus", "some"), ("red bus fox", "some"), ("red car bus", "some"), ("bus", "none")])
def test_seen_words_are_those_of_the_known_captions(caption, seen):
    assert words_seen([caption, "bus"], ["RED", "old car"]).tolist() == [seen, "none"]
