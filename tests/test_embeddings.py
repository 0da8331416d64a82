"""Sidecars of embeddings: what is in them, who makes which, and what damaged or hostile input does."""

import errno
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from shard_files import (D, HOW, Files, edit, embed, is_skipped, members, pairs, picture, png_of, rewrite,
                         spoil, tar_bytes)

from kklip_nb import tools
from kklip_nb.scale import embeddings
from kklip_nb.scale.embeddings import embed_shard, embed_shards, open_sidecar, open_sidecars, read_rows, slices_of
from kklip_nb.scale.shards import list_shards, open_picture, read_shard, run_lock, shard_name, write_shards


def test_sidecars_hold_the_teachers_rows_in_shard_order(built):
    for url, sidecar in zip(list_shards(built / "shards"), open_sidecars(built / "side", list_shards(built / "shards"))):
        captions = [s["txt"].decode() for s in read_shard(url)]
        np.testing.assert_array_equal(read_rows(sidecar), embed(captions).astype(np.float16).astype(np.float32))
        assert sidecar.keys == [s["__key__"] for s in read_shard(url)] and sidecar.shard == shard_name(url)
        assert json.loads(sidecar.meta["crc32"]) == [zlib.crc32(c.encode()) for c in captions] and json.loads(sidecar.meta["skipped"]) == {}
        assert sidecar.meta["captions"] == hashlib.sha256(json.dumps(captions, ensure_ascii=False).encode()).hexdigest()
        assert HOW.items() <= {**sidecar.meta, "layer": int(sidecar.meta["layer"])}.items()
        np.testing.assert_array_equal(read_rows(sidecar, 2, 5), read_rows(sidecar)[2:5])


def test_equal_captions_are_counted_and_have_equal_rows(built):
    sidecar = open_sidecar(built / "side" / "00001.safetensors")
    rows = read_rows(sidecar)
    assert len(set(json.loads(sidecar.meta["folded"]))) == 7 and sidecar.shape == (8, D) and np.array_equal(rows[2], rows[3])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_workers_share_the_shards_without_overlap(files, tmp_path, world_size):
    found = []
    for rank in range(world_size):
        folder = tmp_path / f"rank{rank}"
        count = embed_shards(files.urls, folder, embed, rank, world_size, **HOW)
        found.append({p.stem for p in folder.glob("*.safetensors")})
        assert count["shards"] == len(found[-1])
    assert sum(map(len, found)) == 3 and set.union(*found) == {"00000", "00001", "00002"}


def test_finished_sidecars_are_not_made_again(files):
    calls = []
    def counted(captions): calls.append(len(captions)); return embed(captions)
    assert embed_shards(files.urls, files.side, counted, **HOW) == dict(shards=0, captions=0, skipped=0) and not calls
    before = (files.side / "00002.safetensors").read_bytes()
    (files.side / "00002.safetensors").unlink()
    (files.side / ".00002.safetensors.77.part").write_bytes(b"left by a killed run")
    assert embed_shards(files.urls, files.side, counted, **HOW) == dict(shards=1, captions=6, skipped=0) and calls == [6]
    assert (files.side / "00002.safetensors").read_bytes() == before and not list(files.side.glob(".*.part"))


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 50])
def test_slices_cover_every_shard_and_cross_none(built, rows):
    for sidecar in open_sidecars(built / "side", list_shards(built / "shards")):
        parts = list(slices_of(sidecar, rows))
        assert max(map(len, parts)) <= rows and max(map(len, parts)) - min(map(len, parts)) <= 1
        np.testing.assert_array_equal(np.concatenate(parts), read_rows(sidecar))


def test_damage_broken_picture(files):
    data = dict(members(files.urls[1]))["000010002.jpg"]
    spoil(files, "jpg", data[:-200])
    is_skipped(files, "the picture is broken")


def test_damage_picture_of_noise(files):
    spoil(files, "jpg", bytes(range(256)))
    is_skipped(files, "no JPEG, PNG or WebP picture")


def test_damage_empty_picture(files):
    spoil(files, "jpg", b"")
    is_skipped(files, "no JPEG, PNG or WebP picture")


def test_damage_missing_picture(files):
    spoil(files, "jpg", None)
    is_skipped(files, "there is no picture")


def test_hostile_picture_of_60000_by_60000(files):
    spoil(files, "jpg", png_of(60_000, 60_000))
    is_skipped(files, "DecompressionBombError")


def test_hostile_picture_just_over_the_limit(files):
    spoil(files, "jpg", png_of(8000, 6251))
    is_skipped(files, "8000 x 6251 pixels; at most 50,000,000")
    assert open_picture(png_of(8000, 6250)).size == (8000, 6250)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_hostile_other_format_called_jpg(files, kind):
    spoil(files, "jpg", picture(kind))
    is_skipped(files, "no JPEG, PNG or WebP picture")


def test_damage_empty_caption(files):
    spoil(files, "json", None)
    spoil(files, "txt", b" \n\t")
    is_skipped(files, "the caption is empty or missing")


def test_damage_caption_not_utf8(files):
    spoil(files, "json", None)
    spoil(files, "txt", "Käse".encode("latin-1"))
    is_skipped(files, "the caption is no UTF-8 text")


def test_damage_missing_caption(files):
    rewrite(files.urls[1], lambda m: None if m[0] in ("000010002.txt", "000010002.json") else m)
    is_skipped(files, "the caption is empty or missing")


def test_damage_caption_in_json_alone_is_used(files, tmp_path):
    spoil(files, "txt", None)
    assert embed_shards(files.urls, tmp_path / "s", embed, **HOW)["skipped"] == 0
    assert (tmp_path / "s" / "00001.safetensors").read_bytes() == (files.side / "00001.safetensors").read_bytes()


@pytest.mark.parametrize("text, reason", [(b"[1, 2]", "the json no object"), (b"{", "the json no object"), (b"\xff\xfe", "the json no object"),
                                          (b'{"caption": 7}', "the caption is 7; expected text"), (b'{"caption": ["a"]}', "is \\['a'\\]; expected text"), (b'{"caption": null}', "empty or missing"), (b"{}", "empty or missing")])
def test_damage_json_without_a_caption(files, text, reason):
    spoil(files, "txt", None)
    spoil(files, "json", text)
    is_skipped(files, reason)


def test_hostile_json_of_100_000_brackets(files):
    spoil(files, "txt", None)
    spoil(files, "json", b"[" * 100_000)
    is_skipped(files, "")


def test_hostile_json_with_half_a_surrogate(files):
    spoil(files, "txt", None)
    spoil(files, "json", b'{"caption": "half \\ud800"}')
    is_skipped(files, "UTF-8")


def test_hostile_name_of_half_a_letter(files, tmp_path, capsys):
    "A key that is no Unicode text is embedded, joined and skipped like any other."
    content = [(name.replace("000010002", "0000\udce42"), data) for name, data in members(files.urls[1])]
    Path(files.urls[1]).write_bytes(tar_bytes(content))
    embed_shards(files.urls[1:2], tmp_path / "s", embed, **HOW)
    assert open_sidecar(tmp_path / "s" / "00001.safetensors").keys[2] == "0000\udce42"
    Path(files.urls[1]).write_bytes(tar_bytes([(n, b"" if "\udce4" in n and not n.endswith("jpg") else d) for n, d in content]))
    assert embed_shards(files.urls[1:2], tmp_path / "t", embed, max_skipped=0.2, **HOW)["skipped"] == 1


def test_damage_no_usable_sample(files):
    rewrite(files.urls[1], lambda m: None if m[0].endswith("jpg") else m)
    with pytest.raises(ValueError, match="00001.tar: 8 of 8 samples are unusable"): embed_shard(files.urls[1], files.side / "x.safetensors", embed, 1.0, **HOW)
    assert not (files.side / "x.safetensors").exists()


def test_damage_shard_without_samples(files):
    Path(files.urls[1]).write_bytes(tar_bytes([("readme", b"no ending, no sample")]))
    with pytest.raises(ValueError, match="00001.tar holds no samples; expected members"): embed_shard(files.urls[1], files.side / "x.safetensors", embed, **HOW)


@pytest.mark.parametrize("kind", ["list", "rows", "float64", "float16", "columns first", "tensor", "gradient", "bfloat16", "list of tensors", "whole numbers", "pandas", "read-only"])
def test_what_a_teacher_may_return(files, tmp_path, kind):
    pandas = pytest.importorskip("pandas") if kind == "pandas" else None
    def given(captions):
        rows = embed(captions)
        if kind == "bfloat16": return torch.tensor(rows).bfloat16()
        if kind == "whole numbers": return (100 * rows).astype(np.int32)
        if kind == "read-only": rows.setflags(write=False)
        return dict(list=rows.tolist(), rows=list(rows), float64=rows.astype(float), float16=rows.astype(np.float16), tensor=torch.tensor(rows), gradient=torch.tensor(rows, requires_grad=True),
                    pandas=pandas and pandas.DataFrame(rows)).get(kind, [*torch.tensor(rows)] if kind == "list of tensors" else np.asfortranarray(rows) if kind == "columns first" else rows)
    embed_shard(files.urls[1], tmp_path / "00001.safetensors", given, **HOW)
    rows = embed([s["txt"].decode() for s in read_shard(files.urls[1])])
    if kind == "bfloat16": rows = (rows.view(np.uint32) + 0x7fff + ((rows.view(np.uint32) >> 16) & 1) & 0xffff0000).view(np.float32)  # rounded to even
    if kind == "whole numbers": rows = np.trunc(100 * rows)
    np.testing.assert_array_equal(load_file(tmp_path / "00001.safetensors")["embeddings"], rows.astype(np.float16))
    assert open_sidecar(tmp_path / "00001.safetensors").shape == (8, D)


@pytest.mark.parametrize("given, match", [
    (lambda c: embed(c)[:, 0], r"shape \(8,\); expected \(n, d\)"), (lambda c: embed(c)[..., None], r"shape \(8, 6, 1\)"), (lambda c: embed(c)[:, :0], r"shape \(8, 0\)"), (lambda c: None, "dtype object"),
    (lambda c: list(c), "expected numbers"), (lambda c: 1j * embed(c), "complex"), (lambda c: [[1.0], [1.0, 2.0]] * 4, "rows of one length"), (lambda c: 1e6 * embed(c), "65504"),
    (lambda c: embed(c[1:]), "7 embeddings for 8 captions"), (lambda c: embed([*c, "more"]), "9 embeddings for 8 captions")])
def test_damage_what_a_teacher_may_not_return(files, tmp_path, given, match):
    with pytest.raises(ValueError, match=f"00001.tar: .*{match}"): embed_shard(files.urls[1], tmp_path / "00001.safetensors", given, **HOW)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("bad, total, limit, fits", [(1, 8, 0.125, True), (1, 8, 0.1249, False), (0, 8, 0, True), (1, 8, 0, False), (8, 8, 1, False), (29, 100, 0.29, True), (57, 100, 0.57, True), (58, 100, 0.57, False)])
def test_the_limit_of_skipped_samples_is_a_share_of_all_and_may_be_reached(tmp_path, bad, total, limit, fits):
    "0.29 * 100 is less than 29 in floating point."
    content = [(f"{i:03d}.{ending}", data) for i in range(total) for ending, data in (("jpg", b"" if i < bad else picture()), ("txt", f"{i}".encode()))]
    (tmp_path / "0.tar").write_bytes(tar_bytes(content))
    if fits: assert embed_shard(tmp_path / "0.tar", tmp_path / "0.safetensors", embed, limit, **HOW)[0] == total - bad
    else:
        with pytest.raises(ValueError, match=f"{bad} of {total} samples are unusable, more than the share {limit}"): embed_shard(tmp_path / "0.tar", tmp_path / "0.safetensors", embed, limit, **HOW)


@pytest.mark.parametrize("limit", [-0.1, 1.1, 10, float("nan")])
def test_damage_limit_that_is_no_share(files, tmp_path, limit):
    with pytest.raises(ValueError, match=f"max_skipped={limit}; expected 0 to 1"): embed_shards(files.urls, tmp_path / "s", embed, max_skipped=limit, **HOW)


def test_one_share_of_a_hundred_may_be_skipped_unless_told_otherwise():
    for function in (embed_shard, embed_shards): assert inspect.signature(function).parameters["max_skipped"].default == 0.01


def test_shards_may_come_one_by_one_but_not_twice(files, tmp_path):
    assert embed_shards((u for u in files.urls), tmp_path / "s", embed, **HOW)["shards"] == 3
    assert [s.shard for s in open_sidecars(tmp_path / "s", iter(files.urls))] == ["00000", "00001", "00002"]
    assert [s.shard for s in open_sidecars(tmp_path / "s", ["00002", "00000.tar", Path("x/00001.tar")])] == ["00002", "00000", "00001"]
    assert [s.shard for s in open_sidecars(tmp_path / "s", files.urls[1])] == ["00001"]
    for act in (lambda urls: embed_shards(urls, tmp_path / "t", embed, **HOW), lambda urls: open_sidecars(tmp_path / "s", urls)):
        with pytest.raises(ValueError, match="no shards: expected at least one"): act([])
        with pytest.raises(ValueError, match="2 shards are called 00000"): act([files.urls[0], "elsewhere/00000.tar"])


def test_damage_no_folder_of_sidecars(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere of embeddings; embed"): open_sidecars(tmp_path / "nowhere", files.urls)


@pytest.mark.parametrize("entry", ["teacher", "pooling", "layer", "prompt"])
def test_a_finished_sidecar_must_agree_in_every_setting(files, entry):
    "Also where this run does not say what the other has used."
    for other in (HOW | {entry: "other"}, {k: v for k, v in HOW.items() if k != entry}):
        with pytest.raises(ValueError, match=f"00000.safetensors was made otherwise.*'{entry}'"): embed_shards(files.urls, files.side, embed, **other)
    edit(files.side / "00002.safetensors", **{entry: "other"})
    with pytest.raises(ValueError, match=f"00002.safetensors was made otherwise.*'{entry}'"): files.sidecars()
    assert open_sidecar(files.side / "00000.safetensors").provenance() == {k: str(v) for k, v in HOW.items()} | dict(width=str(D))


def test_checksums_of_captions_that_read_the_same_are_the_same(tmp_path):
    "Each as it was written, for the join; folded, for the batches."
    alike = ["Café x²", "cafe\u0301  X2", "CAFÉ\u00a0x²", "ｃａｆé x\u200b2", "café x2\0"]
    write_shards([(pairs(1)[0][0], c) for c in [*alike, "cafe x2"]], tmp_path, size=8)
    embed_shard(tmp_path / "00000.tar", tmp_path / "00000.safetensors", embed, **HOW)
    meta = open_sidecar(tmp_path / "00000.safetensors").meta
    assert json.loads(meta["crc32"]) == [zlib.crc32(c.encode()) for c in [*alike, "cafe x2"]]
    assert json.loads(meta["folded"]) == [zlib.crc32("café x2".encode())] * 5 + [zlib.crc32(b"cafe x2")]


def test_skipped_samples_enter_nothing(files, tmp_path):
    "What is skipped is not embedded, and the sidecar is that of a shard without it."
    seen = []
    def noting(captions): seen.extend(captions); return embed(captions)
    spoil(files, "jpg", b"junk")
    embed_shard(files.urls[1], tmp_path / "00001.safetensors", noting, 0.2, **HOW)
    assert "caption 10 ä" in seen and len(seen) == 7  # number 11 is the same caption
    rewrite(files.urls[1], lambda m: None if m[0].startswith("000010002") else m)
    embed_shard(files.urls[1], tmp_path / "without" / "00001.safetensors", embed, **HOW)
    one, two = (open_sidecar(tmp_path / f"{name}00001.safetensors") for name in ("", "without/"))
    assert one.keys == two.keys and {k: v for k, v in one.meta.items() if k != "skipped"} == {k: v for k, v in two.meta.items() if k != "skipped"}
    np.testing.assert_array_equal(read_rows(one), read_rows(two))


def test_damage_nan_from_the_teacher(files, tmp_path):
    with pytest.raises(ValueError, match="NaN"): embed_shards(files.urls, tmp_path / "s", lambda c: embed(c) * [np.nan] + [1.0] * D, **HOW)
    assert not list((tmp_path / "s").glob("*.safetensors"))


def test_damage_teacher_gives_too_few_rows(files, tmp_path):
    with pytest.raises(ValueError, match="7 embeddings for 8 captions"): embed_shards(files.urls, tmp_path / "s", lambda c: embed(c)[1:], **HOW)
    assert not list((tmp_path / "s").glob("*.safetensors"))


def test_damage_sidecar_of_another_teacher(files):
    (files.side / "00001.safetensors").unlink()
    embed_shard(files.urls[1], files.side / "00001.safetensors", embed, **{**HOW, "teacher": "other"})
    with pytest.raises(ValueError, match="00001.safetensors was made otherwise.*'teacher': .'other', 'fake'"): files.sidecars()
    with pytest.raises(ValueError, match="00001.safetensors was made otherwise.*teacher"): embed_shards(files.urls, files.side, embed, **HOW)


def test_damage_sidecar_of_another_pooling(files):
    with pytest.raises(ValueError, match=r"00000.safetensors was made otherwise.*'pooling': \('mean', 'last'\)"):
        embed_shards(files.urls, files.side, embed, **{**HOW, "pooling": "last"})
    edit(files.side / "00002.safetensors", pooling="last")
    with pytest.raises(ValueError, match="00002.safetensors was made otherwise.*'pooling': .'last', 'mean'"): files.sidecars()


def test_damage_sidecar_of_another_width(files):
    path = files.side / "00001.safetensors"
    edit(path, dict(embeddings=load_file(path)["embeddings"][:, :4].copy()))
    with pytest.raises(ValueError, match="00001.safetensors was made otherwise.*'width': .'4', '6'"): files.sidecars()


def test_damage_sidecar_renamed(files):
    shutil.copy(files.side / "00000.safetensors", files.side / "00001.safetensors")
    for act in (files.sidecars, files.join, lambda: embed_shards(files.urls, files.side, embed, **HOW)):
        with pytest.raises(ValueError, match="00001.safetensors was made otherwise.*'shard': .'00000', '00001'"): act()


@pytest.mark.parametrize("keep", [0, 5, 200, -3])
def test_damage_truncated_sidecar(files, keep):
    path = files.side / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for act in (files.sidecars, lambda: embed_shards(files.urls, files.side, embed, **HOW)):
        with pytest.raises(ValueError, match="00001.safetensors is no sidecar.*delete it"): act()


def test_damage_sidecar_cut_while_it_is_read(files):
    sidecar, path = open_sidecar(files.side / "00001.safetensors"), files.side / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="00001.safetensors.*embed shard 00001 again"): read_rows(sidecar)


@pytest.mark.parametrize("change, match", [
    (dict(folded=None), "lacks .'folded'.: it is of another version"), (dict(crc32=None, keys=None), "lacks .'crc32', 'keys'."), (dict(keys='["a"]'), "1 keys for 8 rows"), (dict(crc32="[1, 2]"), "2 crc32 for 8 rows"),
    (dict(keys=json.dumps([*range(8)])), "'keys' is no list of str"), (dict(keys=json.dumps(["a"] * 8)), "a key occurs twice"), (dict(crc32=json.dumps(["1"] * 8)), "'crc32' is no list of int"),
    (dict(folded=json.dumps([None] * 8)), "'folded' is no list of int"), (dict(folded=json.dumps([1.5] * 8)), "'folded' is no list of int"), (dict(folded="[" * 100_000), ""), (dict(skipped="[]"), "'skipped' is no object")])
def test_damage_header_says_what_does_not_fit(files, change, match):
    edit(files.side / "00001.safetensors", **change)
    for act in (files.sidecars, lambda: embed_shards(files.urls, files.side, embed, **HOW)):
        with pytest.raises(ValueError, match=f"00001.safetensors is no sidecar of embeddings .*{match}.*delete it and embed again"): act()


@pytest.mark.parametrize("change, match", [
    (lambda r: r[:, 0].copy(), r"F16 of shape \[8\]"), (lambda r: r[..., None].copy(), r"F16 of shape \[8, 6, 1\]"), (lambda r: r[:, :0].copy(), r"shape \[8, 0\]"), (lambda r: r[:7].copy(), "8 keys for 7 rows"),
    (lambda r: r.astype(np.uint8), "it holds U8"), (lambda r: r.astype(np.int64), "it holds I64")])
def test_damage_tensor_of_another_shape_or_kind(files, change, match):
    path = files.side / "00001.safetensors"
    edit(path, dict(embeddings=change(load_file(path)["embeddings"])))
    with pytest.raises(ValueError, match=f"00001.safetensors is no sidecar .*{match}"): files.sidecars()


def test_damage_tensor_of_another_name(files):
    path = files.side / "00001.safetensors"
    edit(path, dict(vectors=load_file(path)["embeddings"]))
    with pytest.raises(ValueError, match="00001.safetensors is no sidecar .*embeddings"): files.sidecars()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rows_of_wider_floats_are_read(files, kind):
    path = files.side / "00001.safetensors"
    rows = load_file(path)["embeddings"].astype(kind) / 3
    edit(path, dict(embeddings=rows))
    np.testing.assert_array_equal(read_rows(open_sidecar(path)), rows.astype(np.float32))


def test_damage_a_folder_or_no_permission(files, monkeypatch):
    "Neither is a reason to delete a file."
    path = files.side / "00001.safetensors"
    sidecar = open_sidecar(path)
    with monkeypatch.context() as patch:
        def denied(*_, **__): raise PermissionError(errno.EACCES, "Permission denied", str(path))
        patch.setattr("builtins.open", denied)
        for act in (lambda: open_sidecar(path), lambda: read_rows(sidecar)):
            with pytest.raises(ValueError, match="cannot read .*00001.safetensors.*Permission denied") as caught: act()
            assert "delete" not in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="cannot read .*00001.safetensors: .*directory"): files.sidecars()


@pytest.mark.parametrize("start, stop", [(-1, None), (9, None), (0, 9), (5, 4), (3, -1)])
def test_damage_rows_that_are_not_there(built, start, stop):
    with pytest.raises(ValueError, match="rows .* of .*00001.safetensors, which has 8"): read_rows(open_sidecar(built / "side" / "00001.safetensors"), start, stop)


def test_damage_sidecar_made_again_with_other_rows_while_it_is_read(files):
    path = files.side / "00001.safetensors"
    sidecar = open_sidecar(path)
    shutil.copy(files.side / "00002.safetensors", path)
    with pytest.raises(ValueError, match="cannot read .*00001.safetensors .it has changed since"): read_rows(sidecar)


def test_damage_slices_of_no_row(built):
    with pytest.raises(ValueError, match="rows=0; expected at least 1"): next(slices_of(open_sidecar(built / "side" / "00001.safetensors"), 0))


def test_damage_sidecar_missing(files):
    (files.side / "00001.safetensors").unlink()
    for act in (files.sidecars, files.join):
        with pytest.raises(FileNotFoundError, match="shard 00001 has no embeddings.*embed it"): act()


@pytest.mark.parametrize("entry", ["keys", "skipped", "crc32", "folded", "captions"])
def test_damage_header_entry_missing(files, entry):
    edit(files.side / "00001.safetensors", **{entry: None})
    with pytest.raises(ValueError, match="00001"): files.join()


@pytest.mark.parametrize("entry, value", [("keys", "{}"), ("keys", "7"), ("keys", "[[1], [2], [3], [4], [5], [6], [7], [8]]"),
                                          ("skipped", "7"), ("skipped", "{"), ("crc32", "7"), ("folded", "[1]")])
def test_hostile_header_entry_of_another_kind(files, entry, value):
    edit(files.side / "00001.safetensors", **{entry: value})
    with pytest.raises(ValueError, match="00001"): files.join()


def write_fails(files: Files, tmp_path: Path, monkeypatch, error: OSError) -> None:
    "The second sidecar's write fails half way: the first stays, nothing half-made stays, and another run finishes."
    calls, real = [], tools.save_file
    def failing(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2: Path(path).write_bytes(b"half"); raise error
        real(tensors, path, metadata=metadata)
    monkeypatch.setattr(tools, "save_file", failing)
    with pytest.raises(type(error), match=re.escape(error.strerror)): embed_shards(files.urls, tmp_path / "s", embed, **HOW)
    assert sorted(p.name for p in (tmp_path / "s").iterdir() if not p.name.endswith(".lock")) == ["00000.safetensors"]
    assert embed_shards(files.urls, tmp_path / "s", embed, **HOW)["shards"] == 2
    for path in files.side.glob("*.safetensors"): assert (tmp_path / "s" / path.name).read_bytes() == path.read_bytes()


def test_damage_full_disk(files, tmp_path, monkeypatch):
    write_fails(files, tmp_path, monkeypatch, OSError(errno.ENOSPC, "No space left on device"))


def test_damage_read_only_folder(files, tmp_path, monkeypatch):
    write_fails(files, tmp_path, monkeypatch, PermissionError(errno.EACCES, "Permission denied"))


def test_damage_two_runs_in_one_folder(files, tmp_path):
    "The second run is told so, at once; other ranks are not disturbed."
    with run_lock(tmp_path / "s" / ".embed-0-of-2.lock"):
        with pytest.raises(RuntimeError, match="another run is writing here.*embed-0-of-2"): embed_shards(files.urls, tmp_path / "s", embed, 0, 2, **HOW)
        assert embed_shards(files.urls, tmp_path / "s", embed, 1, 2, **HOW)["shards"] == 1
    assert embed_shards(files.urls, tmp_path / "s", embed, 0, 2, **HOW)["shards"] == 2


def test_damage_two_runs_that_share_the_shards_otherwise(files, tmp_path, monkeypatch):
    "Four workers and one would both make a shard."
    waits = []
    monkeypatch.setattr(embeddings, "run_lock", lambda path, wait=0: waits.append(wait) or run_lock(path))
    with run_lock(tmp_path / "s" / ".embed-3-of-4.lock"):
        with pytest.raises(RuntimeError, match="another run is writing here.*embed-3-of-4"): embed_shards(files.urls, tmp_path / "s", embed, **HOW)
        assert embed_shards(files.urls, tmp_path / "s", embed, 0, 4, **HOW)["shards"] == 1
    assert embed_shards(files.urls, tmp_path / "s", embed, **HOW)["shards"] == 2 and max(waits) == 10  # it may be about to end


def test_damage_lock_of_a_killed_run_is_free(files, tmp_path):
    lock = tmp_path / "s" / ".embed-0-of-1.lock"
    head = "import sys, time, filelock\nfrom collections.abc import Iterator\nfrom contextlib import contextmanager\nfrom pathlib import Path\n"
    code = head + inspect.getsource(run_lock) + "\nwith run_lock(sys.argv[1]): print('held', flush=True); time.sleep(120)"  # without torch, which takes long to load
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another run is writing here"): embed_shards(files.urls, tmp_path / "s", embed, **HOW)
    finally: holder.kill(); holder.wait(); holder.stdout.close()
    assert lock.exists() and embed_shards(files.urls, tmp_path / "s", embed, **HOW)["shards"] == 3


def test_damage_an_error_frees_the_lock(files, tmp_path):
    def dying(captions): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): embed_shards(files.urls, tmp_path / "s", dying, **HOW)
    assert embed_shards(files.urls, tmp_path / "s", embed, **HOW)["shards"] == 3


@pytest.mark.parametrize("rank, size", [(2, 2), (-1, 2), (0, 0)])
def test_damage_rank_out_of_range(files, tmp_path, rank, size):
    with pytest.raises(ValueError, match="rank=.* of world_size="): embed_shards(files.urls, tmp_path / "s", embed, rank, size, **HOW)
