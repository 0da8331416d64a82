"""Which pairs come when, whoever reads them; and that they come as open_clip, PIL and scikit-learn would have them."""

import dataclasses
import inspect
import io
import itertools
import json
import math
import shutil
import sys
import zlib
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

from shard_files import edit, odd_pictures, picture

from kklip_nb.concepts import soft_labels
from kklip_nb.own_pairs import decode_image
from kklip_nb.scale import loader
from kklip_nb.scale.clustering import cluster_shards
from kklip_nb.scale.distributed import start_student
from kklip_nb.scale.embeddings import embed_shards, open_sidecars
from kklip_nb.scale.loader import (check_batch, deal_epoch, deal_run, epoch_steps, lay_out, open_data, picture_transform, read_steps,
                                   share_seen, shard_recipe, to_batch)
from kklip_nb.scale.shards import list_shards, read_shard
from kklip_nb.student import build_student, tokenize
from kklip_nb.training import LAPTOP

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


def test_pairs_that_wait_keep_their_order():
    "Many copies of few captions: in each part several wait, and not all of them are dealt."
    for seed in range(30):
        captions = [np.random.default_rng(seed).integers(0, 7, 14).tolist() for _ in range(3)]
        if len({i for c in captions for i in c}) < 6: continue
        pairs = lay_out([14] * 3, seed, 0)
        assert deal_epoch([np.array(c) for c in captions], 2, 3, seed, 0).tolist() == [[[list(p) for p in part] for part in step] for step in naive_deal(captions, pairs, 2, 3)]


def test_copies_of_a_caption_take_turns():
    captions, seen = [np.array([0] * 8 + list(range(1, 9)))], Counter()
    for epoch in range(60): seen.update(set(deal_epoch(captions, 1, 4, 0, epoch)[..., 1].ravel().tolist()))
    assert all(seen[row] == 60 for row in range(8, 16))  # the others always come
    assert min(seen[row] for row in range(8)) > 15 and sum(seen[row] for row in range(8)) <= 4 * 60


def test_the_layout_is_a_fresh_shuffle_of_shards_and_of_rows_within_each():
    "Every pair once, a shard's pairs side by side; no two shuffles of seed, epoch and shard are the same."
    sizes, orders, shuffles = [9, 8, 9, 11, 8, 9, 10], [], []
    for seed in range(3):
        for epoch in range(3):
            plan = lay_out(sizes, seed, epoch)
            assert sorted(map(tuple, plan.tolist())) == [(s, r) for s, n in enumerate(sizes) for r in range(n)]
            orders.append(tuple(s for s, _ in itertools.groupby(plan[:, 0].tolist())))
            shuffles += [tuple(plan[plan[:, 0] == s, 1][plan[plan[:, 0] == s, 1] < 8].tolist()) for s in range(7)]
            assert len(orders[-1]) == 7 and np.array_equal(plan, lay_out(sizes, seed, epoch))
    assert len(set(orders)) == 9 and len(set(shuffles)) == 63 and tuple(range(8)) not in shuffles


def test_a_run_is_the_epochs_one_after_the_other(data):
    "Each part of each step and stream at its process, said epoch by epoch, in the order of deal_epoch."
    recipe = dataclasses.replace(RECIPE, epochs=3, seed=11)
    plans = [deal_epoch(data.captions, 4, 2, 11, epoch).tolist() for epoch in range(3)]
    for size, done, workers in ((1, 0, 1), (2, 0, 1), (2, 13, 3), (4, 10, 2), (4, 29, 1), (2, 30, 1)):
        for rank in range(size):
            mine = [(e, plan[step][s]) for e, plan in enumerate(plans) for step in range(10) for s in range(rank, 4, size)][done * 4 // size:]
            for worker in range(workers):
                found = [(e, part) for e, parts in deal_run(data, recipe, 4, rank, size, done, worker, workers) for part in parts.tolist()]
                assert found == mine[worker::workers]


@pytest.mark.parametrize("seed, epoch", [(0, 0), (5, 0), (0, 2)])
def test_the_share_seen_is_that_of_this_seed_and_epoch(monkeypatch, seed, epoch):
    ids = [np.random.default_rng(1).choice(30, 40, p=np.r_[0.4, np.full(29, 0.6 / 29)]) for _ in range(3)]
    data, recipe = loader.ShardData([], [], ids, None, ""), dataclasses.replace(RECIPE, seed=seed, batch_size=6)
    plan = deal_epoch(ids, 2, 3, seed, epoch)
    real, asked = deal_epoch, []
    monkeypatch.setattr(loader, "deal_epoch", lambda *given: asked.append(given[1:]) or real(*given))
    assert share_seen(data, recipe, 2, epoch) == len(set(map(tuple, plan.reshape(-1, 2).tolist()))) / 120 < 1
    assert asked == [(2, 3, seed, epoch)]


def test_pairs_alone_are_trained_on():
    recipe = dataclasses.replace(LAPTOP, word_table=True, words=77, first_steps=33, seed=5)
    changed = {k: v for k, v in dataclasses.asdict(shard_recipe(recipe)).items() if v != dataclasses.asdict(recipe)[k]}
    assert changed == dict(word_table=False, words=0, first_steps=0)


def test_what_is_done_unless_told_otherwise():
    found = {name: p.default for name, p in inspect.signature(read_steps).parameters.items() if p.default is not p.empty}
    assert found == dict(rank=0, world_size=1, done=0, workers=0, augment=True, pin=False)


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
    (dict(), 0, 1, "0 streams"), (dict(), -1, 1, "-1 streams"), (dict(), 16, 1, "16 streams"),
    (dict(batch_size=73), 1, 1, "hold 72 different"), (dict(), 2, 0, "rank=0 of world_size=0"),
])
def test_what_does_not_fit_is_said(data, changed, streams, size, match):
    "By the door, and by each function that needs it."
    recipe = dataclasses.replace(RECIPE, **changed)
    with pytest.raises(ValueError, match=match): check_batch(data, recipe, streams, size)
    with pytest.raises(ValueError, match=match): next(read_steps(None, data, recipe, streams, world_size=size))
    if size == 1:
        for function in (epoch_steps, share_seen):
            with pytest.raises(ValueError, match=match): function(data, recipe, streams)


def test_what_fits_just_so(data):
    assert check_batch(data, dataclasses.replace(RECIPE, batch_size=72), 8, 4, 3) == 9
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank={rank} of world_size=2"): next(read_steps(None, data, RECIPE, 2, rank, 2))


def test_captions_that_read_the_same_never_meet(tmp_path):
    "In other letters, accents, spaces and characters that nobody sees."
    from kklip_nb.scale.shards import write_shards
    alike = ["Café x²", "cafe\u0301  X2", "CAFÉ\u00a0x²", "ｃａｆé x\u200b2", "café x2\0"]
    urls = write_shards(zip([np.zeros((8, 8, 3), np.uint8)] * 12, [*alike, *"abcdefg"]), tmp_path / "shards", 4, 8)
    embed_shards(urls, tmp_path / "embeddings", embed, teacher="hash", pooling="none", layer=0, prompt="")
    cluster_shards(open_sidecars(tmp_path / "embeddings", urls), tmp_path / "concepts", 4)
    data = open_folder(tmp_path)
    recipe = dataclasses.replace(RECIPE, batch_size=4, epochs=8)
    with pytest.raises(ValueError, match="hold 8 different captions"): check_batch(data, dataclasses.replace(recipe, batch_size=9), 1)
    steps = [[c for part in step for c in part.captions] for step in read_steps(start_student(RECIPE, data, ALONE), data, recipe, 2)]
    assert all(sum(c in alike for c in step) <= 1 and len(set(step)) == 4 for step in steps)
    assert {c for step in steps for c in step} == {*alike, *"abcdefg"}  # each takes its turn


# --- opening

def test_the_data_s_key_says_captions_shards_and_concepts(folder, tmp_path):
    "One of them changed, and the key is another; a copy elsewhere has the same."
    def key(name, change):
        where = Path(shutil.copytree(folder, tmp_path / name))
        change(where)
        return open_folder(where).key
    def other_concepts(where):
        (where / "concepts" / "concepts.safetensors").unlink()
        cluster_shards(open_sidecars(where / "embeddings", list_shards(where / "shards")), where / "concepts", RECIPE.k, seed=3, passes=2)
    def other_captions(where):
        edit(where / "embeddings" / "00003.safetensors", captions="of others")
    def other_name(where):
        (where / "shards" / "00005.tar").rename(where / "shards" / "00006.tar")
        edit((where / "embeddings" / "00005.safetensors").rename(where / "embeddings" / "00006.safetensors"), shard="00006")
    def fewer(where): (where / "shards" / "00005.tar").unlink()
    same, *others = [key(str(i), change) for i, change in enumerate((lambda where: None, other_concepts, other_captions, other_name, fewer))]
    assert same == open_folder(folder).key and len({same, *others}) == 5


def test_an_opened_data_set_is_what_lies_there(folder):
    shards = (url for url in list_shards(folder / "shards"))  # may come one by one
    data = open_data(shards, folder / "embeddings", folder / "concepts")
    assert data.urls == list_shards(folder / "shards") and [s.shard for s in data.sidecars] == [f"{i:05d}" for i in range(SHARDS)]
    captions = [[s["txt"].decode() for s in read_shard(url)] for url in data.urls]
    assert [c.tolist() for c in data.captions] == [[zlib.crc32(c.encode()) for c in shard] for shard in captions]
    with pytest.raises(ValueError, match="no shards"): open_data([], folder / "embeddings", folder / "concepts")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"): open_data(data.urls, folder / "nowhere", folder / "concepts")
    with pytest.raises(FileNotFoundError, match="no concepts at .*nowhere"): open_data(data.urls, folder / "embeddings", folder / "nowhere")


def test_concepts_of_another_teacher_are_refused(folder, tmp_path):
    where = Path(shutil.copytree(folder, tmp_path / "copy"))
    for path in (where / "embeddings").glob("*.safetensors"): edit(path, pooling="last")
    with pytest.raises(ValueError, match="concepts.safetensors was made otherwise.*'pooling': .'none', 'last'"): open_folder(where)


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
    for workers, done in ((2, 3),):  # other numbers: above, without processes
        others = list(read_steps(student, data, recipe, 4, workers=workers, done=done))
        assert all(same_part(a, b) for x, y in zip(one[done:], others, strict=True) for a, b in zip(x, y, strict=True))


def test_every_pair_comes_with_its_own_target_and_picture(data):
    student, recipe = start_student(RECIPE, data, ALONE), dataclasses.replace(RECIPE, epochs=1)
    transform = picture_transform(student, augment=False)
    pictures = {s["txt"].decode(): [] for url in data.urls for s in read_shard(url)}
    for url in data.urls:
        for s in read_shard(url): pictures[s["txt"].decode()].append(transform(decode_image(s["jpg"])))
    parts, tokenizer = [part for step in read_steps(student, data, recipe, 2, augment=False) for part in step], open_clip.SimpleTokenizer(context_length=8)
    for part in parts:
        for caption, image, target in zip(part.captions, part.images, part.targets):
            assert any(torch.equal(image, other) for other in pictures[caption])
            raw = embed([caption])[0].astype(np.float16).astype(np.float32) - data.concepts.scale.mean
            np.testing.assert_allclose(target, raw / np.linalg.norm(raw), atol=1e-5)
        tokens = tokenizer(part.captions)
        longest = max(len(row[row != 0]) for row in tokens)
        assert torch.equal(part.tokens, tokens[:, :longest]) and part.targets.dtype == torch.float32
    assert len({x.numpy().tobytes() for part in parts for x in part.images}) == N  # nothing is dropped


def test_epochs_are_said_and_crop_anew_and_so_do_seeds(data):
    "One shard without copies of a caption: the same pairs come in each epoch, cut otherwise; without augmentation they do not change."
    one = data._replace(urls=data.urls[:1], sidecars=data.sidecars[:1], captions=data.captions[:1])
    student = start_student(RECIPE, data, ALONE)
    def crops(seed, augment, **how):
        recipe = dataclasses.replace(RECIPE, epochs=2, batch_size=6, seed=seed)
        parts = [part for step in read_steps(student, one, recipe, 1, augment=augment, **how) for part in step]
        assert [part.epoch for part in parts] == [0] * 3 + [1] * 3
        return {(part.epoch, c): image.numpy().tobytes() for part in parts for c, image in zip(part.captions, part.images) if c != "thing 0 of 0"}
    one_, again, other, still = crops(0, True), crops(0, True), crops(1, True), crops(0, False)
    assert one_ == again and len(one_) == 22
    captions = {c for _, c in one_}
    assert sum(one_[0, c] != one_[1, c] for c in captions) > 2 and sum(one_[0, c] != other[0, c] for c in captions) > 2
    assert all(still[0, c] == still[1, c] for c in captions) and sum(still[0, c] != one_[0, c] for c in captions) > 2


def part_of(pairs, transform, seed=0, epoch=0):
    return loader.make_part(pairs, transform, lambda captions: torch.ones(len(captions), 3, dtype=torch.long), seed, epoch)


def test_a_crop_depends_on_seed_epoch_shard_and_key_alone():
    def draw(_): return torch.randint(0, 256, (3, 2, 2), dtype=torch.uint8)
    def pair(shard="0", key="1", caption="a"): return loader.Pair(shard, loader.Sample(key, caption, picture()), np.zeros(4, np.float32))
    def crop(*given, **how): return part_of([pair(*given)], draw, **how).images[0].numpy().tobytes()
    assert len({crop(), crop("2"), crop("0", "2"), crop(seed=1), crop(epoch=1)}) == 5
    torch.manual_seed(99)
    assert crop() == crop("0", "1", "another caption") == part_of([pair("7"), pair(), pair("8")], draw).images[1].numpy().tobytes()
    before = torch.get_rng_state()
    crop()
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_of_a_part_stay_in_order():
    pairs = [loader.Pair("0", loader.Sample(str(i), f"caption {i}", picture(array=np.full((4, 4, 3), 20 * i, np.uint8))), np.full(3, i, np.float32)) for i in (3, 1, 2, 0)]
    part = part_of(pairs, lambda image: torch.tensor(np.array(image)).permute(2, 0, 1), epoch=4)
    assert part.captions == [f"caption {i}" for i in (3, 1, 2, 0)] and part.targets[:, 0].tolist() == [3, 1, 2, 0] and part.epoch == 4
    assert part.images[:, 0, 0, 0].tolist() == [60, 20, 40, 0]


@pytest.mark.parametrize("kind", odd_pictures())
def test_pictures_of_unusual_kinds_come_as_a_viewer_shows_them(kind):
    "Straight from the shard, whoever packed it."
    data, shown = odd_pictures()[kind]
    pair = loader.Pair("0", loader.Sample("1", "a", data), np.zeros(4, np.float32))
    image = part_of([pair], lambda image: torch.tensor(np.array(image)).permute(2, 0, 1)).images[0].permute(1, 2, 0)
    np.testing.assert_allclose(image, shown, atol=3 if "JPEG" in kind else 0)


def test_settings_reach_the_loader_of_torch(data, monkeypatch):
    seen = {}
    monkeypatch.setattr(loader, "DataLoader", lambda stream, **how: seen.update(how, stream=stream) or [])
    for workers, pin in ((0, False), (3, True)):
        assert list(read_steps(start_student(RECIPE, data, ALONE), data, dataclasses.replace(RECIPE, seed=7), 4, 1, 2, 5, workers, False, pin)) == []
        assert (seen["num_workers"], seen["pin_memory"], seen["batch_size"], seen["prefetch_factor"]) == (workers, pin, None, 2 if workers else None)
        assert {k: v for k, v in seen["stream"].deal.items() if k != "recipe"} == dict(streams=4, rank=1, world_size=2, done=5) and seen["stream"].make.keywords["seed"] == 7


def test_few_pairs_are_in_memory_at_once(data, monkeypatch):
    "Those of one shard and those that wait; and none holds on to its whole shard."
    class Counted(loader.Pair):
        alive = most = 0
        def __new__(cls, *given):
            cls.alive += 1
            cls.most = max(cls.most, cls.alive)
            assert given[2].base is None
            return super().__new__(cls, *given)
        def __del__(self): type(self).alive -= 1
    monkeypatch.setattr(loader, "Pair", Counted)
    [(_, parts)] = deal_run(data, dataclasses.replace(RECIPE, epochs=1), 1)
    for pairs in loader.read_pairs(data, parts): del pairs
    assert PER_SHARD <= Counted.most < 3 * PER_SHARD and Counted.alive == 0
    for pairs in loader.read_pairs(data, parts[::3]): alive, size = Counted.alive, len(pairs)
    assert alive == size  # at the end: what the other workers take is not kept


def test_pairs_come_in_the_order_of_the_parts(data):
    [(_, parts)] = deal_run(data, dataclasses.replace(RECIPE, epochs=1), 1)
    captions = [[s.caption for s in loader.join_shard(url, sidecar, data.concepts).samples] for url, sidecar in zip(data.urls, data.sidecars)]
    for part, pairs in zip(parts.tolist(), loader.read_pairs(data, parts), strict=True):
        assert part != sorted(part) and [p.sample.caption for p in pairs] == [captions[shard][row] for shard, row in part]


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


@pytest.mark.parametrize("vision", [None, dict(image_size=48, patch_size=16, width=32, layers=1, head_width=16), dict(image_size=32, width=8, layers=[1, 1, 1, 1])])
def test_without_augmentation_a_picture_is_open_clip_s_of_this_model(vision, tmp_path):
    "Ours, a small transformer and a small ResNet: they differ in size, mean and spread."
    name = f"kklip-with-{vision['image_size']}" if vision else "kklip-laptop"
    if vision:
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(embed_dim=16, vision_cfg=vision, text_cfg=dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1))))
        open_clip.add_model_config(tmp_path)
    student = build_student(name, None, 16, 4, imagenet=False, train_image="all")
    theirs = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.clip)), is_train=False)
    for size in ((300, 200), (120, 260), (1, 1), (45, 1)):
        ours = loader.prepare_images(student, picture_transform(student, augment=False)(photo(size))[None])[0]
        torch.testing.assert_close(ours, theirs(photo(size)), rtol=0, atol=1e-5)


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
