"""Attribute data sets in their official layouts, average precision, probes, and pairs one word apart."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score

from kklip_nb.evidence.attributes import (
    CHANGES,
    COLOUR_NAMES,
    Attributes,
    MeanAP,
    WordPair,
    attribute_scores,
    average_precisions,
    chance_precision,
    changed_scenes,
    colour_shares,
    dominant_colours,
    file_features,
    image_attributes,
    linear_probe,
    load_awa2,
    load_cub,
    map_by_family,
    map_interval,
    mean_average_precision,
    one_word_apart,
    one_word_pairs,
    openmoji_attributes,
    pair_similarities,
    phrase,
    scene_attributes,
    scene_material,
    score_pairs,
    signature_scores,
    taboo_prompts,
    winoground,
)
from kklip_nb.data import Pairs
from kklip_nb.evidence.text_probe import KINDS, Scene, Thing, draw_scene, make_scenes, scene_caption

NAN = float("nan")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def picture(path, colour=(255, 0, 0), size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


# ---- AWA2

AWA2_CLASSES = ["antelope", "grizzly+bear", "killer+whale", "zebra"]


@pytest.fixture
def awa2(tmp_path):
    "Four classes, three predicates and nine images, as the archive writes them."
    folder = tmp_path / "Animals_with_Attributes2"
    write(folder / "classes.txt", "".join(f"{i:6}\t{n}\n" for i, n in enumerate(AWA2_CLASSES, 1)))
    write(folder / "predicates.txt", "    1\tblack\n    2\tstripes\n    3\tswims\n")
    rows = ["  -1.00   0.00   5.12", "  39.25   1.00  12.50", "  83.40   0.00 100.00", "  79.80  95.01  -1"]
    write(folder / "predicate-matrix-continuous.txt", "\n".join(rows) + "\n")
    write(folder / "predicate-matrix-binary.txt", "0 0 0\n1 0 0\n1 0 1\n1 1 0\n")
    write(folder / "trainclasses.txt", "grizzly+bear\nantelope\n")
    write(folder / "testclasses.txt", "zebra\nkiller+whale\n")
    for name, count in zip(AWA2_CLASSES, (3, 1, 2, 3)):
        for i in range(count):
            picture(folder / "JPEGImages" / name / f"{name}_{10001 + i}.jpg")
    return folder


def test_awa2_is_read_with_its_missing_entries(awa2):
    data = load_awa2(awa2)
    assert data.class_names == AWA2_CLASSES and data.attribute_names == ["black", "stripes", "swims"]
    np.testing.assert_array_equal(data.attributes, [[NAN, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, NAN]])
    assert not data.per_image and len(data.images) == 9 and all(p.is_file() for p in data.images)
    assert [p.parent.name for p in data.images] == [AWA2_CLASSES[c] for c in data.classes]
    assert {AWA2_CLASSES[c] for c in data.classes[data.train]} == {"antelope", "grizzly+bear"}
    assert {AWA2_CLASSES[c] for c in data.classes[data.test]} == {"killer+whale", "zebra"}
    assert sorted([*data.train, *data.test]) == list(range(9))


def test_awa2_strengths(awa2):
    data = load_awa2(str(awa2), continuous=True)
    np.testing.assert_array_equal(data.attributes[[0, 2]], [[NAN, 0, 5.12], [83.4, 0, 100]])


def test_awa2_binary_may_mark_missing_itself(awa2):
    write(awa2 / "predicate-matrix-binary.txt", "0 0 0\n1 -1 0\n1 0 1\n1 1 0\n")
    assert np.isnan(load_awa2(awa2).attributes[1, 1])


def test_awa2_a_class_in_neither_list_is_in_neither_part(awa2):
    write(awa2 / "testclasses.txt", "zebra\n")
    data = load_awa2(awa2)
    assert len(data.train) + len(data.test) == 7


def test_windows_line_ends_and_blank_last_lines_are_read(awa2):
    for name in ("classes.txt", "predicates.txt", "testclasses.txt", "predicate-matrix-binary.txt"):
        write(awa2 / name, (awa2 / name).read_text().replace("\n", "\r\n") + "\r\n")
    assert load_awa2(awa2).attributes.shape == (4, 3)


@pytest.mark.parametrize(
    "name",
    ["classes.txt", "predicates.txt", "predicate-matrix-binary.txt", "predicate-matrix-continuous.txt",
     "trainclasses.txt", "testclasses.txt"],
)  # fmt: skip
def test_awa2_names_the_file_that_is_missing_or_empty(awa2, name):
    write(awa2 / name, "\n \n")
    with pytest.raises(ValueError, match=f"{name} is empty"):
        load_awa2(awa2)
    (awa2 / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_awa2(awa2)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("classes.txt", "1\tantelope\n3\tzebra\n", r"classes.txt, line 2: '3\\tzebra'; expected '2 name'"),
        ("classes.txt", "1\tantelope\n2\n", "line 2"),
        ("predicates.txt", "black\nstripes\n", "line 1"),
        ("predicate-matrix-binary.txt", "0 0 0\n1 0 0\n1 0 1\n", "3 rows of .3. numbers; expected 4 classes by 3"),
        ("predicate-matrix-binary.txt", "0 0 0\n1 0 0\n1 0\n1 1 0\n", r"\[2, 3\] numbers"),
        ("predicate-matrix-binary.txt", "0 0 0\n1 2 0\n1 0 1\n1 1 0\n", "holds 2; expected 0, 1"),
        ("predicate-matrix-continuous.txt", "0 0 0\n1 x 0\n1 0 1\n1 1 0\n", "no number"),
        ("predicate-matrix-continuous.txt", "0 0 0\n1 nan 0\n1 0 1\n1 1 0\n", "expected numbers from 0"),
        ("predicate-matrix-continuous.txt", "0 0 0\n1 -7 0\n1 0 1\n1 1 0\n", "-7"),
        ("testclasses.txt", "zebra\nunicorn\n", "unicorn"),
        ("testclasses.txt", "zebra\nantelope\n", "'antelope' is in trainclasses.txt and in testclasses.txt"),
    ],
)
def test_awa2_says_which_line_is_wrong(awa2, name, text, said):
    write(awa2 / name, text)
    with pytest.raises(ValueError, match=said):
        load_awa2(awa2)


def test_awa2_asks_for_the_images_of_every_class(awa2):
    for file in (awa2 / "JPEGImages" / "zebra").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="zebra .1 of 4"):
        load_awa2(awa2)


# ---- CUB

CUB_LABELS = [  # image, attribute, present, certainty, time; the third with a surplus field, as images 2275 and 9364 have
    "1 1 1 3 27.7080", "1 2 0 1 5.0440", "2 1 0 4 0  1.509", "2 2 1 2 9.6780", "3 1 1 1 0.879", "3 2 0 4 12.1",
]  # fmt: skip


@pytest.fixture
def cub(tmp_path):
    "Three images, two classes, two attributes; attributes.txt above the data folder, as in the archive."
    folder = tmp_path / "archive" / "CUB_200_2011"
    files = ["001.Black_footed_Albatross/B_0046_18.jpg", "001.Black_footed_Albatross/B_0009_34.jpg", "002.Laysan_Albatross/L_1.jpg"]
    write(folder.parent / "attributes.txt", "1 has_bill_shape::curved_(up_or_down)\n2 has_size::medium_(9_-_16_in)\n")
    write(folder / "images.txt", "".join(f"{i} {f}\n" for i, f in enumerate(files, 1)))
    write(folder / "classes.txt", "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    write(folder / "image_class_labels.txt", "1 1\n2 1\n3 2\n")
    write(folder / "train_test_split.txt", "1 0\n2 1\n3 1\n")
    write(folder / "attributes" / "certainties.txt", "1 not visible\n2 guessing\n3 probably\n4 definitely\n")
    write(folder / "attributes" / "image_attribute_labels.txt", "\n".join(CUB_LABELS) + "\n")
    for file in files:
        picture(folder / "images" / file)
    return folder


def test_cub_is_read_with_its_oddities(cub):
    data = load_cub(cub)
    np.testing.assert_array_equal(data.attributes, [[1, NAN], [0, 1], [NAN, 0]])  # not visible: missing, also where present is 1
    assert data.per_image and data.classes.tolist() == [0, 0, 1]
    assert data.train.tolist() == [1, 2] and data.test.tolist() == [0]
    assert data.attribute_names[0] == "has_bill_shape::curved_(up_or_down)" and all(p.is_file() for p in data.images)
    assert image_attributes(data) is data.attributes


@pytest.mark.parametrize("place", ["attributes/attributes.txt", "attributes.txt"])
def test_cub_attribute_names_may_lie_beside_the_data(cub, place):
    (cub.parent / "attributes.txt").rename(cub / place)
    assert len(load_cub(cub).attribute_names) == 2


def test_cub_says_where_it_looked_for_attribute_names(cub):
    (cub.parent / "attributes.txt").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_cub(cub)
    assert str(error.value).count("attributes.txt") >= 4 and str(cub.parent) in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt", "attributes/certainties.txt",
     "attributes/image_attribute_labels.txt"],
)  # fmt: skip
def test_cub_names_the_file_that_is_missing(cub, name):
    (cub / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.split("/")[-1]):
        load_cub(cub)


def test_cub_names_an_image_that_is_missing(cub):
    next((cub / "images").glob("002*/*.jpg")).unlink()
    with pytest.raises(FileNotFoundError, match=r"L_1.jpg .1 of 3"):
        load_cub(cub)


@pytest.mark.parametrize(
    "row, line, said",
    [
        (0, "1 1 1 3", "line 1: '1 1 1 3'; expected 'image attribute present certainty time'"),
        (1, "1 two 0 1 5.0", "line 2"),
        (1, "1 2 2 1 5.0", "present 0 or 1"),
        (1, "4 2 0 1 5.0", "image 1 … 3"),
        (1, "1 0 0 1 5.0", "attribute 1 … 2"),
        (1, "1 2 0 0 5.0", "certainty 1 … 4"),
        (1, "1 2 0 5 5.0", "certainty 1 … 4"),
        (1, "1 1 0 4 5.0", "line 2: image 1, attribute 1 a second time"),
        (5, "", "line 6"),
    ],
)
def test_cub_says_which_label_is_wrong(cub, row, line, said):
    lines = list(CUB_LABELS)
    lines[row] = line
    write(cub / "attributes" / "image_attribute_labels.txt", "\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=said):
        load_cub(cub)


def test_cub_notices_a_file_that_was_cut_off(cub):
    write(cub / "attributes" / "image_attribute_labels.txt", "\n".join(CUB_LABELS[:4]) + "\n")
    with pytest.raises(ValueError, match="lacks 2 of 6"):
        load_cub(cub)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("image_class_labels.txt", "1 1\n2 1\n", "2 lines; expected 3"),
        ("image_class_labels.txt", "1 1\n2 1\n3 3\n", "line 3: '3'; expected a whole number from 1 to 2"),
        ("train_test_split.txt", "1 0\n2 1\n3 yes\n", "line 3"),
        ("train_test_split.txt", "1 0\n3 1\n2 1\n", "line 2"),
        ("attributes/certainties.txt", "1 definitely\n2 not visible\n", "not visible"),
    ],
)
def test_cub_says_which_list_is_wrong(cub, name, text, said):
    write(cub / name, text)
    with pytest.raises(ValueError, match=said):
        load_cub(cub)


# ---- both


def test_images_take_the_attributes_of_their_class(awa2):
    data = load_awa2(awa2)
    per_image = image_attributes(data)
    for row, c in enumerate(data.classes):
        np.testing.assert_array_equal(per_image[row], data.attributes[c])
    with pytest.raises(ValueError, match="3 rows; expected one a class .4"):
        image_attributes(data._replace(attributes=data.attributes[:3]))
    with pytest.raises(ValueError, match="4 rows; expected one an image .9"):
        image_attributes(data._replace(per_image=True))


@pytest.mark.parametrize(
    "name, words",
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("grizzly+bear", "grizzly bear"),
        ("furry", "furry"),
        ("has_leg_color::blue", "blue leg color"),
        ("has_size::medium_(9_-_16_in)", "medium (9 - 16 in) size"),
    ],
)
def test_names_become_phrases(name, words):
    assert phrase(name) == words


class PixelStudent(torch.nn.Module):
    "An image tower that returns the mean colour of the picture, a text tower that counts letters."

    def encode_image(self, x):
        return x.mean((2, 3))


@pytest.fixture
def pixel_student(monkeypatch):
    import kklip_nb.evidence.attributes as module

    monkeypatch.setattr(module, "prepare_images", lambda _, images: torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float())
    return PixelStudent()


def test_features_of_files_do_not_depend_on_the_batch(tmp_path, pixel_student):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        picture(file, (50 * i, 0, 10), (8, 8))
    whole = file_features(pixel_student, files, 8)
    assert torch.equal(whole, file_features(pixel_student, files, 8, batch_size=2))
    np.testing.assert_allclose(whole, [[50 * i, 0, 10] for i in range(5)])
    with pytest.raises(ValueError, match="no images"):
        file_features(pixel_student, [], 8)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        file_features(pixel_student, [tmp_path / "gone.png"], 8)


# ---- average precision


def slow_ap(scores, truth):
    positives = [s for s, y in zip(scores, truth) if y == 1]
    precision = [sum(s >= p for s, y in zip(scores, truth) if y == 1) / sum(s >= p for s in scores) for p in positives]
    return sum(precision) / len(precision)


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
    picks = np.random.default_rng(5).integers(40, size=(60, 40))
    loop = [mean_average_precision(scores[p], truth[p]).value for p in picks]
    centred = np.array(loop) - np.mean(loop) + mean_average_precision(scores, truth).value
    assert map_interval(scores, truth, range(40), seed=5, draws=60) == pytest.approx(tuple(np.percentile(centred, [2.5, 97.5])))


def test_the_interval_draws_groups_and_leaves_missing_entries_out(rng):
    truth = (rng.random((30, 3)) < 0.4).astype(float)
    truth[rng.random((30, 3)) < 0.2] = NAN
    scores, groups = rng.normal(size=(30, 3)), np.array(list("abcdefghij") * 3)
    picks = np.random.default_rng(0).integers(10, size=(50, 10))
    rows = [np.concatenate([np.flatnonzero(groups == "abcdefghij"[g]) for g in p]) for p in picks]
    loop = [np.nanmean(average_precisions(scores[r], truth[r])) for r in rows]
    centred = np.array(loop) - np.mean(loop) + mean_average_precision(scores, truth).value
    assert map_interval(scores, truth, groups, draws=50) == pytest.approx(tuple(np.percentile(centred, [2.5, 97.5])))


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


# ---- one word


@pytest.mark.parametrize(
    "a, b, one",
    [("a dog", "a cat", True), ("a dog", "a dog", False), ("a dog", "an owl", False), ("a dog left of a cat", "a dog above a cat", False),
     ("two dogs", "three dogs", True), ("a", "a b", False)],
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
    from kklip_nb.evidence.text_probe import COLOURS, COUNTS, NOUNS, PLACES, PLURALS, RELATIONS, SIZES, TIMES, VERBS

    words = {"noun": {*NOUNS, *PLURALS.values(), *(n + "s" for n in NOUNS)}, "colour": set(COLOURS), "size": set(SIZES),
             "count": set(COUNTS.values()), "verb": set(VERBS)}  # fmt: skip
    words |= {k: {w for t in table for w in t.split()} for k, table in (("relation", RELATIONS), ("place", PLACES), ("time", TIMES))}
    for pair in found:
        a, b = (scene_caption(s).split() for s in (pair.first, pair.second))
        assert len(a) == len(b)
        differ = [(x, y) for x, y in zip(a, b) if x != y]
        assert len(differ) == 1 and set(differ[0]) <= words[pair.change]
        assert (draw_scene(pair.first, 64) != draw_scene(pair.second, 64)).any()


def test_pairs_are_the_same_for_the_same_seed(scenes):
    assert one_word_pairs(scenes, 3, seed=1) == one_word_pairs(scenes, 3, seed=1) != one_word_pairs(scenes, 3, seed=2)


def test_neither_side_of_a_pair_is_the_usual_one(scenes):
    found = one_word_pairs(scenes, 40, seed=0)
    colours = [p for p in found if p.change == "colour"]
    drawn_from = {scene_caption(s) for s in scenes}
    first = np.mean([scene_caption(p.first) in drawn_from for p in colours])
    second = np.mean([scene_caption(p.second) in drawn_from for p in colours])
    assert abs(first - second) < 0.4


def test_changes_are_complete_for_a_scene_by_hand():
    scene = Scene("x", (Thing("dog", 1, "red"), Thing("cat", 1, "big")), "left of")
    captions = lambda change: {scene_caption(s) for s in changed_scenes(scene, change)}
    assert captions("relation") == {"a red dog right of a big cat"}
    assert captions("size") == {"a red dog left of a small cat"}
    assert captions("colour") == {f"a {c} dog left of a big cat" for c in ("yellow", "green", "blue", "purple")}  # an orange dog: two words
    assert captions("count") == captions("verb") == captions("place") == captions("time") == set()
    assert "a red bird left of a big cat" in captions("noun") and "a red cat left of a big cat" not in captions("noun")
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


@pytest.mark.parametrize("s, said", [(np.ones((2, 2)), r"\(2, 2\)"), (np.ones((3, 2, 3)), r"\(3, 2, 3\)"), (np.full((1, 2, 2), NAN), "NaN")])
def test_winoground_refuses_what_is_no_pair(s, said):
    with pytest.raises(ValueError, match=said):
        winoground(s)


def test_similarities_are_caption_by_image(rng):
    images, texts = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    got = pair_similarities(torch.from_numpy(images), texts)
    for n, c, i in itertools.product(range(3), range(2), range(2)):
        assert got[n, c, i] == pytest.approx(cosine(texts[2 * n + c], images[2 * n + i]))
    for a, b in ((images[:5], texts[:5]), (images, texts[:4])):
        with pytest.raises(ValueError, match="two rows a pair"):
            pair_similarities(a, b)


def test_score_pairs_encodes_both_scenes(monkeypatch, pairs):
    import kklip_nb.evidence.attributes as module

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


# ---- material


def test_material_without_a_teacher_holds_word_counts():
    some = make_scenes(20, seed=0)
    m = scene_material(some, size=32)
    assert m.pairs.captions == [scene_caption(s) for s in some] and m.pairs.images.shape == (20, 32, 32, 3)
    counts = [len(c.split()) for c in m.pairs.captions]
    np.testing.assert_array_equal(m.embeddings.sum(1), counts)
    assert m.word_embeddings.shape[1] == m.embeddings.shape[1] and len(m.words) == len(m.word_embeddings)


def test_material_with_a_teacher_is_checked(rng):
    some, x = make_scenes(5, seed=0), rng.normal(size=(5, 8)).astype(np.float32)
    m = scene_material(some, x, size=16)
    assert np.array_equal(m.embeddings, x) and m.word_embeddings.shape[1] == 8
    with pytest.raises(ValueError, match="4 embeddings for 5"):
        scene_material(some, x[:4], size=16)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scene_has_a_truth(kind):
    from random import Random

    from kklip_nb.evidence.text_probe import random_scene

    a = scene_attributes([random_scene(kind, Random(s)) for s in range(5)])
    assert a.values.shape == (5, len(a.names)) and (np.nansum(a.values, axis=1) >= 1).all()


def test_scenes_train_plain_clip_for_a_step(tmp_path, monkeypatch):
    from kklip_nb.training import LAPTOP, run_recipe

    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    some = make_scenes(12, seed=0)
    recipe = dataclasses.replace(LAPTOP, alpha=0.0, beta=0.0, words=0, word_batch=0, word_table=False, epochs=1, batch_size=8, k=3, imagenet=False)
    run = run_recipe(recipe, scene_material(some), np.arange(12))
    assert len(run.history) == 1 and run.image_features.shape == (12, 128)
