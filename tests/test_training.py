"""The loop, the recipe, the map of gradients, and that a killed run goes on as if nothing had happened."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kklip_nb import training
from kklip_nb.data import Pairs
from kklip_nb.student import Student, WordTable, build_student, cut_padding, prepare_images, tokenize
from kklip_nb.teacher import save_embeddings
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
    assert [learning_rate(s, 100, 2.0, 10) for s in (100, 101, 150, 10**6)] == [0, 0, 0, 0] and learning_rate(0, 1, 2.0, 0) == 2.0  # no second climb
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


def test_training_is_done_in_training_mode_and_batches_go_where_the_student_is(monkeypatch):
    modes, places, step, move = [], [], training.text_distillation_loss, training.to_device
    student = tiny_student().eval()
    monkeypatch.setattr(training, "text_distillation_loss", lambda *args: modes.append(student.training) or step(*args))
    monkeypatch.setattr(training, "to_device", lambda batch, place: places.append(place) or move(batch, place))
    train(student, tiny_inputs(), dataclasses.replace(TINY, epochs=1))
    training.first_stage(student.eval(), Texts(*tiny_inputs()[2:4]), dataclasses.replace(TINY, first_steps=2, first_batch=8))
    assert modes == [True] * 5 and places == [torch.device("cpu")] * 5
    gone = move(tiny_inputs(), "meta")
    assert gone.captions == tiny_inputs().captions and all(x.device.type == "meta" for x in gone[1:])


def test_a_step_clears_old_gradients_and_reports_the_losses_before_it():
    batch, dirty, clean = training.batch_of(tiny_inputs(), range(8)), with_gradients(100.0), tiny_student()
    before = compute_losses(clean, batch, TINY)
    a, b = (train_step(s, make_optimizer(s, 1e-3, 0.1), batch, TINY, 1e-3) for s in (dirty, clean))
    assert a == pytest.approx(b, rel=1e-6) and same_weights(dirty, clean)
    assert [*a] == ["total", "distillation", "concept", "contrastive", "gradient_norm"]
    assert a["total"] == pytest.approx(before[0].item()) and {k: a[k] for k in before[1]} == pytest.approx({k: v.item() for k, v in before[1].items()})


def test_only_the_contrast_reads_the_global_batch():
    student, batch = tiny_student(), training.batch_of(tiny_inputs(), range(8))
    more = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    plain = compute_losses(student, batch, TINY)[1]
    parts = compute_losses(student, batch, TINY, lambda image, text: (torch.cat([image, more]), torch.cat([text, -more])))[1]
    image, text = torch.cat([student.encode_image(batch.images), more]), torch.cat([student.encode_text(batch.tokens), -more])
    torch.testing.assert_close(parts["contrastive"], open_clip.loss.ClipLoss()(image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True), student.logit_scale))
    assert parts["distillation"] == plain["distillation"] and parts["concept"] == plain["concept"]


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


def test_a_killed_process_resumes_where_it_was(tmp_path):
    path, recipe = tmp_path / "run.safetensors", dataclasses.replace(TINY, epochs=50)
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads(1)\n"
            f"from test_training import *\nsave = training.save_checkpoint\n"
            f"def slowly(*given): save(*given); time.sleep(0.2)\ntraining.save_checkpoint = slowly\ntrain(tiny_student(), tiny_inputs(), dataclasses.replace(TINY, epochs=50), checkpoint={str(path)!r})")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)  # a fork of this process could wait for ever
    deadline = time.time() + 120
    while not path.exists() and time.time() < deadline: time.sleep(0.005)
    process.kill()
    process.wait()
    done, _ = load_checkpoint(path, tiny_student(), None, recipe)
    assert 0 < done < 50
    # the epochs after the kill, and a run that was never killed; two processes may round a product in different ways
    resumed, whole = tiny_student(seed=9), tiny_student()
    torch.manual_seed(0)
    for now, never in zip(train(resumed, tiny_inputs(), recipe, checkpoint=path), train(whole, tiny_inputs(), recipe), strict=True):
        assert now == pytest.approx(never, rel=1e-2) and (now["epoch"], now["lr"]) == (never["epoch"], never["lr"])
    for (name, now), never in zip(resumed.state_dict().items(), whole.state_dict().values()): torch.testing.assert_close(now, never, rtol=0, atol=5e-3, msg=name)


def test_a_checkpoint_gives_back_every_piece(tmp_path):
    path, student = tmp_path / "c.safetensors", tiny_student()
    optimizer = make_optimizer(student, 1e-3, 0.1)
    for rows in (range(8), range(8, 16)): train_step(student, optimizer, training.batch_of(tiny_inputs(), rows), TINY, 1e-3)
    torch.manual_seed(5)
    save_checkpoint(path, student, optimizer, TINY, 2, [dict(total=0.25), dict(total=1 / 3)])
    expected = torch.rand(3)
    other = tiny_student(seed=9)
    blank = make_optimizer(other, 1e-3, 0.1)
    assert load_checkpoint(path, other, blank, TINY) == (2, [dict(total=0.25), dict(total=1 / 3)])
    assert torch.equal(torch.rand(3), expected) and same_weights(student, other)
    assert blank.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    for p, q in zip(other.parameters(), student.parameters()):
        assert blank.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} and blank.state[p]["step"].item() == 2
        assert all(torch.equal(v, optimizer.state[q][k]) for k, v in blank.state[p].items()) and blank.state[p]["exp_avg_sq"].any()


def rewritten(path, tensors=lambda t: t, **metadata) -> None:
    "The same file with some tensors or entries changed; None takes an entry out."
    with safe_open(path, framework="pt") as file: said = file.metadata()
    save_file(tensors(load_file(path)), path, {k: v for k, v in (said | metadata).items() if v is not None})


RECIPE = dataclasses.asdict(TINY)
DAMAGES = dict(
    truncated=lambda p: p.write_bytes(p.read_bytes()[:-100]), empty=lambda p: p.write_bytes(b""), text=lambda p: p.write_text("not a checkpoint"),
    pickle=lambda p: torch.save(tiny_student().state_dict(), p), foreign=lambda p: save_file({"x": torch.zeros(2)}, p), folder=lambda p: (p.unlink(), p.mkdir()),
    another_kind=lambda p: rewritten(p, kind="something"), no_recipe=lambda p: rewritten(p, recipe=None), no_history=lambda p: rewritten(p, history=None),
    broken_history=lambda p: rewritten(p, history="[{"), no_epoch=lambda p: rewritten(p, epoch=None), older=lambda p: rewritten(p, recipe=json.dumps({k: v for k, v in RECIPE.items() if k != "warmup"})),
    newer=lambda p: rewritten(p, recipe=json.dumps(RECIPE | dict(dropout=0.1))), no_weights=lambda p: rewritten(p, lambda t: {k: v for k, v in t.items() if "student" not in k}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(tmp_path, damage):
    path, student = tmp_path / "c.safetensors", tiny_student()
    save_checkpoint(path, student, make_optimizer(student, 1e-3, 0.1), TINY, 1, [])
    DAMAGES[damage](path)
    said = dict(older="warmup", newer="dropout").get(damage, "")
    for read in (lambda: load_checkpoint(path, student, None, TINY), lambda: training.load_student(path), lambda: train(student, tiny_inputs(), TINY, checkpoint=path)):
        with pytest.raises(ValueError, match=f"c.safetensors.*{said}"): read()


def test_a_checkpoint_of_another_student_or_optimiser_is_refused(tmp_path):
    path, student = tmp_path / "c.safetensors", tiny_student()
    train(student, tiny_inputs(), dataclasses.replace(TINY, epochs=1), checkpoint=path)
    recipe = dataclasses.replace(TINY, epochs=1)
    wide = Student(tiny_student().clip, 16, TEACHER, K + 1, train_image="all")
    with pytest.raises(ValueError, match="c.safetensors holds another student"): load_checkpoint(path, wide, None, recipe)
    frozen = Student(tiny_student().clip, 16, TEACHER, K, train_image="head")
    with pytest.raises(ValueError, match="c.safetensors holds the state of another optimiser"): load_checkpoint(path, frozen, make_optimizer(frozen, 1e-3, 0.1), recipe)
    rewritten(path, lambda t: {k: v for k, v in t.items() if k != "random"})
    with pytest.raises(ValueError, match="c.safetensors"): load_checkpoint(path, student, make_optimizer(student, 1e-3, 0.1), recipe)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    path, student = tmp_path / "c.safetensors", tiny_student()
    save_checkpoint(path, student, make_optimizer(student, 1e-3, 0.1), TINY, 1, [])
    with pytest.raises(ValueError, match="alpha.*2.0.*3.0"):
        load_checkpoint(path, student, None, dataclasses.replace(TINY, alpha=3.0))
    with pytest.raises(FileNotFoundError): load_checkpoint(tmp_path / "none.safetensors", student, None, TINY)


def test_a_checkpoint_is_plain_tensors_and_json(tmp_path):
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


PLAIN = dataclasses.replace(TINY, word_table=False, first_steps=0)
NAMED = dataclasses.replace(TINY, alpha=1.0, first_steps=2, word_table=True)


def named_material() -> training.Material:
    pairs = Pairs(np.zeros((4, 2, 2, 3), np.uint8), list("abcd"), list("abcd"), [None] * 4, [None] * 4)
    return training.Material(pairs, np.eye(4), ["x", "y"], np.ones((2, 4)), WordTable(np.arange(3), np.ones((3, 4), np.float32)))


def test_a_run_is_named_by_all_that_it_reads():
    material = named_material()
    def path(material=material, rows=(0, 1, 2), **changed): return training.checkpoint_path("folder", dataclasses.replace(NAMED, **changed), material, rows)
    pairs, table = material.pairs, material.word_table
    read = dict(embeddings=material._replace(embeddings=2 * np.eye(4)), one_number=material._replace(embeddings=np.eye(4) + np.eye(4)[::-1] / 100),
                large=material._replace(embeddings=np.eye(4) * 1e5), larger=material._replace(embeddings=np.eye(4) * 2e5), small=material._replace(embeddings=np.eye(4) * 1e-9),
                smaller=material._replace(embeddings=np.eye(4) * 1e-10), words=material._replace(word_embeddings=np.zeros((2, 4))), word_texts=material._replace(words=["x", "z"]),
                ids=material._replace(word_table=table._replace(ids=np.arange(1, 4))), vectors=material._replace(word_table=table._replace(vectors=table.vectors * 2)),
                pictures=material._replace(pairs=pairs._replace(images=pairs.images + 1)), captions=material._replace(pairs=pairs._replace(captions=list("abce"))))
    others = {name: path(m) for name, m in read.items()} | dict(rows=path(rows=(0, 1)), order=path(rows=(2, 1, 0)))
    assert len({path(), *others.values()}) == len(others) + 1 and path().parent == Path("folder") and path().suffix == ".safetensors"
    assert path() == path(rows=np.arange(3)) == path(rows=[True, True, True, False]) == path(rows=torch.arange(3)) and training.run_key(NAMED, material, [0, 1, 2]) in path().name
    for name, m in read.items(): assert (training.run_key(NAMED, m, [0]) == training.run_key(NAMED, material, [0])) == (name in ("pictures", "captions", "word_texts")), name
    plain = dict(first_steps=0, word_table=False)
    for name in ("words", "word_texts", "ids", "vectors"): assert path(**plain) == path(read[name], **plain), name
    classes = material._replace(pairs=pairs._replace(bases=list("zzzz"), categories=list("abcd"), subcategories=list("abcd")))
    assert path() == path(classes), "what no loss reads"


OTHER = dict(student="other", pretrained="tag", imagenet=False, train_image="all", teacher="other", pooling="mean", layer=3, prompt="{}!", k=9, normalise="raw", projection="mlp",
             concept_on="text", temperature=0.7, alpha=3.0, beta=3.0, gamma=3.0, word_table=False, words=3, first_steps=7, first_batch=7, first_lr=0.7, epochs=7, batch_size=7, lr=0.7, weight_decay=0.7,
             warmup=7, seed=7)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Recipe)])
def test_a_key_changes_with_each_setting_that_counts_and_no_other(field):
    changed, material = dataclasses.replace(NAMED, **{field: OTHER[field]}), named_material()
    def key(recipe, only=()): return training.run_key(recipe, material, [0, 2], only)
    assert key(changed) != key(NAMED) and key(changed, [field]) != key(NAMED, [field])
    rest = [f.name for f in dataclasses.fields(Recipe) if f.name != field]
    assert (key(changed, rest) == key(NAMED, rest)) == (field != "word_table")  # the table itself is read or not


def test_a_key_stays_what_it_was():
    "Tables of results name runs by it: written down once, for single and double precision."
    material = named_material()
    for kind in (np.float32, np.float64): assert training.run_key(Recipe(), material._replace(embeddings=np.eye(4, dtype=kind)), [0, 2]) == "dae5929cd5bcf42e"


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


def test_a_first_stage_that_diverges_is_refused():
    recipe = dataclasses.replace(TINY, first_steps=9, first_batch=8, first_lr=1e30)
    with pytest.raises(ValueError, match="first stage is not finite.*first_lr"): training.first_stage(tiny_student(), Texts(*tiny_inputs()[2:4]), recipe)


@pytest.fixture
def kept_stage(monkeypatch, tmp_path):
    "A first stage in the cache: its texts, recipe and file, what it has made, and how often one was run."
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    texts, recipe, calls, student = Texts(*tiny_inputs()[2:4]), dataclasses.replace(TINY, first_steps=3, first_batch=8), [], tiny_student()
    real = training.first_stage
    monkeypatch.setattr(training, "first_stage", lambda *args: calls.append(1) or real(*args))
    history = training.cached_first_stage(student, texts, recipe, "a")
    return texts, recipe, tmp_path / "first" / "a.safetensors", student, history, calls


def test_a_first_stage_is_kept_under_its_key(kept_stage):
    texts, recipe, path, student, history, calls = kept_stage
    again = tiny_student()
    assert training.cached_first_stage(again, texts, recipe, "a") == history and len(calls) == 1 and same_weights(student, again) and path.is_file()
    with torch.no_grad():  # what the first stage never touches is not kept: pictures, and the heads of any number of concepts
        other = Student(tiny_student(seed=4).clip, 16, TEACHER, K + 3, train_image="all")
        before = {k: v.clone() for k, v in other.state_dict().items()}
    assert training.cached_first_stage(other, texts, recipe, "a") == history and len(calls) == 1
    for k, v in other.state_dict().items(): assert v.equal(before[k] if "visual" in k or "concepts" in k else student.state_dict()[k]), k
    training.cached_first_stage(tiny_student(), texts, recipe, "b")
    assert len(calls) == 2


BROKEN = DAMAGES | dict(no_history=lambda p: rewritten(p, history=None), broken_history=lambda p: rewritten(p, history="[{"), short_history=lambda p: rewritten(p, history="[]"),
                        no_weights=lambda p: rewritten(p, lambda t: {k: v for k, v in t.items() if "to_teacher" not in k}),
                        another_shape=lambda p: rewritten(p, lambda t: t | {"to_teacher.bias": torch.zeros(3)}))


@pytest.mark.parametrize("damage", sorted({*BROKEN} - {"folder", "another_kind", "no_recipe", "no_epoch", "older", "newer"}))
def test_a_kept_first_stage_that_does_not_fit_is_made_anew(kept_stage, damage):
    texts, recipe, path, student, history, calls = kept_stage
    BROKEN[damage](path)
    again = tiny_student()
    assert training.cached_first_stage(again, texts, recipe, "a") == history and len(calls) == 2 and same_weights(student, again)
    training.cached_first_stage(tiny_student(), texts, recipe, "a")
    assert len(calls) == 2, "the file has been mended"


def test_a_kept_first_stage_of_other_texts_is_made_anew_and_a_folder_in_its_place_is_named(kept_stage):
    texts, recipe, path, _, history, calls = kept_stage
    other = texts._replace(tokens=texts.tokens.roll(1, 0))
    assert training.cached_first_stage(tiny_student(), other, recipe, "a") != history and len(calls) == 2
    rewritten(path, read=None)  # a file of the version before says nothing of it
    training.cached_first_stage(tiny_student(), texts, recipe, "a")
    assert len(calls) == 2
    BROKEN["folder"](path)
    with pytest.raises(ValueError, match="a.safetensors is a folder"): training.cached_first_stage(tiny_student(), texts, recipe, "a")


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


# ---- recordings

@pytest.fixture
def recordings(tmp_path, monkeypatch):
    "A folder as scripts/record.py fills it, of six pairs and five words; what the words had to avoid."
    pairs, rng, words, avoided = few_pairs()._replace(bases=["dog", "food", "rocket", "octopus", "vehicle", "fruit"]), np.random.default_rng(4), ["to", "walk", "green", "house", "idea"], []
    monkeypatch.setattr(training, "RECORDED_WORDS", 5)
    monkeypatch.setattr(training, "load_openmoji", lambda: pairs)
    monkeypatch.setattr(training, "load_words", lambda count, exclude: avoided.append(exclude) or words[:count])
    vectors = rng.normal(size=(11, 8)).astype(np.float16)
    recipe = Recipe(words=3)
    how = dict(teacher="smollm2 sha256:0", pooling=recipe.pooling, layer=recipe.layer, prompt=recipe.prompt)
    save_embeddings(tmp_path / "pairs-last-29-prompt.safetensors", vectors[:6], pairs.captions, **how)
    save_embeddings(tmp_path / "words-last-29-prompt.safetensors", vectors[6:], words, **how)
    save_file(dict(ids=torch.tensor([3, 9]), vectors=torch.from_numpy(vectors[:2])), tmp_path / "word-table.safetensors")
    return tmp_path, recipe, pairs, vectors, words, avoided


def test_recorded_material_is_what_was_recorded(recordings):
    folder, recipe, pairs, vectors, words, avoided = recordings
    material = training.recorded_material(folder, recipe)
    assert material.pairs is pairs and material.words == words[:3] and avoided == [{*pairs.captions, *pairs.bases}]
    np.testing.assert_array_equal(material.embeddings, vectors[:6])
    np.testing.assert_array_equal(material.word_embeddings, vectors[6:9])
    assert material.word_table.ids.tolist() == [3, 9] and material.word_table.vectors.dtype == np.float32
    np.testing.assert_array_equal(material.word_table.vectors, vectors[:2])
    for count in (0, 5):
        more = training.recorded_material(str(folder), dataclasses.replace(recipe, words=count))
        assert more.words == words[:count] and more.word_embeddings.shape == (count, 8)


@pytest.mark.parametrize("changed", [dict(teacher="gpt2"), dict(pooling="mean"), dict(layer=28), dict(prompt="{}"), dict(words=6)], ids=lambda d: next(iter(d)))
def test_recordings_of_another_teacher_or_too_few_are_refused_by_name(recordings, changed):
    with pytest.raises(ValueError, match=f"{next(iter(changed))}.*{next(iter(changed.values()))}"): training.recorded_material(recordings[0], dataclasses.replace(recordings[1], **changed))


@pytest.mark.parametrize("name, texts", [("pairs-last-29-prompt", ["dog", "pizza", "rocket", "octopus", "fire engine", "red apple on a plate"]), ("words-last-29-prompt", ["to", "walk", "green", "house", "idea"])])
@pytest.mark.parametrize("other", [dict(pooling="mean"), dict(layer=28), dict(prompt="{}"), dict(captions="others")], ids=lambda d: next(iter(d)))
def test_either_recording_must_be_of_the_recipe_s_vectors_and_of_these_texts(recordings, name, texts, other):
    folder, recipe, _, vectors, _, _ = recordings
    how, texts = dict(pooling=recipe.pooling, layer=recipe.layer, prompt=recipe.prompt) | other, texts[::-1] if "captions" in other else texts
    how.pop("captions", None)
    save_embeddings(folder / f"{name}.safetensors", vectors[:len(texts)], texts, **how)
    with pytest.raises(ValueError, match=f"{name}.*{next(iter(other))}"): training.recorded_material(folder, recipe)


@pytest.mark.parametrize("name", ["pairs-last-29-prompt", "words-last-29-prompt", "word-table"])
@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "truncated", "foreign"])
def test_a_recording_that_is_no_good_is_named(recordings, name, damage):
    path = recordings[0] / f"{name}.safetensors"
    if damage == "truncated": path.write_bytes(path.read_bytes()[:-9])
    elif damage == "empty": path.write_bytes(b"")
    elif damage == "foreign": save_file({"x": torch.zeros(2)}, path)
    else: path.unlink()
    if damage == "folder": path.mkdir()
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError, match=f"{name}.safetensors"): training.recorded_material(recordings[0], recordings[1])
    with pytest.raises(FileNotFoundError, match="nowhere.*nbs/recorded"): training.recorded_material(recordings[0] / "nowhere", recordings[1])


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
    for step, batch in enumerate(epoch_batches(inputs, dataclasses.replace(TINY, seed=4), 2)):
        assert (batch.images[:, 0, 0, 0] % 2).tolist() == np.random.default_rng([4, 2, step, 1]).integers(2, size=8).tolist()
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


def shuffled_layout(x):
    return np.asfortranarray(x)[:, ::1]

def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


NUMBERS = dict(lists=lambda x: x.tolist(), list_of_tensors=lambda x: list(torch.from_numpy(x)), tensor=torch.from_numpy, gradient=lambda x: torch.from_numpy(x).requires_grad_(), double=lambda x: x.astype(np.float64),
               bfloat16=lambda x: torch.from_numpy(x).bfloat16(), half=lambda x: x.astype(np.float16), columns=shuffled_layout, read_only=read_only)
ROW_KINDS = dict(list=list, tuple=tuple, tensor=torch.tensor, array=np.array, short=lambda r: np.array(r, np.uint8), iterator=iter,
                 booleans=lambda r: np.isin(np.arange(30), r), boolean_list=lambda r: np.isin(np.arange(30), r).tolist(), boolean_tensor=lambda r: torch.isin(torch.arange(30), torch.tensor(r)))


@pytest.mark.parametrize("how", ["unit", "raw"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_embeddings_come_as_any_table_of_numbers(kind, how):
    "Numbers of at most eight bits, so that every kind holds them exactly."
    recipe, x = dataclasses.replace(TINY, normalise=how), np.random.default_rng(3).integers(-60, 60, (30, 6)).astype(np.float32)
    wanted, got = training.make_targets(x, range(20), recipe), training.make_targets(NUMBERS[kind](x), range(20), recipe)
    for a, b in ((wanted[0], got[0]), (wanted[1].centroids, got[1].centroids), (wanted[2], got[2])): np.testing.assert_allclose(a, b, atol=1e-6)
    material = training.Material(few_pairs(), x, [], x[:0], None)._replace(words=["house", "to walk"], word_embeddings=x[:2] + 1)
    student = tiny_student()
    inputs = Inputs(list("abcdef") * 5, torch.zeros(30, 1), torch.ones(30, 6, dtype=torch.long), torch.zeros(30, 6), torch.zeros(30, 4))
    texts = [training.first_texts(student, inputs, m, range(20), recipe) for m in (material, material._replace(embeddings=NUMBERS[kind](x), word_embeddings=NUMBERS[kind](x[:2] + 1)))]
    torch.testing.assert_close(texts[0].targets, texts[1].targets, rtol=0, atol=1e-6)
    assert texts[1].targets.dtype == torch.float32
    assert training.run_key(PLAIN, material._replace(embeddings=NUMBERS[kind](x)), [1]) == training.run_key(PLAIN, material, [1])


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_rows_come_as_numbers_or_as_booleans(kind):
    x, rows = np.random.default_rng(3).normal(size=(30, 6)).astype(np.float32), [1, 4, 5, 11, 12, 20, 29]
    recipe = dataclasses.replace(TINY, k=3)
    for a, b in zip(training.make_targets(x, rows, recipe)[:1], training.make_targets(x, ROW_KINDS[kind](rows), recipe)): np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(training.make_targets(x, ROW_KINDS[kind](rows), recipe)[0], (x - x[rows].mean(0)) / np.linalg.norm(x - x[rows].mean(0), axis=1, keepdims=True), atol=1e-6)
    inputs = Inputs([f"caption {i}" for i in range(30)], torch.arange(30), torch.ones(30, 2), torch.arange(30) * 2, torch.arange(30) * 3)
    batch = training.batch_of(inputs, ROW_KINDS[kind](rows))
    assert batch.captions == [f"caption {i}" for i in rows] and batch.images.tolist() == rows and batch.targets.tolist() == [2 * i for i in rows] and batch.labels.tolist() == [3 * i for i in rows]


@pytest.mark.parametrize("rows, said", [([], "at least one"), ([0, 30], "0 to 30; expected 0 … 29"), ([-1, 3], "-1 to 3"), ([0.0, 1.0], "float64"), (np.zeros(30, bool), "at least one"), ([True, False], "30 booleans"),
                                        ([[0, 1]], "shape"), (3, "shape|rows"), (["a"], "dtype"), (np.ones((30, 1), bool), "booleans")])
def test_rows_that_do_not_exist_are_refused_by_name(rows, said):
    x = np.random.default_rng(3).normal(size=(30, 6)).astype(np.float32)
    inputs = Inputs(["a"] * 30, torch.arange(30), torch.ones(30, 2), torch.arange(30), torch.arange(30))
    material = training.Material(few_pairs(), x, [], x[:0], None)
    for take in (lambda: training.make_targets(x, rows, TINY), lambda: training.batch_of(inputs, rows), lambda: training.first_texts(tiny_student(), inputs, material, rows, TINY),
                 lambda: training.run_key(TINY, material, rows), lambda: training.run_recipe(TINY, material, rows)):
        with pytest.raises(ValueError, match=said): take()


def test_a_training_row_is_named_once_and_a_row_of_a_batch_as_often_as_one_likes():
    x = np.random.default_rng(3).normal(size=(30, 6)).astype(np.float32)
    material = training.Material(few_pairs(), x, [], x[:0], None)
    for take in (lambda: training.make_targets(x, [1, 2, 3, 4, 1], TINY), lambda: training.run_recipe(TINY, material, [1, 2, 3, 4, 1])):
        with pytest.raises(ValueError, match="5 rows, 4 of them different"): take()
    assert training.batch_of(Texts(torch.ones(4, 2), torch.arange(4)), [2, 2, 0]).targets.tolist() == [2, 2, 0]


@pytest.mark.parametrize("changed, said", [(dict(words=["a"]), "1 words.*(2, 6)"), (dict(word_embeddings=np.ones((3, 6))), "2 words.*(3, 6)"), (dict(word_embeddings=np.ones((2, 5))), "width 6"),
                                           (dict(words=[]), "0 words"), (dict(word_embeddings=np.full((2, 6), np.nan)), "word embeddings holds NaN")])
def test_words_and_their_embeddings_belong_together(changed, said):
    x = np.random.default_rng(3).normal(size=(30, 6)).astype(np.float32)
    material = training.Material(few_pairs(), x, ["a", "b"], x[:2], None)._replace(**changed)
    inputs = Inputs(["a"] * 30, torch.zeros(30, 1), torch.ones(30, 6, dtype=torch.long), torch.zeros(30, 6), torch.zeros(30, 4))
    with pytest.raises(ValueError, match=said.replace("(", "[(]").replace(")", "[)]")): training.first_texts(tiny_student(), inputs, material, range(20), TINY)


def test_a_run_without_the_table_that_it_wants_is_refused_before_any_work():
    x = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
    with pytest.raises(ValueError, match="word_table=False"): training.run_recipe(dataclasses.replace(TINY, word_table=True, first_steps=0), training.Material(few_pairs(), x, [], x[:0], None), range(5))


def test_without_words_the_first_stage_reads_the_training_captions_alone():
    x = np.random.default_rng(3).normal(size=(30, 6)).astype(np.float32)
    inputs = Inputs(["a"] * 30, torch.zeros(30, 1), torch.arange(180).view(30, 6), torch.from_numpy(x), torch.zeros(30, 4))
    texts = training.first_texts(tiny_student(), inputs, training.Material(few_pairs(), x, [], x[:0], None), [3, 7], dataclasses.replace(TINY, words=0))
    assert texts.tokens.equal(inputs.tokens[[3, 7]]) and texts.targets.equal(inputs.targets[[3, 7]])


def test_as_many_pictures_as_captions():
    pairs = few_pairs()
    for n in (5, 7):
        images = np.zeros((n, 8, 8, 3), np.uint8)
        with pytest.raises(ValueError, match=f"6 pairs.*{n} pictures"): prepare_inputs(tiny_student(), pairs._replace(images=images), np.ones((6, 5)), np.full((6, 2), 0.5))


@pytest.mark.parametrize("tokens, size", [(torch.ones(0, 3), 4), (torch.ones(5, 3), 0), (torch.ones(5), 4), (torch.ones(5, 3), -1)])
def test_text_batches_of_nothing_are_refused(tokens, size):
    with pytest.raises(ValueError, match="expected"): training.text_batches(tokens, size, 0, 0)


def test_text_batches_take_what_is_a_table_of_ids():
    tokens = torch.tensor([[1, 2, 0], [1, 0, 0], [1, 2, 3], [4, 0, 0], [2, 2, 0]])
    wanted = training.text_batches(tokens, 2, 3, 1)
    for other in (tokens.tolist(), tokens.numpy(), tokens.int()): assert all(map(np.array_equal, wanted, training.text_batches(other, 2, 3, 1)))


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


@pytest.mark.parametrize("lr, max_norm", [(-1e-3, None), (math.nan, None), (math.inf, 1.0), (1e-3, 0.0), (1e-3, -1.0), (1e-3, math.nan)])
def test_a_rate_or_a_limit_that_no_step_can_have_is_refused(lr, max_norm):
    student = with_gradients()
    with pytest.raises(ValueError, match="expected"): optimizer_step(student, make_optimizer(student, 1e-3, 0.1), lr, max_norm)
    assert same_weights(student, tiny_student())


def test_logit_scale_is_clipped_by_every_step_at_ln_100_and_not_below():
    for start, wanted in ((5.0, math.log(100)), (4.0, 4.0), (-3.0, -3.0)):
        student = tiny_student()
        with torch.no_grad(): student.clip.logit_scale.fill_(start)
        optimizer_step(student, make_optimizer(student, 1e-3, 0.1), 1e-3)
        assert student.clip.logit_scale.item() == pytest.approx(wanted, abs=1e-6)


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


# ---- on a GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_the_gpu_is_the_same_up_to_rounding_and_resumes_on_either_device(tmp_path):
    cpu, gpu = tiny_student(), tiny_student().to("cuda")
    history, path = train(cpu, tiny_inputs(), TINY), tmp_path / "run.safetensors"
    for a, b in zip(history, train(gpu, tiny_inputs(), TINY, checkpoint=path)): assert a == pytest.approx(b, rel=1e-3)
    back = tiny_student(seed=9)
    assert load_checkpoint(path, back, make_optimizer(back, 1e-3, 0.1), TINY)[0] == 3
    for a, b in zip(back.parameters(), gpu.parameters()): assert a.equal(b.cpu())
