"""A stopped run against one that never stopped, checkpoints that are damaged, steps that are not finite, and held-out shards."""

import csv
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from little_shards import ALONE, RECIPE, STEPS, data, folder, little_pairs  # noqa: F401
from test_training import same_weights

from kklip_nb import training
from kklip_nb.evaluation import retrieval_recall
from kklip_nb.own_pairs import read_image
from kklip_nb.scale import long_run
from kklip_nb.scale.distributed import World, start_student
from kklip_nb.scale.loader import open_data
from kklip_nb.scale.long_run import (FIELDS, MAX_SKIPPED, Log, check_held_out, list_checkpoints,
                                     newest_checkpoint, trim_log)
from kklip_nb.scale.shards import list_shards, read_shard, run_lock, write_shards
from kklip_nb.student import prepare_images, tokenize
from kklip_nb.training import load_checkpoint

TESTS = Path(__file__).resolve().parent


class Stop(Exception):
    "Raised in the middle of a run."


def train(recipe, data, folder, world=ALONE, held_out=(), **settings):
    "train_shards in this process alone."
    return long_run.train_shards(recipe, data, folder, world, held_out, **(dict(streams=2, workers=0) | settings))


def log_of(folder: Path, name: str = "log.csv") -> list[dict[str, str]]:
    "A log but for the speed."
    with open(folder / name, newline="") as file: return [{k: v for k, v in line.items() if k != "pairs_per_s"} for line in csv.DictReader(file)]


# --- stopped, and taken up again

@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory):
    "A run that nothing has stopped."
    folder = tmp_path_factory.mktemp("whole")
    return train(RECIPE, data, folder), folder


def test_every_logged_step_has_its_rate_and_epoch(whole_run):
    "Three steps of linear warm-up, then half a cosine over the other 17; two epochs of 10 steps."
    log = log_of(whole_run[1])
    rates = [RECIPE.lr * (step + 1) / 3 if step < 3 else RECIPE.lr * (1 + math.cos(math.pi * (step - 3) / 17)) / 2 for step in range(STEPS)]
    assert [float(line["lr"]) for line in log] == pytest.approx(rates, rel=1e-12) and [int(line["epoch"]) for line in log] == [0] * 10 + [1] * 10
    assert [int(line["step"]) for line in log] == [*range(STEPS)] and {line["skipped"] for line in log} == {"0"}
    for line in log: assert float(line["total"]) == pytest.approx(2 * float(line["distillation"]) + float(line["concept"]) + float(line["contrastive"]), rel=1e-5)
    state = load_file(newest_checkpoint(whole_run[1]))
    assert float(log[-1]["logit_scale"]) == pytest.approx(math.exp(state["student.clip.logit_scale"].item()), rel=1e-5)
    assert all(float(line["gradient_norm"]) > 0 for line in log)


def test_a_checkpoint_says_what_made_it(whole_run, data):
    with safe_open(newest_checkpoint(whole_run[1]), framework="pt") as file: metadata = file.metadata()
    (last,) = json.loads(metadata["history"])
    assert {k: last[k] for k in ("step", "epoch", "skipped", "streams", "data", "precision", "max_norm", "augment", "scaler")} == dict(
        step=19, epoch=1, skipped=0, streams=2, data=data.key, precision="fp32", max_norm=None, augment=True, scaler={})
    assert json.loads(metadata["recipe"]) == dataclasses.asdict(RECIPE) and metadata["epoch"] == "1"
    assert last["lr"] == float(log_of(whole_run[1])[-1]["lr"])


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
    a, b = (load_file(newest_checkpoint(f)) for f in (folder, whole_folder))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and any(k.startswith("optimizer.") for k in a)
    assert same_weights(student, whole) and log_of(folder) == log_of(whole_folder) and len(log_of(folder)) == STEPS
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize("step, save_every", [(0, 1), (12, 1), (7, 2), (9, 5), (17, 5)])
def test_a_stopped_run_goes_on_to_the_bit(data, tmp_path, whole_run, step, save_every):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stop): train(RECIPE, data, tmp_path, save_every=save_every)
    taken, real = [], long_run.global_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_run, "global_step", lambda *args, **how: taken.append(1) or real(*args, **how))
        student = train(RECIPE, data, tmp_path, save_every=save_every)
    assert len(taken) == STEPS - step // save_every * save_every
    assert_same_run(student, tmp_path, whole_run)


def test_stopped_at_every_third_step_it_still_is_the_same_run(data, tmp_path, whole_run):
    for step in range(3, STEPS, 3):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stop): train(RECIPE, data, tmp_path, save_every=1)
    assert_same_run(train(RECIPE, data, tmp_path), tmp_path, whole_run)


def test_a_line_that_a_kill_cut_short_is_dropped(data, tmp_path, whole_run):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stop): train(RECIPE, data, tmp_path, save_every=5)
    with open(tmp_path / "log.csv", "a") as file: file.write("7,0,0.000")
    assert_same_run(train(RECIPE, data, tmp_path), tmp_path, whole_run)


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


def test_a_damaged_log_loses_its_damaged_lines_alone(tmp_path):
    path, cell = tmp_path / "log.csv", ["1"] * (len(FIELDS) - 1)
    good, header = [",".join([str(i), *cell]) for i in range(3)], ",".join(FIELDS)
    for damage in ("", "0", "1,0,0.0", "0,0,0.0" + good[2], "x," + ",".join(cell), ",".join(["-1", *cell]), ",".join(["1.5", *cell]), "\0" * 300, "\xff,\xfe", '"'):
        path.write_bytes("\r\n".join([header, good[0], damage, good[1], damage]).encode("latin1"))
        trim_log(path, 2)
        found = path.read_text().split()
        assert found[:2] == [header, good[0]] and (found[2:] == [good[1]] or damage == '"'), damage
    path.write_bytes(b"\0" * 200)  # what a power cut can leave
    trim_log(path, 2)
    assert path.read_text().split() == [header]
    path.write_text("step,epoch,loss\n0,0,1\n")
    with pytest.raises(ValueError, match=r"log.csv has the columns \['step', 'epoch', 'loss'\]; expected .*move it away"): trim_log(path, 2)
    assert path.read_text() == "step,epoch,loss\n0,0,1\n"


def test_a_log_has_a_line_a_step_and_a_board_its_numbers(tmp_path):
    told, names = [], ("step", "epoch", "lr")
    board = SimpleNamespace(add_scalar=lambda *what: told.append(what), close=lambda: told.append("closed"))
    (tmp_path / "log.csv").write_text("step,epoch,lr\n0,0,1.0\n1,0,2.0\n")
    log = Log(tmp_path / "log.csv", 1, names, board)
    log.write(dict(step=1, epoch=0, lr=0.5))
    assert (tmp_path / "log.csv").read_text().split() == ["step,epoch,lr", "0,0,1.0", "1,0,0.5"]  # at once: a kill loses nothing
    log.close()
    assert told == [("lr", 0.5, 1), "closed"]


def test_only_our_checkpoints_are_counted_and_deleted(tmp_path, data):
    folder = tmp_path / "run [1] {a} * %s"
    folder.mkdir()
    for name in ("best", "00000001-copy", "00000002 (copy)", "", "1e3"): (folder / f"checkpoint-{name}.safetensors").write_text("mine")
    assert newest_checkpoint(folder) is None and list_checkpoints(folder) == []
    student = start_student(RECIPE, data, ALONE)
    for steps in (3, 12, 100_000_000): long_run.keep_checkpoint(folder, 2, steps, student, torch.optim.SGD(student.parameters()), RECIPE, 0, [])
    assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-00000012.safetensors", "checkpoint-100000000.safetensors"] and len([*folder.iterdir()]) == 7
    assert newest_checkpoint(folder).name == "checkpoint-100000000.safetensors"


@pytest.fixture
def finished(whole_run, tmp_path):
    "A copy of the whole run's folder."
    return Path(shutil.copytree(whole_run[1], tmp_path / "run"))


def test_a_checkpoint_of_something_else_is_refused(finished, folder, data):
    urls = list_shards(folder / "shards")
    fewer = open_data(urls[:4], folder / "embeddings", folder / "concepts")
    before = newest_checkpoint(finished).read_bytes(), log_of(finished)
    for match, recipe, shards, settings in (("alpha.*2.0.*3.0", dataclasses.replace(RECIPE, alpha=3.0), data, {}),
                                            ("streams.*2.*4", RECIPE, data, dict(streams=4)),
                                            ("precision.*fp32.*bf16", RECIPE, data, dict(precision="bf16")),
                                            ("max_norm.*None.*1.0", RECIPE, data, dict(max_norm=1.0)),
                                            ("augment.*True.*False", RECIPE, data, dict(augment=False)),
                                            ("'data'", RECIPE, fewer, {})):
        with pytest.raises(ValueError, match=f"checkpoint-00000020.safetensors .*{match}.*another folder"):
            train(recipe, shards, finished, **settings)
    assert before == (newest_checkpoint(finished).read_bytes(), log_of(finished))


def test_a_run_on_embeddings_of_another_width_is_named(finished, data):
    "Not by what does not fit into the weights."
    wider = data._replace(key="another", sidecars=[s._replace(shape=(s.shape[0], 20)) for s in data.sidecars])
    with pytest.raises(ValueError, match="'data'.*belongs to another run"):
        long_run.resume(finished, start_student(RECIPE, wider, ALONE), None, None, RECIPE, dict(data="another"), ALONE)


def test_a_checkpoint_of_the_course_s_own_training_is_no_run_s(tmp_path, data):
    student = start_student(RECIPE, data, ALONE)
    for history in ([], [dict(step=0), dict(step=1)]):
        training.save_checkpoint(tmp_path / "checkpoint-00000001.safetensors", student, torch.optim.SGD(student.parameters()), RECIPE, 1, history)
        with pytest.raises(ValueError, match="streams.*belongs to another run"): train(RECIPE, data, tmp_path)


def test_the_last_checkpoints_are_kept(data, tmp_path):
    train(RECIPE, data, tmp_path, save_every=3, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-00000018.safetensors", "checkpoint-00000020.safetensors"]


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, whole_run):
    train(RECIPE, data, tmp_path, save_every=6)
    for path in list_checkpoints(tmp_path)[-2:]: path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged.*an older checkpoint is taken") as said:
        student = train(RECIPE, data, tmp_path, save_every=6)
    assert len(said) == 2
    assert_same_run(student, tmp_path, whole_run)
    for path in list_checkpoints(tmp_path): path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no checkpoint in .* is whole.*delete them and train again"): train(RECIPE, data, tmp_path)


def test_processes_that_see_other_checkpoints_end(finished, data, monkeypatch):
    def others(answers, mine): answers[:] = [mine, None]
    monkeypatch.setattr(torch.distributed, "all_gather_object", others)
    with pytest.raises(ValueError, match=r"see other checkpoints: \['checkpoint-00000020.safetensors', None\].*file system that all share"):
        long_run.resume(finished, start_student(RECIPE, data, ALONE), None, None, RECIPE, {}, World(0, 2, ALONE.device))


def test_a_full_disk_costs_one_checkpoint(data, tmp_path, whole_run, monkeypatch):
    calls, real = [], training.save_file
    def full(tensors, part, metadata):
        calls.append(1)
        if len(calls) != 3: return real(tensors, part, metadata=metadata)
        Path(part).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match="No space left"): train(RECIPE, data, tmp_path, save_every=3)
    _, (last,) = load_checkpoint(newest_checkpoint(tmp_path), start_student(RECIPE, data, ALONE), None, RECIPE)
    assert last["step"] == 5 and not list(tmp_path.glob(".*.part"))
    assert_same_run(train(RECIPE, data, tmp_path, save_every=3), tmp_path, whole_run)


def test_what_a_kill_left_half_written_is_swept_away(data, tmp_path, whole_run):
    for name in ("checkpoint-00000020.safetensors", "log.csv"): (tmp_path / f".{name}.12345.part").write_bytes(b"half")
    assert_same_run(train(RECIPE, data, tmp_path), tmp_path, whole_run)


def test_two_runs_in_one_folder_are_an_error(data, tmp_path):
    with run_lock(tmp_path / ".train.lock"), pytest.raises(RuntimeError, match="another run"): train(RECIPE, data, tmp_path)


# --- steps that are not finite

def break_steps(monkeypatch, broken) -> None:
    "Pictures of these steps are not numbers."
    real, step = long_run.to_batch, []
    def to_batch(*args):
        step.append(1)
        batch = real(*args)
        return batch._replace(images=batch.images * float("nan")) if len(step) - 1 in broken else batch
    monkeypatch.setattr(long_run, "to_batch", to_batch)


def test_a_step_that_is_not_finite_is_skipped_and_counted(data, tmp_path, monkeypatch):
    break_steps(monkeypatch, {3, 4, 11})
    student = train(RECIPE, data, tmp_path)
    log = log_of(tmp_path)
    assert [int(line["skipped"]) for line in log] == [0] * 3 + [1] + [2] * 7 + [3] * 9
    assert [i for i, line in enumerate(log) if not np.isfinite(float(line["gradient_norm"]))] == [3, 4, 11]
    assert all(p.isfinite().all() for p in student.parameters())


def test_too_many_in_a_row_end_the_run_and_leave_the_checkpoints(data, tmp_path, monkeypatch):
    break_steps(monkeypatch, set(range(5, 30)))
    with pytest.raises(RuntimeError, match=f"{MAX_SKIPPED} steps in a row were not finite, up to step 14; lower the learning rate"):
        train(RECIPE, data, tmp_path, save_every=5)
    assert len(log_of(tmp_path)) == 15 and newest_checkpoint(tmp_path)
    _, (last,) = load_checkpoint(list_checkpoints(tmp_path)[0], start_student(RECIPE, data, ALONE), None, RECIPE)
    assert last["step"] == 4 and last["skipped"] == 0


def test_fp16_goes_on_with_its_scaler(data, tmp_path):
    short = dataclasses.replace(RECIPE, epochs=1)
    whole = train(short, data, tmp_path / "whole", precision="fp16")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stop): train(short, data, tmp_path / "stopped", precision="fp16", save_every=4)
    again = train(short, data, tmp_path / "stopped", precision="fp16")
    assert same_weights(whole, again) and log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
    with safe_open(newest_checkpoint(tmp_path / "stopped"), framework="pt") as file: (last,) = json.loads(file.metadata()["history"])
    assert last["scaler"]["scale"] == 1024 and last["scaler"]["_growth_tracker"] == 10  # of its start, and the steps since


class Steps:
    "run_steps without pictures: the gradient's length in each step is given."

    def __init__(self, data, norms, last=None, **changes):
        parts = [[SimpleNamespace(epoch=7)] * 2 for _ in norms]
        lengths = iter(norms)
        self.asked: list = []
        def step_on(inputs, lr):
            self.asked.append((inputs, lr))
            return dict(total=1.0, gradient_norm=next(lengths))
        student = SimpleNamespace(clip=SimpleNamespace(logit_scale=torch.zeros(())), logit_scale=torch.tensor(20.0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(long_run, "to_batch", lambda group, student, centroids, temperature: (len(group), tuple(centroids.shape), temperature))
            self.lines: list = []
            lines = long_run.run_steps(step_on, iter(parts), student, data, dataclasses.replace(RECIPE, **changes), last or dict(step=-1, skipped=0), 40, False)
            for line in lines: self.lines.append(line)


def test_ten_steps_in_a_row_are_too_many_and_nine_are_not(data):
    bad, fine = float("nan"), 1.0
    steps = Steps(data, ([bad] * 9 + [fine]) * 2 + [float("inf")] * 9, last=dict(step=4, skipped=3))
    assert [line["step"] for line in steps.lines] == [*range(5, 34)] and [line["skipped"] for line in steps.lines][8::10] == [12, 21, 30]
    assert {line["epoch"] for line in steps.lines} == {7} and {line["logit_scale"] for line in steps.lines} == {20.0}
    assert steps.asked[0] == ([(2, (4, 16), 0.1)], pytest.approx(RECIPE.lr * (1 + math.cos(math.pi * 2 / 37)) / 2))
    with pytest.raises(RuntimeError, match="10 steps in a row were not finite, up to step 14"): Steps(data, [fine] * 5 + [bad] * 20)
    with pytest.raises(RuntimeError, match="up to step 9"): Steps(data, [bad] * 20)


# --- held-out pairs

def test_held_out_shards_are_scored_on_the_way(folder, data, tmp_path, whole_run):
    held_out = list_shards(folder / "held-out")
    student = train(RECIPE, data, tmp_path, held_out=held_out, eval_every=8)
    scores = log_of(tmp_path, "eval.csv")
    assert [line["step"] for line in scores] == ["7", "15", "19"] and same_weights(student, whole_run[0])
    # the last line against the course's own way: all pictures by read_image, features in one piece
    samples = read_shard(held_out[0])
    images = prepare_images(student, np.stack([read_image(s["jpg"], 8) for s in samples]))
    with torch.no_grad(): image_features, text_features = student.eval().encode_image(images), student.encode_text(tokenize(student, [s["txt"].decode() for s in samples]))
    expected = retrieval_recall(image_features, text_features, text_ids=[s["txt"].decode() for s in samples])
    assert {k: float(scores[-1][k]) for k in expected} == pytest.approx(expected) and scores[-1]["pairs"] == "20"


def test_a_stopped_run_scores_as_one_that_was_not_stopped(folder, data, tmp_path):
    short, settings = dataclasses.replace(RECIPE, epochs=1), dict(held_out=list_shards(folder / "held-out"), eval_every=2, save_every=3)
    train(short, data, tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stop): train(short, data, tmp_path / "stopped", **settings)
    train(short, data, tmp_path / "stopped", **settings)
    assert [line["step"] for line in log_of(tmp_path / "whole", "eval.csv")] == ["1", "3", "5", "7", "9"]
    assert log_of(tmp_path / "whole", "eval.csv") == log_of(tmp_path / "stopped", "eval.csv")


def naive_scores(images: torch.Tensor, texts: torch.Tensor, ids: list[str]) -> dict[str, float]:
    "Recall and median rank, one query at a time."
    cosines, found = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T, {}
    for way, table in (("i2t", cosines), ("t2i", cosines.T)):
        ranks = [1 + min(sum(bool(other > row[j]) for other in row) for j in range(len(ids)) if ids[j] == ids[i]) for i, row in enumerate(table)]
        found |= {f"{way}_r{n}": float(np.mean([rank <= n for rank in ranks])) for n in (1, 5, 10)} | {f"{way}_median_rank": float(np.median(ranks))}
    return found


def test_an_evaluation_is_open_clip_s_and_leaves_the_run_alone(folder, data, tmp_path):
    "Captions of unequal length, some of which read the same; features by open_clip alone, in evaluation mode."
    captions = ["a dog", "A  Dog", "a very long caption about a cat and its tail", "é", "e\u0301", "x", *(f"thing {i}" * (1 + i % 3) for i in range(30))]
    urls = list(map(str, write_shards([(image, c) for (image, _), c in zip(little_pairs(36, 2000), captions)], tmp_path / "held [1]", 11, 8)))
    student = start_student(RECIPE, data, ALONE)
    student.clip.visual.ln_pre = torch.nn.Sequential(student.clip.visual.ln_pre, torch.nn.Dropout(0.5))  # would be heard in training mode
    before = torch.get_rng_state(), {k: v.clone() for k, v in student.state_dict().items()}
    found = long_run.evaluate_shards(student, urls, batch_size=5)
    assert torch.equal(torch.get_rng_state(), before[0]) and all(torch.equal(v, student.state_dict()[k]) for k, v in before[1].items())
    assert all(m.training for m in student.modules()) and torch.is_grad_enabled()
    transform, clip = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.clip)), is_train=False), student.eval().clip
    samples = [s for url in urls for s in read_shard(url)]
    with torch.no_grad():
        images = clip.encode_image(torch.stack([transform(Image.open(io.BytesIO(s["jpg"]))) for s in samples]))
        texts = clip.encode_text(open_clip.SimpleTokenizer(context_length=8)(captions))
    ids = ["a dog", "a dog", captions[2], "é", "é", *captions[5:]]
    assert found == pytest.approx(naive_scores(images, texts, ids) | dict(pairs=36))
    few = long_run.evaluate_shards(student, urls, limit=13)  # of the second shard two
    assert few == pytest.approx(naive_scores(images[:13], texts[:13], ids[:13]) | dict(pairs=13)) and student.training


@pytest.mark.parametrize("how", [dict(limit=1), dict(limit=0), dict(limit=-5), dict(batch_size=0)])
def test_an_evaluation_of_nothing_is_refused(how, folder, data):
    with pytest.raises(ValueError, match=f"{[*how][0]}={[*how.values()][0]}; expected at least"): long_run.evaluate_shards(start_student(RECIPE, data, ALONE), list_shards(folder / "held-out"), **how)


def test_a_training_shard_in_other_letters_is_no_held_out_shard(data, tmp_path):
    for name, count, first in (("whole", 13, 13), ("half", 20, 0)):  # shard 1 under other keys; 13 of 20 pairs under their own
        pairs = [(image, c.upper().replace(" ", "\u3000")) for image, c in little_pairs(count, first)]
        urls = list(map(str, write_shards(pairs, tmp_path / name, count, 8)))
        with pytest.raises(ValueError, match=f"{name}.00000.tar is among the training shards"): check_held_out(urls, data)
    few = write_shards([*little_pairs(10), *little_pairs(10, 3000)], tmp_path / "few", 20, 8)  # no more than half
    check_held_out([str(few[0])], data)


def test_training_shards_are_no_held_out_shards(folder, data, tmp_path):
    check_held_out(list_shards(folder / "held-out"), data)
    copy = shutil.copy(data.urls[1], tmp_path / "other.tar")  # under another name
    link = tmp_path / "link.tar"
    link.symlink_to(data.urls[2])
    (again,) = write_shards(little_pairs(13, 26), tmp_path / "again", per_shard=13, size=8)  # the same captions under other keys
    keys = write_shards(little_pairs(20), tmp_path / "keys", per_shard=20, size=8)[:1]  # 13 of 20 pairs have key and caption of shard 0
    for url in (data.urls[0], copy, link, again, *keys):
        with pytest.raises(ValueError, match="is among the training shards .*; give others"): train(RECIPE, data, tmp_path / "run", held_out=[str(url)])


# --- errors

@pytest.mark.parametrize("changed, settings, size, match", [
    (dict(), dict(streams=3), 1, "batch_size=8 cannot be cut into 3 streams"),
    (dict(), dict(streams=4), 3, "4 streams for 3 processes; expected a multiple"),
    (dict(batch_size=80), dict(streams=2), 1, "hold 72 different captions"),
    (dict(first_steps=4), dict(), 1, r"pass shard_recipe\(recipe\)"),
    (dict(word_table=True), dict(), 1, r"pass shard_recipe\(recipe\)"),
    (dict(), dict(streams=0), 1, "streams=0; expected at least 1"),
    (dict(), dict(keep=0), 1, "keep=0; expected at least 1"),
    (dict(), dict(save_every=0), 1, "save_every=0; expected at least 1"),
    (dict(), dict(eval_every=0), 1, "eval_every=0; expected at least 1"),
    (dict(), dict(workers=-1), 1, "workers=-1; expected at least 0"),
    (dict(), dict(save_every=2.5), 1, "save_every=2.5; expected at least 1, a whole number"),
    (dict(), dict(max_norm=float("nan")), 1, "max_norm=nan; expected more than 0"),
    (dict(), dict(max_norm=0.0), 1, "max_norm=0.0; expected more than 0"),
    (dict(), dict(accumulate=True, streams=1), 1, "accumulate needs several streams a process.*give 4"),
    (dict(), dict(precision="fp8"), 1, "precision='fp8'; expected 'auto'"),
])
def test_what_does_not_fit_is_said(data, tmp_path, changed, settings, size, match):
    with pytest.raises(ValueError, match=match): train(dataclasses.replace(RECIPE, **changed), data, tmp_path / "run", World(0, size, ALONE.device), **settings)
    assert not (tmp_path / "run").exists()


def test_accumulated_runs_are_runs_at_once(data, tmp_path):
    short = dataclasses.replace(RECIPE, epochs=1)
    train(short, data, tmp_path / "once", streams=4)
    train(short, data, tmp_path / "parts", streams=4, accumulate=True)
    for a, b in zip(log_of(tmp_path / "once"), log_of(tmp_path / "parts"), strict=True): assert abs(float(a["total"]) - float(b["total"])) < 1e-3
    with pytest.raises(ValueError, match="BatchNorm.*do not accumulate"):
        train(dataclasses.replace(RECIPE, student="kklip-laptop", imagenet=False), data, tmp_path / "norms", accumulate=True)


def test_workers_change_nothing(data, tmp_path, whole_run):
    assert_same_run(train(RECIPE, data, tmp_path, workers=2), tmp_path, whole_run)


def test_tensorboard_has_the_log(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(dataclasses.replace(RECIPE, epochs=1), data, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    np.testing.assert_allclose([e.value for e in events.Scalars("total")], [float(line["total"]) for line in log_of(tmp_path)], rtol=1e-6)


def test_without_tensorboard_it_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"): train(RECIPE, data, tmp_path, tensorboard=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_killed_stages_end_as_if_nothing_had_happened():
    run = subprocess.run([sys.executable, str(TESTS.parent / "scripts" / "kill_test.py"), "--kills", "6"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"embeddings and concepts equal byte for byte, weights bit for bit: 6 kills$", run.stdout.strip()), run.stdout
