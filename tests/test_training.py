"""The loop, the recipe, the map of gradients, and that a killed run goes on as if nothing had happened."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from kklip_nb import training
from kklip_nb.data import Pairs
from kklip_nb.student import Student, WordTable
from kklip_nb.training import (Inputs, Recipe, compute_losses, epoch_batches, learning_rate, load_checkpoint, make_optimizer,
                               recipe_table, save_checkpoint, train, train_step)

N, TEACHER, K = 24, 10, 4
TINY = Recipe(epochs=3, batch_size=8, lr=1e-3, warmup=2, alpha=2.0, beta=0.5, k=K)


def tiny_student(seed: int = 0) -> Student:
    "A CLIP of a few thousand parameters on 8-pixel pictures."
    torch.manual_seed(seed)
    clip = open_clip.CLIP(16, dict(image_size=8, patch_size=4, width=32, head_width=16, layers=1),
                          dict(context_length=6, vocab_size=50, width=16, heads=2, layers=1))
    return Student(clip, 16, TEACHER, K, train_image="all").train()


def tiny_inputs() -> Inputs:
    "Random pairs; every token row ends with the largest id, as CLIP's tokeniser has it."
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 48, (N, 6), generator=g)
    tokens[:, -1] = 49
    labels = torch.rand(N, K, generator=g).softmax(-1)
    return Inputs([f"caption {i}" for i in range(N)], torch.randn(N, 3, 8, 8, generator=g), tokens,
                  torch.randn(N, TEACHER, generator=g), labels)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    "Equal to the last bit?"
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_same_seed_same_run():
    one, two = tiny_student(), tiny_student()
    assert train(one, tiny_inputs(), TINY) == train(two, tiny_inputs(), TINY)
    assert same_weights(one, two)


def test_another_seed_another_run():
    one = train(tiny_student(), tiny_inputs(), TINY)
    assert one != train(tiny_student(), tiny_inputs(), dataclasses.replace(TINY, seed=1))


def test_eight_pairs_are_learnt_by_heart():
    recipe = dataclasses.replace(TINY, epochs=120, batch_size=8, lr=3e-3)
    inputs = training.batch_of(tiny_inputs(), range(8))
    history = train(tiny_student(), inputs, recipe)
    assert history[0]["contrastive"] > 1.5 and history[-1]["contrastive"] < 0.1


def test_learning_rate_is_linear_then_half_a_cosine():
    rates = [learning_rate(s, 100, 2.0, 10) for s in range(100)]
    np.testing.assert_allclose(rates[:10], np.linspace(0.2, 2.0, 10))
    np.testing.assert_allclose(rates[10:], [1 + math.cos(math.pi * t / 90) for t in range(90)])
    # torch's own schedule says the same
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    reference = []
    for _ in range(90):
        reference.append(optimizer.param_groups[0]["lr"])
        optimizer.step(); cosine.step()
    np.testing.assert_allclose(rates[10:], reference, atol=1e-12)


def test_biases_norms_and_logit_scale_do_not_decay():
    student = tiny_student()
    decayed, free = make_optimizer(student, 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    names = {id(p): n for n, p in student.named_parameters()}
    undecayed = {names[id(p)] for p in free["params"]}
    assert "clip.logit_scale" in undecayed and all(n.endswith(("bias", "logit_scale")) or "ln" in n or "class_embedding" in n
                                                    for n in undecayed)
    assert len(decayed["params"]) + len(free["params"]) == len(list(student.parameters()))


def test_a_step_is_torch_s_own_adamw_on_the_written_out_loss():
    # in double precision: the gradient of the keys' bias is 0 but for rounding, and Adam would blow the rounding up
    ours, naive, batch = tiny_student().double(), tiny_student().double(), training.batch_of(tiny_inputs(), range(8))
    batch = batch._replace(images=batch.images.double(), targets=batch.targets.double(), labels=batch.labels.double())
    result = train_step(ours, make_optimizer(ours, 1e-3, 0.1), batch, TINY, 5e-4)
    image, text = naive.clip.encode_image(batch.images), naive.clip.encode_text(batch.tokens)
    unit_image, unit_text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    distillation = sum(((naive.to_teacher(u) - t) ** 2).sum() for u, t in zip(unit_text, batch.targets)) / 8
    concept = 0
    for head, x in ((naive.image_concepts, image), (naive.text_concepts, text)):
        logits = head(x / x.pow(2).mean(1, keepdim=True).sqrt())
        concept = concept - (batch.labels * logits.log_softmax(1)).sum(1).mean() / 2
    contrastive = open_clip.loss.ClipLoss()(unit_image, unit_text, naive.clip.logit_scale.exp())
    total = 2.0 * distillation + 0.5 * concept + contrastive
    assert result["total"] == pytest.approx(total.item(), rel=1e-5)
    optimizer = torch.optim.AdamW([dict(params=[p for p in naive.parameters() if p.ndim >= 2], weight_decay=0.1),
                                   dict(params=[p for p in naive.parameters() if p.ndim < 2], weight_decay=0.0)],
                                  lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    total.backward(); optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), naive.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_plain_clip_needs_no_teacher_and_no_concepts():
    "With alpha = beta = 0 the three maps get no gradient and the towers do not depend on the targets."
    recipe = dataclasses.replace(TINY, alpha=0.0, beta=0.0, weight_decay=0.0)
    one, two = tiny_student(), tiny_student()
    before = {k: v.clone() for k, v in one.state_dict().items()}
    train(one, tiny_inputs(), recipe)
    train(two, tiny_inputs()._replace(targets=torch.zeros(N, TEACHER)), recipe)
    assert same_weights(one.clip, two.clip)
    assert torch.equal(one.to_teacher.weight, before["to_teacher.weight"])


def test_logit_scale_never_passes_one_hundred():
    student = tiny_student()
    with torch.no_grad(): student.clip.logit_scale.fill_(5.0)
    train_step(student, make_optimizer(student, 1e-3, 0.0), training.batch_of(tiny_inputs(), range(8)), TINY, 1e-3)
    assert student.clip.logit_scale.exp().item() <= 100.001


def test_an_epoch_sees_each_pair_once_and_another_order_each_time():
    inputs = tiny_inputs()
    orders = [[c for b in epoch_batches(inputs, TINY, e) for c in b.captions] for e in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(inputs.captions) and orders[0] != orders[1] and orders[0] == orders[2]


class Stop(Exception):
    "Raised in the middle of a run."


def test_an_interrupted_run_resumes_to_the_bit(tmp_path, monkeypatch):
    whole = tiny_student()
    history = train(whole, tiny_inputs(), TINY)
    calls, step = [], training.train_step
    def failing(*args):
        calls.append(1)
        if len(calls) == 8: raise Stop
        return step(*args)
    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(training, "train_step", failing)
    with pytest.raises(Stop): train(tiny_student(), tiny_inputs(), TINY, checkpoint=path)
    monkeypatch.setattr(training, "train_step", step)
    resumed = tiny_student(seed=9)  # other weights: all must come from the file
    assert train(resumed, tiny_inputs(), TINY, checkpoint=path) == history
    assert same_weights(whole, resumed)


def test_a_killed_process_resumes_to_the_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch, dataclasses; torch.set_num_threads(1)\n"
            "from test_training import *\n"
            f"train(tiny_student(), tiny_inputs(), dataclasses.replace(TINY, epochs=150), checkpoint={str(path)!r})")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.time() + 120
    while not path.exists() and time.time() < deadline: time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    recipe = dataclasses.replace(TINY, epochs=150)
    done, _ = load_checkpoint(path, tiny_student(), None, recipe)
    assert 0 < done < 150
    # the epochs after the kill, and a run that was never killed
    resumed, whole = tiny_student(seed=9), tiny_student()
    torch.manual_seed(0)
    resumed_history = train(resumed, tiny_inputs(), recipe, checkpoint=path)
    assert resumed_history == train(whole, tiny_inputs(), recipe)
    assert same_weights(whole, resumed)


def test_random_state_is_restored(tmp_path):
    student = tiny_student()
    optimizer = make_optimizer(student, 1e-3, 0.1)
    torch.manual_seed(5)
    save_checkpoint(tmp_path / "c.safetensors", student, optimizer, TINY, 1, [])
    expected = torch.rand(3)
    load_checkpoint(tmp_path / "c.safetensors", student, optimizer, TINY)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle", "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, damage):
    path, student = tmp_path / "c.safetensors", tiny_student()
    save_checkpoint(path, student, make_optimizer(student, 1e-3, 0.1), TINY, 1, [])
    if damage == "truncated": path.write_bytes(path.read_bytes()[:-100])
    if damage == "text": path.write_text("not a checkpoint")
    if damage == "pickle": torch.save(student.state_dict(), path)
    if damage == "foreign": save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="c.safetensors"): load_checkpoint(path, student, None, TINY)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    path, student = tmp_path / "c.safetensors", tiny_student()
    save_checkpoint(path, student, make_optimizer(student, 1e-3, 0.1), TINY, 1, [])
    with pytest.raises(ValueError, match="alpha.*2.0.*3.0"):
        load_checkpoint(path, student, None, dataclasses.replace(TINY, alpha=3.0))
    with pytest.raises(FileNotFoundError): load_checkpoint(tmp_path / "none.safetensors", student, None, TINY)


def test_a_checkpoint_is_plain_tensors_and_json(tmp_path):
    from safetensors import safe_open
    path, student = tmp_path / "c.safetensors", tiny_student()
    save_checkpoint(path, student, make_optimizer(student, 1e-3, 0.1), TINY, 1, [dict(total=1.0)])
    assert any(k.startswith("student.") for k in load_file(path))
    with safe_open(path, framework="pt") as file: metadata = file.metadata()
    assert json.loads(metadata["recipe"]) == dataclasses.asdict(TINY)
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".part")]


def test_every_setting_has_a_reason_and_the_paper_s_value():
    rows = recipe_table(training.LAPTOP)
    assert [r["setting"] for r in rows] == [f.name for f in dataclasses.fields(Recipe)]
    assert all(r["reason"] and r["paper"] for r in rows)


def test_a_batch_of_nan_is_refused():
    batch = training.batch_of(tiny_inputs(), range(8))
    bad = batch._replace(targets=batch.targets * float("nan"))
    with pytest.raises(ValueError, match="NaN"): compute_losses(tiny_student(), bad, TINY)


def test_repeated_captions_are_counted_as_they_are_batched():
    "With repeats fewer batches may fit into an epoch; the schedule must end where the run ends."
    inputs = tiny_inputs()._replace(captions=["twin"] * 12 + [f"caption {i}" for i in range(12)])
    history = train(tiny_student(), inputs, TINY)
    assert len(history) == training._count_steps(inputs.captions, TINY) < TINY.epochs * (N // TINY.batch_size)
    assert history[-1]["lr"] == pytest.approx(learning_rate(len(history) - 1, len(history), TINY.lr, TINY.warmup))


def test_weights_alone_leave_the_random_state(tmp_path):
    student = tiny_student()
    save_checkpoint(tmp_path / "c.safetensors", student, make_optimizer(student, 1e-3, 0.1), TINY, 1, [])
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_checkpoint(tmp_path / "c.safetensors", student, None, TINY)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_is_named_by_all_that_it_reads():
    recipe = dataclasses.replace(TINY, alpha=1.0, word_batch=2, word_table=True)
    pairs = Pairs(np.zeros((4, 2, 2, 3), np.uint8), list("abcd"), list("abcd"), [None] * 4, [None] * 4)
    table = WordTable(np.arange(3), np.ones((3, 4), np.float32))
    material = training.Material(pairs, np.eye(4), ["x", "y"], np.ones((2, 4)), table)
    def path(material=material, rows=(0, 1, 2), **changed):
        return training.checkpoint_path("folder", dataclasses.replace(recipe, **changed), material, rows)
    other_pictures = material._replace(pairs=pairs._replace(images=pairs.images + 1))
    others = [path(seed=1), path(material._replace(embeddings=2 * np.eye(4))), path(rows=(0, 1)), path(other_pictures),
              path(material._replace(word_embeddings=np.zeros((2, 4)))), path(material._replace(word_table=table._replace(ids=np.arange(1, 4))))]
    assert path() == path(rows=np.arange(3)) and path().parent == Path("folder") and len({path(), *others}) == 7
    assert training.run_key(recipe, material, [0, 1, 2]) in path().name
    assert training.run_key(recipe, material, [0]) == training.run_key(recipe, other_pictures, [0])
    unread = material._replace(word_embeddings=np.zeros((2, 4)), word_table=table._replace(ids=np.arange(1, 4)))
    for plain in (dict(alpha=0.0, word_table=False), dict(word_batch=0, word_table=False)): assert path(**plain) == path(unread, **plain)
