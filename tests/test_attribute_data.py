"""AWA2 and CUB in their official layouts, whole and damaged, and features of files."""

import numpy as np
import pytest
import torch
from PIL import Image

from kklip_nb.evidence.attribute_data import file_features, image_attributes, load_awa2, load_cub, phrase

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
        ("train_test_split.txt", "1 0\n2 1\n3 2\n", "line 3: '2'; expected a whole number from 0 to 1"),
        ("image_class_labels.txt", "1 0\n2 1\n3 2\n", "line 1: '0'; expected a whole number from 1 to 2"),
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
    import kklip_nb.evidence.attribute_data as module

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


# ---- files that are damaged, and files that other programs wrote


def test_a_byte_order_mark_is_no_part_of_a_name(awa2, cub):
    wanted = [load(folder).attributes for load, folder in ((load_awa2, awa2), (load_cub, cub))]
    for file in [*awa2.rglob("*.txt"), *cub.parent.rglob("*.txt")]: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for load, folder, values in ((load_awa2, awa2, wanted[0]), (load_cub, cub, wanted[1])): np.testing.assert_array_equal(load(folder).attributes, values)


AWA2_FILES = ["classes.txt", "predicates.txt", "predicate-matrix-binary.txt", "predicate-matrix-continuous.txt", "trainclasses.txt", "testclasses.txt"]
CUB_FILES = ["images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt", "attributes/certainties.txt", "attributes/image_attribute_labels.txt", "../attributes.txt"]


@pytest.mark.parametrize("name", AWA2_FILES + CUB_FILES)
def test_a_file_in_another_encoding_and_a_folder_in_its_place_are_named(name, request):
    load, folder = (load_awa2, request.getfixturevalue("awa2")) if name in AWA2_FILES and name != "classes.txt" else (load_cub, request.getfixturevalue("cub"))
    file, last = folder / name, name.split("/")[-1]
    file.write_bytes(file.read_text(encoding="utf-8").encode("utf-16"))
    with pytest.raises(ValueError, match=f"{last}.*(UTF-8|line 1)"): load(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(FileNotFoundError, match=last): load(folder)


@pytest.mark.parametrize("name, text, said", [
    ("classes.txt", "1 zebra\n2 fox\n3 cow\n4 zebra\n", "classes.txt, line 4: 'zebra' a second time"), ("predicates.txt", "1 black\n2 black\n3 swims\n", "predicates.txt, line 2: 'black' a second time"),
])  # fmt: skip
def test_awa2_names_may_not_repeat(awa2, name, text, said):
    write(awa2 / name, text)
    with pytest.raises(ValueError, match=said): load_awa2(awa2)


@pytest.mark.parametrize("name", ["images.txt", "classes.txt", "../attributes.txt"])
def test_cub_names_may_not_repeat(cub, name):
    first, *others = (cub / name).read_text().splitlines()
    write(cub / name, "\n".join([first, f"2 {first[2:]}", *others[1:]]) + "\n")
    with pytest.raises(ValueError, match=rf"{name.split('/')[-1]}, line 2: .* a second time"): load_cub(cub)


def test_features_of_files_can_be_learned_on_and_take_any_list(tmp_path, pixel_student):
    picture(tmp_path / "a.png", (10, 20, 30), (8, 8))
    x = file_features(pixel_student.train(), iter([tmp_path / "a.png"]), 8)
    weights = torch.ones(3, requires_grad=True)
    (x @ weights).sum().backward()
    assert weights.grad.tolist() == [10, 20, 30] and not pixel_student.training
    with pytest.raises(ValueError, match="batch_size=0"): file_features(pixel_student, [tmp_path / "a.png"], 8, batch_size=0)


def test_images_of_a_class_come_in_the_order_of_their_names(awa2):
    folder = awa2 / "JPEGImages" / "zebra"
    for file in folder.iterdir(): file.unlink()
    for i in np.random.default_rng(0).permutation(12): picture(folder / f"zebra_{10001 + i}.jpg")
    assert [p.name for p in load_awa2(awa2).images if p.parent == folder] == [f"zebra_{10001 + i}.jpg" for i in range(12)]


def test_attribute_names_come_from_the_nearest_place(cub):
    names = {cub.parent: "parent", cub: "data", cub / "attributes": "attributes"}
    for folder, name in names.items():  # each nearer than the one before
        write(folder / "attributes.txt", f"1 {name}_a\n2 {name}_b\n")
        assert load_cub(cub).attribute_names == [f"{name}_a", f"{name}_b"]


@pytest.mark.parametrize("number", ["inf", "-0.5", "nan", "-1e9"])
def test_strengths_are_finite_and_not_negative(awa2, number):
    write(awa2 / "predicate-matrix-continuous.txt", f"0 0 0\n1 {number} 0\n1 0 1\n1 1 0\n")
    with pytest.raises(ValueError, match="predicate-matrix-continuous.txt holds .*expected numbers from 0, or -1"): load_awa2(awa2)


@pytest.mark.parametrize("name, words", [("001.Bird_has_3.5_toes", "Bird has 3.5 toes"), ("has_wings", "wings"), ("has_a::b::c", "b::c a"), ("12", "12"), ("a\u00a0b", "a b")])
def test_only_the_head_of_a_name_is_cut(name, words):
    assert phrase(name) == words


class Recorder(torch.nn.Module):
    "Notes what comes in, and in which mode."

    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.modes = torch.nn.Parameter(torch.ones(1)), [], []

    def encode_image(self, x):
        self.seen.append(tuple(x.shape))
        self.modes.append(self.training)
        return self.weight * x.mean((2, 3))


def test_files_are_fitted_prepared_and_encoded_in_evaluation_mode(tmp_path, monkeypatch):
    import kklip_nb.evidence.attribute_data as module

    picture(tmp_path / "a.png", (200, 100, 0), (8, 8))
    monkeypatch.setattr(module, "prepare_images", lambda student, images: torch.from_numpy(images).permute(0, 3, 1, 2) / 100 - 1)
    student = Recorder().train()
    assert file_features(student, [tmp_path / "a.png"], 16).tolist() == [pytest.approx([1, 0, -1])] and student.seen == [(1, 3, 16, 16)]
    monkeypatch.setattr(module, "read_image", lambda file, size: np.full((size, size, 3), file, np.uint8))
    x = file_features(student, range(65))
    assert student.seen[1:] == [(64, 3, 224, 224), (1, 3, 224, 224)] and student.modes == [False] * 3
    assert not x.requires_grad and x[:, 1].tolist() == pytest.approx([i / 100 - 1 for i in range(65)], abs=1e-5)
