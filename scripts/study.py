"""Runs that are repeated over five seeds, and the tables made from them; each resumes run by run.

    python scripts/study.py core      # the study's main rows: results/study.csv, other_words.csv, ladder.md and queries.png
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

from kklip_nb.evidence.choices import SCORES, choices_table
from kklip_nb.evidence.runner import LISTS, prepare, run_tasks, tasks
from kklip_nb.evidence.study import ladder_table, other_words_lines, read_rows, write_rows
from kklip_nb.tools import write_atomically

RESULTS = Path(__file__).resolve().parent.parent / "results"


def write(name: str, text: str) -> str:
    write_atomically(RESULTS / name, lambda part: part.write_text(text, encoding="utf-8"))
    return text


def write_tables(study: str, runs: list[dict]) -> str:
    "What follows from the finished runs."
    if study == "choose": return write("choices.md", "\n".join(f"**{d}**\n\n{choices_table(runs, d)}" for d in SCORES))
    write_rows(RESULTS / "other_words.csv", other_words_lines(runs))
    return write("ladder.md", ladder_table(runs))


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
    print(write_tables(study, read_rows(path)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; the finished runs are kept: run the same command again")
