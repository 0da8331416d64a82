"""The README, and the site: built from the notebooks, every link within it, arguments in tables."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "scripts"), str(ROOT / "scripts" / "docs_theme")]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def test_the_readme_fits_a_screen_or_three_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "](results/queries.png)" in text and "](results/pipeline.png)" in text and "](nbs/start.ipynb)" in text
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match("https?:|#", link): assert (ROOT / link.split("#")[0]).exists(), link


def test_the_saved_map_is_the_one_that_is_drawn(tmp_path):
    import matplotlib.image
    from make_readme import draw_pipeline
    draw_pipeline(tmp_path / "map.png")
    saved, drawn = (matplotlib.image.imread(p) for p in (ROOT / "results" / "pipeline.png", tmp_path / "map.png"))
    assert saved.shape == drawn.shape and np.abs(saved - drawn).mean() < 0.01  # another release of matplotlib may move an edge


def test_the_glossary_has_every_term_and_symbol_that_is_asked_of_it():
    from test_notebooks import cells
    text = "\n".join(c["source"] for c in cells(ROOT / "nbs" / "appendix" / "glossary.ipynb"))
    terms = re.findall("^### (.+)", text, re.M)
    assert terms == sorted(terms, key=str.lower) and len(terms) == len(set(terms))
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= {t.replace(" ", "-") for t in terms} | {"symbols", "names-in-code"}
    asked = set(re.findall(r"glossary\.ipynb#([\w-]+)", "\n".join(p.read_text(encoding="utf-8") for p in NOTEBOOKS)))
    assert {a.lower() for a in asked} <= {t.replace(" ", "-").lower() for t in terms} | {"symbols", "names-in-code"}


def needs_mkdocs():
    "Skip, with the reason, where the site cannot be built."
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"): pytest.importorskip(name, reason="the site needs pip install .[docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    needs_mkdocs()
    folder = tmp_path_factory.mktemp("site") / "docs"
    done = subprocess.run([sys.executable, ROOT / "scripts" / "docs.py", "--site", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # warnings and links that lead nowhere end it
    return folder


def visible(page: Path) -> str:
    "The text of a built page."
    return re.sub(r"<(script|style).*?</\1>|<[^>]+>", "", page.read_text(encoding="utf-8"), flags=re.S)


def test_every_notebook_and_every_module_has_its_page(site):
    for path in NOTEBOOKS: assert (site / path.relative_to(ROOT / "nbs")).with_suffix(".html").exists()
    found = {p.stem for p in (site / "api").glob("*.html")}
    assert found == {".".join(p.relative_to(ROOT / "kklip_nb").with_suffix("").parts) for p in (ROOT / "kklip_nb").rglob("*.py") if p.name[0] != "_"}


def test_no_directive_no_hidden_cell_and_no_raw_formula_is_shown(site):
    for page in site.rglob("*.html"):
        text = visible(page)
        assert not re.search(r"^#\| |google\.colab|^\$\$", text, re.M), page.name
    losses = (site / "04_losses.html").read_text(encoding="utf-8")
    assert "<mfrac>" in losses and 'href="api/losses.html"' in losses
    assert "../04_losses.html" in (site / "api" / "losses.html").read_text(encoding="utf-8")


def test_comments_behind_arguments_are_tables_on_the_api_pages(site):
    import inspect

    from kklip_nb.losses import concept_loss
    text, source = visible(site / "api" / "losses.html"), inspect.getsource(concept_loss)
    assert "Parameters:" in text and "Returns:" in text
    for comment in ("weight of each concept", "id of the rows to skip", "in nats, float32 for half precision"):
        assert comment in source.split('"""')[0] and text.count(comment) >= 2  # in the table, and in the source that can be unfolded


def test_docments_of_one_function(tmp_path):
    needs_mkdocs()
    import ast

    from docments import comments, docments
    (tmp_path / "f.py").write_text("def f(\n    a: int,  # first\n    b: dict = {1:\n               2},  # second\n    *rest,\n    c=3,  # third\n"
                                   ") -> int:  # the sum\n    return 1\n\ndef g(x: int) -> int:  # twice x\n    return 2 * x\n")
    f, g = ast.parse((tmp_path / "f.py").read_text()).body
    notes = comments(tmp_path / "f.py")
    assert docments(f, notes) == {"a": "first", "b": "second", "c": "third", "return": "the sum"}
    assert docments(g, notes) == {"return": "twice x"}


def test_a_broken_link_is_found(tmp_path):
    needs_mkdocs()
    from docs import broken_links
    (tmp_path / "a.html").write_text('<h2 id="here"><a href="b.html#there">b</a><a href="#here"></a><a href="https://example.org/x">')
    (tmp_path / "b.html").write_text('<p id="there"><img src="none.png"><a href="a.html#nowhere"><script src="https://example.org/x.js">')
    assert broken_links(tmp_path) == ["b.html: a.html#nowhere", "b.html: https://example.org/x.js comes from elsewhere", "b.html: none.png"]


def test_python_s_markdown_reads_the_notebooks_as_jupyter_does():
    "As many lists, tables and headings as with the parser that nbconvert uses."
    needs_mkdocs()
    import mistune
    from docs import markdown
    from markdown import Markdown

    from test_notebooks import cells
    ours, theirs = Markdown(extensions=["attr_list", "tables", "toc", "pymdownx.superfences"]), mistune.create_markdown(escape=False, plugins=["table"])
    def count(html): return [len(re.findall(f"<{tag}[ >]", html)) for tag in ("li", "table", "tr", "h1", "h2", "h3", "pre", "strong", "blockquote")]
    for path in NOTEBOOKS:
        for cell in cells(path):
            if cell["cell_type"] == "markdown" and re.search(r"^\s*([-*#|]|\d+\.|```)", cell["source"], re.M):
                formula = re.sub(r"\$\$.+?\$\$|\$[^$]+\$", "x", cell["source"], flags=re.S)  # which only one of them reads
                ours.reset()
                assert count(ours.convert(markdown(formula, "."))) == count(theirs(formula)), (path.name, cell["source"][:200])
