"""What only a GPU can show, in one command: the tests marked `gpu`, a 7 B teacher, and ViT-B/32 in bfloat16.

    python scripts/gpu.py            # about ten minutes on one GPU of 40 GB or more; writes results/gpu.csv
    python scripts/gpu.py --tiny     # the same steps with tiny models on any machine; writes nothing

Weights and data are synthetic: speed and memory do not depend on what they say.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import csv
import dataclasses
import datetime
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from kklip_nb.data import openmoji_table, render_svg
from kklip_nb.scale.clustering import cluster_shards
from kklip_nb.scale.distributed import World
from kklip_nb.scale.embeddings import embed_shards, open_sidecars
from kklip_nb.scale.loader import ShardData, open_data, shard_recipe
from kklip_nb.scale.long_run import train_shards
from kklip_nb.scale.rehearsal import count_memory, peak_memory, random_teacher
from kklip_nb.scale.shards import list_shards, write_shards
from kklip_nb.teacher import Teacher, embed_captions
from kklip_nb.tools import write_atomically
from kklip_nb.training import PAPER, Recipe

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 4096  # of Llama 2 with 7 B parameters


def peak(device: torch.device) -> float:
    "GB that this process has held on the GPU at most since the last look; 0 without one."
    if device.type != "cuda": return 0.0
    found = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return found


def llama(captions: list[str], device: torch.device, tiny: bool) -> Teacher:
    "A Llama with the shape of Llama-2-7b and random weights, in bfloat16, made on the device."
    from transformers import LlamaConfig, LlamaModel
    tokenizer = random_teacher(captions, 64).tokenizer
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4) if tiny else LlamaConfig()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device: model = LlamaModel(config).eval().requires_grad_(False)
    finally: torch.set_default_dtype(before)
    return Teacher(model, tokenizer, "random Llama")


def embed(captions: list[str], device: torch.device, tiny: bool) -> dict:
    "Captions a second, all shorter than thirty tokens."
    teacher = llama(captions, device, tiny)
    how = dict(pooling="last", layer=-1, prompt=PAPER.prompt, tokens_per_batch=16_384)
    embed_captions(teacher, captions[:64], **how)
    peak(device)
    started = time.perf_counter()
    embed_captions(teacher, captions, **how)
    seconds = time.perf_counter() - started
    return dict(what=f"embed_captions, {sum(p.numel() for p in teacher.model.parameters()) / 1e9:.2f} B, bf16", per_s=len(captions) / seconds, unit="captions/s", peak_gb=peak(device))


def make_data(folder: Path, pairs: int, width: int) -> ShardData:
    "Drawings at 256 pixels in shards, with random vectors beside them."
    rows = [openmoji_table()[i % 1659] for i in range(pairs)]
    pictures = {r["path"]: render_svg(r["path"], 256) for r in rows}
    write_shards(((pictures[r["path"]], f"{r['caption']}, copy {i}") for i, r in enumerate(rows)), folder / "shards", 1000)
    urls, random = list_shards(folder / "shards"), np.random.default_rng(0)
    embed_shards(urls, folder / "embeddings", lambda captions: random.standard_normal((len(captions), width), dtype=np.float32),
                 teacher="random", pooling="none", layer=0, prompt="")
    cluster_shards(open_sidecars(folder / "embeddings", urls), folder / "concepts", min(PAPER.k, pairs // 4))
    return open_data(urls, folder / "embeddings", folder / "concepts")


def train(recipe: Recipe, data: ShardData, folder: Path, device: torch.device, width: int, compile: bool) -> dict:
    "Pairs a second of the second half of a run, and its memory beside the rehearsal's estimate."
    peak(device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    train_shards(recipe, data, folder, World(0, 1, device), precision=precision, compile=compile, workers=min(8, os.cpu_count() or 1), progress=True)
    with open(folder / "log.csv", newline="") as file: speeds = [float(line["pairs_per_s"]) for line in csv.DictReader(file)]
    estimate = peak_memory(count_memory(recipe, width, precision=precision), recipe.batch_size, recipe.batch_size)
    return dict(what=f"train_shards, {recipe.student}, {recipe.batch_size} pairs, {precision}{', compiled' if compile else ''}",
                per_s=float(np.median(speeds[len(speeds) // 2:])), unit="pairs/s", peak_gb=peak(device), estimated_gb=estimate / 1e9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, any machine, nothing is written")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("no GPU here: results/gpu.csv is left as it is. `python scripts/gpu.py --tiny` takes the same steps on a processor")
        return 1
    device = torch.device("cpu" if args.tiny else "cuda")
    if not args.tiny and subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", ROOT / "tests"], cwd=ROOT).returncode: return 1
    captions, width = [f"{r['caption']} in the rain" for r in openmoji_table()][: 32 if args.tiny else None], 16 if args.tiny else WIDTH
    lines = [embed(captions, device, args.tiny)]
    recipe = dataclasses.replace(shard_recipe(PAPER), student="kklip-laptop-vit" if args.tiny else "ViT-B-32", pretrained=None, epochs=2 if args.tiny else 4,
                                 batch_size=16 if args.tiny else 512, warmup=2)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), 64 if args.tiny else 20_000, width)
        recipe = dataclasses.replace(recipe, k=len(data.concepts.centroids))
        lines += [train(recipe, data, Path(folder) / str(compile), device, width, compile) for compile in ((False,) if args.tiny else (False, True))]
    card = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    for line in lines: print({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()})
    if not args.tiny: write(lines, card)
    return 0


def write(lines: list[dict], card: str) -> None:
    "results/gpu.csv."
    columns = ("what", "per_s", "unit", "peak_gb", "estimated_gb", "card", "torch", "date")
    def save(part: Path) -> None:
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for line in lines: writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()} | dict(card=card, torch=version("torch"), date=datetime.date.today().isoformat()))
    write_atomically(ROOT / "results" / "gpu.csv", save)


if __name__ == "__main__": sys.exit(main())
