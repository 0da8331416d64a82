"""Runs that are repeated over five seeds, and the tables made from them; each resumes run by run.

    python scripts/study.py compare    # plain CLIP against KKLIP on the test set: results/runs.csv, comparison.md, .csv and .png
    python scripts/study.py choose     # how the settings were chosen, on the validation splits: results/runs-val.csv, choices.md
    python scripts/study.py core       # the study's main rows: results/study.csv, which nbs/evidence/05_study.ipynb draws
    python scripts/study.py all        # all rows of the study
    python scripts/study.py compare --tables    # run nothing; write the tables again
"""

import signal

if __name__ == "__main__": signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import argparse
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

from kklip_nb.data import load_openmoji, split_by_base
from kklip_nb.evaluation import chance_levels
from kklip_nb.evidence.comparison import SHOWN, choices_table, comparison_differences, comparison_rows, comparison_table
from kklip_nb.evidence.runner import LISTS, prepare, run_tasks, tasks
from kklip_nb.evidence.study import plot_differences, points, read_rows, write_rows
from kklip_nb.tools import write_atomically

RESULTS = Path(__file__).resolve().parent.parent / "results"


def write_comparison(runs: list[dict]) -> str:
    "results/comparison.csv, .png and .md."
    pairs = load_openmoji()
    split = split_by_base(pairs.bases)
    write_rows(RESULTS / "comparison.csv", comparison_rows(runs))
    figure, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    plot_differences(comparison_differences(runs), {("openmoji", m): name for m, name in SHOWN.items() if points(m) == 100}, ax)
    figure.savefig(RESULTS / "comparison.png", dpi=100, metadata={"Software": ""})
    return write("comparison.md", comparison_table(runs, chance_levels(pairs.subcategories, split.test, split.train)))


def write(name: str, text: str) -> str:
    write_atomically(RESULTS / name, lambda part: part.write_text(text, encoding="utf-8"))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "choose", "core", "all"))
    parser.add_argument("--tables", action="store_true", help="run nothing; write the tables again")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 3), help="processes, with one thread and about 1.5 GB each")
    args = parser.parse_args()
    study = args.what if args.what in LISTS else "study"
    path, wanted = RESULTS / LISTS[study][1], tasks(study, core=args.what == "core")
    if not args.tables:
        prepare(wanted, args.workers)
        run_tasks(wanted, path, args.workers)
    runs = read_rows(path)
    if study == "compare": print(write_comparison(runs))
    elif study == "choose": print(write("choices.md", choices_table(runs)))
    else: print(f"results/{path.name} holds {len(runs)} runs; nbs/evidence/05_study.ipynb draws them")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; the finished runs are kept: run the same command again")
