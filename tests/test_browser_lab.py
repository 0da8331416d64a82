"""Notebooks as a reader meets them in JupyterLab: unchanged when opened, cells numbered, helpers folded."""

import json

import pytest
from lab import ROOT, shot

CELLS = """() => { const panel = window.jupyterapp.shell.currentWidget;
  return panel.content.widgets.map(w => ({id: w.model.id, folded: w.inputHidden === true, count: w.model.executionCount ?? null})); }"""


@pytest.mark.parametrize("path", ["00_data.ipynb", "04_losses.ipynb", "solutions/04_losses.ipynb"])
def test_a_notebook_opens_unchanged_numbered_and_folded(open_notebook, lab, path):
    (lab[1] / "nbs" / path).parent.mkdir(exist_ok=True)
    notebook = json.loads((ROOT / "nbs" / path).read_text(encoding="utf-8"))
    page = open_notebook(notebook, path)
    page.wait_for_timeout(2000)  # in which Lab writes what it knows of the kernel into the notebook
    assert not page.evaluate("window.jupyterapp.shell.currentWidget.context.model.dirty")
    assert page.locator(".jp-mod-dirty").count() == 0
    found = {cell["id"]: cell for cell in page.evaluate(CELLS)}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [found[cell["id"]]["count"] for cell in code if cell["outputs"]]
    assert None not in counts and counts == sorted(set(counts))
    for cell in code:
        assert found[cell["id"]]["folded"] == cell["metadata"].get("jupyter", {}).get("source_hidden", False), cell["source"]
        if "eval: false" in "".join(cell["source"]): assert found[cell["id"]]["count"] is None
    shot(page, "lab-" + path.replace("/", "-").removesuffix(".ipynb"))


def test_a_cell_that_is_typed_in_makes_it_changed(open_notebook):
    page = open_notebook(json.loads((ROOT / "nbs/04_losses.ipynb").read_text(encoding="utf-8")), "typed.ipynb")
    page.evaluate("window.jupyterapp.commands.execute('notebook:insert-cell-below')")
    page.wait_for_function("window.jupyterapp.shell.currentWidget.context.model.dirty")
