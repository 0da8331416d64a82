"""The controls of the concepts and the visualization notebook, moved in a real browser: what changes has the value that is computed here."""

import re
from pathlib import Path

import numpy as np
import pytest
from lab import shot

from kklip_nb.concepts import fit_concepts, label_entropy, soft_labels
from kklip_nb.data import SIX, load_openmoji, six_rows, split_by_base
from kklip_nb.teacher import load_embeddings, standardise

RECORDED = Path(__file__).resolve().parent.parent / "nbs/recorded/pairs-last-29-prompt.safetensors"

PREPARED = ["20173689", "8c2c07d1", "e4b9f26e", "ebb79228"]  # imports, embeddings
CONCEPTS = "from kklip_nb.concepts import apply_scale, fit_concepts, fit_scale, label_entropy, soft_labels"
MAP = "from kklip_nb.visualization import click_map, concept_names, distinct_concepts, umap_project"


@pytest.fixture(scope="module")
def material():
    "Pairs, split, targets and the rows of the six."
    pairs = load_openmoji(128)
    split = split_by_base(pairs.bases, seed=0)
    raw = load_embeddings(RECORDED, pairs.captions)
    return pairs, split, standardise(raw, raw[split.train].mean(0)), six_rows(pairs.captions)


def picture(page, name: str) -> str:
    "The picture that the control shows, once it does; kept for a look."
    drawn = page.locator(".widget-output img").last
    drawn.scroll_into_view_if_needed()
    shot(page, name)
    return drawn.get_attribute("src")


def change(page, value: str, now: str) -> None:
    "Write a value into the slider's field, and wait until the output says `now`."
    readout = page.locator(".widget-readout").last
    readout.click()
    page.keyboard.press("Control+a")
    page.keyboard.type(value)
    page.keyboard.press("Enter")
    page.locator(".widget-output", has_text=re.compile(now)).last.wait_for(timeout=30_000)


def test_the_temperature_moves_the_label_and_its_entropy(notebook_page, material):
    pairs, split, targets, six = material
    centroids = fit_concepts(targets[split.train], 48).centroids
    def entropy(tau, caption): return label_entropy(soft_labels(targets[[six[SIX.index(caption)]]], centroids, tau))[0]
    page = notebook_page("02_concepts.ipynb", [*PREPARED, "9c53c838", "74bfe161", "ctl-t-01", "control-tau"], CONCEPTS, timeout=300)
    output = page.locator(".widget-output").last
    output.get_by_text(f"tau 0.1: entropy {entropy(0.1, 'dog face'):.2f} nats").wait_for()
    before = picture(page, "control-tau-before")
    change(page, "1", rf"tau 1: entropy {entropy(1, 'dog face'):.2f} nats")
    assert picture(page, "control-tau-1") != before
    page.locator(".widget-dropdown select").last.select_option("pizza")
    output.get_by_text(f"tau 1: entropy {entropy(1, 'pizza'):.2f} nats").wait_for()
    h = entropy(0.3, "pizza")
    change(page, "0.3", rf"tau 0.3: entropy {h:.2f} nats, a fair choice among {np.exp(h):.1f} concepts")
    picture(page, "control-tau")


def test_the_number_of_concepts_moves_who_is_in_them(notebook_page, material):
    pairs, split, targets, six = material
    train = targets[split.train]
    def line(k, at):
        found = fit_concepts(train, k)
        concept = np.linalg.norm(found.centroids - targets[six[at]], axis=1).argmin()
        first = split.train[np.linalg.norm(train - found.centroids[concept], axis=1).argmin()]
        return f"{SIX[at]}: {(found.labels == concept).sum()} captions around {pairs.captions[first]}"
    page = notebook_page("02_concepts.ipynb", [*PREPARED, "36790346", "fit-k", "0db086fc", "ctl-k-01", "control-k"], CONCEPTS, timeout=300)
    output = page.locator(".widget-output").last
    for at in (0, 2, 4): output.get_by_text(line(48, at)).wait_for()
    before = picture(page, "control-k-before")
    page.locator(".widget-slider .noUi-handle, .widget-hslider .noUi-handle").last.focus()
    page.keyboard.press("ArrowRight")  # 64
    page.keyboard.press("ArrowRight")  # 96
    for at in (0, 2, 4): output.get_by_text(line(96, at)).wait_for()
    assert picture(page, "control-k") != before


def test_a_click_on_the_map_shows_the_pictures_of_the_concept(notebook_page, material):
    pairs, split, targets, six = material
    concepts = fit_concepts(targets[split.train], 48)
    label = np.linalg.norm(targets[split.test][:, None] - concepts.centroids, axis=2).argmin(1)
    page = notebook_page("08_visualization.ipynb", ["23ebf355", "55e7d3d7", "f459b56a", "bcb56ab9", "b7d4d068", "8911755f", "ff2135f8", "click-04", "control-map"], MAP, timeout=300)
    marks, cards = page.locator(".kklip-map input"), page.locator(".kklip-map .card")
    assert marks.count() == len(split.test)
    assert not any(card.is_visible() for card in cards.all())
    drawn = page.locator(".kklip-map .pic")
    boxes = np.array([[b[k] for k in ("x", "y")] for b in (m.bounding_box() for m in drawn.all())])
    apart = np.abs(boxes[:, None] - boxes).max(2) + 99 * np.eye(len(boxes))
    assert apart.min() >= 29.5  # a picture is 30 wide
    for place in (0, 7):
        mark = drawn.nth(place)
        row = int(mark.get_attribute("data-row"))
        assert mark.get_attribute("title") == pairs.captions[split.test[row]]
        mark.click()
        [card] = [c for c in cards.all() if c.is_visible()]
        mine = np.flatnonzero(concepts.labels == label[row])
        near = mine[np.argsort(np.linalg.norm(targets[split.train][mine] - concepts.centroids[label[row]], axis=1))[:7]]
        assert card.locator("figure").all_inner_texts() == [pairs.captions[split.train[i]] for i in near]
        assert card.locator("img").count() == len(near)
    shot(page, "control-map")
