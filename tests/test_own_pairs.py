"""Picture files of any kind, folders with a table, and data sets of the hub."""

import csv
import io
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageOps

from kklip_nb.data import Pairs, split_by_base
from kklip_nb.own_pairs import decode_image, load_dataset_pairs, load_folder, read_image


# ---- images


def red(width, height, mode="RGB"):
    return Image.new("RGB", (width, height), (255, 0, 0)).convert(mode)


@pytest.mark.parametrize("width, height", [(64, 32), (32, 64), (64, 64), (1000, 10), (10, 1000), (8, 4), (3, 3)])
def test_a_picture_keeps_its_shape_and_is_padded_with_white(width, height):
    picture = read_image(red(width, height), 16)
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
    coloured = picture[..., 1] < 128
    rows, columns = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
    scale = 16 / max(width, height)  # the longer side is fitted
    assert len(columns) == pytest.approx(max(1, width * scale), abs=1) and len(rows) == pytest.approx(
        max(1, height * scale), abs=1
    )
    assert (picture[~coloured] >= 128).all() and np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns)
    assert abs((rows[0]) - (15 - rows[-1])) <= 1 and abs(columns[0] - (15 - columns[-1])) <= 1  # in the middle
    white = np.ones_like(coloured)
    white[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = False
    assert (picture[white] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_colour_modes_come_out_the_same(mode):
    np.testing.assert_allclose(read_image(red(16, 16, mode), 16), np.broadcast_to((255, 0, 0), (16, 16, 3)), atol=4)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (8, 8), 100),
        Image.new("LA", (8, 8), (100, 255)),
        Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
    ],
    ids=["L", "LA", "16 bit"],
)
def test_grey_pictures_stay_grey(image):
    np.testing.assert_allclose(read_image(image, 8), 100, atol=1)


def naive_read_image(source, size):
    "read_image as it was first written, by way of RGBA."
    image = ImageOps.exif_transpose(source if isinstance(source, Image.Image) else Image.open(source)).convert("RGBA")
    scale = size / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC, reducing_gap=2.0)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square.convert("RGB"))


@pytest.mark.parametrize("kind", ["array", "JPEG", "JPEG on its side", "PNG", "grey JPEG", "CMYK"])
def test_no_pixel_of_an_opaque_picture_has_changed(kind, rng, tmp_path):
    for number in range(12):
        width, height, size = (int(n) for n in rng.integers(1, (700, 700, 260)))
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if kind == "CMYK": picture = picture.convert("CMYK")
        if kind == "grey JPEG": picture = picture.convert("L")
        if kind != "array":
            exif = Image.Exif()
            if "side" in kind: exif[0x0112] = 1 + number % 8
            source = tmp_path / ("x.png" if kind == "PNG" else "x.jpg")
            picture.save(source, exif=exif)
        else: source = picture
        np.testing.assert_array_equal(read_image(source, size), naive_read_image(source, size))
        if kind != "array": np.testing.assert_array_equal(read_image(source.read_bytes(), size), read_image(source, size))


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.int32([[0, 200, 255]]), [0, 200, 255]),
        (np.int32([[0, 256, 65535]]), [0, 1, 255]),
        (np.uint16([[0, 257, 65535]]), [0, 1, 255]),
        (np.float32([[0, 0.5, 1]]), [0, 128, 255]),
        (np.arange(256, dtype=np.float32)[None] / 255, range(256)),
        (np.arange(256, dtype=np.float32)[None], range(256)),
        (np.int32([[0, 0, 0]]), [0, 0, 0]),
    ],
)
def test_grey_of_many_bits_keeps_its_scale(values, expected, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    for source in (Image.fromarray(values), tmp_path / "a.tif", (tmp_path / "a.tif").read_bytes()):
        image = decode_image(source)
        assert image.mode == "RGB"
        for channel in range(3): assert np.asarray(image)[0, :, channel].tolist() == list(expected)


@pytest.mark.parametrize(
    "values", [np.int32([[0, 100_000]]), np.int32([[-5, 60_000]]), np.int32([[-1, 0]]), np.float32([[-0.1, 1]]), np.float32([[0, 256]]), np.float32([[0, np.nan]]), np.float32([[0, np.inf]])]
)
def test_grey_without_a_known_scale_is_refused(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif.*expected 0 to"): decode_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B", "I", "F"])
def test_every_mode_of_pillow_is_right_or_refused(mode):
    grey, values = Image.new("L", (4, 4), 0), {"I;16": 65535, "I;16B": 65535, "I": 255, "F": 255.0}
    grey.paste(255, (2, 0, 4, 4))
    if mode in values:
        picture = Image.new(mode, (4, 4), 0)
        picture.paste(values[mode], (2, 0, 4, 4))
    else: picture = grey.convert("RGBA").convert("RGBa") if mode == "RGBa" else grey.convert("RGB").convert(mode)
    np.testing.assert_allclose(np.asarray(decode_image(picture))[0, :, 1].astype(int), [0, 0, 255, 255], atol=2)
    assert picture.mode == mode


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "P", "LA", "RGBA"])
def test_every_kind_of_transparency_becomes_white(mode, tmp_path):
    picture = Image.new(mode, (4, 4), {"LA": (0, 0), "RGBA": (0, 0, 0, 0)}.get(mode, 0))
    key = {"L": 0, "P": 0, "I;16": 0, "RGB": (0, 0, 0)}
    picture.save(tmp_path / "a.png", **(dict(transparency=key[mode]) if mode in key else {}))
    assert (np.asarray(decode_image(tmp_path / "a.png")) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.asarray(decode_image(half))[0, 0, 0] == pytest.approx(127, abs=1)


def test_broken_bytes_are_refused_by_their_number():
    with pytest.raises(ValueError, match="3 bytes"): decode_image(b"abc")
    file = io.BytesIO()
    red(64, 64).save(file, "JPEG")
    with pytest.raises(ValueError, match="300 bytes"): decode_image(file.getvalue()[:300])


def test_what_is_transparent_becomes_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (read_image(clear, 8) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png")
    assert (read_image(tmp_path / "palette.png", 8) == 255).all()


def test_a_photo_taken_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to show
    red(64, 32).save(tmp_path / "photo.jpg", exif=exif)
    assert (read_image(tmp_path / "photo.jpg", 16)[0, 8, 1] < 128) and (
        read_image(tmp_path / "photo.jpg", 16)[8, 0] == 255
    ).all()


def test_a_picture_of_the_right_size_comes_back_as_it_is(rng):
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_image(Image.fromarray(picture), 32), picture)


def test_reading_leaves_the_picture_alone():
    for mode in ("RGB", "RGBA"):
        image = red(64, 32, mode)
        read_image(image, 16)
        assert image.size == (64, 32) and image.mode == mode


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_an_unreadable_image_is_named(content, tmp_path):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match="bad.png"):
        read_image(tmp_path / "bad.png", 8)


def test_a_truncated_a_missing_and_no_image_are_refused(tmp_path, rng):
    Image.fromarray(rng.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.png"):
        read_image(tmp_path / "cut.png", 8)
    with pytest.raises(ValueError):
        read_image(Image.open(tmp_path / "cut.png"), 8)  # opened, but not yet read
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_image(tmp_path / "gone.png", 8)
    with pytest.raises(ValueError):
        read_image(None, 8)


# ---- a folder of one's own


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "mine"
    (home / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "sub/b.jpg", "c.png")):
        Image.new("RGB", (20, 10), (80 * i, 0, 0)).save(home / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    return home


ROWS = [
    dict(image="a.png", caption="A red, “quoted” fox"),
    dict(image="sub/b.jpg", caption="Crème brûlée"),
    dict(image="c.png", caption="a  Red Bus"),
]


def write_csv(file, rows, encoding="utf-8", columns=("image", "caption")):
    with open(file, "w", newline="", encoding=encoding) as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        writer.writerows([r.values() if isinstance(r, dict) else r for r in rows])


def write_jsonl(file, rows):
    file.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8")


def check_pairs(pairs, folder, size=8):
    assert isinstance(pairs, Pairs) and pairs.images.shape == (3, size, size, 3) and pairs.images.dtype == np.uint8
    assert pairs.captions == [r["caption"] for r in ROWS] and len(pairs.bases) == 3
    assert list(pairs.categories) == list(pairs.subcategories) == [None] * 3
    for picture, row in zip(pairs.images, ROWS):
        np.testing.assert_array_equal(picture, read_image(folder / row["image"], size))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_folder_with_a_csv(folder, encoding):
    write_csv(folder / "captions.csv", ROWS, encoding)
    check_pairs(load_folder(folder, size=8), folder)
    check_pairs(load_folder(str(folder), size=8), folder)


def test_a_folder_with_jsonl_and_columns_of_other_names(folder):
    write_jsonl(folder / "t.jsonl", ROWS)
    check_pairs(load_folder(folder, "t.jsonl", size=8), folder)
    write_jsonl(folder / "u.jsonl", [dict(file=r["image"], text=r["caption"], n=1) for r in ROWS])
    check_pairs(load_folder(folder, "u.jsonl", image_column="file", caption_column="text", size=8), folder)


def test_captions_that_differ_in_case_and_blanks_share_a_base_concept(folder):
    write_jsonl(
        folder / "t.jsonl", [dict(image="a.png", caption=c) for c in ("A Red bus", "a red  bus ", "a blue bus")]
    )
    bases = load_folder(folder, "t.jsonl", size=8).bases
    assert bases[0] == bases[1] != bases[2]


@pytest.mark.parametrize(
    "rows, columns, said",
    [
        ([("a.png", "")], ("image", "caption"), "(?i)row 0.*caption"),
        ([("a.png", "fine"), ("c.png", "   ")], ("image", "caption"), "(?i)row 1.*caption"),
        ([("a.png",)], ("image", "caption"), "(?i)caption"),
        ([("", "no image named")], ("image", "caption"), "(?i)image"),
        ([("a.png", "one", "too many")], ("image", "caption"), "captions.csv|too many"),
        ([("a.png", "fine")], ("image", "text"), "(?s)'caption'.*text"),
        ([("a.png", "fine")], ("picture", "caption"), "(?s)'image'.*picture"),
        ([], ("image", "caption"), "(?i)no captions"),
        ([("sub", "a folder")], ("image", "caption"), "sub"),
        ([("bad.png", "not a picture")], ("image", "caption"), "bad.png"),
    ],
)
def test_bad_rows_of_a_csv_are_named(folder, rows, columns, said):
    (folder / "bad.png").write_bytes(b"no picture")
    write_csv(folder / "captions.csv", rows, columns=columns)
    with pytest.raises(ValueError, match=said):
        load_folder(folder, size=8)


@pytest.mark.parametrize(
    "lines, said",
    [
        ('{"image": "a.png", "caption": "fine"}\n{broken', "t.jsonl"),
        ('{"image": "a.png", "caption": null}', "(?i)caption"),
        ('{"image": "a.png", "caption": 7}', "7"),
        ('{"image": null, "caption": "x"}', "(?i)image"),
        ('["a.png", "fine"]', "a.png|t.jsonl"),
        ("3", "3|t.jsonl"),
        ("", "(?i)no captions"),
        ('{"image": "a.png", "caption": "fine"}\n{"image": "a.png"}', "'caption'"),
    ],
)
def test_bad_rows_of_a_jsonl_are_named(folder, lines, said):
    (folder / "t.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=said):
        load_folder(folder, "t.jsonl", size=8)


def test_a_table_that_is_no_text_is_named(folder):
    (folder / "captions.csv").write_bytes("image,caption\na.png,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match="captions.csv"):
        load_folder(folder, size=8)
    (folder / "captions.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="captions.xlsx"):
        load_folder(folder, "captions.xlsx", size=8)


def test_missing_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match="captions.csv"):
        load_folder(folder)
    with pytest.raises(FileNotFoundError):
        load_folder(folder / "nowhere")
    write_csv(folder / "captions.csv", [("gone.png", "x")])
    with pytest.raises(FileNotFoundError, match="gone.png"):
        load_folder(folder)


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "absolute"])
def test_a_row_cannot_lead_out_of_the_folder(folder, name):
    name = str(folder.parent / "secret.png") if name == "absolute" else name
    write_csv(folder / "captions.csv", [(name, "x")])
    with pytest.raises(ValueError, match="secret.png"):
        load_folder(folder)


def test_a_folder_of_two_ways_to_write_does_not_leak(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "i.png")
    captions = [unicodedata.normalize(form, f"crème {i}") for i in range(40) for form in ("NFC", "NFD")]
    write_csv(tmp_path / "captions.csv", [("i.png", c) for c in captions])
    pairs = load_folder(tmp_path, size=4)
    read = [{unicodedata.normalize("NFC", pairs.captions[i]) for i in part} for part in split_by_base(pairs.bases)]
    assert not read[0] & read[1] and not read[0] & read[2] and sum(map(len, read)) == 40


# ---- Hugging Face datasets


def test_a_list_of_dicts_will_do(folder):
    check_pairs(load_dataset_pairs([dict(r, image=str(folder / r["image"])) for r in ROWS], size=8), folder)
    check_pairs(
        load_dataset_pairs(
            [dict(text=r["caption"], jpg=Image.open(folder / r["image"])) for r in ROWS], "jpg", "text", 8
        ),
        folder,
    )


def test_a_hugging_face_dataset(folder):
    datasets = pytest.importorskip("datasets")
    columns = dict(image=[str(folder / r["image"]) for r in ROWS], caption=[r["caption"] for r in ROWS])
    plain = datasets.Dataset.from_dict(columns)
    check_pairs(load_dataset_pairs(plain, size=8), folder)
    check_pairs(load_dataset_pairs(plain.cast_column("image", datasets.Image()), size=8), folder)
    with pytest.raises(ValueError, match="(?s)'text'.*caption"):
        load_dataset_pairs(plain, caption_column="text")
    with pytest.raises(ValueError, match="train"):
        load_dataset_pairs(datasets.DatasetDict(train=plain))
    with pytest.raises(ValueError, match="take"):
        load_dataset_pairs(plain.to_iterable_dataset())
    with pytest.raises(ValueError, match="no captions"):
        load_dataset_pairs(plain.select([]))


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "(?i)no captions"),
        ([dict(caption="x")], "'image'"),
        ([dict(image=None, caption="x")], "(?i)image|None"),
        ([dict(image=Image.new("RGB", (2, 2)), caption=None)], "(?i)row 0.*caption"),
        ([dict(image=Image.new("RGB", (2, 2)), caption="x"), dict(image=Image.new("RGB", (2, 2)))], "'caption'"),
        ([dict(image=Image.new("RGB", (2, 2)), caption=["x", "y"])], "(?i)caption"),
    ],
)
def test_bad_rows_of_a_dataset_are_named(rows, said):
    with pytest.raises(ValueError, match=said):
        load_dataset_pairs(rows, size=8)
