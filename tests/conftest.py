"""Settings for all tests: no window, no network, one thread, the same examples every time."""

import os
import sys

os.environ["MPLBACKEND"] = "agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, os.path.dirname(__file__))  # for shard_files

import numpy as np
import pytest
import torch
from hypothesis import settings
from lab import browser, lab, notebook_page, open_notebook  # noqa: F401

torch.set_num_threads(1)
settings.register_profile("kklip", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("kklip")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def openmoji_rows():
    "The real table of drawings and names, read once."
    from kklip_nb.data import openmoji_table

    return openmoji_table()


# --- a run of all stages, for the tests of the command line and of the export

SMALL = "--k 4 --student kklip-laptop-vit --no-imagenet --train-image all --batch-size 8 --epochs 2 --warmup 1".split()


@pytest.fixture(scope="session")
def fake_teacher():
    "A random Llama of width 32 in place of the packaged one; it is told nothing of the captions."
    from kklip_nb.scale.rehearsal import random_teacher
    return lambda name, device="cpu", dtype=torch.float32: random_teacher(["a red dog", "two blue cats", "pizza"], 32)._replace(source=f"{name} sha256:0")


def make_photos(folder, first):
    "A folder of 40 pictures of differing shapes, and a table."
    import csv

    from PIL import Image
    rng = np.random.default_rng(first)
    for i in range(first, first + 40):
        Image.fromarray(rng.integers(256, size=(20 + i % 7, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{i}.png", f"thing number {i}") for i in range(first, first + 40))])
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), 0)


@pytest.fixture(scope="session")
def finished(photos, fake_teacher, tmp_path_factory):
    "All stages, run once in this process: data, held-out (shards alone) and run."
    from kklip_nb import teacher
    from kklip_nb.scale.command_line import main
    work, other = tmp_path_factory.mktemp("work") / "wörk [1] {a} %s", make_photos(tmp_path_factory.mktemp("other"), 100)
    data, held_out, run = (str(work / name) for name in ("data", "held-out", "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "load_teacher", fake_teacher)
        for line in (["shards", str(photos), data, "--per-shard", "20", "--size", "32"], ["shards", str(other), held_out, "--per-shard", "20", "--size", "32"],
                     ["embed", data, "--layer", "-1"], ["cluster", data, "--layer", "-1", "--k", "4"], ["train", data, run, "--layer", "-1", *SMALL],
                     ["evaluate", run, held_out]):
            assert main(line) == 0, line
    return work


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "A folder of shards, sidecars and concepts, made once; nobody changes it."
    import shard_files

    home = tmp_path_factory.mktemp("built")
    shard_files.build(home)
    return home


@pytest.fixture
def files(built, tmp_path):
    "The same, copied for one test."
    import shard_files

    return shard_files.copy(built, tmp_path)
