"""The recipe: a reason for every setting, a door that is checked once, and nothing but the standard library."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kklip_nb import training
from kklip_nb.recipe import CLIP, LAPTOP, PAPER, Recipe, recipe_table


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
    epochs=(0, -1, 2.5, np.bool_(True), "3", True, None, math.inf), batch_size=(1, 0, 256.0), k=(0, math.nan, np.float64(3), np.array([3])), words=(-1,), first_steps=(-1, 1.5), first_batch=(0,), first_lr=(0, -1.0), warmup=(-1,),
    seed=(-1, 0.5, 2**32, math.nan), layer=(1.0, None), lr=(0, 0.0, -1e-3, math.nan, math.inf, "1e-3", True), temperature=(0.0, math.nan, -math.inf),
    alpha=(-1.0, math.nan, math.inf), beta=(-0.1,), gamma=(math.inf, 10**400, "1"), weight_decay=(-0.1, math.nan), train_image=("none", None),
    normalise=("length",), projection=("deep",), concept_on=("none", ""), pooling=("first",), prompt=("no place", None),
    student=(None, 3, "", " "), pretrained=(3, ""), teacher=("", None), imagenet=(1, None), word_table=("yes",)).items() for value in values]


@pytest.mark.parametrize("name, value", WRONG)
def test_an_impossible_setting_is_an_error_before_any_work(name, value):
    for make in (lambda: Recipe(**{name: value}), lambda: dataclasses.replace(LAPTOP, **{name: value})):
        with pytest.raises(ValueError) as error: make()
        assert f"{name}={value!r}" in str(error.value) and "expected" in str(error.value)


# what each setting may be, at the edges; a new setting without an entry fails
TINIEST, LARGEST = 5e-324, sys.float_info.max
RIGHT = dict(
    student=("ViT-B-32", "kklip-laptop"), pretrained=(None, "openai"), imagenet=(True, False), train_image=("head", "last", "all"), teacher=("gpt2",), pooling=("last", "mean"), layer=(-1, 0, 40),
    prompt=("{}", "a {} b {}"), k=(1, 10**6), normalise=("unit", "raw"), projection=("linear", "mlp"), concept_on=("both", "image", "text", "concat"), temperature=(TINIEST, 1e-4, LARGEST),
    alpha=(0.0, LARGEST), beta=(0.0, 0.01), gamma=(0.0, 1.0), word_table=(True, False), words=(0, 10**7), first_steps=(0, 1), first_batch=(1,), first_lr=(TINIEST, LARGEST), epochs=(1, 10**6),
    batch_size=(2, 10**6), lr=(TINIEST, LARGEST), weight_decay=(0.0, 2.0), warmup=(0, 10**6), seed=(0, 2**32 - 1))


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda f: f.name)
def test_every_setting_takes_all_that_a_run_can_use_and_keeps_it(field):
    for value in (field.default, *RIGHT[field.name]): assert getattr(Recipe(**{field.name: value}), field.name) == value
    if "one_of" in field.metadata["allowed"]: assert {*field.metadata["allowed"]["one_of"]} == {*RIGHT[field.name]}


class Scalar:
    "A number as numpy and torch have it, which the standard library does not know."
    shape = ()
    def __init__(self, value): self.value = value
    def item(self): return self.value


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda f: f.name)
def test_numbers_of_numpy_and_torch_become_python_s(field):
    kinds = [Scalar, *({bool: [np.bool_, torch.tensor], int: [np.int64, np.int32, torch.tensor], float: [np.float64, torch.tensor], str: [np.str_]}.get(field.type, []))]
    for kind in kinds:
        got = getattr(Recipe(**{field.name: kind(field.default)}), field.name)
        assert type(got) is type(field.default) and got == (pytest.approx(field.default) if field.type is float else field.default)
        json.dumps(got)
    if field.type is float:
        whole = dataclasses.replace(LAPTOP, **{field.name: 3})
        assert type(getattr(whole, field.name)) is float and key(whole) == key(dataclasses.replace(LAPTOP, **{field.name: 3.0})), "one run, one key"


def key(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode()).hexdigest()[:16]


def test_whole_numbers_pass_for_floats_and_hashes_stay():
    assert Recipe(alpha=2, lr=1).alpha == 2 and Recipe(warmup=0, words=0, gamma=0, layer=-1, pretrained="openai").gamma == 0
    assert [key(r) for r in (LAPTOP, CLIP, PAPER)] == ["1db811fda8321786", "7dbbd9867893f072", "10868604b245c981"]
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(LAPTOP)))) == LAPTOP and hash(Recipe()) == hash(LAPTOP)


def test_plain_clip_differs_where_it_is_said_to_and_the_paper_s_values_are_beside_ours():
    assert {k for k, v in dataclasses.asdict(CLIP).items() if v != getattr(LAPTOP, k)} == {"alpha", "beta", "word_table", "first_steps"}
    assert (CLIP.alpha, CLIP.beta, CLIP.word_table, CLIP.first_steps) == (0, 0, False, 0)
    said = {r["setting"]: r["paper"] for r in recipe_table(LAPTOP) if r["paper"] != "not said"}
    assert said == dict(teacher="Llama 2", alpha="1", beta="0.01", gamma="1", epochs="100", lr="5e-5")
    for name in ("alpha", "beta", "gamma", "epochs", "lr"): assert getattr(PAPER, name) == float(said[name])


def test_a_recipe_cannot_be_changed():
    recipe = Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError): recipe.alpha = 0.0
