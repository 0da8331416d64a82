"""The study behind notebook 10: one factor at a time, five seeds, two worlds; resumes run by run.

    python scripts/study.py --core            # plain CLIP, each objective alone, both, and a shuffled teacher
    python scripts/study.py                   # all rows

Fills results/study.csv: a line for each world, row and seed, with settings, scores, versions and the processor time.
"""

import quiet  # first, so that Ctrl-C during the imports below prints no traceback

import argparse
import sys

from joblib import Parallel, delayed, parallel_config
from runs import RESULTS, read_rows, workers_argument, write_rows
from study_runs import ENCODER_VECTORS, all_word_pictures, base_material, key_of, one_run, row_material, teacher_vectors, train_reader
from tqdm.auto import tqdm

from kklip_nb.evidence.study import CORE, ENCODERS, ROWS, SEEDS, WORLDS
from kklip_nb.student import build_student, cached_trunk_features
from kklip_nb.training import LAPTOP

PATH = RESULTS / "study.csv"
CORE_ENCODERS = ("T5", "random encoder", "bag of words", "teacher")


def tasks(core: bool) -> list[tuple[str, str, int]]:
    "World, row and seed of every run: the core first, then row by row, so that what is stopped leaves whole rows."
    runs = [("scenes", n, s) for n in CORE_ENCODERS for s in SEEDS] + [(w, n, s) for n in CORE for s in SEEDS for w in WORLDS]
    if core: return runs
    runs += [(w, n, s) for n, row in ROWS.items() if n not in CORE for w in row.worlds for s in SEEDS]
    return runs + [("scenes", n, s) for n in ENCODERS if n not in CORE_ENCODERS for s in SEEDS]


def prepare(wanted: list, workers: int) -> None:
    "What all runs share, once: teacher vectors, pictures, trunk features, readers."
    for world, name, seed in wanted:
        if name in ROWS: row_material(ROWS[name], world, seed)
        elif name in ENCODER_VECTORS: teacher_vectors("scenes", ENCODER_VECTORS[name], "pairs")
    student = build_student(LAPTOP.student, imagenet=LAPTOP.imagenet)
    for world in ("openmoji", "scenes"): cached_trunk_features(student, base_material(world).pairs.images, progress=True)
    cached_trunk_features(student, all_word_pictures())
    with parallel_config("loky", inner_max_num_threads=1): Parallel(workers)(delayed(train_reader)(seed) for seed in SEEDS)


def columns(lines: list[dict]) -> list[dict]:
    "The same columns in every line, blank where a world has no such score; versions last."
    last = ["seconds", "torch", "open_clip", "transformers", "machine"]
    names = list(dict.fromkeys(k for line in lines for k in line if k not in last)) + last
    return [{k: str(line.get(k, "")) for k in names} for line in lines]


def run_study(wanted: list, workers: int) -> None:
    "Run what is missing in results/study.csv; the file is written after each run."
    kept = read_rows(PATH)
    done = {(r["world"], r["row"], int(r["seed"])): r for r in kept}
    todo = [t for t in wanted if t not in done or done[t]["key"] != key_of(*t)]
    for task in todo: done.pop(task, None)
    order = {t: i for i, t in enumerate(tasks(core=False))}
    with parallel_config("loky", inner_max_num_threads=1):  # one thread a worker: the numbers do not depend on how many workers there are
        for line in tqdm(Parallel(workers, return_as="generator_unordered")(delayed(one_run)(*t) for t in todo), total=len(todo), desc="runs"):
            done[line["world"], line["row"], line["seed"]] = line
            write_rows(PATH, columns([done[t] for t in sorted(done, key=lambda t: order.get(t, 10**6))]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", action="store_true", help="only the rows of the main question")
    workers_argument(parser)
    args = parser.parse_args()
    wanted = tasks(args.core)
    prepare(wanted, args.workers)
    run_study(wanted, args.workers)
    print(f"{PATH.relative_to(RESULTS.parent)} holds {len(read_rows(PATH))} runs; nbs/evidence/04_study.ipynb draws them")
    return 0


if __name__ == "__main__":
    quiet.listen()
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit("interrupted; the finished runs are kept: run the same command again")
