"""The autoencoder, the probe and its metrics, against slow references and known answers."""

import inspect
import math
import shutil
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kklip_nb.evaluation import bootstrap_interval
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
    losses = P.train_autoencoder(autoencoder, TINY, steps=100, batch_size=24, lr=5e-3)
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
    weights = [P.build_autoencoder(TINY, seed=seed).model.shared.weight for seed in (0, 0, 1, 2)]
    assert torch.equal(*weights[:2]) and not torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])


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


@pytest.mark.parametrize("function, defaults", [
    (P.build_autoencoder, dict(name=None, seed=0, device="cpu")), (P.train_autoencoder, dict(steps=500, batch_size=64, lr=3e-3, seed=0, progress=False)),
    (P.fit_probe, dict(steps=400, batch_size=64, lr=1.5e-2, seed=0, progress=False)), (P.read_back, dict(max_tokens=64, batch_size=256)), (P.student_encoder, dict(batch_size=256))])
def test_what_is_done_unless_said_otherwise(function, defaults):
    assert {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty} == defaults


def test_the_small_t5_is_as_told(fresh):
    config, torch_seed = fresh.model.config, torch.get_rng_state()
    assert [config.d_model, config.num_heads, config.num_layers, config.num_decoder_layers, config.dropout_rate] == [128, 4, 2, 2, 0.0]
    biases = torch.cat([s.block[0].layer[0].SelfAttention.relative_attention_bias.weight.flatten() for s in (fresh.model.encoder, fresh.model.decoder)])
    assert 1.7 < biases.std() < 2.3 and torch.equal(torch.get_rng_state(), torch_seed)
    assert not fresh.model.training and fresh.model.device.type == "cpu" and P.build_autoencoder(TINY, device="meta").model.device.type == "meta"


@pytest.fixture
def steps(monkeypatch):
    "What the optimiser did at each step, and which captions were read."
    steps, optimizer, loss = [], torch.optim.AdamW, P.decoder_loss
    class Watched(optimizer):
        def step(self, *args):
            (group,) = self.param_groups
            steps[-1] |= dict(lr=group["lr"], decay=group["weight_decay"], trained=group["params"])
            return super().step(*args)
    def watched(autoencoder, vectors, ids, mask):
        steps.append(dict(ids=ids, mask=mask, vectors=vectors, training=autoencoder.model.training))
        return loss(autoencoder, vectors, ids, mask)
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(P, "decoder_loss", watched)
    return steps


UNEQUAL = ["a red dog", "key", "a very long caption of many new words indeed", "two cats", "a blue bus"]


@pytest.mark.parametrize("probe", [False, True])
def test_each_step_reads_other_captions_at_the_rate_of_the_schedule(fresh, steps, probe):
    how = dict(steps=20, batch_size=3, lr=0.01, seed=4)
    if probe: result, losses = P.fit_probe(fresh, np.eye(5), UNEQUAL, **how)
    else: losses = P.train_autoencoder(fresh, UNEQUAL, **how)
    assert len(losses) == len(steps) == 20 and all(s["decay"] == 0 and s["training"] == (not probe) for s in steps)
    np.testing.assert_allclose([s["lr"] for s in steps], [0.01] + [0.005 * (1 + math.cos(math.pi * t / 19)) for t in range(19)])
    ids, mask = P.caption_tokens(fresh, UNEQUAL)
    dice = torch.Generator().manual_seed(4)
    for step in steps:
        rows = torch.randint(5, (3,), generator=dice)
        longest = int(mask[rows].sum(1).max())
        assert torch.equal(step["ids"], ids[rows, :longest]) and torch.equal(step["mask"], mask[rows, :longest])
    trained = {id(p) for p in steps[0]["trained"]}
    assert trained == {id(p) for p in (result.adapter if probe else fresh.model).parameters()}
    assert not fresh.model.training and all(p.grad is None for p in fresh.model.parameters())
    if probe:  # the vectors of the last step are those of its captions
        with torch.no_grad(): after = result.adapter(torch.from_numpy((np.eye(5) - 0.2) / 0.4).float()[rows])
        torch.testing.assert_close(step["vectors"].detach(), after, atol=0.05, rtol=0)
    else: assert (P.train_autoencoder(fresh, UNEQUAL, steps=1), all(p.requires_grad for p in fresh.model.parameters()))[1]


def test_a_t5_trains_again_after_a_probe_and_reads_in_evaluation_mode_after_an_interruption(fresh, monkeypatch):
    P.fit_probe(fresh, np.eye(5), UNEQUAL, steps=1)
    before = {k: v.clone() for k, v in fresh.model.state_dict().items()}
    P.train_autoencoder(fresh, UNEQUAL, steps=1)
    assert any(not torch.equal(v, before[k]) for k, v in fresh.model.state_dict().items())
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr(P, "decoder_loss", interrupt)
    with pytest.raises(KeyboardInterrupt): P.train_autoencoder(fresh, UNEQUAL, steps=1)
    assert not fresh.model.training
    for read in (lambda: P.read_back(fresh, np.zeros((1, 128)), 1), lambda: P.autoencode(fresh, ["a"])):
        fresh.model.train()
        read()
        assert not fresh.model.training


@pytest.mark.parametrize("form", [lambda x: x.numpy().tolist(), lambda x: x.half(), lambda x: x.bfloat16(), lambda x: x.double().numpy(), lambda x: x.clone().requires_grad_()])
def test_vectors_are_read_back_in_any_form(fresh, form):
    vectors = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert P.read_back(fresh, form(vectors), 3) == P.read_back(fresh, vectors, 3)


def test_long_captions_are_not_cut_and_shorter_limits_are_kept(fresh, monkeypatch):
    limits = []
    monkeypatch.setattr(P, "read_back", lambda t5, vectors, max_tokens=64, batch_size=256: limits.append(max_tokens) or [""] * len(vectors))
    long = "word after word " * 30
    tokens = P.caption_tokens(fresh, [long])[0].shape[1]
    P.autoencode(fresh, ["a"]), P.autoencode(fresh, ["a", long]), P.probe_captions(fresh, bag_of_words(["a b", long]), ["a b"], ["a"], steps=1)
    P.probe_captions(fresh, bag_of_words(["a b", long]), ["a b"], ["a", long], steps=1)
    assert tokens > 64 and limits == [64, tokens, 64, tokens]


def test_read_back_stops_at_its_limit_and_refuses_what_it_cannot_read(tiny):
    with torch.no_grad(): vectors = P.t5_vectors(tiny, *P.caption_tokens(tiny, TINY[:5]))
    assert P.read_back(tiny, vectors, 2, batch_size=2) == [" ".join(c.split()[:2]) for c in TINY[:5]]
    for wrong, how in ((np.zeros((2, 5)), {}), (np.zeros((2, 128)), dict(max_tokens=0)), (np.zeros((2, 128)), dict(batch_size=-1))):
        with pytest.raises(ValueError, match=r"expected \(n, 128\)"): P.read_back(tiny, wrong, **how)
    with pytest.raises(ValueError, match="NaN"): P.read_back(tiny, np.full((2, 128), np.nan))


def test_captions_that_read_the_same_are_one(fresh):
    one, two = "caf\u00e9", "cafe\u0301"
    assert torch.equal(*(P.caption_tokens(fresh, [c])[0] for c in (one, two))) and P.exact_matches([one], [two]).tolist() == [1]
    assert P.edit_distances([f"a {one}"], [f"a {two}"]).tolist() == [0] and P.lookup(np.eye(2), [one, "b"])([two]).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="1 captions lie in train and test"): P.probe_captions(fresh, None, ["a dog", f"The {one}"], [f"the\u00a0{two}\u200b"])


@pytest.mark.parametrize("wrong", ["a dog", [], ["a", None], ["a", 3], ["a", "\ud800"]])
def test_what_is_no_list_of_captions_is_refused(fresh, wrong):
    for ask in (P.build_autoencoder, lambda c: P.caption_tokens(fresh, c), lambda c: P.train_autoencoder(fresh, c), lambda c: P.autoencode(fresh, c), lambda c: P.fit_probe(fresh, np.eye(2), c),
                lambda c: P.lookup(np.eye(2), c), lambda c: P.exact_matches(["a", "b"], c), lambda c: P.edit_distances(c, ["a", "b"]), lambda c: P.probe_captions(fresh, None, c, ["a"])):
        with pytest.raises(ValueError, match="captions"): ask(wrong)


def test_captions_from_any_column(fresh):
    column = np.array(["a dog", "a long cat"])
    wanted = P.caption_tokens(fresh, ["a dog", "a long cat"])[0]
    for form in (column, tuple(column), iter(column), (c for c in column)): assert torch.equal(P.caption_tokens(fresh, form)[0], wanted)
    assert P.exact_matches(iter(column), column).tolist() == [1, 1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    for piece in P.build_autoencoder(["a dog"]): piece.save_pretrained(folder)
    return folder


def cut(file): return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:400])


def without_a_layer(folder):
    from safetensors.numpy import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "decoder.block.1" not in k}, folder / "model.safetensors", metadata=dict(format="pt"))


def another_model(folder):
    from transformers import BartConfig, BartForConditionalGeneration
    BartForConditionalGeneration(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
                                            vocab_size=300)).save_pretrained(folder)


def without_an_end(folder):
    from transformers import PreTrainedTokenizerFast
    bpe = P._empty_bpe()
    bpe.add_tokens(["a"])
    bpe.post_processor = None
    PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize("damage, said", [(cut("model.safetensors"), "cannot load T5"), (cut("tokenizer.json"), "cannot load T5"), (cut("config.json"), "cannot load T5"), (without_a_layer, r"\(t5\) lacks 13 weights of a T5, such as 'decoder.block.1"),
                                          (another_model, r"\(bart\) lacks"), (without_an_end, "does not end captions")])
def test_a_damaged_t5_and_another_model_are_named(saved, tmp_path, damage, said):
    folder = shutil.copytree(saved, tmp_path / "t5")
    damage(folder)
    with pytest.raises(ValueError, match=said) as caught: P.build_autoencoder(["a dog"], str(folder))
    assert str(folder) in str(caught.value)


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
    probe, losses = P.fit_probe(tiny, bags, TINY, steps=80, batch_size=24)
    read = P.read_back(tiny, P.probe_inputs(probe, bags))
    assert P.exact_matches(TINY, read).mean() == 1.0 and losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items()) and np.array_equal(bags, kept)
    probe, _ = P.fit_probe(tiny, np.ones((len(TINY), 5)), TINY, steps=10, batch_size=24)
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


def by_hand(probe, fitted, vectors):
    "What the decoder is shown, in numpy, with mean and spread of the vectors that the probe was fitted on."
    linear, norm = ([p.detach().double().numpy() for p in layer.parameters()] for layer in probe.adapter)
    x = (vectors - fitted.mean(0)) / fitted.std(0) @ linear[0].T + linear[1]
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * norm[0] + norm[1]


def test_other_vectors_are_scaled_as_the_training_vectors_were(fresh, rng):
    fitted = rng.normal(3, [1, 10, 0.1, 5], (len(TINY), 4))
    probe, _ = P.fit_probe(fresh, fitted, TINY, steps=2)
    for others in (fitted + 5, 3 * fitted[:7], fitted[:1]): np.testing.assert_allclose(P.probe_inputs(probe, others), by_hand(probe, fitted, others), atol=1e-4)


def test_nothing_that_is_fitted_moves_with_the_held_out_captions(fresh, monkeypatch, rng):
    table, shown, probes, fit = {c: rng.normal(size=5) for c in TINY}, [], [], P.fit_probe
    monkeypatch.setattr(P, "read_back", lambda t5, vectors, *_: shown.append((t5, vectors)) or ["read"] * len(vectors))
    monkeypatch.setattr(P, "fit_probe", lambda *given, **how: probes.append((given, how)) or fit(*given, **how))
    train, how = TINY[:-6], dict(steps=2, batch_size=8, lr=1e-3, seed=5, progress=False)
    encode = lambda captions: np.stack([table[c] for c in captions])
    fitted = []
    for test in (TINY[-6:], TINY[-3:], TINY[-6:-3]):
        if test == TINY[-3:]: table |= {c: np.full(5, 1e6) for c in TINY[-6:]}
        assert P.probe_captions(fresh, encode, train, test, **how) == ["read"] * len(test)
        (t5, vectors, captions), settings = probes[-1]
        assert t5 is fresh and captions == train and settings == how and np.array_equal(vectors, encode(train))
        fitted.append(fit(t5, vectors, captions, **settings)[0])
        assert shown[-1][0] is fresh
        np.testing.assert_allclose(shown[-1][1], by_hand(fitted[-1], encode(train), encode(test)), atol=1e-3)
    for probe in fitted[1:]:
        assert all(torch.equal(a, b) for a, b in zip(probe.adapter.parameters(), fitted[0].adapter.parameters())) and np.array_equal(probe.scaler.mean_, fitted[0].scaler.mean_)
    with pytest.raises(ValueError, match="1 captions lie in train and test"): P.probe_captions(fresh, encode, TINY, TINY[:1])


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
    student.train()
    torch.testing.assert_close(encode(TINY[:9]), alone, atol=1e-5, rtol=1e-4)
    assert not student.training and alone.norm(dim=1).std() > 1e-3, "not normalised"


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


def test_scores_by_hand():
    truth, read = ["a b c d", "a b", "a b", "x"], ["a b c d", "a c", "a b", "y"]
    found = P.probe_scores(truth, read)
    low, high = bootstrap_interval([1, 0, 1, 0])
    assert found == dict(exact_match=0.5, low=low, high=high, edit_distance=0.375) and low < 0.5 < high


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
    kinds = ["a", "a\0", 1, "1"]  # numpy would take the first two, and the last two, for the same
    assert P.matches_by_kind(truth, read, kinds) == {"a": (1.0, 1), "a\0": (0.0, 1), 1: (1.0, 1), "1": (0.0, 1)}
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
