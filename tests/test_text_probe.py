"""Scenes, the autoencoder, the probe and its metrics, against slow references and known answers."""

from collections import Counter
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kklip_nb.evidence import text_probe as P
from kklip_nb.evidence.text_probe import Scene, Thing, draw_scene, scene_caption

WORDS = st.lists(st.sampled_from("abcd"), max_size=6)
TEXTS = st.lists(st.sampled_from(["a dog", "a cat", "two dogs", "a red dog and a cat"]), min_size=1, max_size=8)
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


@pytest.mark.parametrize("shares", [dict(val=0.5, test=0.6), dict(val=-0.1, test=0.2)])
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


def test_places_are_where_they_say():
    for place, (x, y) in P.PLACES.items():
        assert np.allclose(middle(PLAIN._replace(place=place)), (x, y), atol=0.1), place


@pytest.mark.parametrize("relation", P.RELATIONS)
def test_relations_put_the_first_thing_there(relation):
    def reddish(first, second):
        scene = Scene("", (Thing("balloon", adjective=first), Thing("balloon", adjective=second)), relation)
        picture = draw_scene(scene, 96).astype(int)
        y, x = np.nonzero(picture[..., 0] - picture[..., 2] > 60)
        return np.array([x.mean(), y.mean()]) / 96 - 0.5
    dx, dy = P.RELATIONS[relation]
    assert reddish("red", "blue") @ (dx, dy) > 0.15 > -0.15 > reddish("blue", "red") @ (dx, dy)


def test_the_sky_is_the_time_of_day():
    for time, colour in P.TIMES.items():
        assert "#{:02x}{:02x}{:02x}".format(*draw_scene(PLAIN._replace(time=time))[0, 0]) == colour


def test_negation_is_not_to_be_seen():
    said, plain = draw_scene(PLAIN._replace(absent="dog")), draw_scene(PLAIN)
    assert abs(said.astype(int).mean() - plain.mean()) < 2, "only the jitter differs"


def test_pairs_are_captions_and_their_pictures():
    scenes = P.make_scenes(7, 0)
    pairs = P.scene_pairs(scenes, 48)
    assert pairs.captions == pairs.bases == [scene_caption(s) for s in scenes]
    assert pairs.images.shape == (7, 48, 48, 3) and np.array_equal(pairs.images[5], draw_scene(scenes[5], 48))
    assert pairs.categories == pairs.subcategories == [None] * 7


# ---- autoencoder

@pytest.fixture(scope="module")
def tiny():
    "A small T5 that has learned thirty captions of three words by heart."
    autoencoder = P.build_autoencoder(TINY)
    losses = P.train_autoencoder(autoencoder, TINY, steps=150, batch_size=32, lr=5e-3)
    assert losses[-1] < 0.1 < losses[0]
    return autoencoder


@pytest.fixture
def fresh(): return P.build_autoencoder(TINY, seed=1)


def test_tokens_are_captions_again(fresh):
    texts = [*TINY, "A word, never seen: Großmütterchen!", "x"]
    ids, mask = P.caption_tokens(fresh, texts)
    assert fresh.tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    for row, there in zip(ids.tolist(), mask.sum(1).tolist()): assert row[there - 1] == 1 and set(row[there:]) <= {0}
    assert mask[0].sum() == 4, "a frequent word is one token"


def test_the_same_seed_gives_the_same_training():
    def train(seed):
        autoencoder = P.build_autoencoder(TINY, seed=seed)
        return P.train_autoencoder(autoencoder, TINY, steps=3, batch_size=8, seed=seed)
    assert train(0) == train(0) != train(1)


def test_padding_does_not_change_a_vector(fresh):
    captions = ["a red dog", "a red dog and then a very long tail of words"]
    with torch.no_grad():
        together = P.t5_vectors(fresh, *P.caption_tokens(fresh, captions))
        for row, caption in zip(together, captions):
            ids, mask = P.caption_tokens(fresh, [caption])
            states = fresh.model.encoder(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(row, states.mean(0), atol=1e-5, rtol=1e-5)


def test_loss_against_a_loop_and_against_transformers(fresh):
    ids, mask = P.caption_tokens(fresh, ["a red dog", "a blue key in a long line"])
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = P.decoder_loss(fresh, vectors, ids, mask)
        parts = []
        for v, row, there in zip(vectors, ids, mask):  # one token at a time, without padding
            for t in range(int(there.sum())):
                seen = torch.cat([torch.tensor([0]), row[:t]])[None]
                logits = fresh.model(encoder_outputs=(v[None, None],), decoder_input_ids=seen).logits[0, -1]
                parts.append(-F.log_softmax(logits, 0)[row[t]])
        theirs = fresh.model(encoder_outputs=(vectors[:, None],), labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(got, torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, theirs, atol=1e-6, rtol=1e-6)


def greedy(autoencoder, vector, longest):
    "Token by token, everything computed anew each time."
    written = [0]
    while len(written) <= longest:
        logits = autoencoder.model(encoder_outputs=(vector[None, None],), decoder_input_ids=torch.tensor([written])).logits[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] == 1: break
    return autoencoder.tokenizer.decode(written, skip_special_tokens=True)


def test_greedy_decoding_against_a_loop(tiny):
    vectors = 3 * torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ids, mask = P.caption_tokens(tiny, TINY[:6])
        vectors = torch.cat([vectors, P.t5_vectors(tiny, ids, mask)])
        assert P.read_back(tiny, vectors, 12, batch_size=5) == [greedy(tiny, v, 12) for v in vectors]


def test_autoencoding_reads_back_what_was_learned(tiny):
    assert P.autoencode(tiny, TINY, batch_size=7) == TINY


def test_a_saved_t5_comes_back_through_the_same_function(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path), tiny.tokenizer.save_pretrained(tmp_path)
    again = P.build_autoencoder(TINY, str(tmp_path))
    assert P.autoencode(again, TINY[:8]) == TINY[:8]


def test_autoencoder_refuses(fresh, tmp_path):
    with pytest.raises(FileNotFoundError, match="t5-large"): P.build_autoencoder(TINY, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="list of captions"): P.build_autoencoder("a dog")
    with pytest.raises(ValueError, match="list of captions"): P.build_autoencoder([])
    with pytest.raises(ValueError, match="no captions"): P.train_autoencoder(fresh, [])
    for wrong in (dict(steps=0), dict(batch_size=0), dict(lr=0.0), dict(lr=float("nan"))):
        with pytest.raises(ValueError, match="above 0"): P.train_autoencoder(fresh, TINY, **wrong)


# ---- probe

def state(model) -> dict: return {k: v.clone() for k, v in model.state_dict().items()}


def test_a_bag_of_words_is_read_back_and_a_constant_is_not(tiny):
    before, bags = state(tiny.model), P.bag_of_words(TINY)(TINY)
    kept = bags.copy()
    probe, losses = P.fit_probe(tiny, bags, TINY, steps=150, batch_size=32)
    read = P.read_back(tiny, P.probe_inputs(probe, bags))
    assert P.exact_matches(TINY, read).mean() == 1.0 and losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items()) and np.array_equal(bags, kept)
    probe, _ = P.fit_probe(tiny, np.ones((len(TINY), 5)), TINY, steps=60, batch_size=32)
    assert P.exact_matches(TINY, P.read_back(tiny, P.probe_inputs(probe, np.ones((len(TINY), 5))))).mean() <= 1 / len(TINY)


def test_only_the_adapter_learns(tiny):
    probe, _ = P.fit_probe(tiny, np.eye(len(TINY)), TINY, steps=2, batch_size=8)
    assert [type(m).__name__ for m in probe.adapter] == ["Linear", "LayerNorm"]
    assert all(p.requires_grad and p.grad is not None for p in probe.adapter.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in tiny.model.parameters()) and not tiny.model.training
    torch.manual_seed(0)
    start = torch.nn.Linear(len(TINY), 128)
    assert not torch.equal(start.weight, probe.adapter[0].weight), "the linear layer has moved from its start"


def test_the_scaler_is_part_of_the_linear_layer(tiny):
    vectors = np.random.default_rng(0).normal(3, [1, 10, 0.1, 5], (len(TINY), 4))
    probe, _ = P.fit_probe(tiny, vectors, TINY, steps=3)
    linear, norm = probe.adapter
    with torch.no_grad():
        weight = linear.weight.double() / torch.from_numpy(probe.scaler.scale_)
        bias = linear.bias.double() - weight @ torch.from_numpy(probe.scaler.mean_)
        folded = norm((torch.from_numpy(vectors) @ weight.T + bias).float())
    torch.testing.assert_close(P.probe_inputs(probe, vectors), folded, atol=1e-4, rtol=1e-4)
    twice, _ = P.fit_probe(tiny, 100 * vectors - 7, TINY, steps=3)
    torch.testing.assert_close(P.probe_inputs(twice, 100 * vectors - 7), P.probe_inputs(probe, vectors), atol=1e-4, rtol=1e-4)


def test_the_whole_protocol_in_one_call(tiny):
    encode = P.bag_of_words(TINY)
    train, test = TINY[:-3], TINY[-3:]
    read = P.probe_captions(tiny, encode, train, test, steps=60, batch_size=16)
    probe, _ = P.fit_probe(tiny, encode(train), train, steps=60, batch_size=16)
    assert read == P.read_back(tiny, P.probe_inputs(probe, encode(test)))
    with pytest.raises(ValueError, match="1 captions lie in train and test"): P.probe_captions(tiny, encode, TINY, TINY[:1])


def test_probe_refuses(tiny):
    for wrong, match in ((np.ones(5), "shape"), (np.ones((3, 4)), "shape"), (np.full((30, 2), np.nan), "NaN"), (np.ones((30, 0)), "shape")):
        with pytest.raises(ValueError, match=match): P.fit_probe(tiny, wrong, TINY, steps=1)
    with pytest.raises(ValueError, match="above 0"): P.fit_probe(tiny, np.ones((30, 2)), TINY, steps=0)


# ---- encoders

def test_bag_of_words_against_a_counter():
    encode = P.bag_of_words(TINY)
    words = sorted({w for c in TINY for w in c.split()})
    some = ["a red dog", "dog red a", "a a a", "unknown words"]
    assert encode(some).tolist() == [[c.split().count(w) for w in words] for c in some]


def test_student_encoder_against_one_caption_at_a_time():
    from kklip_nb.student import build_student, tokenize
    student = build_student(imagenet=False)
    encode = P.student_encoder(student, batch_size=4)
    with torch.no_grad():
        alone = torch.cat([student.eval().encode_text(tokenize(student, [c])) for c in TINY[:9]])
    torch.testing.assert_close(encode(TINY[:9]), alone, atol=1e-5, rtol=1e-4)


def test_lookup_gives_rows_in_the_asked_order():
    x = np.arange(6.0).reshape(3, 2)
    encode = P.lookup(x, ["a", "b", "c"])
    assert encode(["c", "a"]).tolist() == [[4, 5], [0, 1]]
    with pytest.raises(ValueError, match="shape"): P.lookup(x, ["a", "b"])
    with pytest.raises(ValueError, match="'d'"): encode(["d"])


# ---- metrics

@cache
def slow_distance(a: tuple, b: tuple) -> int:
    if not a or not b: return len(a) + len(b)
    return min(slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, slow_distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(WORDS, WORDS)
def test_edit_distance_against_recursion(a, b):
    assert P.edit_distance(a, b) == slow_distance(tuple(a), tuple(b))


@given(WORDS, WORDS, WORDS)
def test_edit_distance_is_a_metric(a, b, c):
    ab = P.edit_distance(a, b)
    assert (ab == 0) == (a == b) and ab == P.edit_distance(b, a)
    assert ab <= P.edit_distance(a, c) + P.edit_distance(c, b)
    assert abs(len(a) - len(b)) <= ab <= max(len(a), len(b))


@pytest.mark.parametrize("truth, read, value", [("a b c d", "a b c d", 0), ("a b c d", "", 1), ("a b", "c d", 1), ("a b c d", "a b d", 0.25),
                                                ("a b", "a b c d", 0.5), ("", "", 0)])
def test_normalised_edit_distance_by_hand(truth, read, value):
    assert P.edit_distances([truth], [read]).tolist() == [value]


@given(TEXTS)
def test_scores_of_a_perfect_and_of_a_silent_reader(captions):
    perfect, silent = P.probe_scores(captions, list(captions)), P.probe_scores(captions, [""] * len(captions))
    assert perfect == dict(exact_match=1.0, low=1.0, high=1.0, edit_distance=0.0)
    assert silent == dict(exact_match=0.0, low=0.0, high=0.0, edit_distance=1.0)


def test_exact_match_is_verbatim():
    assert P.exact_matches(["a dog", "a dog", "a dog"], ["a dog", "A dog", "a dog "]).tolist() == [1, 0, 0]
    for wrong in (([], []), (["a"], ["a", "b"]), ("a", "a")):
        with pytest.raises(ValueError, match="expected"): P.exact_matches(*wrong)


@given(st.integers(0, 1000))
def test_token_accuracy_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    n, t = rng.integers(1, 6, 2)
    predicted, target = rng.integers(0, 3, (2, n, t))
    mask = np.arange(t) < rng.integers(1, t + 1, (n, 1))
    hits = [[] for _ in range(t)]
    for i in range(n):
        for j in range(t):
            if mask[i, j]: hits[j].append(predicted[i, j] == target[i, j])
    overall, by_position = P.token_accuracy(torch.tensor(predicted), torch.tensor(target), torch.tensor(mask).long())
    assert overall == pytest.approx(np.mean([h for column in hits for h in column]))
    np.testing.assert_allclose(by_position, [np.mean(h) if h else np.nan for h in hits])
    noise = np.where(mask, predicted, rng.integers(0, 99, (n, t)))
    assert P.token_accuracy(noise, target, mask)[0] == overall, "padding has no say"


def test_token_accuracy_refuses():
    ones = np.ones((2, 3))
    with pytest.raises(ValueError, match="shapes"): P.token_accuracy(ones, ones, ones[:, :2])
    with pytest.raises(ValueError, match="shapes"): P.token_accuracy(ones[0], ones[0], ones[0])
    with pytest.raises(ValueError, match="0 everywhere"): P.token_accuracy(ones, ones, 0 * ones)


def test_matches_by_kind():
    truth, read = ["a", "b", "c", "d"], ["a", "x", "c", "x"]
    assert P.matches_by_kind(truth, read, ["p", "p", "q", "r"]) == {"p": (0.5, 2), "q": (1.0, 1), "r": (0.0, 1)}
    with pytest.raises(ValueError, match="1 kinds"): P.matches_by_kind(truth, read, ["p"])


def test_gap_closed():
    assert P.gap_closed(35.8, 44.4, 52.5) == pytest.approx(8.6 / 16.7)
    assert [P.gap_closed(0.2, x, 0.7) for x in (0.2, 0.7)] == [0, 1]
    with pytest.raises(ValueError, match="no gap"): P.gap_closed(0.5, 0.6, 0.5)


# ---- captions of one's own

def test_captions_from_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa  dog\r\n\r\n  zwei Hündchen \na\tcat".encode())
    assert P.load_captions(path) == ["a dog", "zwei Hündchen", "a cat"]


def test_captions_file_refuses(tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n\n"), latin.write_bytes("Hündchen".encode("latin-1"))
    with pytest.raises(ValueError, match="no line with text"): P.load_captions(empty)
    with pytest.raises(ValueError, match="UTF-8"): P.load_captions(latin)
    with pytest.raises(ValueError, match=r"\.csv"): P.load_captions(tmp_path / "mine.csv")
    with pytest.raises(FileNotFoundError, match="missing.txt"): P.load_captions(tmp_path / "missing.txt")
