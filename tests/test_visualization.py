"""Figures: what is drawn is what was given."""

import io
import re
import sys
import types
import unicodedata
import warnings
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.offsetbox import AnnotationBbox
from PIL import Image
from scipy.spatial.distance import cdist

from kklip_nb.visualization import (
    click_map,
    concept_names,
    concept_style,
    distinct_concepts,
    image_grid,
    place_names,
    plot_concepts,
    plain_text,
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


def test_a_name_has_two_words_at_most_and_a_pair_counts_a_fifth_more():
    captions = ["clock face", "clock", "old rose", "tulip", "lily", "bus", "bus"]
    assert concept_names(captions, [0, 0, 1, 1, 1, 2, 2])[0] == "clock" and concept_names(captions, [0, 0, 1, 1, 1, 2, 2])[1].count(",") == 1
    assert concept_names(["ab cd", "ef"], [0, 1], words=1)[0] == "ab cd"
    assert concept_names(["xy zz", "xy zz", "xy", "qq"], [0, 0, 0, 1], words=1)[0] == "xy"  # 3 beat 2 · 1.2


def test_rarity_counts_concepts_and_not_captions():
    "Of k concepts s hold the word: n ln(1 + k / s). Here 2 ln 3 = 2.2 for ash, 4 ln 2 = 2.8 for bay; ln(1 + 7 / s) would turn it round: 4.2 and 3.0."
    captions = ["ash bay", "ash bay", "bay", "bay", "bay", "bay", "bay"]
    assert concept_names([c.replace(" ", " the ") for c in captions], [0, 0, 0, 0, 1, 1, 1], words=1)[0] == "bay"
    many = ["elm"] * 3 + ["fir"] * 2 + ["elm"]  # 3 ln(1 + 3/2) = 2.7 for elm, 2 ln(1 + 3) = 2.8 for fir: captions in another concept count once
    assert concept_names([*many, "oak"], [0] * 5 + [1, 2], words=1)[0] == "fir"


@pytest.mark.parametrize("captions, distances, want", [
    (["ash", "elm", "bus", "bus"], [1, 2, 3, 4], "bus"),  # 1/5 + 1/6 beat 1/3
    (["ash", "elm", "fir", "bus", "bus"], [1, 2, 3, 4, 5], "ash"),  # 1/6 + 1/7 do not
    (["bus", "bus", "fir", "elm", "ash"], [5, 4, 3, 2, 1], "ash"),
    (["ash", "ash", "bus", "bus", "bus"], [7, 7, 7, 7, 7], "bus"),  # as far is as good, whatever comes first
    (["ash", "elm", "bus", "bus"], None, "bus")])
def test_the_nearest_caption_weighs_a_third_the_next_a_quarter(captions, distances, want):
    others = ["oak", "oak", "oak"]  # nearer than all, but of another concept
    given_ = None if distances is None else [*distances, 0, 0, 0]
    assert concept_names([*captions, *others], [0] * len(captions) + [1] * 3, words=1, distances=given_)[0] == want


@pytest.mark.parametrize("captions, want", [
    (["clock", "clock", "clock", "rose", "lily"], "clock"),  # more than half
    (["clock", "clock", "rose", "lily", "ivy"], "clock, ivy"),
    (["kiss", "kiss", "kissing dog", "kissing cat", "rose"], "kiss"), (["cat", "cat", "cattle", "cattle", "rose"], "cat"),  # kin is named, too
    (["ox", "ox", "oxen", "oxen", "rose"], "ox, oxen"),  # two letters make no kin
    (["fire engine", "fire door", "fire"], "fire"), (["last call", "call box", "call"], "call")])  # scikit-learn's stop words, but they name something
def test_a_second_word_only_for_half_of_the_captions_and_never_of_the_same_kin(captions, want):
    assert concept_names([*captions, "bus"], [0] * len(captions) + [1])[0] == want


@pytest.mark.parametrize("text, same", [("ＤＯＧ house", "dog house"), ("ﾈｺ", "ネコ"), ("ﾊﾞｽ", "バス"), ("ca\u00adt", "cat"), ("do\u200bg", "dog"), ("cafe\u0301", "café"), ("A\u030angstro\u0308m", "ångström"), ("STRAẞE", "straße")])
def test_words_that_read_the_same_are_one_word(text, same):
    assert concept_names([text, same, "bus"], [0, 0, 1]) == {0: same, 1: "bus"}


@pytest.mark.parametrize("captions, want", [
    (["人々", "人々"], "人々"), (["𠮷野家", "𠮷野"], "𠮷野"), (["〇年", "〇年"], "〇年"), (["แมวดำ", "แมวดำ"], "แมวดำ"), (["น้ำ"], "น้ำ"), (["Ελλάδα", "ΕΛΛΆΔΑ"], "ελλάδα"), (["l’été", "été"], "été"), (["don't run", "run"], "run"),
    (["they'll run", "we’ve run"], "run"), (["12", "12"], "12"), (["👨‍👩‍👧", "👨‍👩‍👧"], "👨‍👩‍👧"), (["\u200b"], "concept 3"), (["\0"], "concept 3"), ([None], "concept 3"), (["\ud800"], "�"), (["猫", "猫"], "猫"), (["men’s room", "men's room"], "men")])
def test_names_hold_words_and_no_debris(captions, want):
    assert concept_names([*captions, "bus"], [3] * len(captions) + [4], words=1) == {3: want, 4: "bus"}


@pytest.mark.parametrize("labels, want", [([-1, -1, 10**12], [-1, 10**12]), ([0.0, 0.0, 1.0], [0, 1]), (["5", "5", "7"], [5, 7]), (torch.tensor([2.0, 2, 3]).bfloat16(), [2, 3]), ([torch.tensor(2), torch.tensor(2), np.int8(3)], [2, 3]),
                                          ([2**60, 2**60, 2**60 + 1], [2**60, 2**60 + 1]), ([True, True, False], [1, 0])])
def test_concept_ids_are_whole_numbers_of_any_kind_and_size(labels, want):
    names = concept_names(["a fox", "fox", "a bus"], iter(labels) if isinstance(labels, list) else labels)
    assert names == {want[0]: "fox", want[1]: "bus"} and all(type(c) is int for c in names)
    assert distinct_concepts(labels) == want


@pytest.mark.parametrize("labels, said", [([0, 0.5, 1], "0.5"), ([0, np.nan, 1], "NaN"), ([0, None, 1], "NaN"), (["a", "b", "c"], "numbers"), ([[0], [1], [1]], r"\(3, 1\)"), ([0, 1e300, 1], "1e"), (None, "shape"), (7, "shape"), ([0, 2**70, 1], "whole")])
def test_what_is_no_concept_id_is_refused(labels, said):
    points, names = np.eye(3)[:, :2], {0: "a", 1: "b"}
    for call in (lambda: concept_names(["a", "b", "c"], labels), lambda: distinct_concepts(labels), lambda: plot_concepts(points, labels, names, [0]), lambda: place_names(points, labels, names, [0], plt.gca()),
                 lambda: click_map(points, np.zeros((3, 4, 4, 3), np.uint8), "abc", labels, {})):
        with pytest.raises(ValueError, match=f"labels.*{said}"): call()


def test_names_of_nothing_and_distances_that_do_not_fit():
    assert concept_names([], []) == {} and concept_names(["a fox"], [0], words=0) == {0: "concept 0"}
    with pytest.raises(ValueError, match="distances.*NaN"): concept_names(["a", "b"], [0, 0], distances=[1, np.nan])
    with pytest.raises(ValueError, match="'distances': 1"): concept_names(["a", "b"], [0, 0], distances=[1])


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
    for seven in (np.int64(7), 7.0, torch.tensor(7)): assert concept_style(seven) == concept_style(7)
    palette = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()  # Okabe and Ito's
    assert [concept_style(c)["color"] for c in range(-1, 9)] == [palette[7], *palette, palette[0]]
    assert "".join(concept_style(c)["marker"] for c in (*range(8), 8, 9, 15, 16, 63, 64, -1)) == "os^vD*PXs^o^PoP"
    with pytest.raises(ValueError, match="concept ids.*1.5"): concept_style(1.5)


# ---- UMAP


@pytest.fixture
def uncompiled(monkeypatch):
    "Compiling UMAP takes half a minute, a few points need none of that."
    monkeypatch.setattr(pytest.importorskip("numba").config, "DISABLE_JIT", 1)


def test_the_map_is_the_same_for_the_same_seed_and_keeps_directions_together(uncompiled, rng):
    groups = np.arange(12) % 2
    features = (np.eye(3)[groups] + 0.1 * rng.normal(size=(12, 3))).astype(np.float32)
    points = umap_project(features, seed=1, neighbours=3)
    assert points.shape == (12, 2) and np.isfinite(points).all()
    distances = cdist(points, points) + 1e9 * np.eye(12)
    assert (groups[distances.argmin(1)] == groups).all()
    lengths = 2.0 ** rng.integers(-900, 900, (12, 1))  # directions alone count, however long or short a row is
    np.testing.assert_array_equal(umap_project(features * lengths, seed=1, neighbours=3), points)


@pytest.fixture
def told(monkeypatch):
    "A UMAP that draws nothing and keeps what it was told."
    kept = []
    class UMAP:
        def __init__(self, *args, **how): kept.append((args, how))
        def fit_transform(self, features): kept.append(features); return features[:, :2]
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    return kept


def test_umap_is_told_seed_neighbours_and_metric(told, rng):
    umap_project(rng.normal(size=(20, 3)))
    umap_project(rng.normal(size=(20, 3)), 7, 4)
    for (args, how), seed, neighbours in ((told[0], 0, 15), (told[2], 7, 4)):
        assert args == () and how == dict(n_neighbors=neighbours, metric="cosine", random_state=seed, disconnection_distance=np.inf)


def test_umap_is_given_the_rows_at_a_size_that_no_product_overflows(told, rng):
    for size in (1, 1e-300, 1e300, 10.0 ** rng.integers(-300, 300, (20, 1))):
        features = rng.normal(size=(20, 3)) * size
        umap_project(features)
        given_ = told[-1]
        assert given_.dtype == np.float32 and ((0.5 <= abs(given_).max(1)) & (abs(given_).max(1) <= 1)).all()
        np.testing.assert_allclose(cdist(given_, given_, "cosine"), cdist(features / abs(features).max(1, keepdims=True), features / abs(features).max(1, keepdims=True), "cosine"), atol=1e-6)
    umap_project(np.zeros((20, 3)))
    np.testing.assert_array_equal(told[-1], 0)


@pytest.mark.parametrize("n, neighbours", [(1, 2), (2, 2), (3, 2), (4, 4), (5, 15), (15, 15), (20, 0), (20, 1), (20, -3)])
def test_too_few_points_or_neighbours_are_refused(told, n, neighbours):
    with pytest.raises(ValueError, match=f"{n} points, neighbours={neighbours}; give 4 points or more"): umap_project(np.random.default_rng(0).normal(size=(n, 4)), neighbours=neighbours)


@pytest.mark.filterwarnings("ignore:Spectral initialisation failed", "ignore:n_components|k >= N")
@pytest.mark.parametrize("kind, n, neighbours", [("random", 4, 3), ("identical", 4, 2), ("zero", 5, 4), ("opposite", 4, 3), ("one dimension", 4, 2), ("two places", 5, 3), ("a zero row", 4, 2)])
def test_as_few_as_four_points_have_a_map(uncompiled, rng, kind, n, neighbours):
    signs, x = np.where(np.arange(n) % 2, 1.0, -1.0)[:, None], rng.normal(size=(n, 3))
    features = {"identical": np.ones((n, 3)), "zero": np.zeros((n, 3)), "opposite": signs * np.ones((1, 3)), "one dimension": x[:, :1], "two places": np.eye(3)[np.arange(n) % 2], "a zero row": x * (np.arange(n) > 0)[:, None]}
    points = umap_project(features.get(kind, x), neighbours=neighbours)
    assert points.shape == (n, 2) and np.isfinite(points).all()


def test_tensors_and_lists_have_the_map_of_the_array(told, rng):
    features = torch.from_numpy(rng.integers(-8, 9, size=(20, 4))).float()  # exact in every precision
    umap_project(features.numpy())
    for given_ in (features.bfloat16(), features.half(), features.double(), features.clone().requires_grad_(), features.int(), features.tolist(), list(features), features.numpy()[::-1].copy()[::-1], features.T.contiguous().T):
        umap_project(given_)
        np.testing.assert_array_equal(told[-1], told[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_map_of_nan_is_refused(bad):
    features = np.ones((20, 4)); features[3, 2] = bad
    with pytest.raises(ValueError, match="features holds NaN or infinite"): umap_project(features)
    for wrong, said in ((np.ones(20), r"shape \(20,\)"), (np.ones((20, 0)), r"\(20, 0\)"), ([[1.0], [1.0, 2.0]] * 10, "one length"), ([["a"]] * 20, "dtype"), (None, "dtype"), ([], "shape")):
        with pytest.raises(ValueError, match=f"features.*{said}"): umap_project(wrong)


# ---- figures


TEXTS = ["was $10_ now $8", "Ca$$h box", "$5% off_$", r"a \$ and \ back", "$x$", "one $", r"$\frac{", "_hidden", "__", "x^2_i", "100% {} {0} %s", "<b>&amp;</b>", "\"quoted\" 'n'", "--> ]]> <!--", "a\tb", "a\0b", "\x1b[0m",
         "\ud800 half", "\ufffe", "القط الأسود", "黑猫", "แมวดำ", "👨‍👩‍👧 🍕", "cafe\u0301", "Loremipsum" * 4, "nolegend_", " "]


def shown(text): return text.replace("\t", " ").replace("\0", "�").replace("\x1b", "�").replace("\ud800", "�").replace("\ufffe", "�")


def texts_in(figure, tmp_path):
    "All texts of a figure as its SVG has them; its PNG can be made, too, without a warning but for missing letters."
    with warnings.catch_warnings(action="error"), plt.rc_context({"svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph|.*atplotlib currently does not support")
        for name in ("x.png", "x.svg"): figure.savefig(tmp_path / name)
    return [re.sub(r"\s", " ", "".join(t.itertext())) for t in ElementTree.parse(tmp_path / "x.svg").iter("{http://www.w3.org/2000/svg}text")]


def figure_of(name, texts, images):
    figure, ax = plt.subplots(figsize=(12, 12))
    n, points = len(texts), np.random.default_rng(0).normal(size=(len(texts), 2))
    if name == "grid": return image_grid([images[0]] * n, [f"{t}\n{t}" for t in texts], columns=9)
    if name == "similarities": plot_similarities(np.eye(n), texts, ax)
    if name == "legend": plot_concepts(points, range(n), dict(enumerate(texts)), range(n), ax).legend(fontsize=6)
    if name == "names": ax.set(xlim=(-4, 4), ylim=(-4, 4))
    if name == "names": place_names(points, range(n), dict(enumerate(texts)), range(n), ax)
    return figure


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["grid", "similarities", "legend", "names"])
def test_a_users_text_is_shown_letter_by_letter(name, images, tmp_path):
    texts = TEXTS[::3] if name == "names" else TEXTS[::2] if name == "grid" else TEXTS  # those take time
    found = texts_in(figure_of(name, texts, images), tmp_path)
    for text in filter(str.strip, texts):
        parts = [shown(text)] if len(text) < 26 or name != "grid" else [text[:26], text[26:]]
        for part in parts: assert found.count(part) == (2 if name == "grid" else 1), part


@pytest.mark.filterwarnings("ignore:Glyph")
def test_titles_are_shown_letter_by_letter(images, tmp_path):
    text = "_$x$ \\$_{ ^2 % <b>& 黑猫 ก {} a\0\t\ud800"
    for title, want in ((text, shown(text)), (7, "7"), (None, "")):
        figures = [image_grid(images[:1], [""], 1, title=title), plt.figure(), plt.figure(), plt.figure()]
        axes = [plot_similarities(np.eye(1), ["b"], figures[1].gca(), title), plot_concepts(np.eye(2), [0, 1], {0: "a"}, [0], figures[2].gca(), title), plot_images(np.eye(2), images[:2], figures[3].gca(), title=title)]
        assert [figures[0].get_suptitle(), *(ax.get_title() for ax in axes)] == [want] * 4
        if title == text: assert all(want in texts_in(figure, tmp_path) for figure in figures)


def test_captions_and_names_may_be_missing_or_of_other_types(images):
    for texts in ([None, 5, np.str_("x")], ("", " ", "a\r\nb")):
        assert [a.get_title() for a in image_grid(images[:3], iter(texts)).axes[:3]] == [plain_text(t).strip(" ") for t in texts]
        plot_similarities(np.eye(3), iter(texts), ax=plt.figure().gca())
        ax = plot_concepts(np.eye(3)[:, :2], [0, 1, 2], texts, [0, 1, 2], plt.figure().gca())
        assert [t.get_text() for t in place_names(np.eye(3)[:, :2], [0, 1, 2], texts, [0, 1, 2], ax)] == [plain_text(t) for t in texts]


def test_plain_text_is_the_text_where_it_can_be():
    assert [plain_text(t) for t in (None, "", "a", 5, "a\tb", "a\r\nb\n", "a\n\nb", "\0\x7f\x9f\ud800\udfff\ufffe\uffff", "é🍕\u200d黑_$")] == ["", "", "a", "5", "a b", "a\nb", "a\n\nb", "�" * 7, "é🍕\u200d黑_$"]


def test_long_captions_are_cut_and_lines_are_kept(images):
    figure = image_grid(images[:4], ["x" * 5000, "two words " * 50, "one\ntwo", ""])
    titles = [ax.get_title() for ax in figure.axes[:4]]
    assert titles[2:] == ["one\ntwo", ""] and all(t.endswith("…") and max(map(len, t.split("\n"))) <= 26 for t in titles[:2])
    ax = plot_similarities(np.eye(2), ["y" * 5000, "one\ntwo"], ax=plt.figure().gca())
    assert [len(t.get_text()) for t in ax.get_xticklabels()] == [60, 7] and ax.get_xticklabels()[0].get_text() == "y" * 59 + "…"
    assert [len("".join(t.split("\n"))) for t in titles[:1]] == [100] and image_grid(images[:1], ["z" * 100]).axes[0].get_title().count("z") == 100
    names = {0: "w" * 5000, 1: "v" * 60}
    ax = plot_concepts(np.eye(2), [0, 1], names, [0, 1], plt.figure().gca())
    assert [t.get_text() for t in (*ax.legend().get_texts(), *place_names(np.eye(2), [0, 1], names, [0, 1], ax))] == ["w" * 59 + "…", "v" * 60] * 2
    for drawn in (figure, ax.figure): drawn.savefig(io.BytesIO())


def test_one_point_many_of_one_kind_and_none(images):
    for points in (np.zeros((1, 2)), np.ones((7, 2)), np.stack([np.arange(7), np.zeros(7)], 1), np.zeros((0, 2)), []):
        ax = plot_images(points, images[:len(points)], ax=plt.figure().gca())
        for (low, high), values in zip((ax.get_xlim(), ax.get_ylim()), np.reshape(points, (-1, 2)).T):
            assert low < high and ((low < values) & (values < high)).all()
        plot_concepts(points, np.arange(len(points)), {0: "a"}, [0], plt.figure().gca())
        assert len(place_names(points, np.zeros(len(points)), {0: "a"}, [0], plt.gca())) == (len(points) > 0)
        assert click_map(points, images[:len(points)], "abcdefg"[:len(points)], [0] * len(points), {}).count("<input") == len(points)
    with pytest.raises(ValueError, match="'images': 7.*2 points"): plot_images(np.zeros((2, 2)), images)


@pytest.mark.parametrize("points, said", [(np.eye(3), r"\(3, 3\)"), (np.ones(3), r"\(3,\)"), ([[1.0, np.nan]] * 3, "NaN"), ([[1.0, 2.0], [1.0]], "one length"), (None, "dtype"), ([["a", "b"]], "dtype"), ("ab", "dtype")])
def test_what_is_no_map_is_refused(points, said, images):
    for call in (lambda: plot_images(points, images[:3]), lambda: plot_concepts(points, [0, 1, 2], {0: "a"}, [0]), lambda: place_names(points, [0, 1, 2], {0: "a"}, [0], plt.gca()), lambda: click_map(points, images[:3], "abc", [0, 1, 2], {})):
        with pytest.raises(ValueError, match=f"points.*{said}"): call()


def test_concepts_without_a_name_and_shown_ids_that_are_none_are_named():
    for call in (plot_concepts, place_names):
        with pytest.raises(ValueError, match="concept 1 has no name"): call(np.eye(2), [0, 1], {0: "a"}, [0, 1], plt.gca())
        with pytest.raises(ValueError, match="concepts to show.*0.5"): call(np.eye(2), [0, 1], {0: "a"}, [0.5], plt.gca())
        call(np.eye(2), [0, 1], ["a", "b"], {0, 1}, plt.gca())
    with pytest.raises(ValueError, match=r"labels of shape \(3,\).*2 rows"): plot_concepts(np.eye(2), [0, 1, 1], {0: "a"}, [0])


def drawn_pictures(name, pictures):
    "What each function shows of pictures."
    n = len(pictures)
    points = np.stack([np.arange(n)] * 2, 1) * 1.0
    if name == "grid": return [ax.images[0].get_array() for ax in image_grid(pictures, [""] * n).axes[:n]]
    if name == "map": return [b.offsetbox.get_data()[..., :3] for b in plot_images(points, pictures, ax=plt.figure().gca()).artists if isinstance(b, AnnotationBbox)]
    page = click_map(points, pictures, [""] * n, [0] * n, {0: ("a", pictures, [""] * n)})
    import base64
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(u))).convert("RGB")) for u in re.findall(r"base64,([^)\"]+)", page)]
    assert len(found) == 2 * n and all(np.array_equal(a, b) for a, b in zip(found, found[n:]))  # on the map and on the card
    return [f[::60 // 6, ::60 // 6] if f.std() else f[:6, :6] for f in found[:n]]


@pytest.mark.parametrize("name", ["grid", "map", "click"])
def test_pictures_come_in_colour_or_grey_and_from_any_container(name):
    pictures = np.stack([np.full((6, 6, 3), c, np.uint8) for c in ((200, 10, 30), (0, 90, 240), (7, 7, 7))])
    grey = np.stack([np.full((6, 6), c, np.uint8) for c in (0, 100, 249)])
    for given_, want in ((pictures, pictures), (list(pictures), pictures), (pictures.tolist(), pictures), (torch.tensor(pictures), pictures), (list(torch.tensor(pictures)), pictures), ([Image.fromarray(p) for p in pictures], pictures),
                         (grey, np.stack([grey] * 3, -1)), ([Image.fromarray(g) for g in grey], np.stack([grey] * 3, -1)), (np.asfortranarray(pictures[::-1])[::-1], pictures)):
        for found, wanted in zip(drawn_pictures(name, given_), want, strict=True): np.testing.assert_array_equal(np.broadcast_to(found, wanted.shape), wanted)


@pytest.mark.parametrize("name", ["grid", "map", "click"])
@pytest.mark.parametrize("picture, said", [(np.ones((6, 6, 3)), "float64"), (np.ones((6, 6, 3), np.float32), "float32"), (np.ones((6, 6), np.uint16), "uint16"), (np.ones((6, 6), np.int32), "int32"), (np.full((6, 6, 3), 256), "int64"), (np.full((6, 6, 3), -1), "int64"),
                                           (np.ones((6, 6), bool), "bool"), (np.ones((6, 6, 2), np.uint8), r"\(6, 6, 2\)"), (np.ones((3, 6, 6), np.uint8), r"\(3, 6, 6\)"), (np.ones((0, 0, 3), np.uint8), r"\(0, 0, 3\)"), (np.ones(3, np.uint8), r"\(3,\)"),
                                           *((Image.new(mode, (6, 6)), f"mode {mode}") for mode in ("1", "P", "LA", "CMYK", "HSV", "I", "F", "I;16"))])
def test_other_pictures_are_refused_by_type_shape_or_mode(name, picture, said):
    with pytest.raises(ValueError, match=f"picture.*{said}.*expected uint8"): drawn_pictures(name, [picture])


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
    for columns in (0, -1):
        with pytest.raises(ValueError, match=f"{columns} columns"): image_grid(images, list("abcdefg"), columns)
    assert len(image_grid(images, list("abcdefg")).axes) == 12  # six a row


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


def test_a_map_of_pictures_has_a_tenth_of_room_around_it(images):
    ax = plot_images([[0, 0], [1, 10]], images[:2], plt.figure().gca())
    assert (*ax.get_xlim(), *ax.get_ylim()) == pytest.approx((-0.1, 1.1, -1, 11))
    assert [b.offsetbox.get_zoom() for b in ax.artists if isinstance(b, AnnotationBbox)] == [0.15, 0.15]


def test_white_is_transparent_and_a_given_fourth_channel_stays(images):
    images[:, 0], images[:, 1], images[:, 2], images[:, 3] = 255, 120, (255, 255, 0), 245  # neither yellow nor nearly white is white
    given = np.concatenate([images, np.full_like(images[..., :1], 77)], -1)
    points = np.stack([np.arange(7)] * 2, 1)
    for pictures, white in ((images, 0), (given, 77)):
        boxes = [a for a in plot_images(points, pictures, ax=plt.figure().gca()).artists if isinstance(a, AnnotationBbox)]
        for box in boxes: assert (box.offsetbox.get_data()[0, :, 3] == white).all() and (box.offsetbox.get_data()[1:4, :, 3] == (255 if white == 0 else 77)).all()


@given(seed=st.integers(0, 9999), zoom=st.sampled_from([1.0, 4.0, 9.0]))
@settings(deadline=None, max_examples=12)
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
@settings(deadline=None, max_examples=4)
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
    for text in texts:
        c = int(text.get_text()[-1])
        assert text.xy == tuple(min(points[labels == c].tolist(), key=lambda p: sum(np.hypot(*(q - p)) for q in points[labels == c])))  # the middle
        assert to_rgba(text.get_bbox_patch().get_edgecolor()) == to_rgba(concept_style(c)["color"])
    plt.close(figure)


def test_names_of_marks_at_the_edge_stay_inside():
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1.0]])
    figure, ax = plt.subplots(figsize=(5, 4))
    plot_concepts(corners, range(4), ["a rather long name"] * 4, range(4), ax)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    texts = place_names(corners, range(4), ["a rather long name"] * 4, range(4), ax)
    figure.canvas.draw()
    edge = ax.get_window_extent()
    for box in (t.get_bbox_patch().get_window_extent() for t in texts): assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1


def test_a_name_covers_no_mark_of_those_shown_where_there_is_room():
    "One mark, others of no interest around it: the first turn that covers none is taken, to the right where it is free."
    rng = np.random.default_rng(1)
    points = np.concatenate([[[0.0, 0.0]], rng.normal(size=(30, 2)) * 0.2, [[-3, -3], [3, 3]]])
    labels = np.array([0] + [1] * 30 + [2, 2])
    for show in ([0], [0, 1]):
        figure, ax = plt.subplots(figsize=(6, 6))
        plot_concepts(points, labels, {0: "zero", 1: "one", 2: "two"}, show, ax)
        texts = place_names(points, labels, {0: "zero", 1: "one", 2: "two"}, show, ax)
        figure.canvas.draw()
        marks = ax.transData.transform(points[np.isin(labels, show)])
        for text in texts:
            box = text.get_bbox_patch().get_window_extent()
            assert not any(box.contains(*m) for m in marks)
        if show == [0]: assert texts[0].xyann == pytest.approx((14, 0))


def test_concepts_without_points_are_not_named():
    ax = plot_concepts(np.eye(2), [0, 0], {0: "a", 1: "b"}, [0, 1], plt.figure().gca())
    assert [t.get_text() for t in place_names(np.eye(2), [0, 0], {0: "a", 1: "b"}, [0, 1], ax)] == ["a"]


class Page(HTMLParser):
    "Tags with their attributes, and the text between them."
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.texts.append(data)


def test_the_map_to_click_has_every_point_at_its_place(images):
    points, labels = [[0, 0], [4, 10], [2, 5], [2.001, 5], [0, 10]], [3, -1, 3, 8, 3]
    page = Page(click_map(points, images[:5], "abcde", labels, {3: ("three", images[:2], ["x", "y"]), -1: ("none", [], [])}))
    dots = [attrs for tag, attrs in page.tags if tag == "input"]
    assert [d["title"] for d in dots] == list("abcde") and [int(d["data-row"]) for d in dots] == list(range(5))
    assert [d["class"] for d in dots] == ["c3 pic", "c-1 pic", "c3 pic", "c8 dot", "c3 pic"]  # the fourth would cover the third
    places = [tuple(map(int, re.match(r"left:(-?\d+)px;top:(-?\d+)px", d["style"]).groups())) for d in dots]
    assert places == [(25, 470), (765, 30), (395, 250), (395, 250), (25, 30)]  # up is up
    assert [d["style"].count("background-image:url(data:image/png;base64,") for d in dots] == [1, 1, 1, 0, 1] and len({d["style"][-60:] for d in dots}) == 5
    assert [attrs["class"] for tag, attrs in page.tags if tag == "div"] == ["kklip-map", "card c3", "card c-1"] and [t for t in page.texts[1:]] == ["three", "x", "y", "none"]
    assert page.texts[0].count(".kklip-map input.c3:checked ~ .card.c3 {display: block}") == 1 and ".kklip-map:has(.c-1:checked) input.c-1 {outline" in page.texts[0]


def test_the_map_to_click_has_a_dot_where_a_picture_of_thirty_pixels_would_cover_another(images):
    page = Page(click_map([[0, 0], [25, 0], [40, 0], [740, 0]], images[:4], "abcd", [0] * 4, {}))
    assert [attrs["class"] for tag, attrs in page.tags if tag == "input"] == ["c0 pic", "c0 dot", "c0 pic", "c0 pic"]


def test_the_map_to_click_escapes_what_was_written(images):
    texts = [t for t in TEXTS if t != " "]
    n = len(texts)
    text = click_map(torch.eye(n, 2), [images[0]] * n, texts, [0] * n, {i: (t, images[:2], [t, None]) for i, t in enumerate(texts)})
    page = Page(text.encode().decode())  # no half of a pair is left
    assert [attrs["title"] for tag, attrs in page.tags if tag == "input"] == [*map(shown, texts)]
    assert [t for t in page.texts[1:]] == [t for text in texts for t in [shown(text)] * 2] and {tag for tag, _ in page.tags} == {"style", "div", "input", "b", "br", "figure", "img"}


@pytest.mark.parametrize("how, said", [(dict(captions="ab"), "'captions': 2"), (dict(images=2), "'images': 2"), (dict(labels=[0, 0]), "labels.*3 rows"), (dict(cards={0.5: ("a", [], [])}), "concepts of cards.*0.5"), (dict(cards={'0"><b>': ("a", [], [])}), "concepts of cards"),
                                       (dict(cards={0: ("a", 2, ["x"])}), "'captions': 1.*2 pictures on a card")])
def test_a_map_to_click_needs_one_of_each_a_point(how, said, images):
    how = dict(points=np.eye(3)[:, :2], images=3, captions="abc", labels=[0, 0, 0], cards={}) | how
    how["images"] = images[:how["images"]]
    how["cards"] = {k: (name, images[:p] if p else [], words) for k, (name, p, words) in how["cards"].items()}
    with pytest.raises(ValueError, match=said): click_map(**how)


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
    assert len(ax.figure.axes) == 2 and ax.figure.axes[1].get_ylabel() == "cosine"  # the second is the colour bar
    assert ax.images[0].get_clim() == (similarities.min(), similarities.max()) and (ax.get_xlabel(), ax.get_ylabel()) == ("captions", "images")
    low, high = (np.sum(ax.images[0].cmap(end)[:3]) for end in (0.0, 1.0))
    assert low < high  # bright is similar
    for wrong, said in ((np.full((1, 2), np.nan), "NaN"), ([[1.0], [1.0, 2.0]], "one length"), (np.zeros((0, 2)), "shape")):
        with pytest.raises(ValueError, match=f"similarities.*{said}"): plot_similarities(wrong, "ab")


def test_of_two_concepts_with_one_look_the_larger_is_shown():
    assert distinct_concepts([0, 0, 64, 64, 64, 1]) == [64, 1] and distinct_concepts([0, 0, 0, 64, 64, 1]) == [0, 1]


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
