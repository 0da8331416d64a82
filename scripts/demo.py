"""The main job in a few minutes: captions, teacher, concepts, plain CLIP and KKLIP, evaluation, and a report to open in a browser.

    python scripts/demo.py [--out outputs]     # a second run finds its caches
"""

import signal

if __name__ == "__main__": signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from kklip_nb.concepts import soft_labels
from kklip_nb.data import six_rows, split_by_base
from kklip_nb.evaluation import bootstrap_interval, chance_levels, item_scores
from kklip_nb.evidence.other_words import Queries, chance_scores, load_queries, score_queries, split_queries
from kklip_nb.evidence.study import markdown_table, points, write_rows
from kklip_nb.evidence.text_probe import student_encoder
from kklip_nb.recipe import CLIP
from kklip_nb.teacher import cached_embeddings, load_embeddings, load_teacher, packaged_source, standardise
from kklip_nb.tools import cache_dir
from kklip_nb.training import LAPTOP, Material, Recipe, Run, checkpoint_path, recorded_material, run_recipe
from kklip_nb.visualization import concept_names, plot_similarities, umap_project
from report import Map, Query, make_queries, report_html

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / (sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "outputs")
RECORDED = ROOT / "nbs" / "recorded"
RECIPES = {"CLIP": CLIP, "KKLIP": LAPTOP}
HOW = dict(pooling=LAPTOP.pooling, layer=LAPTOP.layer, prompt=LAPTOP.prompt)
SHOWN = {"words_ap": "other words, AP", "i2t_r1": "i→t R@1", "i2t_r5": "i→t R@5", "t2i_r1": "t→i R@1", "t2i_r5": "t→i R@5",
         "t2i_median_rank": "t→i median rank", "zero_shot": "zero-shot", "knn_image": "kNN image", "knn_text": "kNN text"}
CREDIT = "Pictures: OpenMoji, CC BY-SA 4.0"


def say(step: str) -> None:
    "One line before each step, with the time so far."
    print(f"\n[{time.perf_counter() - STARTED:4.0f} s] {step}", flush=True)


def teacher():
    "The teacher, loaded only where something is missing; it takes a while."
    print("loading the teacher (the first time it is unpacked, which takes about 40 s)", flush=True)
    return load_teacher()


def train(name: str, recipe: Recipe, material: Material, rows: np.ndarray) -> Run:
    "Train one student, or take up its checkpoint; leave a copy in outputs/."
    checkpoint = checkpoint_path(cache_dir() / "runs", recipe, material, rows)
    if checkpoint.exists(): print(f"found {name}'s checkpoint in the cache; what it has done is not done again")
    run = run_recipe(recipe, material, rows, folder=checkpoint.parent, progress=True)
    (OUT / f"{name.lower()}.safetensors").write_bytes(checkpoint.read_bytes())
    return run


def median_interval(places: np.ndarray, bases: list[str]) -> np.ndarray:
    "95 % interval of the median: base concepts are drawn anew, each with all its rows."
    _, group = np.unique(bases, return_inverse=True)
    draws = np.random.default_rng(0).integers(group.max() + 1, size=(2000, group.max() + 1))
    return np.percentile([np.median(np.repeat(places, np.bincount(d, minlength=len(d))[group])) for d in draws], [2.5, 97.5])


def seen_queries(material: Material, split) -> tuple[Queries, list[int]]:
    "The test queries in other words that fit a training picture, and their rows among all queries."
    queries = load_queries(material.pairs)
    rows = [r for r in split_queries(queries)[1] if queries.right[r, split.train].any()]
    return Queries([queries.words[r] for r in rows], queries.right[np.ix_(rows, split.train)]), rows


def scores(run: Run, material: Material, split) -> dict[str, tuple[float, float, float]]:
    "Every metric as (value, low, high), with 95 % intervals: queries in other words on seen pictures, the rest on the test rows, where base concepts are resampled."
    pairs, encode = material.pairs, student_encoder(run.student)
    queries, _ = seen_queries(material, split)
    items = item_scores(run.image_features, run.text_features, encode, pairs.subcategories, split.train, split.test)
    values = score_queries(encode(queries.words), run.image_features[split.train], queries.right)["ap"]
    result = dict(words_ap=(values.mean(), *bootstrap_interval(values)))
    for metric in list(SHOWN)[1:]:
        values, rows = items[metric], [i for i in split.test if len(items[metric]) == len(split.test) or pairs.subcategories[i]]
        bases, is_rank = [pairs.bases[i] for i in rows], points(metric) == 1
        result[metric] = (np.median(values), *median_interval(values, bases)) if is_rank else (values.mean(), *bootstrap_interval(values, bases))
    return result


def chances(material: Material, split) -> dict[str, float]:
    "What guessing gives."
    queries, _ = seen_queries(material, split)
    return chance_levels(material.pairs.subcategories, split.test, split.train) | dict(words_ap=chance_scores(queries.right)["ap"].mean())


def comparison(table: dict[str, dict], chance: dict[str, float], n_test: int) -> tuple[str, list[list[str]]]:
    "The comparison as Markdown and as rows of cells; also outputs/comparison.csv and .md."
    lines = [dict(student=name, metric=m, value=f"{v:.4f}", low=f"{low:.4f}", high=f"{high:.4f}", chance=chance.get(m, ""))
             for name, metrics in table.items() for m, (v, low, high) in metrics.items()]
    write_rows(OUT / "comparison.csv", lines)
    cell = lambda m, values: "{:.1f} ({:.1f}–{:.1f})".format(*(points(m) * v for v in values))
    rows = [[name, *(cell(m, metrics[m]) for m in SHOWN)] for name, metrics in table.items()]
    rows.append(["guessing", *(f"{points(m) * chance[m]:.1f}" for m in SHOWN)])
    text = f"One seed, {n_test} held-out pairs, other words on the training pictures; in %, with 95 % intervals that resample base concepts (queries).\n\n" + markdown_table(["", *SHOWN.values()], rows)
    (OUT / "comparison.md").write_text(text, encoding="utf-8")
    return text, rows


def saved(figure: plt.Figure, name: str) -> Path:
    "Where the figure lies."
    figure.savefig(OUT / name, dpi=100)
    plt.close(figure)
    return OUT / name


def draw(runs: dict[str, Run], material: Material) -> dict[str, Path]:
    "Loss curves and the six captions' similarities: title → file."
    losses, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for ax, part in zip(axes, ("contrastive", "distillation", "concept")):
        for (name, run), style in zip(runs.items(), ("--", "-")): ax.plot([h[part] for h in run.history], style, color="black", label=name)
        ax.set(xlabel="step", ylabel=f"{part} loss", title=f"{part} loss on training batches", yscale="log" if part == "distillation" else "linear")
    axes[0].legend()
    similarities, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    six = six_rows(material.pairs.captions)
    for ax, (name, run) in zip(axes, runs.items()):
        plot_similarities(unit(run.image_features[six]) @ unit(run.text_features[six]).T, [material.pairs.captions[i] for i in six], ax, name)
    return {"Losses on training batches": saved(losses, "losses.png"),
            "Six images and their captions: cosines": saved(similarities, "similarities.png")}


def unit(features: torch.Tensor | np.ndarray) -> np.ndarray:
    "Rows of length one."
    return torch.nn.functional.normalize(torch.as_tensor(features), dim=1).numpy()


def drawn_queries(runs: dict[str, Run], material: Material, split) -> list[Query]:
    "Test queries in other words, drawn by a fixed seed; the teacher compares them with captions, since it sees no pictures."
    queries, rows = seen_queries(material, split)
    drawn = np.random.default_rng(0).choice(len(rows), min(40, len(rows)), replace=False)
    words, pictures = [queries.words[i] for i in drawn], split.train
    similarities = {name: unit(student_encoder(run.student)(words)) @ unit(run.image_features[pictures]).T for name, run in runs.items()}
    asked = load_embeddings(RECORDED / "queries-last-29-prompt.safetensors", load_queries(material.pairs).words, **HOW)[rows][drawn]
    captions, mean = material.embeddings[pictures], material.embeddings[pictures].mean(0)
    similarities["teacher"] = standardise(asked, mean) @ standardise(captions, mean).T
    return make_queries(words, queries.right[drawn], similarities, pictures)


def concept_maps(runs: dict[str, Run], material: Material, split, embeddings: np.ndarray) -> list[Map]:
    "The held-out captions as the teacher and the students see them; a map of training rows would show memory."
    concepts, teacher = runs["KKLIP"].concepts, embeddings[split.test]
    to_centroid = np.linalg.norm(embeddings[split.train] - concepts.centroids[concepts.labels], axis=1)
    labels = soft_labels(teacher, concepts.centroids, LAPTOP.temperature).argmax(1)
    names = concept_names([material.pairs.captions[i] for i in split.train], concepts.labels, distances=to_centroid)
    spaces = {name: run.text_features[split.test].numpy() for name, run in runs.items()} | {"teacher": teacher}
    maps = [Map(f"{name}: held-out captions", umap_project(x), split.test.tolist(), labels, names) for name, x in spaces.items()]
    return maps


def report(runs: dict[str, Run], table: dict[str, dict], rows: list[list[str]], material: Material, split) -> Path:
    "outputs/report.html: all that this run has to show, in one file."
    embeddings = standardise(material.embeddings, material.embeddings[split.train].mean(0))
    ap, r5 = ({name: 100 * metrics[m][0] for name, metrics in table.items()} for m in ("words_ap", "t2i_r5"))
    n, of = len(seen_queries(material, split)[1]), lambda found: ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    answer = [f"Asked in {n} other words, which no caption holds, KKLIP finds the pictures it has seen with an average precision of {ap['KKLIP']:.1f} %, CLIP with {ap['CLIP']:.1f} %.",
              f"Asked by the names of {len(split.test)} held-out pictures, the right one is among the first five in these per cent of cases: {of(r5)}.",
              "CLIP learns from pairs alone. KKLIP has a language model as teacher: of 10,000 words first, then of the captions beside the pairs.",
              "One run each, from one seed. The table is in percent, but for the median rank; its intervals resample base concepts, or queries."]
    cells = [[cell.replace(" (", "\n(") for cell in row] for row in rows]
    page = report_html("CLIP and KKLIP: one run", answer, ["", *SHOWN.values()], cells, drawn_queries(runs, material, split),
                       concept_maps(runs, material, split, embeddings), material.pairs.images, material.pairs.captions, CREDIT, draw(runs, material))
    (OUT / "report.html").write_text(page, encoding="utf-8")
    return OUT / "report.html"


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    say("pairs, words and the teacher's embeddings")
    cached = any((cache_dir() / "embeddings").glob("*.safetensors"))
    if cached: print(f"what is in the cache is not computed again: {cache_dir()}")
    material = recorded_material(RECORDED, LAPTOP)
    embeddings = cached_embeddings(material.pairs.captions, teacher, packaged_source(), **HOW, progress=True)
    material = material._replace(embeddings=embeddings)
    split = split_by_base(material.pairs.bases, LAPTOP.seed)
    print(f"{len(material.pairs.captions)} pairs: {len(split.train)} to train, {len(split.val)} to validate, {len(split.test)} to test; "
          f"{len(material.words)} words without images, whose embeddings are recorded")
    runs = {}
    for name, recipe in RECIPES.items():
        say(f"training {name}")
        runs[name] = train(name, recipe, material, split.train)
    say("evaluating on held-out concepts")
    table = {name: scores(run, material, split) for name, run in runs.items()}
    text, rows = comparison(table, chances(material, split), len(split.test))
    say("drawing the report")
    page = report(runs, table, rows, material, split)
    say("done\n")
    print(text)
    committed = ROOT / "results" / "ladder.md"
    if committed.exists(): print("The committed study over five seeds, from `make study-core` (not computed now):\n\n" + committed.read_text(encoding="utf-8"))
    for path in sorted(OUT.iterdir()): print(path)
    print(f"\nOpen this in a browser: {page.as_uri()}")
    return 0


if __name__ == "__main__":
    STARTED = time.perf_counter()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("\ninterrupted; nothing is broken: the same command goes on from the caches")
