"""Shards against webdataset and tarfile, and what damaged or hostile input does."""

import errno
import gzip
import http.server
import inspect
import io
import json
import pickle
import re
import shutil
import signal
import struct
import sys
import tarfile
import threading
import tracemalloc
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import HOW, PAIRS, PER, Bomb, Files, embed, header, members, odd_pictures, pairs, picture, tar_bytes

from kklip_nb.own_pairs import decode_image
from kklip_nb.scale import shards
from kklip_nb.scale.embeddings import embed_shard, embed_shards
from kklip_nb.scale.shards import list_shards, name_shards, open_picture, read_shard, remove_parts, shard_name, usable_samples, write_shards


def test_shards_are_what_webdataset_and_tarfile_read(built):
    import webdataset
    urls = list_shards(built / "shards")
    assert [Path(u).name for u in urls] == ["00000.tar", "00001.tar", "00002.tar"]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = [s for url in urls for s in read_shard(url)]
    assert [{k: s[k] for k in ("__key__", "jpg", "txt", "json")} for s in theirs] == [{k: s[k] for k in ("__key__", "jpg", "txt", "json")} for s in ours]
    assert [s["__key__"] for s in ours] == [f"{i // PER:05d}{i % PER:04d}" for i in range(PAIRS)]
    flat = [m for url in urls for m in members(url)]
    assert [n for n, _ in flat] == [f"{s['__key__']}.{e}" for s in ours for e in ("jpg", "json", "txt")]
    for sample, (array, caption) in zip(ours, pairs()):
        assert sample["txt"].decode() == caption
        assert json.loads(sample["json"]) == dict(key=sample["__key__"], caption=caption, width=12, height=12)
        assert sample["jpg"] == picture("JPEG", array, quality=95)


def test_shards_written_twice_are_the_same_bytes(built, tmp_path):
    again = write_shards(pairs(), tmp_path, PER, 12)
    assert [p.read_bytes() for p in again] == [Path(u).read_bytes() for u in list_shards(built / "shards")]


def test_shards_are_written_without_time_and_after_a_killed_run(tmp_path):
    (tmp_path / ".00000.tar.7.part").write_bytes(b"half")
    [path] = write_shards(pairs(2), tmp_path, size=8)
    with tarfile.open(path) as tar: assert {m.mtime for m in tar} == {0}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".shards.lock", "00000.tar"]
    found = {name: p.default for name, p in inspect.signature(write_shards).parameters.items() if p.default is not p.empty}
    assert found == dict(per_shard=1000, size=256, progress=False)


def test_a_deleted_shard_is_written_again_and_no_other(files):
    before = [(Path(u).read_bytes(), Path(u).stat().st_mtime_ns) for u in files.urls]
    Path(files.urls[1]).unlink()
    write_shards(pairs(), Path(files.urls[0]).parent, PER, 12)
    after = [(Path(u).read_bytes(), Path(u).stat().st_mtime_ns) for u in files.urls]
    assert [b for b, _ in after] == [b for b, _ in before]
    assert [a == b for a, b in zip(after, before)] == [True, False, True]


def test_names_of_shards():
    assert shard_name("https://host/a/00003.tar?token=x.y") == "00003" and shard_name("a.b.tar") == "a.b"
    assert list_shards("https://host/{00..02}.tar::x/07.tar") == ["https://host/00.tar", "https://host/01.tar", "https://host/02.tar", "x/07.tar"]
    with pytest.raises(ValueError, match="does not end in .tar"): shard_name("x.tgz")


@pytest.mark.parametrize("name", ["c#", "wh?at", "b{1,2}", "a::b", "x[1]", "100%41", "é", "e\u0301", " a b", "UP.TAR.x"])
def test_names_of_files_are_no_addresses_and_no_patterns(tmp_path, name):
    "A folder, and a file, may be called anything; an address of a file ends where its question begins."
    [path] = write_shards(pairs(2), tmp_path / name, size=8)
    file = path.rename(path.with_name(f"{name}.tar"))
    assert list_shards(tmp_path / name) == list_shards(file) == [str(file)] and shard_name(file) == shard_name(str(file)) == name
    assert [s["txt"].decode() for s in read_shard(file)] == [c for _, c in pairs(2)]
    (tmp_path / f".{name}.tar.7.part").write_bytes(b"of a killed run")
    (tmp_path / f".{name}1.tar.7.part").write_bytes(b"of another file")
    remove_parts(tmp_path / f"{name}.tar")
    assert [p.name for p in tmp_path.glob(".*")] == [f".{name}1.tar.7.part"]


def test_endings_in_capitals_and_hidden_files(tmp_path):
    [path] = write_shards(pairs(2), tmp_path, size=8)
    (tmp_path / "._00000.tar").write_bytes(b"\0\5\x16\7 what macOS leaves beside a file")
    assert list_shards(tmp_path) == [str(path)] and write_shards(pairs(2), tmp_path, size=8) == [path]
    upper = path.rename(tmp_path / "00000.TAR")
    assert list_shards(tmp_path) == [str(upper)] and shard_name(upper) == shard_name("https://host/00000.TAR?x") == "00000"
    with pytest.raises(ValueError, match="holds other shards .00000.TAR."): write_shards(pairs(2), tmp_path, size=8)


def test_shards_and_their_names():
    assert name_shards("x/00.tar") == name_shards(Path("x/00.tar")) == {"x/00.tar": "00"}
    assert [*name_shards(u for u in ("b/1.tar", "a.b", "http://h/0.tar?s=1")).values()] == ["1", "a.b", "0"]
    with pytest.raises(ValueError, match="no shards"): name_shards([])
    for twice in (["a/0.tar", "b/0.tar"], ["0", "0"], ["0", "a/0.TAR"]):
        with pytest.raises(ValueError, match="2 shards are called 0; rename"): name_shards(twice)
    with pytest.raises(ValueError, match=r"http://\[x/0.tar is no URL"): shard_name("http://[x/0.tar")


def test_a_folder_without_shards_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"): list_shards(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no .tar file"): list_shards(tmp_path)


def test_usable_samples_keep_their_order_and_png_and_webp_are_read():
    raw = [dict(__key__=k, txt=k.encode(), **{e: picture(kind)}) for k, e, kind in (("b", "png", "PNG"), ("a", "webp", "WEBP"), ("c", "jpeg", "JPEG"))]
    good, skipped = usable_samples(raw)
    assert [s.key for s in good] == ["b", "a", "c"] and not skipped and good[0].image == raw[0]["png"]


@pytest.mark.parametrize("kind", odd_pictures())
def test_pictures_of_unusual_kinds_go_in_and_come_out_right(tmp_path, kind):
    data, shown = odd_pictures()[kind]
    (tmp_path / "picture").write_bytes(data)
    [path] = write_shards([(tmp_path / "picture", "a"), (data, "b"), (Image.open(tmp_path / "picture"), "c")], tmp_path, size=32)
    good, skipped = usable_samples(read_shard(path))
    assert [s.caption for s in good] == ["a", "b", "c"] and not skipped
    for sample in good:
        squares = np.asarray(decode_image(sample.image), float).reshape(2, 16, 2, 16, 3)[:, 4:12, :, 4:12]
        np.testing.assert_allclose(squares, shown.reshape(2, 16, 2, 16, 3)[:, 4:12, :, 4:12], atol=5)
    [sample], _ = usable_samples([dict(__key__="k", txt=b"as it is", png=data)])
    assert sample.image == data  # nothing is encoded twice


def test_arrays_and_tensors_are_packed_alike(tmp_path):
    array = pairs(1)[0][0]
    kinds = (array, torch.from_numpy(array), np.asfortranarray(array), array[::-1][::-1], torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous().permute(1, 2, 0))
    [path] = write_shards(((a, np.str_("a")) for a in kinds), tmp_path, size=12)
    assert {s["jpg"] for s in read_shard(path)} == {picture("JPEG", array, quality=95)}


@pytest.mark.parametrize("bad, match", [
    (lambda a: (a, None), "caption None"), (lambda a: (a, float("nan")), "caption nan"), (lambda a: (a, b"x"), "caption b'x'"), (lambda a: (a, "\ud800"), "encoded"),
    (lambda a: (a, "x", 1), "is tuple"), (lambda a: a, "is ndarray"), (lambda a: dict(image=a, caption="x"), "is dict"), (lambda a: 7, "is int"),
    (lambda a: (a / 255, "x"), "shape .12, 12, 3., float64; expected .h, w, 3. of uint8"), (lambda a: (a.transpose(2, 0, 1), "x"), "shape .3, 12, 12."),
    (lambda a: (None, "x"), "no picture"), (lambda a: (b"junk", "x"), "cannot read 4 bytes"), (lambda a: ("nowhere.png", "x"), "no image nowhere.png")])
def test_damage_a_pair_that_cannot_be_packed_is_named_by_its_number(tmp_path, bad, match):
    array = pairs(1)[0][0]
    with pytest.raises((ValueError, FileNotFoundError), match=f"^pair 5[ :].*{match}"): write_shards([(array, "a")] * 5 + [bad(array)], tmp_path / "s", 2, 8)
    assert sorted(p.name for p in (tmp_path / "s").glob("*.tar")) == ["00000.tar", "00001.tar"]  # what was whole stays


@pytest.mark.parametrize("size", [0, -1, 65_536])
def test_damage_size_out_of_range(tmp_path, size):
    with pytest.raises(ValueError, match=f"size={size} pixels; expected 1 to 65535"): write_shards(pairs(1), tmp_path, size=size)


def samples_of(path, *names, caption=b"dog") -> tuple[list[str], dict[str, str]]:
    "Keys of the usable samples of a shard with these members, and why the others are not."
    path.write_bytes(tar_bytes([(name, caption if name.lower().endswith("txt") else b'{"caption": "cat"}' if name.lower().endswith("json") else picture()) for name in names]))
    good, skipped = usable_samples(read_shard(path))
    return [s.key for s in good], skipped


@pytest.mark.parametrize("keys", [["photo v1.2", "photo v1.3"], ["a.b", "a.c", "a"], ["www.site.org/x", "www.site.org/y"], ["d.e/f.g", "d.e/f.h"], ["1.5", "1.5.1", "1.5.1.2"],
                                  ["Käse. und Brot", "犬.猫", "e\u0301.x"], [" a b", "a..b", "a.b."], ["x.jpg", "x.txt.y"]])
@pytest.mark.parametrize("endings", ["jpg txt", "JPG TXT", "png json", "WebP txt json"])
def test_dots_and_other_letters_in_keys(tmp_path, keys, endings):
    names = [f"{key}.{ending}" for key in keys for ending in endings.split()]
    assert samples_of(tmp_path / "0.tar", *names) == (keys, {})


def test_members_with_two_endings_stay_with_their_sample_as_in_webdataset(tmp_path):
    import webdataset
    names = [f"000{i}.{ending}" for i in range(3) for ending in ("depth.png", "jpg", "left.jpg", "meta.json", "seg.png", "txt")]
    assert samples_of(tmp_path / "0.tar", *names) == (["0000", "0001", "0002"], {})
    theirs = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
    assert [set(s) for s in theirs] == [set(s) | {"__local_path__"} for s in read_shard(tmp_path / "0.tar")]


def test_a_dot_that_splits_a_pair_is_named(tmp_path):
    good, skipped = samples_of(tmp_path / "0.tar", "photo v1.2.jpg", "other.jpg", "other.txt")
    assert good == ["other"] and "dot" in skipped["photo v1"] and "2.jpg" in skipped["photo v1"]
    good, skipped = samples_of(tmp_path / "0.tar", "photo v1.2.txt", "photo v1.3.txt")
    assert not good and "dot" in skipped["photo v1"] and "2.txt" in skipped["photo v1"]


JPG, PNG = picture(array=np.random.default_rng(1).integers(0, 256, (48, 48, 3), dtype=np.uint8)), picture("PNG")


@pytest.mark.parametrize("content, found", [
    ("x/._a.jpg x/a.jpg x/._a.txt x/a.txt", {"x/a": ("cat", "jpg")}), ("./a.jpg ./a.txt", {"./a": ("cat", "jpg")}), ("__MACOSX/._a.jpg a.jpg a.txt", {"a": ("cat", "jpg")}),
    (".a.jpg .a.txt b.jpg b.txt", {"b": ("cat", "jpg")}), ("a.__v.jpg a.__v.txt", {"a.__v": ("cat", "jpg")}), ("x.__y/a.jpg x.__y/a.txt", {"x.__y/a": ("cat", "jpg")}),
    ("e\u0301.jpg é.txt", {"e\u0301": ("cat", "jpg")}), ("é.b.txt e\u0301.b.jpg", {"é.b": ("cat", "jpg")}),
    ("a.broken.jpg a.png a.txt", {"a": ("cat", "png")}), ("a.jpg a.png a.txt", {"a": ("cat", "jpg")}),
    ("a.jpg=junk a.png a.txt", {"a": ("cat", "png")}), ("a.jpg=cut a.png a.txt", {"a": ("cat", "png")}), ("a.jpg= a.webp= a.png a.txt", {"a": ("cat", "png")}),
    ("a.jpg a.txt= a.json", {"a": ("dog", "jpg")}), ("a.jpg a.txt=junk a.json", {"a": ("dog", "jpg")}), ("a.jpg a.txt a.json=junk", {"a": ("cat", "jpg")})])
def test_hidden_files_accents_and_the_first_member_that_is_any_good(tmp_path, content, found):
    "Written name=what: junk, cut or nothing in place of a good picture or caption."
    def data(name, what):
        if what: return JPG[:-900] if what == ["cut"] else what[0].encode() + b"\xff" * bool(what[0])
        return {"txt": b"cat", "json": b'{"caption": "dog"}', "png": PNG}.get(name.rpartition(".")[2], JPG)
    parts = [part.partition("=") for part in content.split()]
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes([(name, data(name, [what] if mark else [])) for name, mark, what in parts]))
    for whole in (True, False):  # embedding decodes pictures, joining does not: both must choose alike
        good, skipped = usable_samples(read_shard(path), whole)
        assert {s.key: (s.caption, "png" if s.image == PNG else "jpg") for s in good} == found and not skipped


@pytest.mark.parametrize("text, caption", [  # or why not
    (b"\xef\xbb\xbfdog", "dog"), (b"dog\r\n", "dog"), ("\u00a0dog\u3000".encode(), "dog"), ("犬".encode(), "犬"), ("❤️".encode(), "❤️"), (b"dog\0", "dog\0"),
    ("dog".encode("utf-16"), "no UTF-8"), ("a dog".encode("utf-16-le"), "no UTF-8 text but UTF-16"), ("a dog".encode("utf-16-be"), "no UTF-8 text but UTF-16"), ("Käse".encode("latin-1"), "no UTF-8"),
    (b"\xef\xbb\xbf", "is empty"), ("\u200b\u200d\u2060".encode(), "is empty"), ("\u00a0\u3000".encode(), "is empty"), (b"\0\0\0", "is empty")])
def test_captions_in_txt(text, caption):
    good, skipped = usable_samples([dict(__key__="k", jpg=JPG, txt=text)])
    assert [s.caption for s in good] == [caption] and not skipped if good else caption in skipped["k"]


def test_damage_every_member_is_named_that_could_have_helped():
    _, skipped = usable_samples([dict(__key__="k", jpg=b"junk", png=b"", txt=b"", json=b"[]")])
    assert re.search("txt: .*empty.*json: .*no object", skipped["k"])
    _, skipped = usable_samples([dict(__key__="k", jpg=b"junk", png=JPG[:-900], txt=b"x")])
    assert re.search("jpg: no JPEG.*png: the picture is broken .image file is truncated", skipped["k"]) and "object at 0x" not in skipped["k"]


def test_hostile_pictures_that_make_pillow_raise_anything(monkeypatch):
    "Broken EXIF data has raised ZeroDivisionError and struct.error in other projects; such a sample is skipped."
    for error in (ZeroDivisionError, struct.error, KeyError, MemoryError):
        def bad(*_, error=error, **__): raise error("deep inside")
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "getexif", bad)  # viewers show the picture all the same
            good, skipped = usable_samples([dict(__key__="k", jpg=JPG, txt=b"x")])
            assert [s.image for s in good] == [JPG] and not skipped
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", bad)
            with pytest.raises(ValueError, match=f"no JPEG, PNG or WebP picture .{error.__name__}"): open_picture(JPG)


@pytest.mark.parametrize("size, fits", [((100, 1), True), ((1, 100), True), ((101, 1), False), ((3, 301), False)])
def test_a_picture_like_a_hair_is_refused(size, fits):
    "Its shorter side would be made as long as the model's: memory, or a side of no pixel."
    data = picture("PNG", np.zeros((size[1], size[0], 3), np.uint8))
    if fits: assert open_picture(data).size == size
    else:
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels is too narrow"): open_picture(data)


def test_damage_members_that_are_not_side_by_side(tmp_path):
    "What `tar cf x.tar *.jpg *.txt` makes; nothing is twice in it."
    with pytest.raises(ValueError, match=r"0.tar: the members of 'a' are not side by side; .*--sort=name"): samples_of(tmp_path / "0.tar", "a.jpg", "b.jpg", "a.txt", "b.txt")


def test_hidden_files_and_those_without_ending_are_passed_over_as_in_webdataset(tmp_path):
    assert samples_of(tmp_path / "0.tar", "._a.jpg", "._a.txt", "README", "__notes__/x.txt", "a.jpg", "a.txt") == (["a"], {})


@pytest.mark.parametrize("names", [["a.b.jpg", "a.b.JPG", "a.b.txt"], ["a.b.jpg", "a.b.txt", "c.jpg", "c.txt", "a.b.jpg", "a.b.txt"]])
def test_a_dotted_key_twice_is_refused(tmp_path, names):
    with pytest.raises(ValueError, match=r"0.tar.*a\.b"): samples_of(tmp_path / "0.tar", *names)


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset reads URLs through curl")
def test_remote_shards(files, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(Path(files.urls[0]).parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        where = f"http://127.0.0.1:{server.server_port}"
        urls = list_shards(f"{where}/{{00000..00002}}.tar")
        embed_shards(urls, tmp_path / "far", embed, **HOW)
        for name in ("00000", "00001", "00002"):
            assert (tmp_path / "far" / f"{name}.safetensors").read_bytes() == (files.side / f"{name}.safetensors").read_bytes()
        near, far = files.join(), files._replace(urls=urls).join()
        assert near.samples == far.samples and np.array_equal(near.targets, far.targets)
        with pytest.raises(FileNotFoundError, match="cannot read shard http.*00009.tar"): read_shard(f"{where}/00009.tar")
    finally: server.shutdown(); server.server_close()


def refused(files: Files, data: bytes, match: str) -> None:
    "These bytes as shard 1: read_shard, embed_shards and join_shard all name the shard."
    Path(files.urls[1]).write_bytes(data)
    for act in (lambda: read_shard(files.urls[1]), lambda: embed_shard(files.urls[1], files.side / "x.safetensors", embed, **HOW), files.join):
        with pytest.raises(ValueError, match=f"00001.tar.*{match}"): act()


def test_damage_tar_cut_at_a_member_border(files):
    with tarfile.open(files.urls[1]) as tar: offset = tar.getmembers()[9].offset
    refused(files, Path(files.urls[1]).read_bytes()[:offset], "truncated or damaged")


def test_damage_tar_cut_inside_a_member(files):
    with tarfile.open(files.urls[1]) as tar: offset = tar.getmembers()[9].offset_data
    refused(files, Path(files.urls[1]).read_bytes()[:offset + 100], "truncated or damaged|claims more")


def test_damage_tar_cut_inside_a_header(files):
    with tarfile.open(files.urls[1]) as tar: offset = tar.getmembers()[9].offset
    refused(files, Path(files.urls[1]).read_bytes()[:offset + 300], "truncated or damaged")


def test_damage_header_in_the_middle(files):
    with tarfile.open(files.urls[1]) as tar: offset = tar.getmembers()[9].offset
    data = bytearray(Path(files.urls[1]).read_bytes())
    data[offset + 3] ^= 1
    refused(files, bytes(data), f"damaged behind byte {offset}")


def test_damage_first_header(files):
    data = bytearray(Path(files.urls[1]).read_bytes())
    data[3] ^= 1
    refused(files, bytes(data), "")


def test_damage_bytes_behind_the_end(files):
    refused(files, Path(files.urls[1]).read_bytes() + b"\0" * 512 + b"more", "truncated or damaged")


def test_damage_long_name_without_its_member(files):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 10
    refused(files, header(info) + b"x" * 10 + b"\0" * 502 + b"\0" * 1024, "")


def test_damage_empty_file(files):
    refused(files, b"", "no plain tar file but 0 bytes")


@pytest.mark.parametrize("data, found", [(b"<!DOCTYPE html><html>" + b"x" * 900, "921 bytes that begin with b'<!DOCTYPE html>"), (picture("PNG") * 3, ".*PNG")])
def test_damage_no_tar_at_all(files, data, found):
    refused(files, data, f"no plain tar file but {found}")


def test_damage_tar_without_members(files):
    empty = tar_bytes([])
    Path(files.urls[1]).write_bytes(empty)
    assert read_shard(files.urls[1]) == []
    with pytest.raises(ValueError, match="00001.tar holds no samples; expected members"): embed_shard(files.urls[1], files.side / "x.safetensors", embed, **HOW)
    with pytest.raises(ValueError, match="00001"): files.join()


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_folders_long_names_and_headers_of_other_tars(tmp_path, kind):
    key = "pictures/" + "ä" * 40 + "/" + "x" * (40 if kind == tarfile.USTAR_FORMAT else 120)
    with tarfile.open(tmp_path / "0.tar", "w", format=kind, pax_headers={"comment": "by git archive"} if kind == tarfile.PAX_FORMAT else None) as tar:
        folder = tarfile.TarInfo("pictures")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for ending, data in (("jpg", JPG), ("txt", "Käse".encode())):
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size, info.mtime = len(data), 1234.5
            tar.addfile(info, io.BytesIO(data))
    [sample], skipped = usable_samples(read_shard(tmp_path / "0.tar"))
    assert sample == (key, "Käse", JPG) and not skipped


def test_damage_a_folder_or_a_file_in_the_wrong_place(files, tmp_path):
    (tmp_path / "d" / "00000.tar").mkdir(parents=True)
    for act in (lambda: read_shard(list_shards(tmp_path / "d")[0]), lambda: write_shards(pairs(2), tmp_path / "d", size=8)):
        with pytest.raises(ValueError, match="00000.tar is a folder; expected a tar file"): act()
    for folder in (Path(files.urls[0]), Path(files.urls[0]) / "in"):
        with pytest.raises(ValueError, match="is, or lies in, a file; give a folder"): write_shards(pairs(2), folder, size=8)
        with pytest.raises(ValueError, match="is, or lies in, a file; give a folder"): embed_shards(files.urls, folder, embed, **HOW)


def test_damage_no_permission(files, monkeypatch):
    def denied(url): raise PermissionError(errno.EACCES, "Permission denied", url)
    monkeypatch.setattr(sys.modules["webdataset.gopen"], "gopen", denied)
    with pytest.raises(ValueError, match="cannot read shard .*00001.tar: .*Permission denied"): read_shard(files.urls[1])


def test_damage_shard_is_missing(files):
    Path(files.urls[1]).unlink()
    with pytest.raises(FileNotFoundError, match="cannot read shard .*00001.tar"): read_shard(files.urls[1])


def test_hostile_gzip_bomb(files):
    tracemalloc.start()
    refused(files, gzip.compress(tar_bytes([("0.txt", b"\0" * 2**24)])), "no plain tar file")
    assert tracemalloc.get_traced_memory()[0] < 2**24
    tracemalloc.stop()


def test_hostile_tar_that_is_gzip_too(files):
    "The first header is the gzip header's file name; webdataset would unpack what follows."
    bomb = gzip.compress(tar_bytes([("0.txt", b"unpacked"), ("0.jpg", picture())]), mtime=0)[10:]
    info = tarfile.TarInfo("x")
    info.size = len(bomb) + 1
    fill = {f"a_{at}": b"x" * length for at, length in ((10, 90), (157, 100), (265, 64), (345, 167))}
    numbers = {"a_100": b"0000644 ", "a_108": b"0000000 ", "a_116": b"0000000 ", "a_124": b"%011o " % info.size, "a_136": b"00000000000 ", "a_329": b"0000000 ", "a_337": b"0000000 "}
    block = header(info, a_0=b"\x1f\x8b\x08\x08mtimeo", **fill, **numbers, a_257=b"ustar   ")
    data = block + b"\0" + bomb + b"\0" * (-info.size % 512) + b"\0" * 1024
    assert b"\0" not in block and members(Path(shutil.copy(files.urls[0], files.urls[1])))  # the trick is sound
    refused(files, data, "")


def test_hostile_sparse_member_of_10_gb(files):
    info = tarfile.TarInfo("000010000.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    block = header(info, a_386=b"%011o\0%011o\0" % (10 * 2**30 // 2, 512), a_483=b"\x80" + (10 * 2**30).to_bytes(11, "big"))
    refused(files, block + b"x" * 512 + b"\0" * 1024, "'000010000.jpg' claims more")


def test_hostile_member_that_claims_10_gb(files):
    info = tarfile.TarInfo("000010000.jpg")
    info.size = 10 * 2**30
    refused(files, header(info) + b"x" * 512 + b"\0" * 1024, "'000010000.jpg' claims more")


@contextmanager
def alarm(seconds: float):
    "An endless loop becomes an error."
    def ring(*_): raise TimeoutError("endless")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, before)


def test_hostile_member_of_negative_size(files):
    "Python's tarfile goes round in circles (CVE-2025-8194)."
    block = header(tarfile.TarInfo("000010000.jpg"), a_124=tarfile.itn(-512, 12, tarfile.GNU_FORMAT))
    with alarm(0.5): refused(files, tar_bytes([("000010000.txt", b"a")])[:1024] + block + b"\0" * 1024, "")


def test_hostile_shard_beyond_the_memory(files, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 4096)
    with pytest.raises(ValueError, match="00001.tar is larger than"): read_shard(files.urls[1])


def test_hostile_names_write_nothing(files, tmp_path, monkeypatch):
    "Members that climb out, stand at the root or are links: bytes in memory, nothing on disk."
    (tmp_path / "empty" / "cwd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "cwd")
    links = []
    for name, kind, to in (("evil.txt", tarfile.SYMTYPE, "/etc/passwd"), ("hard.txt", tarfile.LNKTYPE, "../up.txt"), ("fifo", tarfile.FIFOTYPE, ""), ("dir", tarfile.DIRTYPE, "")):
        links.append(info := tarfile.TarInfo(name))
        info.type, info.linkname = kind, to
    outside = tmp_path / "empty" / "absolute.txt"
    Path(files.urls[1]).write_bytes(tar_bytes([("../up.txt", b"up"), (str(outside), b"root"), ("../../x/y.jpg", b"y")], *links))
    assert [(s["__key__"], s.get("txt")) for s in read_shard(files.urls[1])] == [("../up", b"up"), (str(outside)[:-4], b"root"), ("../../x/y", None)]
    assert list((tmp_path / "empty").rglob("*")) == [tmp_path / "empty" / "cwd"] and not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="3 of 3 samples are unusable"): embed_shard(files.urls[1], "x.safetensors", embed, **HOW)
    assert list((tmp_path / "empty").rglob("*")) == [tmp_path / "empty" / "cwd"]


def test_hostile_pickles_in_a_shard_are_never_loaded(files, tmp_path):
    payload = pickle.dumps(Bomb(tmp_path / "boom"))
    extra = [(f"000010000.{ending}", payload) for ending in ("pyd", "pickle", "pth", "pkl", "npy", "cls")]
    Path(files.urls[1]).write_bytes(tar_bytes(extra + members(files.urls[1])))
    first = read_shard(files.urls[1])[0]
    assert first["pyd"] == first["pickle"] == first["pth"] == payload and len(files.join().samples) == 8
    assert not (tmp_path / "boom").exists()
    pickle.loads(payload)
    assert (tmp_path / "boom").exists()  # the payload works


def test_hostile_bad_ending_cannot_hide_a_sample(files):
    "webdataset drops samples with a member called __bad__ without a word."
    Path(files.urls[1]).write_bytes(tar_bytes([("000010000.__bad__", b"1"), *members(files.urls[1])]))
    with pytest.raises(ValueError, match="00001"): assert len(read_shard(files.urls[1])) == 8, "a sample has vanished"


@pytest.mark.parametrize("prefix", ["pipe:", "PIPE:", " pipe:"])
def test_hostile_pipe_url_runs_nothing(tmp_path, prefix):
    with pytest.raises((ValueError, FileNotFoundError)): read_shard(f"{prefix}touch {tmp_path}/ran.tar")
    with pytest.raises(ValueError, match="would run a command"): embed_shards([f"pipe:touch {tmp_path}/ran.tar"], tmp_path / "s", embed, **HOW)
    assert not (tmp_path / "ran.tar").exists()


def test_hostile_quotes_in_a_url_run_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot read shard"): read_shard(f"http://127.0.0.1:9/';touch {tmp_path}/ran;'.tar")
    with pytest.raises(FileNotFoundError, match="cannot read shard"): read_shard(f"http://127.0.0.1:9/$(touch {tmp_path}/ran).tar")
    assert not list(tmp_path.iterdir())


def test_hostile_dash_reads_no_terminal():
    with pytest.raises(ValueError, match="read the terminal"): read_shard("-")


def test_damage_key_twice_far_apart(files):
    content = members(files.urls[1])
    refused(files, tar_bytes(content + content[:3]), "key '000010000' twice")


def test_damage_key_twice_side_by_side(files):
    content = members(files.urls[1])
    refused(files, tar_bytes(content[:3] + content), "000010000.*duplicate")


@pytest.mark.parametrize("per_shard", [0, -1, 10_001])
def test_damage_per_shard_out_of_range(tmp_path, per_shard):
    with pytest.raises(ValueError, match=f"per_shard={per_shard}; expected 1 to 10000"): write_shards(pairs(3), tmp_path, per_shard, 8)
    assert not list(tmp_path.iterdir())


def test_damage_folder_of_other_shards(files):
    folder = Path(files.urls[0]).parent
    before = [Path(u).read_bytes() for u in files.urls]
    with pytest.raises(ValueError, match="00000.tar holds other pairs"): write_shards([(i, c + "!") for i, c in pairs()], folder, PER, 12)
    with pytest.raises(ValueError, match="holds other shards .00002.tar."): write_shards(pairs(16), folder, PER, 12)
    with pytest.raises(ValueError, match="00000.tar holds other pairs"): write_shards(pairs(), folder, PER, 13)
    with pytest.raises(ValueError, match="00000.tar holds other pairs"): write_shards(pairs(), folder, PER - 1, 12)
    assert [Path(u).read_bytes() for u in files.urls] == before


def test_damage_no_pairs(tmp_path):
    with pytest.raises(ValueError, match="no pairs"): write_shards([], tmp_path)


def test_damage_picture_that_cannot_be_packed(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises((ValueError, OSError)): write_shards([*pairs(2), (tmp_path / "x.png", "caption")], tmp_path / "s", 10, 8)
    assert {p.name for p in (tmp_path / "s").iterdir()} == {".shards.lock"}


def test_damage_two_shards_of_one_name(tmp_path):
    with pytest.raises(ValueError, match="two shards of .* have the same name"): list_shards(f"{tmp_path}/a/00000.tar::{tmp_path}/b/00000.tar")
