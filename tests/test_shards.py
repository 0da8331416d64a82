"""Shards, sidecars and streamed concepts against independent references, and what damaged or hostile input does."""

import errno
import gzip
import http.server
import inspect
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.cluster import KMeans, MiniBatchKMeans

from kklip_nb import teacher
from kklip_nb.scale import shards as scaling
from kklip_nb.concepts import soft_labels
from kklip_nb.scale.shards import (cluster_shards, draw_rows, embed_shard, embed_shards, first_centroids, fit_stream,
                              join_shard, list_shards, load_concepts, open_picture, open_sidecar, open_sidecars, read_labels, read_rows, read_shard,
                              run_lock, save_concepts, shard_name, slices_of, update_centroids, usable_samples, write_shards)
from kklip_nb.teacher import file_hash, save_embeddings
from kklip_nb.concepts import Scale, apply_scale, fit_scale

HOW = dict(teacher="fake", pooling="mean", layer=-1, prompt="{}")
D, PER, PAIRS, K, TAU = 6, 8, 22, 3, 0.5


def embed(captions: list[str]) -> np.ndarray:
    "A teacher that knows no language: the caption's checksum seeds its vector."
    return np.stack([np.random.default_rng(zlib.crc32(c.encode())).normal(1, 2, D) for c in captions]).astype(np.float32)


def pairs(n: int = PAIRS, size: int = 12) -> list[tuple[np.ndarray, str]]:
    "Pictures of noise; caption 11 is that of picture 10 once more."
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), f"caption {10 if i == 11 else i} ä") for i in range(n)]


class World(NamedTuple):
    "Three shards (8, 8 and 6 pairs), their sidecars and their labels, in folders that a test may spoil."
    urls: list[str]
    side: Path
    labels: Path

    def join(self, i=1):
        return join_shard(self.urls[i], open_sidecar(self.side / f"{i:05d}.safetensors"), self.labels, load_concepts(self.labels / "concepts.safetensors"))

    def sidecars(self):
        return open_sidecars(self.side, self.urls)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "Made once, with the functions under test."
    home = tmp_path_factory.mktemp("built")
    urls = [str(p) for p in write_shards(pairs(), home / "shards", PER, 12)]
    embed_shards(urls, home / "side", embed, **HOW)
    cluster_shards(open_sidecars(home / "side", urls), home / "labels", K, TAU, passes=2, rows=5, save_every=0)
    return home


@pytest.fixture
def world(built, tmp_path) -> World:
    for name in ("shards", "side", "labels"): shutil.copytree(built / name, tmp_path / name)
    return World(list_shards(tmp_path / "shards"), tmp_path / "side", tmp_path / "labels")


def members(path) -> list[tuple[str, bytes]]:
    with tarfile.open(path, "r:") as tar: return [(m.name, tar.extractfile(m).read()) for m in tar]


def tar_bytes(content: list[tuple[str, bytes]], *others: tarfile.TarInfo) -> bytes:
    "A tar file of these members, and of some without content."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info in others: tar.addfile(info)
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def rewrite(path, change) -> None:
    "Put change(members) in the place of a shard's members; a None drops one."
    Path(path).write_bytes(tar_bytes([m for m in map(change, members(path)) if m]))


def spoil(world: World, ending: str, data: bytes | None, key: str = "000010002") -> None:
    "Replace one member of shard 1, or take it away."
    rewrite(world.urls[1], lambda m: m if m[0] != f"{key}.{ending}" else data if data is None else (m[0], data))


def header(info: tarfile.TarInfo, **fields: bytes) -> bytes:
    "A tar header with fields written over at their offset (a_124=…) and the checksum mended."
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for at, value in fields.items(): block[(start := int(at[2:])):start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%07o " % sum(block)
    return bytes(block)


def edit(path: Path, tensors: dict | None = None, **about: str | None) -> None:
    "Change a safetensors file's values or its header; a None drops an entry."
    with safe_open(path, framework="numpy") as file: found = file.metadata()
    save_file(tensors or load_file(path), path, metadata={k: v for k, v in (found | about).items() if v is not None})


def sidecars_of(folder: Path, rows: np.ndarray, per: int) -> list:
    "Sidecars of given rows, without shards."
    for i, start in enumerate(range(0, len(rows), per)):
        part = rows[start:start + per]
        keys = [f"{i:05d}{j:04d}" for j in range(len(part))]
        save_embeddings(folder / f"{i:05d}.safetensors", part, keys, **HOW, shard=f"{i:05d}", keys=json.dumps(keys), skipped="{}",
                        crc32=json.dumps([zlib.crc32(k.encode()) for k in keys]), distinct=len(part))
    return open_sidecars(folder, [f"{i:05d}" for i in range(-(-len(rows) // per))])


class Bomb:
    "Whoever unpickles this makes a folder."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def picture(kind: str = "JPEG", array: np.ndarray | None = None, **how) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pairs(1)[0][0] if array is None else array).save(buffer, kind, **how)
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    "A PNG of 70 bytes that claims a size."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def is_skipped(world: World, reason: str, key: str = "000010002") -> None:
    "One bad sample: an error over the limit, which names shard, key and reason; a counted skip in the header under it."
    shutil.rmtree(world.side)
    with pytest.raises(ValueError, match=f"00001.tar: 1 of 8 samples are unusable.*{key}.*{reason}"): embed_shards(world.urls, world.side, embed, **HOW)
    assert sorted(p.name for p in world.side.glob("*.safetensors")) == ["00000.safetensors"]  # the shard before it stays done
    assert embed_shards(world.urls, world.side, embed, max_skipped=0.125, **HOW) == dict(shards=2, captions=13, skipped=1)
    sidecar = open_sidecar(world.side / "00001.safetensors")
    assert re.search(reason, json.loads(sidecar.about["skipped"])[key]) and key not in sidecar.keys and len(sidecar.keys) == sidecar.shape[0] == 7
    np.testing.assert_array_equal(read_rows(sidecar)[2], embed(["caption 10 ä"])[0].astype(np.float16))  # rows behind the gap move up


# ---- shards


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


def test_a_deleted_shard_is_written_again_and_no_other(world):
    before = [(Path(u).read_bytes(), Path(u).stat().st_mtime_ns) for u in world.urls]
    Path(world.urls[1]).unlink()
    write_shards(pairs(), Path(world.urls[0]).parent, PER, 12)
    after = [(Path(u).read_bytes(), Path(u).stat().st_mtime_ns) for u in world.urls]
    assert [b for b, _ in after] == [b for b, _ in before]
    assert [a == b for a, b in zip(after, before)] == [True, False, True]


def test_names_of_shards():
    assert shard_name("https://host/a/00003.tar?token=x.y") == "00003" and shard_name("a.b.tar") == "a.b"
    assert list_shards("https://host/{00..02}.tar::x/07.tar") == ["https://host/00.tar", "https://host/01.tar", "https://host/02.tar", "x/07.tar"]
    with pytest.raises(ValueError, match="does not end in .tar"): shard_name("x.tgz")


def test_a_folder_without_shards_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .tar file"): list_shards(tmp_path)


def test_usable_samples_keep_their_order_and_png_and_webp_are_read():
    raw = [dict(__key__=k, txt=k.encode(), **{e: picture(kind)}) for k, e, kind in (("b", "png", "PNG"), ("a", "webp", "WEBP"), ("c", "jpeg", "JPEG"))]
    good, skipped = usable_samples(raw)
    assert [s.key for s in good] == ["b", "a", "c"] and not skipped and good[0].image == raw[0]["png"]


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset reads URLs through curl")
def test_remote_shards(world, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(Path(world.urls[0]).parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        where = f"http://127.0.0.1:{server.server_port}"
        urls = list_shards(f"{where}/{{00000..00002}}.tar")
        embed_shards(urls, tmp_path / "far", embed, **HOW)
        for name in ("00000", "00001", "00002"):
            assert (tmp_path / "far" / f"{name}.safetensors").read_bytes() == (world.side / f"{name}.safetensors").read_bytes()
        near, far = world.join(), world._replace(urls=urls).join()
        assert near.samples == far.samples and np.array_equal(near.targets, far.targets)
        with pytest.raises(FileNotFoundError, match="cannot read shard http.*00009.tar"): read_shard(f"{where}/00009.tar")
    finally: server.shutdown(); server.server_close()


# ---- sidecars


def test_sidecars_hold_the_teachers_rows_in_shard_order(built):
    for url, sidecar in zip(list_shards(built / "shards"), open_sidecars(built / "side", list_shards(built / "shards"))):
        captions = [s["txt"].decode() for s in read_shard(url)]
        np.testing.assert_array_equal(read_rows(sidecar), embed(captions).astype(np.float16).astype(np.float32))
        assert sidecar.keys == [s["__key__"] for s in read_shard(url)] and sidecar.shard == shard_name(url)
        assert json.loads(sidecar.about["crc32"]) == [zlib.crc32(c.encode()) for c in captions] and json.loads(sidecar.about["skipped"]) == {}
        assert HOW.items() <= {**sidecar.about, "layer": int(sidecar.about["layer"])}.items()
        np.testing.assert_array_equal(read_rows(sidecar, 2, 5), read_rows(sidecar)[2:5])


def test_equal_captions_are_counted_and_have_equal_rows(built):
    sidecar = open_sidecar(built / "side" / "00001.safetensors")
    rows = read_rows(sidecar)
    assert sidecar.about["distinct"] == "7" and sidecar.shape == (8, D) and np.array_equal(rows[2], rows[3])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_workers_share_the_shards_without_overlap(world, tmp_path, world_size):
    found = []
    for rank in range(world_size):
        folder = tmp_path / f"rank{rank}"
        count = embed_shards(world.urls, folder, embed, rank, world_size, **HOW)
        found.append({p.stem for p in folder.glob("*.safetensors")})
        assert count["shards"] == len(found[-1])
    assert sum(map(len, found)) == 3 and set.union(*found) == {"00000", "00001", "00002"}


def test_finished_sidecars_are_not_made_again(world):
    calls = []
    def counted(captions): calls.append(len(captions)); return embed(captions)
    assert embed_shards(world.urls, world.side, counted, **HOW) == dict(shards=0, captions=0, skipped=0) and not calls
    before = (world.side / "00002.safetensors").read_bytes()
    (world.side / "00002.safetensors").unlink()
    (world.side / ".00002.safetensors.77.part").write_bytes(b"left by a killed run")
    assert embed_shards(world.urls, world.side, counted, **HOW) == dict(shards=1, captions=6, skipped=0) and calls == [6]
    assert (world.side / "00002.safetensors").read_bytes() == before and not list(world.side.glob(".*.part"))


# ---- streaming


@pytest.mark.parametrize("how", ["unit", "raw"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_scale_is_that_of_all_rows_at_hand(built, how, rows):
    sidecars = open_sidecars(built / "side", list_shards(built / "shards"))
    everything = np.concatenate([read_rows(s) for s in sidecars])
    scaled = apply_scale(everything, fit_scale((piece for s in sidecars for piece in slices_of(s, rows)), how))
    expected = everything - everything.mean(0) if how == "unit" else everything / np.sqrt((everything.astype(float) ** 2).sum(1).mean())
    if how == "unit": expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    assert scaled.dtype == np.float32


def test_scale_refuses_another_word(built):
    with pytest.raises(ValueError, match="normalise='l2'"): fit_scale([np.ones((2, 2))], "l2")


def test_update_is_sklearns_partial_fit_and_the_naive_loop():
    rng = np.random.default_rng(1)
    start, batches = rng.normal(size=(4, 3)), [rng.normal(size=(m, 3)) for m in (7, 1, 20, 4)]
    reference = MiniBatchKMeans(4, init=start.copy(), n_init=1, reassignment_ratio=0, random_state=0)
    ours, seen, naive, counts = start.copy(), np.zeros(4), start.copy(), np.zeros(4)
    for batch in batches:
        reference.partial_fit(batch)
        nearest = update_centroids(ours, seen, batch)
        chosen = [int(((point - naive) ** 2).sum(1).argmin()) for point in batch]
        for point, c in zip(batch, chosen):
            counts[c] += 1
            naive[c] += (point - naive[c]) / counts[c]
        assert nearest.tolist() == chosen
        np.testing.assert_allclose(ours, reference.cluster_centers_, atol=1e-12)
        np.testing.assert_allclose(ours, naive, atol=1e-12)
    np.testing.assert_array_equal(seen, counts)


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 50])
def test_slices_cover_every_shard_and_cross_none(built, rows):
    for sidecar in open_sidecars(built / "side", list_shards(built / "shards")):
        parts = list(slices_of(sidecar, rows))
        assert max(map(len, parts)) <= rows and max(map(len, parts)) - min(map(len, parts)) <= 1
        np.testing.assert_array_equal(np.concatenate(parts), read_rows(sidecar))


@pytest.mark.parametrize("count", [1, 9, 20, 100])
def test_drawn_rows_are_rows_and_none_is_drawn_twice(tmp_path, count):
    numbers = np.arange(20, dtype=np.float32)[:, None] + [0, 100]
    drawn = draw_rows(sidecars_of(tmp_path, numbers, 7), count, seed=3)
    assert drawn.shape == (min(count, 20), 2) and len(set(drawn[:, 0])) == len(drawn) and set(drawn[:, 0]) <= set(numbers[:, 0])
    np.testing.assert_array_equal(drawn[:, 1], drawn[:, 0] + 100)


def test_draws_differ_by_seed(tmp_path):
    sidecars = sidecars_of(tmp_path, np.arange(60, dtype=np.float32)[:, None], 25)
    draws = {tuple(draw_rows(sidecars, 10, seed).ravel()) for seed in (0, 0, 1, 2)}
    assert len(draws) == 3


def test_same_seed_same_bytes_and_another_seed_others(built):
    sidecars = open_sidecars(built / "side", list_shards(built / "shards"))
    one, two, other = (fit_stream(sidecars, 4, seed, 2, 3).centroids.tobytes() for seed in (0, 0, 1))
    assert one == two != other


@pytest.mark.parametrize("saved", range(6))
def test_a_killed_fit_goes_on_to_the_same_bytes(built, tmp_path, monkeypatch, saved):
    sidecars, calls, real = open_sidecars(built / "side", list_shards(built / "shards")), [], scaling._save_state
    whole = save_concepts(tmp_path / "whole.safetensors", fit_stream(sidecars, 4, 0, 2, 3))
    def dying(*args):
        if len(calls) == saved: raise KeyboardInterrupt
        calls.append(args[-1]); real(*args)
    monkeypatch.setattr(scaling, "_save_state", dying)
    with pytest.raises(KeyboardInterrupt): fit_stream(sidecars, 4, 0, 2, 3, state=tmp_path / "state.safetensors", save_every=0)
    assert calls == list(range(1, saved + 1))
    monkeypatch.setattr(scaling, "_save_state", lambda *args: calls.append(args[-1]))
    resumed = save_concepts(tmp_path / "resumed.safetensors", fit_stream(sidecars, 4, 0, 2, 3, state=tmp_path / "state.safetensors", save_every=0))
    assert resumed.read_bytes() == whole.read_bytes() and calls == [1, 2, 3, 4, 5, 6]  # no shard was gone over twice


def test_streaming_is_nearly_as_tight_as_kmeans(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.normal(0, 3, (5, D))
    sidecars = sidecars_of(tmp_path, corners[rng.integers(0, 5, 400)] + rng.normal(size=(400, D)), 90)
    found = fit_stream(sidecars, 5, rows=40)
    points = apply_scale(np.concatenate([read_rows(s) for s in sidecars]), found.scale)
    ours = ((points[:, None] - found.centroids) ** 2).sum(2).min(1).sum()
    assert KMeans(5, n_init=4, random_state=0).fit(points).inertia_ * 0.999 <= ours <= 1.15 * KMeans(5, n_init=4, random_state=0).fit(points).inertia_
    assert ours < 0.6 * ((points - points.mean(0)) ** 2).sum()


@pytest.mark.parametrize("normalise", ["unit", "raw"])
def test_labels_are_soft_labels(world, tmp_path, normalise):
    concepts = cluster_shards(world.sidecars(), tmp_path / "c", 4, TAU, normalise=normalise, passes=1, rows=3)
    for sidecar in world.sidecars():
        labels = read_labels(tmp_path / "c" / f"{sidecar.shard}.safetensors", sidecar, file_hash(tmp_path / "c" / "concepts.safetensors"), TAU)
        assert labels.dtype == np.float16 and labels.shape == (sidecar.shape[0], 4)
        np.testing.assert_allclose(labels, soft_labels(apply_scale(read_rows(sidecar), concepts.scale), concepts.centroids, TAU), atol=1e-3)
    assert not (tmp_path / "c" / "state.safetensors").exists()


def test_concepts_survive_the_disk(built, tmp_path):
    concepts = load_concepts(built / "labels" / "concepts.safetensors")
    again = load_concepts(save_concepts(tmp_path / "c.safetensors", concepts))
    assert np.array_equal(again.centroids, concepts.centroids) and np.array_equal(again.scale.mean, concepts.scale.mean)
    assert again.scale.length == concepts.scale.length and again.scale.how == "unit" and again.about == concepts.about
    assert concepts.about["k"] == str(K) and concepts.about["teacher"] == "fake" and concepts.centroids.dtype == np.float32


def test_a_killed_cluster_run_goes_on_to_the_same_files(world, tmp_path, monkeypatch):
    real = scaling.label_shard
    def dying(sidecar, *args):
        if sidecar.shard == "00001": raise KeyboardInterrupt
        return real(sidecar, *args)
    monkeypatch.setattr(scaling, "label_shard", dying)
    with pytest.raises(KeyboardInterrupt): cluster_shards(world.sidecars(), tmp_path / "c", K, TAU, passes=2, rows=5, save_every=0)
    monkeypatch.setattr(scaling, "label_shard", real)
    cluster_shards(world.sidecars(), tmp_path / "c", K, TAU, passes=2, rows=5, save_every=0)
    for path in world.labels.glob("*.safetensors"): assert (tmp_path / "c" / path.name).read_bytes() == path.read_bytes()


def test_join_puts_the_same_pair_in_every_row(world):
    concepts = load_concepts(world.labels / "concepts.safetensors")
    for i, start in enumerate((0, 8, 16)):
        joined = world.join(i)
        assert joined.shard == f"{i:05d}" and [s.caption for s in joined.samples] == [c for _, c in pairs()][start:start + 8]
        assert [s.image for s in joined.samples] == [s["jpg"] for s in read_shard(world.urls[i])]
        targets = apply_scale(embed([s.caption for s in joined.samples]).astype(np.float16), concepts.scale)
        np.testing.assert_allclose(joined.targets, targets, atol=1e-6)
        np.testing.assert_allclose(joined.labels, soft_labels(targets, concepts.centroids, TAU), atol=1e-3)
        assert joined.targets.dtype == joined.labels.dtype == np.float32


def test_join_leaves_skipped_samples_out(world, tmp_path):
    spoil(world, "jpg", b"no picture")
    embed_shards(world.urls, tmp_path / "s", embed, max_skipped=0.2, **HOW)
    cluster_shards(open_sidecars(tmp_path / "s", world.urls), tmp_path / "l", K, TAU, passes=1)
    joined = World(world.urls, tmp_path / "s", tmp_path / "l").join()
    assert [s.key for s in joined.samples] == [f"00001{j:04d}" for j in (0, 1, 3, 4, 5, 6, 7)] and len(joined.labels) == len(joined.targets) == 7


# ---- damaged and hostile: the tar file


def refused(world: World, data: bytes, match: str) -> None:
    "These bytes as shard 1: read_shard, embed_shards and join_shard all name the shard."
    Path(world.urls[1]).write_bytes(data)
    for act in (lambda: read_shard(world.urls[1]), lambda: embed_shard(world.urls[1], world.side / "x.safetensors", embed, **HOW), world.join):
        with pytest.raises(ValueError, match=f"00001.tar.*{match}"): act()


def test_damage_tar_cut_at_a_member_border(world):
    with tarfile.open(world.urls[1]) as tar: offset = tar.getmembers()[9].offset
    refused(world, Path(world.urls[1]).read_bytes()[:offset], "truncated or damaged")


def test_damage_tar_cut_inside_a_member(world):
    with tarfile.open(world.urls[1]) as tar: offset = tar.getmembers()[9].offset_data
    refused(world, Path(world.urls[1]).read_bytes()[:offset + 100], "truncated or damaged|claims more")


def test_damage_tar_cut_inside_a_header(world):
    with tarfile.open(world.urls[1]) as tar: offset = tar.getmembers()[9].offset
    refused(world, Path(world.urls[1]).read_bytes()[:offset + 300], "truncated or damaged")


def test_damage_header_in_the_middle(world):
    with tarfile.open(world.urls[1]) as tar: offset = tar.getmembers()[9].offset
    data = bytearray(Path(world.urls[1]).read_bytes())
    data[offset + 3] ^= 1
    refused(world, bytes(data), f"damaged behind byte {offset}")


def test_damage_first_header(world):
    data = bytearray(Path(world.urls[1]).read_bytes())
    data[3] ^= 1
    refused(world, bytes(data), "")


def test_damage_bytes_behind_the_end(world):
    refused(world, Path(world.urls[1]).read_bytes() + b"\0" * 512 + b"more", "truncated or damaged")


def test_damage_long_name_without_its_member(world):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 10
    refused(world, header(info) + b"x" * 10 + b"\0" * 502 + b"\0" * 1024, "")


def test_damage_empty_file(world):
    refused(world, b"", "no plain tar file")


def test_damage_no_tar_at_all(world):
    refused(world, picture() * 3, "no plain tar file")


def test_damage_shard_is_missing(world):
    Path(world.urls[1]).unlink()
    with pytest.raises(FileNotFoundError, match="cannot read shard .*00001.tar"): read_shard(world.urls[1])


def test_hostile_gzip_bomb(world):
    tracemalloc.start()
    refused(world, gzip.compress(tar_bytes([("0.txt", b"\0" * 2**24)])), "no plain tar file")
    assert tracemalloc.get_traced_memory()[0] < 2**24
    tracemalloc.stop()


def test_hostile_tar_that_is_gzip_too(world):
    "The first header is the gzip header's file name; webdataset would unpack what follows."
    bomb = gzip.compress(tar_bytes([("0.txt", b"unpacked"), ("0.jpg", picture())]), mtime=0)[10:]
    info = tarfile.TarInfo("x")
    info.size = len(bomb) + 1
    fill = {f"a_{at}": b"x" * length for at, length in ((10, 90), (157, 100), (265, 64), (345, 167))}
    numbers = {"a_100": b"0000644 ", "a_108": b"0000000 ", "a_116": b"0000000 ", "a_124": b"%011o " % info.size, "a_136": b"00000000000 ", "a_329": b"0000000 ", "a_337": b"0000000 "}
    block = header(info, a_0=b"\x1f\x8b\x08\x08mtimeo", **fill, **numbers, a_257=b"ustar   ")
    data = block + b"\0" + bomb + b"\0" * (-info.size % 512) + b"\0" * 1024
    assert b"\0" not in block and members(Path(shutil.copy(world.urls[0], world.urls[1])))  # the trick is sound
    refused(world, data, "")


def test_hostile_sparse_member_of_10_gb(world):
    info = tarfile.TarInfo("000010000.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    block = header(info, a_386=b"%011o\0%011o\0" % (10 * 2**30 // 2, 512), a_483=b"\x80" + (10 * 2**30).to_bytes(11, "big"))
    refused(world, block + b"x" * 512 + b"\0" * 1024, "'000010000.jpg' claims more")


def test_hostile_member_that_claims_10_gb(world):
    info = tarfile.TarInfo("000010000.jpg")
    info.size = 10 * 2**30
    refused(world, header(info) + b"x" * 512 + b"\0" * 1024, "'000010000.jpg' claims more")


@contextmanager
def alarm(seconds: float):
    "An endless loop becomes an error."
    def ring(*_): raise TimeoutError("endless")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, before)


def test_hostile_member_of_negative_size(world):
    "Python's tarfile goes round in circles (CVE-2025-8194)."
    block = header(tarfile.TarInfo("000010000.jpg"), a_124=tarfile.itn(-512, 12, tarfile.GNU_FORMAT))
    with alarm(0.5): refused(world, tar_bytes([("000010000.txt", b"a")])[:1024] + block + b"\0" * 1024, "")


def test_hostile_shard_beyond_the_memory(world, monkeypatch):
    monkeypatch.setattr(scaling, "MAX_SHARD_BYTES", 4096)
    with pytest.raises(ValueError, match="00001.tar is larger than"): read_shard(world.urls[1])


def test_hostile_names_write_nothing(world, tmp_path, monkeypatch):
    "Members that climb out, stand at the root or are links: bytes in memory, nothing on disk."
    (tmp_path / "empty" / "cwd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "cwd")
    links = []
    for name, kind, to in (("evil.txt", tarfile.SYMTYPE, "/etc/passwd"), ("hard.txt", tarfile.LNKTYPE, "../up.txt"), ("fifo", tarfile.FIFOTYPE, ""), ("dir", tarfile.DIRTYPE, "")):
        links.append(info := tarfile.TarInfo(name))
        info.type, info.linkname = kind, to
    outside = tmp_path / "empty" / "absolute.txt"
    Path(world.urls[1]).write_bytes(tar_bytes([("../up.txt", b"up"), (str(outside), b"root"), ("../../x/y.jpg", b"y")], *links))
    assert [(s["__key__"], s.get("txt")) for s in read_shard(world.urls[1])] == [("../up", b"up"), (str(outside)[:-4], b"root"), ("../../x/y", None)]
    assert list((tmp_path / "empty").rglob("*")) == [tmp_path / "empty" / "cwd"] and not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="3 of 3 samples are unusable"): embed_shard(world.urls[1], "x.safetensors", embed, **HOW)
    assert list((tmp_path / "empty").rglob("*")) == [tmp_path / "empty" / "cwd"]


def test_hostile_pickles_in_a_shard_are_never_loaded(world, tmp_path):
    payload = pickle.dumps(Bomb(tmp_path / "boom"))
    extra = [(f"000010000.{ending}", payload) for ending in ("pyd", "pickle", "pth", "pkl", "npy", "cls")]
    Path(world.urls[1]).write_bytes(tar_bytes(extra + members(world.urls[1])))
    first = read_shard(world.urls[1])[0]
    assert first["pyd"] == first["pickle"] == first["pth"] == payload and len(world.join().samples) == 8
    assert not (tmp_path / "boom").exists()
    pickle.loads(payload)
    assert (tmp_path / "boom").exists()  # the payload works


def test_hostile_bad_ending_cannot_hide_a_sample(world):
    "webdataset drops samples with a member called __bad__ without a word."
    Path(world.urls[1]).write_bytes(tar_bytes([("000010000.__bad__", b"1"), *members(world.urls[1])]))
    with pytest.raises(ValueError, match="00001"): assert len(read_shard(world.urls[1])) == 8, "a sample has vanished"


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


def test_damage_key_twice_far_apart(world):
    content = members(world.urls[1])
    refused(world, tar_bytes(content + content[:3]), "key '000010000' twice")


def test_damage_key_twice_side_by_side(world):
    content = members(world.urls[1])
    refused(world, tar_bytes(content[:3] + content), "000010000.*duplicate")


# ---- damaged and hostile: samples


def test_damage_broken_picture(world):
    data = dict(members(world.urls[1]))["000010002.jpg"]
    spoil(world, "jpg", data[:-200])
    is_skipped(world, "the picture is broken")


def test_damage_picture_of_noise(world):
    spoil(world, "jpg", bytes(range(256)))
    is_skipped(world, "no JPEG, PNG or WebP picture")


def test_damage_empty_picture(world):
    spoil(world, "jpg", b"")
    is_skipped(world, "no JPEG, PNG or WebP picture")


def test_damage_missing_picture(world):
    spoil(world, "jpg", None)
    is_skipped(world, "there is no picture")


def test_hostile_picture_of_60000_by_60000(world):
    spoil(world, "jpg", png_of(60_000, 60_000))
    is_skipped(world, "DecompressionBombError")


def test_hostile_picture_just_over_the_limit(world):
    spoil(world, "jpg", png_of(8000, 6251))
    is_skipped(world, "8000 x 6251 pixels; at most 50,000,000")
    assert open_picture(png_of(8000, 6250)).size == (8000, 6250)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_hostile_other_format_called_jpg(world, kind):
    spoil(world, "jpg", picture(kind))
    is_skipped(world, "no JPEG, PNG or WebP picture")


def test_damage_empty_caption(world):
    spoil(world, "txt", b" \n\t")
    is_skipped(world, "the caption is empty or missing")


def test_damage_caption_not_utf8(world):
    spoil(world, "txt", "Käse".encode("latin-1"))
    is_skipped(world, "the caption is no UTF-8 text")


def test_damage_missing_caption(world):
    rewrite(world.urls[1], lambda m: None if m[0] in ("000010002.txt", "000010002.json") else m)
    is_skipped(world, "the caption is empty or missing")


def test_damage_caption_in_json_alone_is_used(world, tmp_path):
    spoil(world, "txt", None)
    assert embed_shards(world.urls, tmp_path / "s", embed, **HOW)["skipped"] == 0
    assert (tmp_path / "s" / "00001.safetensors").read_bytes() == (world.side / "00001.safetensors").read_bytes()


@pytest.mark.parametrize("text, reason", [(b"[1, 2]", "the json no object"), (b"{", "the json no object"), (b"\xff\xfe", "the json no object"),
                                          (b'{"caption": 7}', "empty or missing"), (b'{"caption": null}', "empty or missing"), (b"{}", "empty or missing")])
def test_damage_json_without_a_caption(world, text, reason):
    spoil(world, "txt", None)
    spoil(world, "json", text)
    is_skipped(world, reason)


def test_hostile_json_of_100_000_brackets(world):
    spoil(world, "txt", None)
    spoil(world, "json", b"[" * 100_000)
    is_skipped(world, "")


def test_hostile_json_with_half_a_surrogate(world):
    spoil(world, "txt", None)
    spoil(world, "json", b'{"caption": "half \\ud800"}')
    is_skipped(world, "UTF-8")


def test_damage_no_usable_sample(world):
    rewrite(world.urls[1], lambda m: None if m[0].endswith("jpg") else m)
    with pytest.raises(ValueError, match="00001.tar: 8 of 8 samples are unusable"): embed_shard(world.urls[1], world.side / "x.safetensors", embed, 1.0, **HOW)
    assert not (world.side / "x.safetensors").exists()


def test_damage_shard_without_samples(world):
    Path(world.urls[1]).write_bytes(tar_bytes([("readme", b"no ending, no sample")]))
    with pytest.raises(ValueError, match="00001.tar: 0 of 0 samples are unusable"): embed_shard(world.urls[1], world.side / "x.safetensors", embed, **HOW)


def test_damage_nan_from_the_teacher(world, tmp_path):
    with pytest.raises(ValueError, match="NaN"): embed_shards(world.urls, tmp_path / "s", lambda c: embed(c) * [np.nan] + [1.0] * D, **HOW)
    assert not list((tmp_path / "s").glob("*.safetensors"))


def test_damage_teacher_gives_too_few_rows(world, tmp_path):
    with pytest.raises(ValueError, match="7 embeddings for 8 captions"): embed_shards(world.urls, tmp_path / "s", lambda c: embed(c)[1:], **HOW)
    assert not list((tmp_path / "s").glob("*.safetensors"))


# ---- damaged and hostile: sidecars against shards


def test_damage_wrong_key_in_a_sidecar(world):
    path = world.side / "00001.safetensors"
    keys = open_sidecar(path).keys
    edit(path, keys=json.dumps([*keys[:2], "000019999", *keys[3:]]))
    with pytest.raises(ValueError, match="shard 00001 has no sample 000019999"): world.join()


def test_damage_keys_in_another_order(world):
    "Rows, keys and checksums swapped alike: all agree but the order."
    path, order = world.side / "00001.safetensors", [0, 1, 4, 3, 2, 5, 6, 7]
    sidecar = open_sidecar(path)
    crcs = json.loads(sidecar.about["crc32"])
    edit(path, dict(embeddings=load_file(path)["embeddings"][order]), keys=json.dumps([sidecar.keys[i] for i in order]), crc32=json.dumps([crcs[i] for i in order]))
    with pytest.raises(ValueError, match="shard 00001.*has key 000010004 where the shard has 000010002"): world.join()


def test_damage_samples_in_another_order(world):
    content = members(world.urls[1])
    Path(world.urls[1]).write_bytes(tar_bytes(content[3:6] + content[:3] + content[6:]))
    with pytest.raises(ValueError, match="shard 00001.*has key 000010000 where the shard has 000010001"): world.join()


def test_damage_one_sample_more_than_embedded(world):
    content = members(world.urls[1])
    Path(world.urls[1]).write_bytes(tar_bytes(content + [(n.replace("000010007", "000010008"), d) for n, d in content[-3:]]))
    with pytest.raises(ValueError, match="sample 000010008 of shard 00001 has no embedding"): world.join()


def test_damage_one_sample_fewer_than_embedded(world):
    rewrite(world.urls[1], lambda m: None if m[0].startswith("000010007") else m)
    with pytest.raises(ValueError, match="shard 00001 has no sample 000010007"): world.join()


def test_damage_caption_changed_after_embedding(world):
    spoil(world, "txt", b"another caption")
    with pytest.raises(ValueError, match="sample 000010002 of shard 00001 has another caption"): world.join()


def test_damage_caption_emptied_after_embedding(world):
    spoil(world, "txt", b"")
    with pytest.raises(ValueError, match="(?=.*00001)(?=.*000010002)"): world.join()


def test_damage_picture_broken_after_embedding(world):
    spoil(world, "jpg", b"no picture")
    with pytest.raises(ValueError, match="(?=.*shard 00001|.*00001.tar)(?=.*000010002)"): world.join()


def test_damage_nan_in_a_sidecar(world):
    path = world.side / "00001.safetensors"
    rows = load_file(path)["embeddings"]
    rows[5, 2] = np.nan
    edit(path, dict(embeddings=rows))
    for act in (world.join, lambda: [piece for s in world.sidecars() for piece in slices_of(s, 2)], lambda: fit_stream(world.sidecars(), 2)):
        with pytest.raises(ValueError, match="shard 00001, key 000010005: its embedding holds NaN"): act()


def test_damage_infinity_in_a_sidecar(world):
    path = world.side / "00001.safetensors"
    rows = load_file(path)["embeddings"]
    rows[7, 0] = -np.inf
    edit(path, dict(embeddings=rows))
    with pytest.raises(ValueError, match="shard 00001, key 000010007"): world.join()


def test_damage_sidecar_of_another_teacher(world):
    (world.side / "00001.safetensors").unlink()
    embed_shard(world.urls[1], world.side / "00001.safetensors", embed, **{**HOW, "teacher": "other"})
    with pytest.raises(ValueError, match="00001.safetensors has teacher 'other'.*'fake'"): world.sidecars()
    with pytest.raises(ValueError, match="00001.safetensors was made otherwise.*teacher"): embed_shards(world.urls, world.side, embed, **HOW)


def test_damage_sidecar_of_another_pooling(world):
    with pytest.raises(ValueError, match=r"00000.safetensors was made otherwise.*'pooling': \('mean', 'last'\)"):
        embed_shards(world.urls, world.side, embed, **{**HOW, "pooling": "last"})
    edit(world.side / "00002.safetensors", pooling="last")
    with pytest.raises(ValueError, match="00002.safetensors has pooling 'last'.*'mean'"): world.sidecars()


def test_damage_sidecar_of_another_width(world):
    path = world.side / "00001.safetensors"
    edit(path, dict(embeddings=load_file(path)["embeddings"][:, :4].copy()))
    with pytest.raises(ValueError, match="00001.safetensors has .* 4 dimensions"): world.sidecars()


def test_damage_all_sidecars_made_again_by_another_teacher(world):
    "Old labels and concepts, new targets: captions and keys agree, the teachers do not."
    shutil.rmtree(world.side)
    embed_shards(world.urls, world.side, lambda c: -embed(c), **{**HOW, "pooling": "last"})
    with pytest.raises(ValueError, match="00001"): world.join()


def test_damage_concepts_of_another_folder_in_the_hand(world, tmp_path):
    "The caller's concepts scale the targets; those beside the labels made the labels."
    other = cluster_shards(world.sidecars(), tmp_path / "o", K, TAU, normalise="raw", passes=1)
    with pytest.raises(ValueError): join_shard(world.urls[1], world.sidecars()[1], world.labels, other)


def test_damage_sidecar_renamed(world):
    shutil.copy(world.side / "00000.safetensors", world.side / "00001.safetensors")
    for act in (world.sidecars, world.join, lambda: embed_shards(world.urls, world.side, embed, **HOW)):
        with pytest.raises(ValueError, match="00001.safetensors belongs to shard 00000"): act()


@pytest.mark.parametrize("keep", [0, 5, 200, -3])
def test_damage_truncated_sidecar(world, keep):
    path = world.side / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for act in (world.sidecars, lambda: embed_shards(world.urls, world.side, embed, **HOW)):
        with pytest.raises(ValueError, match="00001.safetensors is no sidecar.*delete it"): act()


def test_damage_sidecar_cut_while_it_is_read(world):
    sidecar, path = open_sidecar(world.side / "00001.safetensors"), world.side / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="00001.safetensors.*embed shard 00001 again"): read_rows(sidecar)


@pytest.mark.parametrize("which", ["side/00001", "labels/00001", "labels/concepts"])
def test_hostile_pickle_called_safetensors(world, tmp_path, which):
    (tmp_path / f"{which}.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(ValueError, match=which.split("/")[1]): world.join()
    with pytest.raises(ValueError, match=which.split("/")[1]):
        cluster_shards(world.sidecars(), world.labels, K, TAU, passes=2, rows=5, save_every=0)
    assert not (tmp_path / "boom").exists()


def test_hostile_pickle_as_state(world, tmp_path):
    (tmp_path / "state.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(ValueError, match="state.safetensors is not readable"): fit_stream(world.sidecars(), 2, state=tmp_path / "state.safetensors")
    assert not (tmp_path / "boom").exists()


def test_damage_sidecar_missing(world):
    (world.side / "00001.safetensors").unlink()
    for act in (world.sidecars, world.join):
        with pytest.raises(FileNotFoundError, match="shard 00001 has no embeddings.*run the embedding again"): act()


@pytest.mark.parametrize("entry", ["keys", "skipped", "crc32", "captions"])
def test_damage_header_entry_missing(world, entry):
    edit(world.side / "00001.safetensors", **{entry: None})
    with pytest.raises(ValueError, match="00001"): world.join()


@pytest.mark.parametrize("entry, value", [("keys", "{}"), ("keys", "7"), ("keys", "[[1], [2], [3], [4], [5], [6], [7], [8]]"),
                                          ("skipped", "7"), ("skipped", "{"), ("crc32", "7")])
def test_hostile_header_entry_of_another_kind(world, entry, value):
    edit(world.side / "00001.safetensors", **{entry: value})
    with pytest.raises(ValueError, match="00001"): world.join()


def test_hostile_too_few_checksums(world):
    "Captions behind the last checksum must not go unchecked."
    spoil(world, "txt", b"another caption", "000010007")
    path = world.side / "00001.safetensors"
    edit(path, crc32=json.dumps(json.loads(open_sidecar(path).about["crc32"])[:3]))
    with pytest.raises(ValueError, match="00001"): world.join()


def test_hostile_key_twice_in_a_sidecar(world):
    path = world.side / "00001.safetensors"
    sidecar, rows = open_sidecar(path), load_file(path)["embeddings"]
    crcs = json.loads(sidecar.about["crc32"])
    edit(path, dict(embeddings=np.concatenate([rows, rows[-1:]])), keys=json.dumps([*sidecar.keys, sidecar.keys[-1]]), crc32=json.dumps([*crcs, crcs[-1]]))
    with pytest.raises(ValueError, match="00001"): scaling._match(open_sidecar(path), read_shard(world.urls[1]))


# ---- damaged and hostile: labels and concepts


def test_damage_label_file_missing(world):
    (world.labels / "00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard 00001 has no labels"): world.join()


def test_damage_labels_of_other_concepts(world, tmp_path):
    cluster_shards(world.sidecars(), tmp_path / "o", K, TAU, seed=5, passes=1)
    shutil.copy(tmp_path / "o" / "00001.safetensors", world.labels)
    with pytest.raises(ValueError, match="labels .* of shard 00001 do not belong here.*concepts"): world.join()
    with pytest.raises(ValueError, match="shard 00001 do not belong here"): cluster_shards(world.sidecars(), world.labels, K, TAU, passes=2, rows=5, save_every=0)


def test_damage_labels_of_another_temperature(world):
    with pytest.raises(ValueError, match=r"shard 00000 do not belong here.*'temperature': \('0.5', '0.7'\)"):
        cluster_shards(world.sidecars(), world.labels, K, 0.7, passes=2, rows=5, save_every=0)


def test_damage_labels_of_another_shard(world):
    shutil.copy(world.labels / "00000.safetensors", world.labels / "00001.safetensors")
    with pytest.raises(ValueError, match=r"shard 00001 do not belong here.*'shard': \('00000', '00001'\)"): world.join()


def test_damage_labels_do_not_sum_to_one(world):
    path = world.labels / "00001.safetensors"
    labels = load_file(path)["labels"]
    labels[6] *= 0.9
    edit(path, dict(labels=labels))
    with pytest.raises(ValueError, match="shard 00001, key 000010006: its label does not sum to 1"): world.join()


def test_damage_nan_in_labels(world):
    path = world.labels / "00001.safetensors"
    labels = load_file(path)["labels"]
    labels[6, 0] = np.nan
    edit(path, dict(labels=labels))
    with pytest.raises(ValueError, match="shard 00001, key 000010006"): world.join()


def test_hostile_negative_labels(world):
    path = world.labels / "00001.safetensors"
    labels = load_file(path)["labels"]
    labels[6] = [2, -1, 0]
    edit(path, dict(labels=labels))
    with pytest.raises(ValueError, match="shard 00001, key 000010006"): world.join()


def test_damage_too_few_labels(world):
    path = world.labels / "00001.safetensors"
    edit(path, dict(labels=load_file(path)["labels"][:7].copy()))
    with pytest.raises(ValueError, match="00001.safetensors holds 7 labels for 8 keys"): world.join()


def test_hostile_labels_of_another_width(world):
    path = world.labels / "00001.safetensors"
    edit(path, dict(labels=np.full((8, K + 2), 1 / (K + 2), np.float16)))
    with pytest.raises(ValueError, match="00001"): world.join()


@pytest.mark.parametrize("keep", [0, 100, -3])
def test_damage_truncated_labels(world, keep):
    path = world.labels / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="00001.safetensors holds no labels"): world.join()


def test_damage_concepts_missing_or_cut(world):
    path = world.labels / "concepts.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="concepts.safetensors holds no concepts"): world.join()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no concepts at"): world.join()


def test_damage_one_flipped_bit_in_the_concepts(world):
    path = world.labels / "concepts.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shard 00001 do not belong here.*concepts"): world.join()


def test_damage_concepts_of_other_settings_in_the_folder(world):
    for other in (dict(k=K + 1), dict(seed=3), dict(normalise="raw"), dict(passes=5), dict(rows=7)):
        settings = dict(k=K, seed=0, normalise="unit", passes=2, rows=5, save_every=0) | other
        with pytest.raises(ValueError, match=f"concepts.safetensors was made otherwise.*{next(iter(other))}"): cluster_shards(world.sidecars(), world.labels, temperature=TAU, **settings)
    with pytest.raises(ValueError, match="concepts.safetensors was made otherwise.*sidecars"): cluster_shards(world.sidecars()[:2], world.labels, K, TAU, passes=2, rows=5, save_every=0)


def test_damage_state_of_another_run(world, tmp_path):
    state = tmp_path / "state.safetensors"
    fit_stream(world.sidecars(), 3, state=state, passes=1)
    for other in (dict(k=4), dict(k=3, seed=1), dict(k=3, rows=2), dict(k=3, passes=2), dict(k=3, normalise="raw")):
        with pytest.raises(ValueError, match="state.safetensors belongs to another run"): fit_stream(world.sidecars(), **{"passes": 1, **other}, state=state)
    with pytest.raises(ValueError, match="state.safetensors belongs to another run.*sidecars"): fit_stream(world.sidecars()[1:], 3, passes=1, state=state)


def test_damage_truncated_state(world, tmp_path):
    state = tmp_path / "state.safetensors"
    fit_stream(world.sidecars(), 3, state=state, passes=1)
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="state.safetensors is not readable.*delete it"): fit_stream(world.sidecars(), 3, state=state, passes=1)


@pytest.mark.parametrize("k", [0, -1, PAIRS + 1])
def test_damage_more_concepts_than_captions(world, tmp_path, k):
    with pytest.raises(ValueError, match=f"k={k} concepts from {PAIRS} captions"): cluster_shards(world.sidecars(), tmp_path / "o", k, TAU)
    assert first_centroids(world.sidecars(), Scale(np.zeros(D, np.float32), 1.0, "raw"), PAIRS, 0).shape == (PAIRS, D)


@pytest.mark.parametrize("tau", [0, -1, float("nan"), float("inf")])
def test_damage_temperature_that_is_none(world, tmp_path, tau):
    with pytest.raises(ValueError, match="temperature="): cluster_shards(world.sidecars(), tmp_path / "o", K, tau, passes=1)
    assert not (tmp_path / "o" / "00000.safetensors").exists()


@pytest.mark.parametrize("name", ["concepts", "state"])
def test_hostile_shard_called_like_our_own_files(world, tmp_path, name):
    "Its labels would lie where the concepts or the state lie."
    url = shutil.copy(world.urls[1], tmp_path / f"{name}.tar")
    embed_shards([url], tmp_path / "s", embed, **HOW)
    sidecars = open_sidecars(tmp_path / "s", [url])
    for _ in range(2):
        with pytest.raises(ValueError, match="name|rename"): cluster_shards(sidecars, tmp_path / "o", K, TAU, passes=1)


# ---- damaged and hostile: disk, folders, two runs at once


def write_fails(world: World, tmp_path: Path, monkeypatch, error: OSError) -> None:
    "The second sidecar's write fails half way: the first stays, nothing half-made stays, and another run finishes."
    calls, real = [], teacher.save_file
    def failing(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2: Path(path).write_bytes(b"half"); raise error
        real(tensors, path, metadata=metadata)
    monkeypatch.setattr(teacher, "save_file", failing)
    with pytest.raises(type(error), match=re.escape(error.strerror)): embed_shards(world.urls, tmp_path / "s", embed, **HOW)
    assert sorted(p.name for p in (tmp_path / "s").iterdir() if not p.name.endswith(".lock")) == ["00000.safetensors"]
    assert embed_shards(world.urls, tmp_path / "s", embed, **HOW)["shards"] == 2
    for path in world.side.glob("*.safetensors"): assert (tmp_path / "s" / path.name).read_bytes() == path.read_bytes()


def test_damage_full_disk(world, tmp_path, monkeypatch):
    write_fails(world, tmp_path, monkeypatch, OSError(errno.ENOSPC, "No space left on device"))


def test_damage_read_only_folder(world, tmp_path, monkeypatch):
    write_fails(world, tmp_path, monkeypatch, PermissionError(errno.EACCES, "Permission denied"))


def test_damage_full_disk_while_clustering(world, tmp_path, monkeypatch):
    calls, real = [], teacher.save_file
    def failing(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) in (3, 6): Path(path).write_bytes(b"half"); raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)
    monkeypatch.setattr(teacher, "save_file", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"): cluster_shards(world.sidecars(), tmp_path / "o", K, TAU, passes=2, rows=5, save_every=0)
        assert not list((tmp_path / "o").glob(".*.part"))
    cluster_shards(world.sidecars(), tmp_path / "o", K, TAU, passes=2, rows=5, save_every=0)
    for path in world.labels.glob("*.safetensors"): assert (tmp_path / "o" / path.name).read_bytes() == path.read_bytes()


def test_damage_two_runs_in_one_folder(world, tmp_path):
    "The second run is told so, at once; other ranks are not disturbed."
    with run_lock(tmp_path / "s" / ".embed-0-of-2.lock"):
        with pytest.raises(RuntimeError, match="another run is writing here.*embed-0-of-2"): embed_shards(world.urls, tmp_path / "s", embed, 0, 2, **HOW)
        assert embed_shards(world.urls, tmp_path / "s", embed, 1, 2, **HOW)["shards"] == 1
    with run_lock(world.labels / ".cluster.lock"), pytest.raises(RuntimeError, match="another run"): cluster_shards(world.sidecars(), world.labels, K, TAU, passes=2, rows=5, save_every=0)
    assert embed_shards(world.urls, tmp_path / "s", embed, 0, 2, **HOW)["shards"] == 2


def test_damage_lock_of_a_killed_run_is_free(world, tmp_path):
    lock = tmp_path / "s" / ".embed-0-of-1.lock"
    head = "import sys, time, filelock\nfrom collections.abc import Iterator\nfrom contextlib import contextmanager\nfrom pathlib import Path\n"
    code = head + inspect.getsource(run_lock) + "\nwith run_lock(sys.argv[1]): print('held', flush=True); time.sleep(120)"  # without torch, which takes long to load
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another run is writing here"): embed_shards(world.urls, tmp_path / "s", embed, **HOW)
    finally: holder.kill(); holder.wait(); holder.stdout.close()
    assert lock.exists() and embed_shards(world.urls, tmp_path / "s", embed, **HOW)["shards"] == 3


def test_damage_an_error_frees_the_lock(world, tmp_path):
    def dying(captions): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): embed_shards(world.urls, tmp_path / "s", dying, **HOW)
    assert embed_shards(world.urls, tmp_path / "s", embed, **HOW)["shards"] == 3


@pytest.mark.parametrize("per_shard", [0, -1, 10_001])
def test_damage_per_shard_out_of_range(tmp_path, per_shard):
    with pytest.raises(ValueError, match=f"per_shard={per_shard}; expected 1 to 10000"): write_shards(pairs(3), tmp_path, per_shard, 8)
    assert not list(tmp_path.iterdir())


def test_damage_folder_of_other_shards(world):
    folder = Path(world.urls[0]).parent
    before = [Path(u).read_bytes() for u in world.urls]
    with pytest.raises(ValueError, match="00000.tar holds other pairs"): write_shards([(i, c + "!") for i, c in pairs()], folder, PER, 12)
    with pytest.raises(ValueError, match="holds other shards, such as 00002.tar"): write_shards(pairs(16), folder, PER, 12)
    assert [Path(u).read_bytes() for u in world.urls] == before


def test_damage_no_pairs(tmp_path):
    with pytest.raises(ValueError, match="no pairs"): write_shards([], tmp_path)


def test_damage_picture_that_cannot_be_packed(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises((ValueError, OSError)): write_shards([*pairs(2), (tmp_path / "x.png", "caption")], tmp_path / "s", 10, 8)
    assert {p.name for p in (tmp_path / "s").iterdir()} == {".shards.lock"}


def test_damage_two_shards_of_one_name(tmp_path):
    with pytest.raises(ValueError, match="two shards of .* have the same name"): list_shards(f"{tmp_path}/a/00000.tar::{tmp_path}/b/00000.tar")


@pytest.mark.parametrize("rank, size", [(2, 2), (-1, 2), (0, 0)])
def test_damage_rank_out_of_range(world, tmp_path, rank, size):
    with pytest.raises(ValueError, match="rank|world"): embed_shards(world.urls, tmp_path / "s", embed, rank, size, **HOW)
