"""The text field of search_box in a real browser."""

import pytest
from lab import KERNEL, shot

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


@pytest.fixture
def page(open_notebook):
    "The notebook, opened and run."
    cell = dict(cell_type="code", id="box", metadata={}, source=CELL.strip(), outputs=[], execution_count=None)
    page = open_notebook(dict(cells=[cell], metadata=KERNEL, nbformat=4, nbformat_minor=5), "box.ipynb")
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    return page


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
    shot(page, "search-box")
    ask("   ", '.widget-html p:has-text("type a word or more")')
    nasty = '<img id=mine src=x onerror="window.ours=1"> $x^2$'
    ask(nasty, '.widget-html img[alt*="onerror"]')
    assert answer.get_attribute("alt").startswith(nasty) and page.locator("#mine").count() == 0
    assert page.evaluate("window.ours") is None and page.locator(".widget-html mjx-container").count() == 0
