"""The slider of the losses notebook in a real browser: picture and number follow the scale."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from lab import ROOT, shot
from PIL import Image

MADE = "60d67788"  # the cell that makes the features
CELLS = ["b21b998b", "d873bbc7", MADE, "0221bbd7", "19e6e56c", "2494d3b2", "draw-scale", "control-scale"]


def features() -> list[np.ndarray]:
    "Unit-length image and text features of the six pairs, as the notebook makes them."
    cells = json.loads((ROOT / "nbs/04_losses.ipynb").read_text(encoding="utf-8"))["cells"]
    space = dict(torch=torch)
    exec("".join(next(c["source"] for c in cells if c["id"] == MADE)), space)
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (space["images"].double().numpy(), space["texts"].double().numpy())]


def softmax(z: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def gradient(s: float) -> float:
    "Norm of the gradient at the image features by its closed form; the part along a feature is lost when it is normalised."
    u, v = features()
    z = s * u @ v.T
    g = s * (softmax(z, 1) + softmax(z, 0) - 2 * np.eye(6)) / 12 @ v
    return float(np.linalg.norm(g - (g * u).sum(1, keepdims=True) * u))


def shown(page) -> tuple[float, float, np.ndarray]:
    "The scale and the gradient that are printed, and the picture."
    text, picture = page.locator(".widget-output pre").inner_text(), page.locator(".widget-output img").get_attribute("src")
    s, g = re.fullmatch(r"logit_scale ([\d.]+): gradient ([\d.]+)", text.strip()).groups()
    return float(s), float(g), np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).convert("RGB"))


def blue(picture: np.ndarray) -> tuple[int, float]:
    "Width of the widest blue row on the left (the airplane's bar), and mean column of the blue on the right (the marked scale)."
    mask = (abs(picture.astype(int) - (0, 0x72, 0xB2)) < 30).all(2)
    half = 11 * mask.shape[1] // 20  # between the two panels
    return int(mask[:, :half].sum(1).max()), float(np.nonzero(mask[:, half:])[1].mean())


def test_the_slider_moves_picture_and_number(notebook_page):
    page = notebook_page("04_losses.ipynb", CELLS, "from kklip_nb.losses import contrastive_loss")
    readout = page.locator(".widget-hslider .widget-readout")
    seen, last = {}, "none"
    for ask in (None, 1, 3.98, 100):
        if ask:
            readout.fill(str(ask))
            readout.press("Enter")
            page.locator(f'.widget-output pre:has-text("logit_scale {ask:.2f}:")').wait_for()
        page.locator(f'.widget-output img:not([src="{last}"])').wait_for()  # the picture comes after the text
        s, g, picture = shown(page)
        last = page.locator(".widget-output img").get_attribute("src")
        assert g == pytest.approx(gradient(s), abs=2e-4)
        seen[round(s, 2)] = (g, *blue(picture))
        shot(page, f"losses-scale-{s:.0f}")
    assert list(seen) == [10.0, 1.0, 3.98, 100.0]
    u, v = features()
    for s, (_, width, _) in seen.items():  # the bar is as long as the softmax is large
        assert width / seen[100.0][1] == pytest.approx(softmax(s * u @ v.T, 1)[4, 4] / softmax(100 * u @ v.T, 1)[4, 4], abs=0.02)
    assert seen[1.0][2] < seen[3.98][2] < seen[10.0][2] < seen[100.0][2]  # the mark moves to the right
    assert seen[3.98][0] > max(seen[1.0][0], seen[100.0][0])
