"""Runs that are repeated over five seeds, and the tables made from them; each resumes run by run.

    python scripts/study.py core      # the study's main rows: results/study.csv, other_words.csv, ladder.md, queries.png
    python scripts/study.py all       # all rows of the study
    python scripts/study.py choose    # how the settings were chosen, on the validation splits: results/runs-val.csv, choices.md
    python scripts/study.py core --tables    # run nothing; write the tables again
"""

import signal

if __name__ == "__main__": signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import argparse
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np

from kklip_nb.evidence.choices import SCORES, choices_table
from kklip_nb.evidence.other_words import load_queries, plot_queries, ranked_pictures, split_queries
from kklip_nb.evidence.runner import LISTS, prepare, row_material, run_tasks, split_of, tasks, texts_of
from kklip_nb.evidence.study import ROWS, ladder_table, level, other_words_lines, read_rows, row_recipe, write_rows
from kklip_nb.evidence.text_probe import student_encoder
from kklip_nb.tools import cache_dir, write_atomically
from kklip_nb.training import run_recipe

RESULTS = Path(__file__).resolve().parent.parent / "results"


def write(name: str, text: str) -> str:
    write_atomically(RESULTS / name, lambda part: part.write_text(text, encoding="utf-8"))
    return text


def write_tables(study: str, runs: list[dict]) -> str:
    "What follows from the finished runs."
    if study == "choose": return write("choices.md", "\n".join(f"**{d}**\n\n{choices_table(runs, d)}" for d in SCORES))
    if lines := other_words_lines(runs): write_rows(RESULTS / "other_words.csv", lines)
    return write("ladder.md", ladder_table(runs))


def draw_queries(runs: list[dict], count: int = 10) -> None:
    "results/queries.png: test queries in other words, drawn by lot, and what CLIP and KKLIP of seed 0 find among the pictures they have seen."
    train, found = split_of("openmoji", 0).train, {}
    for name in ("CLIP", "KKLIP"):
        row, title = ROWS[name], f"{name}: AP {level(runs, 'openmoji', name, 'words_seen_all_ap')}"
        material = row_material(row, "openmoji", 0)
        run = run_recipe(row_recipe(row, "openmoji", 0), material, train, cache_dir() / "runs", progress=True)
        queries, asked = load_queries(material.pairs), set(texts_of("openmoji")["words"])
        rows = [r for r in split_queries(queries)[1] if queries.right[r, train].any()]
        kinds = [[r for r in rows if (queries.words[r] in asked) == kind] for kind in (True, False)]
        drawn = np.concatenate([np.sort(np.random.default_rng(0).choice(kind, count, replace=False)) for kind in kinds])
        words = [queries.words[r] for r in drawn]
        found[title] = ranked_pictures(student_encoder(run.student)(words), run.image_features, train)
    right = queries.right[drawn] & np.isin(np.arange(queries.right.shape[1]), train)
    title = (f"Test words that no caption holds, drawn by lot: {count} of the {len(kinds[0])} that the teacher was asked about,\n"
             f"then {count} of the {len(kinds[1])} others; the five nearest pictures, right ones framed, and the first right one's place")
    figure = plot_queries(words, found, right, material.pairs.images, title)
    figure.savefig(RESULTS / "queries.png", dpi=80, metadata={"Software": ""})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("core", "all", "choose"))
    parser.add_argument("--tables", action="store_true", help="run nothing; write the tables again")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 3), help="processes, with one thread and about 1.5 GB each")
    args = parser.parse_args()
    study = "choose" if args.what == "choose" else "study"
    path, wanted = RESULTS / LISTS[study][1], tasks(study, core=args.what == "core")
    if not args.tables:
        prepare(wanted, args.workers)
        run_tasks(wanted, path, args.workers)
        if study == "study": draw_queries(read_rows(path))
    if not (runs := read_rows(path)): raise SystemExit(f"there are no runs in {path}; run the same command without --tables")
    print(write_tables(study, runs))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; the finished runs are kept: run the same command again")
