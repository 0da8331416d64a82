"""The command line: every stage as a user calls it, its help, and which errors are the user's."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kklip_nb import teacher
from kklip_nb.scale import command_line as cli
from kklip_nb.scale.command_line import main, message, parse
from kklip_nb.scale.loader import shard_recipe
from kklip_nb.training import LAPTOP, PAPER

SMALL = "--k 4 --student kklip-laptop-vit --no-imagenet --train-image all --batch-size 8 --epochs 2 --warmup 1".split()  # as in conftest


def given(*line):
    "The recipe of a training command."
    return parse("train", ["data", "run", *line])[1]


def test_all_stages_leave_their_files(finished):
    assert [p.name for p in sorted((finished / "data" / "shards").glob("*.tar"))] == ["00000.tar", "00001.tar"]
    assert {p.name for p in (finished / "data" / "concepts").glob("*.safetensors")} == {"concepts.safetensors"}
    assert {"log.csv", "run.json", "results.json", "model"} <= {p.name for p in (finished / "run").iterdir()}
    assert list((finished / "run").glob("checkpoint*.safetensors")) and not list(finished.rglob("*.part"))


def test_a_second_call_changes_nothing(finished, fake_teacher, monkeypatch):
    before = {p: p.read_bytes() for p in finished.rglob("*.safetensors")}
    monkeypatch.setattr(teacher, "load_teacher", fake_teacher)
    assert main(["embed", str(finished / "data"), "--layer", "-1"]) == main(["cluster", str(finished / "data"), "--layer", "-1", "--k", "4"]) == 0
    assert main(["train", str(finished / "data"), str(finished / "run"), "--layer", "-1", *SMALL]) == 0
    assert {p: p.read_bytes() for p in finished.rglob("*.safetensors")} == before


@pytest.mark.parametrize("line, name, value", [
    ("--k 3", "k", 3), ("--lr=1e-4", "lr", 1e-4), ("--no-imagenet", "imagenet", False), ("--imagenet", "imagenet", True),
    ("--pretrained none", "pretrained", None), ("--pretrained None", "pretrained", None), ("--pretrained openai", "pretrained", "openai"),
    ("--layer -1", "layer", -1), ("--student none", "student", "none")])
def test_fields_are_read_by_their_type(line, name, value):
    found = getattr(given(*line.split()), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("line", ["--k 1.5", "--imagenet perhaps", "--lr fast", "--no-such 3", "--recipe best", "--words 3", "--word-table", "--pooling most"])
def test_a_value_of_another_type_is_refused(line, capsys):
    with pytest.raises(SystemExit) as stop: given(*line.split())
    assert stop.value.code == 2 and capsys.readouterr().err


def test_recipes_by_name():
    assert given("--recipe", "paper") == given("--recipe=paper") == shard_recipe(PAPER) == PAPER
    assert given("--recipe", "paper", "--k", "7") == dataclasses.replace(PAPER, k=7)
    assert given() == shard_recipe(LAPTOP)


def test_a_field_can_be_overridden_with_none():
    assert PAPER.pretrained and given("--recipe", "paper", "--pretrained", "none") == dataclasses.replace(PAPER, pretrained=None)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop: main([command, "--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert stop.value.code == 0 and "example" in text
    for f in dataclasses.fields(cli.COMMANDS[command]): assert f.name in cli.COMMANDS[command].__annotations__
    if command == "train": assert "the paper: 0.01" in text and "torchrun" in text and "bf16 on a GPU, else fp32" in text


def test_help_of_the_papers_recipe_shows_its_values(capsys):
    with pytest.raises(SystemExit): main(["train", "--recipe", "paper", "--help"])
    assert "(default: meta-llama/Llama-2-7b-hf)" in re.sub(r"[\s│]+", " ", capsys.readouterr().out)


def test_every_option_has_a_help_text(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit): main([name, "--help"])
        text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
        source = (Path(cli.__file__).read_text()).split(f"class {cli.COMMANDS[name].__name__}:")[1].split("def __call__")[0]
        comments = re.findall(r"^    \w+: .*?  # (.*)$", source, re.M)
        assert len(comments) == len(dataclasses.fields(cli.COMMANDS[name])) and all(c in text for c in comments)


@pytest.mark.parametrize("line", [[], ["--help"], ["shards", "--help"], ["export", "--help"], ["evaluate", "--help"]])
def test_help_is_fast_and_imports_nothing_heavy(line):
    code = f"""
import sys
from kklip_nb.scale.command_line import main
try: main({line})
except SystemExit: pass
assert not {{"torch", "numpy", "open_clip", "transformers", "sklearn"}} & set(sys.modules)"""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kklip" in done.stdout and time.perf_counter() - started < 5  # a tenth of that on an idle machine


def test_overview_names_all_commands(capsys):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    text = capsys.readouterr().out
    for name in ("shards", "embed", "cluster", "train", "export", "evaluate"): assert f"  {name} " in text
    assert main(["trian"]) == 2 and "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("line, said", [
    (["embed", "{data}", "--layer", "3"], "made otherwise"), (["cluster", "{data}", "--k", "5"], "made otherwise"), (["cluster", "nowhere"], "no shards|No such|cannot read|nowhere"),
    (["train", "{data}", "{run}2", "--layer", "-1", *SMALL, "--k", "9"], "give the same recipe"), (["train", "{data}", "{run}", "--layer", "-1", *SMALL, "--lr", "0.5"], "another recipe|made otherwise"),
    (["train", "{data}", "{run}3", "--layer", "-1", *SMALL, "--streams", "3"], "cannot be cut"), (["evaluate", "{run}4", "{data}"], "run.json is missing"), (["export", "{run}5"], "run.json is missing")])
def test_an_error_is_one_line_and_status_1(finished, fake_teacher, monkeypatch, capsys, line, said):
    monkeypatch.setattr(teacher, "load_teacher", fake_teacher)
    line = [x.format(data=finished / "data", run=finished / "run") for x in line]
    assert main(line) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(said, error) and error.splitlines()[-1].startswith(f"kklip {line[0]}: ") and "Traceback" not in error


@pytest.mark.parametrize("command", ["embed", "cluster", "train"])
@pytest.mark.parametrize("setting", ["--epochs 0", "--k 0", "--batch-size 1", "--lr -1", "--temperature 0", "--prompt none"])
def test_an_impossible_setting_is_an_error_before_any_work(command, setting, monkeypatch, capsys, tmp_path):
    def work(*args): raise AssertionError("work was done")
    monkeypatch.setattr(cli.COMMANDS[command], "__call__", work)
    assert main([command, str(tmp_path), *(["run"] if command == "train" else []), *setting.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"kklip {command}: ") and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def raised(function):
    try: function()
    except Exception as error: return error


def test_only_what_this_package_raises_on_purpose_is_the_users():
    from kklip_nb.own_pairs import read_image
    from kklip_nb.tools import check_found
    def disk(number): raise OSError(number, os.strerror(number))
    assert message(raised(lambda: read_image("no-such-file", 8))) and message(raised(lambda: check_found("x", {}, dict(a=1), "mend it")))
    assert message(raised(lambda: disk(errno.ENOSPC))) and message(raised(lambda: disk(errno.EACCES)))
    inside = {"__name__": "kklip_nb.made_up"}  # a module of ours with bugs
    exec("import torch\ndef parse(): int('x')\ndef shapes(): torch.ones(2, 3) @ torch.ones(2, 3)\ndef key(): return {}['x']\ndef sure(): assert False\n"
         "def kind(): raise TypeError('a bug')\ndef ours():\n    try: int('x')\n    except ValueError as error: raise ValueError('give a number') from error", inside)
    assert message(raised(inside["ours"]))
    for bug in ("parse", "shapes", "key", "sure", "kind"): assert not message(raised(inside[bug])), bug
    for other in (lambda: int("x"), lambda: disk(errno.EIO), lambda: torch.nn.Linear(2, 2)(torch.ones(3))): assert not message(raised(other))


def test_an_error_in_a_loader_process_is_told_apart_as_well():
    "torch raises it again in the main process, with its traceback as text."
    from torch.utils.data import DataLoader
    class Rows(torch.utils.data.Dataset):
        def __init__(self, bug): self.bug = bug
        def __len__(self): return 1
        def __getitem__(self, i):
            from kklip_nb.own_pairs import read_image
            return int("x") if self.bug else read_image("no-such-file", 8)
    found = [raised(lambda bug=bug: list(DataLoader(Rows(bug), num_workers=1))) for bug in (False, True)]
    assert [bool(message(error)) for error in found] == [True, False]
    assert message(found[0]) == "no image no-such-file"


def test_a_raise_over_several_lines_in_a_loader_process_is_the_users():
    "Python 3.13 shows the whole statement."
    text = ('Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "/x/torch/fetch.py", line 1, in fetch\n    data = rows[i]\n'
            '           ~~~~^^^\n  File "/x/kklip_nb/data.py", line 2, in read\n    raise ValueError(f"no {name}; "\n                     "give a file")\n')
    def worker(said): raise RuntimeError(said)
    assert message(raised(lambda: worker(text + "ValueError: no x; give a file\n"))) == "no x; give a file"
    deeper = text + '  File "/x/torch/nn.py", line 3, in forward\n    raise ValueError("x")\n'
    assert message(raised(lambda: worker(deeper + "ValueError: x\n"))) is None


def test_a_bug_keeps_its_traceback_with_the_rank_in_front(monkeypatch, capsys):
    def bug(self, recipe): return {}["missing"]
    monkeypatch.setattr(cli.Cluster, "__call__", bug)
    assert main(["cluster", "data"]) == 1
    assert capsys.readouterr().err.startswith("Traceback")
    monkeypatch.setenv("RANK", "3")
    assert main(["cluster", "data"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("[rank 3] ") for line in lines) and lines[0].endswith("Traceback (most recent call last):") and "KeyError" in lines[-1]


def test_a_users_error_says_the_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["cluster", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("[rank 1] kklip cluster: ")


def test_full_disk_is_named(finished, monkeypatch, capsys, tmp_path):
    from kklip_nb.scale import export
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(export, "save_file", full)
    assert main(["train", str(finished / "data"), str(tmp_path / "run"), "--layer", "-1", *SMALL]) == 1
    assert "free some space, run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["train", str(finished / "data"), str(tmp_path / "run"), "--layer", "-1", *SMALL]) == 0


def test_interrupted_is_said_and_kept(monkeypatch, capsys):
    def stop(self, recipe): raise KeyboardInterrupt
    monkeypatch.setattr(cli.Cluster, "__call__", stop)
    assert main(["cluster", "data"]) == 130 and "run the same command again" in capsys.readouterr().err


def test_a_refused_training_leaves_the_runs_papers_alone(finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    before = (run / "run.json").read_bytes()
    assert main(["train", str(finished / "data"), str(run), "--layer", "-1", *SMALL, "--lr", "0.5"]) == 1
    assert (run / "run.json").read_bytes() == before


def test_workers_share_the_shards(finished, fake_teacher, monkeypatch, tmp_path):
    shutil.copytree(finished / "data" / "shards", tmp_path / "data" / "shards")
    monkeypatch.setattr(teacher, "load_teacher", fake_teacher)
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


def test_hostile_model_folder_runs_no_code(tmp_path):
    "A teacher's folder that asks for code of its own is refused, and the code is not run."
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"})))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\nclass EvilModel: pass\n")
    with pytest.raises(ValueError, match="cannot load teacher"): teacher.load_teacher(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_the_damage_table_names_tests_that_are_there():
    here = Path(__file__).parent
    table = next(c for c in json.loads((here.parent / "nbs" / "scale" / "09_command_line.ipynb").read_text())["cells"] if "## When something is broken" in "".join(c["source"]))
    named, defined = set(re.findall(r"`(test_\w+)`", "".join(table["source"]))), set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in here.glob("test_*.py")), re.M))
    assert len(named) > 40 and named <= defined, named - defined


def test_each_worker_of_a_machine_takes_its_own_gpu(finished, fake_teacher, monkeypatch):
    asked = []
    monkeypatch.setattr(teacher, "load_teacher", lambda name, device, dtype: asked.append(device) or fake_teacher(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert main(["embed", str(finished / "data"), "--layer", "-1"]) == 0 and asked == ["cuda:3"]


PICTURE = object()


@pytest.mark.parametrize("rows, said", [
    ([dict(image=PICTURE, text="a")], "row 0 of someone/pictures has no column 'caption'"), ([dict(image=PICTURE, caption="a"), dict(image=PICTURE, caption=["a", "b"])], "row 1 .* is a list; expected one text"),
    ([dict(image=PICTURE, caption=3)], "row 0 .*'caption' is a int"), ([dict(image=PICTURE, caption=None)], "row 0 .*'caption' is a NoneType.*drop the row"),
    ([dict(image=None, caption="a")], "row 0 .*no picture in 'image'"), ([dict(image=PICTURE, caption="\ud83d")], "row 0 .*half a character")])
def test_a_hub_data_set_of_another_kind_is_an_error(monkeypatch, rows, said, tmp_path, capsys):
    import datasets
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter(rows))
    with pytest.raises(ValueError, match=said): list(cli.hub_pairs("someone/pictures"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter(rows[-1:]))
    assert main(["shards", "hub:someone/pictures", str(tmp_path)]) == 1 and len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1


def test_a_hub_data_set_is_streamed_pair_by_pair(monkeypatch):
    import datasets
    asked = []
    rows = [dict(file=f"picture {i}", image="no", text=f"text {i}", caption="no") for i in range(3)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: asked.append((args, how)) or iter(rows))
    assert list(cli.hub_pairs("me/set", "test", "file", "text")) == [(f"picture {i}", f"text {i}") for i in range(3)]
    assert asked == [(("me/set",), dict(split="test", streaming=True))]


@pytest.mark.parametrize("error", [ValueError("Bad split: tset. Available splits: ['train']"), FileNotFoundError("no such set"), ConnectionError("no net"), RuntimeError("scripts are no longer supported")])
def test_a_hub_that_says_no_is_one_line(monkeypatch, error, tmp_path, capsys):
    import datasets
    def refuse(*args, **how): raise error
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert main(["shards", "hub:me/set", str(tmp_path), "--split", "tset"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"kklip shards: cannot open 'me/set', split 'tset', on the hub: {error}"


@pytest.mark.parametrize("table, text, said", [
    ("captions.csv", "image,caption\na.png,fine\nb.png\n", "row 1 of .*'caption' is a NoneType"), ("t.jsonl", '{"image": "a.png", "caption": 3}', "row 0 of .*'caption' is a int"),
    ("t.jsonl", '{"image": "a.png", "caption": "\\ud83d"}', "half a character"), ("captions.csv", "picture,caption\na.png,fine\n", "no column 'image'"),
    ("captions.csv", "image,caption\n../a.png,x\n", "leads out of"), ("captions.csv", "image,caption\n,x\n", "row 0 names no image")])
def test_a_table_of_another_kind_is_an_error(tmp_path, table, text, said, capsys):
    (tmp_path / table).write_text(text)
    with pytest.raises(ValueError, match=said): list(cli.folder_pairs(tmp_path, table))
    assert main(["shards", str(tmp_path), str(tmp_path / "data"), "--table", table]) == 1 and "Traceback" not in capsys.readouterr().err


def test_a_folder_s_pairs_are_read_from_the_named_columns(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption,file,text\nno.png,no,a.png,{braces} 50 %\nno.png,no,b/c.png,<b> $x$ ü\n", encoding="utf-8")
    assert list(cli.folder_pairs(str(tmp_path), image_column="file", caption_column="text")) == [(tmp_path / "a.png", "{braces} 50 %"), (tmp_path / "b/c.png", "<b> $x$ ü")]


# --- embeddings and concepts of another recipe

def data_of(**changes):
    "An opened data folder, as far as check_agrees reads it."
    recipe = dict(pooling="last", layer="-1", prompt="{}", k="4", normalise="unit", teacher="smollm2 sha256:0")
    return SimpleNamespace(concepts=SimpleNamespace(meta=recipe | changes))


AGREED = dataclasses.replace(LAPTOP, pooling="last", layer=-1, prompt="{}", k=4, normalise="unit")


@pytest.mark.parametrize("field, value", [("pooling", "mean"), ("layer", 1), ("prompt", "a {}"), ("k", 5), ("normalise", "raw"), ("teacher", "gpt2")])
def test_a_recipe_that_the_data_were_not_made_with_is_refused(field, value):
    cli.check_agrees(AGREED, data_of())
    cli.check_agrees(dataclasses.replace(AGREED, teacher="mine"), data_of(teacher="mine"))  # embedded from Python, under a name of one's own
    with pytest.raises(ValueError, match=f"'{field}': .*{value}.*give the same recipe"): cli.check_agrees(dataclasses.replace(AGREED, **{field: value}), data_of())
    cli.check_agrees(dataclasses.replace(AGREED, **{field: value}), data_of(**{field: f"{value} commit:0 bfloat16" if field == "teacher" else str(value)}))


def test_a_folder_called_like_a_teacher_switches_off_no_check(tmp_path, monkeypatch):
    import hashlib
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2", "gpt2", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    digest, theirs = (hashlib.sha256(("config.json" + hashlib.sha256(name).hexdigest()).encode()).hexdigest() for name in (b"mine", b"smollm2"))
    for recorded, asked, fits in (
            ("smollm2 sha256:0", "smollm2", True), ("gpt2 commit:1", "smollm2", False), (f"folder sha256:{digest}", "smollm2", False), (f"folder sha256:{theirs}", "smollm2", False),  # 'smollm2' is always the packaged one
            ("gpt2 commit:1", "gpt2", True), ("smollm2 sha256:0", "gpt2", False), (f"folder sha256:{digest}", "gpt2", False),
            (f"folder sha256:{digest}", "mine", True), (f"folder sha256:{digest} bfloat16", str(tmp_path / "mine"), True), (f"folder sha256:{theirs}", "./smollm2", True), ("smollm2 sha256:0", "mine", False), (f"folder sha256:{digest}", "not-here", False)):
        recipe = dataclasses.replace(AGREED, teacher=asked)
        if fits: cli.check_agrees(recipe, data_of(teacher=recorded)); continue
        with pytest.raises(ValueError, match="'teacher'.*give the same recipe"): cli.check_agrees(recipe, data_of(teacher=recorded))
    (tmp_path / "mine" / "config.json").write_text("changed")
    with pytest.raises(ValueError, match="'teacher'"): cli.check_agrees(dataclasses.replace(AGREED, teacher="mine"), data_of(teacher=f"folder sha256:{digest}"))


# --- what is printed, and what is in the way

def test_scores_are_printed_in_percent_but_for_ranks(monkeypatch, capsys):
    from kklip_nb.scale import export, shards
    asked = []
    monkeypatch.setattr(shards, "list_shards", lambda where: [f"{where}/0.tar"])
    monkeypatch.setattr(export, "evaluate_run", lambda *args: asked.append(args) or {"i2t_r1": 0.125, "t2i_median_rank": 3.5})
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["evaluate", "run", "."]) == 0 and asked[0][2] == "tests"  # a dot has a name, too
    assert capsys.readouterr().out.splitlines() == ["i2t_r1                12.5 %", "t2i_median_rank         3.5"]


def test_what_a_stage_has_done_is_said(finished, capsys, fake_teacher, monkeypatch):
    monkeypatch.setattr(teacher, "load_teacher", fake_teacher)
    assert main(["embed", str(finished / "data"), "--layer", "-1"]) == main(["cluster", str(finished / "data"), "--layer", "-1", "--k", "4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("worker 0 of 1: 0 shards, 0 captions embedded, 0 samples skipped; in ") and said[1].startswith("4 concepts of 40 captions; in ")


def test_a_file_where_a_folder_belongs_is_named(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(["train", str(finished / "data"), str(run), "--layer", "-1", *SMALL]) == 1
        error = capsys.readouterr().err.strip()
        assert str(run) in error and error.endswith(("expected a folder there", "give a folder")) and len(error.splitlines()) == 1
    assert message(IsADirectoryError(errno.EISDIR, "Is a directory", "log.csv")).endswith("'log.csv'; expected a file there")


@pytest.mark.parametrize("content", [None, b"{", b"{}"])
def test_a_run_s_damaged_papers_are_written_again(finished, tmp_path, content):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    before = json.loads((run / "run.json").read_text())
    (run / "run.json").unlink() if content is None else (run / "run.json").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kklip_nb.scale.long_run.train_shards", lambda *args, **how: None)
        assert main(["train", str(finished / "data"), str(run), "--layer", "-1", *SMALL]) == 0
    assert json.loads((run / "run.json").read_text()) == before
