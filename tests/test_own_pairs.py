"""Picture files of any kind, folders with a table, and data sets of the hub."""

import colorsys
import csv
import io
import json
import unicodedata
from types import MappingProxyType

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
    for number in range(8):
        width, height, size = (int(n) for n in rng.integers(1, (500, 500, 200)))
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


GREY, ALPHA = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5), np.array([0, 255, 40, 128, 200] * 5, np.uint8).reshape(5, 5)
COLOUR = np.stack([GREY, GREY.T[::-1], np.roll(GREY, 7)], -1)


def over_white(values, alpha):
    return values * (alpha[..., None] / 255.0) + 255 - alpha[..., None]


def of_mode(mode):
    "A picture of a mode, and what it shows, by textbook formulas."
    grey, third = np.repeat(GREY[..., None], 3, 2).astype(float), np.dstack([COLOUR, ALPHA])
    if mode == "1": return Image.fromarray(GREY > 90), np.where(grey > 90, 255, 0)
    if mode in ("L", "RGB"): return Image.fromarray(dict(L=GREY, RGB=COLOUR)[mode]), dict(L=grey, RGB=COLOUR)[mode]
    if mode in ("LA", "La"): return Image.fromarray(np.dstack([GREY, ALPHA]), "LA").convert(mode), over_white(grey, ALPHA)
    if mode in ("RGBA", "RGBa"): return Image.fromarray(third, "RGBA").convert(mode), over_white(COLOUR, ALPHA)
    if mode == "RGBX": return Image.fromarray(third, "RGBX"), COLOUR
    if mode == "CMYK": return Image.fromarray(third, "CMYK"), (255 - COLOUR.astype(float)) * (255 - ALPHA[..., None].astype(float)) / 255
    if mode == "YCbCr":
        y, b, r = (COLOUR[..., i].astype(float) - 128 * (i > 0) for i in range(3))
        return Image.fromarray(COLOUR, "YCbCr"), np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1).clip(0, 255)
    if mode == "HSV": return Image.fromarray(COLOUR, "HSV"), np.array([[[255 * c for c in colorsys.hsv_to_rgb(*(pixel / 255))] for pixel in row] for row in COLOUR.astype(float)])
    if mode in ("P", "PA"):
        picture = Image.fromarray(GREY // 10, "P")
        picture.putpalette((table := np.arange(768, dtype=np.uint8)[::-1].reshape(256, 3)).tobytes())
        shown = table[GREY // 10].astype(float)
        if mode == "P": return picture, shown
        picture = picture.convert("PA")
        picture.putalpha(Image.fromarray(ALPHA))
        return picture, over_white(shown, ALPHA)
    deep = GREY.astype(np.uint16) * 257
    if mode == "I": return Image.fromarray(deep.astype(np.int32)), grey
    if mode == "F": return Image.fromarray(GREY.astype(np.float32) / np.float32(255)), grey
    return Image.frombytes(mode, (5, 5), deep.astype(dict(B=">u2").get(mode[-1], "<u2")).tobytes()), grey


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "P", "PA", "I;16", "I;16L", "I;16B", "I", "F"])
def test_each_pixel_of_each_mode_is_what_the_formulas_say(mode):
    picture, shown = of_mode(mode)
    tolerance = {"La": 4, "RGBa": 4, "YCbCr": 1.5, "HSV": 2.5}.get(mode, 1)  # La: whole numbers times alpha
    np.testing.assert_allclose(np.asarray(decode_image(picture), float), shown, atol=tolerance)
    assert picture.mode == mode


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I", "F", "I;16", "P", "CMYK"])
@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(mode, size):
    for read in (decode_image, lambda x: read_image(x, 8)):
        with pytest.raises(ValueError, match="no pixels"): read(Image.new(mode, size))


@pytest.mark.parametrize("size", [0, -3, "8", None])
def test_a_size_that_cannot_be_is_named(size):
    for act in (lambda: read_image(red(4, 4), size), lambda: load_dataset_pairs([dict(image=red(4, 4), caption="x")], size=size)):
        with pytest.raises(ValueError, match=f"^size={size!r}; expected a whole number"): act()
    assert read_image(red(4, 4), np.int64(2)).shape == (2, 2, 3)


@pytest.mark.parametrize("error", [RuntimeError("no item"), TypeError("odd"), IndexError("range"), KeyError("tag"), EOFError(), ZeroDivisionError("by zero"), NotImplementedError("mode")])
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path, monkeypatch):
    red(4, 4).save(tmp_path / "x.png")
    def fails(file): raise error
    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(ValueError, match="x.png as an image.*remove or replace"): decode_image(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.png", "", "\ud800.png", "https://example.org/a.png"])
def test_a_name_that_can_be_no_file_is_no_image(name):
    with pytest.raises(FileNotFoundError, match="no image"): decode_image(name)


@pytest.mark.parametrize("size, want", [((1, 1), (0, 16, 0, 16)), ((1, 2), (0, 16, 4, 12)), ((2, 1), (4, 12, 0, 16)), ((1, 50_000), (0, 16, 7, 8)), ((50_000, 1), (7, 8, 0, 16)), ((3, 1), (5, 10, 0, 16))])
def test_small_and_narrow_pictures_lie_where_they_should(size, want):
    top, bottom, left, right = want
    expected = np.full((16, 16, 3), 255, np.uint8)
    expected[top:bottom, left:right] = (255, 0, 0)
    np.testing.assert_array_equal(read_image(red(*size), 16), expected)


def test_a_narrow_picture_keeps_its_order_and_its_mean():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, 2)  # 256 high, 1 wide
    column = read_image(Image.fromarray(ramp), 16)[:, 7, 0].astype(float)
    np.testing.assert_allclose(column, np.arange(256).reshape(16, 16).mean(1), atol=3)


@pytest.mark.parametrize("note, turned", [(1, lambda x: x), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (4, np.flipud), (5, lambda x: x.transpose(1, 0, 2)),
                                          (6, lambda x: np.rot90(x, -1)), (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)), (8, np.rot90), (0, lambda x: x), (9, lambda x: x)])
def test_each_of_the_eight_notes_turns_the_picture(note, turned, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = note
    Image.fromarray(COLOUR[:, :3]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / "a.png")), turned(COLOUR[:, :3]))


def test_of_an_animation_the_first_picture_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for kind in ("gif", "png", "webp", "tif"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **(dict(lossless=True) if kind == "webp" else {}))
        assert decode_image(tmp_path / f"a.{kind}").getpixel((1, 1)) == (255, 0, 0)


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
        ('{"image": "a.png", "caption": "fine"}\n\n{broken', "t.jsonl, line 3.*one JSON object a line"),
        ('[\n{"image": "a.png", "caption": "fine"}]', "t.jsonl, line 1.*one JSON object a line"),
        ("[" * 100_000, "t.jsonl, line 1.*one JSON object a line"),
        ('{"image": "a.png", "caption": "x", "caption": "y"}', "t.jsonl, line 1: a name stands there twice"),
        ('{"image": "a.png", "caption": "half \\ud800"}', "row 0 has no caption that can be read"),
        ('{"image": "a.png", "caption": "\\u200b\\u00a0"}', "row 0 has no caption that can be read"),
        ('{"image": "a.png", "caption": NaN}', "row 0 has no caption that can be read"),
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


@pytest.mark.parametrize("text, said", [
    ("image,caption\na.png,fine\nc.png,\"one\nc.png,two\n", "captions.csv, line 4: unexpected end"), ("image,caption\na.png,fine\nc.png,\"one\" two\n", "captions.csv, line 3: .*expected after"),
    ("image,caption,caption\na.png,one,two\n", "captions.csv, line 1: two columns of one name"), ("caption,image,image\none,a.png,c.png\n", "two columns of one name"),
    ("image,caption\na.png," + "x" * 200_000 + "\n", "captions.csv, line 2: field larger"), ("image;caption\na.png;fine\n", "no column 'image'.*image;caption"),
    ("image,caption\na.png,fi\0ne\n", "captions.csv holds NUL"), ("\n\n", "no captions: .*captions.csv")])
def test_a_csv_that_is_damaged_is_named_with_its_line(folder, text, said):
    (folder / "captions.csv").write_text(text, newline="")
    with pytest.raises(ValueError, match=f"(?s){said}"): load_folder(folder, size=4)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_table_in_another_encoding_is_named(folder, encoding, name):
    accent = "é" if encoding == "latin-1" else ""
    text = f"image,caption\na.png,fine{accent}\n" if name == "t.csv" else f'{{"image": "a.png", "caption": "fine{accent}"}}\n'
    (folder / name).write_text(text, encoding=encoding)
    with pytest.raises(ValueError, match=f"{name}.*expected UTF-8"): load_folder(folder, name, size=4)


@pytest.mark.parametrize("text, captions", [
    ("image,caption\ra.png,one\rc.png,two\r", ["one", "two"]), ("\n\nimage,caption\n\na.png,one\n\nc.png,two", ["one", "two"]), (",image,,caption\n0,a.png,x,5\" pizza\n", ['5" pizza']), (" ,image, ,caption\n0,a.png,x,fine\n", ["fine"]),
    ('image,caption\r\na.png,"two\r\nlines, ""quoted"""\r\n', ['two\r\nlines, "quoted"']), ("\ufeffimage,caption\na.png,{x} $y_1$ <b>\n", ["{x} $y_1$ <b>"]), ("caption,image\nfine,a.png\n", ["fine"])])
def test_csv_as_others_write_it_is_read(folder, text, captions):
    (folder / "captions.csv").write_text(text, encoding="utf-8", newline="")
    assert load_folder(folder, size=4).captions == captions


def test_the_columns_asked_for_are_read_and_no_others(folder):
    rows = [dict(image="gone.png", caption="wrong", file=name, text=text) for name, text in (("a.png", "first"), ("c.png", "second"))]
    write_jsonl(folder / "t.jsonl", rows)
    write_csv(folder / "captions.csv", rows, columns=rows[0])
    held = [{**r, "file": Image.open(folder / r["file"])} for r in rows]
    for pairs in (load_folder(folder, "t.jsonl", "file", "text", 4), load_folder(folder, image_column="file", caption_column="text", size=4), load_dataset_pairs(held, "file", "text", 4)):
        assert pairs.captions == pairs.bases == ["first", "second"]
        np.testing.assert_array_equal(pairs.images, [read_image(folder / name, 4) for name in ("a.png", "c.png")])


def test_sizes_not_given_are_those_of_the_course(folder):
    write_csv(folder / "captions.csv", ROWS)
    held = [dict(r, image=str(folder / r["image"])) for r in ROWS]
    for pairs in (load_folder(folder), load_dataset_pairs(held)): assert pairs.images.shape == (3, 128, 128, 3)


@pytest.mark.parametrize("on_disk, in_table", [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
def test_a_file_name_may_be_written_in_two_ways(folder, on_disk, in_table):
    red(4, 4).save(folder / unicodedata.normalize(on_disk, "crème brûlée.png"))
    write_csv(folder / "captions.csv", [(unicodedata.normalize(in_table, "crème brûlée.png"), "x")])
    assert load_folder(folder, size=2).images[0, 0, 0].tolist() == [255, 0, 0]


def test_of_two_files_that_read_the_same_the_table_s_own_is_read(folder):
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    red(4, 4).save(folder / names[0])
    Image.new("RGB", (4, 4), (0, 255, 0)).save(folder / names[1])
    if len({p.name for p in folder.glob("*.png")} & {*names}) < 2: pytest.skip("this disk joins them")
    write_csv(folder / "captions.csv", [(name, "x") for name in names])
    assert load_folder(folder, size=2).images[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0]]


def test_the_row_of_a_picture_that_cannot_be_read_is_named(folder):
    (folder / "bad.png").write_bytes(b"no picture")
    for name, kind in (("bad.png", ValueError), ("gone.png", FileNotFoundError), ("x" * 3000, FileNotFoundError)):
        write_csv(folder / "captions.csv", [("a.png", "x"), (name, "y")])
        with pytest.raises(kind, match=f"^row 1: .*{name}"): load_folder(folder, size=4)
    for picture in (None, np.zeros((4, 4, 3), np.uint8), dict(bytes=b"", path=None)):
        with pytest.raises(ValueError, match="^row 1: expected an image file"): load_dataset_pairs([dict(image=red(4, 4), caption="x"), dict(image=picture, caption="y")], size=4)


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
    (folder / "captions.csv").mkdir()
    for table in ("captions.csv", "x" * 3000 + ".csv"):
        with pytest.raises(FileNotFoundError, match="no table"): load_folder(folder, table)
    (folder / "captions.csv").rmdir()
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
    check_pairs(load_dataset_pairs(plain.with_format("numpy"), size=8), folder)
    renamed = plain.rename_columns(dict(image="jpg", caption="text")).add_column("caption", ["wrong"] * 3).add_column("image", ["wrong"] * 3)
    check_pairs(load_dataset_pairs(renamed, "jpg", "text", 8), folder)
    assert {type(c) for c in load_dataset_pairs(plain.with_format("numpy"), size=8).captions} == {str}


def test_a_pandas_table_and_rows_of_other_kinds(folder):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame([dict(r, image=str(folder / r["image"])) for r in ROWS], index=[7, 8, 9])
    check_pairs(load_dataset_pairs(table, size=8), folder)
    check_pairs(load_dataset_pairs(tuple(MappingProxyType(r) for r in table.to_dict("records")), size=8), folder)
    with pytest.raises(ValueError, match="row 1 has no caption"): load_dataset_pairs(table.assign(caption=["x", None, "y"]), size=8)
    with pytest.raises(ValueError, match="no column 'caption'"): load_dataset_pairs(table[["image"]], size=8)
    for wrong in (dict(image=[red(2, 2)], caption=["x"]), "beans"):
        with pytest.raises(ValueError, match="row 0.*expected columns with names"): load_dataset_pairs(wrong)
    for stream in (None, iter([])):
        with pytest.raises(ValueError, match="a stream has no length"): load_dataset_pairs(stream)


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


def test_a_float_picture_may_go_a_little_beyond_white_and_a_damaged_note_is_ignored():
    grey = np.zeros((8, 8), np.float32)
    grey[:, 4:] = 1.004
    assert read_image(Image.fromarray(grey), 8)[0, :, 0].tolist() == [0] * 4 + [255] * 4
    Image.new("RGB", (8, 8), (200, 10, 30)).save(file := io.BytesIO(), "PNG", exif=b"junkjunk")
    assert (read_image(file.getvalue(), 8) == (200, 10, 30)).all()
