"""What the tests of shards, embeddings and clustering share: small data sets on disk, and ways to spoil them."""

import io
import json
import os
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kklip_nb.scale.clustering import cluster_shards, join_shard, load_concepts
from kklip_nb.scale.embeddings import embed_shards, open_sidecar, open_sidecars, read_rows
from kklip_nb.scale.shards import list_shards, write_shards
from kklip_nb.teacher import save_embeddings

HOW = dict(teacher="fake", pooling="mean", layer=-1, prompt="{}")
HOW_CLUSTERED = dict(passes=2, rows=5, save_every=0)
D, PER, PAIRS, K = 6, 8, 22, 3


def embed(captions: list[str]) -> np.ndarray:
    "A teacher that knows no language: the caption's checksum seeds its vector."
    return np.stack([np.random.default_rng(zlib.crc32(c.encode())).normal(1, 2, D) for c in captions]).astype(np.float32)


def pairs(n: int = PAIRS, size: int = 12) -> list[tuple[np.ndarray, str]]:
    "Pictures of noise; caption 11 is that of picture 10 once more."
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), f"caption {10 if i == 11 else i} ä") for i in range(n)]


class Files(NamedTuple):
    "Three shards (8, 8 and 6 pairs), their sidecars and their concepts, in folders that a test may spoil."
    urls: list[str]
    side: Path
    concepts: Path

    def join(self, i=1):
        return join_shard(self.urls[i], open_sidecar(self.side / f"{i:05d}.safetensors"), load_concepts(self.concepts / "concepts.safetensors"))

    def sidecars(self):
        return open_sidecars(self.side, self.urls)


def build(home: Path) -> None:
    "Shards, sidecars and concepts, with the functions under test."
    urls = [str(p) for p in write_shards(pairs(), home / "shards", PER, 12)]
    embed_shards(urls, home / "side", embed, **HOW)
    cluster_shards(open_sidecars(home / "side", urls), home / "concepts", K, **HOW_CLUSTERED)


def copy(home: Path, to: Path) -> Files:
    "The same for one test, which may spoil it."
    for name in ("shards", "side", "concepts"): shutil.copytree(home / name, to / name)
    return Files(list_shards(to / "shards"), to / "side", to / "concepts")


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


def spoil(files: Files, ending: str, data: bytes | None, key: str = "000010002") -> None:
    "Replace one member of shard 1, or take it away."
    rewrite(files.urls[1], lambda m: m if m[0] != f"{key}.{ending}" else data if data is None else (m[0], data))


def header(info: tarfile.TarInfo, **fields: bytes) -> bytes:
    "A tar header with fields written over at their offset (a_124=…) and the checksum mended."
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for at, value in fields.items(): block[(start := int(at[2:])):start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%07o " % sum(block)
    return bytes(block)


def edit(path: Path, tensors: dict | None = None, **meta: str | None) -> None:
    "Change a safetensors file's values or its header; a None drops an entry."
    with safe_open(path, framework="numpy") as file: found = file.metadata()
    save_file(tensors or load_file(path), path, metadata={k: v for k, v in (found | meta).items() if v is not None})


def sidecars_of(folder: Path, rows: np.ndarray, per: int) -> list:
    "Sidecars of given rows, without shards."
    for i, start in enumerate(range(0, len(rows), per)):
        part = rows[start:start + per]
        keys = [f"{i:05d}{j:04d}" for j in range(len(part))]
        save_embeddings(folder / f"{i:05d}.safetensors", part, keys, **HOW, shard=f"{i:05d}", keys=json.dumps(keys), skipped="{}",
                        **dict.fromkeys(("crc32", "folded"), json.dumps([zlib.crc32(k.encode()) for k in keys])))
    return open_sidecars(folder, [f"{i:05d}" for i in range(-(-len(rows) // per))])


class Bomb:
    "Whoever unpickles this makes a folder."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def picture(kind: str = "JPEG", array: np.ndarray | None = None, **how) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pairs(1)[0][0] if array is None else array).save(buffer, kind, **how)
    return buffer.getvalue()


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    "Encoded pictures of unusual kinds, each with the pixels that a viewer shows, computed without Pillow's conversions."
    values = np.kron(np.array([[0, 40], [160, 255]]), np.ones((16, 16))).astype(np.uint8)  # four even squares: JPEG keeps them
    colours = np.stack([values, values.T, 255 - values], -1)
    clear = np.kron(np.array([[1, 0], [0, 1]]), np.ones((16, 16))).astype(bool)
    grey, on_white = np.stack([values] * 3, -1), np.where(clear[..., None], 255, colours)
    def encode(image, kind, **how):
        buffer = io.BytesIO()
        image.save(buffer, kind, **how)
        return buffer.getvalue()
    alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    rgba = Image.merge("RGBA", [*Image.fromarray(colours).split(), alpha])
    ink = np.concatenate([colours, np.full((32, 32, 1), 51, np.uint8)], -1)  # a fifth of black over all
    palette = Image.fromarray((values // 80).astype(np.uint8))
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    shown = np.array([[255, 255, 255], [200, 0, 0], [0, 200, 0], [0, 0, 200]])[values // 80]
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter turn clockwise
    first, second = Image.fromarray(colours), Image.fromarray(255 - colours)
    half = np.where(values > 100, 255, 0)
    return {
        "JPEG": (encode(first, "JPEG", quality=100, subsampling=0), colours), "grey JPEG": (encode(Image.fromarray(values), "JPEG", quality=100), grey),
        "CMYK JPEG": (encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=100), (255 - colours.astype(float)) * (255 - 51) / 255),
        "turned JPEG": (encode(first, "JPEG", quality=100, subsampling=0, exif=turned), np.rot90(colours, -1)),
        "1-bit PNG": (encode(Image.fromarray(values > 100), "PNG"), np.stack([half] * 3, -1)),
        "16-bit PNG": (encode(Image.fromarray(values.astype(np.uint16) * 257), "PNG"), grey),
        "palette PNG": (encode(palette, "PNG", transparency=0), shown), "RGBA PNG": (encode(rgba, "PNG"), on_white),
        "LA PNG": (encode(Image.merge("LA", [Image.fromarray(values), alpha]), "PNG"), np.where(clear[..., None], 255, grey)),
        "WebP": (encode(rgba, "WEBP", lossless=True), on_white), "animated WebP": (encode(first, "WEBP", lossless=True, save_all=True, append_images=[second]), colours),
        "animated PNG": (encode(first, "PNG", save_all=True, append_images=[second]), colours)}


def png_of(width: int, height: int) -> bytes:
    "A PNG of 70 bytes that claims a size."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def is_skipped(files: Files, reason: str, key: str = "000010002") -> None:
    "One bad sample: an error over the limit, which names shard, key and reason; a counted skip in the header under it."
    shutil.rmtree(files.side)
    with pytest.raises(ValueError, match=f"00001.tar: 1 of 8 samples are unusable.*{key}.*{reason}"): embed_shards(files.urls, files.side, embed, **HOW)
    assert sorted(p.name for p in files.side.glob("*.safetensors")) == ["00000.safetensors"]  # the shard before it stays done
    assert embed_shards(files.urls, files.side, embed, max_skipped=0.125, **HOW) == dict(shards=2, captions=13, skipped=1)
    sidecar = open_sidecar(files.side / "00001.safetensors")
    assert re.search(reason, json.loads(sidecar.meta["skipped"])[key]) and key not in sidecar.keys and len(sidecar.keys) == sidecar.shape[0] == 7
    np.testing.assert_array_equal(read_rows(sidecar)[2], embed(["caption 10 ä"])[0].astype(np.float16))  # rows behind the gap move up
