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
