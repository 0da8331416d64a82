"""What is installed: which files, what importing costs, and what it does not import."""

import ast
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import kklip_nb

FLOORS = {
    "": ["course", "tools", "data", "own_pairs", "teacher_files", "teacher", "concepts", "student", "losses", "recipe", "training", "evaluation", "visualization", "search"],
    "evidence.": ["scenes", "text_probe", "attributes", "one_word", "other_words", "study", "choices", "runner", "attribute_data"],
    "scale.": ["shards", "embeddings", "clustering", "loader", "distributed", "long_run", "export", "rehearsal", "command_line"],
}
MODULES = [floor + name for floor, names in FLOORS.items() for name in names]  # each may import those before it; the upper floors not each other
ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> str:
    "Run code in a fresh interpreter from another folder and return what it prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.sep)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif("KKLIP_SITE" not in os.environ, reason="only where the package was installed for the tests")
def test_the_installed_package_is_tested():
    assert Path(kklip_nb.__file__).resolve().is_relative_to(Path(os.environ["KKLIP_SITE"]).resolve())


def test_version():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert f"version = {kklip_nb.__version__}\n" in settings
    assert version("kklip_nb") == kklip_nb.__version__


def test_type_marker_and_configurations_are_installed():
    folder = Path(kklip_nb.__file__).parent
    assert (folder / "py.typed").exists()
    assert (folder / "configs" / "kklip-laptop.json").exists()


def test_no_notebook_tool_is_imported():
    code = f"import importlib, sys\nfor m in {MODULES}: importlib.import_module('kklip_nb.' + m)\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    assert not {"nbdev", "fastcore", "execnb", "IPython", "jupyter_client", "ipykernel"} & set(run(code).split())


def imports_of(module: str) -> set[str]:
    "The modules of the package that this one imports, by name."
    tree = ast.parse((Path(kklip_nb.__file__).parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    package = f"kklip_nb.{module}".split(".")
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names if a.name.startswith("kklip_nb")}
        if not isinstance(node, ast.ImportFrom): continue
        base = ".".join([*package[: -node.level], *filter(None, [node.module])]) if node.level else node.module
        if not base.startswith("kklip_nb"): continue
        names = [f"{base}.{a.name}".removeprefix("kklip_nb.") for a in node.names]
        found |= {n for n in names if n in MODULES} or {base.removeprefix("kklip_nb.")}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    used, floor = imports_of(module), module.split(".")[0] + "." if "." in module else ""
    below = FLOORS[""] + ([floor + name for name in FLOORS[floor]] if floor else [])
    assert used <= set(MODULES[: MODULES.index(module)]) & {*below}
    if floor or module in ("student", "training"): assert used, "no import found: does this test still see them?"


def test_losses_imports_torch_alone():
    torch_only = set(run("import sys, torch, torch.nn.functional, math; print(*sys.modules)").split())
    with_losses = set(run("import sys, kklip_nb.losses; print(*sys.modules)").split())
    assert with_losses - torch_only <= {"kklip_nb", "kklip_nb.losses"}


def test_importing_losses_costs_at_most_50_ms_beyond_torch():
    code = "import time, torch, torch.nn.functional; t = time.perf_counter(); import kklip_nb.losses; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.05
