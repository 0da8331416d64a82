"""Recompute the multi-seed comparison of plain CLIP with KKLIP on the test set; resumes run by run.

    python scripts/compare.py                 # fills results/runs.csv, writes results/comparison.md, .csv and .png
    python scripts/compare.py --tables        # only writes the tables from results/runs.csv
"""

import argparse
import sys

import matplotlib.pyplot as plt
import numpy as np
from pipeline import load_material
from runs import PLAIN, RESULTS, SHOWN, read_rows, run_rows, workers_argument, write_rows

from kklip_nb.data import split_by_base, write_atomically
from kklip_nb.evaluation import chance_levels, seed_interval
from kklip_nb.training import LAPTOP

WHOLE = dict(student="kklip-laptop-vit", train_image="all", imagenet=False)
# name of the row: what differs from the laptop recipe, and the plain CLIP it is compared with
ROWS = {
    "CLIP": (PLAIN, "CLIP"),
    "KKLIP": (dict(), "CLIP"),
    "KKLIP without the extra words": (dict(word_batch=0), "CLIP"),
    "CLIP, random tokens": (PLAIN | dict(word_table=False), "CLIP, random tokens"),
    "KKLIP, random tokens": (dict(word_table=False), "CLIP, random tokens"),
    "CLIP, whole image tower": (PLAIN | WHOLE, "CLIP, whole image tower"),
    "KKLIP, whole image tower": (WHOLE, "CLIP, whole image tower"),
}


def summarise(runs: list[dict], rows: dict[str, tuple[dict, str]]) -> list[dict]:
    "Mean over seeds, half width of its 95 % interval, and the paired difference to the row's plain CLIP, per row and metric."
    table = []
    for row, (_, base) in rows.items():
        mine = {int(r["seed"]): r for r in runs if r["row"] == row}
        plain = {int(r["seed"]): r for r in runs if r["row"] == base}
        seeds = sorted(mine.keys() & plain.keys())
        if len(seeds) < 2: continue
        for metric in SHOWN:
            values = np.array([float(mine[s][metric]) for s in seeds])
            mean, half = seed_interval(values)
            entry = dict(row=row, metric=metric, seeds=len(seeds), mean=mean, half_width=half)
            difference, spread = seed_interval(values - [float(plain[s][metric]) for s in seeds]) if row != base else (0.0, 0.0)
            table.append(entry | dict(compared_with=base, difference=difference, difference_half_width=spread))
    return table


def markdown(table: list[dict], chance: dict[str, float]) -> str:
    "The comparison as a Markdown table; a star where the interval of the paired difference does not hold 0."
    lines = ["| | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for row in dict.fromkeys(e["row"] for e in table):
        cells = {e["metric"]: e for e in table if e["row"] == row}
        lines.append(f"| {row} | " + " | ".join(_cell(m, cells[m]) for m in SHOWN) + " |")
    guess = [f"{100 * chance[m]:.1f}" if "rank" not in m else f"{chance[m]:.0f}" for m in SHOWN if m in chance]
    if guess: lines.append("| *guessing* | " + " | ".join(guess) + " |" + " – |" * (len(SHOWN) - len(guess)))
    return "\n".join(lines) + "\n"


def _cell(metric: str, e: dict) -> str:
    scale, digits = (1, 1) if "rank" in metric else (100, 1)
    star = "*" if abs(e["difference"]) > e["difference_half_width"] > 0 else ""
    return f"{scale * e['mean']:.{digits}f} ± {scale * e['half_width']:.{digits}f}{star}"


def draw(table: list[dict]) -> None:
    "results/comparison.png: paired differences to plain CLIP with their intervals."
    rows = [r for r, (_, base) in ROWS.items() if r != base]
    metrics = [m for m in SHOWN if "rank" not in m]
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    for place, (row, marker) in enumerate(zip(rows, "osD^v")):
        mine = [next((e for e in table if e["row"] == row and e["metric"] == m), None) for m in metrics]
        if None in mine: continue
        x = np.arange(len(metrics)) + (place - (len(rows) - 1) / 2) * 0.16
        ax.errorbar(x, [100 * e["difference"] for e in mine], [100 * e["difference_half_width"] for e in mine], fmt=marker,
                    capsize=3, color=plt.cm.viridis(place / len(rows)), label=f"{row} − {mine[0]['compared_with']}")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(range(len(metrics)), [SHOWN[m] for m in metrics])
    ax.set(ylabel="difference in points", title="KKLIP against the plain CLIP of the same start: above the line is better\n"
           "(mean over five seeds, 95 % interval of the paired difference, held-out concepts)")
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=2)
    figure.savefig(RESULTS / "comparison.png", dpi=100, metadata={"Software": ""})
    plt.close(figure)


def write_tables(runs: list[dict], material_classes: list, bases: list[str]) -> str:
    "results/comparison.csv and .md from the runs."
    table = summarise(runs, ROWS)
    write_rows(RESULTS / "comparison.csv", [{k: f"{v:.5f}" if isinstance(v, float) else v for k, v in e.items()} for e in table])
    draw(table)
    split = split_by_base(bases)
    text = markdown(table, chance_levels(material_classes, split.test, split.train))
    write_atomically(RESULTS / "comparison.md", lambda part: part.write_text(text, encoding="utf-8"))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="run nothing; write the tables again")
    workers_argument(parser)
    args = parser.parse_args()
    material, path = load_material(LAPTOP, progress=True), RESULTS / "runs.csv"
    settings = {row: changed for row, (changed, _) in ROWS.items()}
    runs = read_rows(path) if args.tables else run_rows(settings, "test", path, material, args.workers)
    print(write_tables(runs, material.pairs.subcategories, material.pairs.bases))
    return 0


if __name__ == "__main__":
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; the finished runs are kept: run the same command again")
