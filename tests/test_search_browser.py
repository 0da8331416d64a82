"""The text field of search_box in a real browser: JupyterLab in a headless Chromium, no network."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("jupyterlab", reason="no JupyterLab")
pytest.importorskip("ipywidgets", reason="no ipywidgets")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

CELL = """
import numpy as np
from PIL import Image, ImageDraw
from kklip_nb.search import picture_features, search_box
from kklip_nb.student import build_student
images = []
for i, colour in enumerate(["red", "green", "blue", "gold"] * 3):
    image = Image.new("RGB", (32, 32), "white")
    getattr(ImageDraw.Draw(image), ["ellipse", "rectangle", "pieslice"][i // 4])((6, 6, 26, 26), *[0, 270][:2 * (i // 8)], fill=colour)
    images.append(np.asarray(image))
students = {name: build_student("kklip-laptop-vit", imagenet=False, train_image="all", seed=seed) for seed, name in enumerate(["CLIP", "KKLIP"])}
search_box({name: (s, picture_features(s, images)) for name, s in students.items()}, images, [f"drawing {i}" for i in range(12)], "red circle")
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab on a folder with one notebook; it keeps its own files there, too."
    import nbformat
    home = tmp_path_factory.mktemp("lab")
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))  # without it Lab asks for one
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())], metadata=kernel), home / "box.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {f"JUPYTER_{what}_DIR": str(home / what) for what in ("CONFIG", "DATA", "RUNTIME")} | {"JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=kklip",
               f"--ServerApp.root_dir={home}", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=os.environ | places, stdout=log, stderr=log)
    try:
        for _ in range(150):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=kklip", timeout=5).close()
            except OSError: time.sleep(0.2)
            else: break
            assert server.poll() is None, (home / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()  # which ends its kernels
        server.wait(20)


@pytest.fixture
def page(lab):
    "The notebook, opened and run."
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1300, height=900))
        page.set_default_timeout(10_000)
        page.goto(f"{lab}/lab/tree/box.ipynb?token=kklip")
        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=30_000)
        page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'", timeout=30_000)
        page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        yield page
        browser.close()


def test_a_query_changes_the_pictures(page):
    field, answer = page.locator(".widget-text input"), page.locator(".widget-html img")
    answer.wait_for(timeout=40_000)
    assert field.input_value() == "red circle" and answer.get_attribute("alt").startswith("red circle: CLIP finds drawing ")
    first = answer.get_attribute("src")

    def ask(text: str, wait_for: str):
        field.fill(text)
        field.press("Enter")
        page.locator(wait_for).wait_for(timeout=10_000)

    ask("a blue square", '.widget-html img[alt^="a blue square: CLIP finds drawing "]')
    assert answer.get_attribute("src") != first and "; KKLIP finds drawing " in answer.get_attribute("alt")
    assert answer.evaluate("image => image.complete && image.naturalWidth > 500 && image.getBoundingClientRect().width > 300")
    assert answer.evaluate("image => image.getBoundingClientRect().right <= image.closest('.jp-OutputArea').getBoundingClientRect().right")
    if shots := os.environ.get("KKLIP_SHOTS"): page.screenshot(path=f"{shots}/search-box.png")  # for a look
    ask("   ", '.widget-html p:has-text("type a word or more")')
    nasty = '<img id=mine src=x onerror="window.ours=1"> $x^2$'
    ask(nasty, '.widget-html img[alt*="onerror"]')
    assert answer.get_attribute("alt").startswith(nasty) and page.locator("#mine").count() == 0
    assert page.evaluate("window.ours") is None and page.locator(".widget-html mjx-container").count() == 0
