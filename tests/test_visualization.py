"""Figures: what is drawn is what was given."""

import io
import unicodedata

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.offsetbox import AnnotationBbox

from kklip_nb.visualization import (
    click_map,
    concept_names,
    concept_style,
    distinct_concepts,
    image_grid,
    place_names,
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


def test_a_second_word_is_added_for_the_captions_that_the_first_leaves_over():
    captions = ["clock", "alarm clock", "clock face", "red rose", "tulip", "old rose", "tulip bed", "lily"]
    assert concept_names(captions, [0] * 3 + [1] * 5) == {0: "clock", 1: "rose, tulip"}
    assert concept_names(["traffic light", "traffic light", "light bulb", "stove"], [0, 0, 1, 1])[0] == "traffic light"
    assert concept_names(["kiss", "kissing cat", "kissing face", "fox"], [0, 0, 0, 1])[0] == "kissing"  # and kiss is its kin


def test_words_that_name_nothing_are_in_no_name():
    captions = ["face with tears", "face with mask", "face with monocle", "the red fox", "fox and the dog", "house on fire", "fire"]
    names = concept_names(captions, [0, 0, 0, 1, 1, 2, 2])
    assert names == {0: "face", 1: "fox", 2: "fire"}  # fire is one of scikit-learn's stop words
    assert concept_names(["with", "and the"], [0, 1]) == {0: "with", 1: "and the"}  # nothing else to go by


def test_captions_near_the_centroid_count_more():
    captions = ["elf", "owl", "eagle", "bus", "bus"]
    for distances in ([3, 2, 1, 1, 1], torch.tensor([0.3, 0.2, 0.1, 0.9, 0.9])):
        assert concept_names(captions, [0, 0, 0, 1, 1], distances=distances) == {0: "eagle, owl", 1: "bus"}


def test_the_concepts_of_the_course_have_names_without_debris(openmoji_rows):
    from kklip_nb.data import load_openmoji
    pairs = load_openmoji(32)
    ids = {c: i for i, c in enumerate(sorted({c for c in pairs.subcategories if c}))}
    rows = [i for i, c in enumerate(pairs.subcategories) if c]
    names = concept_names([pairs.captions[i] for i in rows], [ids[pairs.subcategories[i]] for i in rows])
    words = {word for name in names.values() for word in name.replace(",", "").split()}
    assert len(names) == len(ids) and not words & set("with of the in on and for to s no".split())


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


@pytest.mark.parametrize("captions, want", [
    (["рыжая кошка", "кошка спит"], "кошка"), (["un café brûlé", "café crème"], "café"), (["大黑猫", "黑猫", "黑猫！"], "黑猫"),
    (["赤い猫のカップ", "カップ"], "カップ"), (["हिन्दी भाषा", "हिन्दी"], "हिन्दी"), (["빨간 고양이", "고양이"], "고양이"), (["القط الأسود", "القط"], "القط"),
    (["Straße", "straße"], "straße"), (["ox", "ox", "TV"], "ox"), (["1 2", "1  2"], "1 2"), (["🍕"], "🍕"), (["猫"], "猫"), (["$5", "$5"], "$5"),
    (["snake_case", "snake"], "snake"), (["", " "], "concept 3")])
def test_names_exist_in_every_script(captions, want):
    names = concept_names([*captions, "other thing", "another thing"], [3] * len(captions) + [4, 4], words=1)
    assert names == {3: want, 4: "thing"}
    apart = [unicodedata.normalize("NFD", c) for c in captions]
    assert concept_names(apart, [3] * len(captions), words=1)[3] == concept_names(captions, [3] * len(captions), words=1)[3]


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8))
def test_no_name_is_ever_empty(captions):
    names = concept_names(captions, [i % 3 for i in range(len(captions))])
    assert set(names) == set(range(min(3, len(captions)))) and all(names.values())


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


@pytest.mark.parametrize("n, neighbours", [(0, 2), (1, 2), (2, 2), (3, 2), (4, 4), (5, 15), (20, 0)])
def test_too_few_points_or_neighbours_are_refused(uncompiled, n, neighbours):
    with pytest.raises(ValueError): umap_project(np.random.default_rng(0).normal(size=(n, 4)), neighbours=neighbours)


@pytest.mark.parametrize("kind", ["random", "identical", "zero"])
@pytest.mark.parametrize("n, neighbours", [(4, 2), (4, 3), (5, 4), (7, 3)])
def test_as_few_as_four_points_have_a_map(uncompiled, rng, n, neighbours, kind):
    points = umap_project(dict(random=rng.normal(size=(n, 3)), identical=np.ones((n, 3)), zero=np.zeros((n, 3)))[kind], neighbours=neighbours)
    assert points.shape == (n, 2) and np.isfinite(points).all()


def test_tensors_and_lists_have_the_map_of_the_array(uncompiled, rng):
    features = torch.from_numpy(rng.integers(-8, 9, size=(12, 4))).float()  # exact in every precision
    want = umap_project(features.numpy(), neighbours=3)
    for given_ in (features.bfloat16(), features.half(), features.double(), features.clone().requires_grad_(), features.int(), features.tolist()):
        np.testing.assert_array_equal(umap_project(given_, neighbours=3), want)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_map_of_nan_is_refused(bad):
    features = np.ones((20, 4)); features[3, 2] = bad
    with pytest.raises(ValueError, match="features holds NaN or infinite"): umap_project(features)
    with pytest.raises(ValueError, match=r"shape \(20,\)"): umap_project(np.ones(20))


# ---- figures


DOLLARS = ["was $10_ now $8", "Ca$$h box", "$5% off_$", r"a \$ and \ back", "$x$", "one $"]


def drawn_texts(figure):
    "Every text that is drawn, as matplotlib cleans it, with whether it is a formula."
    figure.savefig(io.BytesIO())
    return {t._preprocess_math(line) for t in figure.findobj(plt.Text) for line in t.get_text().splitlines()}


@pytest.mark.parametrize("text", DOLLARS)
def test_dollar_signs_are_no_formula(text, images):
    figures = [image_grid(images[:2], [text, "b"], title=text), plt.figure(), plt.figure(), plt.figure()]
    plot_similarities(np.eye(2), [text, "b"], ax=figures[1].gca(), title=text)
    plot_concepts(np.eye(2), [0, 1], {0: text, 1: "b"}, [0, 1], ax=figures[2].gca(), title=text).legend()
    place_names(np.eye(2), [0, 1], {0: text, 1: "b"}, [0, 1], figures[2].gca())
    plot_images(np.eye(2), images[:2], ax=figures[3].gca(), title=text)
    for figure in figures:
        found = drawn_texts(figure)
        assert (text, False) in found and not any(math for line, math in found if "$" in line)
    assert text in [t._preprocess_math(t.get_text())[0] for t in figures[2].gca().get_legend().get_texts()]


def test_long_captions_are_cut_and_lines_are_kept(images):
    figure = image_grid(images[:4], ["x" * 5000, "two words " * 50, "one\ntwo", ""])
    titles = [ax.get_title() for ax in figure.axes[:4]]
    assert titles[2:] == ["one\ntwo", ""] and all(t.endswith("…") and max(map(len, t.split("\n"))) <= 26 for t in titles[:2])
    ax = plot_similarities(np.eye(2), ["y" * 5000, "one\ntwo"], ax=plt.figure().gca())
    assert [len(t.get_text()) for t in ax.get_xticklabels()] == [60, 7]
    for drawn in (figure, ax.figure): drawn.savefig(io.BytesIO())


def test_one_point_many_of_one_kind_and_none(images):
    for points in (np.zeros((1, 2)), np.ones((7, 2)), np.stack([np.arange(7), np.zeros(7)], 1), np.zeros((0, 2)), []):
        ax = plot_images(points, images[:len(points)], ax=plt.figure().gca())
        for (low, high), values in zip((ax.get_xlim(), ax.get_ylim()), np.reshape(points, (-1, 2)).T):
            assert low < high and ((low < values) & (values < high)).all()
    with pytest.raises(ValueError): plot_images(np.zeros((2, 2)), images)


def test_figures_of_tensors_are_those_of_arrays(images, rng):
    points, labels = torch.from_numpy(np.stack([rng.permutation(7), rng.permutation(7)], 1)).bfloat16().requires_grad_(), torch.arange(7) % 2
    ax = plot_images(points, torch.from_numpy(images), ax=plt.figure().gca())
    boxes = [a for a in ax.artists if isinstance(a, AnnotationBbox)]
    np.testing.assert_array_equal([b.xy for b in boxes], points.detach().float())
    np.testing.assert_array_equal(boxes[3].offsetbox.get_data()[..., :3], images[3])
    ax = plot_concepts(points, labels, {0: "a", 1: "b"}, torch.tensor([1]), ax=plt.figure().gca())
    np.testing.assert_array_equal(ax.collections[1].get_offsets(), points.detach().float()[1::2])
    assert ax.collections[1].get_label() == "b"
    grid = image_grid(torch.from_numpy(images), ["t"] * 7)
    np.testing.assert_array_equal(grid.axes[6].images[0].get_array(), images[6])
    ax = plot_similarities(torch.eye(3, dtype=torch.bfloat16, requires_grad=True), list("abc"), ax=plt.figure().gca())
    np.testing.assert_array_equal(ax.images[0].get_array(), np.eye(3))
    assert distinct_concepts(torch.tensor([2, 2, 5])) == [2, 5] and distinct_concepts([]) == []


def test_no_pictures_give_an_empty_grid_and_missing_titles_are_named(images):
    figure = image_grid(images[:0], [], title="none")
    assert figure.get_suptitle() == "none" and not any(ax.images for ax in figure.axes)
    with pytest.raises(ValueError, match="7 images with 3 titles"): image_grid(images, list("abc"))


@pytest.mark.parametrize("shape, captions", [((2, 3), 2), ((2, 0), 0), ((3,), 3)])
def test_a_similarity_matrix_needs_a_caption_a_column(shape, captions):
    with pytest.raises(ValueError, match="similarities"): plot_similarities(np.zeros(shape), ["x"] * captions)


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
        np.testing.assert_array_equal(box.offsetbox.get_data()[..., :3], image)


def test_white_is_transparent_and_a_given_fourth_channel_stays(images):
    images[:, 0], images[:, 1] = 255, 120
    given = np.concatenate([images, np.full_like(images[..., :1], 77)], -1)
    points = np.stack([np.arange(7)] * 2, 1)
    for pictures, white in ((images, 0), (given, 77)):
        boxes = [a for a in plot_images(points, pictures, ax=plt.figure().gca()).artists if isinstance(a, AnnotationBbox)]
        for box in boxes: assert (box.offsetbox.get_data()[0, :, 3] == white).all() and (box.offsetbox.get_data()[1, :, 3] == (255 if white == 0 else 77)).all()


@given(seed=st.integers(0, 9999), zoom=st.sampled_from([1.0, 4.0, 9.0]))
@settings(deadline=None, max_examples=20)
def test_pictures_that_are_drawn_do_not_overlap_and_the_others_are_dots(seed, zoom):
    points = np.random.default_rng(seed).normal(size=(12, 2))
    figure, ax = plt.subplots(figsize=(3, 3), layout="constrained")
    plot_images(points, np.zeros((12, 6, 6, 3), np.uint8), ax, zoom)
    figure.canvas.draw()
    boxes, dots = [a for a in ax.artists if isinstance(a, AnnotationBbox)], ax.collections[0].get_offsets()
    drawn = [b.offsetbox.get_window_extent(figure.canvas.get_renderer()) for b in boxes]
    width = drawn[0].width
    apart = lambda a, b: max(abs(a.x0 - b.x0), abs(a.y0 - b.y0)) >= width - 1
    assert all(apart(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert len(boxes) + len(dots) == 12 and boxes[0].xy == pytest.approx(points[0])  # the first always has room
    places = ax.transData.transform(points)
    for dot in ax.transData.transform(dots): assert any(max(abs(place - dot)) < width + 1 for place in places if tuple(place) != tuple(dot))
    plt.close(figure)


@given(seed=st.integers(0, 9999))
@settings(deadline=None, max_examples=10)
def test_names_on_a_map_cover_no_other_and_stay_inside(seed):
    rng = np.random.default_rng(seed)
    points, labels = rng.normal(size=(40, 2)) * rng.uniform(0.01, 1), np.arange(40) % 8
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    names = {c: f"police officer, {c}" for c in range(8)}
    plot_concepts(points, labels, names, range(8), ax, "a title")
    texts = place_names(points, labels, names, range(8), ax)
    figure.canvas.draw()
    boxes = [t.get_bbox_patch().get_window_extent() for t in texts]
    assert [t.get_text() for t in texts] == list(names.values())
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    edge = ax.get_window_extent()
    assert all(edge.x0 <= b.x0 and b.x1 <= edge.x1 and edge.y0 <= b.y0 and b.y1 <= edge.y1 for b in boxes)
    for text in texts: assert text.xy in {tuple(p) for p in points[labels == int(text.get_text()[-1])]}
    plt.close(figure)


def test_concepts_without_points_are_not_named():
    ax = plot_concepts(np.eye(2), [0, 0], {0: "a", 1: "b"}, [0, 1], plt.figure().gca())
    assert [t.get_text() for t in place_names(np.eye(2), [0, 0], {0: "a", 1: "b"}, [0, 1], ax)] == ["a"]


def test_the_map_to_click_has_every_point_and_escapes_what_was_written(images):
    text = click_map(torch.eye(7, 2), torch.from_numpy(images), ['"><b>', *"abcdef"], [0, 1] * 3 + [0], {0: ("<i>", images[:2], ["x<", "y"]), 1: ("b", [], [])})
    assert text.count("<input") == 7 and text.count('class="card') == 2 and text.count("<figure>") == 2
    assert "<b>b</b>" in text and '"><b>' not in text.replace('"><b>b', "").replace('"><b>&lt;i', "") and "x&lt;" in text and "&lt;i&gt;" in text
    assert text.count(" pic") - text.count(".pic") >= 1 and " dot" in text  # five points lie on one spot


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
