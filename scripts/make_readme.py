"""README.md is nbs/index.ipynb: write it, or check with --check that it is up to date. No quarto is needed.

Writes results/pipeline.png, too: the map of the pipeline, which the README shows."""

import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The index notebook as Markdown, without hidden cells and directive lines; its links lead on from the top folder."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [c for c in notebook.cells if not re.search(r"^\s*#\|\s*hide", c.source, re.M)]
    notebook.cells = [_output_alone(c) if re.search(r"^\s*#\|\s*echo:\s*false", c.source, re.M) else c for c in notebook.cells]
    for cell in notebook.cells: cell.source = re.sub(r"^\s*#\|.*\n?", "", cell.source, flags=re.M)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources.get("outputs"): raise SystemExit("index.ipynb has pictures as outputs; link files instead")
    text = re.sub(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", lambda m: f"]({posixpath.normpath('nbs/' + m[1])})", text)
    return "<!-- made from nbs/index.ipynb by scripts/make_readme.py: edit the notebook -->\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _output_alone(cell):
    "A cell whose code is not shown: what it has displayed, as Markdown."
    texts = [o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
    if not texts: raise SystemExit("a cell of index.ipynb with `echo: false` has no saved Markdown output; run `make notebooks`")
    return nbformat.v4.new_markdown_cell("".join("".join(t) for t in texts))


def draw_pipeline(path: Path) -> None:
    "The map of the pipeline as a file, the same on every run."
    import matplotlib
    matplotlib.use("agg")
    from kklip_nb.course import pipeline_map
    pipeline_map().savefig(path, dpi=110, metadata={"Software": ""})


def main() -> int:
    path = ROOT / "README.md"
    if "--check" in sys.argv:
        same = path.exists() and path.read_text(encoding="utf-8") == readme()
        print("README.md is what index.ipynb says" if same else "README.md differs from nbs/index.ipynb; run `make readme`")
        return 0 if same else 1
    draw_pipeline(ROOT / "results" / "pipeline.png")
    path.write_text(readme(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
