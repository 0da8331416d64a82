"""Run notebooks from top to bottom and save their outputs, or check that the saved outputs belong to the code.

    python scripts/run_notebooks.py                 # run all of them
    python scripts/run_notebooks.py nbs/04_losses.ipynb
    python scripts/run_notebooks.py --check         # only compare the hashes
"""

import argparse
import hashlib
import os
import re
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"exercise"}
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar or a control: nothing without a kernel
COLLAPSED = {"hide", "echo"}  # cells that JupyterLab shows folded: `#| hide`, `#| echo: false`
FLOORS = ("appendix", ".", "evidence", "scale")  # in the order of imports


def notebooks() -> list[Path]:
    "All notebooks but the index and the solutions, in the order of the course, each after what it imports."
    return [path for floor in FLOORS for path in sorted((ROOT / "nbs" / floor).glob("*.ipynb")) if path.stem != "index"]


def directives(source: str) -> set[str]:
    "The words behind `#|` in a cell."
    return set(re.findall(r"^\s*#\|\s*([\w-]+)", source, re.M))


def is_run(cell) -> bool:
    "Does this cell run when outputs are saved?"
    if cell.cell_type != "code" or not cell.source.strip(): return False
    return not (directives(cell.source) & SKIPPED or re.search(r"^\s*#\|\s*eval:\s*false", cell.source, re.M))


def imported(path: Path) -> list[Path]:
    "The package's files that a notebook may import: the course's, and those of its own floor; the index and its like import all."
    package, floor = ROOT / "kklip_nb", path.parent.name
    floors = [floor] if floor in FLOORS else [] if re.match("[0-9]|tools", path.stem) else ["evidence", "scale"]
    files = [*package.glob("*.py"), *package.glob("configs/*.json"), *(f for name in floors for f in (package / name).glob("*.py"))]
    return [f for f in sorted(files) if f.name != "_modidx.py"]


def code_hash(notebook, path: Path) -> str:
    "Identifies the code cells of a notebook and the files that they import."
    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code": digest.update(cell.source.encode() + b"\0")
    if any(c.cell_type == "code" for c in notebook.cells):  # text alone imports nothing
        for file in imported(path): digest.update(re.sub(rb"^(# %% .*)?\n", b"", file.read_bytes(), flags=re.M))  # not where cells are cut
    return digest.hexdigest()


def run(path: Path, timeout: int) -> None:
    "Execute one notebook in its own kernel and write it back with outputs and hash."
    from nbclient import NotebookClient
    started = time.time()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}})
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type != "code": continue
            cell.outputs, cell.execution_count = [], None
            if is_run(cell): client.execute_cell(cell, index)
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            cell.metadata = {"jupyter": {"source_hidden": True}} if directives(cell.source) & COLLAPSED else {}
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "kklip_nb": {"code": code_hash(notebook, path)}}
    nbformat.write(notebook, path)
    print(f"{time.time() - started:6.1f} s  {path.relative_to(ROOT)}", flush=True)


def stale(path: Path) -> bool:
    "Were the saved outputs made by other code?"
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get("kklip_nb", {}).get("code") != code_hash(notebook, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all under nbs/")
    parser.add_argument("--check", action="store_true", help="run nothing; fail if outputs are older than the code")
    parser.add_argument("--timeout", type=int, default=900, help="seconds a cell may take")
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or [
        *notebooks(), *sorted(ROOT.glob("nbs/solutions/**/*.ipynb")), ROOT / "nbs" / "index.ipynb"]
    if args.check:
        old = [str(p.relative_to(ROOT)) for p in paths if stale(p)]
        if old: print("saved outputs do not belong to the code; run `make notebooks`:\n  " + "\n  ".join(old))
        else: print(f"the saved outputs of {len(paths)} notebooks belong to the code")
        return 1 if old else 0
    os.environ.pop("MPLBACKEND", None)  # any but the notebooks' own saves no pictures
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # it would save a path of this machine
    for path in paths: run(path, args.timeout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
