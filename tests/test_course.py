"""The map of the pipeline, and the two ways to show that a call is refused."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from kklip_nb.course import FLOORS, STEPS, pipeline_map, refused, refuses


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


def test_an_unknown_step_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'losses'; expected one of Data, Teacher"): pipeline_map("losses")


def test_refused_prints_the_message(capsys):
    refused(int, "two")
    assert capsys.readouterr().out.startswith("ValueError: invalid literal")
    with pytest.raises(AssertionError, match="int should refuse"): refused(int, "2")
    with pytest.raises(ZeroDivisionError): refused(lambda: 1 / 0)  # a bug is no refusal


def check_even(even): assert even(2) and not even(3)
def always(n): return True
def right(n): return n % 2 == 0
def broken(n): raise TypeError("broken")


def test_refuses_names_the_wrong_answer_that_passes(capsys):
    refuses(check_even, always)
    assert capsys.readouterr().out == "always is refused\n"
    with pytest.raises(AssertionError, match="right is wrong and passes check_even"): refuses(check_even, always, right)
    with pytest.raises(TypeError): refuses(check_even, broken)  # a check that dies of an answer refuses nothing
