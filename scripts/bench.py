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
    for _ in range(3):
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
    ways = {"transformers, 32 captions a batch in file order": ([*range(s, min(s + 32, len(texts)))] for s in range(0, len(texts), 32)),
            "transformers, batches of like length": length_batches(lengths, 1024)}
    for (name, batches), target in zip(ways.items(), (">= 3", ">= 1.3")):
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
