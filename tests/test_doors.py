"""What one function takes its neighbours take: numbers in any container, precision and layout give the same result."""


import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.offsetbox import AnnotationBbox

from kklip_nb.concepts import apply_scale, fit_concepts, fit_scale, label_entropy, score_concepts, soft_labels
from kklip_nb.evaluation import (alignment, bootstrap_interval, chance_levels, class_features, first_place, hits_at_k, item_scores, knn_hits, median_rank, retrieval_recall,
                                 seed_interval, uniformity, zero_shot_hits)
from kklip_nb.evidence.attributes import attribute_scores, average_precisions, linear_probe, map_interval, mean_average_precision, signature_scores
from kklip_nb.evidence.one_word import pair_similarities, winoground
from kklip_nb.evidence.other_words import chance_scores, score_queries
from kklip_nb.evidence.study import holm, paired_difference
from kklip_nb.evidence.text_probe import lookup, token_accuracy
from kklip_nb.recipe import Recipe
from kklip_nb.student import make_word_table
from kklip_nb.teacher import load_embeddings, save_embeddings, standardise
from kklip_nb.training import make_targets
from kklip_nb.visualization import click_map, concept_names, distinct_concepts, image_grid, place_names, plot_concepts, plot_images, plot_similarities, umap_project

RNG = np.random.default_rng(0)


def rounded(*shape):
    "Numbers that every precision holds exactly, so that only a bug can change a result."
    return (RNG.integers(-15, 16, size=shape) / 8).astype(np.float32)


X, Y, C = rounded(12, 4), rounded(12, 4), rounded(3, 4)
NAMES = list("aabbccddeeff")
TRUTH = (RNG.random((12, 4)) < 0.4).astype(np.float32)
TRUTH[0], TRUTH[1] = 1, 0
P = np.tile(np.array([[0.5, 0.25, 0.25], [1, 0, 0], [0, 0.5, 0.5]], np.float32), (4, 1))
PICTURES = RNG.integers(256, size=(12, 8, 8, 3)).astype(np.uint8)
ENCODE = {c: r for c, r in zip("abcdef", rounded(6, 4))}
SMALL = Recipe(k=3, words=0, first_steps=0)

FORMS = {
    "list": lambda x: x.tolist(), "tuple": lambda x: tuple(map(tuple, x.tolist())) if x.ndim > 1 else tuple(x.tolist()), "rows": lambda x: list(x), "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16), "reversed": lambda x: x[::-1].copy()[::-1], "fortran": np.asfortranarray, "strided": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape), "tensor": torch.tensor, "bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "gradient": lambda x: torch.tensor(x).requires_grad_(), "result": lambda x: torch.tensor(x).requires_grad_() * 1, "tensors": lambda x: [torch.tensor(r) for r in x],
}
WHOLE = ("list", "tuple", "rows", "reversed", "strided", "read-only", "tensor", "tensors")  # for whole numbers


def drawn(draw):
    "What a function has drawn: the positions of all marks and the pixels of all pictures."
    def call(*args):
        figure, ax = plt.subplots()
        result = draw(*args, ax) if ax is not None else draw(*args)
        axes = result.axes if isinstance(result, plt.Figure) else [ax]
        parts = [c.get_offsets() for a in axes for c in a.collections if hasattr(c, "get_offsets")] + [i.get_array() for a in axes for i in a.images]
        boxes = [b for a in axes for b in a.artists if isinstance(b, AnnotationBbox)]
        parts += [part for b in boxes for part in (np.array(b.xy, float), b.offsetbox.get_data())]
        texts = [(*t.get_position(), *t.xy) for t in result] if isinstance(result, list) else []
        plt.close("all")
        return [np.ma.getdata(p).astype(float).ravel() for p in parts] + [np.array(texts, float).ravel()]
    return call


def saved(bits):
    def call(x):
        from kklip_nb.tools import cache_dir
        path = save_embeddings(cache_dir() / "door.safetensors", x, NAMES, bits)
        return load_embeddings(path, NAMES)
    return call


def flat(targets, concepts, labels): return [targets, *concepts[:2], labels]


# function → what it is called with: the numbers in every form, the rest closed over
TABLE = {
    "concepts.fit_scale": (lambda x: fit_scale([x], "unit")[:2], X), "concepts.apply_scale": (lambda x: apply_scale(x, fit_scale([X], "unit")), X),
    "concepts.apply_scale raw": (lambda x: apply_scale(x, fit_scale([X], "raw")), X), "concepts.fit_concepts": (lambda x: fit_concepts(x, 3)[:3], X),
    "concepts.score_concepts": (lambda x: score_concepts(x, 3, NAMES), X), "concepts.soft_labels": (lambda x, c: np.asarray(torch.as_tensor(soft_labels(x, c, 0.5)).double()), X, C),
    "concepts.label_entropy": (label_entropy, P), "teacher.standardise": (standardise, X, X[0]), "teacher_files.save_embeddings": (saved(16), X), "teacher_files.save_embeddings 8 bits": (saved(8), X),
    "student.make_word_table": (lambda x: make_word_table(range(12), x, 3).vectors, X),
    "training.make_targets": (lambda x: flat(*make_targets(x, np.arange(8), SMALL)), X),
    "evaluation.hits_at_k": (lambda x: hits_at_k(x, np.eye(12, 4, dtype=bool) | (np.arange(12) > 3)[:, None], 2), X), "evaluation.first_place": (lambda x: first_place(x, np.eye(12, 4) + 1 > 0), X),
    "evaluation.retrieval_recall": (retrieval_recall, X, Y), "evaluation.median_rank": (median_rank, X, Y), "evaluation.alignment": (alignment, X, Y), "evaluation.uniformity": (uniformity, X),
    "evaluation.class_features": (lambda x: class_features(lambda texts: x, range(12), ["{}", "a {}"]), X),
    "evaluation.zero_shot_hits": (lambda x, t: zero_shot_hits(x, t, ["a", "b", "c"], ["a"] * 6 + ["c"] * 6), X, C),
    "evaluation.knn_hits": (lambda x, y: knn_hits(x, NAMES, y, NAMES), X, Y), "evaluation.bootstrap_interval": (bootstrap_interval, X[:, 0]), "evaluation.seed_interval": (seed_interval, X[:, 0]),
    "evaluation.item_scores": (lambda x, y: item_scores(x, y, lambda texts: [ENCODE[t.split()[-1]].tolist() for t in texts], NAMES, np.arange(6), np.arange(6, 12)), X, Y),
    "visualization.umap_project": (lambda x: umap_project(x, neighbours=4), X), "visualization.plot_images": (drawn(lambda p, ax: plot_images(p, PICTURES, ax)), X[:, :2]),
    "visualization.plot_concepts": (drawn(lambda p, ax: plot_concepts(p, [0, 1] * 6, {0: "a", 1: "b"}, [0, 1], ax)), X[:, :2]),
    "visualization.place_names": (drawn(lambda p, ax: (ax.set(xlim=(-2, 2), ylim=(-2, 2)), place_names(p, [0, 1] * 6, {0: "a", 1: "b"}, [0, 1], ax))[1]), X[:, :2]),
    "visualization.concept_names": (lambda d: concept_names(["a dog", "big dog", "a cat"] * 4, [0, 0, 1] * 4, distances=d), abs(X[:, 0])),
    "visualization.click_map": (lambda p: click_map(p, PICTURES, NAMES, [0] * 12, {0: ("name", PICTURES[:1], "a")}), X[:, :2]),
    "visualization.plot_similarities": (drawn(lambda s, ax: plot_similarities(s, list("abcd"), ax)), X),
    "evidence.attributes.average_precisions": (average_precisions, X, TRUTH), "evidence.attributes.mean_average_precision": (mean_average_precision, X, TRUTH),
    "evidence.attributes.map_interval": (lambda s, t: map_interval(s, t, NAMES, draws=20), X, TRUTH), "evidence.attributes.attribute_scores": (attribute_scores, X, C),
    "evidence.attributes.signature_scores": (lambda s, t: signature_scores(s, t), X, TRUTH), "evidence.attributes.linear_probe": (lambda x, t, y: linear_probe(x, t, y), X, TRUTH, Y),
    "evidence.one_word.winoground": (lambda s: winoground(s), rounded(5, 2, 2)), "evidence.one_word.pair_similarities": (pair_similarities, X, Y),
    "evidence.other_words.score_queries": (score_queries, X, Y, TRUTH[:, :1] * np.eye(12, dtype=np.float32) + np.eye(12, dtype=np.float32)[::-1] > 0),
    "evidence.other_words.chance_scores": (chance_scores, np.array([[1, 0, 0, 1], [0, 1, 0, 0]], bool)), "evidence.study.paired_difference": (paired_difference, X[:, 0], Y[:, 0]),
    "evidence.study.holm": (holm, abs(X[:, 0]) / 2), "evidence.text_probe.lookup": (lambda x: lookup(x, NAMES)(NAMES), X),
}
SLOW = {"visualization.umap_project": ("tuple", "bfloat16", "gradient", "tensors")}
ROUGH = {"concepts.soft_labels": 1e-3}  # labels come in the precision given
NUMBERS = {
    "visualization.concept_names labels": (lambda labels: concept_names(["a dog", "big dog", "a cat"] * 4, labels), np.array([0, 0, 1] * 4)),
    "visualization.distinct_concepts": (distinct_concepts, np.array([0, 0, 1, 5] * 3)), "visualization.image_grid": (drawn(lambda i, ax: image_grid(i, NAMES)), PICTURES),
    "visualization.plot_images pictures": (drawn(lambda i, ax: plot_images(X[:, :2], i, ax)), PICTURES),
    "visualization.plot_concepts labels": (drawn(lambda labels, ax: plot_concepts(X[:, :2], labels, {0: "a", 1: "b"}, [0, 1], ax)), np.array([0, 1, 2] * 4)),
    "evaluation.chance_levels": (lambda test, train: chance_levels(NAMES, test, train), np.arange(6, 12), np.arange(6)),
    "evidence.text_probe.token_accuracy": (token_accuracy, np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 2, 0], [4, 0, 6]]), np.array([[1, 1, 1], [1, 1, 0]])),
}


def numbers_in(result):
    if isinstance(result, dict): return {k: numbers_in(v) for k, v in result.items()}
    if isinstance(result, str) or result is None: return result
    if isinstance(result, (list, tuple)): return [numbers_in(r) for r in result]
    return result.detach().double().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)


def same(found, wanted, near):
    if isinstance(wanted, dict): return found.keys() == wanted.keys() and all(same(found[k], wanted[k], near) for k in wanted)
    if isinstance(wanted, list): return len(found) == len(wanted) and all(same(f, w, near) for f, w in zip(found, wanted))
    if isinstance(wanted, np.ndarray) and wanted.dtype.kind in "fc": return found.shape == wanted.shape and np.allclose(found, wanted, near, near, equal_nan=True)
    return np.array_equal(found, wanted)


def fails(call, args, forms, near=1e-6):
    "The forms that give another result than the arrays themselves, with what was raised."
    wanted, found = numbers_in(call(*args)), {}
    for form in forms:
        given = [FORMS[form if a.dtype != bool or form in WHOLE else "tensor"](a) for a in args]
        try:
            if not same(numbers_in(call(*given)), wanted, near): found[form] = "another result"
        except Exception as error: found[form] = repr(error)
    return found


@pytest.mark.parametrize("name", TABLE)
def test_floating_numbers_in_any_form(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    call, *args = TABLE[name]
    assert fails(call, args, SLOW.get(name, FORMS), ROUGH.get(name, 1e-6)) == {}


@pytest.mark.parametrize("name", NUMBERS)
def test_whole_numbers_in_any_form(name):
    call, *args = NUMBERS[name]
    assert fails(call, args, WHOLE) == {}
