"""What the tests of loader, distributed training and long runs train on: six little shards and a very small CLIP."""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from kklip_nb.scale.clustering import cluster_shards
from kklip_nb.scale.distributed import World
from kklip_nb.scale.embeddings import embed_shards, open_sidecars
from kklip_nb.scale.loader import ShardData, open_data, shard_recipe
from kklip_nb.scale.shards import list_shards, write_shards
from kklip_nb.training import LAPTOP

SHARDS, DISTINCT, PER_SHARD = 6, 12, 13  # the first and the last pair of each shard share a caption
STEPS = 20  # 2 epochs of 78 pairs: 39 a stream, in parts of 4
RECIPE = dataclasses.replace(shard_recipe(LAPTOP), student="kklip-tiny", train_image="all", imagenet=False, k=4, epochs=2, batch_size=8, warmup=3)
ALONE = World(0, 1, torch.device("cpu"))


def register_tiny(folder: Path) -> None:
    "A CLIP on 8-pixel pictures that reads real tokens, under a name that build_student knows."
    tower = dict(width=32, layers=1)
    (folder / "kklip-tiny.json").write_text(json.dumps(dict(
        embed_dim=16, vision_cfg=tower | dict(image_size=8, patch_size=4, head_width=16),
        text_cfg=dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1))))
    open_clip.add_model_config(folder / "kklip-tiny.json")


def embed(captions: list[str]) -> np.ndarray:
    "A teacher that knows nothing but always says the same."
    return np.stack([np.random.default_rng(zlib.crc32(c.encode())).standard_normal(16) for c in captions])


def little_pairs(count: int = SHARDS * PER_SHARD, first: int = 0) -> list[tuple[np.ndarray, str]]:
    "Noise with captions; the first and the last of each 13 share one."
    captions = [f"thing {i - DISTINCT if i % PER_SHARD == DISTINCT else i} of {i // PER_SHARD}" for i in range(first, first + count)]
    return [(np.random.default_rng(first + i).integers(0, 256, (8, 8, 3), dtype=np.uint8), c) for i, c in enumerate(captions)]


def open_folder(folder: Path) -> ShardData:
    return open_data(list_shards(folder / "shards"), folder / "embeddings", folder / "concepts")


def make_folder(folder: Path) -> Path:
    "Shards, sidecars and concepts; and a shard that is held out."
    urls = list(map(str, write_shards(little_pairs(), folder / "shards", per_shard=PER_SHARD, size=8)))
    embed_shards(urls, folder / "embeddings", embed, teacher="hash", pooling="none", layer=0, prompt="")
    cluster_shards(open_sidecars(folder / "embeddings", urls), folder / "concepts", RECIPE.k, passes=2)
    write_shards(little_pairs(20, 1000), folder / "held-out", per_shard=20, size=8)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "A folder that no test changes."
    register_tiny(tmp_path_factory.mktemp("model"))
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def data(folder): return open_folder(folder)
