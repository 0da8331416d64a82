"""Concepts and soft labels against scikit-learn's and scipy's definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from kklip_nb.concepts import apply_scale, concept_labels, fit_concepts, fit_scale, label_entropy, score_concepts, soft_labels

NAN, INF = float("nan"), float("inf")


def blobs(k=4, each=10, d=5, spread=0.1, seed=0):
    "k groups of points around corners that lie far apart; and the group of each point."
    rng = np.random.default_rng(seed)
    corners = 10 * np.eye(max(k, d))[:k, :d] if k <= d else rng.normal(0, 30, (k, d))
    truth = np.repeat(np.arange(k), each)
    return corners[truth] + spread * rng.normal(size=(k * each, d)), truth


# ---- fit_concepts


@pytest.mark.parametrize("convert", [np.float32, np.float64, lambda x: torch.from_numpy(x).float()])
def test_kmeans_finds_well_separated_groups(convert):
    points, truth = blobs()
    found = fit_concepts(convert(points), 4)
    assert np.shape(found.centroids) == (4, 5) and np.shape(found.labels) == (40,)
    assert np.issubdtype(np.asarray(found.labels).dtype, np.integer)
    assert adjusted_rand_score(truth, found.labels) == 1


def test_the_fit_means_what_scikit_learn_means():
    points, _ = blobs(spread=1.0)
    found, reference = fit_concepts(points, 4), KMeans(4, n_init=10, random_state=1).fit(points)
    distances = cdist(points, found.centroids)
    np.testing.assert_array_equal(found.labels, distances.argmin(1))  # labels are the nearest centroids
    for c in range(4):  # centroids are the means of their members
        np.testing.assert_allclose(found.centroids[c], points[found.labels == c].mean(0), atol=1e-5)
    assert found.inertia == pytest.approx((distances.min(1) ** 2).sum(), rel=1e-5)
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-6)
    assert adjusted_rand_score(found.labels, reference.labels_) == 1


def test_labels_are_nearest_centroids_where_groups_overlap_too(rng):
    points = rng.normal(size=(200, 6))
    found = fit_concepts(points, 12)
    distances = cdist(points, found.centroids)
    np.testing.assert_allclose(distances[np.arange(200), found.labels], distances.min(1), atol=1e-6)
    assert found.inertia == pytest.approx((distances.min(1) ** 2).sum(), rel=1e-5)
    assert set(np.asarray(found.labels).tolist()) == set(range(12))


@pytest.mark.parametrize("seed", [None, 11, 12])
def test_the_fit_is_scikit_learns_with_four_starts_and_this_seed(seed, rng):
    points = rng.normal(size=(90, 5))  # one start is worse than four here, and each seed ends elsewhere
    found, again = (fit_concepts(points.copy(), 9, **({} if seed is None else dict(seed=seed))) for _ in range(2))
    want, *others = (KMeans(9, n_init=n, random_state=(seed or 0) + s).fit(points) for n, s in ((4, 0), (1, 0), (3, 0), (4, 1)))
    assert found.inertia == pytest.approx(want.inertia_, rel=1e-12) and want.inertia_ < min(o.inertia_ for o in others[:2]) and not np.array_equal(others[2].labels_, want.labels_)
    np.testing.assert_array_equal(found.labels, want.labels_)
    np.testing.assert_array_equal(found.centroids, want.cluster_centers_.astype(np.float32))
    assert found.centroids.dtype == np.float32 and found.labels.dtype == np.int64 and type(found.inertia) is float
    assert all(np.array_equal(a, b) for a, b in zip(found[:3], again))


def test_the_fit_is_held_to_one_thread(monkeypatch, rng):
    import kklip_nb.concepts as module
    limits, limit = [], module.threadpool_limits
    monkeypatch.setattr(module, "threadpool_limits", lambda n: limits.append(n) or limit(n))
    score_concepts(rng.normal(size=(9, 3)), 2, ["a"] * 9)
    assert limits and set(limits) == {1}


def test_the_fit_leaves_its_input_alone(rng):
    points = rng.normal(size=(30, 4))
    before = points.copy()
    fit_concepts(points, 3)
    np.testing.assert_array_equal(points, before)


def test_one_concept_is_the_mean(rng):
    points = rng.normal(size=(20, 3))
    found = fit_concepts(points, 1)
    np.testing.assert_allclose(found.centroids, points.mean(0, keepdims=True), atol=1e-6)
    assert not np.any(found.labels)
    assert found.inertia == pytest.approx(20 * points.var(0).sum(), rel=1e-6)


def test_as_many_concepts_as_captions_leave_nothing_over(rng):
    found = fit_concepts(rng.normal(size=(7, 3)), 7)
    assert sorted(found.labels) == list(range(7))
    assert found.inertia == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("k", [0, -1, 6, 1000])
def test_a_number_of_concepts_that_cannot_be_is_refused(k, rng):
    with pytest.raises(ValueError) as error:
        fit_concepts(rng.normal(size=(5, 2)), k)
    assert str(k) in str(error.value) and "5" in str(error.value)


@pytest.mark.parametrize(
    "embeddings, said",
    [
        (np.ones(6), r"\(6,\)"),
        (np.ones((2, 3, 4)), r"\(2, 3, 4\)"),
        (np.ones((0, 4)), r"\(0, 4\)"),
        (np.ones((6, 2), bool), "bool"),
        (np.array([[0.0, 1], [NAN, 1]]), "(?i)nan"),
        (np.array([[0.0, 1], [INF, 1]]), "(?i)inf"),
        (torch.tensor([[0.0, 1], [NAN, 1]]), "(?i)nan"),
    ],
)
def test_fit_refuses_what_is_no_matrix_of_numbers(embeddings, said):
    with pytest.raises(ValueError, match=said):
        fit_concepts(embeddings, 2)


# ---- soft_labels


@pytest.mark.parametrize("dtype, tolerance", [("float16", 1e-3), ("float32", 1e-6), ("float64", 1e-10)])
@pytest.mark.parametrize("container", ["numpy", "torch"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_soft_labels_are_a_softmax_of_squared_distances_in_the_container_they_came_in(
    container, dtype, tolerance, temperature, rng
):
    x, c = rng.normal(size=(9, 4)).astype(dtype), rng.normal(size=(5, 4)).astype(dtype)
    expected = softmax(-cdist(x.astype(float), c.astype(float), "sqeuclidean") / temperature, axis=1)
    if container == "torch":
        x, c = torch.from_numpy(x), torch.from_numpy(c)
    labels = soft_labels(x, c, temperature)
    assert type(labels) is type(x) and labels.dtype == x.dtype and tuple(labels.shape) == (9, 5)
    np.testing.assert_allclose(np.asarray(labels, dtype=float), expected, atol=tolerance)


def test_embeddings_decide_the_container_and_a_graph_is_no_obstacle(rng):
    x, c = torch.randn(4, 3, requires_grad=True), rng.normal(size=(2, 3))
    labels = soft_labels(x, c, 1.0)
    assert isinstance(labels, torch.Tensor) and labels.dtype == torch.float32 and not labels.requires_grad
    assert soft_labels(x.detach().bfloat16(), c, 1.0).dtype == torch.bfloat16


@given(
    n=st.integers(1, 8),
    k=st.integers(1, 8),
    seed=st.integers(0, 999),
    log_temperature=st.floats(-12, 12),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_rows_are_probabilities_at_any_temperature(n, k, seed, log_temperature, size):
    rng = np.random.default_rng(seed)
    labels = soft_labels(size * rng.normal(size=(n, 5)), size * rng.normal(size=(k, 5)), 10.0**log_temperature)
    assert labels.shape == (n, k) and np.isfinite(labels).all() and (labels >= 0).all()
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-12)


def test_a_cold_label_is_the_nearest_concept(rng):
    x, c = rng.normal(size=(20, 4)), rng.normal(size=(6, 4))
    np.testing.assert_allclose(soft_labels(x, c, 1e-9), np.eye(6)[cdist(x, c).argmin(1)], atol=1e-9)


def test_a_hot_label_is_uniform(rng):
    np.testing.assert_allclose(soft_labels(rng.normal(size=(20, 4)), rng.normal(size=(6, 4)), 1e12), 1 / 6, atol=1e-9)


def test_with_one_concept_the_label_is_constant(rng):
    np.testing.assert_array_equal(soft_labels(rng.normal(size=(5, 4)), rng.normal(size=(1, 4)), 0.3), np.ones((5, 1)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_distances_and_a_tiny_temperature_give_no_nan(dtype):
    x = np.array([[1e4, 0.0], [0.0, 0.0], [-1e4, 3.0]], dtype)
    labels = soft_labels(x, np.array([[0.0, 0.0], [1e4, 1e4]], dtype), 1e-12)
    np.testing.assert_array_equal(labels[1:], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(labels[0], [0.5, 0.5])  # equally far from both


def test_embeddings_far_from_the_origin_lose_nothing(rng):
    "Decoders have dimensions with huge values: only differences count, so the same shift of both changes nothing."
    x, c = (np.round(rng.normal(size=shape), 3) for shape in ((9, 4), (5, 4)))
    labels = soft_labels(x + 2.0**22, c + 2.0**22, 0.01)
    np.testing.assert_allclose(
        labels, softmax(-cdist(x + 2.0**22, c + 2.0**22, "sqeuclidean") / 0.01, axis=1), atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF, -INF])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature):
    with pytest.raises(ValueError, match=str(temperature)):
        soft_labels(np.ones((3, 2)), np.ones((2, 2)), temperature)


@pytest.mark.parametrize(
    "x, c, said",
    [
        (np.ones((3, 4)), np.ones((2, 5)), ["4", "5"]),
        (np.ones(3), np.ones((2, 3)), ["(3,)"]),
        (np.ones((3, 4)), np.ones(4), ["(4,)"]),
        (np.ones((0, 4)), np.ones((2, 4)), ["(0, 4)"]),
        (np.ones((3, 4)), np.ones((0, 4)), ["(0, 4)"]),
        (np.ones((3, 4), bool), np.ones((2, 4)), ["bool"]),
        (np.full((3, 4), NAN), np.ones((2, 4)), ["embeddings", "NaN"]),
        (np.ones((3, 4)), np.full((2, 4), INF), ["centroids", "inf"]),
    ],
)
def test_soft_labels_refuse_what_does_not_match(x, c, said):
    with pytest.raises(ValueError) as error:
        soft_labels(x, c, 1.0)
    for word in said:
        assert word in str(error.value)


# ---- concept_labels


def targets_of(n, k, d, how, rng):
    "Targets as apply_scale makes them of anisotropic vectors, and centroids that are means of some."
    raw = rng.normal(size=(n, d)) + 5 * rng.normal(size=d)
    x = raw - raw.mean(0) if how == "unit" else raw
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if how == "unit" else x / np.sqrt(np.square(x).sum(1).mean())
    c = x[rng.integers(0, n, (k, 3))].mean(1)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(c, dtype=torch.float32)


@pytest.mark.parametrize("how", ["unit", "raw"])
@pytest.mark.parametrize("k, d", [(1, 8), (48, 576), (300, 1024)])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_labels_of_the_step_are_the_soft_labels(how, k, d, temperature, rng):
    x, c = targets_of(40, k, d, how, rng)
    expected = soft_labels(x.double(), c.double(), temperature)
    with torch.autocast("cpu", torch.bfloat16): labels = concept_labels(x, c, temperature)
    assert labels.dtype == torch.float32 and labels.shape == (40, k)
    torch.testing.assert_close(labels.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(concept_labels(x, c.double(), temperature), labels, atol=0, rtol=0)  # converted once, or each time


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_labels_of_the_step_from_any_precision(dtype, rng):
    x, c = (t.to(dtype) for t in targets_of(20, 7, 32, "unit", rng))
    labels = concept_labels(x, c, 0.1)
    assert labels.dtype == torch.float32
    torch.testing.assert_close(labels.double(), soft_labels(x.double(), c.double(), 0.1), atol=1e-6, rtol=0)


def test_labels_of_the_step_read_nothing_on_the_host(rng):
    meta = concept_labels(torch.empty(5, 3, device="meta"), torch.empty(4, 3, device="meta"), 0.1)
    assert meta.shape == (5, 4) and meta.dtype == torch.float32


def test_labels_of_the_step_by_hand_and_in_any_container():
    x, c = [[0.0, 0.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 2.0], [2.0, 1.0]]
    want = softmax(-np.array([[1, 4, 5], [2, 5, 0]]) / 2.0, axis=1)  # squared distances over the temperature
    for a in (x, np.array(x), np.array(x)[::-1][::-1], torch.tensor(x, requires_grad=True), torch.tensor(x).bfloat16()):
        for b in (c, np.array(c, np.float32), torch.tensor(c, requires_grad=True)):
            labels = concept_labels(a, b, 2.0)
            assert labels.dtype == torch.float32 and not labels.requires_grad
            np.testing.assert_allclose(labels, want, atol=1e-7)
    assert concept_labels(torch.empty(0, 2), c, 2.0).shape == (0, 3)


@pytest.mark.parametrize("x, c, temperature", [((3, 4), (2, 5), 1), ((4,), (2, 4), 1), ((3, 4), (4,), 1), ((3, 4), (2, 4), 0), ((3, 4), (2, 4), -1.0), ((3, 4), (2, 4), INF), ((3, 4), (2, 4), NAN)])
def test_labels_of_the_step_refuse_what_does_not_match(x, c, temperature):
    with pytest.raises(ValueError, match=r"targets.*centroids.*temperature.*expected"): concept_labels(torch.ones(x), torch.ones(c), temperature)


def test_labels_of_the_step_far_from_the_origin_and_very_cold(rng):
    x, c = 1e4 * torch.randn(6, 3), 1e4 * torch.randn(4, 3)
    labels = concept_labels(x, c, 1e-6)
    assert labels.isfinite().all()
    torch.testing.assert_close(labels, torch.eye(4)[torch.cdist(x, c).argmin(1)])


# ---- lists and tensors


@pytest.mark.parametrize("convert", [lambda x: x.tolist(), lambda x: torch.tensor(x).bfloat16(), lambda x: torch.tensor(x, requires_grad=True), lambda x: torch.tensor(x).half()])
def test_lists_and_tensors_of_any_kind_are_read(convert):
    points, truth = blobs()
    assert adjusted_rand_score(truth, fit_concepts(convert(points), 4).labels) == 1
    scores = score_concepts(convert(points), 4, [f"class {t}" for t in truth], seeds=(0, 1))
    assert scores["nmi"] == pytest.approx(1) and scores["stability"] == 1
    labels = soft_labels(convert(points), convert(points[::10]), 1.0)
    np.testing.assert_array_equal(np.asarray(torch.as_tensor(labels).float()).argmax(1), truth)
    assert np.isfinite(label_entropy(convert(softmax(points, axis=1)))).all()


def test_lists_give_arrays_and_ragged_or_empty_ones_an_error():
    labels = soft_labels([[1.0, 2.0]], [[0.0, 0.0], [1.0, 2.0]], 0.1)
    assert isinstance(labels, np.ndarray) and labels.dtype == np.float64
    np.testing.assert_allclose(labels, softmax([[-50.0, 0.0]], axis=1))
    rows = soft_labels([torch.tensor([1.0, 2.0], requires_grad=True)], [[0.0, 0.0], [1.0, 2.0]], torch.tensor(0.1))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, labels, atol=1e-7)
    for wrong in ([[1.0], [1.0, 2.0]], [], [[]], [["a"]], None):
        with pytest.raises(ValueError, match="embeddings"): soft_labels(wrong, [[0.0]], 0.1)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_more_concepts_than_different_captions_stay_finite(rng):
    found = fit_concepts(np.repeat(rng.normal(size=(3, 4)), 5, 0), 7)
    assert np.isfinite(found.centroids).all() and found.centroids.shape == (7, 4) and found.inertia == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(soft_labels(found.centroids, found.centroids, 0.1).sum(1), 1, atol=1e-6)


def test_concepts_of_one_table_need_no_scale(rng):
    found = fit_concepts(rng.normal(size=(9, 3)), 2)
    assert found.scale is None and found.meta is None


# ---- label_entropy


def test_entropy_agrees_with_scipy_and_its_limits(rng):
    labels = softmax(rng.normal(size=(10, 6)), axis=1)
    np.testing.assert_allclose(label_entropy(labels), entropy(labels, axis=1), rtol=1e-12)
    np.testing.assert_allclose(label_entropy(torch.from_numpy(labels)), entropy(labels, axis=1), rtol=1e-12)
    np.testing.assert_allclose(label_entropy(np.eye(4)), 0, atol=1e-12)
    np.testing.assert_allclose(label_entropy(np.full((2, 8), 1 / 8)), math.log(8))
    np.testing.assert_allclose(label_entropy([[1 - 1e-5, 1e-5]]), -(1 - 1e-5) * math.log1p(-1e-5) - 1e-5 * math.log(1e-5))


def test_probabilities_may_be_rounded_to_half_precision_and_no_further():
    np.testing.assert_allclose(label_entropy(torch.full((1, 48), 1 / 48).bfloat16()), math.log(48), rtol=5e-3)
    label_entropy([[0.5, 0.504], [0.5, 0.496]])
    for wrong in (0.507, 0.493):
        with pytest.raises(ValueError, match="expected 1"): label_entropy([[0.5, wrong], [0.5, 0.5]])


@pytest.mark.parametrize(
    "labels, said",
    [
        (np.array([[-0.5, 1.5]]), "-0.5"),
        (np.array([[0.5, 0.1]]), "0.6"),
        (np.array([[NAN, 1.0]]), "NaN"),
        (np.ones(3), r"\(3,\)"),
    ],
)
def test_entropy_refuses_what_is_no_row_of_probabilities(labels, said):
    with pytest.raises(ValueError, match=said):
        label_entropy(labels)


# ---- score_concepts


def test_scores_are_perfect_for_the_true_number_of_groups():
    points, truth = blobs()
    classes = [f"class {t}" for t in truth]
    right, fewer, more = (score_concepts(points, k, classes) for k in (4, 2, 8))
    assert right["k"] == 4
    assert right["nmi"] == pytest.approx(1) and right["stability"] == pytest.approx(1)
    assert right["silhouette"] == pytest.approx(silhouette_score(points, truth)) and right["silhouette"] > 0.9
    assert right["silhouette"] > max(fewer["silhouette"], more["silhouette"])
    assert right["nmi"] > max(fewer["nmi"], more["nmi"])
    assert fewer["inertia"] > right["inertia"] > more["inertia"]
    assert right["inertia"] == pytest.approx(sum(10 * points[truth == c].var(0).sum() for c in range(4)), rel=1e-5)


def test_unknown_classes_are_left_out():
    points, truth = blobs()
    classes = [None if i % 10 == 0 else f"class {t}" for i, t in enumerate(truth)]
    assert score_concepts(points, 4, classes)["nmi"] == pytest.approx(1)


@pytest.mark.parametrize("count", [39, 41])
def test_one_class_for_each_embedding_is_asked_for(count):
    classes = ["a", "b", "c"] * 20
    with pytest.raises(ValueError, match=str(count)):
        score_concepts(blobs()[0], 4, classes[:count])


def test_what_cannot_be_known_is_nan():
    points, truth = blobs()
    assert math.isnan(score_concepts(points, 4, [None] * 40, seeds=(0,))["nmi"])
    assert math.isnan(score_concepts(points, 4, [f"class {t}" for t in truth], seeds=(0,))["stability"])


def overlapping(rng):
    "Points without groups, so that every seed gives other concepts; classes that agree a little, of unequal size."
    points = rng.normal(size=(60, 4)) + [3, 0, 0, 0]  # off the origin: cosines and distances differ
    return points, [["a", "b", None, "c", "b"][int(x > 3) + (i % 7 == 0) + (i % 5 == 0)] for i, x in enumerate(points[:, 0])]


@pytest.mark.parametrize("seeds", [None, (0, 1, 2), (5, 7, 1, 2), (4,)])
def test_scores_are_means_over_scikit_learns_fits_and_pairs_of_them(seeds, rng):
    points, classes = overlapping(rng)
    found = score_concepts(points, 5, classes, **({} if seeds is None else dict(seeds=seeds)))
    fits = [KMeans(5, n_init=4, random_state=seed).fit(points) for seed in seeds or (0, 1, 2)]
    known = [i for i, c in enumerate(classes) if c]
    nmi = [normalized_mutual_info_score([classes[i] for i in known], f.labels_[known]) for f in fits]
    pairs = [adjusted_rand_score(a.labels_, b.labels_) for i, a in enumerate(fits) for b in fits[i + 1:]]
    want = dict(k=5, inertia=np.mean([f.inertia_ for f in fits]), nmi=np.mean(nmi), silhouette=np.mean([silhouette_score(points, f.labels_) for f in fits]),
                stability=np.mean(pairs) if pairs else NAN)
    assert found == pytest.approx(want, rel=1e-9, nan_ok=True) and 0 < found["nmi"] < 0.5
    if len(fits) > 1:
        for numbers in (nmi, [f.inertia_ for f in fits], pairs): assert abs(np.mean(numbers) - np.median(numbers)) > 1e-4  # so that a median would show


def test_nmi_is_the_arithmetic_one(rng):
    "Mutual information over the mean of both entropies, from the table of counts."
    points, classes = overlapping(rng)
    known = [i for i, c in enumerate(classes) if c]
    labels = KMeans(5, n_init=4, random_state=0).fit(points).labels_
    table = np.zeros((3, 5))
    for i in known: table["abc".index(classes[i]), labels[i]] += 1 / len(known)
    a, b, both = table.sum(1), table.sum(0), entropy(table.ravel())
    assert score_concepts(points, 5, classes, (0,))["nmi"] == pytest.approx(2 * (entropy(a) + entropy(b) - both) / (entropy(a) + entropy(b)))


def test_classes_are_compared_as_python_compares_them(rng):
    points, _ = overlapping(rng)
    numbers = np.arange(60) % 3
    def nmi(values): return score_concepts(points, 5, values, (0,))["nmi"]
    want = nmi([f"class {c}" for c in numbers])
    for values in (numbers, torch.tensor(numbers), [("a", "a\0", "b")[c] for c in numbers], [(1, "1", "\u00e9")[c] for c in numbers], (f"class {c}" for c in numbers)):
        assert nmi(values) == pytest.approx(want)
    missing = [NAN if i % 4 else "ab"[c % 2] for i, c in enumerate(numbers)]  # as pandas writes it
    assert nmi(missing) == pytest.approx(nmi([None if v != v else v for v in missing]))
    with pytest.raises(ValueError, match="ids cannot be compared"): nmi([["a"]] * 60)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_scores_at_the_limits_are_nan_where_they_mean_nothing(rng):
    points = rng.normal(size=(6, 3))
    for k, stability in ((1, 1), (6, 1)):
        found = score_concepts(points, k, list("aabbcc"))
        assert math.isnan(found["silhouette"]) and found["stability"] == stability
    assert math.isfinite(score_concepts(points, 5, list("aabbcc"))["silhouette"])
    assert math.isnan(score_concepts(np.ones((6, 3)), 2, list("aabbcc"))["silhouette"])
    with pytest.raises(ValueError, match="no seeds"): score_concepts(points, 2, list("aabbcc"), ())


# ---- scale


def test_a_scale_is_fitted_on_some_rows_and_applied_to_others(rng):
    raw, other = ((rng.normal(size=(n, 7)) * 3 + 20).astype(np.float32) for n in (50, 9))
    mean, length = raw.mean(0, dtype=float), np.sqrt((raw.astype(float) ** 2).sum(1).mean())
    for how in ("unit", "raw"):
        for pieces in ([raw], np.split(raw, [1, 30]), (p for p in (raw[:0], raw[:20], torch.tensor(raw[20:]), torch.empty(0, 7))), [raw.tolist()]):
            scale = fit_scale(pieces, how)
            assert scale.mean.dtype == np.float32 and type(scale.length) is float and scale.how == how
            np.testing.assert_allclose(scale.mean, mean, rtol=1e-6)
            assert scale.length == pytest.approx(length, rel=1e-12)
        want = (other - mean) / np.linalg.norm(other - mean, axis=1, keepdims=True) if how == "unit" else other / length
        found = apply_scale(other, scale)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)
        assert apply_scale(raw[:0], scale).shape == (0, 7)
    assert fit_scale([raw]).how == "unit"
    with pytest.raises(ValueError, match="'both'"): fit_scale([raw], "both")


def test_half_precision_is_scaled_in_float32():
    raw = np.array([[60000, 1, -2], [-60000, 3, 5], [100, 2, 0]], np.float16)  # a sum and a square of it overflow
    want = raw.astype(float)
    for given_ in (raw, torch.tensor(raw)):
        for how in ("unit", "raw"):
            scale = fit_scale([given_], how)
            found = apply_scale(given_, scale)
            centred = want - want.mean(0)
            np.testing.assert_allclose(found, centred / np.linalg.norm(centred, axis=1, keepdims=True) if how == "unit" else want / np.sqrt((want ** 2).sum(1).mean()), atol=1e-6)


def test_a_caption_like_the_mean_has_no_direction_and_no_nan():
    scale = fit_scale([np.array([[1.0, 2], [3, 4]])])
    np.testing.assert_array_equal(apply_scale([[2.0, 3.0]], scale), [[0, 0]])


@pytest.mark.parametrize("pieces, said", [
    ([], "no embeddings"), ([np.ones((0, 3))], "no embeddings"), ([np.zeros((4, 3))], "all are zero"), (np.ones((4, 3)), r"piece.*\(3,\)"), ([np.ones((2, 3)), np.ones((2, 1))], "3 and 1"),
    ([[[1.0, NAN]]], "piece.*NaN"), ([[[1.0], [1.0, 2.0]]], "piece.*one length"), ([np.ones((2, 3), bool)], "bool")])
def test_a_scale_of_nothing_or_of_other_things_is_refused(pieces, said):
    for how in ("unit", "raw"):
        with pytest.raises(ValueError, match=said): fit_scale(pieces, how)


@pytest.mark.parametrize("embeddings, said", [(np.ones((2, 1)), "1 dimensions, a scale of 3"), (np.ones(3), r"\(3,\)"), ([[1.0, 2.0, INF]], "embeddings.*infinite")])
def test_embeddings_that_do_not_fit_the_scale_are_refused(embeddings, said):
    for how in ("unit", "raw"):
        with pytest.raises(ValueError, match=said): apply_scale(embeddings, fit_scale([np.eye(3)], how))
