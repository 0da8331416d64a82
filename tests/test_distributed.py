"""Many processes against one, parts against the whole, a stopped run against one that never stopped."""

import csv
import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_training import N, TINY, same_weights, tiny_inputs, tiny_student

from kklip_nb import training
from kklip_nb.scale import distributed
from kklip_nb.scale.distributed import (FIELDS, Log, ShardData, World, ahead, backward_global, batch_counts, deal_epoch, deal_run, gather_global,
                                  global_step, open_data, shard_batches, shard_recipe, start_student, start_world, stream_parts,
                                  train_shards, trim_log, whole_batch, wrap)
from kklip_nb.losses import contrastive_loss
from kklip_nb.scale.shards import cluster_shards, embed_shards, list_shards, open_sidecars, read_shard, write_shards
from kklip_nb.student import build_student, tokenize
from kklip_nb.training import LAPTOP, Inputs, batch_of, compute_losses, load_checkpoint, make_optimizer, train_step

TESTS = Path(__file__).resolve().parent
SHARDS, DISTINCT, STEPS = 6, 12, 18  # 2 epochs of 3 shards a stream with 3 batches of 4 each
RECIPE = dataclasses.replace(shard_recipe(LAPTOP), student="kklip-tiny", train_image="all", imagenet=False, k=4, epochs=2, batch_size=8, warmup=3)
ALONE = World(0, 1, torch.device("cpu"))
RESULT = "world-{size}-rank-{rank}.safetensors"


class Stop(Exception):
    "Raised in the middle of a run."


# --- what the tests train on

def register_tiny(folder: Path) -> None:
    "A CLIP on 8-pixel pictures that reads real tokens, under a name that build_student knows."
    tower = dict(width=32, layers=1)
    (folder / "kklip-tiny.json").write_text(json.dumps(dict(
        embed_dim=16, vision_cfg=tower | dict(image_size=8, patch_size=4, head_width=16),
        text_cfg=dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1))))
    open_clip.add_model_config(folder / "kklip-tiny.json")


def embed(captions: list[str]) -> np.ndarray:
    "A teacher that knows nothing but always says the same."
    return np.stack([np.random.default_rng(zlib.crc32(c.encode())).standard_normal(16) for c in captions])


def little_pairs(count: int = SHARDS * (DISTINCT + 1)) -> list[tuple[np.ndarray, str]]:
    "Noise with captions; the first and the last of each 13 share one."
    shape, per = (8, 8, 3), DISTINCT + 1
    captions = [f"thing {i - per + 1 if i % per == per - 1 else i} of {i // per}" for i in range(count)]
    return [(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8), c) for i, c in enumerate(captions)]


def open_folder(folder: Path) -> ShardData:
    return open_data(list_shards(folder / "shards"), folder / "embeddings", folder / "labels")


def make_folder(folder: Path) -> Path:
    "Shards, sidecars, concepts and labels."
    urls = list(map(str, write_shards(little_pairs(), folder / "shards", per_shard=DISTINCT + 1, size=8)))
    embed_shards(urls, folder / "embeddings", embed, teacher="hash", pooling="none", layer=0, prompt="")
    cluster_shards(open_sidecars(folder / "embeddings", urls), folder / "labels", RECIPE.k, RECIPE.temperature, passes=2)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "A folder that no test changes."
    register_tiny(tmp_path_factory.mktemp("model"))
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def data(folder): return open_folder(folder)


def double(batch: Inputs) -> Inputs:
    return batch._replace(images=batch.images.double(), targets=batch.targets.double(), labels=batch.labels.double())


def some_batch(seed: int = 0, count: int = 8) -> Inputs:
    return batch_of(tiny_inputs(), np.random.default_rng(seed).permutation(N)[:count])


def cut(batch: Inputs, parts: int) -> list[Inputs]:
    return [batch_of(batch, rows) for rows in np.split(np.arange(len(batch.captions)), parts)]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n.replace("module.", ""): p.grad.clone() for n, p in model.named_parameters()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    "The largest difference between tensors of the same names."
    assert a.keys() == b.keys() and a
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


# --- what two processes do, and one does the same with the whole batch

def twenty_steps(world: World, dtype: torch.dtype, gathered: bool = True) -> tuple[dict[str, torch.Tensor], list[float]]:
    "Weights and losses; without the gather each process has its own negatives alone."
    student, losses = tiny_student().to(dtype), []
    model, optimizer = wrap(student, world, TINY), make_optimizer(student, 1e-3, 0.1)
    for step in range(20):
        batch = double(some_batch(step)) if dtype == torch.float64 else some_batch(step)
        part = cut(batch, world.size)[world.rank]
        if gathered: losses.append(global_step(model, optimizer, [part], TINY, 1e-3, world)["total"]); continue
        optimizer.zero_grad()
        model(part, TINY, None)[0].backward()
        optimizer.step()
    return {k: v.detach().clone() for k, v in student.state_dict().items()}, losses


def four_parts(world: World) -> dict[str, torch.Tensor]:
    "Gradients of a batch in four parts, shared out among the processes."
    model = wrap(tiny_student().double(), world, TINY)
    backward_global(model, cut(double(some_batch()), 4)[world.rank::world.size], TINY, world)
    return gradients(model)


def feature_gradients(world: World) -> dict[str, torch.Tensor]:
    "Of the contrastive loss of gathered features: ours, open_clip's, and open_clip's without gradient through the gather."
    rows = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, world.rank::world.size]
    def theirs(with_grad):
        loss = open_clip.loss.ClipLoss(local_loss=False, gather_with_grad=with_grad, rank=world.rank, world_size=world.size)
        return lambda image, text, scale: loss(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)
    ours = lambda image, text, scale: contrastive_loss(*gather_global(image, text, world), scale)
    found = {}
    for name, loss in (("ours", ours), ("theirs", theirs(True)), ("detached", theirs(False))):
        leaves = [x.clone().requires_grad_() for x in (*rows, torch.tensor(7.0, dtype=torch.float64))]
        found |= {f"{name}.{what}": g for what, g in zip(("image", "text", "scale"), torch.autograd.grad(loss(*leaves), leaves))}
    return found


def worker(folder: Path, out: Path) -> None:
    "All of it; each process leaves one file."
    torch.set_num_threads(1)
    with start_world() as world:
        weights, _ = twenty_steps(world, torch.float64)
        _, losses = twenty_steps(world, torch.float32)
        local, _ = twenty_steps(world, torch.float64, gathered=False)
        train_shards(RECIPE, open_folder(folder), out / f"run-{world.size}", world, streams=2, save_every=7)
        groups = dict(weights=weights, local=local, losses=dict(total=torch.tensor(losses)), parts=four_parts(world), features=feature_gradients(world))
        save_file({f"{g}/{k}": v.contiguous() for g, tensors in groups.items() for k, v in tensors.items()},
                  out / RESULT.format(size=world.size, rank=world.rank))


@pytest.fixture(scope="session")
def worlds(folder, tmp_path_factory):
    "(one process, first of two, second of two), each a dict of dicts of tensors; and where they trained."
    out = tmp_path_factory.mktemp("worlds")
    (out / "worker.py").write_text(f"import sys; sys.path.insert(0, {str(TESTS)!r})\nfrom pathlib import Path\nimport test_distributed as t\n"
                                   f"if __name__ == '__main__':\n    out = Path({str(out)!r}); model = out / t.os.environ['RANK']\n"
                                   f"    model.mkdir(); t.register_tiny(model); t.worker(Path({str(folder)!r}), out)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(out / "worker.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS="1")) as pair:
        try:
            worker(folder, out)
            said = pair.communicate(timeout=300)[0]
        finally: pair.terminate()  # if it still runs: torchrun then ends its workers
    assert pair.returncode == 0, said[-3000:]
    def read(size, rank):
        groups = {}
        for name, value in load_file(out / RESULT.format(size=size, rank=rank)).items(): groups.setdefault(name.split("/")[0], {})[name.split("/")[1]] = value
        return groups
    return read(1, 0), read(2, 0), read(2, 1), out


def test_two_processes_take_the_steps_of_one(worlds):
    one, first, second, _ = worlds
    assert furthest(one["weights"], first["weights"]) < 1e-9
    assert furthest(first["weights"], second["weights"]) == 0
    assert furthest(one["weights"], dict(tiny_student().double().state_dict())) > 1e-3  # they did move
    assert furthest(one["losses"], first["losses"]) < 1e-4 and len(one["losses"]["total"]) == 20


def test_without_the_gather_two_processes_learn_something_else(worlds):
    one, first, _, _ = worlds
    assert furthest(one["local"], one["weights"]) < 1e-12  # alone there is nothing to gather
    assert furthest(one["local"], first["local"]) > 1e-3


def test_the_gather_has_the_gradient_of_open_clip_s(worlds):
    for result in worlds[:3]:
        named = {name: {k.split(".")[1]: v for k, v in result["features"].items() if k.startswith(name)} for name in ("ours", "theirs", "detached")}
        assert furthest(named["ours"], named["theirs"]) < 1e-12
        if result is not worlds[0]: assert furthest(named["ours"], named["detached"]) > 1e-3


def test_parts_shared_out_among_processes_have_the_gradient_of_the_whole(worlds):
    model = wrap(tiny_student().double(), ALONE, TINY)
    backward_global(model, [double(some_batch())], TINY, ALONE)
    for result in worlds[:3]: assert furthest(result["parts"], gradients(model)) < 1e-12


def log_of(folder: Path) -> list[dict[str, str]]:
    "log.csv but for the speed."
    with open(folder / "log.csv", newline="") as file: return [{k: v for k, v in line.items() if k != "pairs_per_s"} for line in csv.DictReader(file)]


def test_train_shards_under_torchrun_is_train_shards_alone(worlds, data):
    out = worlds[-1]
    one, two = log_of(out / "run-1"), log_of(out / "run-2")
    assert [a["step"] for a in one] == [b["step"] for b in two] == [str(i) for i in range(STEPS)]
    for name in ("total", "distillation", "concept", "contrastive", "logit_scale"):
        np.testing.assert_allclose([float(a[name]) for a in one], [float(b[name]) for b in two], rtol=0, atol=1e-4)
    # a checkpoint does not know how many processes wrote it
    student = train_shards(RECIPE, data, out / "run-2", ALONE, streams=2)
    saved = load_file(out / "run-2" / "checkpoint.safetensors")
    assert all(torch.equal(v, saved[f"student.{k}"]) for k, v in student.state_dict().items())


# --- one process

def test_alone_a_step_is_the_course_s_to_the_bit():
    ours, theirs = tiny_student(), tiny_student()
    model, mine, other = wrap(ours, ALONE, TINY), make_optimizer(ours, 1e-3, 0.1), make_optimizer(theirs, 1e-3, 0.1)
    for seed in range(3):
        assert global_step(model, mine, [some_batch(seed)], TINY, 5e-4, ALONE) == train_step(theirs, other, some_batch(seed), TINY, 5e-4)
    assert same_weights(ours, theirs) and not same_weights(ours, tiny_student())


@pytest.mark.parametrize("m", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(m):
    batch, found, losses = double(some_batch()), {}, {}
    for name, parts in (("whole", [batch]), ("parts", cut(batch, m))):
        model = wrap(tiny_student().double(), ALONE, TINY)
        losses[name] = backward_global(model, parts, TINY, ALONE)
        found[name] = gradients(model)
    assert furthest(found["whole"], found["parts"]) < 1e-12 and furthest(losses["whole"], losses["parts"]) < 1e-12
    assert found["whole"]["student.clip.logit_scale"].abs() > 1e-3
    # the usual accumulation, where each part has its own negatives alone, gives another gradient
    student = tiny_student().double()
    for part in cut(batch, m): (compute_losses(student, part, TINY)[0] / m).backward()
    usual = {f"student.{k}": v for k, v in gradients(student).items()}
    assert furthest(found["whole"], usual) > 1e-3


def test_bf16_computes_coarser_and_keeps_float32_weights():
    results, students = {}, {}
    for precision in ("fp32", "bf16"):
        students[precision] = student = tiny_student()
        model, optimizer = wrap(student, ALONE, TINY), make_optimizer(student, 1e-3, 0.1)
        results[precision] = [global_step(model, optimizer, cut(some_batch(i), 2), TINY, 1e-3, ALONE, precision) for i in range(3)]
    assert {p.dtype for p in students["bf16"].parameters()} == {torch.float32}
    for name in results["fp32"][0]:
        fine, coarse = ([line[name] for line in results[p]] for p in ("fp32", "bf16"))
        np.testing.assert_allclose(coarse, fine, rtol=0.05)
        assert coarse != fine
    with pytest.raises(ValueError, match="fp16.*'fp32' or 'bf16'"): backward_global(model, [some_batch()], TINY, ALONE, "fp16")


def test_checkpointed_activations_give_the_same_gradients(data):
    found, calls = [], []
    for checkpointing in (False, True):
        student = tiny_student().double()
        student.clip.set_grad_checkpointing(checkpointing)
        count = []
        student.clip.visual.transformer.resblocks[0].attn.register_forward_hook(lambda *_, count=count: count.append(1))
        model = wrap(student, ALONE, TINY)
        backward_global(model, [double(some_batch())], TINY, ALONE)
        found.append(gradients(model)); calls.append(len(count))
    assert furthest(*found) < 1e-12 and calls == [1, 2]  # computed again on the way back
    for wanted in (False, True): assert start_student(RECIPE, data, ALONE, wanted).clip.visual.transformer.grad_checkpointing is wanted


def test_batchnorm_keeps_its_statistics():
    student = build_student("kklip-laptop", None, 16, 4, imagenet=False, train_image="all")
    side, captions, g = 128, [f"thing {i}" for i in range(4)], torch.Generator().manual_seed(0)
    batch = Inputs(captions, torch.randn(4, 3, side, side, generator=g), tokenize(student, captions), torch.randn(4, 16, generator=g), torch.full((4, 4), 0.25))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    global_step(wrap(student, ALONE, RECIPE), make_optimizer(student, 1e-3, 0.1), [batch], RECIPE, 1e-3, ALONE)
    after, running = student.state_dict(), [k for k in before if "running_" in k or "num_batches" in k]
    assert len(running) > 100 and all(torch.equal(before[k], after[k]) for k in running)
    moved = [k for k in before if k.endswith("conv_stem.weight")]
    assert len(moved) == 1 and not torch.equal(before[moved[0]], after[moved[0]])


# --- which pairs come when

@example(["a", "a\0", "a\0\0"], 1, 0)  # numpy's strings end at their last character that is not NUL
@given(st.lists(st.text(max_size=2) | st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 6), st.integers(0, 99))
def test_a_batch_holds_no_caption_twice(captions, size, seed):
    batches = shard_batches(captions, size, (seed, 0, 1))
    assert len(batches) == len(set(captions)) // size
    rows = [int(r) for b in batches for r in b]
    assert all(len(b) == size for b in batches) and all(0 <= r < len(captions) for r in rows)
    assert len({captions[r] for r in rows}) == len(rows)  # so neither a batch nor an epoch has one twice
    assert [b.tolist() for b in shard_batches(captions, size, (seed, 0, 1))] == [b.tolist() for b in batches]


def test_pairs_that_share_a_caption_take_turns():
    captions = ["twin"] * 3 + ["other"] * 2 + ["single"]
    seen = [frozenset(map(int, np.concatenate(shard_batches(captions, 3, (seed,))))) for seed in range(60)]
    assert set(seen) == {frozenset({a, b, 5}) for a in range(3) for b in (3, 4)}
    drawn = [sum(a in rows for rows in seen) for a in range(3)]
    assert min(drawn) > 8  # 20 each are expected


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.data())
def test_shards_are_dealt_fairly(counts, draw):
    streams, seed, epoch = draw.draw(st.integers(1, len(counts))), draw.draw(st.integers(0, 50)), draw.draw(st.integers(0, 3))
    steps = deal_epoch(counts, streams, seed, epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(counts)).tolist()
    dealt = [both for step in steps for both in step]
    assert len(set(dealt)) == len(dealt) and all(0 <= b < counts[shard] for shard, b in dealt)
    assert all(len(step) == streams for step in steps)
    for s in range(streams):
        hand = [(shard, b) for shard in order[s::streams] for b in range(counts[shard])]
        assert [step[s] for step in steps] == hand[:len(steps)]
    assert len(steps) == min(sum(counts[shard] for shard in order[s::streams]) for s in range(streams))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.integers(0, 40))
def test_a_run_can_be_taken_up_anywhere(counts, start):
    recipe = dataclasses.replace(RECIPE, epochs=3, seed=4)
    whole = list(deal_run(counts, 2, recipe))
    assert list(deal_run(counts, 2, recipe, start)) == whole[start:]
    assert [epoch for epoch, _ in whole] == sorted(epoch for epoch, _ in whole)
    assert [step for epoch, step in whole if epoch == 1] == deal_epoch(counts, 2, 4, 1)


def test_epochs_and_seeds_have_other_orders():
    orders = {str(deal_epoch([3] * 6, 2, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_pairs_of_a_step_do_not_depend_on_the_number_of_processes(data):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    student, steps = start_student(recipe, data, ALONE), {}
    for size in (1, 2, 4):
        runs = [list(stream_parts(student, data, recipe, 4, World(rank, size, ALONE.device))) for rank in range(size)]
        steps[size] = [[part for _, parts in step for part in parts] for step in zip(*runs)]
    wanted = [{c: (x, t, y) for p in step for c, x, t, y in zip(p.captions, p.images, p.targets, p.labels)} for step in steps[1]]
    assert len(wanted) == DISTINCT // 2 and all(len(step) == recipe.batch_size for step in wanted)
    for size in (2, 4):
        for step, parts in zip(wanted, steps[size], strict=True):
            both = whole_batch(parts)
            assert sorted(both.captions) == sorted(step)
            for caption, *rows in zip(both.captions, both.images, both.targets, both.labels): assert all(map(torch.equal, rows, step[caption]))
    tail = list(stream_parts(student, data, recipe, 4, ALONE, start=4))
    assert [[p.captions for p in parts] for _, parts in tail] == [[p.captions for p in parts] for parts in steps[1][4:]]
    # a caption has the target and the label of its own row
    sidecar, part = data.sidecars[0], steps[1][0][0]
    for caption, target in zip(part.captions, part.targets):
        raw = embed([caption])[0].astype(np.float16).astype(np.float32) - data.concepts.scale.mean
        np.testing.assert_allclose(target, raw / np.linalg.norm(raw), atol=1e-5)
    assert sidecar.shape == (DISTINCT + 1, 16)


def test_ahead_changes_nothing_and_hides_no_error():
    assert list(ahead(iter([1, 2, 3]))) == [1, 2, 3] and list(ahead(iter([]))) == []
    def broken():
        yield threading.get_ident()
        raise Stop("of the reader")
    items = ahead(broken())
    assert next(items) != threading.get_ident()  # made in another thread
    with pytest.raises(Stop, match="of the reader"): next(items)


# --- stopped, and taken up again

@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory):
    "A run that nothing has stopped."
    folder = tmp_path_factory.mktemp("whole")
    return train_shards(RECIPE, data, folder, ALONE, streams=2), folder


def stop_at(monkeypatch, step: int) -> None:
    "An exception before the line of this step is written."
    write = Log.write
    def failing(self, line):
        if line["step"] == step: raise Stop
        write(self, line)
    monkeypatch.setattr(Log, "write", failing)


def assert_same_run(student, folder, whole_run) -> None:
    "Weights, optimiser and log of a run that went on equal those of the whole one."
    whole, whole_folder = whole_run
    a, b = (load_file(f / "checkpoint.safetensors") for f in (folder, whole_folder))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and any(k.startswith("optimizer.") for k in a)
    assert same_weights(student, whole) and log_of(folder) == log_of(whole_folder) and len(log_of(folder)) == STEPS
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize("step, save_every", [(0, 1), (1, 1), (12, 1), (7, 2), (8, 2), (4, 5), (9, 5), (17, 5)])
def test_a_stopped_run_goes_on_to_the_bit(data, tmp_path, whole_run, step, save_every):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stop): train_shards(RECIPE, data, tmp_path, ALONE, streams=2, save_every=save_every)
    taken, real = [], distributed.global_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "global_step", lambda *args: taken.append(1) or real(*args))
        student = train_shards(RECIPE, data, tmp_path, ALONE, streams=2, save_every=save_every)
    assert len(taken) == STEPS - step // save_every * save_every
    assert_same_run(student, tmp_path, whole_run)


def test_stopped_at_every_third_step_it_still_is_the_same_run(data, tmp_path, whole_run):
    for step in range(3, STEPS, 3):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stop): train_shards(RECIPE, data, tmp_path, ALONE, streams=2, save_every=1)
    assert_same_run(train_shards(RECIPE, data, tmp_path, ALONE, streams=2), tmp_path, whole_run)


def test_a_line_that_a_kill_cut_short_is_dropped(data, tmp_path, whole_run):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stop): train_shards(RECIPE, data, tmp_path, ALONE, streams=2, save_every=5)
    with open(tmp_path / "log.csv", "a") as file: file.write("7,0,0.000")
    assert_same_run(train_shards(RECIPE, data, tmp_path, ALONE, streams=2), tmp_path, whole_run)


def test_trim_log_keeps_what_the_checkpoint_has(tmp_path):
    path, row = tmp_path / "log.csv", ",".join("1" * (len(FIELDS) - 1))
    header = ",".join(FIELDS)
    path.write_text("\n".join([header, f"0,{row}", f"1,{row}", f"2,{row}", "1,0,0.0"]))
    trim_log(path, 2)
    assert path.read_text().split() == [header, f"0,{row}", f"1,{row}"]
    trim_log(path, 0)
    assert path.read_text().split() == [header]
    trim_log(tmp_path / "new.csv", 5)
    assert (tmp_path / "new.csv").read_text().split() == [header]


@pytest.fixture
def finished(whole_run, tmp_path):
    "A copy of the whole run's folder."
    return Path(shutil.copytree(whole_run[1], tmp_path / "run"))


def test_a_checkpoint_of_something_else_is_refused(finished, folder, data):
    urls = list_shards(folder / "shards")
    fewer = open_data(urls[:4], folder / "embeddings", folder / "labels")
    before = (finished / "checkpoint.safetensors").read_bytes(), log_of(finished)
    for match, recipe, some, settings in (("alpha.*2.0.*3.0", dataclasses.replace(RECIPE, alpha=3.0), data, dict(streams=2)),
                                          ("streams.*2.*4", RECIPE, data, dict(streams=4)),
                                          ("precision.*fp32.*bf16", RECIPE, data, dict(streams=2, precision="bf16")),
                                          ("'data'", RECIPE, fewer, dict(streams=2))):
        with pytest.raises(ValueError, match=f"checkpoint.safetensors belongs to another .*{match}.*use another folder"):
            train_shards(recipe, some, finished, ALONE, **settings)
    assert before == ((finished / "checkpoint.safetensors").read_bytes(), log_of(finished))


def test_a_truncated_checkpoint_is_refused(finished, data):
    path = finished / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint.safetensors is not a readable checkpoint.*delete it"): train_shards(RECIPE, data, finished, ALONE, streams=2)


def test_a_full_disk_costs_one_checkpoint(data, tmp_path, whole_run, monkeypatch):
    calls, real = [], training.save_file
    def full(tensors, part, metadata):
        calls.append(1)
        if len(calls) != 3: return real(tensors, part, metadata=metadata)
        Path(part).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match="No space left"): train_shards(RECIPE, data, tmp_path, ALONE, streams=2, save_every=3)
    _, (last,) = load_checkpoint(tmp_path / "checkpoint.safetensors", start_student(RECIPE, data, ALONE), None, RECIPE)
    assert last["step"] == 5 and not list(tmp_path.glob(".*.part"))
    assert_same_run(train_shards(RECIPE, data, tmp_path, ALONE, streams=2, save_every=3), tmp_path, whole_run)


def test_what_a_kill_left_half_written_is_swept_away(data, tmp_path, whole_run):
    for name in ("checkpoint.safetensors", "log.csv"): (tmp_path / f".{name}.12345.part").write_bytes(b"half")
    assert_same_run(train_shards(RECIPE, data, tmp_path, ALONE, streams=2), tmp_path, whole_run)


def test_two_runs_in_one_folder_are_an_error(data, tmp_path):
    from kklip_nb.scale.shards import run_lock
    with run_lock(tmp_path / ".train.lock"), pytest.raises(RuntimeError, match="another run"): train_shards(RECIPE, data, tmp_path, ALONE, streams=2)


# --- errors

@pytest.mark.parametrize("changed, streams, size, match", [
    (dict(), 3, 2, "3 streams for 2 processes; expected a multiple"),
    (dict(), 3, 1, "batch_size=8 cannot be cut into 3 streams"),
    (dict(), 8, 1, "6 shards for 8 streams; make more and smaller shards, or take fewer streams"),
    (dict(batch_size=26), 2, 1, "shard 00000 has 12 different captions, fewer than the 13 .*make larger shards or more streams"),
    (dict(batch_size=1), 1, 1, "batch_size=1 has no negatives; give at least 2"),
    (dict(word_batch=4), 2, 1, r"pass shard_recipe\(recipe\)"),
    (dict(word_table=True), 2, 1, r"pass shard_recipe\(recipe\)"),
    (dict(), 0, 1, "0 streams"),
])
def test_what_does_not_fit_is_said(data, tmp_path, changed, streams, size, match):
    with pytest.raises(ValueError, match=match):
        train_shards(dataclasses.replace(RECIPE, **changed), data, tmp_path, World(0, size, ALONE.device), streams=streams)


def test_batches_are_counted_by_different_captions(data):
    assert batch_counts(data, RECIPE, 2) == [DISTINCT // 4] * SHARDS
    assert batch_counts(data, dataclasses.replace(RECIPE, batch_size=12), 1) == [1] * SHARDS


def test_a_picture_broken_after_the_embedding_is_named(folder, tmp_path):
    where = Path(shutil.copytree(folder, tmp_path / "copy"))
    url = where / "shards" / "00002.tar"
    sample = read_shard(url)[5]
    url.write_bytes(url.read_bytes().replace(sample["jpg"], bytes(len(sample["jpg"]))))
    with pytest.raises(ValueError, match=sample["__key__"]): train_shards(RECIPE, open_folder(where), tmp_path / "run", ALONE, streams=2)


@pytest.mark.parametrize("kind", ["embeddings", "labels"])
def test_a_shard_without_sidecar_or_labels_is_named(folder, tmp_path, kind):
    where = Path(shutil.copytree(folder, tmp_path / "copy"))
    (where / kind / "00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard 00003 has no"): open_folder(where)


def test_tensorboard_has_the_log(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train_shards(dataclasses.replace(RECIPE, epochs=1), data, tmp_path, ALONE, streams=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    np.testing.assert_allclose([e.value for e in events.Scalars("total")], [float(line["total"]) for line in log_of(tmp_path)], rtol=1e-6)


def test_without_tensorboard_it_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"): train_shards(RECIPE, data, tmp_path, ALONE, streams=2, tensorboard=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_killed_stages_end_as_if_nothing_had_happened():
    run = subprocess.run([sys.executable, str(TESTS.parent / "scripts" / "kill_test.py"), "--kills", "6"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"embeddings and labels equal byte for byte, weights bit for bit: 6 kills$", run.stdout.strip()), run.stdout
