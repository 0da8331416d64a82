"""The clustering stage at the paper's size, on synthetic sidecars, beside scikit-learn in memory.

    python scripts/bench_cluster.py                        # 500,000 rows of 4,096 numbers, k = 1,000
    python scripts/bench_cluster.py --rows 20000 --k 100   # a small one; prints, and records nothing

Needs 10 GB of free disk for a while and, for scikit-learn's part, 12 GB of memory. Writes results/cluster.csv.
"""

import signal

if __name__ == "__main__": signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

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
from threadpoolctl import threadpool_limits

from kklip_nb.concepts import apply_scale, fit_scale
from kklip_nb.evidence.study import write_rows
from kklip_nb.scale.shards import cluster_shards, open_sidecar, read_labels, read_rows
from kklip_nb.teacher import file_hash, save_embeddings

PER_SHARD, PASSES = 10_000, 4
RESULTS = Path(__file__).resolve().parent.parent / "results"


def synthetic_rows(shard: int, count: int, d: int, groups: int) -> np.ndarray:
    "Points around `groups` centres, as captions lie around topics; a shard's rows depend on its number alone."
    rng, centres = np.random.default_rng([1, shard]), np.random.default_rng(0).standard_normal((groups, 64), dtype=np.float32)
    lift = np.random.default_rng(2).standard_normal((64, d), dtype=np.float32) / 8
    low = centres[rng.integers(groups, size=count)] + 0.5 * rng.standard_normal((count, 64), dtype=np.float32)
    return low @ lift + 0.3 * rng.standard_normal((count, d), dtype=np.float32)


def make_sidecars(folder: Path, rows: int, d: int, groups: int) -> None:
    "Sidecars as embed_shard writes them, without teacher or pictures."
    for shard, start in enumerate(range(0, rows, PER_SHARD)):
        keys = [f"{shard:05d}{i:04d}" for i in range(min(PER_SHARD, rows - start))]
        save_embeddings(folder / f"{shard:05d}.safetensors", synthetic_rows(shard, len(keys), d, groups), keys, shard=f"{shard:05d}", teacher="synthetic",
                        pooling="none", layer=0, prompt="{}", keys=json.dumps(keys), skipped="{}", distinct=len(keys), crc32=json.dumps([zlib.crc32(k.encode()) for k in keys]))


def peak_gb() -> float:
    "The largest resident memory of this process so far, in GB; Linux counts in kB, macOS in bytes."
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def inertia_per_row(sidecars, centroids, scale) -> float:
    "Mean squared distance to the nearest centroid."
    from sklearn.metrics.pairwise import euclidean_distances
    return float(np.mean(np.concatenate([euclidean_distances(apply_scale(read_rows(s), scale), centroids, squared=True).min(1) for s in sidecars])))


def ours(folder: Path, k: int) -> dict:
    "cluster_shards: fit and labels; only then the inertia, which is not part of the stage."
    sidecars, started = [open_sidecar(p) for p in sorted((folder / "embeddings").glob("*.safetensors"))], time.perf_counter()
    concepts = cluster_shards(sidecars, folder / "concepts", k, 0.1, passes=PASSES, progress=True)
    seconds, peak = time.perf_counter() - started, peak_gb()
    read_labels(folder / "concepts" / f"{sidecars[0].shard}.safetensors", sidecars[0], file_hash(folder / "concepts" / "concepts.safetensors"))
    return dict(what="cluster_shards, fit and labels", seconds=seconds, peak_gb=peak, inertia_per_row=inertia_per_row(sidecars, concepts.centroids, concepts.scale))


def theirs(folder: Path, k: int) -> dict:
    "scikit-learn on the same rows, scaled alike, all of them in memory; as many passes, mini-batches of the same size, one thread."
    sidecars = [open_sidecar(p) for p in sorted((folder / "embeddings").glob("*.safetensors"))]
    scale = fit_scale(read_rows(s) for s in sidecars)
    points = np.empty((sum(s.shape[0] for s in sidecars), sidecars[0].shape[1]), np.float32)
    for i, s in enumerate(sidecars): points[i * PER_SHARD:i * PER_SHARD + s.shape[0]] = apply_scale(read_rows(s), scale)
    started = time.perf_counter()
    with threadpool_limits(1): kmeans = MiniBatchKMeans(k, batch_size=4096, max_iter=PASSES, n_init=1, max_no_improvement=None, random_state=0).fit(points)
    seconds, peak = time.perf_counter() - started, peak_gb()
    del points
    return dict(what="MiniBatchKMeans, all in memory", seconds=seconds, peak_gb=peak, inertia_per_row=inertia_per_row(sidecars, kmeans.cluster_centers_, scale))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 500_000), ("d", 4096), ("k", 1000)): parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--part", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps((ours if args.part == "ours" else theirs)(args.folder, args.k)))
        return 0
    full = (args.rows, args.d, args.k) == (500_000, 4096, 1000)
    with tempfile.TemporaryDirectory() as folder:
        need, free = 2 * args.rows * (args.d + args.k), shutil.disk_usage(folder).free
        if free < 1.5 * need: sys.exit(f"{folder} has {free / 1e9:.1f} GB free; expected {1.5 * need / 1e9:.1f}: set TMPDIR to a larger disk")
        make_sidecars(Path(folder) / "embeddings", args.rows, args.d, args.k)
        lines = []
        for part in ("ours", "theirs"):  # each in a process of its own, so that its memory is its own
            command = [sys.executable, __file__, "--part", part, "--folder", folder, "--k", str(args.k)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode: return done.returncode
            lines.append(json.loads(done.stdout) | dict(rows=args.rows, d=args.d, k=args.k, passes=PASSES, seed=0, machine=f"{platform.machine()}, one thread, Python {platform.python_version()}"))
    for line in lines: print({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
    if full: write_rows(RESULTS / "cluster.csv", [{k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in line.items()} for line in lines])
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; nothing is recorded")
