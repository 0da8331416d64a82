"""How the recipe's settings were chosen: one factor at a time, on the validation splits alone; resumes run by run.

    python scripts/choose.py                  # fills results/runs-val.csv, writes results/choices.md
    python scripts/choose.py --tables         # only writes the table from results/runs-val.csv

The rule: the score is the mean of R@5 both ways, averaged over five seeds, each with a validation
split of its own. A setting gives way to another only where the 95 % interval of the paired difference lies above 0; else it
stays, for the reason that the recipe gives. Of several such settings the one that gains most is taken, and the others have to
prove themselves again on top of it, in the next round.
"""

import argparse
import sys

import numpy as np
from pipeline import load_material
from runs import PLAIN, RESULTS, read_rows, run_rows, workers_argument

from kklip_nb.data import write_atomically
from kklip_nb.evaluation import seed_interval
from kklip_nb.training import LAPTOP

FIRST = dict(word_table=False, beta=1.0, k=48)  # where the first round starts
SECOND = dict(word_table=True, beta=1.0, k=48)  # and the second
# name of the row: what differs from the laptop recipe, and the row it is compared with
CHOICES = {
    "CLIP": (FIRST | PLAIN, "CLIP"),
    "CLIP, lr halved": (FIRST | PLAIN | dict(lr=0.0005), "CLIP"),
    "CLIP, lr doubled": (FIRST | PLAIN | dict(lr=0.002), "CLIP"),
    "CLIP, half the epochs": (FIRST | PLAIN | dict(epochs=20), "CLIP"),
    "CLIP, word table": (SECOND | PLAIN, "CLIP"),
    "KKLIP": (FIRST, "KKLIP"),
    "KKLIP, lr halved": (FIRST | dict(lr=0.0005), "KKLIP"),
    "KKLIP, lr doubled": (FIRST | dict(lr=0.002), "KKLIP"),
    "KKLIP, half the epochs": (FIRST | dict(epochs=20), "KKLIP"),
    "KKLIP, word table": (SECOND, "KKLIP"),
    "KKLIP, no extra words": (FIRST | dict(word_batch=0), "KKLIP"),
    "KKLIP, alpha 0": (FIRST | dict(alpha=0.0), "KKLIP"),
    "KKLIP, alpha 1": (FIRST | dict(alpha=1.0), "KKLIP"),
    "KKLIP, alpha 4": (FIRST | dict(alpha=4.0), "KKLIP"),
    "KKLIP, beta 0": (FIRST | dict(beta=0.0), "KKLIP"),
    "KKLIP, beta 0.3": (FIRST | dict(beta=0.3), "KKLIP"),
    "KKLIP, beta 3": (FIRST | dict(beta=3.0), "KKLIP"),
    "KKLIP, the paper's weights": (FIRST | dict(alpha=1.0, beta=0.01), "KKLIP"),
    "KKLIP, k 16": (FIRST | dict(k=16), "KKLIP"),
    "KKLIP, k 144": (FIRST | dict(k=144), "KKLIP"),
    "KKLIP, temperature 0.03": (FIRST | dict(temperature=0.03), "KKLIP"),
    "KKLIP, temperature 0.3": (FIRST | dict(temperature=0.3), "KKLIP"),
    "second round: beta 3": (SECOND | dict(beta=3.0), "KKLIP, word table"),
    "second round: k 16": (SECOND | dict(k=16), "KKLIP, word table"),
}


def score(run: dict) -> float:
    "What the settings are chosen by: the mean of R@5 both ways, in points."
    return 50 * (float(run["i2t_r5"]) + float(run["t2i_r5"]))


def table(runs: list[dict]) -> str:
    "Score and paired difference, with 95 % t intervals over the seeds, as Markdown; a star where the interval lies above 0."
    scores = {row: np.array([score(r) for r in runs if r["row"] == row]) for row in CHOICES}
    lines = ["| | mean of R@5 both ways, validation | difference | to |", "|---|---|---|---|"]
    for row, (_, base) in CHOICES.items():
        (mean, half), cells = seed_interval(scores[row]), "– | –"
        if row != base:
            difference, spread = seed_interval(scores[row] - scores[base])
            cells = f"{difference:+.1f} ± {spread:.1f}{'*' if difference > spread else ''} | {base}"
        lines.append(f"| {row} | {mean:.1f} ± {half:.1f} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="run nothing; write the table again")
    workers_argument(parser)
    args = parser.parse_args()
    path = RESULTS / "runs-val.csv"
    runs = read_rows(path) if args.tables else run_rows({row: changed for row, (changed, _) in CHOICES.items()}, "val", path, load_material(LAPTOP, progress=True), args.workers)
    write_atomically(RESULTS / "choices.md", lambda part: part.write_text(table(runs), encoding="utf-8"))
    print(table(runs))
    return 0


if __name__ == "__main__":
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; the finished runs are kept: run the same command again")
