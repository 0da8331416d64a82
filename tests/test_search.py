"""Search: against a naive loop, its limits, what it refuses, and that other people's text stays text."""

import dataclasses
import html
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kklip_nb import search as S
from kklip_nb.student import build_student, prepare_images, tokenize
from kklip_nb.training import LAPTOP, load_student, make_optimizer, save_checkpoint

SMALL = dataclasses.replace(LAPTOP, student="kklip-laptop-vit", train_image="all", imagenet=False, k=3)
build = partial(build_student, SMALL.student, None, 8, SMALL.k, False, "all")


@pytest.fixture(scope="module")
def student(): return build().eval()


@pytest.fixture(scope="module")
def images(): return np.random.default_rng(0).integers(256, size=(70, 24, 24, 3), dtype=np.uint8)  # more than one batch


@pytest.fixture(scope="module")
def features(student, images): return S.picture_features(student, images)


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@torch.no_grad()
def slow_scores(student, images, query: str) -> list[float]:
    "One picture and one text at a time."
    text = student.encode_text(tokenize(student, [query]))[0]
    return [float(torch.cosine_similarity(student.encode_image(prepare_images(student, image[None]))[0], text, dim=0)) for image in images]


@pytest.mark.parametrize("queries", ["dog", ["a red dog", "two"]])
def test_same_as_a_loop(student, images, features, queries):
    rows, scores = S.search(student, features, queries, k=7)
    for query, found, values in zip([queries] if isinstance(queries, str) else queries, rows, scores, strict=True):
        slow = np.array(slow_scores(student, images, query))
        np.testing.assert_allclose(values, np.sort(slow)[::-1][:7], atol=2e-5)
        np.testing.assert_allclose(slow[found], values, atol=2e-5)


def test_features_are_unit_rows_and_the_student_is_left_as_it_was(images):
    student = build(seed=2)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    features = S.picture_features(student, list(images))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(70))
    assert features.dtype == torch.float32 and not features.requires_grad
    assert all(v.equal(before[k]) for k, v in student.state_dict().items())


def test_a_frozen_trunk_is_run_once(images, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    frozen = build_student(imagenet=False, teacher_dim=8, n_concepts=3).eval()
    first = S.picture_features(frozen, images[:3])
    assert len(list(tmp_path.glob("trunk-*"))) == 1
    with torch.no_grad(): slow = torch.cat([frozen.encode_image(prepare_images(frozen, x[None])) for x in images[:3]])
    torch.testing.assert_close(first, torch.nn.functional.normalize(slow, dim=1), rtol=0, atol=1e-5)
    monkeypatch.setattr(frozen.clip.visual.trunk, "forward", None)
    torch.testing.assert_close(S.picture_features(frozen, images[:3]), first, rtol=0, atol=0)


def test_equal_pictures_keep_their_order_and_k_may_be_too_large(student, images):
    same = S.picture_features(student, np.repeat(images[:1], 9, axis=0))
    rows, scores = S.search(student, same, ["one", "two"], k=99)
    assert rows.tolist() == [list(range(9))] * 2 and np.ptp(scores, axis=1).max() == 0


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 15))
def test_ties_and_order_on_made_features(numbers, k):
    student = build_once()
    text = S.query_features(student, "dog")
    pictures = torch.nn.functional.normalize(text * torch.tensor(numbers)[:, None] + torch.eye(128)[:1], dim=1)
    (rows,), (scores,) = S.search(student, pictures, "dog", k)
    slow = [round(float(p @ text[0]), 6) for p in pictures]
    assert len(rows) == min(k, len(numbers)) == len(set(rows)) and list(scores) == sorted(scores, reverse=True)
    assert all(rows[i] < rows[i + 1] for i in range(len(rows) - 1) if numbers[rows[i]] == numbers[rows[i + 1]])
    np.testing.assert_allclose(scores, np.array(slow)[rows], atol=2e-6)


def build_once(kept=[]):  # noqa: B006
    "One student for all examples of hypothesis."
    if not kept: kept.append(build().eval())
    return kept[0]


@pytest.mark.parametrize("queries", ["", " \t", "\u200b", [], ["dog", ""], [None], [3]])
def test_an_empty_query_is_refused(student, features, queries):
    with pytest.raises(ValueError, match="nothing to search for.*type a word"): S.search(student, features, queries)


@pytest.mark.parametrize("bad, k", [(torch.zeros(4, 7), 5), (torch.zeros(128), 5), (None, 0)])
def test_other_pictures_and_none_asked_for_are_refused(student, features, bad, k):
    with pytest.raises(ValueError, match="expected k of 1 or more"): S.search(student, features if bad is None else bad, "dog", k)


@pytest.mark.parametrize("shapes", [[], [(8, 8, 3), (9, 8, 3)], [(8, 8)], [(8, 8, 4)], [(2, 8, 8, 3)]])
def test_what_is_no_list_of_pictures_is_refused(student, shapes):
    with pytest.raises(ValueError, match="own_pairs.read_image"): S.picture_features(student, [np.zeros(s, np.uint8) for s in shapes])


def test_pixels_that_are_not_bytes_and_broken_weights_are_refused(images):
    student = build()
    with pytest.raises(ValueError, match="expected uint8"): S.picture_features(student, images[:2] / 255)
    with torch.no_grad(): student.clip.visual.proj.fill_(float("nan"))
    with pytest.raises(ValueError, match="picture features holds NaN"): S.picture_features(student, images[:2])


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_a_student_comes_back_from_its_checkpoint(tmp_path, images, projection):
    recipe = dataclasses.replace(SMALL, projection=projection, seed=4)
    kept = build(seed=1, projection=projection)
    path = save_checkpoint(tmp_path / "c.safetensors", kept, make_optimizer(kept, 1e-3, 0.1), recipe, 1, [])
    back = load_student(path)
    assert not back.training and all(v.equal(back.state_dict()[k]) for k, v in kept.state_dict().items())
    torch.testing.assert_close(S.picture_features(back, images), S.picture_features(kept, images), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match="no checkpoint"): load_student(tmp_path / "none.safetensors")


def texts_of(figure): return [t.get_text() for t in figure.axes[0].texts]


def test_a_figure_shows_what_was_found(images):
    captions = [f"thing {i}" for i in range(70)]
    found = {"CLIP": np.array([[3, 1], [0, 2]]), "KKLIP": np.array([[5], [69]])}
    right = np.zeros((2, 70), bool)
    right[0, 1] = right[1, 69] = right[1, 3] = True
    figure = S.plot_found(["one", "two"], found, images, captions, "title", "credit", right)
    (ax,) = figure.axes
    drawn = [ax_image.get_array() for ax_image in ax.images]
    for shown, row in zip(drawn, [3, 1, 0, 2, 5, 69], strict=True): np.testing.assert_array_equal(shown, images[row])
    assert texts_of(figure) == ["one", "two", "CLIP", "thing 3", "thing 1", "thing 0", "thing 2", "KKLIP", "thing 5", "thing 69", "credit"]
    assert len(ax.patches) == 2 and ax.get_title() == "title"  # one right picture was not found
    scores = {"CLIP": np.array([[0.5, 0.25], [1, -0.125]]), "KKLIP": np.array([[0.3], [0.2]])}
    scored = texts_of(S.plot_found(["one", "two"], found, images, captions, scores=scores))
    assert [t.replace("\n", " ") for t in scored if "thing" in t] == ["0.50 thing 3", "0.25 thing 1", "1.00 thing 0", "-0.12 thing 2", "0.30 thing 5", "0.20 thing 69"]


@pytest.mark.parametrize("found", [np.array([1, 2]), np.array([[1], [2], [3]])])
def test_finds_that_do_not_fit_the_queries_are_refused(images, found):
    with pytest.raises(ValueError, match="expected .q, k. as search gives them"): S.plot_found(["one", "two"], {"CLIP": found}, images, ["x"] * 70)


NASTY = ["$\\frac{", "<script>alert(1)</script>", "a\nb\n\nc", "x" * 500, "", "\\textbf{$"]


def test_any_text_can_be_drawn(images, tmp_path):
    with warnings.catch_warnings(action="error"):
        figure = S.plot_found(NASTY, {"$x$": np.arange(6)[:, None]}, images, NASTY, "$\\frac{", "$_")
        figure.savefig(tmp_path / "x.png")
    assert "$\\frac{" in texts_of(figure) and max(map(len, texts_of(figure))) < 60


@pytest.fixture
def box(student, images, features):
    pytest.importorskip("ipywidgets")
    return S.search_box({"A": (student, features), "B<": (student, -features)}, images, [f'"{i}" <i>' for i in range(70)], "dog")


def test_the_box_answers(box, student, features):
    field, answer = box.children
    first = answer.value
    field.value = "red"
    assert first != answer.value and answer.value.startswith('<img style="width: 100%" alt="red: A finds ') and "base64,iVBOR" in answer.value
    (rows,), (cosines,) = S.search(student, features, "red")
    says = html.unescape(answer.value.split('"')[3])
    assert says.startswith("red: A finds " + ", ".join(f'"{i}" <i> ({c:.2f})' for i, c in zip(rows, cosines)) + "; B< finds ")
    assert not plt.get_fignums()  # nothing is left open


def test_the_box_says_where_the_picture_of_a_caption_stands(student, images, features):
    pytest.importorskip("ipywidgets")
    captions = ["Red car", "blue whale", *["thing"] * 68]
    field, answer = S.search_box({"A": (student, features), "B": (student, -features)}, images, captions, "a bus").children
    assert "own picture" not in answer.value
    field.value = "red  CAR"
    scores = np.array(slow_scores(student, images, "red  CAR"))
    a, b = ((sign * scores > sign * scores[0]).sum() + 1 for sign in (1, -1))
    for name, place in (("A", a), ("B", b)): assert f"{name} (own picture: place {place} of 70) finds " in answer.value


def test_the_box_escapes_and_goes_on_after_an_empty_query(box):
    field, answer = box.children
    for text in ["<img src=x onerror=alert(1)>", '" onload="alert(1)', "$x$"]:
        field.value = text
        assert answer.value.count("<") == 1 and answer.value.count('"') == 6 and html.escape(text) in answer.value
    field.value = ""
    assert answer.value.startswith("<p>nothing to search for in") and answer.value.count("<") == 2
    field.value = "dog"
    assert answer.value.startswith("<img")
