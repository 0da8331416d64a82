"""The map of the pipeline, and the two ways to show that a call is refused."""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from kklip_nb.course import _ARROWS, FLOORS, STEPS, pipeline_map, refused, refuses

ROOT = Path(__file__).resolve().parent.parent


def marked(figure) -> list[str]:
    "The words in white, which stand in black boxes."
    return [t.get_text() for t in figure.axes[0].texts if to_rgb(t.get_color()) == (1, 1, 1)]


def black(figure) -> int:
    return sum(to_rgb(box.get_facecolor()[:3]) == (0, 0, 0) for box in figure.axes[0].patches if isinstance(box, plt.Rectangle))


@pytest.mark.parametrize("here", [*STEPS, *FLOORS])
def test_the_map_marks_one_step(here):
    figure = pipeline_map(here)
    assert len(marked(figure)) == black(figure) == 1 and here in marked(figure)[0]
    plt.close(figure)


def test_the_map_without_a_step_marks_none_and_has_every_box():
    figure = pipeline_map()
    texts = {t.get_text() for t in figure.axes[0].texts}
    assert not marked(figure) and {f"{i} {name}" for i, name in enumerate(STEPS)} <= texts
    plt.close(figure)


def test_no_two_boxes_of_the_map_overlap():
    figure = pipeline_map()
    figure.canvas.draw()
    boxes = [p.get_window_extent() for p in figure.axes[0].patches if isinstance(p, plt.Rectangle)]
    assert len(boxes) == len(STEPS) + len(FLOORS)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close(figure)


def test_the_steps_are_the_notebooks_and_the_floors_their_folders():
    assert [f"{i:02}_{name.lower()}" for i, name in enumerate(STEPS)] == sorted(p.stem for p in (ROOT / "nbs").glob("0*.ipynb"))
    assert all((ROOT / "nbs" / name.lower()).is_dir() for name in FLOORS)


def test_each_arrow_leads_from_a_step_to_what_needs_it_and_says_what_goes_along():
    figure = pipeline_map("Losses")
    ax = figure.axes[0]
    boxes = {t.get_text().split(" ", 1)[1]: t.get_position() for t in ax.texts if t.get_text()[:1].isdigit()}
    assert boxes.keys() == STEPS.keys()
    arrows = [t for t in ax.texts if getattr(t, "arrow_patch", None)]
    ends = {(name(t.xyann), name(t.xy)): t for t in arrows for name in [lambda xy: next(n for n, at in boxes.items() if at == xy)]}
    assert {("Data", "Teacher"), ("Data", "Student"), ("Teacher", "Concepts"), ("Student", "Losses"), ("Losses", "Training"), ("Training", "Evaluation")} <= ends.keys() == _ARROWS.keys()
    assert all(t.arrow_patch.get_arrowstyle().arrow == "-|>" and {"patchA", "patchB"} <= t.arrowprops.keys() for t in arrows) and all(boxes[a][0] < boxes[b][0] or boxes[a][1] != boxes[b][1] for a, b in ends)
    words = {t.get_text(): t.get_position() for t in ax.texts if t.get_text() in _ARROWS.values() and t.get_text()}
    for (a, b), word in _ARROWS.items():
        if not word: continue
        x, y = ((p + q) / 2 for p, q in zip(boxes[a], boxes[b]))
        assert words[word] == pytest.approx((x, y + 0.14 if boxes[a][1] == boxes[b][1] else y))
    given = {("Data", "Teacher"): "captions", ("Data", "Student"): "pairs", ("Teacher", "Concepts"): "embeddings", ("Concepts", "Losses"): "soft labels", ("Student", "Losses"): "features"}
    assert given == {ends: word for ends, word in _ARROWS.items() if word}
    plt.close(figure)


def test_everything_is_in_the_picture():
    figure = pipeline_map("Scale")
    figure.canvas.draw()
    frame = figure.axes[0].get_window_extent()
    for t in [*figure.axes[0].texts, *figure.axes[0].patches]:
        box = t.get_window_extent()
        if t in figure.axes[0].patches or t.get_text(): assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, t
    named = [(t, t.get_window_extent()) for t in figure.axes[0].texts if t.get_text()]
    boxes = [p.get_window_extent() for p in figure.axes[0].patches if isinstance(p, plt.Rectangle)]
    for t, box in named:  # a name fits into its box
        if t.get_weight() == "bold": assert any(b.x0 < box.x0 and box.x1 < b.x1 and b.y0 < box.y0 and box.y1 < b.y1 for b in boxes), t
    assert not figure.axes[0].axison
    plt.close(figure)


def test_an_unknown_step_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'losses'; expected one of Data, Teacher"): pipeline_map("losses")


def test_refused_prints_the_message(capsys):
    refused(int, "two")
    assert capsys.readouterr().out.startswith("ValueError: invalid literal")
    with pytest.raises(AssertionError, match="int should refuse"): refused(int, "2")
    with pytest.raises(ZeroDivisionError): refused(lambda: 1 / 0)  # a bug is no refusal


@pytest.mark.parametrize("error", [ValueError, IndexError, KeyError, TypeError, FileNotFoundError, PermissionError])
def test_every_kind_of_refusal_counts_and_options_are_passed_on(error, capsys):
    def call(a, b=None): raise error(f"{a} {b}")
    refused(call, "x", b="y")
    shown = capsys.readouterr().out
    assert shown.startswith(error.__name__) and "x y" in shown and refused(call, 1) is None and "1 None" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="functools.partial.* should refuse"): refused(partial(int, "2"))


def check_even(even): assert even(2) and not even(3)
def always(n): return True
def right(n): return n % 2 == 0
def broken(n): raise TypeError("broken")


def test_refuses_names_the_wrong_answer_that_passes(capsys):
    refuses(check_even, always)
    assert capsys.readouterr().out == "always is refused\n"
    with pytest.raises(AssertionError, match="right is wrong and passes check_even"): refuses(check_even, always, right)
    with pytest.raises(AssertionError, match="partial.* is wrong"): refuses(check_even, partial(right))
    refuses(check_even, partial(always), always)
    assert capsys.readouterr().out.endswith(" is refused\nalways is refused\n")
    with pytest.raises(TypeError): refuses(check_even, broken)  # a check that dies of an answer refuses nothing
