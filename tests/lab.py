"""A JupyterLab in a headless Chromium, for tests of what a reader can move: no network, and no file of the repository is written."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KERNEL = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))  # without it Lab asks for one
IDLE = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")  # no longer: an open playwright keeps other modules from asyncio
def browser():
    "A headless Chromium; the tests that need it are skipped where it cannot be had."
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if CHROMIUM is None: pytest.skip("no chromium on the PATH")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "(address, folder) of a JupyterLab whose folder has `nbs` and `results` as the repository has, for notebooks to be put in."
    for module in ("jupyterlab", "ipywidgets"): pytest.importorskip(module, reason=f"no {module}")
    home, port = tmp_path_factory.mktemp("lab"), free_port()
    for folder in ("nbs/evidence", "nbs/scale", "nbs/appendix"): (home / folder).mkdir(parents=True)
    (home / "nbs/recorded").symlink_to(ROOT / "nbs/recorded")
    (home / "results").symlink_to(ROOT / "results")
    places = {f"JUPYTER_{what}_DIR": str(home / what) for what in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "PYTHONWARNINGS": "ignore"}
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=kklip",
               f"--ServerApp.root_dir={home}", f"--config={ROOT / 'scripts/lab_config.py'}", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | places  # the notebook's own backend shows pictures
    with open(home / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=kklip", timeout=5).close()
            except OSError: time.sleep(0.2)
            else: break
            assert server.poll() is None, (home / "log").read_text()
        yield f"http://127.0.0.1:{port}", home
    finally:
        server.terminate()  # which ends its kernels
        server.wait(20)


@pytest.fixture
def open_notebook(lab, browser):
    "A function: notebook (a dict) and its path under nbs/ → the page on which JupyterLab shows it, its kernel ready, nothing run."
    address, home = lab
    pages = []

    def opened(notebook: dict, path: str, width: int = 1300, height: int = 1000):
        (home / "nbs" / path).write_text(json.dumps(notebook), encoding="utf-8")
        page = browser.new_page(viewport=dict(width=width, height=height))
        pages.append(page)
        page.set_default_timeout(20_000)
        page.goto(f"{address}/lab/tree/nbs/{path}?token=kklip&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        page.wait_for_function(IDLE, timeout=60_000)
        return page

    yield opened
    for page in pages: page.close()


@pytest.fixture
def notebook_page(open_notebook):
    """A function: path of a real notebook under nbs/ and ids of its cells → a page on which JupyterLab has run just these cells.

    What the cells need must be among them. The last cell's output is in view; `code` is run before them."""
    def run(path: str, ids: list[str], code: str = "", timeout: int = 120):
        notebook = json.loads((ROOT / "nbs" / path).read_text(encoding="utf-8"))
        by_id = {cell["id"]: cell for cell in notebook["cells"]}
        first = dict(cell_type="code", id="given", metadata={}, source=code, outputs=[], execution_count=None)
        cells = [first, *({**by_id[i], "outputs": [], "execution_count": None} for i in ids)]
        page = open_notebook(dict(cells=cells, metadata=KERNEL, nbformat=4, nbformat_minor=5), path)
        page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        last = ("(() => { const c = window.jupyterapp.shell.currentWidget.content.model.cells; const last = c.get(c.length - 1);"
                " return last.executionCount != null && " + IDLE + "; })()")
        page.wait_for_function(last, timeout=1000 * timeout)
        errors = page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]')
        assert not errors.count(), errors.first.inner_text()
        return page

    return run


def shot(page, name: str) -> None:
    "Keep a picture of the page for a look, where $KKLIP_SHOTS names a folder."
    if shots := os.environ.get("KKLIP_SHOTS"): page.screenshot(path=f"{shots}/{name}.png")
