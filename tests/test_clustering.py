"""Streamed concepts against scikit-learn and naive loops; joined shards; what damaged or hostile files do."""

import errno
import inspect
import itertools
import json
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from shard_files import (D, HOW, HOW_CLUSTERED, K, PAIRS, Bomb, Files, edit, embed, members, pairs, rewrite,
                         sidecars_of, spoil, tar_bytes)
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin_min

from kklip_nb.concepts import Scale, apply_scale, concept_labels, fit_concepts, fit_scale, soft_labels
from kklip_nb.scale import clustering
from kklip_nb.scale.clustering import (add_up, cluster_shards, draw_rows, first_centroids, join_shard, load_concepts, nearest_of,
                                       save_concepts, spread_out)
from kklip_nb.scale.embeddings import embed_shards, open_sidecar, open_sidecars, read_rows, slices_of
from kklip_nb.scale.shards import list_shards, read_shard, run_lock
from kklip_nb.tools import save_tensors

TAU = 0.5


def fit_stream(sidecars, k, seed=0, normalise="unit", passes=2, rows=4096, state_path=None, save_every=0.0):
    "The fit alone, without folder and lock."
    settings = dict(k=k, seed=seed, normalise=normalise, passes=passes, rows=rows)
    with tempfile.TemporaryDirectory() as folder:
        return clustering._fit(sidecars, settings, state_path or Path(folder) / "state.safetensors", save_every if state_path else 1e9, False)


def RAW(d: int) -> Scale:
    "Changes nothing."
    return Scale(np.zeros(d, np.float32), 1.0, "raw")


@pytest.mark.parametrize("how", ["unit", "raw"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_scale_is_that_of_all_rows_at_hand(built, how, rows):
    sidecars = open_sidecars(built / "side", list_shards(built / "shards"))
    everything = np.concatenate([read_rows(s) for s in sidecars])
    scaled = apply_scale(everything, fit_scale((piece for s in sidecars for piece in slices_of(s, rows)), how))
    expected = everything - everything.mean(0) if how == "unit" else everything / np.sqrt((everything.astype(float) ** 2).sum(1).mean())
    if how == "unit": expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    assert scaled.dtype == np.float32


def test_scale_refuses_another_word(built):
    with pytest.raises(ValueError, match="normalise='l2'"): fit_scale([np.ones((2, 2))], "l2")


@pytest.mark.parametrize("k", [1, 4, 40])
def test_a_pass_in_slices_is_sklearns_iteration_and_the_naive_loop(k):
    rng = np.random.default_rng(1)
    points = rng.normal(size=(120, 6)).astype(np.float32)
    start, sums, counts = points[:k].copy(), np.zeros((k, 6)), np.zeros(k, int)
    for piece in np.split(points, [7, 8, 60]): add_up(piece, start, sums, counts)
    chosen = [int(((point - start) ** 2).sum(1).argmin()) for point in points]
    assert counts.tolist() == [chosen.count(c) for c in range(k)]
    np.testing.assert_allclose(sums, [points[np.array(chosen) == c].sum(0) for c in range(k)], atol=1e-4)
    theirs = KMeans(k, init=start, n_init=1, max_iter=1).fit(points)
    np.testing.assert_allclose(sums / counts[:, None], theirs.cluster_centers_, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_nearest_is_scikit_learns(scale):
    rng = np.random.default_rng(2)
    points, centroids = (scale * rng.normal(size=(m, 50)).astype(np.float32) for m in (300, 20))
    which, far = nearest_of(points, centroids)
    theirs, distances = pairwise_distances_argmin_min(points, centroids)
    np.testing.assert_array_equal(which, theirs)
    np.testing.assert_allclose(far, distances**2, rtol=1e-4)


def test_candidates_are_means_of_what_they_stand_for_and_miss_no_group():
    rng = np.random.default_rng(3)
    groups = rng.normal(size=(30, 8))
    points = (np.repeat(groups, 30, 0) + 0.05 * rng.normal(size=(900, 8))).astype(np.float32)
    for seed in range(5):
        candidates, weights = spread_out(points, 30, seed, slices=4)
        assert weights.sum() == 900 and len(candidates) == len(weights) <= 120
        assert set(pairwise_distances_argmin_min(candidates, groups)[0]) == set(range(30))
        np.testing.assert_allclose(weights @ candidates / 900, points.mean(0), atol=1e-5)
        theirs = pairwise_distances_argmin_min(groups, first_centroids_of(points, 30, seed))
        assert theirs[1].max() < 0.1 and len(set(theirs[0])) == 30


def first_centroids_of(points, k, seed):
    with tempfile.TemporaryDirectory() as folder:
        return first_centroids(sidecars_of(Path(folder), points, 400), RAW(points.shape[1]), k, seed)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_fewer_different_rows_than_concepts_give_finite_concepts(tmp_path):
    rows = np.repeat(np.random.default_rng(0).normal(size=(3, D)), 5, 0)
    for normalise in ("unit", "raw"):
        found = fit_stream(sidecars_of(tmp_path, rows, 8), 7, normalise=normalise)
        assert found.centroids.shape == (7, D) and np.isfinite(found.centroids).all() and found.inertia == pytest.approx(0, abs=1e-4)
    assert len(np.unique(found.centroids.round(4), axis=0)) >= 3


def test_inertia_is_what_scikit_learn_means(built):
    sidecars = open_sidecars(built / "side", list_shards(built / "shards"))
    for normalise in ("unit", "raw"):
        found = fit_stream(sidecars, K, normalise=normalise, passes=6)
        points = apply_scale(np.concatenate([read_rows(s) for s in sidecars]), found.scale)
        assert found.inertia == pytest.approx(pairwise_distances_argmin_min(points, found.centroids)[1] @ pairwise_distances_argmin_min(points, found.centroids)[1], rel=1e-3)


@pytest.mark.parametrize("count", [1, 9, 20, 100])
def test_drawn_rows_are_rows_and_none_is_drawn_twice(tmp_path, count):
    numbers = np.arange(20, dtype=np.float32)[:, None] + [0, 100]
    drawn = draw_rows(sidecars_of(tmp_path, numbers, 7), RAW(2), count, seed=3)
    assert drawn.shape == (min(count, 20), 2) and len(set(drawn[:, 0])) == len(drawn) and set(drawn[:, 0]) <= set(numbers[:, 0])
    np.testing.assert_array_equal(drawn[:, 1], drawn[:, 0] + 100)


def test_draws_differ_by_seed(tmp_path):
    sidecars = sidecars_of(tmp_path, np.arange(60, dtype=np.float32)[:, None], 25)
    draws = {tuple(draw_rows(sidecars, RAW(1), 10, seed).ravel()) for seed in (0, 0, 1, 2)}
    assert len(draws) == 3


def cloud(n: int = 150, d: int = 4, seed: int = 5) -> np.ndarray:
    "Points without groups: every start and every pass ends elsewhere."
    return (np.random.default_rng(seed).normal(2, 1, (n, d)) ** 2).astype(np.float16).astype(np.float32)


def scaled_by_hand(rows: np.ndarray, how: str) -> np.ndarray:
    rows = rows.astype(float)
    if how == "raw": return rows / np.sqrt((rows**2).sum() / len(rows))
    rows = rows - rows.mean(0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def nearest_by_hand(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.array([min(range(len(centroids)), key=lambda j: ((x - centroids[j]) ** 2).sum()) for x in points])


def start_by_hand(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    "k-means|| as the paper has it, one point at a time, then scikit-learn twice."
    sample = points[sorted(np.random.default_rng(seed).permutation(len(points))[:32 * k])].astype(np.float32)
    rng = np.random.default_rng(seed)
    picks = list(rng.choice(len(sample), k, replace=False))
    for _ in range(3):
        far = np.array([min(((x - sample[p]) ** 2).sum() for p in picks) for x in sample.astype(float)])
        picks += list(rng.choice(len(sample), min(k, np.count_nonzero(far)), replace=False, p=far / far.sum()))
    chosen = nearest_by_hand(sample.astype(float), sample[picks])
    candidates, weights = [], []
    for i, p in enumerate(picks):
        mine = sample[chosen == i].astype(float)
        candidates.append(mine.mean(0) if len(mine) else sample[p])
        weights.append(len(mine))
    start = KMeans(k, n_init=1, tol=0, random_state=seed).fit(np.array(candidates), sample_weight=weights).cluster_centers_
    return KMeans(k, init=start, n_init=1, max_iter=10, tol=0).fit(sample.astype(float)).cluster_centers_


@pytest.mark.parametrize("k, seed", [(3, 0), (3, 1), (3, 7), (8, 2), (1, 0)])
def test_the_start_is_that_of_a_naive_loop(tmp_path, k, seed):
    "150 rows in uneven shards; of 3 concepts 96 are drawn, of 8 all."
    ours = first_centroids(sidecars_of(tmp_path, cloud(), 47), RAW(4), k, seed)
    np.testing.assert_allclose(ours, start_by_hand(cloud(), k, seed), rtol=1e-4)
    assert ours.dtype == np.float32


@pytest.mark.parametrize("k, seed, how, passes, rows", [(5, 0, "unit", 1, 4096), (5, 0, "unit", 2, 20), (5, 3, "unit", 3, 1), (4, 0, "raw", 1, 7), (4, 1, "raw", 4, 4096), (40, 0, "unit", 1, 50)])
def test_the_whole_stage_is_a_naive_loop(tmp_path, k, seed, how, passes, rows):
    "Scale, start, passes and inertia; and the file says how it was made."
    sidecars, points = sidecars_of(tmp_path, cloud(), 47), scaled_by_hand(cloud(), how)
    found = cluster_shards(sidecars, tmp_path / "c", k, seed, how, passes, rows)
    expected = start_by_hand(points, k, seed)
    for _ in range(passes):
        chosen = nearest_by_hand(points, expected)
        expected = np.array([points[chosen == j].mean(0) if (chosen == j).any() else expected[j] for j in range(k)])
    np.testing.assert_allclose(found.centroids, expected, rtol=1e-4, atol=1e-6)
    assert found.inertia == pytest.approx(((points - expected[chosen]) ** 2).sum(), rel=1e-5)  # the last pass's own groups
    np.testing.assert_allclose(apply_scale(cloud(), found.scale), points, atol=1e-6)
    said = dict(k=k, seed=seed, normalise=how, passes=passes, rows=rows, width=4) | HOW
    assert found.meta == {name: str(value) for name, value in said.items()} | dict(sidecars=found.meta["sidecars"])
    assert found.scale.how == how and found.labels.shape == (0,)


def test_no_more_rows_are_read_at_once_than_told(built, tmp_path, monkeypatch):
    real, asked = slices_of, []
    monkeypatch.setattr(clustering, "slices_of", lambda sidecar, rows: asked.append(rows) or real(sidecar, rows))
    cluster_shards(open_sidecars(built / "side", list_shards(built / "shards")), tmp_path, K, passes=2, rows=5)
    assert asked == [5] * 3 + [4096] * 3 + [5] * 6  # the scale, the sample, two passes


@pytest.mark.parametrize("option", [dict(k=4), dict(seed=1), dict(normalise="raw"), dict(passes=3)])
def test_every_option_changes_the_concepts(tmp_path, option):
    sidecars = sidecars_of(tmp_path, cloud(), 47)
    one, other = (cluster_shards(sidecars, tmp_path / name, **dict(k=5) | o).centroids for name, o in (("one", {}), ("other", option)))
    assert one.shape != other.shape or not np.allclose(one, other, atol=1e-3)


def test_what_is_done_unless_told_otherwise():
    found = {name: p.default for name, p in inspect.signature(cluster_shards).parameters.items() if p.default is not p.empty}
    assert found == dict(seed=0, normalise="unit", passes=2, rows=4096, save_every=60, progress=False)


def test_concepts_come_from_the_sidecars_given_and_from_all_of_them(tmp_path):
    "A row that is not given moves nothing; each row that is given moves scale and centroids."
    def fit(name, rows, shards):
        folder = tmp_path / name
        found = cluster_shards(sidecars_of(folder, rows, 10)[:shards], folder / "c", 3, passes=1)
        return found.centroids, found.scale.mean, found.scale.length, found.inertia
    rows = cloud(40)
    base = fit("base", rows, 3)
    held_out = rows.copy()
    held_out[30:] = 9
    assert all(map(np.array_equal, base, fit("held-out", held_out, 3)))
    for row in (0, 9, 10, 29):
        spoilt = rows.copy()
        spoilt[row] = -9
        assert not any(map(np.array_equal, base, fit(f"row {row}", spoilt, 3)))


@pytest.mark.parametrize("spoil_one", [lambda d: d[2].update(shard="7"), lambda d: d[2].update(captions="another hash"), lambda d: d.reverse(), lambda d: d.pop()])
def test_the_captions_and_shards_that_were_read_are_part_of_what_is_said(built, spoil_one):
    sidecars = open_sidecars(built / "side", list_shards(built / "shards"))
    entries = [dict(shard=s.shard, captions=s.meta["captions"]) for s in sidecars]
    spoil_one(entries)
    changed = [s._replace(shard=e["shard"], meta=s.meta | dict(captions=e["captions"])) for s, e in zip(sidecars, entries)]
    assert clustering._meta(changed, {})["sidecars"] != clustering._meta(sidecars, {})["sidecars"] == clustering._meta(list(sidecars), {})["sidecars"]


def test_draws_are_even_over_all_rows_of_all_shards(tmp_path):
    "3 of 20 rows in uneven shards, 300 times: 45 draws a row, give or take 6."
    sidecars = sidecars_of(tmp_path, np.arange(20, dtype=np.float32)[:, None], 7)
    counts = np.bincount(np.concatenate([draw_rows(sidecars, RAW(1), 3, seed).ravel() for seed in range(300)]).astype(int), minlength=20)
    assert counts.sum() == 900 and counts.min() > 20 and counts.max() < 70


def test_draws_are_scaled_and_cross_slices(tmp_path):
    "One shard of more rows than are read at once, and one of few."
    rows = np.arange(4200, dtype=np.float32)[:, None] % 2000 + 1
    drawn = draw_rows(sidecars_of(tmp_path, rows, 4197), Scale(np.zeros(1, np.float32), 4.0, "raw"), 4200, 0)
    np.testing.assert_array_equal(drawn, rows / 4)


def test_the_state_is_saved_when_the_time_has_come(built, tmp_path, monkeypatch):
    "A pass over a shard takes 25 seconds; saved at least 60 seconds after the last time."
    clock, saved, real = itertools.count(0, 25), [], clustering.save_tensors
    monkeypatch.setattr(clustering.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(clustering, "save_tensors", lambda path, state, meta: (saved.append(int(state["done"][0])), real(path, state, meta))[1])
    fit_stream(open_sidecars(built / "side", list_shards(built / "shards")), 3, passes=4, state_path=tmp_path / "state.safetensors", save_every=60)
    assert saved == [3, 6, 9, 12]  # seconds 75; then 100 begins anew, 125, 150, 175


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "list", "gradient", "float64", "columns first"])
def test_distances_of_all_that_holds_numbers(kind):
    "Squares of 200 are beyond half precision."
    rng = np.random.default_rng(0)
    points, centroids = (np.round(rng.uniform(-200, 200, (n, 60))).astype(np.float16) for n in (40, 7))
    def given(x):
        kinds = dict(float16=x, list=x.tolist(), float64=x.astype(float), bfloat16=torch.tensor(x.astype(np.float32)).bfloat16())
        return kinds.get(kind, torch.tensor(x, requires_grad=True) if kind == "gradient" else np.asfortranarray(x))
    if kind == "bfloat16": points, centroids = (torch.tensor(x.astype(np.float32)).bfloat16().float().numpy() for x in (points, centroids))
    which, far = nearest_of(given(points), given(centroids))
    squares = ((points.astype(float)[:, None] - centroids.astype(float)) ** 2).sum(2)
    np.testing.assert_array_equal(which, squares.argmin(1))
    np.testing.assert_allclose(far, squares.min(1), rtol=1e-4)
    sums, counts = np.zeros((7, 60)), np.zeros(7, int)
    add_up(given(points), given(centroids), sums, counts)
    np.testing.assert_allclose(sums, [points[squares.argmin(1) == j].astype(float).sum(0) for j in range(7)])
    assert counts.tolist() == np.bincount(squares.argmin(1), minlength=7).tolist()


def test_a_point_on_its_centroid_is_not_at_a_negative_distance():
    points = cloud(300, 30).astype(np.float32) * 100
    assert nearest_of(points, points[:50])[1].min() == 0


def test_same_seed_same_bytes_and_another_seed_others(built):
    sidecars = open_sidecars(built / "side", list_shards(built / "shards"))
    one, two, other = (fit_stream(sidecars, 4, seed, rows=3).centroids.tobytes() for seed in (0, 0, 1))
    assert one == two != other


@pytest.mark.parametrize("saved", range(6))
def test_a_killed_fit_goes_on_to_the_same_bytes(built, tmp_path, monkeypatch, saved):
    sidecars, calls, real = open_sidecars(built / "side", list_shards(built / "shards")), [], clustering.save_tensors
    whole = save_concepts(tmp_path / "whole.safetensors", fit_stream(sidecars, 4, rows=3))
    def dying(path, state, settings):
        if len(calls) == saved: raise KeyboardInterrupt
        calls.append(int(state["done"][0])); real(path, state, settings)
    monkeypatch.setattr(clustering, "save_tensors", dying)
    with pytest.raises(KeyboardInterrupt): fit_stream(sidecars, 4, rows=3, state_path=tmp_path / "state.safetensors", save_every=0)
    assert calls == list(range(1, saved + 1))
    monkeypatch.setattr(clustering, "save_tensors", lambda path, state, settings: calls.append(int(state["done"][0])))
    resumed = fit_stream(sidecars, 4, rows=3, state_path=tmp_path / "state.safetensors", save_every=0)
    monkeypatch.setattr(clustering, "save_tensors", real)
    assert save_concepts(tmp_path / "resumed.safetensors", resumed).read_bytes() == whole.read_bytes()
    assert calls == [1, 2, 3, 4, 5, 6]  # no shard was gone over twice


def test_streaming_is_nearly_as_tight_as_kmeans(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.normal(0, 3, (5, D))
    sidecars = sidecars_of(tmp_path, corners[rng.integers(0, 5, 400)] + rng.normal(size=(400, D)), 90)
    found = fit_stream(sidecars, 5, rows=40)
    points = apply_scale(np.concatenate([read_rows(s) for s in sidecars]), found.scale)
    ours = ((points[:, None] - found.centroids) ** 2).sum(2).min(1).sum()
    assert KMeans(5, n_init=4, random_state=0).fit(points).inertia_ * 0.999 <= ours <= 1.02 * KMeans(5, n_init=4, random_state=0).fit(points).inertia_
    assert ours < 0.6 * ((points - points.mean(0)) ** 2).sum()


@pytest.mark.parametrize("normalise", ["unit", "raw"])
def test_labels_of_joined_targets_are_soft_labels(files, tmp_path, normalise):
    concepts = cluster_shards(files.sidecars(), tmp_path / "c", 4, normalise=normalise, passes=1, rows=3)
    assert [p.name for p in (tmp_path / "c").iterdir() if p.suffix != ".lock"] == ["concepts.safetensors"]
    for url, sidecar in zip(files.urls, files.sidecars()):
        targets = join_shard(url, sidecar, concepts).targets
        labels = concept_labels(torch.from_numpy(targets), torch.from_numpy(concepts.centroids), TAU)
        np.testing.assert_allclose(labels, soft_labels(apply_scale(read_rows(sidecar), concepts.scale), concepts.centroids, TAU), atol=1e-6)


def test_concepts_survive_the_disk(built, tmp_path):
    concepts = load_concepts(built / "concepts" / "concepts.safetensors")
    again = load_concepts(save_concepts(tmp_path / "c.safetensors", concepts))
    assert np.array_equal(again.centroids, concepts.centroids) and np.array_equal(again.scale.mean, concepts.scale.mean)
    assert again.scale.length == concepts.scale.length and again.scale.how == "unit" and again.meta == concepts.meta and again.inertia == concepts.inertia > 0
    assert concepts.meta["k"] == str(K) and concepts.meta["teacher"] == "fake" and concepts.centroids.dtype == np.float32


def test_a_killed_cluster_run_goes_on_to_the_same_files(files, tmp_path, monkeypatch):
    real = clustering.save_concepts
    def dying(*args): raise KeyboardInterrupt
    monkeypatch.setattr(clustering, "save_concepts", dying)
    with pytest.raises(KeyboardInterrupt): cluster_shards(files.sidecars(), tmp_path / "c", K, **HOW_CLUSTERED)
    assert (tmp_path / "c" / "state.safetensors").exists()
    monkeypatch.setattr(clustering, "save_concepts", real)
    monkeypatch.setattr(clustering, "first_centroids", dying)  # the state is used
    cluster_shards(files.sidecars(), tmp_path / "c", K, **HOW_CLUSTERED)
    assert (tmp_path / "c" / "concepts.safetensors").read_bytes() == (files.concepts / "concepts.safetensors").read_bytes()
    assert not (tmp_path / "c" / "state.safetensors").exists()


def test_join_puts_the_same_pair_in_every_row(files):
    concepts = load_concepts(files.concepts / "concepts.safetensors")
    for i, start in enumerate((0, 8, 16)):
        joined = files.join(i)
        assert joined.shard == f"{i:05d}" and [s.caption for s in joined.samples] == [c for _, c in pairs()][start:start + 8]
        assert [s.image for s in joined.samples] == [s["jpg"] for s in read_shard(files.urls[i])]
        targets = apply_scale(embed([s.caption for s in joined.samples]).astype(np.float16), concepts.scale)
        np.testing.assert_allclose(joined.targets, targets, atol=1e-6)
        assert joined.targets.dtype == np.float32


@pytest.mark.parametrize("normalise", ["unit", "raw"])
def test_joined_targets_are_scaled_as_the_concepts_are(files, tmp_path, normalise):
    concepts = cluster_shards(files.sidecars(), tmp_path / "c", K, normalise=normalise)
    rows = embed([c for _, c in pairs()]).astype(np.float16)
    targets = [join_shard(u, s, load_concepts(tmp_path / "c" / "concepts.safetensors")).targets for u, s in zip(files.urls, files.sidecars())]
    np.testing.assert_allclose(np.concatenate(targets), scaled_by_hand(rows, normalise), atol=1e-5)
    assert concepts.scale.how == normalise


def test_joining_decodes_no_picture(files):
    "A picture cut since is found when it is used; its header alone is read here."
    image = dict(members(files.urls[1]))["000010002.jpg"]
    spoil(files, "jpg", image[:-200])
    assert files.join().samples[2].image == image[:-200]


def test_join_leaves_skipped_samples_out(files, tmp_path):
    spoil(files, "jpg", b"no picture")
    embed_shards(files.urls, tmp_path / "s", embed, max_skipped=0.2, **HOW)
    cluster_shards(open_sidecars(tmp_path / "s", files.urls), tmp_path / "l", K, passes=1)
    joined = Files(files.urls, tmp_path / "s", tmp_path / "l").join()
    assert [s.key for s in joined.samples] == [f"00001{j:04d}" for j in (0, 1, 3, 4, 5, 6, 7)] and len(joined.targets) == 7


def test_damage_wrong_key_in_a_sidecar(files):
    path = files.side / "00001.safetensors"
    keys = open_sidecar(path).keys
    edit(path, keys=json.dumps([*keys[:2], "000019999", *keys[3:]]))
    with pytest.raises(ValueError, match="has key 000019999 where shard 00001 has 000010002"): files.join()


def test_damage_keys_in_another_order(files):
    "Rows, keys and checksums swapped alike: all agree but the order."
    path, order = files.side / "00001.safetensors", [0, 1, 4, 3, 2, 5, 6, 7]
    sidecar = open_sidecar(path)
    crcs = json.loads(sidecar.meta["crc32"])
    edit(path, dict(embeddings=load_file(path)["embeddings"][order]), keys=json.dumps([sidecar.keys[i] for i in order]), crc32=json.dumps([crcs[i] for i in order]))
    with pytest.raises(ValueError, match="has key 000010004 where shard 00001 has 000010002"): files.join()


def test_damage_samples_in_another_order(files):
    content = members(files.urls[1])
    Path(files.urls[1]).write_bytes(tar_bytes(content[3:6] + content[:3] + content[6:]))
    with pytest.raises(ValueError, match="has key 000010000 where shard 00001 has 000010001"): files.join()


def test_damage_one_sample_more_than_embedded(files):
    content = members(files.urls[1])
    Path(files.urls[1]).write_bytes(tar_bytes(content + [(n.replace("000010007", "000010008"), d) for n, d in content[-3:]]))
    with pytest.raises(ValueError, match="has key None where shard 00001 has 000010008"): files.join()


def test_damage_one_sample_fewer_than_embedded(files):
    rewrite(files.urls[1], lambda m: None if m[0].startswith("000010007") else m)
    with pytest.raises(ValueError, match="has key 000010007 where shard 00001 has None"): files.join()


def test_damage_caption_changed_after_embedding(files):
    spoil(files, "txt", b"another caption")
    with pytest.raises(ValueError, match="shard 00001, key 000010002: another caption was embedded"): files.join()


def test_damage_caption_emptied_after_embedding(files):
    for ending in ("txt", "json"): spoil(files, ending, b"")
    with pytest.raises(ValueError, match="(?=.*00001)(?=.*000010002)"): files.join()


def test_damage_picture_broken_after_embedding(files):
    spoil(files, "jpg", b"no picture")
    with pytest.raises(ValueError, match="(?=.*shard 00001|.*00001.tar)(?=.*000010002)"): files.join()


def test_damage_nan_in_a_sidecar(files):
    path = files.side / "00001.safetensors"
    rows = load_file(path)["embeddings"]
    rows[5, 2] = np.nan
    edit(path, dict(embeddings=rows))
    for act in (files.join, lambda: [piece for s in files.sidecars() for piece in slices_of(s, 2)], lambda: fit_stream(files.sidecars(), 2)):
        with pytest.raises(ValueError, match="shard 00001, key 000010005: its embedding holds NaN"): act()


def test_damage_infinity_in_a_sidecar(files):
    path = files.side / "00001.safetensors"
    rows = load_file(path)["embeddings"]
    rows[7, 0] = -np.inf
    edit(path, dict(embeddings=rows))
    with pytest.raises(ValueError, match="shard 00001, key 000010007"): files.join()


def test_damage_all_sidecars_made_again_by_another_teacher(files):
    "Old concepts, new targets: captions and keys agree, the teachers do not."
    shutil.rmtree(files.side)
    embed_shards(files.urls, files.side, lambda c: -embed(c), **{**HOW, "pooling": "last"})
    with pytest.raises(ValueError, match="00001"): files.join()


@pytest.mark.parametrize("which", ["side/00001", "concepts/concepts"])
def test_hostile_pickle_called_safetensors(files, tmp_path, which):
    (tmp_path / f"{which}.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(ValueError, match=which.split("/")[1]): files.join()
    with pytest.raises(ValueError, match=which.split("/")[1]):
        cluster_shards(files.sidecars(), files.concepts, K, **HOW_CLUSTERED)
    assert not (tmp_path / "boom").exists()


def test_hostile_pickle_as_state(files, tmp_path):
    (tmp_path / "state.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(ValueError, match="state.safetensors holds no state"): fit_stream(files.sidecars(), 2, state_path=tmp_path / "state.safetensors")
    assert not (tmp_path / "boom").exists()


def test_hostile_too_few_checksums(files):
    "Captions behind the last checksum must not go unchecked."
    spoil(files, "txt", b"another caption", "000010007")
    path = files.side / "00001.safetensors"
    edit(path, crc32=json.dumps(json.loads(open_sidecar(path).meta["crc32"])[:3]))
    with pytest.raises(ValueError, match="00001"): files.join()


def test_hostile_key_twice_in_a_sidecar(files):
    path = files.side / "00001.safetensors"
    sidecar, rows = open_sidecar(path), load_file(path)["embeddings"]
    crcs = json.loads(sidecar.meta["crc32"])
    edit(path, dict(embeddings=np.concatenate([rows, rows[-1:]])), keys=json.dumps([*sidecar.keys, sidecar.keys[-1]]), crc32=json.dumps([*crcs, crcs[-1]]))
    with pytest.raises(ValueError, match="00001"): open_sidecar(path)


def test_damage_concepts_missing_or_cut(files):
    path = files.concepts / "concepts.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="concepts.safetensors holds no concepts"): files.join()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no concepts at"): files.join()


def test_damage_one_flipped_bit_in_the_concepts(files):
    path = files.concepts / "concepts.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="concepts.safetensors holds no concepts .its checksum"): files.join()


def test_damage_concepts_of_other_settings_in_the_folder(files):
    for other in (dict(k=K + 1), dict(seed=3), dict(normalise="raw"), dict(passes=5), dict(rows=7)):
        settings = dict(k=K, seed=0, normalise="unit", passes=2, rows=5, save_every=0) | other
        with pytest.raises(ValueError, match=f"concepts.safetensors was made otherwise.*{next(iter(other))}"): cluster_shards(files.sidecars(), files.concepts, **settings)
    with pytest.raises(ValueError, match="concepts.safetensors was made otherwise.*sidecars"): cluster_shards(files.sidecars()[:2], files.concepts, K, **HOW_CLUSTERED)


def test_damage_state_of_another_run(files, tmp_path):
    state = tmp_path / "state.safetensors"
    fit_stream(files.sidecars(), 3, state_path=state, passes=1, save_every=0)
    for other in (dict(k=4), dict(k=3, seed=1), dict(k=3, rows=2), dict(k=3, passes=2), dict(k=3, normalise="raw")):
        with pytest.raises(ValueError, match="state.safetensors was made otherwise"): fit_stream(files.sidecars(), **{"passes": 1, **other}, state_path=state)
    with pytest.raises(ValueError, match="state.safetensors was made otherwise.*sidecars"): fit_stream(files.sidecars()[1:], 3, passes=1, state_path=state)


@pytest.mark.parametrize("change", [lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: b"", lambda d: d[:40], None])
@pytest.mark.parametrize("what", ["concepts", "state"])
def test_damage_of_any_kind_is_found_before_a_file_is_used(files, what, change):
    path = files.concepts / f"{what}.safetensors"
    if what == "state":
        settings = dict(k=K, seed=0, normalise="unit", passes=2, rows=5)
        (files.concepts / "concepts.safetensors").unlink()
        clustering._save(path, clustering._start(files.sidecars(), K, 0, "unit", 5), clustering._meta(files.sidecars(), settings))
    data = path.read_bytes()
    path.unlink()
    if change: path.write_bytes(change(data))
    else: path.mkdir()
    with pytest.raises(ValueError, match=f"{what}.safetensors holds no .*delete it" if change else f"cannot read .*{what}.safetensors: .*directory"):
        cluster_shards(files.sidecars(), files.concepts, K, **HOW_CLUSTERED)
    if change is None: path.rmdir()
    path.write_bytes(data)
    cluster_shards(files.sidecars(), files.concepts, K, **HOW_CLUSTERED)  # the whole one is taken


@pytest.mark.parametrize("lost", ["centroids", "mean", "length", "inertia", "normalise"])
def test_damage_concepts_of_another_version(files, lost):
    path = files.concepts / "concepts.safetensors"
    tensors, meta = clustering._load(path, "concepts")
    clustering._save(path, {k: v for k, v in tensors.items() if k != lost}, {k: v for k, v in meta.items() if k != lost})
    with pytest.raises(ValueError, match=f"concepts.safetensors holds no concepts .without .'{lost}'.*of another version"): files.join()


def test_damage_sidecars_of_two_teachers_and_none_at_all(files, tmp_path):
    edit(files.side / "00001.safetensors", teacher="other")
    mixed = [open_sidecar(files.side / f"{i:05d}.safetensors") for i in range(3)]
    with pytest.raises(ValueError, match="00001.safetensors was made otherwise.*'teacher': .'other', 'fake'"): cluster_shards(mixed, tmp_path / "c", K)
    with pytest.raises(ValueError, match="no sidecars"): cluster_shards([], tmp_path / "c", K)
    assert np.array_equal(cluster_shards(iter(mixed[::2]), tmp_path / "d", K).centroids, cluster_shards(mixed[::2], tmp_path / "e", K).centroids)


@pytest.mark.parametrize("wrong, match", [(dict(passes=0), "passes=0"), (dict(passes=-1), "passes=-1"), (dict(seed=-1), "seed=-1"), (dict(rows=0), "rows=0"), (dict(normalise="l2"), "normalise='l2'")])
def test_damage_settings_that_cannot_be(files, tmp_path, wrong, match):
    with pytest.raises(ValueError, match=match): cluster_shards(files.sidecars(), tmp_path / "c", **dict(k=K) | wrong)
    assert not list((tmp_path / "c").glob("*.safetensors"))


@pytest.mark.parametrize("normalise", ["unit", "raw"])
def test_damage_embeddings_of_zeros(tmp_path, normalise):
    with pytest.raises(ValueError, match="all are zero"): cluster_shards(sidecars_of(tmp_path, np.zeros((6, D)), 3), tmp_path / "c", 2, normalise=normalise)


def test_damage_concepts_that_no_shard_has_given(tmp_path):
    with pytest.raises(ValueError, match="concepts without scale and meta"): save_concepts(tmp_path / "c.safetensors", fit_concepts(cloud(), 3))


def test_what_a_killed_run_has_left_is_removed(files):
    for name in ("concepts", "state"): (files.concepts / f".{name}.safetensors.7.part").write_bytes(b"half")
    cluster_shards(files.sidecars(), files.concepts, K, **HOW_CLUSTERED)
    assert [p.name for p in files.concepts.iterdir() if not p.name.endswith(".lock")] == ["concepts.safetensors"]


def test_damage_truncated_state(files, tmp_path):
    state = tmp_path / "state.safetensors"
    fit_stream(files.sidecars(), 3, state_path=state, passes=1, save_every=0)
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="state.safetensors holds no state.*delete it"): fit_stream(files.sidecars(), 3, state_path=state, passes=1, save_every=0)


@pytest.mark.parametrize("k", [0, -1, PAIRS + 1])
def test_damage_more_concepts_than_captions(files, tmp_path, k):
    with pytest.raises(ValueError, match=f"k={k} concepts from {PAIRS} captions"): cluster_shards(files.sidecars(), tmp_path / "o", k)
    assert first_centroids(files.sidecars(), RAW(D), PAIRS, 0).shape == (PAIRS, D)


def test_damage_full_disk_while_clustering(files, tmp_path, monkeypatch):
    calls, module = [], sys.modules[save_tensors.__module__]
    real = module.save_file
    def failing(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) in (3, 8): Path(path).write_bytes(b"half"); raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)
    monkeypatch.setattr(module, "save_file", failing)
    for _ in range(2):  # a state, then the concepts
        with pytest.raises(OSError, match="No space left"): cluster_shards(files.sidecars(), tmp_path / "o", K, **HOW_CLUSTERED)
        assert not list((tmp_path / "o").glob(".*.part"))
    assert "concepts" in calls[-1].name
    cluster_shards(files.sidecars(), tmp_path / "o", K, **HOW_CLUSTERED)
    assert (tmp_path / "o" / "concepts.safetensors").read_bytes() == (files.concepts / "concepts.safetensors").read_bytes()


def test_damage_two_cluster_runs_in_one_folder(files):
    with run_lock(files.concepts / ".cluster.lock"), pytest.raises(RuntimeError, match="another run"): cluster_shards(files.sidecars(), files.concepts, K, **HOW_CLUSTERED)
