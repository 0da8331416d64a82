"""Which pairs come when, whoever reads them; and that they come as open_clip, PIL and scikit-learn would have them."""

import math
import dataclasses
import io
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent))

from little_shards import ALONE, PER_SHARD, RECIPE, SHARDS, data, embed, folder, open_folder  # noqa: F401

from kklip_nb.concepts import soft_labels
from kklip_nb.own_pairs import decode_image
from kklip_nb.scale import loader
from kklip_nb.scale.distributed import start_student
from kklip_nb.scale.loader import (check_batch, deal_epoch, deal_run, epoch_steps, lay_out, picture_transform, read_steps,
                                   share_seen, to_batch)
from kklip_nb.scale.shards import read_shard
from kklip_nb.student import build_student, tokenize

N = SHARDS * PER_SHARD


# --- dealing

shards_of_captions = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=6)


@given(shards_of_captions, st.integers(1, 4), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_batches_are_full_and_hold_no_caption_twice(captions, streams, size, seed, epoch):
    ids = [np.array(c) for c in captions]
    total, distinct = sum(map(len, captions)), len({i for c in captions for i in c})
    if distinct < streams * size: return
    plan = deal_epoch(ids, streams, size, seed, epoch)
    assert plan.shape == (math.ceil(math.ceil(total / streams) / size), streams, size, 2)
    for step in plan: assert len({captions[s][r] for s, r in step.reshape(-1, 2)}) == streams * size
    assert np.array_equal(plan, deal_epoch(ids, streams, size, seed, epoch))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_an_epoch_of_different_captions_sees_every_pair_and_few_twice(sizes, streams, size, seed):
    if sum(sizes) < streams * size: return
    ends = np.cumsum(sizes)
    plan = deal_epoch([np.arange(e - n, e) for e, n in zip(ends, sizes)], streams, size, seed, 0)
    seen = Counter(map(tuple, plan.reshape(-1, 2).tolist()))
    assert set(seen) == {(s, r) for s, n in enumerate(sizes) for r in range(n)}
    assert sum(seen.values()) - len(seen) < streams * size  # less than a batch is filled up


def naive_deal(captions, pairs, streams, size):
    "The rule, as it is said: lists instead of iterators."
    hands = [list(map(tuple, part.tolist())) for part in np.array_split(pairs, streams)]
    left, steps = [list(hand) for hand in hands], []
    for _ in range(-(-len(hands[0]) // size)):
        used, step = set(), []
        for mine, rest in zip(hands, left):
            part = []
            for pool, taken in ((rest, True), (mine[::-1], False), (list(map(tuple, pairs.tolist())), False)):
                for pair in list(pool):
                    if len(part) == size: break
                    if captions[pair[0]][pair[1]] in used: continue
                    used.add(captions[pair[0]][pair[1]])
                    part.append(pair)
                    if taken: pool.remove(pair)
            step.append(part)
        steps.append(step)
    return steps


@given(shards_of_captions, st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_the_deal_is_that_of_a_naive_loop(captions, streams, size, seed):
    if len({i for c in captions for i in c}) < streams * size: return
    pairs = lay_out([len(c) for c in captions], seed, 1)
    assert deal_epoch([np.array(c) for c in captions], streams, size, seed, 1).tolist() == [[[list(p) for p in part] for part in step] for step in naive_deal(captions, pairs, streams, size)]


def test_copies_of_a_caption_take_turns():
    captions, seen = [np.array([0] * 8 + list(range(1, 9)))], Counter()
    for epoch in range(60): seen.update(set(deal_epoch(captions, 1, 4, 0, epoch)[..., 1].ravel().tolist()))
    assert all(seen[row] == 60 for row in range(8, 16))  # the others always come
    assert min(seen[row] for row in range(8)) > 15 and sum(seen[row] for row in range(8)) <= 4 * 60


def test_epochs_and_seeds_have_other_orders(data):
    assert len({deal_epoch(data.captions, 2, 4, seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}) == 9


@given(st.integers(0, 21), st.integers(1, 4), st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]))
def test_a_run_can_be_taken_up_anywhere_by_any_number_of_workers(done, workers, shape):
    streams, world_size = shape
    rng = np.random.default_rng(0)
    data = loader.ShardData([], [], [rng.integers(0, 60, 13) for _ in range(5)], None, "")
    recipe = dataclasses.replace(RECIPE, epochs=3, seed=4)
    whole = [p for rank in range(world_size) for p in [np.concatenate([x for _, x in deal_run(data, recipe, streams, rank, world_size)])]]
    skipped = done * (streams // world_size)
    for rank in range(world_size):
        for worker in range(workers):
            mine = [x for _, x in deal_run(data, recipe, streams, rank, world_size, done, worker, workers)]
            expected = whole[rank][skipped:][worker::workers]
            assert np.array_equal(np.concatenate(mine) if mine else whole[rank][:0], expected)


def test_what_an_epoch_sees_is_counted(data):
    assert share_seen(data, RECIPE, 2) == 1 and epoch_steps(data, RECIPE, 2) == 10
    frequent = data._replace(captions=[np.where(np.arange(PER_SHARD) % 2, c, 7) for c in data.captions])  # 42 of 78 share one
    assert share_seen(frequent, RECIPE, 2) == pytest.approx((N - 42 + 10) / N)  # one a step, in 10 steps


@pytest.mark.parametrize("changed, streams, size, match", [
    (dict(), 3, 2, "3 streams for 2 processes; expected a multiple|cannot be cut into 3"),
    (dict(batch_size=6), 3, 2, "3 streams for 2 processes; expected a multiple"),
    (dict(), 3, 1, "batch_size=8 cannot be cut into 3 streams"),
    (dict(batch_size=80), 2, 1, "batch_size=80, but the shards hold 72 different captions; give fewer"),
    (dict(), 0, 1, "0 streams"),
])
def test_what_does_not_fit_is_said(data, changed, streams, size, match):
    with pytest.raises(ValueError, match=match): check_batch(data, dataclasses.replace(RECIPE, **changed), streams, size)


def test_one_shard_can_feed_many_streams(data):
    one = data._replace(urls=data.urls[:1], sidecars=data.sidecars[:1], captions=data.captions[:1])
    student = start_student(RECIPE, data, ALONE)
    steps = list(read_steps(student, one, dataclasses.replace(RECIPE, epochs=1), 4))
    assert {c for step in steps for part in step for c in part.captions} == {s["txt"].decode() for s in read_shard(one.urls[0])}


# --- reading

def same_part(a, b) -> bool:
    return a[:2] == b[:2] and all(map(torch.equal, a[2:], b[2:]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_pairs_of_a_step_do_not_depend_on_processes_or_workers(data):
    recipe, student = dataclasses.replace(RECIPE, epochs=1), start_student(RECIPE, data, ALONE)
    one = list(read_steps(student, data, recipe, 4))
    assert len(one) == epoch_steps(data, recipe, 4) and all(len(step) == 4 for step in one)
    for size in (2, 4):
        runs = [list(read_steps(student, data, recipe, 4, rank, size)) for rank in range(size)]
        for step, *parts in zip(one, *runs, strict=True):
            assert all(same_part(part, parts[s % size][s // size]) for s, part in enumerate(step))
    for workers, done in ((1, 0), (2, 3), (3, 0)):
        others = list(read_steps(student, data, recipe, 4, workers=workers, done=done))
        assert all(same_part(a, b) for x, y in zip(one[done:], others, strict=True) for a, b in zip(x, y, strict=True))


def test_every_pair_comes_with_its_own_target_and_picture(data):
    student, recipe = start_student(RECIPE, data, ALONE), dataclasses.replace(RECIPE, epochs=1)
    transform = picture_transform(student, augment=False)
    pictures = {s["txt"].decode(): [] for url in data.urls for s in read_shard(url)}
    for url in data.urls:
        for s in read_shard(url): pictures[s["txt"].decode()].append(transform(decode_image(s["jpg"])))
    parts = [part for step in read_steps(student, data, recipe, 2, augment=False) for part in step]
    for part in parts:
        for caption, image, target in zip(part.captions, part.images, part.targets):
            assert any(torch.equal(image, other) for other in pictures[caption])
            raw = embed([caption])[0].astype(np.float16).astype(np.float32) - data.concepts.scale.mean
            np.testing.assert_allclose(target, raw / np.linalg.norm(raw), atol=1e-5)
    assert len({x.numpy().tobytes() for part in parts for x in part.images}) == N  # nothing is dropped


def test_a_shard_is_read_once_a_stream_and_not_at_all_when_it_is_done(data, monkeypatch):
    student, recipe, read = start_student(RECIPE, data, ALONE), dataclasses.replace(RECIPE, epochs=1), []
    real = loader.join_shard
    monkeypatch.setattr(loader, "join_shard", lambda url, *rest: read.append(url) or real(url, *rest))
    for _ in read_steps(student, data, recipe, 1): pass
    assert sorted(read) == sorted(data.urls)
    read.clear()
    for _ in read_steps(student, data, recipe, 1, done=9): pass
    assert len(read) == 1  # the last of ten steps lies in the last shard


def test_the_caller_s_random_state_is_left_alone(data):
    student = start_student(RECIPE, data, ALONE)
    for workers in (0, 1):
        before = torch.get_rng_state()
        next(read_steps(student, data, RECIPE, 2, workers=workers))
        assert torch.equal(torch.get_rng_state(), before)


def test_a_picture_broken_after_the_embedding_is_named(folder, tmp_path):
    where = Path(shutil.copytree(folder, tmp_path / "copy"))
    url = where / "shards" / "00002.tar"
    sample = read_shard(url)[5]
    url.write_bytes(url.read_bytes().replace(sample["jpg"], sample["jpg"][:-200] + bytes(200) if len(sample["jpg"]) > 400 else bytes(len(sample["jpg"]))))
    data = open_folder(where)
    student = start_student(RECIPE, data, ALONE)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=sample["__key__"]):
            for _ in read_steps(student, data, RECIPE, 2, workers=workers): pass


def test_a_shard_without_sidecar_is_named(folder, tmp_path):
    where = Path(shutil.copytree(folder, tmp_path / "copy"))
    (where / "embeddings" / "00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard 00003 has no"): open_folder(where)


# --- pictures

def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", ["kklip-laptop", "RN50", "ViT-B-32"])
@pytest.mark.parametrize("size", [(300, 200), (120, 260)])
def test_without_augmentation_a_picture_is_open_clip_s_of_this_model(name, size):
    student = build_student(name, None, 16, 4, imagenet=False, train_image="all")
    theirs = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.clip)), is_train=False)(photo(size))
    ours = loader.prepare_images(student, picture_transform(student, augment=False)(photo(size))[None])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_crop_is_open_clip_s_up_to_rounding():
    student = build_student("kklip-laptop", None, 16, 4, imagenet=False, train_image="all")
    theirs = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.clip)), is_train=True).transforms[0]
    ours = picture_transform(student, augment=True)
    assert tuple(theirs.scale) == (0.9, 1.0)
    for seed in range(10):
        torch.manual_seed(seed)
        a = np.asarray(theirs(photo((300, 260), seed))).astype(int)
        torch.manual_seed(seed)
        b = ours(photo((300, 260), seed)).permute(1, 2, 0).numpy()
        assert a.shape == b.shape and b.dtype == np.uint8 and abs(a - b).max() <= 2 and (a != b).mean() < 0.05


def test_transparency_and_rotation_are_seen_in_training_as_in_evaluation():
    student = build_student("kklip-laptop", None, 16, 4, imagenet=False, train_image="all")
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(picture).rectangle((0, 0, 20, 20), fill=(255, 0, 0, 255))
    png = io.BytesIO()
    picture.save(png, "PNG")
    pair = loader.Pair("00000", loader.Sample("0", "a red square", png.getvalue()), np.zeros(16, np.float32))
    tokenizer = open_clip.SimpleTokenizer(context_length=student.clip.context_length)
    for augment in (False, True):
        part = loader.make_part([pair], picture_transform(student, augment), tokenizer, 0, 0)
        assert (part.images[0, :, -20:, -20:] == 255).all()  # white, not black
        assert part.images[0, 0, 5, 5] > 200 and part.images[0, 1, 5, 5] < 60


# --- on the device

def test_a_batch_is_normalised_labelled_and_padded(data):
    student = start_student(RECIPE, data, ALONE)
    parts = next(read_steps(student, data, RECIPE, 2))
    parts[0] = parts[0]._replace(captions=["a"] * 4, tokens=tokenize(student, ["a"] * 4)[:, :3])
    batch = to_batch(parts, student, torch.from_numpy(data.concepts.centroids), 0.3)
    assert batch.captions == parts[0].captions + parts[1].captions
    assert torch.equal(torch.nn.functional.pad(batch.tokens, (0, 8 - batch.tokens.shape[1])), tokenize(student, batch.captions))
    mean, std = (torch.tensor(open_clip.get_model_preprocess_cfg(student.clip)[k]).view(3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(batch.images, (torch.cat([p.images for p in parts]) / 255 - mean) / std, rtol=0, atol=1e-5)
    expected = soft_labels(batch.targets.double(), torch.from_numpy(data.concepts.centroids).double(), 0.3)
    assert (batch.labels.double() - expected).abs().max() < 1e-6 and batch.labels.dtype == torch.float32
