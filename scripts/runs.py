"""What compare.py and choose.py share: rows of settings, run seed by seed, kept in one CSV file."""

import argparse
import csv
import dataclasses
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config
from tqdm.auto import tqdm

from kklip_nb.data import split_by_base, write_atomically
from kklip_nb.evaluation import evaluate
from kklip_nb.student import tokenize
from kklip_nb.training import LAPTOP, Material, Recipe, run_key, run_recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
SEEDS = range(5)
PLAIN = dict(alpha=0.0, beta=0.0)  # contrastive learning alone: plain CLIP
SHOWN = {"i2t_r1": "i→t R@1", "i2t_r5": "i→t R@5", "t2i_r1": "t→i R@1", "t2i_r5": "t→i R@5", "i2t_median_rank": "median rank",
         "zero_shot": "zero-shot", "knn_image": "kNN image", "knn_text": "kNN text"}


def recipe_of(settings: dict, seed: int) -> Recipe:
    "The laptop recipe with what a row changes."
    return dataclasses.replace(LAPTOP, seed=seed, **settings)


def key_of(settings: dict, seed: int, material: Material) -> str:
    "Changes with all that a run reads: a finished run with another key is run again."
    return run_key(recipe_of(settings, seed), material, split_by_base(material.pairs.bases, seed).train)


def one_run(row: str, settings: dict, seed: int, part: str, material: Material) -> dict:
    "Train one row with one seed and score it on one part of the split, 'val' or 'test'."
    split = split_by_base(material.pairs.bases, seed)
    run = run_recipe(recipe_of(settings, seed), material, split.train)
    def encode(captions):
        with torch.inference_mode(): return run.student.encode_text(tokenize(run.student, captions))
    scores = evaluate(run.image_features, run.text_features, encode, material.pairs.subcategories, split.train, getattr(split, part))
    return dict(row=row, seed=seed, part=part, key=key_of(settings, seed, material), n_rows=len(getattr(split, part)),
                **{k: f"{v:.5f}" for k, v in scores.items()}, torch=version("torch"), open_clip=version("open_clip_torch"),
                machine=f"{platform.machine()}, threads: {torch.get_num_threads()}")


def read_rows(path: Path) -> list[dict]:
    "A CSV file as dicts; none where there is no file."
    if not path.exists(): return []
    with open(path, encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    "A CSV file, whole or not at all."
    def write(part: Path) -> None:
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    write_atomically(path, write)


def run_rows(rows: dict[str, dict], part: str, path: Path, material: Material, workers: int) -> list[dict]:
    "Run what is missing in the file at `path`, a row of settings and a seed at a time; it is written after each of them."
    wanted = {(row, str(seed)): key_of(settings, seed, material) for row, settings in rows.items() for seed in SEEDS}
    done = [r for r in read_rows(path) if wanted.get((r["row"], r["seed"])) == r["key"]]
    todo = [(row, rows[row], seed, part) for seed in SEEDS for row in rows if (row, str(seed)) not in {(r["row"], r["seed"]) for r in done}]
    if not todo: return done
    order = list(wanted)
    with parallel_config("loky", inner_max_num_threads=1):  # one thread a worker: the numbers do not depend on how many workers there are
        runs = Parallel(workers, return_as="generator_unordered", mmap_mode="c")(delayed(one_run)(*task, material) for task in todo)
        for run in tqdm(runs, total=len(todo), desc="runs"):
            done.append({k: str(v) for k, v in run.items()})
            done.sort(key=lambda r: order.index((r["row"], r["seed"])))
            write_rows(path, done)
    return done


def workers_argument(parser: argparse.ArgumentParser) -> None:
    "--workers, for both scripts."
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 3), help="processes, with one thread and about 1.5 GB each")
