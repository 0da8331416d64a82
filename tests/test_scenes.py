"""Scenes: captions, drawings and splits, against hand-written ones and against their own description."""

import colorsys
import dataclasses
import hashlib
import inspect
import itertools
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from kklip_nb.evidence import scenes as P
from kklip_nb.evidence.scenes import Scene, Thing, draw_scene, scene_caption

TINY = [f"a {colour} {noun}" for colour in P.COLOURS for noun in ("dog", "cat", "key", "bus", "house")]


# ---- scenes

@pytest.mark.parametrize("scene, caption", [
    (Scene("object", (Thing("dog"),)), "a dog"),
    (Scene("object", (Thing("umbrella"),)), "an umbrella"),
    (Scene("adjective", (Thing("dog", adjective="orange"),)), "an orange dog"),
    (Scene("adjective", (Thing("umbrella", adjective="big"),)), "a big umbrella"),
    (Scene("spatial", (Thing("cat"),), place="at the top"), "a cat at the top"),
    (Scene("temporal", (Thing("cat"),), time="at night"), "a cat at night"),
    (Scene("verb", (Thing("key", verb="running"),)), "a key running"),
    (Scene("two objects, one attribute", (Thing("dog"), Thing("cat")), "left of"), "a dog left of a cat"),
    (Scene("two objects, two attributes", (Thing("dog", adjective="red"), Thing("cat", verb="falling"))), "a red dog and a cat falling"),
    (Scene("plural", (Thing("bus", 2),)), "two buses"),
    (Scene("plural", (Thing("cactus", 4, "blue"), Thing("fish"))), "four blue cactuses and a fish"),
    (Scene("negation", (Thing("tree"),), absent="car"), "a tree but no car"),
    (Scene("all", (Thing("frog", 3, "green", "jumping"), Thing("house", adjective="small")), "below", "on the left", "at dusk", "bell"),
     "three green frogs jumping below a small house but no bell on the left at dusk"),
])
def test_captions_by_hand(scene, caption):
    assert scene_caption(scene) == caption


def test_scenes_are_distinct_deterministic_and_of_every_kind():
    scenes = P.make_scenes(1500, 3)
    assert scenes == P.make_scenes(1500, 3) != P.make_scenes(1500, 4)
    assert scenes[:200] == P.make_scenes(200, 3), "more scenes begin with the same ones"
    assert len({scene_caption(s) for s in scenes}) == 1500
    counts = Counter(s.kind for s in scenes)
    assert set(counts) == set(P.KINDS) and counts["object"] <= len(P.NOUNS)
    assert counts.most_common(1)[0][0] == "two objects, two attributes"


@pytest.mark.parametrize("kind", P.KINDS)
def test_a_scene_has_what_its_kind_says(kind):
    random = Random(0)
    for scene in (P.random_scene(kind, random) for _ in range(100)):
        said = sum(x is not None for t in scene.things for x in (t.adjective, t.verb))
        said += (scene.relation != "and") + (scene.place is not None) + (scene.time is not None)
        counted = [t.count for t in scene.things if t.count > 1]
        nouns = [t.noun for t in scene.things] + [n for n in (scene.absent,) if n]
        assert len(set(nouns)) == len(nouns), "a noun is never said twice"
        if kind == "object": assert said == 0 and len(scene.things) == 1
        if kind in ("adjective", "spatial", "temporal", "verb"): assert said == 1 and len(scene.things) == 1
        if kind == "two objects, one attribute": assert said == 1 and len(scene.things) == 2
        if kind == "two objects, two attributes": assert said in (2, 3) and len(scene.things) == 2
        assert (len(counted) == 1) == (kind == "plural") and (scene.absent is not None) == (kind == "negation")


def test_words_of_the_captions_are_the_words_of_the_tables():
    words = {w for s in P.make_scenes(3000, 0) for w in scene_caption(s).split()}
    plurals = {P.PLURALS.get(n, n + "s") for n in P.NOUNS}
    phrases = [*P.PLACES, *P.TIMES, *P.RELATIONS, "a an and but no"]
    known = {*P.NOUNS, *plurals, *P.COLOURS, *P.SIZES, *P.VERBS, *P.COUNTS.values(), *(w for p in phrases for w in p.split())}
    assert words == known


def test_the_committed_results_belong_to_these_captions_and_these_splits():
    "As they were when the study was run; another draw would be another data set."
    captions = [scene_caption(s) for s in P.make_scenes(400, 0)]
    assert captions[:3] == ["four bananas and a frog", "a green turtle right of a blue mushroom", "a frog at dusk"] and hashlib.sha256("\n".join(captions).encode()).hexdigest()[:12] == "4e12a2300ee6"
    split = P.split_scenes(P.make_scenes(400, 0), 1)
    assert hashlib.sha256(str([part.tolist() for part in split]).encode()).hexdigest()[:12] == "caf0ad9cafd7"


def test_kinds_are_drawn_in_the_shares_of_the_grammar(monkeypatch):
    asked, draw = Counter(), P.random_scene
    monkeypatch.setattr(P, "random_scene", lambda kind, random: asked.update([kind]) or draw(kind, random))
    P.make_scenes(3000, 1)
    for kind, share in zip(P.KINDS, (1, 3, 2, 2, 2, 10, 12, 6, 6), strict=True): assert asked[kind] / asked.total() == pytest.approx(share / 44, abs=0.015), kind


def test_each_form_says_what_it_may_of_the_right_thing():
    forms = {"two objects, one attribute": [{"one.adjective"}, {"relation"}, {"time"}, {"two.verb"}],
             "two objects, two attributes": [{"one.adjective", "two.adjective"}, {"one.adjective", "two.adjective", "relation"}, {"one.adjective", "two.verb"}],
             "plural": [{"one.count"}, {"one.count", "two"}, {"one.count", "one.adjective"}], "negation": [{"absent"}, {"absent", "one.adjective"}]}
    for kind, allowed in forms.items():
        found, random = Counter(), Random(1)
        for scene in (P.random_scene(kind, random) for _ in range(300)):
            said = {f"{n}.{f}" for n, t in zip(("one", "two"), scene.things) for f in ("adjective", "verb") if getattr(t, f)} | {f"{n}.count" for n, t in zip(("one", "two"), scene.things) if t.count > 1}
            said |= {f for f in ("place", "time", "absent") if getattr(scene, f)} | ({"relation"} if scene.relation != "and" else set()) | ({"two"} if kind == "plural" and len(scene.things) == 2 else set())
            found[frozenset(said)] += 1
            if kind == "plural" and scene.things[0].adjective: assert scene.things[0].adjective not in P.SIZES
            assert scene.absent not in {t.noun for t in scene.things} and len({t.noun for t in scene.things}) == len(scene.things)
        assert set(found) == set(map(frozenset, allowed)) and min(found.values()) > 60, kind


def test_a_seed_may_be_a_number_of_numpy_s():
    assert P.make_scenes(5, np.int64(3)) == P.make_scenes(5, 3)


@pytest.mark.parametrize("function, defaults", [
    (P.draw_scene, dict(size=128)), (P.scene_pairs, dict(size=128)), (P.split_captions, dict(seed=0, val=0.1, test=0.2)), (P.split_scenes, dict(seed=0, val=0.1, test=0.2)),
    (P.scene_material, dict(embeddings=None, size=128)), (Thing, dict(count=1, adjective=None, verb=None)), (Scene, dict(relation="and", place=None, time=None, absent=None))])
def test_what_is_done_unless_said_otherwise(function, defaults):
    assert {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty} == defaults


def test_scenes_refuse():
    with pytest.raises(ValueError, match="kind='animal'"): P.random_scene("animal", Random(0))
    with pytest.raises(ValueError, match="count=0"): P.make_scenes(0, 0)
    with pytest.raises(ValueError, match="no scenes"): P.scene_pairs([])


# ---- split

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_is_disjoint_complete_and_covers_the_words(seed):
    scenes = P.make_scenes(900, 0)
    split = P.split_scenes(scenes, seed)
    assert sorted(np.concatenate(split)) == list(range(900))
    assert [len(s) for s in split] == [630, 90, 180]
    captions = [scene_caption(s) for s in scenes]
    words = [{w for i in part for w in captions[i].split()} for part in split]
    assert words[1] | words[2] <= words[0]


def test_the_seed_moves_validation_but_never_the_test_rows():
    scenes = P.make_scenes(500, 0)
    first, same, other = (P.split_scenes(scenes, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, same))
    assert np.array_equal(first.test, other.test) and not np.array_equal(first.val, other.val)


def test_rows_with_one_caption_stay_together_and_order_does_not_matter():
    captions = [scene_caption(s) for s in P.make_scenes(300, 0)]
    split = P.split_captions(captions * 2)
    for part in split: assert {captions[i % 300] for i in part} == {captions[i] for i in part[part < 300]}
    parts = [{captions[i] for i in part} for part in P.split_captions(captions)]
    assert parts == [{captions[::-1][i] for i in part} for part in P.split_captions(captions[::-1])]


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4).map(" ".join), min_size=8, max_size=40), st.integers(0, 5))
def test_split_properties_of_any_captions(captions, seed):
    try: split = P.split_captions(captions, seed, val=0.1, test=0.2)
    except ValueError as error: assert "new words" in str(error); return
    parts = [{captions[i] for i in part} for part in split]
    assert sorted(np.concatenate(split)) == list(range(len(captions)))
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert {w for c in parts[1] | parts[2] for w in c.split()} <= {w for c in parts[0] for w in c.split()}


def test_captions_that_read_the_same_stay_together():
    captions = TINY + ["a caf\u00e9 dog", "a cafe\u0301 dog", "A  caf\u00e9\u00a0DOG ", "a red dog\0", "a RED dog"]
    for seed in range(5):
        for val, test in ((0.1, 0.2), (0.4, 0.2)):
            part = {i: p for p, rows in enumerate(P.split_captions(captions, seed, val, test)) for i in rows}
            assert len(part) == 35 and part[30] == part[31] == part[32] and part[0] == part[33] == part[34]


def test_captions_to_split_may_come_one_by_one():
    wanted = P.split_captions(TINY, 2)
    for form in (iter(TINY), np.array(TINY), tuple(TINY)): assert all(np.array_equal(a, b) for a, b in zip(P.split_captions(form, 2), wanted))
    for wrong in ([], "a red dog"):
        with pytest.raises(ValueError, match="no captions"): P.split_captions(wrong)


@pytest.mark.parametrize("shares", [dict(val=0.5, test=0.6), dict(val=-0.1, test=0.2), dict(val=-0.001, test=0.2), dict(val=float("nan"), test=0.2), dict(val=0.1, test=-0.01)])
def test_split_refuses(shares):
    with pytest.raises(ValueError, match="val="): P.split_captions(TINY, **shares)


# ---- pictures

CAT = Thing("cat")
PLAIN = Scene("object", (CAT,))


@pytest.mark.parametrize("other", [
    *(PLAIN._replace(things=(CAT._replace(adjective=a),)) for a in (*P.COLOURS, *P.SIZES)),
    *(PLAIN._replace(things=(CAT._replace(verb=v),)) for v in P.VERBS),
    *(PLAIN._replace(things=(CAT._replace(count=c),)) for c in P.COUNTS),
    *(PLAIN._replace(place=p) for p in P.PLACES), *(PLAIN._replace(time=t) for t in P.TIMES),
    PLAIN._replace(things=(CAT, Thing("dog"))),
], ids=scene_caption)
def test_every_attribute_is_to_be_seen(other):
    changed = (draw_scene(PLAIN, 64) != draw_scene(other, 64)).any(-1).mean()
    assert changed > 0.03


@pytest.mark.parametrize("table", [P.COLOURS, P.SIZES, P.VERBS])
def test_values_of_one_attribute_differ(table):
    key = "verb" if table is P.VERBS else "adjective"
    pictures = [draw_scene(PLAIN._replace(things=(CAT._replace(**{key: value}),)), 64) for value in table]
    for i, one in enumerate(pictures):
        for two in pictures[:i]: assert (one != two).any(-1).mean() > 0.02


@pytest.mark.parametrize("size", [32, 128])
def test_a_picture_is_deterministic_and_of_the_asked_size(size):
    for scene in P.make_scenes(40, 1):
        one = draw_scene(scene, size)
        assert one.shape == (size, size, 3) and one.dtype == np.uint8 and np.array_equal(one, draw_scene(scene, size))


def middle(scene: Scene) -> tuple[float, float]:
    "Centre (x, y) of what is not background, in 0 … 1."
    picture = draw_scene(scene, 96).astype(int)
    y, x = np.nonzero(np.abs(picture - picture[0, 0]).sum(-1) > 30)
    return x.mean() / 96, y.mean() / 96


@pytest.mark.parametrize("place, where", [("at the top", (0.5, 0.25)), ("at the bottom", (0.5, 0.75)), ("on the left", (0.25, 0.5)), ("on the right", (0.75, 0.5)), (None, (0.5, 0.5))])
def test_places_are_where_they_say(place, where):
    assert np.allclose(middle(PLAIN._replace(place=place)), where, atol=0.1)


@pytest.mark.parametrize("relation, where", [("left of", (-1, 0)), ("right of", (1, 0)), ("above", (0, -1)), ("below", (0, 1))])
def test_relations_put_the_first_thing_there(relation, where):
    def reddish(first, second):
        scene = Scene("", (Thing("balloon", adjective=first), Thing("balloon", adjective=second)), relation)
        picture = draw_scene(scene, 96).astype(int)
        y, x = np.nonzero(picture[..., 0] - picture[..., 2] > 60)
        return np.array([x.mean(), y.mean()]) / 96 - 0.5
    assert np.allclose(reddish("red", "blue"), 0.25 * np.array(where), atol=0.12) and np.allclose(reddish("blue", "red"), -0.25 * np.array(where), atol=0.12)


def test_and_says_nothing_of_where_a_thing_is():
    sides = []
    for noun in ("cat", "dog", "bird", "bus", "key", "tree", "house", "fish", "frog", "bell"):
        picture = draw_scene(Scene("", (Thing("balloon", adjective="red"), Thing(noun, adjective="blue"))), 64).astype(int)
        y, x = np.nonzero(picture[..., 0] - picture[..., 2] > 60)
        sides.append(x.mean() < 32)
        assert abs(y.mean() - 32) < 8
    assert 1 < sum(sides) < 9


@pytest.mark.parametrize("colour, rgb", [("red", "d62020"), ("orange", "f08000"), ("yellow", "d8b800"), ("green", "1f9a3a"), ("blue", "2050d0"), ("purple", "8a30b0")])
def test_a_colour_is_the_one_that_is_said(colour, rgb):
    hue = lambda channels: colorsys.rgb_to_hsv(*channels)[0]
    for noun in ("balloon", "rabbit"):
        picture = draw_scene(PLAIN._replace(things=(Thing(noun, adjective=colour),))).reshape(-1, 3).astype(float)
        coloured = picture[np.ptp(picture, axis=1) > 60]
        assert len(coloured) > 100 and hue(coloured.mean(0) / 255) == pytest.approx(hue(bytes.fromhex(rgb)), abs=0.005)
        assert (np.abs(picture - list(bytes.fromhex(rgb))).max(1) < 40).sum() > (300 if noun == "balloon" else 30), "between the pale and the dark shades"
        plain = draw_scene(PLAIN._replace(things=(Thing(noun),))).reshape(-1, 3)
        assert (picture < 250).any(1).sum() == pytest.approx((plain < 250).any(1).sum(), rel=0.35), "around the thing the page stays white"


def width(*things):
    picture = draw_scene(Scene("", things), 128).astype(int)
    return np.ptp(np.nonzero((np.abs(picture - 255).sum(-1) > 30).any(0))[0]) + 1


def test_sizes_are_shares_of_the_usual_side():
    usual = width(Thing("house"))
    assert width(Thing("house", adjective="small")) / usual == pytest.approx(0.6, abs=0.07) and width(Thing("house", adjective="big")) / usual == pytest.approx(1.5, abs=0.07)


def test_big_things_at_the_edge_stay_whole():
    free = width(Thing("house", adjective="big"))
    for place in ("at the top", "at the bottom", "on the left", "on the right"):
        seen = np.abs(draw_scene(Scene("", (Thing("house", adjective="big"),), place=place), 128).astype(int) - 255).sum(-1) > 30
        assert np.ptp(np.nonzero(seen.any(0))[0]) + 1 == pytest.approx(free, abs=3) and not (seen[0].any() or seen[-1].any() or seen[:, 0].any() or seen[:, -1].any())
    for relation, noun in itertools.product(P.RELATIONS, P.NOUNS):
        seen = np.abs(draw_scene(Scene("", (Thing(noun, adjective="big"), Thing("house", adjective="small")), relation), 64).astype(int) - 255).sum(-1) > 30
        assert not (seen[0].any() or seen[-1].any() or seen[:, 0].any() or seen[:, -1].any()), (noun, relation)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_as_many_things_as_the_caption_counts(count):
    for colour in (None, "red"):
        picture = draw_scene(Scene("", (Thing("house", count, colour),)), 128).astype(int)
        blobs, n = ndimage.label(np.abs(picture - 255).sum(-1) > 30)
        assert (np.bincount(blobs.ravel())[1:] > 100).sum() == count


@pytest.mark.parametrize("verb, corner, left_half, stroke", [("falling", (9, 18), "right", (23, 8)), ("sleeping", (9, 18), "bottom", (10, 12)), ("jumping", (9, 0), "left", (39, 76)), ("running", (18, 9), None, (8, 27))])
def test_a_verb_turns_and_moves_the_drawing_and_adds_strokes(verb, corner, left_half, stroke):
    square = np.zeros((60, 60, 4), np.uint8)
    square[:, :30], square[:, 30:] = (255, 0, 0, 255), (0, 0, 255, 255)
    posed = np.asarray(P._posed(Image.fromarray(square), verb)).astype(int)
    assert posed.shape == (78, 78, 4) and posed[stroke[1], stroke[0]].tolist() == [90, 90, 90, 255]
    y, x = np.nonzero((posed[..., 0] > 200) & (posed[..., 2] < 50))
    v, u = np.nonzero((posed[..., 2] > 200) & (posed[..., 0] < 50))
    middle = np.array([(x.mean() + u.mean()) / 2, (y.mean() + v.mean()) / 2])
    assert np.allclose(middle, np.array(corner) + 29.5, atol=1.5)
    toward = np.array([x.mean() - u.mean(), y.mean() - v.mean()]) / 30
    wanted = {"left": (-1, 0), "right": (1, 0), "bottom": (0, 1)}.get(left_half, (-np.cos(np.pi / 9), -np.sin(np.pi / 9)))  # running leans forward
    assert np.allclose(toward, wanted, atol=0.12)


def test_a_verb_is_seen_on_the_thing_that_does_it():
    for verbs, seen in (((None, None), [0, 0]), (("sleeping", None), [1, 0]), ((None, "sleeping"), [0, 1])):
        things = (Thing(n, adjective=c, verb=v) for n, c, v in zip(("cat", "dog"), ("red", "blue"), verbs))
        strokes = (draw_scene(Scene("", tuple(things), "left of"), 96) == 90).all(-1)
        assert [strokes[:, :48].sum() > 15, strokes[:, 48:].sum() > 15] == seen


@pytest.mark.parametrize("time, colour", [("at dawn", (247, 208, 196)), ("at noon", (207, 234, 255)), ("at dusk", (201, 160, 216)), ("at night", (48, 58, 96)), (None, (255, 255, 255))])
def test_the_sky_is_the_time_of_day(time, colour):
    assert tuple(draw_scene(PLAIN._replace(time=time))[0, 0]) == colour


@pytest.mark.parametrize("scene, said", [
    (PLAIN._replace(things=(Thing("zebra"),)), "noun='zebra'"), (PLAIN._replace(things=(CAT._replace(count=5),)), "count=5"), (PLAIN._replace(things=(CAT._replace(adjective="pink"),)), "adjective='pink'"),
    (PLAIN._replace(things=(CAT._replace(verb="eating"),)), "verb='eating'"), (PLAIN._replace(place="on top"), "place='on top'"), (PLAIN._replace(time="at tea"), "time='at tea'"),
    (PLAIN._replace(things=(CAT, CAT), relation="near"), "relation='near'"), (PLAIN._replace(absent="zebra"), "absent='zebra'"), (PLAIN._replace(things=()), "0 things"), (PLAIN._replace(things=(CAT,) * 3), "3 things")])
def test_what_cannot_be_drawn_is_named(scene, said):
    with pytest.raises(ValueError, match=said): draw_scene(scene, 32)


def test_negation_is_not_to_be_seen():
    said, plain = draw_scene(PLAIN._replace(absent="dog")), draw_scene(PLAIN)
    assert abs(said.astype(int).mean() - plain.mean()) < 2, "only the jitter differs"


def test_pairs_are_captions_and_their_pictures():
    scenes = P.make_scenes(7, 0)
    pairs = P.scene_pairs(scenes, 48)
    assert pairs.captions == pairs.bases == [scene_caption(s) for s in scenes]
    assert pairs.images.shape == (7, 48, 48, 3) and np.array_equal(pairs.images[5], draw_scene(scenes[5], 48))
    assert pairs.categories == pairs.subcategories == [None] * 7


# ---- a bag of words, and material

def test_bag_of_words_against_a_counter():
    encode = P.bag_of_words(TINY)
    words = sorted({w for c in TINY for w in c.split()})
    some = ["a red dog", "dog red a", "a a a", "unknown words"]
    assert encode(some).tolist() == [[c.split().count(w) for w in words] for c in some]


def test_words_that_read_the_same_are_one_and_without_words_there_is_no_bag():
    assert P.bag_of_words(["a caf\u00e9", "B b"])(["cafe\u0301 a a", "b B", ""]).tolist() == [[0, 2, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]]
    for wrong in ([" ", ""], [], "a dog"):
        with pytest.raises(ValueError, match="hold no word"): P.bag_of_words(wrong)


def test_material_without_a_teacher_holds_word_counts():
    some = P.make_scenes(20, seed=0)
    m = P.scene_material(some, size=32)
    assert m.pairs.captions == [scene_caption(s) for s in some] and m.pairs.images.shape == (20, 32, 32, 3)
    counts = [len(c.split()) for c in m.pairs.captions]
    np.testing.assert_array_equal(m.embeddings.sum(1), counts)
    assert m.word_embeddings.shape[1] == m.embeddings.shape[1] and len(m.words) == len(m.word_embeddings)


def test_material_with_a_teacher_is_checked(rng):
    some, x = P.make_scenes(5, seed=0), rng.normal(size=(5, 8)).astype(np.float32)
    m = P.scene_material(some, x, size=16)
    assert np.array_equal(m.embeddings, x) and m.word_embeddings.shape[1] == 8
    assert m.word_table is None and m.words == m.pairs.captions[:1] and np.array_equal(m.word_embeddings, x[:1])
    assert np.array_equal(P.scene_material(iter(some), x.tolist(), size=16).embeddings, x)
    with pytest.raises(ValueError, match="4 embeddings for 5"):
        P.scene_material(some, x[:4], size=16)


def test_scenes_train_plain_clip_for_a_step(tmp_path, monkeypatch):
    from kklip_nb.training import LAPTOP, run_recipe

    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    some = P.make_scenes(12, seed=0)
    recipe = dataclasses.replace(LAPTOP, alpha=0.0, beta=0.0, words=0, first_steps=0, word_table=False, epochs=1, batch_size=8, k=3, imagenet=False)
    run = run_recipe(recipe, P.scene_material(some), np.arange(12))
    assert len(run.history) == 1 and run.image_features.shape == (12, 128)


# ---- captions of one's own

def test_captions_from_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa  dog\r\n\r\n  zwei Hündchen \na\tcat".encode())
    assert P.load_captions(path) == ["a dog", "zwei Hündchen", "a cat"]
    path.write_bytes("a line\u2028of one\x0ccaption\n \u200b\ncafe\u0301\rlast".encode())
    assert P.load_captions(str(path)) == ["a line of one caption", "caf\u00e9", "last"]


def test_captions_file_refuses(tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n\n"), latin.write_bytes("Hündchen".encode("latin-1"))
    with pytest.raises(ValueError, match="no line with text"): P.load_captions(empty)
    with pytest.raises(ValueError, match="UTF-8"): P.load_captions(latin)
    with pytest.raises(ValueError, match=r"\.csv"): P.load_captions(tmp_path / "mine.csv")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="folder.txt is a folder"): P.load_captions(tmp_path / "folder.txt")
    with pytest.raises(FileNotFoundError, match="missing.txt"): P.load_captions(tmp_path / "missing.txt")
