"""The autoencoder, the probe and its metrics, against slow references and known answers."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kklip_nb.evidence import text_probe as P
from kklip_nb.evidence.scenes import COLOURS, bag_of_words

WORDS = st.lists(st.sampled_from("abcd"), max_size=6)
TEXTS = st.lists(st.sampled_from(["a dog", "a cat", "two dogs", "a red dog and a cat"]), min_size=1, max_size=8)
TINY = [f"a {colour} {noun}" for colour in COLOURS for noun in ("dog", "cat", "key", "bus", "house")]


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
    assert P.autoencode(tiny, TINY * 10)[-len(TINY):] == TINY


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
    before, bags = state(tiny.model), bag_of_words(TINY)(TINY)
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
    encode = bag_of_words(TINY)
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


def test_the_caller_s_random_state_is_left_alone(tiny):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    P.build_autoencoder(TINY, seed=3)
    P.fit_probe(tiny, np.eye(len(TINY)), TINY, steps=2, batch_size=8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_adapter_starts_where_torch_s_seed_puts_it(tiny):
    probe, _ = P.fit_probe(tiny, np.eye(len(TINY)), TINY, steps=1, lr=1e-30, seed=3)
    torch.manual_seed(3)
    start = torch.nn.Linear(len(TINY), 128)
    torch.testing.assert_close(probe.adapter[0].weight, start.weight)
