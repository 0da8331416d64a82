"""Many processes against one, micro-batches against the whole batch, and steps that are not finite."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from little_shards import ALONE, RECIPE, STEPS, data, folder, open_folder, register_tiny  # noqa: F401
from test_training import N, TINY, same_weights, tiny_inputs, tiny_student

from kklip_nb.losses import contrastive_loss
from kklip_nb.scale import distributed
from kklip_nb.scale.distributed import (World, backward_global, choose_precision, gather_global, global_step, learns_norms,
                                        start_student, start_world, wrap)
from kklip_nb.scale.long_run import newest_checkpoint, train_shards
from kklip_nb.student import build_student, tokenize
from kklip_nb.training import Inputs, batch_of, compute_losses, make_optimizer, train_step

TESTS = Path(__file__).resolve().parent
RESULT = "world-{size}-rank-{rank}.safetensors"


def double(batch: Inputs) -> Inputs:
    return batch._replace(images=batch.images.double(), targets=batch.targets.double(), labels=batch.labels.double())


def some_batch(seed: int = 0, count: int = 8) -> Inputs:
    return batch_of(tiny_inputs(), np.random.default_rng(seed).permutation(N)[:count])


def cut(batch: Inputs, count: int) -> list[Inputs]:
    return [batch_of(batch, rows) for rows in np.split(np.arange(len(batch.captions)), count)]


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
        part = cut(batch, world.world_size)[world.rank]
        if gathered: losses.append(global_step(model, optimizer, [part], TINY, 1e-3, world)["total"]); continue
        optimizer.zero_grad()
        model(part, TINY, None)[0].backward()
        optimizer.step()
    return {k: v.detach().clone() for k, v in student.state_dict().items()}, losses


def four_parts(world: World) -> dict[str, torch.Tensor]:
    "Gradients of a batch in four parts, shared out among the processes."
    model = wrap(tiny_student().double(), world, TINY)
    backward_global(model, cut(double(some_batch()), 4)[world.rank::world.world_size], TINY, world)
    return gradients(model)


def feature_gradients(world: World) -> dict[str, torch.Tensor]:
    "Of the contrastive loss of gathered features: ours, open_clip's, and open_clip's without gradient through the gather."
    rows = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, world.rank::world.world_size]
    def theirs(with_grad):
        loss = open_clip.loss.ClipLoss(local_loss=False, gather_with_grad=with_grad, rank=world.rank, world_size=world.world_size)
        return lambda image, text, scale: loss(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)
    ours = lambda image, text, scale: contrastive_loss(*gather_global(image, text, world), scale)
    found = {}
    for name, loss in (("ours", ours), ("theirs", theirs(True)), ("detached", theirs(False))):
        leaves = [x.clone().requires_grad_() for x in (*rows, torch.tensor(7.0, dtype=torch.float64))]
        found |= {f"{name}.{what}": g for what, g in zip(("image", "text", "scale"), torch.autograd.grad(loss(*leaves), leaves))}
    return found


def broken_step(world: World) -> dict[str, torch.Tensor]:
    "Weights after a step in which the last process alone has a broken picture, and one more; and the length of the gradient in each."
    student = tiny_student()
    model, optimizer = wrap(student, world, TINY), make_optimizer(student, 1e-3, 0.1)
    norms = []
    for seed in range(2):
        part = cut(some_batch(seed), world.world_size)[world.rank]
        if seed == 0 and world.rank == world.world_size - 1: part.images[0] = float("nan")
        norms.append(global_step(model, optimizer, [part], TINY, 1e-3, world)["gradient_norm"])
        if seed == 0: before = {f"before.{k}": v.clone() for k, v in student.state_dict().items()}
    return before | dict(student.state_dict()) | dict(norms=torch.tensor(norms))


def worker(folder: Path, out: Path) -> None:
    "All of it; each process leaves one file."
    torch.set_num_threads(1)
    with start_world() as world:
        weights, _ = twenty_steps(world, torch.float64)
        _, losses = twenty_steps(world, torch.float32)
        local, _ = twenty_steps(world, torch.float64, gathered=False)
        train_shards(RECIPE, open_folder(folder), out / f"run-{world.world_size}", world, [str(folder / "held-out" / "00000.tar")],
                     streams=2, save_every=7, eval_every=9, workers=world.world_size - 1)
        groups = dict(broken=broken_step(world), weights=weights, local=local, losses=dict(total=torch.tensor(losses)), parts=four_parts(world), features=feature_gradients(world))
        save_file({f"{g}/{k}": v.contiguous() for g, tensors in groups.items() for k, v in tensors.items()},
                  out / RESULT.format(size=world.world_size, rank=world.rank))


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


def test_a_broken_picture_in_one_process_moves_no_weight_in_any(worlds):
    start = tiny_student().state_dict()
    for result in worlds[:3]:
        norms = result["broken"].pop("norms")
        assert not norms[0].isfinite() and norms[1].isfinite()
        assert all(torch.equal(result["broken"][f"before.{k}"], v) for k, v in start.items())
        assert any(not torch.equal(result["broken"][k], v) for k, v in start.items())  # the next step moves again
    assert furthest(worlds[1]["broken"], worlds[2]["broken"]) == 0


def test_a_place_that_makes_no_sense_is_named(monkeypatch):
    for places, said in ((dict(RANK="one"), "RANK='one'; expected a whole number"), (dict(WORLD_SIZE=""), "WORLD_SIZE=''"), (dict(LOCAL_RANK="-1"), "LOCAL_RANK='-1'"), (dict(RANK="2", WORLD_SIZE="2"), "RANK=2 of WORLD_SIZE=2; expected less")):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in places.items(): patch.setenv(name, value)
            with pytest.raises(ValueError, match=said), start_world(): pass


def test_the_world_is_joined_and_left_as_torchrun_says(monkeypatch):
    said = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: said.append((backend, timeout.total_seconds())))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: said.append("left"))
    with start_world() as world: assert world == World(0, 1, torch.device("cpu")) and not said  # alone there is nothing to join
    for name, value in dict(RANK="1", WORLD_SIZE="3", LOCAL_RANK="1").items(): monkeypatch.setenv(name, value)
    with start_world() as world: assert world == World(1, 3, torch.device("cpu"))
    assert said == [("gloo", 7200), "left"]


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    taken = []
    for name, result in dict(is_available=lambda: True, device_count=lambda: 2, set_device=taken.append).items(): monkeypatch.setattr(torch.cuda, name, result)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", taken.append)
    for name, value in dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1").items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: taken.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with start_world() as world: assert world.device == torch.device("cuda", 1) and taken == [1, "high", "nccl"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 has no GPU of its own, this machine has 2"), start_world(): pass


def test_an_error_says_in_which_process_it_arose(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")): monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: None)
    with pytest.raises(ValueError, match="broken") as caught:
        with start_world(): raise ValueError("broken")
    assert caught.value.__notes__ == ["in process 1 of 2"]


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


def log_of(folder: Path, name: str = "log.csv") -> list[dict[str, str]]:
    "A log but for the speed."
    with open(folder / name, newline="") as file: return [{k: v for k, v in line.items() if k != "pairs_per_s"} for line in csv.DictReader(file)]


def test_train_shards_under_torchrun_is_train_shards_alone(worlds, data):
    out = worlds[-1]
    one, two = log_of(out / "run-1"), log_of(out / "run-2")
    assert [a["step"] for a in one] == [b["step"] for b in two] == [str(i) for i in range(STEPS)]
    assert [line["step"] for line in log_of(out / "run-2", "eval.csv")] == ["8", "17", "19"]
    for a, b in zip(log_of(out / "run-1", "eval.csv"), log_of(out / "run-2", "eval.csv")): assert abs(float(a["i2t_r5"]) - float(b["i2t_r5"])) < 0.06
    for name in ("total", "distillation", "concept", "contrastive", "logit_scale"):
        np.testing.assert_allclose([float(a[name]) for a in one], [float(b[name]) for b in two], rtol=0, atol=1e-4)
    # a checkpoint does not know how many processes wrote it
    student = train_shards(RECIPE, data, out / "run-2", ALONE, streams=2, workers=0)
    saved = load_file(newest_checkpoint(out / "run-2"))
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


def test_fp16_scales_its_loss_and_skips_what_overflows():
    student = tiny_student()
    model, optimizer = wrap(student, ALONE, TINY), make_optimizer(student, 1e-3, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    norms, scales = [], []
    for i in range(40):
        line = global_step(model, optimizer, cut(some_batch(i), 2), TINY, 1e-3, ALONE, "fp16", None, scaler)
        norms.append(line["gradient_norm"]); scales.append(scaler.get_scale())
    lost = [not np.isfinite(n) for n in norms]
    assert lost[0] and not any(lost[-5:])  # too large a scale at first, then found
    assert all((b < a) == bad for a, b, bad in zip([2.0**40, *scales], scales, lost))
    fine = tiny_student()
    other = wrap(fine, ALONE, TINY)
    reference = global_step(other, make_optimizer(fine, 1e-3, 0.1), [some_batch(0)], TINY, 0.0, ALONE)
    student = tiny_student()
    coarse = global_step(wrap(student, ALONE, TINY), make_optimizer(student, 1e-3, 0.1), [some_batch(0)], TINY, 0.0, ALONE, "fp16", None, torch.amp.GradScaler("cpu", init_scale=128.0))
    np.testing.assert_allclose(coarse["gradient_norm"], reference["gradient_norm"], rtol=0.02)  # the scale is taken out again


def test_the_precision_is_chosen_by_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [choose_precision("auto", d) for d in (cpu, cuda)] == ["fp32", "bf16"] and choose_precision("fp16", cuda) == "fp16"
    with pytest.raises(ValueError, match="'fp64'; expected 'auto', 'fp32', 'bf16' or 'fp16'"): choose_precision("fp64", cpu)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8", ""])
def test_a_precision_that_is_none_is_never_taken_for_bf16(precision):
    with pytest.raises(ValueError, match=f"precision={precision!r}; expected 'auto', 'fp32'"): backward_global(wrap(tiny_student(), ALONE, TINY), [some_batch()], TINY, ALONE, precision)


def test_micro_batches_of_unequal_size_are_refused():
    batch, model = some_batch(), wrap(tiny_student(), ALONE, TINY)
    for parts, said in (([batch_of(batch, [0, 1, 2]), batch_of(batch, [3, 4])], r"\[3, 2\] pairs"), ([], r"\[\] pairs")):
        with pytest.raises(ValueError, match=f"micro-batches of {said}; expected at least one, all of one size"): backward_global(model, parts, TINY, ALONE)


def test_a_long_gradient_is_shortened_as_torch_does_it():
    students = [tiny_student(), tiny_student()]
    models = [wrap(s, ALONE, TINY) for s in students]
    line = global_step(models[0], torch.optim.SGD(students[0].parameters(), 1.0), [some_batch()], TINY, 1.0, ALONE, max_norm=0.1)
    backward_global(models[1], [some_batch()], TINY, ALONE)
    norm = torch.nn.utils.clip_grad_norm_(students[1].parameters(), 0.1)
    torch.optim.SGD(students[1].parameters(), 1.0).step()
    assert line["gradient_norm"] == pytest.approx(norm.item()) and norm > 0.1
    assert furthest(students[0].state_dict(), students[1].state_dict()) < 1e-6


def test_compiled_towers_give_the_same_step(data, monkeypatch):
    found, graphs = [], []
    def backend(graph, inputs): graphs.append(graph); return graph.forward  # traced, but no machine code: that would take a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl, backend=backend)))
    for compile in (False, True):
        student = start_student(RECIPE, data, ALONE, compile=compile)
        g, captions = torch.Generator().manual_seed(0), [f"thing {i}" for i in range(8)]
        batch = Inputs(captions, torch.randn(8, 3, 8, 8, generator=g), tokenize(student, captions), torch.randn(8, 16, generator=g), torch.full((8, 4), 0.25))
        model = wrap(student, ALONE, RECIPE)
        found.append((backward_global(model, [batch], RECIPE, ALONE), gradients(model)))
    assert graphs and furthest(found[0][0], found[1][0]) < 1e-5 and furthest(found[0][1], found[1][1]) < 1e-5


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
    student = build_student("kklip-laptop", None, 16, 4, imagenet=True, train_image="all")
    assert not learns_norms(student)
    side, captions, g = 128, [f"thing {i}" for i in range(4)], torch.Generator().manual_seed(0)
    batch = Inputs(captions, torch.randn(4, 3, side, side, generator=g), tokenize(student, captions), torch.randn(4, 16, generator=g), torch.full((4, 4), 0.25))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    global_step(wrap(student, ALONE, RECIPE), make_optimizer(student, 1e-3, 0.1), [batch], RECIPE, 1e-3, ALONE)
    after, running = student.state_dict(), [k for k in before if "running_" in k or "num_batches" in k]
    assert len(running) > 100 and all(torch.equal(before[k], after[k]) for k in running)
    moved = [k for k in before if k.endswith("conv_stem.weight")]
    assert len(moved) == 1 and not torch.equal(before[moved[0]], after[moved[0]])



def test_batchnorm_that_learns_is_alone_or_on_gpus(data):
    student = build_student("kklip-laptop", None, 16, 4, imagenet=False, train_image="all")
    assert learns_norms(student)
    wrap(student, ALONE, RECIPE)
    with pytest.raises(ValueError, match="BatchNorm that learns needs GPUs, one process"): wrap(student, World(0, 2, ALONE.device), RECIPE)


@pytest.mark.parametrize("concept_on, unused", [("both", False), ("concat", False), ("image", True), ("text", True)])
def test_a_concept_head_that_no_loss_reads_is_told_to_torch(concept_on, unused, monkeypatch):
    asked = []
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **how: asked.append(how) or model)
    model = wrap(tiny_student(), World(0, 2, ALONE.device), dataclasses.replace(TINY, concept_on=concept_on))
    assert asked == [dict(broadcast_buffers=False, find_unused_parameters=unused)] and isinstance(model, distributed.Losses)


def test_the_total_weighs_the_losses_as_the_recipe_says():
    recipe = dataclasses.replace(TINY, alpha=3.0, beta=5.0, gamma=7.0)
    for parts in (1, 4):
        found = {k: v.item() for k, v in backward_global(wrap(tiny_student(), ALONE, recipe), cut(some_batch(), parts), recipe, ALONE).items()}
        assert found["total"] == pytest.approx(3 * found["distillation"] + 5 * found["concept"] + 7 * found["contrastive"], rel=1e-5)


# ---- BatchNorm

def scratch_with_norms():
    "The laptop student from scratch: BatchNorm that learns, with an activation inside."
    from kklip_nb.student import build_student
    return build_student("kklip-laptop", imagenet=False, train_image="all", teacher_dim=8, n_concepts=3)


def test_norms_that_learn_over_several_gpus_keep_their_activations(monkeypatch):
    student = scratch_with_norms().eval()
    images = torch.randn(2, 3, 32, 32)
    before = student.encode_image(images)
    student.train()
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **settings: model)
    distributed.wrap(student, World(0, 2, torch.device("cuda")), RECIPE)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in student.modules())
    torch.testing.assert_close(student.eval().encode_image(images), before)


def test_a_step_that_is_not_finite_leaves_the_statistics_of_norms_as_they_were(monkeypatch):
    student = scratch_with_norms()
    before = {name: b.clone() for name, b in student.named_buffers()}
    def broken(model, *args):
        student.encode_image(torch.full((2, 3, 32, 32), float("nan")))
        for p in student.parameters(): p.grad = torch.full_like(p, float("nan"))
        return dict(total=torch.tensor(float("nan")))
    monkeypatch.setattr(distributed, "backward_global", broken)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    distributed.global_step(distributed.Losses(student), optimizer, [], RECIPE, 0.1, World(0, 1, torch.device("cpu")))
    for name, b in student.named_buffers(): assert torch.equal(b, before[name]), name
