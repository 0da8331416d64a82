"""Build the site from the notebooks with their saved outputs, and check every link within it. Nothing is run.

    python scripts/docs.py [--site build/docs]      # then: python -m http.server --directory build/docs
"""

import argparse
import base64
import logging
import posixpath
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, THEME = ROOT / "nbs", ROOT / "scripts" / "docs_theme"
SOURCE = "https://github.com/kklip-nb/kklip_nb/blob/main/"
APPENDIX = ("glossary", "paper", "results")  # first in the appendix, in this order

sys.path.insert(0, str(THEME))  # where mkdocstrings looks for the extension
from maths import formulas  # noqa: E402


def directives(source: str) -> set[str]:
    "The words behind `#|` in a cell; 'echo: false' as one."
    return set(re.findall(r"^#\|\s*(echo: false|[\w-]+)", source, re.M))


def blank_lines(text: str) -> str:
    "A blank line before each list, table and heading that follows text: Python's Markdown asks for it, Jupyter's does not."
    lines, fenced = [], False
    kind = lambda row: "list" if re.match(r"\s*([-*+]|\d+[.)])\s", row) else "table" if row.startswith("|") else "head" if re.match("#+ ", row) else ""
    for row in text.split("\n"):
        if row.lstrip().startswith("```"): fenced = not fenced
        last = lines[-1] if lines else ""
        inside = kind(row) == kind(last) or kind(row) == "list" and (last.startswith(" ") or not row[0].strip())
        if not fenced and last.strip() and kind(row) and not inside: lines.append("")
        lines.append(row)
    return "\n".join(lines)


def demoted(text: str) -> str:
    "All headings one level down."
    return "".join(re.sub("^#", "##", p, flags=re.M) if i % 2 == 0 else p for i, p in enumerate(re.split(r"(```.*?```)", text, flags=re.S)))


def deep_lists(text: str) -> str:
    "Lists within lists and their paragraphs by four spaces a level, where Jupyter is content with two or three."
    out, fenced = [], False
    for row in text.split("\n"):
        if row.lstrip().startswith("```"): fenced = not fenced
        space = len(row) - len(row.lstrip(" "))
        out.append(" " * (4 - space) + row if not fenced and space in (2, 3) else row)
    return "\n".join(out)


def page_of(link: str, folder: str) -> str:
    "Where a notebook's link leads on the site: to another page, to a picture, or to the file in the repository."
    if re.match(r"https?:|mailto:", link): return link
    path, _, anchor = link.partition("#")
    anchor = anchor.lower()  # as headings are named on the site and on GitHub; JupyterLab keeps capitals
    if not path: return f"#{anchor}"
    if path.endswith(".ipynb"): return path.removesuffix(".ipynb") + ".md" + (f"#{anchor}" if anchor else "")
    whole = posixpath.normpath(posixpath.join("nbs", folder, path))
    if whole.endswith(".png"): return posixpath.relpath(whole, folder)
    return SOURCE + whole


def markdown(source: str, folder: str) -> str:
    "A cell of text for Python's Markdown."
    badge = r"\[!\[([^\]]+)\]\([^)]*\)\]\(([^)]*)\)"
    source = re.sub(badge, r'[\1](\2){ .button }', source)  # no pictures from elsewhere
    parts = re.split(r"(```.*?```|`[^`\n]+`)", deep_lists(blank_lines(source)), flags=re.S)
    parts[::2] = [re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({page_of(m[1], folder)})", p) for p in parts[::2]]
    return formulas("".join(parts))


def fenced(text: str, kind: str) -> str:
    "A block of code or of text, whatever backticks it holds."
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}\n"


def shown(output, picture: Path, folder: str) -> str:
    "One output: a picture, Markdown, or text; widgets need a kernel and leave nothing."
    if output.output_type == "stream": return fenced(re.sub(r"\x1b\[[\d;]*m", "", output.text), "{ .text .output }") if output.text.strip() else ""
    data = output.get("data", {})
    if "image/png" in data:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(base64.b64decode(data["image/png"]))
        return f'![figure]({picture.parent.name}/{picture.name}){{ loading=lazy }}\n'
    if "text/markdown" in data: return markdown(data["text/markdown"], folder)
    if "application/vnd.jupyter.widget-view+json" in data: return ""
    if "text/html" in data: return f'<div class="output">\n{data["text/html"]}\n</div>\n'
    return fenced(data["text/plain"], "{ .text .output }") if data.get("text/plain") else ""


def module_of(notebook) -> str:
    "The module that a notebook is exported to, or ''."
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in notebook.cells), re.M)
    return found[1] if found else ""


def page(path: Path, pages: Path) -> str:
    "A notebook as a page: hidden cells left out, folded ones by their outputs alone."
    notebook, folder = nbformat.read(path, as_version=4), path.parent.relative_to(NBS).as_posix()
    up, blocks, pictures = "../" * len(path.parent.relative_to(NBS).parts), [], 0
    chapters = [c for c in notebook.cells if c.cell_type == "markdown" and re.search("^# ", c.source, re.M)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # a page has one title: where there are more, they become chapters
            text = cell.source if len(chapters) < 2 or cell is chapters[0] else demoted(cell.source)
            blocks.append(markdown(text, folder))
            continue
        said = directives(cell.source)
        if module := "default_exp" in said and module_of(notebook):
            blocks.append(f"In the package: [`kklip_nb.{module}`]({up}api/{module}.md). "
                          f"The notebook: [{path.name}]({SOURCE}{path.relative_to(ROOT).as_posix()}).")
        if cell.cell_type != "code" or "hide" in said: continue
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        if source and "echo: false" not in said: blocks.append(fenced(source, "python"))
        for output in cell.outputs:
            pictures += "image/png" in output.get("data", {})
            blocks.append(shown(output, (pages / folder / f"{path.stem}-pictures" / f"{pictures}.png"), folder))
    head = "---\nsearch:\n  exclude: true\n---\n\n" if "solutions" in path.parts else "---\nhide: [navigation]\n---\n\n" if path.stem == "index" else ""
    return head + "\n\n".join(b for b in blocks if b) + "\n"


def title_of(path: Path) -> str:
    "What the menu calls a notebook: its number and its title."
    title = re.match(r"# (.*)", nbformat.read(path, as_version=4).cells[0].source)[1]
    return f"{int(path.stem[:2])} · {title}" if path.stem[:2].isdigit() else title


def modules() -> dict[str, Path]:
    "Each module of the package and its notebook, in the order of the course."
    notebooks = [p for folder in (".", "evidence", "scale", "appendix") for p in sorted((NBS / folder).glob("*.ipynb"))]
    found = {module_of(nbformat.read(p, as_version=4)): p for p in notebooks}
    return {module: path for module, path in found.items() if module}


def write_api(pages: Path) -> dict[str, str]:
    "A page for each module; its name and its page."
    menu = {}
    for module, notebook in modules().items():
        menu[module] = f"api/{module}.md"
        text = (f"# kklip_nb.{module}\n\nExplained in the notebook "
                f"[{title_of(notebook)}](../{notebook.relative_to(NBS).with_suffix('.md').as_posix()}).\n\n::: kklip_nb.{module}\n")
        (pages / menu[module]).write_text(text, encoding="utf-8")
    return menu


def prepare(pages: Path) -> list:
    "Write all pages into a folder, and return the menu."
    shutil.rmtree(pages, ignore_errors=True)
    (pages / "api").mkdir(parents=True)
    notebooks = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    for path in notebooks:
        target = (pages / path.relative_to(NBS)).with_suffix(".md")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(path, pages), encoding="utf-8")
    (pages / "results").mkdir()
    for picture in (ROOT / "results").glob("*.png"): shutil.copy(picture, pages / "results")
    shutil.copy(THEME / "site.css", pages / "site.css")
    def entries(folder, some): return [{title_of(p): p.relative_to(NBS).with_suffix(".md").as_posix()} for p in some if p.parent == NBS / folder]
    numbered = [p for p in notebooks if p.stem[:2].isdigit()]
    first = [NBS / "appendix" / f"{name}.ipynb" for name in APPENDIX]
    rest = [p for p in notebooks if p.parent == NBS / "appendix" and p not in first]
    start = [{title_of(p): "start.md"} for p in notebooks if p == NBS / "start.ipynb"]
    menu = [{"Home": "index.md"}, {"Course": start + entries(".", numbered)}]
    menu += [{"Evidence": entries("evidence", numbered)}, {"Scale": entries("scale", numbered)}]
    menu += [{"Appendix": entries("appendix", first + rest)}, {"API": [{module: file} for module, file in write_api(pages).items()]}]
    solved = [p for p in notebooks if "solutions" in p.parts]
    return menu + [{"Solutions": [{title_of(p): p.relative_to(NBS).with_suffix(".md").as_posix()} for p in solved]}]


class Links(HTMLParser):
    "What a page refers to, and the places within it that can be referred to."
    def __init__(self, text: str):
        super().__init__()
        self.links, self.fetched, self.places = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.places |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        self.links |= {attrs[name] for name in ("href", "src") if attrs.get(name)}
        if tag != "a" and attrs.get("rel") != "canonical": self.fetched |= {attrs[name] for name in ("href", "src") if attrs.get(name)}


def broken_links(site: Path) -> list[str]:
    "Every link within the site that leads nowhere, and every script, style or picture that comes from elsewhere."
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    bad = []
    for path, found in pages.items():
        for link in sorted(found.links):
            url = urlsplit(link)
            if url.scheme in ("http", "https") and link in found.fetched: bad.append(f"{path.relative_to(site)}: {link} comes from elsewhere")
            if url.scheme or url.netloc: continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if path.name == "404.html": target = site / unquote(url.path).removeprefix("/kklip_nb/") if url.path else path
            if target.is_dir(): target /= "index.html"
            fine = target.exists() and (not url.fragment or target not in pages or unquote(url.fragment) in pages[target].places | {"__top"})
            if not fine: bad.append(f"{path.relative_to(site)}: {link}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "docs")
    site = parser.parse_args().site.resolve()
    try: from mkdocs.commands.build import build
    except ImportError: sys.exit("mkdocs is missing: pip install .[docs]")
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    pages = site.with_name(site.name + "-pages")
    menu = prepare(pages)
    try: build(load_config(str(ROOT / "mkdocs.yml"), nav=menu, docs_dir=str(pages), site_dir=str(site), strict=True))
    except Abort as error: sys.exit(f"the site was not built: {error}")
    if bad := broken_links(site): sys.exit("links that lead nowhere:\n  " + "\n  ".join(bad))
    print(f"{len(list(site.rglob('*.html')))} pages in {site}; to look at them: python -m http.server --directory {site}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
