"""Every speed that the course speaks of, as a ratio, side by side in one run.

    python scripts/bench.py                 # about ten minutes on two cores; writes results/bench.csv and results/bench.md
    python scripts/bench.py losses teacher  # only these groups; the other lines of the table stay

Ours and theirs run in turn, A B A B …; the ratio is the median over the turns, so that a machine that slows down slows both.
A target says what the ratio should be; the table says whether it is.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "results" / "bench.csv"


class Line(NamedTuple):
    "One comparison."
    group: str
    what: str
    theirs: str  # what it is compared with
    ours_value: float
    theirs_value: float
    unit: str
    ratio: float  # ours / theirs
    target: str  # such as '<= 1.2'; '' without one


def interleaved(ours: Callable, theirs: Callable, turns: int = 7, inner: int = 1) -> tuple[float, float, float]:
    "Seconds a call of each, the best of the turns, and the median over the turns of ours / theirs."
    times: tuple[list, list] = ([], [])
    for call in (ours, theirs): call()
    for _ in range(turns):
        for kept, call in zip(times, (ours, theirs)):
            started = time.perf_counter()
            for _ in range(inner): call()
            kept.append((time.perf_counter() - started) / inner)
    return min(times[0]), min(times[1]), statistics.median(a / b for a, b in zip(*times))


def holds(line: Line) -> str:
    "yes or no: does the ratio meet the target?"
    if not line.target: return ""
    sign, bound = line.target.split()[:2]
    value = line.ours_value - line.theirs_value if line.target.endswith("µs more") else line.ratio
    return "yes" if (value <= float(bound) if sign == "<=" else value >= float(bound)) else "no"


# --- losses

def losses() -> Iterator[Line]:
    "One call of each loss beside torch's or open_clip's own, forward alone."
    from open_clip.loss import ClipLoss

    from kklip_nb.losses import concept_loss, contrastive_loss
    torch.manual_seed(0)
    for n, k in ((64, 48), (256, 1000)):
        logits, labels = torch.randn(n, k), torch.randn(n, k).softmax(1)
        ours, theirs, ratio = interleaved(lambda: concept_loss(logits, labels), lambda: F.cross_entropy(logits, labels), 15, 200)
        yield Line("losses", f"concept_loss, {n} × {k}", "F.cross_entropy", 1e6 * ours, 1e6 * theirs, "µs", ratio, "<= 20 µs more")
    images, texts = torch.randn(2, 256, 512)
    clip = ClipLoss()
    ours, theirs, ratio = interleaved(lambda: contrastive_loss(images, texts, 14.3),
                                      lambda: clip(F.normalize(images, dim=1), F.normalize(texts, dim=1), torch.tensor(14.3)), 15, 50)
    yield Line("losses", "contrastive_loss, 256 × 512", "open_clip.ClipLoss", 1e6 * ours, 1e6 * theirs, "µs", ratio, "")


CHUNKED = """
import resource, sys, time, torch, torch.nn.functional as F
from open_clip.loss import ClipLoss
from kklip_nb.losses import contrastive_loss
n, who = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
images, texts, scale = torch.randn(n, 512, requires_grad=True), torch.randn(n, 512, requires_grad=True), torch.tensor(14.3, requires_grad=True)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def loss():
    if who == "ours": return contrastive_loss(images, texts, scale, chunk=1024)
    return ClipLoss()(F.normalize(images, dim=1), F.normalize(texts, dim=1), scale)
before, started = peak(), time.perf_counter()
loss().backward()
print(time.perf_counter() - started, peak() - before)
"""


def chunked(n: int = 32_768) -> Iterator[Line]:
    "The contrastive loss over a large batch, forward and backward, each in a process of its own."
    found: dict[str, list] = {"ours": [], "theirs": []}
    for _ in range(1 if n > 16_384 else 3):  # a large batch takes minutes
        for who, kept in found.items():
            out = subprocess.run([sys.executable, "-c", CHUNKED, str(n), who], capture_output=True, text=True, check=True).stdout
            kept.append([float(x) for x in out.split()])
    seconds = [(a[0], b[0]) for a, b in zip(*found.values())]
    ours, theirs = (min(r[0] for r in kept) for kept in found.values())
    yield Line("losses", f"contrastive_loss(chunk=1024), {n:,} × 512, time", "open_clip.ClipLoss", ours, theirs, "s", statistics.median(a / b for a, b in seconds), "<= 1.2")
    ours, theirs = (statistics.median(r[1] for r in kept) / 1e6 for kept in found.values())
    yield Line("losses", f"contrastive_loss(chunk=1024), {n:,} × 512, memory", "open_clip.ClipLoss", ours, theirs, "GB", ours / theirs, "<= 0.25")


# --- teacher

def teacher() -> Iterator[Line]:
    "Captions a second of the course's teacher and prompt: a plain loop, batches of like length, and what embed_captions does."
    from kklip_nb.data import load_openmoji
    from kklip_nb.teacher import POOLINGS, embed_captions, hidden_states, length_batches, load_teacher
    from kklip_nb.training import LAPTOP
    model = load_teacher()
    captions = [str(c) for c in np.random.default_rng(0).choice(load_openmoji().captions, 256, replace=False)]
    texts = [LAPTOP.prompt.replace("{}", c) for c in captions]

    def run(batches) -> np.ndarray:
        vectors = np.empty((len(texts), model.model.config.hidden_size), np.float32)
        for rows in batches:
            states, mask = hidden_states(model, [texts[r] for r in rows])
            vectors[rows] = POOLINGS[LAPTOP.pooling](states[LAPTOP.layer], mask).numpy()
        return vectors

    def ours() -> np.ndarray: return embed_captions(model, captions, LAPTOP.pooling, LAPTOP.layer, LAPTOP.prompt)
    lengths = [len(ids) for ids in model.tokenizer(texts)["input_ids"]]
    ways = {"transformers, one caption at a time": ([r] for r in range(len(texts))),
            "transformers, 32 captions a batch in file order": ([*range(s, min(s + 32, len(texts)))] for s in range(0, len(texts), 32)),
            "transformers, batches of like length": length_batches(lengths, 1024)}
    for (name, batches), target in zip(ways.items(), (">= 3", ">= 3", ">= 1.3")):
        batches = list(batches)
        np.testing.assert_allclose(ours(), run(batches), atol=1e-4 * abs(run(batches)).max())
        mine, plain, ratio = interleaved(ours, lambda batches=batches: run(batches), 3)
        yield Line("teacher", "embed_captions", name, len(texts) / mine, len(texts) / plain, "captions/s", 1 / ratio, target)


# --- text: batches cut to their longest caption

def text() -> Iterator[Line]:
    "Forward and backward of a text tower, on batches cut to their longest caption and on whole ones."
    from kklip_nb.data import load_openmoji
    from kklip_nb.student import build_student, cut_padding, tokenize
    captions = load_openmoji().captions[:256]
    for name, count, what in (("kklip-laptop", 256, "text tower, context of 12"), ("ViT-B-32", 32, "text tower of ViT-B/32, context of 77")):
        student = build_student(name, imagenet=False)
        whole = tokenize(student, captions[:count])
        cut = cut_padding(whole)
        torch.testing.assert_close(student.encode_text(cut), student.encode_text(whole), rtol=1e-4, atol=1e-5)
        ours, theirs, ratio = interleaved(lambda: student.encode_text(cut).sum().backward(), lambda: student.encode_text(whole).sum().backward(), 5)
        yield Line("text", f"{what}: cut to {cut.shape[1]} tokens", "the whole context", 1e3 * ours, 1e3 * theirs, "ms", ratio, "")


# --- one training step

def step() -> Iterator[Line]:
    "KKLIP's step on pairs beside plain CLIP's as open_clip's training computes it: the same towers, batch and optimiser."
    import dataclasses

    import open_clip
    from open_clip.loss import ClipLoss

    from kklip_nb.data import load_openmoji, split_by_base
    from kklip_nb.training import LAPTOP, batch_of, build_student, make_optimizer, make_targets, prepare_inputs, recorded_material, train_step
    material = recorded_material(ROOT / "nbs" / "recorded", LAPTOP)
    rows = split_by_base(load_openmoji().bases).train
    targets, _, labels = make_targets(material.embeddings, rows, LAPTOP)
    for name, recipe in (("frozen trunk", LAPTOP), ("small ViT, all of it", dataclasses.replace(LAPTOP, student="kklip-laptop-vit", train_image="all", imagenet=False))):
        student, plain = (build_student(recipe.student, None, targets.shape[1], recipe.k, recipe.imagenet, recipe.train_image) for _ in range(2))
        inputs = prepare_inputs(student, material.pairs, targets, labels)
        whole = open_clip.tokenize(material.pairs.captions, context_length=plain.clip.context_length)
        clip, loss, chosen = plain.clip, ClipLoss(), torch.as_tensor(rows[:256])
        ours_optimizer, optimizer = make_optimizer(student, 1e-4, 0.1), make_optimizer(clip, 1e-4, 0.1)

        def ours() -> None: train_step(student, ours_optimizer, batch_of(inputs, rows[:256]), recipe, 1e-4)

        def theirs() -> None:
            images, tokens = inputs.images[chosen], whole[chosen]
            optimizer.zero_grad()
            image_features, text_features, scale = _open_clip_features(clip, images, tokens)
            total = loss(image_features, text_features, scale)
            total.backward()
            optimizer.step()
            with torch.no_grad(): clip.logit_scale.clamp_(0, 4.6052)
            total.item()
        mine, plain_time, ratio = interleaved(ours, theirs, 25)
        yield Line("step", f"KKLIP's step, 256 pairs, {name}", "CLIP's, as open_clip trains it", 1e3 * mine, 1e3 * plain_time, "ms", ratio, "<= 1.0")


def _open_clip_features(clip, images: torch.Tensor, tokens: torch.Tensor) -> tuple:
    "What a CLIP returns; where the trunk has been run before, its head alone."
    if images.ndim == 4: return clip(images, tokens)[:3]
    return F.normalize(clip.visual.head(images), dim=-1), clip.encode_text(tokens, normalize=True), clip.logit_scale.exp()


# --- pictures, and whole training on shards

def make_data(folder: Path, count: int, side: int, per_shard: int = 100):
    "Shards of drawings as JPEG, with random vectors beside them and concepts of these."
    from kklip_nb.data import openmoji_table, render_svg
    from kklip_nb.scale.clustering import cluster_shards
    from kklip_nb.scale.embeddings import embed_shards, open_sidecars
    from kklip_nb.scale.loader import open_data
    from kklip_nb.scale.shards import list_shards, write_shards
    rows = openmoji_table()[:count]
    write_shards(((render_svg(r["path"], side), r["caption"]) for r in rows), folder / "shards", per_shard, side)
    urls, rng = list_shards(folder / "shards"), np.random.default_rng(0)
    embed_shards(urls, folder / "embeddings", lambda captions: rng.standard_normal((len(captions), 64), dtype=np.float32),
                 teacher="random", pooling="none", layer=0, prompt="{}")
    cluster_shards(open_sidecars(folder / "embeddings", urls), folder / "concepts", 8)
    return open_data(urls, folder / "embeddings", folder / "concepts")


def open_clip_data(data, preprocess, context_length: int, batch_size: int, workers: int):
    "open_clip_train's loader over the same shards."
    import open_clip
    from functools import partial

    import open_clip_train.data as theirs
    from webdataset.tariterators import tar_file_expander
    theirs.tar_file_expander = partial(tar_file_expander, eof_value=None)  # else it trips over the end marks of this webdataset
    pattern = "::".join(data.urls)
    args = argparse.Namespace(train_data=pattern, train_num_samples=sum(map(len, data.captions)), dataset_resampled=False, seed=0, batch_size=batch_size,
                              workers=workers, world_size=1, train_data_upsampling_factors=None)
    return theirs.get_wds_dataset(args, preprocess, True, tokenizer=open_clip.SimpleTokenizer(context_length=context_length))


def pictures() -> Iterator[Line]:
    "Pictures a second from shards of 512-pixel JPEGs to batches of 224 pixels, with two worker processes and no model."
    import dataclasses

    import open_clip

    from kklip_nb.data import openmoji_table, render_svg
    from kklip_nb.own_pairs import decode_image, read_image
    from kklip_nb.scale.loader import read_steps, shard_recipe
    from kklip_nb.student import build_student
    from kklip_nb.training import LAPTOP
    from PIL import Image
    import io
    buffer = io.BytesIO()
    Image.fromarray(render_svg(openmoji_table()[0]["path"], 512)).save(buffer, "JPEG", quality=95)

    def through_rgba() -> np.ndarray:
        image = Image.open(io.BytesIO(buffer.getvalue())).convert("RGBA").resize((224, 224), Image.Resampling.BICUBIC, reducing_gap=2.0)
        square = Image.new("RGBA", (224, 224), "white")
        square.alpha_composite(image)
        return np.asarray(square.convert("RGB"))
    np.testing.assert_array_equal(through_rgba(), read_image(buffer.getvalue(), 224))
    ours, theirs, ratio = interleaved(lambda: read_image(buffer.getvalue(), 224), through_rgba, 15, 10)
    yield Line("pictures", "read_image, a JPEG of 512 pixels", "Pillow by way of RGBA", 1e3 * ours, 1e3 * theirs, "ms", ratio, "")
    assert decode_image(buffer.getvalue()).size == (512, 512)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), 1600, 512)
        student = build_student("ViT-B-32", imagenet=False, train_image="all", teacher_dim=64, n_concepts=8)
        recipe = dataclasses.replace(shard_recipe(LAPTOP), student="ViT-B-32", imagenet=False, train_image="all", batch_size=100, epochs=1, k=8)
        transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.clip)), is_train=True)
        loader = open_clip_data(data, transform, 77, 50, 2).dataloader
        count = sum(map(len, data.captions))
        ours, theirs, ratio = interleaved(lambda: [None for _ in read_steps(student, data, recipe, 2, workers=2)], lambda: [None for _ in loader], 2)
        yield Line("pictures", "loader, 512 → 224 pixels, 2 workers", "open_clip_train's loader", count / ours, count / theirs, "pictures/s", 1 / ratio, "")


def training() -> Iterator[Line]:
    "An epoch on shards, everything included, beside open_clip_train: the same towers, data, batch and precision."
    import dataclasses

    import open_clip
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    from kklip_nb.scale.distributed import start_world
    from kklip_nb.scale.long_run import train_shards
    from kklip_nb.scale.loader import shard_recipe
    from kklip_nb.student import build_student
    from kklip_nb.training import LAPTOP, make_optimizer
    recipe = dataclasses.replace(shard_recipe(LAPTOP), student="kklip-laptop-vit", imagenet=False, train_image="all", batch_size=128, epochs=2, k=8, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        data, runs = make_data(Path(folder), 1600, 64), iter(range(1000))
        clip = build_student("kklip-laptop-vit", imagenet=False, train_image="all").clip
        clip.output_dict = True
        transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(clip)), is_train=True)
        optimizer, loader = make_optimizer(clip, 1e-3, 0.1), open_clip_data(data, transform, clip.context_length, 128, 1)
        args = argparse.Namespace(device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=None, horovod=False, rank=0,
                                  log_every_n_steps=1000, batch_size=128, world_size=1, wandb=False, local_rank=0, save_logs=False, distributed=False)

        def ours() -> None:
            with start_world() as world: train_shards(recipe, data, Path(folder) / f"run{next(runs)}", world, streams=1, workers=1, save_every=10**6)

        def theirs() -> None:
            for epoch in range(recipe.epochs): train_one_epoch(clip, {"train": loader}, ClipLoss(), epoch, optimizer, None, None, None, args)
        mine, plain, ratio = interleaved(ours, theirs, 3)
        pairs = recipe.epochs * sum(map(len, data.captions))
        yield Line("training", "train_shards, KKLIP, small ViT, one worker", "open_clip_train, CLIP", pairs / mine, pairs / plain, "pairs/s", 1 / ratio, "")


# --- k-means

def kmeans() -> Iterator[Line]:
    "The clustering stage on sidecars beside scikit-learn with all rows in memory; the paper's size is in results/cluster.csv."
    for size in (["--rows", "50000", "--dim", "512", "--k", "200"],):
        out = subprocess.run([sys.executable, ROOT / "scripts" / "bench_cluster.py", *size], capture_output=True, text=True, check=True).stdout
        ours, theirs = (eval(line) for line in out.splitlines()[:2])  # noqa: S307, our own script's dicts
        for name, unit, target in (("seconds", "s", "<= 1.2"), ("inertia_per_row", "a row", "<= 1.01"), ("peak_gb", "GB", "")):
            yield Line("kmeans", f"cluster_shards, {size[1]} × {size[3]}, k = {size[5]}: {name}", "MiniBatchKMeans in memory", ours[name], theirs[name], unit,
                       ours[name] / theirs[name], target)


# --- all of them

GROUPS = dict(losses=losses, chunked=chunked, teacher=teacher, text=text, step=step, pictures=pictures, training=training, kmeans=kmeans)
COLUMNS = ("group", "what", "theirs", "ours_value", "theirs_value", "unit", "ratio", "target", "holds", "machine", "date")


def machine() -> str:
    "Processor, cores, threads and versions, in words."
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "open_clip_torch", "transformers", "scikit-learn"))
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}"


def as_row(line: Line) -> dict[str, str]:
    "A line of the CSV file."
    numbers = {k: f"{getattr(line, k):.4g}" for k in ("ours_value", "theirs_value", "ratio")}
    return line._asdict() | numbers | dict(holds=holds(line), machine=machine(), date=datetime.date.today().isoformat())


def markdown(rows: list[dict[str, str]]) -> str:
    "results/bench.md."
    from kklip_nb.evidence.study import read_rows
    lines = ["# Speed, side by side", "", "Made by `make bench`. Ours and theirs run in turn in one process; the ratio is the median over the turns.", "",
             "| what | compared with | ours | theirs | unit | ours / theirs | target | holds |", "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {r['what']} | {r['theirs']} | {r['ours_value']} | {r['theirs_value']} | {r['unit']} | {r['ratio']} | {r['target']} | {r['holds']} |" for r in rows]
    measured = dict.fromkeys((r["machine"], r["date"]) for r in rows)
    ours, theirs = ({k: float(r[k]) for k in ("seconds", "peak_gb", "inertia_per_row")} for r in read_rows(PATH.with_name("cluster.csv")))
    whole = ", ".join(f"{k.replace('_', ' ')} {ours[k]:.4g} against {theirs[k]:.4g} ({ours[k] / theirs[k]:.3f})" for k in ours)
    lines += ["", f"The clustering stage at 500,000 × 4,096, k = 1,000, beside scikit-learn in memory (`make bench-cluster`, cluster.csv): {whole}."]
    return "\n".join([*lines, "", *(f"Measured on {m}, {d}." for m, d in measured), ""])


def main() -> int:
    from kklip_nb.evidence.study import read_rows, write_rows
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="default: all")
    args = parser.parse_args()
    rows = read_rows(PATH)
    for name in args.groups or GROUPS:
        started, found = time.perf_counter(), []
        for line in GROUPS[name]():
            found.append(as_row(line) | dict(group=name))
            print(f"{line.ratio:8.3f}  {line.target:>14} {holds(line):4} {line.what}  |  {line.theirs}: {line.ours_value:.4g} / {line.theirs_value:.4g} {line.unit}", flush=True)
        rows = [r for group in GROUPS for r in (found if group == name else [r for r in rows if r["group"] == group])]
        write_rows(PATH, [{k: r[k] for k in COLUMNS} for r in rows])
        PATH.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; the groups that are done are kept")
