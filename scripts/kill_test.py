"""Kill embedding, clustering and training again and again, and see that nothing of it remains in what they make.

    python scripts/kill_test.py --kills 60     # a few minutes
    python scripts/kill_test.py --kills 6      # a short form, which the tests run

Each stage runs in a forked process that is killed with SIGKILL: at a random time, with half of a file written, or with
the whole file written but not yet renamed. It is then started again, until all is made, and compared with a run that was
never killed: sidecars and concepts as files, the checkpoint's tensors, and the log but for its speeds.
"""

import signal

if __name__ == "__main__": signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import csv
import dataclasses
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kklip_nb import tools, training
from kklip_nb.scale.clustering import cluster_shards
from kklip_nb.scale.distributed import World
from kklip_nb.scale.embeddings import embed_shards, open_sidecars
from kklip_nb.scale.loader import open_data, shard_recipe
from kklip_nb.scale.long_run import newest_checkpoint, train_shards
from kklip_nb.scale.shards import list_shards, run_lock, write_shards
from kklip_nb.training import LAPTOP

torch.set_num_threads(1)
RECIPE = dataclasses.replace(shard_recipe(LAPTOP), student="kklip-laptop-vit", train_image="all", imagenet=False, k=4, epochs=3, batch_size=8, warmup=3)
SHARDS, PER_SHARD = 6, 16  # 12 steps an epoch
KINDS = ("random", "half a write", "before the rename")
ROUND = 4  # kills of a stage before its result is compared


# --- the three stages

def slow_embed(captions: list[str]) -> np.ndarray:
    "A teacher that takes its time and knows nothing."
    time.sleep(0.05)
    return np.stack([np.random.default_rng(zlib.crc32(c.encode())).standard_normal(16) for c in captions])


def embed(work: Path, shards: Path) -> None:
    embed_shards(list_shards(shards), work / "embeddings", slow_embed, teacher="hash", pooling="none", layer=0, prompt="")


def cluster(work: Path, shards: Path) -> None:
    sidecars = open_sidecars(work / "embeddings", list_shards(shards))
    cluster_shards(sidecars, work / "concepts", RECIPE.k, passes=8, save_every=0)


def train(work: Path, shards: Path) -> None:
    data = open_data(list_shards(shards), work / "embeddings", work / "concepts")
    train_shards(RECIPE, data, work / "run", World(0, 1, torch.device("cpu")), streams=2, save_every=3, workers=1)


STAGES: dict[str, Callable[[Path, Path], None]] = dict(embed=embed, cluster=cluster, train=train)


# --- how a process is killed

def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sabotage(kind: str, number: int) -> None:
    "From now on the process kills itself at its `number`-th write."
    calls = []
    def due():
        calls.append(1)
        return len(calls) == number
    if kind == "before the rename":
        replace = os.replace
        os.replace = lambda *args: die() if due() else replace(*args)
        return
    def halved(save):
        def write(tensors, part, metadata=None):
            save(tensors, part, metadata=metadata)
            if due():
                os.truncate(part, os.path.getsize(part) // 2)
                die()
        return write
    for module in (tools, training): module.save_file = halved(module.save_file)


def run_stage(stage: str, work: Path, shards: Path, kind: str | None = None, chance: random.Random | None = None, seconds: float = 0.0, writes: int = 1) -> bool:
    "Run a stage in a process of its own; True if it was killed, False if it came to its end first."
    number, delay = (chance.randint(1, writes), chance.uniform(0, seconds)) if chance else (0, 0)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            if kind in KINDS[1:]: sabotage(kind, number)
            STAGES[stage](work, shards)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    if kind == "random":
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)  # not yet waited for, so the number is still its own
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL: return True
    if status: raise RuntimeError(f"{stage} failed with status {os.waitstatus_to_exitcode(status)} (its traceback is above)")
    return False


# --- what must be equal

def made(work: Path, *folders: str) -> list[Path]:
    return sorted(f.relative_to(work) for folder in folders for f in (work / folder).glob("*.safetensors"))


def weights(work: Path) -> tuple[dict, bytes]:
    "All tensors of the checkpoint, by name and as bytes: weights, optimiser and random state."
    raw = newest_checkpoint(work / "run").read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    return {k: v for k, v in json.loads(raw[8:size]).items() if k != "__metadata__"}, raw[size:]


def log(work: Path) -> list[dict]:
    with open(work / "run" / "log.csv", newline="") as file: return [{k: v for k, v in line.items() if k != "pairs_per_s"} for line in csv.DictReader(file)]


def differences(work: Path, reference: Path) -> list[str]:
    "What differs from the run that was never killed."
    if made(work, "embeddings", "concepts") != made(reference, "embeddings", "concepts"): return ["other files were made"]
    wrong = [f"{name} differs" for name in made(reference, "embeddings", "concepts") if (work / name).read_bytes() != (reference / name).read_bytes()]
    if weights(work) != weights(reference): wrong.append("the trained weights differ")
    if log(work) != log(reference): wrong.append("log.csv differs")
    wrong += [f"{f.relative_to(work)} was left behind" for f in work.rglob("*.part")]
    for lock in work.rglob("*.lock"):
        try:
            with run_lock(lock, wait=10): pass  # a decoding worker of a killed run lives on for some seconds
        except RuntimeError as error: wrong.append(str(error))
    return wrong


# --- all of it

def plan(kills: int, chance: random.Random) -> dict[str, list[str]]:
    "The kinds of kill of each stage: as many of one stage as of another, and a third of all during a write."
    pattern, stages = (KINDS[1], KINDS[2], *[KINDS[0]] * 4), list(STAGES)
    planned: dict[str, list[str]] = {s: [] for s in stages}
    for i in range(kills): planned[stages[i % 3]].append(pattern[(i + i // 6) % 6])
    for kinds in planned.values(): chance.shuffle(kinds)
    return planned


def never_killed(work: Path, shards: Path) -> tuple[dict[str, float], dict[str, int]]:
    "The reference; seconds and safetensors files written by each stage."
    seconds = {}
    for stage in STAGES:
        started = time.perf_counter()
        run_stage(stage, work, shards)
        seconds[stage] = time.perf_counter() - started
    steps = len(log(work))
    return seconds, dict(embed=SHARDS, cluster=8 * SHARDS + 1, train=steps // 3)


def kill_stage(stage: str, kinds: list[str], counts: Counter, chance: random.Random, work: Path, shards: Path, seconds: float, writes: int) -> None:
    "Kill a stage up to ROUND times, taking off the list what was done, then let it finish."
    for _ in range(ROUND):
        if not kinds: break
        if not run_stage(stage, work, shards, kinds[-1], chance, seconds, writes): counts["finished first"] += 1; return
        counts[stage] += 1
        counts[kinds.pop()] += 1
    run_stage(stage, work, shards)


def main(kills: int, seed: int, where: Path) -> int:
    "1 if something differs."
    chance, counts, started, rounds = random.Random(seed), Counter(), time.perf_counter(), 0
    shards, planned = where / "shards", plan(kills, chance)
    pictures = np.random.default_rng(0).integers(0, 256, (SHARDS * PER_SHARD, 32, 32, 3), dtype=np.uint8)
    write_shards(((p, f"thing number {i}") for i, p in enumerate(pictures)), shards, PER_SHARD, size=32)
    seconds, writes = never_killed(where / "reference", shards)
    print("seconds of a stage that is not killed: " + ", ".join(f"{s} {t:.1f}" for s, t in seconds.items()))
    while any(planned.values()):
        work, rounds = where / f"round-{rounds}", rounds + 1
        for stage in STAGES: kill_stage(stage, planned[stage], counts, chance, work, shards, seconds[stage], writes[stage])
        if wrong := differences(work, where / "reference"): print(f"round {rounds}: " + "; ".join(wrong)); return 1
        shutil.rmtree(work)
    print(f"{rounds} runs in {time.perf_counter() - started:.0f} s; not counted, for the stage had finished before the kill came: {counts['finished first']}")
    for names in (STAGES, KINDS): print("kills: " + ", ".join(f"{name} {counts[name]}" for name in names))
    print(f"embeddings and concepts equal byte for byte, weights bit for bit: {sum(counts[s] for s in STAGES)} kills")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="how often a process is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds of kill and their times")
    args = parser.parse_args()
    if not hasattr(os, "fork"): print("this system cannot fork a process; run the script on Linux or macOS"); sys.exit(0)
    with tempfile.TemporaryDirectory() as folder: sys.exit(main(args.kills, args.seed, Path(folder)))
