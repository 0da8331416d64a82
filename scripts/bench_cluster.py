"""The clustering stage at the paper's size, on synthetic sidecars, beside scikit-learn in memory.

    python scripts/bench_cluster.py                                     # 500,000 rows of 4,096 numbers, k = 1,000
    python scripts/bench_cluster.py --rows 50000 --dim 1024 --k 200     # a small one; prints, and records nothing

Needs 4 GB of free disk for a while and, for scikit-learn's part, 10 GB of memory. Writes results/cluster.csv. What is done
is kept in --work and not done again, until all is: an interrupted run goes on. Threads: OMP_NUM_THREADS, 1 if it is not set.
"""

import signal

if __name__ == "__main__": signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from sklearn.cluster import MiniBatchKMeans

from kklip_nb.concepts import apply_scale, fit_scale
from kklip_nb.scale.clustering import cluster_shards, load_concepts, nearest_of
from kklip_nb.scale.embeddings import open_sidecar, read_rows, slices_of
from kklip_nb.teacher import save_embeddings
from kklip_nb.tools import write_atomically

PER_SHARD = 10_000
RESULTS = Path(__file__).resolve().parent.parent / "results"
WHAT = dict(ours="cluster_shards, a sample and 2 passes", theirs="MiniBatchKMeans, all in memory")


def synthetic_rows(shard: int, count: int, d: int, groups: int) -> np.ndarray:
    "Points around `groups` centres, as captions lie around topics; a shard's rows depend on its number alone."
    rng, centres = np.random.default_rng([1, shard]), np.random.default_rng(0).standard_normal((groups, 64), dtype=np.float32)
    lift = np.random.default_rng(2).standard_normal((64, d), dtype=np.float32) / 8
    low = centres[rng.integers(groups, size=count)] + 0.5 * rng.standard_normal((count, 64), dtype=np.float32)
    return low @ lift + 0.3 * rng.standard_normal((count, d), dtype=np.float32)


def make_sidecars(folder: Path, rows: int, d: int, groups: int) -> None:
    "Sidecars as embed_shard writes them, without teacher or pictures; those that are there stay."
    for shard, start in enumerate(range(0, rows, PER_SHARD)):
        path, keys = folder / f"{shard:05d}.safetensors", [f"{shard:05d}{i:04d}" for i in range(min(PER_SHARD, rows - start))]
        if path.exists(): continue
        save_embeddings(path, synthetic_rows(shard, len(keys), d, groups), keys, shard=path.stem, teacher="synthetic", pooling="none", layer=0, prompt="{}",
                        keys=json.dumps(keys), skipped="{}", **dict.fromkeys(("crc32", "folded"), json.dumps([zlib.crc32(k.encode()) for k in keys])))


def peak_gb() -> float:
    "The largest resident memory of this process so far, in GB; Linux counts in kB, macOS in bytes."
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def inertia_per_row(sidecars, centroids, scale) -> float:
    "Mean squared distance to the nearest centroid; not part of what is timed."
    distances = [nearest_of(apply_scale(piece, scale), centroids)[1] for s in sidecars for piece in slices_of(s, 4096)]
    return float(np.mean(np.concatenate(distances), dtype=np.float64))


def ours(sidecars, folder: Path, k: int) -> dict:
    "cluster_shards: all that the stage does, reading included."
    started = time.perf_counter()
    concepts = cluster_shards(sidecars, folder / "concepts", k, progress=True)
    return dict(seconds=time.perf_counter() - started, peak_gb=peak_gb(), inertia_per_row=inertia_per_row(sidecars, concepts.centroids, concepts.scale), passes=2)


def theirs(sidecars, folder: Path, k: int) -> dict:
    "scikit-learn on the same rows, scaled alike, all of them in memory, not counting their reading; four passes."
    concepts = folder / "concepts" / "concepts.safetensors"
    scale = load_concepts(concepts).scale if concepts.exists() else fit_scale(read_rows(s) for s in sidecars)
    points = np.empty((sum(s.shape[0] for s in sidecars), sidecars[0].shape[1]), np.float32)
    for i, s in enumerate(sidecars): points[i * PER_SHARD:i * PER_SHARD + s.shape[0]] = apply_scale(read_rows(s), scale)
    started = time.perf_counter()
    kmeans = MiniBatchKMeans(k, batch_size=4096, max_iter=4, n_init=1, max_no_improvement=None, random_state=0).fit(points)
    seconds, peak = time.perf_counter() - started, peak_gb()
    del points
    return dict(seconds=seconds, peak_gb=peak, inertia_per_row=inertia_per_row(sidecars, kmeans.cluster_centers_, scale), passes=4)


def run_part(part: str, args: argparse.Namespace) -> None:
    "One of the two, in a process of its own, so that its memory is its own; the result is a file."
    sidecars = [open_sidecar(p) for p in sorted((args.work / "embeddings").glob("*.safetensors"))]
    machine = f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} thread(s), Python {platform.python_version()}"
    line = dict(what=WHAT[part]) | globals()[part](sidecars, args.work, args.k) | dict(rows=args.rows, d=args.dim, k=args.k, seed=0, machine=machine)
    write_atomically(args.work / f"{part}.json", lambda path: path.write_text(json.dumps(line)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 500_000), ("dim", 4096), ("k", 1000)): parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--work", type=Path, help="folder of what is done so far; deleted at the end")
    parser.add_argument("--part", choices=list(WHAT), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work or Path(tempfile.gettempdir()) / f"bench-cluster-{args.rows}-{args.dim}-{args.k}"
    if args.part: run_part(args.part, args); return 0
    args.work.mkdir(parents=True, exist_ok=True)
    need, free = 2 * args.rows * args.dim, shutil.disk_usage(args.work).free
    if not (args.work / "embeddings").exists() and free < 1.2 * need: sys.exit(f"{args.work} has {free / 1e9:.1f} GB free; expected {1.2 * need / 1e9:.1f}: give --work on a larger disk")
    make_sidecars(args.work / "embeddings", args.rows, args.dim, args.k)
    for part in WHAT:
        command = [sys.executable, __file__, "--part", part, "--work", args.work, *(str(x) for n in ("rows", "dim", "k") for x in (f"--{n}", getattr(args, n)))]
        if not (args.work / f"{part}.json").exists() and (code := subprocess.run(command).returncode): return code
    lines = [json.loads((args.work / f"{part}.json").read_text()) for part in WHAT]
    for line in lines: print({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
    print({f"{k}, ours over theirs": round(lines[0][k] / lines[1][k], 3) for k in ("seconds", "peak_gb", "inertia_per_row")})
    from kklip_nb.evidence.study import write_rows  # late, for it imports much
    if (args.rows, args.dim, args.k) == (500_000, 4096, 1000): write_rows(RESULTS / "cluster.csv", [{k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in line.items()} for line in lines])
    shutil.rmtree(args.work)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; run it again to go on")
