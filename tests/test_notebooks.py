"""The notebooks as files: first cells, pictures, exercises and solutions, recordings, and that all is in step."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = [p for floor in (".", "evidence", "scale") for p in sorted((NBS / floor).glob("[0-9]*.ipynb"))]
NAMES = [str(p.relative_to(NBS).with_suffix("")) for p in NOTEBOOKS]
PAGES = [NBS / "start.ipynb", *NOTEBOOKS]
PAGE_NAMES = ["start", *NAMES]
COURSE = [p for p in NOTEBOOKS if p.parent == NBS]


def cells(path: Path) -> list[dict]:
    "The cells with their source as one string."
    return [c | {"source": "".join(c["source"])} for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def exercises(path: Path) -> list[str]:
    "Stub, check, stub, check …: the cells left for the reader, without their directive."
    marked = [c["source"] for c in cells(path) if c["source"].startswith("#| exercise")]
    return [s.split("\n", 1)[1] for s in marked]


def test_every_notebook_has_its_module_and_every_module_its_notebook():
    wanted = {f"{next(c['source'] for c in cells(p) if 'default_exp' in c['source']).split()[-1]}".replace(".", "/") + ".py" for p in [*NOTEBOOKS, *(NBS / "appendix").glob("*.ipynb")] if any("default_exp" in c["source"] for c in cells(p))}
    assert wanted == {str(p.relative_to(ROOT / "kklip_nb")) for p in (ROOT / "kklip_nb").rglob("*.py") if not p.name.startswith("_")}


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_first_cell_is_title_and_description(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S.*\n+> \S", first["source"])


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_a_picture_and_no_error_is_saved(path):
    outputs = [o for c in cells(path) if c["cell_type"] == "code" for o in c["outputs"]]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not any(o["output_type"] == "error" for o in outputs)


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_no_cell_is_longer_than_thirty_lines(path):
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert len([r for r in cell["source"].splitlines() if r.strip() and not r.strip().startswith("#")]) <= 30


@pytest.mark.parametrize("path", [*PAGES, *(NBS / "solutions" / p.relative_to(NBS) for p in NOTEBOOKS)], ids=lambda p: str(p.relative_to(NBS).with_suffix("")))
def test_no_code_line_is_longer_than_a_hundred_characters(path):
    long = [row for c in cells(path) if c["cell_type"] == "code" for row in c["source"].splitlines() if len(row) > 100]
    assert not long


@pytest.mark.parametrize("path", COURSE, ids=lambda p: p.stem)
def test_a_notebook_of_the_course_is_short(path):
    all_cells = cells(path)
    words = sum(len(re.findall(r"\w+", re.sub(r"\]\([^)]*\)", "]", c["source"]))) for c in all_cells if c["cell_type"] == "markdown")
    assert len(all_cells) <= 130 and words <= 2600


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_says_where_it_stands_and_links_what_it_speaks_of(path):
    text = "\n".join(c["source"] for c in cells(path) if c["cell_type"] == "markdown")
    code = [c["source"] for c in cells(path) if c["cell_type"] == "code"]
    name = path.relative_to(ROOT)
    assert f"/blob/main/{name.as_posix()})" in text and f"labpath={'%2F'.join(name.parts)})" in text  # the buttons open this notebook
    assert any("pipeline_map(" in c for c in code) and any("google.colab" in c for c in code)
    assert len(re.findall(r"(?<!!)\[[^\]!]+\]\([^)]+\)", text)) >= 3
    assert re.search(r"^## Summary", text, re.M) and re.search(r"^## Exercises", text, re.M)


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_links_of_a_notebook_lead_somewhere(path):
    for cell in cells(path):
        if cell["cell_type"] != "markdown": continue
        for link in re.findall(r"\]\(([^)\s]+)\)", cell["source"]):
            if not re.match(r"https?:|#|mailto:|attachment:", link): assert (path.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_cells_off_the_path_are_folded_and_none_exports_the_package(path):
    for cell in cells(path):
        if cell["cell_type"] != "code": continue
        folded = bool(re.search(r"^#\| (hide|echo: false)", cell["source"], re.M))
        assert cell["metadata"].get("jupyter", {}).get("source_hidden", False) == folded, cell["source"]
        assert "nbdev_export" not in cell["source"]


def check_of(source: str) -> str:
    "The name of the check in an exercise's second cell, which is a function of the answer."
    return re.search(r"^def (check_\w+)\(", source, re.M)[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_unfilled_exercises_say_that_they_are_not_done_yet(path):
    marked = exercises(path)
    assert len(marked) % 2 == 0 and 1 <= len(marked) // 2 <= 4
    for stub, check in zip(marked[::2], marked[1::2]):
        namespace: dict = {}
        exec(stub, namespace)
        with pytest.raises(NotImplementedError, match="^not done yet$"): exec(check, namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_solutions_hold_the_same_checks_which_refuse_two_wrong_answers_each(path):
    solved = [c["source"].strip() for c in cells(NBS / "solutions" / path.relative_to(NBS)) if c["cell_type"] == "code"]
    for check in exercises(path)[1::2]:
        assert check.strip() in solved  # and passes there: the solutions run in nbdev_test
        wrong = re.findall(rf"^refuses\({check_of(check)},(.+)\)$", "\n".join(solved), re.M)
        assert wrong and len([name for row in wrong for name in row.split(",")]) >= 2


def test_saved_outputs_belong_to_the_code():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "run_notebooks.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_changed_cell_makes_the_outputs_stale(tmp_path):
    import nbformat
    sys.path.insert(0, str(ROOT / "scripts"))
    from run_notebooks import code_hash
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    before = code_hash(notebook, NOTEBOOKS[0])
    next(c for c in notebook.cells if c.cell_type == "code").source += "\n1 + 1"
    assert code_hash(notebook, NOTEBOOKS[0]) != before == notebook.metadata["kklip_nb"]["code"]


def test_readme_is_the_index_notebook():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "make_readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_recordings_are_small_and_say_where_they_come_from():
    from safetensors import safe_open
    files = sorted((NBS / "recorded").glob("*.safetensors"))
    assert files and sum(f.stat().st_size for f in files) <= 20e6
    for file in files:
        with safe_open(file, framework="numpy") as opened: metadata = opened.metadata()
        assert {"teacher", "pooling", "layer", "prompt", "captions"} <= set(metadata), file.name
        assert "sha256:" in metadata["teacher"]


def test_no_path_of_a_machine_and_no_registry_host():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    bad = re.compile(r"/(root|home|work)/\w|/tmp/tmp\w|files\.pythonhosted|pypi\.org/simple")
    for name in listed:
        path = ROOT / name
        if path.suffix in {".safetensors", ".png"} or path == Path(__file__): continue
        assert not bad.search(path.read_text(encoding="utf-8", errors="ignore")), name


def test_outputs_depend_on_the_floors_below_alone():
    sys.path.insert(0, str(ROOT / "scripts"))
    from run_notebooks import imported
    for path in [*NOTEBOOKS, *(NBS / "solutions" / p.relative_to(NBS) for p in NOTEBOOKS)]:
        floor = path.parent.name if path.parent.name in ("evidence", "scale") else ""
        assert {f.parent.name for f in imported(path)} == {"kklip_nb", "configs", floor} - {""}
        used = set(re.findall(r"kklip_nb\.(evidence|scale)\b", "\n".join(c["source"] for c in cells(path) if c["cell_type"] == "code")))
        assert used <= {floor}, path
