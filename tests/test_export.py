"""The export as open_clip loads it, from any checkpoint; its card; and an evaluation that refuses what was trained on."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from kklip_nb.own_pairs import decode_image, read_image
from kklip_nb.scale import export
from kklip_nb.scale.command_line import main
from kklip_nb.scale.export import evaluate_export, export_model, export_run, write_card
from kklip_nb.scale.shards import list_shards, open_picture, read_shard, usable_samples, write_shards
from kklip_nb.student import build_student, prepare_images, tokenize
from kklip_nb.teacher import captions_hash


@pytest.fixture
def run(finished, tmp_path):
    "A copy of the finished run."
    return shutil.copytree(finished / "run", tmp_path / "run")


def test_the_export_needs_none_of_our_code(finished):
    "A fresh interpreter with open_clip alone; kklip_nb must not even be imported."
    code = f"""
import sys, open_clip, torch
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{finished / 'run' / 'model'}")
tokens = open_clip.get_tokenizer("local-dir:{finished / 'run' / 'model'}")(["thing number 3"])
print(model.encode_text(tokens).norm().item()); assert not any(m.startswith("kklip_nb") for m in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.sep)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


def test_evaluation_equals_open_clip_by_hand(finished):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{finished / 'run' / 'model'}")
    samples = [s for u in list_shards(finished / "held-out" / "shards") for s in usable_samples(read_shard(u))[0]]
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(open_picture(s.image).convert("RGB")) for s in samples]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer("kklip-laptop-vit")([s.caption for s in samples]), normalize=True)
    by_hand = ((images @ texts.T).argsort(1, descending=True)[:, :5] == torch.arange(40)[:, None]).any(1).float().mean().item()
    assert json.loads((finished / "run" / "results.json").read_text())["scores"]["i2t_r5"] == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["kklip-laptop-vit", "kklip-laptop", "ViT-B-32-quickgelu"])
def test_export_gives_the_same_features(name, tmp_path, rng):
    student = build_student(name, imagenet=False, train_image="all").eval()
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{export_model(student, name, tmp_path)}")
    tokens, side = tokenize(student, ["two dogs", "a cat"]), student.clip.visual.image_size
    side = side if isinstance(side, int) else side[0]
    wide = Image.fromarray(np.asarray(Image.fromarray(rng.integers(256, size=(4, 6, 3), dtype=np.uint8)).resize((3 * side // 2, side), Image.Resampling.BICUBIC)))
    ours = prepare_images(student, read_image(wide, side)[None])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval().encode_text(tokens), student.encode_text(tokens))
        torch.testing.assert_close(loaded.encode_image(ours), student.encode_image(ours), rtol=1e-4, atol=1e-5)
    own = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.clip)), is_train=False)
    torch.testing.assert_close(preprocess(wide), own(wide))
    if name.startswith("kklip"): assert (ours - preprocess(wide)[None]).abs().mean() < 0.05 < (ours - open_clip.image_transform(side, is_train=False)(wide)[None]).abs().mean()


@pytest.mark.parametrize("name", ["kklip-laptop-vit", "ViT-B-32-quickgelu"])
def test_the_configuration_says_what_open_clips_own_export_says_and_more(name, tmp_path):
    student = build_student(name, imagenet=False, train_image="all")
    save_config_for_hf(student.clip, tmp_path / "theirs.json", open_clip.get_model_config(name))
    ours = json.loads((export_model(student, name, tmp_path) / "open_clip_config.json").read_text())
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    assert ours["model_cfg"] == theirs["model_cfg"] and theirs["preprocess_cfg"].items() <= ours["preprocess_cfg"].items()
    assert ours["preprocess_cfg"] == json.loads(json.dumps(open_clip.get_model_preprocess_cfg(student.clip)))


def test_a_transparent_picture_is_evaluated_on_white_and_upright(tmp_path, monkeypatch):
    "The transform sees what training saw: decode_image's picture."
    seen, buffers = [], []
    for exif in (1, 6):
        picture, note, buffer = Image.new("RGBA", (48, 32), (255, 0, 0, 0)), Image.Exif(), io.BytesIO()
        note[0x0112] = exif
        picture.save(buffer, "PNG", exif=note)
        buffers.append(buffer.getvalue())
    folder = export_model(build_student("kklip-laptop-vit", imagenet=False, train_image="all"), "kklip-laptop-vit", tmp_path)
    real = open_clip.create_model_and_transforms
    def spy(name):
        model, train, preprocess = real(name)
        return model, train, lambda image: seen.append(image) or preprocess(image)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", spy)
    from kklip_nb.scale import export
    from kklip_nb.scale.shards import Sample
    monkeypatch.setattr(export, "_held_out", lambda *args: [Sample(str(i), f"thing {i}", b) for i, b in enumerate(buffers)])
    evaluate_export(folder, [])
    assert [image.size for image in seen] == [(48, 32), (32, 48)] and all(np.array_equal(image, decode_image(b)) for image, b in zip(seen, buffers))
    assert all(np.asarray(image).min() == 255 for image in seen)


def test_the_card_states_data_teacher_recipe_and_results(finished):
    card, scores = (finished / "run" / "model" / "README.md").read_text(), json.loads((finished / "run" / "results.json").read_text())["scores"]
    for needed in ("- pairs: 40", "- teacher: smollm2 sha256:0", "- k: 4 (the paper: not said)", "- beta: 1.0 (the paper: 0.01)",
                   f"| i2t_r5 | {100 * scores['i2t_r5']:.1f} |", f"| i2t_median_rank | {scores['i2t_median_rank']:.1f} |", "On 40 pairs of held-out"):
        assert needed in card, needed


def test_the_card_has_the_head_that_the_hub_reads(finished):
    from huggingface_hub import ModelCard
    head = ModelCard.load(finished / "run" / "model" / "README.md").data
    assert (head.library_name, head.pipeline_tag, head.tags) == ("open_clip", "zero-shot-image-classification", ["clip", "knowledge-distillation"])


def test_a_run_that_was_not_evaluated_says_so(run):
    (run / "results.json").unlink()
    assert "Not evaluated yet" in write_card(run).read_text()


def test_the_export_of_a_checkpoint_is_what_training_exported(run):
    before = (run / "model" / "open_clip_model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    assert main(["export", str(run)]) == 0
    assert (run / "model" / "open_clip_model.safetensors").read_bytes() == before and (run / "results.json").exists()
    assert "i2t_r5" in (run / "model" / "README.md").read_text()


def test_another_checkpoint_does_not_inherit_the_scores(run):
    from safetensors import safe_open
    from safetensors.torch import save_file
    with safe_open(sorted(run.glob("checkpoint*.safetensors"))[-1], framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k) + (k == "student.clip.logit_scale") for k in file.keys()}, file.metadata()
    save_file(tensors, run / "older.safetensors", metadata=metadata)
    assert main(["export", str(run), "--checkpoint", str(run / "older.safetensors")]) == 0
    card = (run / "model" / "README.md").read_text()
    assert "Not evaluated yet" in card and "- checkpoint: older.safetensors" in card and not (run / "results.json").exists()


def test_a_checkpoint_of_other_data_is_refused(run):
    facts = json.loads((run / "run.json").read_text())
    facts["data"]["key"] = "another"
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="give a checkpoint of this run"): export_run(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json is missing"): export_run(tmp_path)
    (tmp_path / "run.json").write_text('{"data": {}}')
    with pytest.raises(FileNotFoundError, match="no checkpoint"): export_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="run kklip export"): evaluate_export(tmp_path, [])


def test_evaluation_of_what_was_trained_on_is_refused(finished, run, capsys, tmp_path):
    assert main(["evaluate", str(run), str(finished / "data")]) == 1
    assert "trained on" in capsys.readouterr().err
    shutil.copytree(finished / "held-out" / "shards", tmp_path / "mixed")  # one training shard among held-out ones, under another name
    shutil.copy(finished / "data" / "shards" / "00001.tar", tmp_path / "mixed" / "other.tar")
    assert main(["evaluate", str(run), "x", "--shards", str(tmp_path / "mixed")]) == 1
    assert "other.tar" in capsys.readouterr().err


@pytest.mark.parametrize("how", [dict(limit=1), dict(limit=0), dict(limit=-1), dict(batch_size=0)])
def test_evaluation_of_one_pair_is_refused(finished, how):
    with pytest.raises(ValueError, match=f"{[*how][0]}={[*how.values()][0]}; expected at least"):
        evaluate_export(finished / "run" / "model", [str(finished / "held-out" / "shards" / "00000.tar")], **how)


def test_a_training_shard_in_other_letters_is_still_refused(finished, run, tmp_path):
    "Captions that read the same: other case, full width; and what a run of an earlier version has written down."
    wide = str.maketrans({chr(c): chr(c + 0xFEE0) for c in range(ord("a"), ord("z") + 1)})
    pairs = [(np.zeros((8, 8, 3), np.uint8), f"thing number {i}") for i in range(20)]
    for name, change in (("upper", str.upper), ("wide", lambda c: c.translate(wide)), ("same", str)):
        (url,) = write_shards([(image, change(c)) for image, c in pairs], tmp_path / name, 20, 8)
        with pytest.raises(ValueError, match=f"{name}.00000.tar is one of the shards that were trained on"): export.evaluate_run(run, [str(url)], name)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | dict(trained_on={"00000": captions_hash([c for _, c in pairs])})))
    with pytest.raises(ValueError, match="trained on"): export.evaluate_run(run, [str(url)], "same")


# --- what is damaged

@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"{}", "folder"])
def test_papers_that_are_damaged_are_named(run, content, finished):
    for name, act in (("run.json", export_run), ("run.json", write_card), ("run.json", lambda run: export.evaluate_run(run, list_shards(finished / "held-out" / "shards"), "x")), ("results.json", write_card)):
        before = (run / name).read_bytes()
        (run / name).unlink()
        if content == "folder": (run / name).mkdir()
        else: (run / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged or not of this package"): act(run)
        (run / name).rmdir() if content == "folder" else (run / name).unlink()
        (run / name).write_bytes(before)


def test_a_recipe_of_another_version_is_named(run):
    facts = json.loads((run / "run.json").read_text())
    facts["recipe"]["momentum"] = 0.9
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="run.json holds no recipe of this version .*momentum"): write_card(run)
    facts["recipe"] = dict(k=0)
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="run.json holds no recipe of this version .*k=0"): write_card(run)


@pytest.mark.parametrize("name, content, said", [
    ("open_clip_model.safetensors", None, "no model in .*: open_clip_model.safetensors is missing; run kklip export"), ("open_clip_config.json", None, "open_clip_config.json is missing"),
    ("open_clip_model.safetensors", b"", "damaged"), ("open_clip_model.safetensors", "cut", "damaged"), ("open_clip_config.json", b"{", "damaged"), ("open_clip_config.json", b"{}", "damaged")])
def test_a_damaged_export_is_never_evaluated(finished, run, name, content, said):
    "open_clip only warns where there are no weights, and would score random ones."
    path, urls = run / "model" / name, list_shards(finished / "held-out" / "shards")
    if content is None: path.unlink()
    else: path.write_bytes(path.read_bytes()[:-40] if content == "cut" else content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{said}"): evaluate_export(run / "model", urls)
    if name.endswith("safetensors") and content is not None:
        with pytest.raises(ValueError, match="sha256.*run kklip export"): export.evaluate_run(run, urls, "x")
    if content == "cut": assert evaluate_export(export_run(run), urls, limit=4)[1] == 4


def test_another_model_in_the_folder_does_not_get_the_run_s_scores(finished, run):
    export_model(build_student("kklip-laptop-vit", imagenet=False, train_image="all", seed=5), "kklip-laptop-vit", run / "model")
    with pytest.raises(ValueError, match="open_clip_model.safetensors was made otherwise.*run kklip export"): export.evaluate_run(run, list_shards(finished / "held-out" / "shards"), "x")


def test_a_model_is_exported_under_a_name_that_open_clip_knows(tmp_path):
    with pytest.raises(ValueError, match="no model 'no-such'"): export_model(build_student("kklip-laptop-vit", imagenet=False, train_image="all"), "no-such", tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- a user's text on the card

NASTY = "a | b <script>x</script> `c` *d* _e_ __f__ [g](h) $i$ & &amp; ~~k~~ {l} %s 日本\n---\n# heading\n- item"


def test_a_user_s_text_is_shown_on_the_card_as_it_is(run):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").enable("strikethrough")
    from huggingface_hub import ModelCard
    facts, results = (json.loads((run / name).read_text()) for name in ("run.json", "results.json"))
    facts["recipe"]["prompt"] = facts["teacher"]["prompt"] = f"{{}} {NASTY}"
    facts["model"]["checkpoint"] = facts["recipe"]["student"] = NASTY
    (run / "run.json").write_text(json.dumps(facts))
    (run / "results.json").write_text(json.dumps(results | dict(data=NASTY)))
    card = write_card(run)
    assert ModelCard.load(card).data.tags == ["clip", "knowledge-distillation"]
    text = card.read_text(encoding="utf-8").split("---\n", 2)[2]
    html = markdown.render(text)
    shown = html_of(" ".join(NASTY.split()))
    assert html.count(shown) == 5 and html.count("<h1>") == 1 and html.count("<h2>") == 3 and html.count("<table>") == 1 and html.count("<hr") == 0
    assert "<script" not in html and "\\$i\\$" in text  # the hub reads $ as mathematics


def html_of(text: str) -> str:
    import html
    return html.escape(text, quote=False)


def test_no_more_shards_are_read_than_the_limit_needs(tmp_path, monkeypatch):
    from kklip_nb.scale import export
    folder = export_model(build_student("kklip-laptop-vit", imagenet=False, train_image="all"), "kklip-laptop-vit", tmp_path / "model")
    urls = [str(p) for p in write_shards([(np.zeros((8, 8, 3), np.uint8), f"thing {i}") for i in range(12)], tmp_path / "shards", 4, 8)]
    read = []
    monkeypatch.setattr(export, "read_shard", lambda url: read.append(url) or read_shard(url))
    assert evaluate_export(folder, urls, limit=6)[1] == 6 and read == urls[:2]


def test_results_name_the_data_that_they_are_of(finished, run):
    shards = str(finished / "held-out" / "shards")
    for extra, name in (([], "held-out"), (["--shards", shards], shards)):
        assert main(["evaluate", str(run), str(finished / "held-out"), *extra]) == 0
        assert json.loads((run / "results.json").read_text())["data"] == name


def test_pretrained_weights_keep_their_own_pixels():
    import open_clip
    from kklip_nb.recipe import LAPTOP
    from kklip_nb.student import build_student
    student = build_student("kklip-laptop-vit", imagenet=False, train_image="all")
    recipe = dataclasses.replace(LAPTOP, student="MobileCLIP-S1", pretrained="datacompdr")  # trained on pixels from 0 to 1
    export._keep_pixels(student, recipe)
    settings = open_clip.get_model_preprocess_cfg(student.clip)
    assert tuple(settings["mean"]) == (0, 0, 0) and tuple(settings["std"]) == (1, 1, 1) and settings["resize_mode"] == "longest"
    ours = dict(settings)
    export._keep_pixels(student, LAPTOP)
    assert open_clip.get_model_preprocess_cfg(student.clip) == ours


# --- what an export holds, and how it is judged

def test_the_exported_weights_are_the_checkpoint_s(run):
    from safetensors.torch import load_file
    state, model = load_file(sorted(run.glob("checkpoint*.safetensors"))[-1]), load_file(run / "model" / "open_clip_model.safetensors")
    assert {k.removeprefix("student.clip.") for k in state if k.startswith("student.clip.")} == model.keys()
    assert all(torch.equal(state[f"student.clip.{k}"], v) for k, v in model.items())
    assert "- steps: 10" in (run / "model" / "README.md").read_text()  # 2 epochs of 5


def test_an_export_writes_down_the_checkpoint_s_recipe_and_keeps_its_pixels(run, monkeypatch):
    kept = []
    monkeypatch.setattr(export, "_keep_pixels", lambda student, recipe: kept.append(recipe))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | dict(recipe=facts["recipe"] | dict(lr=0.5))))
    export_run(run)
    assert json.loads((run / "run.json").read_text()) == facts and [dataclasses.asdict(recipe) for recipe in kept] == [facts["recipe"]]


def test_a_run_is_described_in_full(monkeypatch):
    from kklip_nb.recipe import LAPTOP
    sidecars = [SimpleNamespace(shard=name, shape=(rows, 99), meta=dict(skipped=json.dumps(dict.fromkeys("abc"[:rows - 1], "broken")), folded=json.dumps([*range(rows)]))) for name, rows in (("x", 2), ("y", 3))]
    meta = dict(teacher="t", pooling="last", layer="3", prompt="{}", k="4", seed="0")
    found = export.describe_run(LAPTOP, SimpleNamespace(sidecars=sidecars, urls=["x.tar", "y.tar"], key="KEY", concepts=SimpleNamespace(meta=meta)), streams=2, max_norm=None)
    assert found["recipe"] == dataclasses.asdict(LAPTOP) and found["training"] == dict(streams=2, max_norm=None)
    assert found["data"] == dict(pairs=5, skipped=3, shards=2, key="KEY") and found["teacher"] == dict(teacher="t", pooling="last", layer="3", prompt="{}")
    assert found["trained_on"] == {"x": captions_hash("[0, 1]"), "y": captions_hash("[0, 1, 2]")} and found["versions"]["torch"] == torch.__version__.split("+")[0]


class Judged(torch.nn.Module):
    "Reads three columns of a picture, and a caption's length, first letter and checksum; in evaluation mode alone."

    def encode_image(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        return torch.stack([images[:, 0, :, at:at + 2].mean((1, 2)) for at in (0, 3, 6)], 1) - 0.5

    def encode_text(self, captions):
        assert not self.training
        return torch.tensor([[len(c) / 20 - 0.5, (ord(c[0].lower()) - 96) / 26 - 0.5, zlib.crc32(c.encode()) / 2**32 - 0.5] for c in captions])

    def to(self, device): self.asked = device; return super().to("cpu")


def test_an_export_is_judged_pair_by_pair(tmp_path, monkeypatch, rng):
    "Against recall and ranks by loops; captions that read the same are right answers for each other."
    from test_long_run import naive_scores
    captions = ["a dog", "A  DOG", "zebra", "a dog", *("bcdefgh"[i % 7] * (1 + i % 5) + f" {i}" for i in range(20))]
    urls = [str(p) for p in write_shards([(rng.integers(256, size=(8, 8, 3), dtype=np.uint8), c) for c in captions], tmp_path / "shards", 9, 8)]
    model, seen = Judged(), []
    def preprocess(image): seen.append(image); return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name: (model, None, preprocess))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: Captions)
    for name in ("open_clip_config.json", "open_clip_model.safetensors"): (tmp_path / name).write_text("")
    for limit in (5000, 11):
        seen.clear()
        scores, pairs = evaluate_export(tmp_path, urls, limit, 5, "cpu:0")
        n = min(limit, 24)
        with torch.inference_mode(): images, texts = model.encode_image(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in seen])), model.encode_text(captions[:n])
        assert pairs == len(seen) == n and model.asked == "cpu:0" and scores == pytest.approx(naive_scores(images, texts, [" ".join(c.lower().split()) for c in captions[:n]]))
    assert scores["i2t_r5"] != scores["t2i_r5"] and 0 < scores["i2t_r5"] < 1


class Captions(list):
    "A tokeniser's result that may be sent to a device."
    def to(self, device): return self


def test_a_run_s_evaluation_hands_its_numbers_on(run, monkeypatch):
    asked, trained_on = [], {*json.loads((run / "run.json").read_text())["trained_on"].values()}
    monkeypatch.setattr(export, "evaluate_export", lambda *args, **how: asked.append((args, how)) or ({"i2t_r1": 0.5}, 7))
    assert export.evaluate_run(run, ["0.tar"], "name", 9, "cuda") == {"i2t_r1": 0.5}
    assert asked == [((run / "model", ["0.tar"], 9), dict(device="cuda", trained_on=trained_on))] and len(trained_on) == 2
    assert json.loads((run / "results.json").read_text()) == dict(pairs=7, data="name", scores={"i2t_r1": 0.5})
    assert "On 7 pairs of name; recall in %, guessing gives 14.29 at 1." in (run / "model" / "README.md").read_text()
