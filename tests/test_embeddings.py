"""Sidecars of embeddings: what is in them, who makes which, and what damaged or hostile input does."""

import errno
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
from safetensors.numpy import load_file
from shard_files import (D, HOW, Files, edit, embed, is_skipped, members, picture, png_of, rewrite,
                         spoil, tar_bytes)

from kklip_nb import tools
from kklip_nb.scale.embeddings import embed_shard, embed_shards, open_sidecar, open_sidecars, read_rows, slices_of
from kklip_nb.scale.shards import list_shards, open_picture, read_shard, run_lock, shard_name


def test_sidecars_hold_the_teachers_rows_in_shard_order(built):
    for url, sidecar in zip(list_shards(built / "shards"), open_sidecars(built / "side", list_shards(built / "shards"))):
        captions = [s["txt"].decode() for s in read_shard(url)]
        np.testing.assert_array_equal(read_rows(sidecar), embed(captions).astype(np.float16).astype(np.float32))
        assert sidecar.keys == [s["__key__"] for s in read_shard(url)] and sidecar.shard == shard_name(url)
        assert json.loads(sidecar.meta["crc32"]) == [zlib.crc32(c.encode()) for c in captions] and json.loads(sidecar.meta["skipped"]) == {}
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
