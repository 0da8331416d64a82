"""Figures: what is drawn is what was given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.offsetbox import AnnotationBbox

from kklip_nb.visualization import (
    concept_names,
    concept_style,
    distinct_concepts,
    image_grid,
    plot_concepts,
    plot_images,
    plot_similarities,
    umap_project,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def images(rng):
    return rng.integers(256, size=(7, 6, 6, 3), dtype=np.uint8)


# ---- names and colours


def test_names_are_frequent_here_and_rare_elsewhere():
    captions = [
        "red fox face",
        "fox face running",
        "fox",
        "blue bus face",
        "bus stop face",
        "small bus face",
        "pizza face",
        "pizza",
        "hot pizza",
    ]
    names = concept_names(captions, [0, 0, 0, 5, 5, 5, 2, 2, 2], words=1)
    assert names == {0: "fox", 5: "bus", 2: "pizza"}  # not "face", which is everywhere


def test_names_have_the_asked_number_of_words_and_plain_ids():
    names = concept_names(["red fox", "red fox", "blue bus", "blue bus"], np.array([1, 1, 3, 3]), words=2)
    assert {c: set(n.split()) for c, n in names.items()} == {1: {"red", "fox"}, 3: {"blue", "bus"}}
    assert all(type(c) is int for c in names)


def test_names_do_not_depend_on_the_order_of_captions(rng):
    captions, labels = (
        [f"{a} {b}" for a in ("red", "blue", "old") for b in ("fox", "bus", "cat")],
        np.repeat([0, 1, 2], 3),
    )
    order = rng.permutation(9)
    assert concept_names(captions, labels) == concept_names([captions[i] for i in order], labels[order])


def test_one_label_a_caption_is_asked_for():
    with pytest.raises(ValueError, match="2(?s:.*)3|3(?s:.*)2"):
        concept_names(["a fox", "a bus"], [0, 1, 1])


def test_the_first_64_concepts_look_different_and_always_the_same():
    looks = [(to_rgba(s["color"]), s["marker"]) for s in map(concept_style, range(64))]
    assert len(set(looks)) == 64
    assert looks == [(to_rgba(s["color"]), s["marker"]) for s in map(concept_style, range(64))]
    assert concept_style(np.int64(7)) == concept_style(7)


# ---- UMAP


@pytest.fixture
def uncompiled(monkeypatch):
    "Compiling UMAP takes half a minute, a few points need none of that."
    monkeypatch.setattr(pytest.importorskip("numba").config, "DISABLE_JIT", 1)


def test_the_map_is_the_same_for_the_same_seed_and_keeps_groups_together(uncompiled, rng):
    groups = np.repeat(np.arange(3), 8)
    features = (10 * np.eye(3)[groups] @ rng.normal(size=(3, 6)) + 0.1 * rng.normal(size=(24, 6))).astype(np.float32)
    points = umap_project(features, seed=1, neighbours=4)
    assert points.shape == (24, 2) and np.isfinite(points).all()
    np.testing.assert_array_equal(points, umap_project(features, seed=1, neighbours=4))
    distances = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(24)
    assert (groups[distances.argmin(1)] == groups).all()


# ---- figures


def test_each_shown_concept_is_drawn_in_its_own_style_and_the_rest_in_grey(rng):
    points, labels = rng.normal(size=(30, 2)), np.arange(30) % 5
    _, ax = plt.subplots()
    assert plot_concepts(points, labels, {i: f"name {i}" for i in range(5)}, [1, 3], ax=ax, title="what to see") is ax
    assert ax.get_title() == "what to see"
    drawn = {c.get_label(): c for c in ax.collections}
    assert len(ax.collections) == 3 and {"name 1", "name 3"} <= set(drawn)
    assert sum(len(c.get_offsets()) for c in ax.collections) == 30
    for concept in (1, 3):
        mine = drawn[f"name {concept}"]
        np.testing.assert_allclose(mine.get_offsets(), points[labels == concept])
        assert to_rgba(mine.get_facecolor()[0]) == to_rgba(concept_style(concept)["color"])


def test_labels_as_a_list_draw_the_same(rng):
    points = rng.normal(size=(6, 2))
    ax = plot_concepts(points, [0, 0, 1, 1, 2, 2], {0: "a", 1: "b", 2: "c"}, [0])
    assert ax is plt.gca() and sorted(len(c.get_offsets()) for c in ax.collections) == [2, 4]


def test_every_picture_is_a_marker_inside_the_axes(images, rng):
    points = rng.normal(size=(7, 2))
    _, ax = plt.subplots()
    assert plot_images(points, images, ax=ax, title="t") is ax and ax.get_title() == "t"
    boxes = [a for a in ax.artists if isinstance(a, AnnotationBbox)]
    assert len(boxes) == 7
    np.testing.assert_allclose([b.xy for b in boxes], points)
    for low, high, values in ((*ax.get_xlim(), points[:, 0]), (*ax.get_ylim(), points[:, 1])):
        assert low < values.min() and values.max() < high
    for box, image in zip(boxes, images):
        np.testing.assert_array_equal(box.offsetbox.get_data(), image)


@pytest.mark.parametrize("columns, rows", [(6, 2), (7, 1), (3, 3), (1, 7), (10, 1)])
def test_a_grid_shows_every_picture_with_its_caption(images, columns, rows):
    figure = image_grid(images, [f"caption {i}" for i in range(7)], columns=columns, title="all seven")
    filled = [ax for ax in figure.axes if ax.images]
    assert isinstance(figure, plt.Figure) and len(figure.axes) == rows * columns and len(filled) == 7
    for i, ax in enumerate(filled):
        np.testing.assert_array_equal(ax.images[0].get_array(), images[i])
        assert ax.get_title() == f"caption {i}"
    assert figure.get_suptitle() == "all seven"


def test_the_similarity_matrix_is_shown_as_it_is(rng):
    similarities = rng.uniform(-1, 1, size=(4, 6))
    _, ax = plt.subplots()
    assert plot_similarities(similarities, list("abcdef"), ax=ax, title="t") is ax
    np.testing.assert_array_equal(ax.images[0].get_array(), similarities)
    assert [t.get_text() for t in ax.get_xticklabels()] == list("abcdef") and ax.get_title() == "t"
    assert len(ax.figure.axes) == 2  # the second is the colour bar


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=80), seed=st.integers(0, 9))
@settings(deadline=None)
def test_distinct_concepts_share_no_look_and_no_choice_by_hand_holds_more(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if not len(labels):
        return
    chosen = distinct_concepts(labels)
    colours, markers = ([concept_style(c)[part] for c in chosen] for part in ("color", "marker"))
    assert len({*colours}) == len({*markers}) == len(chosen) <= 8
    taken = []
    for c in np.random.default_rng(seed).permutation(len(sizes)):  # a greedy choice in random order
        if all(concept_style(c)[part] != concept_style(d)[part] for d in taken for part in ("color", "marker")):
            taken.append(c)
    assert sum(sizes[c] for c in chosen) >= sum(sizes[c] for c in taken)
    assert [sizes[c] for c in chosen] == sorted((sizes[c] for c in chosen), reverse=True) and all(sizes[c] for c in chosen)
