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
from kklip_nb.student import Student, WordTable, build_student, cut_padding, prepare_images, tokenize
from kklip_nb.training import (Inputs, Recipe, Texts, compute_losses, epoch_batches, learning_rate, load_checkpoint, make_optimizer,
                               optimizer_step, prepare_inputs, save_checkpoint, train, train_step)

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


def test_nan_shows_in_the_loss_and_the_step_is_not_taken():
    batch = training.batch_of(tiny_inputs(), range(8))
    bad = batch._replace(targets=batch.targets * float("nan"))
    student = tiny_student()
    try: result = train_step(student, make_optimizer(student, 1e-3, 0.1), bad, TINY, 1e-3)
    except ValueError as error: assert "NaN" in str(error)
    else: assert math.isnan(result["total"]) and math.isnan(result["gradient_norm"])
    assert same_weights(student, tiny_student())


def test_repeated_captions_are_counted_as_they_are_batched():
    "With repeats fewer batches may fit into an epoch; the schedule must end where the run ends."
    inputs = tiny_inputs()._replace(captions=["twin"] * 12 + [f"caption {i}" for i in range(12)])
    history = train(tiny_student(), inputs, TINY)
    counted = sum(len(list(epoch_batches(inputs, TINY, epoch))) for epoch in range(TINY.epochs))
    assert len(history) == counted < TINY.epochs * (N // TINY.batch_size)
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
    recipe = dataclasses.replace(TINY, alpha=1.0, first_steps=2, word_table=True)
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
    plain = dict(first_steps=0, word_table=False)
    assert path(**plain) == path(unread, **plain)
    only = [training.run_key(dataclasses.replace(recipe, **changed), material, [0], ("first_lr", "seed")) for changed in ({}, dict(alpha=3.0), dict(first_lr=1.0), dict(seed=2))]
    assert only[0] == only[1] and len(set(only)) == 3


# ---- what a step reads

def test_concept_loss_on_each_modality_and_side_by_side():
    student, batch = tiny_student(), training.batch_of(tiny_inputs(), range(8))
    parts = {on: compute_losses(student, batch, dataclasses.replace(TINY, concept_on=on))[1]["concept"] for on in ("image", "text", "both", "concat")}
    x, y = (f / f.pow(2).mean(1, keepdim=True).sqrt() for f in (student.encode_image(batch.images), student.encode_text(batch.tokens)))
    logits = dict(image=student.image_concepts(x), text=student.text_concepts(y))
    logits["concat"] = torch.cat([x, y], 1) @ torch.cat([student.image_concepts.weight, student.text_concepts.weight], 1).T
    logits["concat"] = logits["concat"] + student.image_concepts.bias + student.text_concepts.bias
    for on, z in logits.items(): torch.testing.assert_close(parts[on], -(batch.labels * z.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(parts["both"], (parts["image"] + parts["text"]) / 2)


def test_text_batches_hold_every_caption_once_and_captions_of_like_length():
    rng = np.random.default_rng(0)
    tokens = torch.zeros(103, 9, dtype=torch.long)
    for row, length in enumerate(rng.integers(2, 10, 103)): tokens[row, :length] = 1
    batches = training.text_batches(tokens, 16, seed=0, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(103)) and len(batches) == 7 and max(map(len, batches)) <= 16
    lengths = tokens.sum(1).numpy()
    spans = sorted((lengths[rows].min(), lengths[rows].max()) for rows in batches)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])), "no batch is longer than the next one's shortest"
    again = training.text_batches(tokens, 16, seed=0, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    for other in (dict(seed=1, epoch=0), dict(seed=0, epoch=1)): assert any(not np.array_equal(a, b) for a, b in zip(batches, training.text_batches(tokens, 16, **other)))


def test_the_first_stage_is_a_naive_loop_over_distillation_alone():
    inputs, recipe = tiny_inputs(), dataclasses.replace(TINY, first_steps=5, first_batch=8, first_lr=0.01, warmup=2, seed=3)
    texts, student, naive = Texts(inputs.tokens, inputs.targets), tiny_student(), tiny_student()
    before = {n: p.clone() for n, p in student.named_parameters()}
    history = training.first_stage(student, texts, recipe)
    optimizer, rows = make_optimizer(naive, 0.01, recipe.weight_decay), [r for e in range(9) for r in training.text_batches(texts.tokens, 8, 3, e)]
    for step in range(5):
        predicted = naive.to_teacher(torch.nn.functional.normalize(naive.clip.encode_text(texts.tokens[rows[step]]), dim=1))
        loss = (predicted - texts.targets[rows[step]]).pow(2).sum(1).mean()
        optimizer.zero_grad(); loss.backward()
        for group in optimizer.param_groups: group["lr"] = learning_rate(step, 5, 0.01, 2)
        optimizer.step()
        assert history[step]["distillation"] == pytest.approx(loss.item(), rel=1e-5) and history[step]["lr"] == learning_rate(step, 5, 0.01, 2)
    for (n, p), q in zip(student.named_parameters(), naive.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=n)
    moved = {n for n, p in student.named_parameters() if not p.equal(before[n])}
    assert moved and not any("visual" in n or "concepts" in n or "logit_scale" in n for n in moved), "the text side and its map alone"


def test_the_first_stage_hears_nothing_of_held_out_captions():
    "Spoil all embeddings that are not of the training split: what the first stage reads does not move."
    pairs, rng, rows = few_pairs(), np.random.default_rng(0), np.arange(4)
    table = WordTable(np.arange(300, 400), rng.normal(size=(100, 128)).astype(np.float32))
    embeddings, word_embeddings = rng.normal(size=(6, 8)).astype(np.float32), rng.normal(size=(2, 8)).astype(np.float32)
    student, texts = build_student(teacher_dim=8, n_concepts=2, imagenet=False), []
    for spoiled in (embeddings, embeddings + 5 * ~np.isin(np.arange(6), rows)[:, None]):
        material = training.Material(pairs, spoiled, ["house", "green"], word_embeddings, table)
        targets, _, labels = training.make_targets(spoiled, rows, dataclasses.replace(TINY, k=2))
        inputs = prepare_inputs(student, pairs, targets, labels)
        texts.append(training.first_texts(student, inputs, material, rows, TINY))
    assert len(texts[0].tokens) == 6 and all(a.equal(b) for a, b in zip(*texts))


def test_a_first_stage_that_diverges_is_refused():
    recipe = dataclasses.replace(TINY, first_steps=9, first_batch=8, first_lr=1e30)
    with pytest.raises(ValueError, match="first stage is not finite.*first_lr"): training.first_stage(tiny_student(), Texts(*tiny_inputs()[2:4]), recipe)


def test_a_first_stage_is_kept_under_what_it_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    texts, recipe, calls = Texts(*tiny_inputs()[2:4]), dataclasses.replace(TINY, first_steps=3, first_batch=8), []
    real = training.first_stage
    monkeypatch.setattr(training, "first_stage", lambda *args: calls.append(1) or real(*args))
    one, two, other = tiny_student(), tiny_student(), tiny_student()
    history = training.cached_first_stage(one, texts, recipe, "a")
    assert training.cached_first_stage(two, texts, recipe, "a") == history and len(calls) == 1 and same_weights(one, two)
    training.cached_first_stage(other, texts, recipe, "b")
    assert len(calls) == 2
    next(tmp_path.glob("first/*")).write_bytes(b"broken")
    training.cached_first_stage(tiny_student(), texts, recipe, next(iter({"a", "b"} - {p.stem for p in tmp_path.glob("first/*") if p.stat().st_size > 9})))
    assert len(calls) == 3, "a broken file is made anew"


def test_captions_cut_to_the_longest_give_the_same_step():
    "A student that reads 12 tokens, captions of at most 5: the cut batch gives the losses and gradients of the whole one."
    def student():
        torch.manual_seed(0)
        clip = open_clip.CLIP(16, dict(image_size=8, patch_size=4, width=32, head_width=16, layers=1),
                              dict(context_length=12, vocab_size=50, width=16, heads=2, layers=1))
        return Student(clip, 16, TEACHER, K, train_image="all").train()
    inputs, lengths = tiny_inputs(), torch.arange(N) % 4 + 2
    tokens = torch.zeros(N, 12, dtype=torch.long)
    for row, length in enumerate(lengths): tokens[row, :length] = torch.cat([inputs.tokens[row, :length - 1], torch.tensor([49])])
    inputs = inputs._replace(tokens=tokens)
    rows = [r for r in range(N) if lengths[r] < 5][:8]
    cut = training.batch_of(inputs, rows)
    whole = cut._replace(tokens=tokens[rows])
    assert cut.tokens.shape == (8, 4) and cut.tokens.equal(tokens[rows, :4])
    a, b = student(), student()
    one, two = train_step(a, make_optimizer(a, 1e-3, 0.1), cut, TINY, 1e-3), train_step(b, make_optimizer(b, 1e-3, 0.1), whole, TINY, 1e-3)
    assert one == pytest.approx(two, rel=1e-5)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def few_pairs(n: int = 6) -> Pairs:
    "Noise as pictures, with names of different lengths."
    names = ["dog", "pizza", "rocket", "octopus", "fire engine", "red apple on a plate"][:n]
    return Pairs(np.random.default_rng(0).integers(0, 255, (n, 128, 128, 3), dtype=np.uint8), names, names, [None] * n, [None] * n)


def test_inputs_hold_what_they_were_made_from(monkeypatch, tmp_path):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    pairs, rng = few_pairs(), np.random.default_rng(0)
    targets, labels = rng.normal(size=(6, 5)), rng.dirichlet(np.ones(3), size=6)
    for train_image, shape in (("head", 1280), ("last", 2), ("all", 3)):
        student = build_student(teacher_dim=5, n_concepts=3, imagenet=False, train_image=train_image)
        inputs = prepare_inputs(student, pairs, targets, torch.from_numpy(labels).bfloat16() if shape == 3 else labels)
        assert inputs.images.shape[1] == shape
        two = training.batch_of(inputs, [5, 2])
        assert two.captions == [pairs.captions[5], pairs.captions[2]] and two.tokens.equal(cut_padding(tokenize(student, two.captions)))
        assert two.targets.dtype == two.labels.dtype == torch.float32
        np.testing.assert_allclose(two.targets, targets[[5, 2]], rtol=1e-6)
        np.testing.assert_allclose(two.labels, labels[[5, 2]], rtol=1e-2 if shape == 3 else 1e-6)
        images = prepare_images(student, pairs.images[[5, 2]])
        with torch.no_grad():
            if shape == 2: torch.testing.assert_close(student.encode_image(two.images), student.encode_image(images), rtol=1e-3, atol=1e-3)
            else: torch.testing.assert_close(two.images, student.clip.visual.trunk(images) if shape == 1280 else images, rtol=1e-4, atol=1e-4)


# ---- pictures and mirror images

def sided_inputs() -> Inputs:
    "Two maps a pair: those of the picture are even, of the mirror image odd."
    inputs = tiny_inputs()
    return inputs._replace(images=torch.arange(2 * N).view(N, 2, 1, 1, 1).expand(N, 2, 5, 2, 2).float())


def test_each_step_draws_the_picture_or_its_mirror_image():
    inputs, recipe = sided_inputs(), dataclasses.replace(TINY, epochs=30)
    def sides(seed: int) -> np.ndarray:
        batches = [list(epoch_batches(inputs, dataclasses.replace(recipe, seed=seed), e)) for e in range(recipe.epochs)]
        for batch in sum(batches, []):
            assert batch.images.shape == (8, 5, 2, 2)
            for image, caption in zip(batch.images, batch.captions): assert (image // 2 == int(caption.split()[1])).all()
        return np.array([[int(v) % 2 for _, v in sorted((c, b.images[i, 0, 0, 0]) for b in bs for i, c in enumerate(b.captions))] for bs in batches])
    one, again, other = sides(0), sides(0), sides(1)
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() == pytest.approx(0.5, abs=0.1)
    n = one.size
    for flips in (one, one[1:] != one[:-1], one[:, 1:] != one[:, :-1]): assert abs(flips.mean() - 0.5) < 4 * 0.5 / n**0.5


def test_without_two_maps_nothing_is_drawn():
    inputs = tiny_inputs()
    for batch in epoch_batches(inputs, TINY, 0):
        for image, caption in zip(batch.images, batch.captions): assert image.equal(inputs.images[inputs.captions.index(caption)])


def test_a_run_with_mirror_images_moves_the_last_stage_alone_and_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    recipe = dataclasses.replace(TINY, epochs=2, batch_size=3, k=3, train_image="last", imagenet=False)
    def student(seed: int = 0) -> Student: return build_student(teacher_dim=5, n_concepts=3, imagenet=False, train_image="last", seed=seed)
    rng = np.random.default_rng(0)
    inputs = prepare_inputs(student(), few_pairs(), rng.normal(size=(6, 5)), rng.dirichlet(np.ones(3), size=6))
    whole, path, step, calls = student(), tmp_path / "run.safetensors", training.train_step, []
    history = train(whole, inputs, recipe)
    def failing(*args):
        calls.append(1)
        if len(calls) == 4: raise Stop
        return step(*args)
    monkeypatch.setattr(training, "train_step", failing)
    with pytest.raises(Stop): train(student(), inputs, recipe, checkpoint=path)
    monkeypatch.setattr(training, "train_step", step)
    resumed, start = student(), student().state_dict()
    assert train(resumed, inputs, recipe, checkpoint=path) == history and same_weights(whole, resumed)
    moved = {n.split(".")[3] for n, w in whole.state_dict().items() if "visual.trunk" in n and not w.equal(start[n])}
    assert moved == {"blocks", "conv_head", "bn2"}
    assert all(n.startswith("clip.visual.trunk.blocks.6.") for n, w in whole.state_dict().items() if "trunk.blocks" in n and not w.equal(start[n]))


@pytest.mark.parametrize("targets, labels, said", [
    (np.full((6, 5), np.nan), np.full((6, 2), 0.5), "targets.*NaN"), (np.ones((6, 5)), np.full((6, 2), 0.4), "sum.*0.8"),
    (np.ones((6, 5)), np.tile([1.5, -0.5], (6, 1)), "negative|-0.5"), (np.ones((5, 5)), np.full((6, 2), 0.5), "6 pairs, 5 targets"),
    (np.ones((6, 5)), np.full((3, 2), 0.5), "3 labels"), (np.ones(6), np.full((6, 2), 0.5), "shape"),
    (np.ones((6, 5)), np.zeros(6, int), "dtype|shape")])
def test_labels_and_targets_are_checked_once_where_they_enter(targets, labels, said):
    with pytest.raises(ValueError, match=said): prepare_inputs(tiny_student(), few_pairs(), targets, labels)


def test_targets_and_concepts_know_the_training_rows_alone():
    embeddings, rows = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32), np.arange(20)
    recipe = dataclasses.replace(TINY, temperature=0.3)
    targets, concepts, labels = training.make_targets(embeddings, rows, recipe)
    centred = embeddings - embeddings[rows].mean(0)
    np.testing.assert_allclose(targets, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-6)
    distances = ((targets[:, None] - concepts.centroids) ** 2).sum(2)
    np.testing.assert_allclose(labels, torch.from_numpy(-distances / 0.3).softmax(1), atol=1e-5)
    embeddings[20:] += 5
    again = training.make_targets(embeddings, rows, recipe)
    np.testing.assert_array_equal(again[0][rows], targets[rows])
    np.testing.assert_array_equal(again[2][rows], labels[rows])


def test_the_optimiser_is_clip_s():
    defaults = make_optimizer(tiny_student(), 3e-4, 0.1).defaults
    assert defaults["betas"] == (0.9, 0.98) and defaults["eps"] == 1e-6 and defaults["lr"] == 3e-4


# ---- the end of a step

def with_gradients(scale: float = 1.0) -> Student:
    "A student after a backward pass whose gradients are multiplied by `scale`."
    student = tiny_student()
    compute_losses(student, training.batch_of(tiny_inputs(), range(8)), TINY)[0].backward()
    for p in student.parameters():
        if p.grad is not None: p.grad *= scale
    return student


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_a_step_ends_as_torch_s_clip_and_adamw_end_it(max_norm):
    ours, theirs = with_gradients(), with_gradients()
    norm = optimizer_step(ours, make_optimizer(ours, 9.0, 0.1), 1e-3, max_norm)
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
    assert type(norm) is float and norm == pytest.approx(wanted.item(), rel=1e-6)
    make_optimizer(theirs, 1e-3, 0.1).step()
    for p, q in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, max_norm):
    student = with_gradients()
    student.to_teacher.weight.grad[0, 0] = bad
    optimizer = make_optimizer(student, 1e-3, 0.1)
    assert not math.isfinite(optimizer_step(student, optimizer, 1e-3, max_norm))
    assert same_weights(student, tiny_student()) and not optimizer.state


def test_without_gradients_the_length_is_zero():
    student = tiny_student()
    assert optimizer_step(student, make_optimizer(student, 1e-3, 0.1), 1e-3) == 0.0


def test_a_diverging_run_ends_with_its_last_good_checkpoint(tmp_path):
    "The inputs break in the third epoch: the file holds the second, and goes on where they are mended."
    path, whole = tmp_path / "run.safetensors", tiny_student()
    history = train(whole, tiny_inputs(), TINY)
    train(tiny_student(), tiny_inputs(), TINY, checkpoint=tmp_path / "other.safetensors")
    broken, calls = tiny_inputs(), []
    step = training.train_step
    def later(student, optimizer, batch, *args):
        calls.append(1)
        if len(calls) > 7: batch = batch._replace(images=batch.images * float("inf"))
        return step(student, optimizer, batch, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", later)
        with pytest.raises(ValueError, match="step 7 .*lower the learning rate|NaN"): train(tiny_student(), broken, TINY, checkpoint=path)
    student = tiny_student(seed=9)
    assert load_checkpoint(path, student, None, TINY)[0] == 2 and all(x.isfinite().all() for x in student.state_dict().values())
    assert train(student, tiny_inputs(), TINY, checkpoint=path) == history and same_weights(student, whole)


def test_a_rate_that_is_far_too_high_is_an_error():
    with pytest.raises(ValueError, match="learning rate|NaN"): train(tiny_student(), tiny_inputs(), dataclasses.replace(TINY, lr=1e30))


# ---- the whole run

def test_run_recipe_is_the_steps_of_the_course_in_order(monkeypatch, tmp_path):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    pairs, rng, rows = few_pairs(), np.random.default_rng(0), np.arange(5)
    table = WordTable(np.arange(300, 400), rng.normal(size=(100, 128)).astype(np.float32))
    material = training.Material(pairs, rng.normal(size=(6, 8)).astype(np.float32), ["house", "to walk", "green"], rng.normal(size=(3, 8)).astype(np.float32), table)
    recipe = dataclasses.replace(TINY, epochs=2, batch_size=2, k=2, first_steps=4, first_batch=3, imagenet=False)
    run = training.run_recipe(recipe, material, rows, tmp_path / "runs", device="cpu")
    student = build_student(teacher_dim=8, n_concepts=2, imagenet=False)
    training.start_from_words(student, table)
    targets, concepts, labels = training.make_targets(material.embeddings, rows, recipe)
    inputs = prepare_inputs(student, pairs, targets, labels)
    centred = material.word_embeddings - material.embeddings[rows].mean(0)
    words = torch.from_numpy(centred / np.linalg.norm(centred, axis=1, keepdims=True)).float()
    texts = Texts(torch.cat([tokenize(student, material.words), inputs.tokens[rows]]), torch.cat([words, inputs.targets[rows]]))
    first = training.first_stage(student, texts, recipe)
    history = train(student, training.batch_of(inputs, rows), recipe)
    assert [h["distillation"] for h in run.first] == pytest.approx([h["distillation"] for h in first], rel=1e-5) and len(first) == 4
    assert [h["total"] for h in run.history] == pytest.approx([h["total"] for h in history], rel=1e-5) and len(history) == 4
    np.testing.assert_array_equal(run.concepts.centroids, concepts.centroids)
    student.eval()
    with torch.no_grad():
        torch.testing.assert_close(run.image_features, student.encode_image(inputs.images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run.text_features, student.encode_text(inputs.tokens), rtol=1e-4, atol=1e-4)
    again = training.run_recipe(recipe, material, rows, tmp_path / "runs")
    assert again.history == run.history and same_weights(again.student, run.student) and not run.student.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_the_gpu_is_the_same_up_to_rounding_and_resumes_on_either_device(tmp_path):
    cpu, gpu = tiny_student(), tiny_student().to("cuda")
    history, path = train(cpu, tiny_inputs(), TINY), tmp_path / "run.safetensors"
    for a, b in zip(history, train(gpu, tiny_inputs(), TINY, checkpoint=path)): assert a == pytest.approx(b, rel=1e-3)
    back = tiny_student(seed=9)
    assert load_checkpoint(path, back, make_optimizer(back, 1e-3, 0.1), TINY)[0] == 3
    for a, b in zip(back.parameters(), gpu.parameters()): assert a.equal(b.cpu())
