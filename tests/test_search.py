"""Search: against a naive loop, its limits, what it refuses, and that other people's text stays text."""

import dataclasses
import html
import warnings
from functools import partial
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
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


@pytest.fixture(scope="module")
def slow_pictures(student, images):
    "One picture at a time, its row left as long as it is."
    with torch.no_grad(): return [student.encode_image(prepare_images(student, image[None]))[0] for image in images]


@torch.no_grad()
def slow_scores(student, pictures, query: str) -> list[float]:
    "One text at a time."
    text = student.encode_text(tokenize(student, [query]))[0]
    return [float(torch.cosine_similarity(picture, text, dim=0)) for picture in pictures]


@pytest.mark.parametrize("queries", ["dog", ["a red dog", "two"]])
def test_same_as_a_loop(student, slow_pictures, features, queries):
    rows, scores = S.search(student, features, queries, k=7)
    for query, found, values in zip([queries] if isinstance(queries, str) else queries, rows, scores, strict=True):
        slow = np.array(slow_scores(student, slow_pictures, query))
        np.testing.assert_allclose(values, np.sort(slow)[::-1][:7], atol=2e-5)
        np.testing.assert_allclose(slow[found], values, atol=2e-5)
    assert all(np.shape(part)[1] == 5 for part in S.search(student, features, queries))


@pytest.mark.parametrize("embed", [lambda student, images: S.picture_features(student, images[:4]), lambda student, images: S.query_features(student, ["dog", "a red circle"])])
def test_a_student_in_training_mode_is_put_into_evaluation_mode(images, embed):
    student = build(seed=3)
    for tower in (student.clip, student.clip.visual): tower.transformer.resblocks[0].mlp.append(torch.nn.Dropout(0.5))
    want = embed(student.eval(), images)
    found = embed(student.train(), images)
    assert not student.training and not found.requires_grad and found.is_inference()
    torch.testing.assert_close(found, want, rtol=0, atol=0)


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
    first = S.picture_features(frozen.train(), images[:3])
    assert not frozen.training and not first.requires_grad and len(list(tmp_path.glob("trunk-*"))) == 1
    with torch.no_grad(): slow = torch.cat([frozen.encode_image(prepare_images(frozen, x[None])) for x in images[:3]])
    torch.testing.assert_close(first, torch.nn.functional.normalize(slow, dim=1), rtol=0, atol=1e-5)
    monkeypatch.setattr(frozen.clip.visual.trunk, "forward", None)
    torch.testing.assert_close(S.picture_features(frozen, images[:3]), first, rtol=0, atol=0)


def test_a_trunk_that_is_trained_in_part_is_run_anew(images, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    part = build_student(imagenet=False, teacher_dim=8, n_concepts=3, train_image="last").eval()
    found = S.picture_features(part, images[:2])
    assert not list(tmp_path.glob("trunk-*"))
    with torch.no_grad(): slow = part.encode_image(prepare_images(part, images[:2]))
    torch.testing.assert_close(found, torch.nn.functional.normalize(slow, dim=1), rtol=0, atol=1e-5)


def test_texts_of_unequal_length_are_cut_to_the_longest(student, monkeypatch):
    seen, encode = [], student.encode_text
    monkeypatch.setattr(student, "encode_text", lambda tokens: seen.append(tuple(tokens.shape)) or encode(tokens))
    found = S.query_features(student, ["dog", "a red dog in the rain"])
    assert seen == [(2, 8)]  # six words between a start and an end
    torch.testing.assert_close(found, torch.cat([S.query_features(student, q) for q in ("dog", "a red dog in the rain")]), rtol=0, atol=1e-5)


def test_rows_of_length_one_are_taken_as_they_are(rng):
    "A query over a million pictures copies none of them; others are brought to length one."
    rows = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(500, 64)).astype(np.float32)), dim=1)
    assert S._unit_rows("rows", rows).data_ptr() == rows.data_ptr()
    for longer in (2 * rows, rows * torch.linspace(1, 1.01, 500)[:, None], rows.double(), rows.numpy(), rows.bfloat16()):
        torch.testing.assert_close(S._unit_rows("rows", longer), rows, atol=1e-6 if getattr(longer, "dtype", 0) != torch.bfloat16 else 1e-2, rtol=0)
    broken = rows.clone()
    broken[7, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"): S._unit_rows("rows", broken)


def test_cosines_are_compared_to_six_places_and_equal_ones_keep_their_order(student):
    text = S.query_features(student, "dog")
    side = torch.nn.functional.normalize(torch.eye(128)[:1] - (torch.eye(128)[:1] @ text.T) * text, dim=1)
    cosines = torch.tensor([0.3, 0.30001, 0.3 + 1e-8, -0.9, 0.30001, *[0.3] * 30])  # more than a sort of few would keep in order by chance
    pictures = cosines[:, None] * text + (1 - cosines.square()).sqrt()[:, None] * side
    (rows,), (scores,) = S.search(student, pictures, "dog", 99)
    assert rows.tolist() == [1, 4, 0, 2, *range(5, 35), 3]
    np.testing.assert_allclose(scores, [0.30001] * 2 + [0.3] * 32 + [-0.9], atol=5e-7)


@pytest.mark.parametrize("convert", [lambda f: f.numpy(), lambda f: f.tolist(), lambda f: list(f), lambda f: f.double(), lambda f: f.clone().requires_grad_(), lambda f: f.numpy()[::-1].copy()[::-1],
                                     lambda f: np.frombuffer(f.numpy().tobytes(), np.float32).reshape(f.shape), lambda f: np.asfortranarray(f.numpy())])
def test_pictures_are_rows_of_numbers_in_any_container(student, features, convert):
    (rows, scores), (want, cosines) = (S.search(student, f, ["dog", "red"], np.int64(9)) for f in (convert(features), features))
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_allclose(scores, cosines, atol=1e-6)
    for half in (features.half(), features.bfloat16()): np.testing.assert_allclose(S.search(student, half, "dog", 70)[1], S.search(student, features, "dog", 70)[1], atol=5e-3)


def test_one_picture_none_and_equal_queries(student, features):
    assert S.search(student, features[:1], "dog")[0].tolist() == [[0]] and S.search(student, features[:0], ["dog", "cat"])[0].shape == (2, 0)
    rows, scores = S.search(student, features, ["dog", "dog", "DOG"], 3)
    assert (rows == rows[0]).all() and (scores == scores[0]).all()
    for queries in (("dog", "cat"), np.array(["dog", "cat"]), iter(["dog", "cat"])): np.testing.assert_array_equal(S.search(student, features, queries)[0], S.search(student, features, ["dog", "cat"])[0])


@pytest.mark.parametrize("text", ["\ud800", "\U0001f600", "黑猫", "x" * 10_000, "a\0b", "$", "<b>", "%s {}"])
def test_any_text_is_a_query(student, features, text): assert S.search(student, features, text, 1)[0].shape == (1, 1)


@pytest.mark.parametrize("convert", [list, lambda i: i.tolist(), torch.tensor, lambda i: list(torch.tensor(i)), iter, lambda i: [Image.fromarray(x) for x in i], lambda i: i[::-1].copy()[::-1], np.asfortranarray])
def test_pictures_of_any_container_have_the_same_features(student, images, features, convert):
    torch.testing.assert_close(S.picture_features(student, convert(images[:3])), features[:3], rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("bad, k", [(torch.zeros(4, 7), 5), (torch.zeros(128), 5), (np.zeros((4, 7)), 5), *((None, k) for k in (0, -1, 2.0, 2.5, None, "2"))])
def test_other_pictures_and_none_asked_for_are_refused(student, features, bad, k):
    with pytest.raises(ValueError, match="expected k of 1 or more|expected .n, d."): S.search(student, features if bad is None else bad, "dog", k)


@pytest.mark.parametrize("bad, said", [(float("nan"), "NaN"), (float("inf"), "NaN|infinite")])
def test_pictures_with_broken_rows_are_never_the_best(student, features, bad, said):
    broken = features.clone()
    broken[3, 5] = bad
    for pictures in (broken, broken.numpy(), broken.half()):
        with pytest.raises(ValueError, match=f"pictures holds.*({said})"): S.search(student, pictures, "dog")
    for pictures in ([["a"] * 128], None):
        with pytest.raises(ValueError, match="pictures has dtype"): S.search(student, pictures, "dog")


@pytest.mark.parametrize("shapes", [[], [(8, 8, 3), (9, 8, 3)], [(8, 8)], [(8, 8, 4)], [(2, 8, 8, 3)]])
def test_what_is_no_list_of_pictures_is_refused(student, shapes):
    with pytest.raises(ValueError, match="own_pairs.read_image"): S.picture_features(student, [np.zeros(s, np.uint8) for s in shapes])


def test_pixels_that_are_not_bytes_and_broken_weights_are_refused(images):
    student = build()
    with pytest.raises(ValueError, match="expected uint8"): S.picture_features(student, images[:2] / 255)
    for pixels in (images[:2].astype(np.uint16), images[:2].astype(np.int32), images[:2] > 9, images[:2].astype(int) + 256, [Image.fromarray(i).convert("HSV") for i in images[:2]]):
        with pytest.raises(ValueError, match="expected uint8.*own_pairs.read_image"): S.picture_features(student, pixels)
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
    for image, (row, block, place) in zip(ax.images, [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 0)], strict=True):
        left, right_, bottom, top = image.get_extent()  # a row down for a query, a place to the right for a place
        assert (left, right_, top, bottom) == pytest.approx((2 + 2.5 * block + place + 0.04, 2 + 2.5 * block + place + 0.96, 1.5 * row + 0.04, 1.5 * row + 0.96))
    frames = sorted((p.get_x(), p.get_y()) for p in ax.patches)
    assert frames == [(3.0, 0.0), (4.5, 1.5)] and not any(p.get_fill() for p in ax.patches)
    at = {t.get_text(): t.get_position() for t in ax.texts}
    assert at["one"][1] < at["two"][1] and at["one"][0] < at["CLIP"][0] < at["KKLIP"][0] and ax.get_ylim()[0] > ax.get_ylim()[1]
    assert at["thing 1"] == pytest.approx((3.5, 1.09)) and tuple(figure.get_size_inches()) == pytest.approx((0.75 * 6, 0.75 * 4.1))
    drawn = [ax_image.get_array() for ax_image in ax.images]
    for shown, row in zip(drawn, [3, 1, 0, 2, 5, 69], strict=True): np.testing.assert_array_equal(shown, images[row])
    assert texts_of(figure) == ["one", "two", "CLIP", "thing 3", "thing 1", "thing 0", "thing 2", "KKLIP", "thing 5", "thing 69", "credit"]
    assert len(ax.patches) == 2 and ax.get_title() == "title"  # one right picture was not found
    scores = {"CLIP": np.array([[0.5, 0.25], [1, -0.125]]), "KKLIP": np.array([[0.3], [0.2]])}
    scored = texts_of(S.plot_found(["one", "two"], found, images, captions, scores=scores))
    assert [t.replace("\n", " ") for t in scored if "thing" in t] == ["0.50 thing 3", "0.25 thing 1", "1.00 thing 0", "-0.12 thing 2", "0.30 thing 5", "0.20 thing 69"]


FOUND = np.array([[0, 1], [2, 0]])


@pytest.mark.parametrize("rows", [np.array([1, 2]), np.array([[1], [2], [0]]), FOUND[:1], FOUND - 1, FOUND + 1, FOUND + 0.5, [["a", "b"]] * 2, FOUND[0, 0]], ids=str)
def test_finds_that_do_not_fit_the_queries_are_refused(images, rows):
    with pytest.raises(ValueError, match="rows.*(expected .q, k. as search gives them|whole numbers|read as numbers)"): S.plot_found(["one", "two"], {"CLIP": rows}, images[:3], ["x"] * 3)


@pytest.mark.parametrize("how, said", [(dict(captions=["x", "y"]), "2 pictures with captions"), (dict(images=2), "2 pictures with captions"), (dict(right=np.ones((2, 2))), r"right has shape \(2, 2\)"), (dict(right=np.ones((3, 2))), r"expected \(2, 3\)"),
                                       (dict(scores={"B": FOUND}), "scores of shape"), (dict(scores={}), r"scores of shape \(0,\)"), (dict(scores={"A": FOUND[:1]}), r"scores of shape \(1, 2\)"), (dict(scores={"A": 0.5}), r"scores of shape \(\)"), (dict(images=0.5), "expected uint8")])
def test_what_belongs_to_the_finds_must_fit_them(images, how, said):
    how = dict(queries=["one", "two"], found={"A": FOUND}, images=3, captions=list("xyz")) | how
    how["images"] = images[:3] / 2 if how["images"] == 0.5 else images[:how["images"]]
    with pytest.raises(ValueError, match=said): S.plot_found(**how)


@pytest.mark.parametrize("convert", [np.array, torch.tensor, lambda x: x.tolist(), lambda x: x.astype(float), lambda x: torch.tensor(x).bfloat16(), list])
def test_finds_scores_and_right_ones_come_in_any_container(images, convert):
    scores, right = np.array([[0.5, 0.25], [1.0, 0.125]]), np.array([[0, 1, 0], [1, 0, 1]])
    found = convert(FOUND)
    figure = S.plot_found(["one", "two"], {"A": found}, torch.tensor(images[:3]), np.array(["x", "y", "z"]), right=convert(right), scores={"A": torch.tensor(scores).bfloat16() if convert is torch.tensor else scores.tolist()})
    assert [t for t in texts_of(figure) if t[:2] in ("0.", "1.")] == ["0.50 x", "0.25 y", "1.00 z", "0.12 x"]
    assert sorted((p.get_x(), p.get_y()) for p in figure.axes[0].patches) == [(2, 1.5), (3, 0), (3, 1.5)]
    for image, row in zip(figure.axes[0].images, FOUND.ravel()): np.testing.assert_array_equal(image.get_array(), images[row])


NASTY = ["$\\frac{", "<script>alert(1)</script>", "a\nb\n\nc", "x" * 500, "", "\\textbf{$", "_y", "a\0b", "\ud800", None, "黑猫", 5, "--> ]]>"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_text_can_be_drawn(images, tmp_path):
    found = {"$x$": np.arange(len(NASTY))[:, None]}
    with warnings.catch_warnings(action="error"), plt.rc_context({"svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph")
        figure = S.plot_found(NASTY, found, images, NASTY, "$\\frac{", "$_")
        for name in ("x.png", "x.svg"): figure.savefig(tmp_path / name)
    drawn = ["".join(t.itertext()) for t in ElementTree.parse(tmp_path / "x.svg").iter("{http://www.w3.org/2000/svg}text")]
    for text in ("$\\frac{", "\\textbf{$", "_y", "a�b", "�", "黑猫", "5", "--> ]]>"): assert drawn.count(text) >= 2
    assert "$x$" in drawn and "$_" in drawn and max(map(len, texts_of(figure))) < 60
    long = [t for t in texts_of(figure) if "xx" in t]
    assert len(long) == 2 and all(t.endswith("…") and t.count("\n") == 2 for t in long)


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
    assert field.continuous_update is False


def test_the_box_draws_its_finds_with_cosines_and_credit(student, images, features, monkeypatch):
    pytest.importorskip("ipywidgets")
    calls, draw = [], S.plot_found
    monkeypatch.setattr(S, "plot_found", lambda *args: calls.append(args) or draw(*args))
    captions = [f"thing {i}" for i in range(70)]
    field, answer = S.search_box({"A": (student, features), 2: (student, -features.numpy())}, images, captions, credit="whose").children
    assert field.value == "dog" and len(calls) == 1
    field.value = "thing 4"
    text, found, pictures, under, title, credit, right, scores = calls[1]
    assert (text, title, credit, right) == ("thing 4", "", "whose", None) and list(under) == captions
    for picture, image in zip(pictures, images, strict=True): np.testing.assert_array_equal(picture, image)
    for name, sign in (("A", 1), ("2", -1)):
        rows, cosines = S.search(student, sign * features, "thing 4", k=70)
        key = f"{name} (own picture: place {rows[0].tolist().index(4) + 1} of 70)"
        np.testing.assert_array_equal(found[key], rows[:, :5])
        np.testing.assert_allclose(scores[key], cosines[:, :5], atol=1e-6)
    assert html.unescape(answer.value.split('"')[3]).count("thing") == 11  # five finds a student, and the query


@pytest.mark.parametrize("how, said", [(dict(captions=["x"]), "'captions': 1.*3 images"), (dict(images=2), "'captions': 3.*2 images"), (dict(features=2), "'A': 2.*3 images")])
def test_the_box_needs_a_caption_and_a_row_a_picture(student, images, features, how, said):
    how = dict(captions=list("xyz"), images=3, features=3) | how
    with pytest.raises(ValueError, match=said): S.search_box({"A": (student, features[:how["features"]])}, images[:how["images"]], how["captions"])


def test_the_box_takes_captions_that_are_missing_or_no_text(student, images, features):
    pytest.importorskip("ipywidgets")
    field, answer = S.search_box({"A": (student, features[:3])}, images[:3], np.array([None, 5, "\ud800\0"], object), None, None).children
    assert field.value == "" and answer.value.startswith("<p>nothing to search for")
    field.value = "dog"
    assert "5 (" in answer.value and "�� (" in answer.value and answer.value.encode()


def test_the_box_says_where_the_picture_of_a_caption_stands(student, images, slow_pictures, features):
    pytest.importorskip("ipywidgets")
    captions = ["Red  car", "blue whale", "red car", *["thing"] * 67]
    field, answer = S.search_box({"A": (student, features), "B": (student, -features)}, images, captions, "a bus").children
    assert "own picture" not in answer.value
    field.value = "red  CAR"
    scores = np.array(slow_scores(student, slow_pictures, "red  CAR"))
    a, b = ((sign * scores > max(sign * scores[0], sign * scores[2])).sum() + 1 for sign in (1, -1))
    for name, place in (("A", a), ("B", b)): assert f"{name} (own picture: place {place} of 70) finds " in answer.value


def test_the_box_escapes_and_goes_on_after_an_empty_query(box):
    field, answer = box.children
    for text in ["<img src=x onerror=alert(1)>", '" onload="alert(1)', "$x$"]:
        field.value = text
        assert answer.value.count("<") == 1 and answer.value.count('"') == 6 and html.escape(text) in answer.value
    field.value = ""
    assert answer.value.startswith("<p>nothing to search for in [&#x27;") and answer.value.count("<") == 2
    field.value = "dog"
    assert answer.value.startswith("<img")
