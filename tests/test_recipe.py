"""The recipe: a reason for every setting, a door that is checked once, and nothing but the standard library."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys

import pytest

from kklip_nb import training
from kklip_nb.recipe import LAPTOP, PAPER, Recipe, recipe_table


def test_the_recipe_needs_the_standard_library_alone():
    code = "import sys; old = {*sys.modules}; import kklip_nb.recipe; print(*{m.split('.')[0] for m in {*sys.modules} - old})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.sep).stdout.split()
    assert {"kklip_nb"} <= {*loaded} <= {"kklip_nb", *sys.stdlib_module_names}  # no torch, no numpy


def test_training_hands_the_recipe_on():
    assert all(getattr(training, x.__name__) is x for x in (Recipe, recipe_table))
    assert training.LAPTOP is LAPTOP and training.PAPER is PAPER


def test_every_setting_has_a_reason_and_the_paper_s_value():
    rows = recipe_table(LAPTOP)
    assert [r["setting"] for r in rows] == [f.name for f in dataclasses.fields(Recipe)]
    assert all(r["reason"] and r["paper"] for r in rows) and {r["setting"]: r["paper"] for r in rows}["beta"] == "0.01"
    assert all(r["ours"] == str(getattr(PAPER, r["setting"])) for r in recipe_table(PAPER))
    assert set(rows[0]) == {"setting", "ours", "paper", "reason"}


WRONG = [(name, value) for name, values in dict(
    epochs=(0, -1, 2.5, "3", True, None, math.inf), batch_size=(1, 0, 256.0), k=(0,), words=(-1,), first_steps=(-1, 1.5), first_batch=(0,), first_lr=(0, -1.0), warmup=(-1,),
    seed=(-1, 0.5), layer=(1.0, None), lr=(0, 0.0, -1e-3, math.nan, math.inf, "1e-3", True), temperature=(0.0, math.nan, -math.inf),
    alpha=(-1.0, math.nan, math.inf), beta=(-0.1,), gamma=(math.inf,), weight_decay=(-0.1, math.nan), train_image=("none", None),
    normalise=("length",), projection=("deep",), concept_on=("none", ""), pooling=("first",), prompt=("no place", None),
    student=(None, 3), pretrained=(3,), imagenet=(1, None), word_table=("yes",)).items() for value in values]


@pytest.mark.parametrize("name, value", WRONG)
def test_an_impossible_setting_is_an_error_before_any_work(name, value):
    for make in (lambda: Recipe(**{name: value}), lambda: dataclasses.replace(LAPTOP, **{name: value})):
        with pytest.raises(ValueError) as error: make()
        assert f"{name}={value!r}" in str(error.value) and "expected" in str(error.value)


def test_whole_numbers_pass_for_floats_and_hashes_stay():
    assert Recipe(alpha=2, lr=1).alpha == 2 and Recipe(warmup=0, words=0, gamma=0, layer=-1, pretrained="openai").gamma == 0
    key = json.dumps(dataclasses.asdict(LAPTOP), sort_keys=True)
    assert hashlib.sha256(key.encode()).hexdigest()[:16] == "1db811fda8321786"
    assert Recipe(**json.loads(key)) == LAPTOP and hash(Recipe()) == hash(LAPTOP)
