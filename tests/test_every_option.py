"""Every option of every command, and every field of recipe and settings: changed, it arrives where it acts, and nothing else changes."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from little_shards import ALONE, RECIPE, data, folder  # noqa: F401

from kklip_nb import teacher
from kklip_nb.scale import clustering, distributed, embeddings, export, loader, long_run, rehearsal, shards
from kklip_nb.scale import command_line as cli
from kklip_nb.scale.distributed import World, start_student
from kklip_nb.scale.long_run import Settings, train_shards
from kklip_nb.training import LAPTOP, Recipe

FIELDS = dict(  # of the recipe: a value that neither recipe has
    student="kklip-other", pretrained="tag", imagenet=False, train_image="last", teacher="gpt2", pooling="mean", layer=7, prompt="A {}:", k=5, normalise="raw",
    projection="mlp", concept_on="text", temperature=0.5, alpha=3.0, beta=0.25, gamma=0.5, epochs=3, batch_size=16, lr=0.01, weight_decay=0.3, warmup=5, seed=9)
SETTINGS = dict(streams=6, accumulate=True, precision="fp16", grad_checkpointing=True, compile=True, max_norm=0.5, augment=False,
                save_every=3, keep=2, eval_every=4, workers=5, tensorboard=True)
USUAL = dict(streams=1, accumulate=False, precision="auto", grad_checkpointing=False, compile=False, max_norm=None, augment=True,
             save_every=200, keep=3, eval_every=1000, workers=2, tensorboard=False)
WORDS = ("words", "word_table", "first_steps", "first_batch", "first_lr")  # fields that shards do not have
FOLDER = Path("data")


def given(name: str, value: object) -> list[str]:
    "An option as it is typed."
    option = name.replace("_", "-")
    return [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]


class Calls(dict):
    "What reached which argument of which function: the calls that are replaced leave no other trace."

    def replace(self, patch, module, name: str, result=None) -> None:
        how = inspect.signature(getattr(module, name))
        def called(*args, **kwargs):
            bound = how.bind(*args, **kwargs)
            bound.apply_defaults()
            for parameter, value in bound.arguments.items(): self.note(f"{name}.{parameter}", value)
            return result(*args, **kwargs) if inspect.isfunction(result) else result
        patch.setattr(module, name, called)

    def note(self, place: str, value: object) -> None:
        if isinstance(value, Recipe): value = dataclasses.asdict(value)
        if isinstance(value, Mapping):
            for k, v in value.items(): self.note(f"{place}.{k}", v)
        elif not isinstance(value, partial): self[place] = value


def what_arrives(line: list, patch) -> Calls:
    "Run a command with every worker replaced."
    calls = Calls()
    def one_caption(urls, folder, embed, *args, **how):
        embed(["a caption"])
        return dict(shards=0, captions=0, skipped=0)
    @contextmanager
    def world(): yield World(*distributed._places()[:2], torch.device("cpu"))
    sidecar = SimpleNamespace(shape=(3, 4))
    patch.setattr(distributed, "start_world", world)
    patch.setattr(export, "write_json", lambda path, facts: calls.note("write_json.path", path))
    patch.setattr(long_run, "list_checkpoints", lambda run: [])
    patch.setattr(torch.cuda, "is_available", lambda: False)
    for module, name, result in (
            (shards, "list_shards", lambda where: [f"{where}/0.tar"]), (shards, "write_shards", ["0.tar"]), (cli, "folder_pairs", "folder"), (cli, "hub_pairs", "hub"),
            (teacher, "load_teacher", SimpleNamespace(source="SOURCE")), (teacher, "embed_captions", None), (embeddings, "embed_shards", one_caption),
            (embeddings, "open_sidecars", [sidecar]), (clustering, "cluster_shards", None), (loader, "open_data", "DATA"), (cli, "check_agrees", None),
            (shards, "run_lock", contextmanager(lambda path, wait=0: (yield))), (export, "describe_run", {}), (long_run, "train_shards", None), (export, "export_run", Path("model")),
            (rehearsal, "rehearse", []), (rehearsal, "report_rehearsal", None), (export, "evaluate_run", {"i2t_r1": 0.5, "t2i_median_rank": 3.0})):
        calls.replace(patch, module, name, result)
    assert cli.main([str(x) for x in line]) == 0
    return calls


@pytest.fixture
def arrives(monkeypatch):
    "A function: a command line → what arrives where."
    def run(*line):
        with pytest.MonkeyPatch.context() as patch: return what_arrives(line, patch)
    return run


def recipe_of(calls: Calls, place: str) -> dict:
    return {k.removeprefix(f"{place}."): v for k, v in calls.items() if k.startswith(f"{place}.")}


# command and its places; for each of its own options: how it is typed, and what is then otherwise
LINES = {
    "shards": (["photos", "data"], dict(
        table=("t.jsonl", {"folder_pairs.table": "t.jsonl"}), split=("test", {}), image_column=("file", {"folder_pairs.image_column": "file"}),
        caption_column=("text", {"folder_pairs.caption_column": "text"}), per_shard=(7, {"write_shards.per_shard": 7}), size=(32, {"write_shards.size": 32}))),
    "shards of the hub": (["hub:me/set", "data"], dict(
        table=("t.jsonl", {}), split=("test", {"hub_pairs.split": "test"}), image_column=("file", {"hub_pairs.image_column": "file"}),
        caption_column=("text", {"hub_pairs.caption_column": "text"}), per_shard=(7, {"write_shards.per_shard": 7}), size=(32, {"write_shards.size": 32}))),
    "embed": (["data"], dict(
        shards=("else", {"list_shards.where": "else", "embed_shards.urls": ["else/0.tar"]}), recipe=("laptop", {}), device=("cuda:1", {"load_teacher.device": "cuda:1"}),
        dtype=("bfloat16", {"load_teacher.dtype": torch.bfloat16}), tokens_per_batch=(99, {"embed_captions.tokens_per_batch": 99}), max_skipped=(0.25, {"embed_shards.max_skipped": 0.25}))),
    "cluster": (["data"], dict(
        shards=("else", {"list_shards.where": "else", "open_sidecars.shards": ["else/0.tar"]}), recipe=("laptop", {}),
        passes=(5, {"cluster_shards.passes": 5}), rows=(77, {"cluster_shards.rows": 77}))),
    "train": (["data", "run"], dict(
        shards=("else", {"list_shards.where": "else", "open_data.urls": ["else/0.tar"]}), recipe=("laptop", {}), dry_run=(False, {}), pairs=(9, {}),
        eval_shards=("held", {"train_shards.held_out": ["held/0.tar"]}))),
    "train, rehearsed": (["data", "run", "--dry-run"], dict(
        shards=("else", {"rehearse.shards": "else"}), recipe=("laptop", {}), dry_run=(True, {}), pairs=(9, {"rehearse.pairs": 9}), eval_shards=("held", {}))),
    "export": (["run"], dict(checkpoint=("c.safetensors", {"export_run.checkpoint": Path("c.safetensors")}))),
    "evaluate": (["run", "data"], dict(
        shards=("else", {"list_shards.where": "else", "evaluate_run.urls": ["else/0.tar"], "evaluate_run.name": "else"}), limit=(8, {"evaluate_run.limit": 8}))),
}
METHOD = {  # where the recipe's fields act
    "embed": dict(teacher=["load_teacher.name"], pooling=["embed_captions.pooling", "embed_shards.provenance.pooling"],
                  layer=["embed_captions.layer", "embed_shards.provenance.layer"], prompt=["embed_captions.prompt", "embed_shards.provenance.prompt"]),
    "cluster": {f: [f"cluster_shards.{f}"] for f in ("k", "seed", "normalise")},
    "train": {f: [f"{w}.recipe.{f}" for w in ("check_agrees", "describe_run", "train_shards")] for f in FIELDS},
    "train, rehearsed": {f: [f"rehearse.recipe.{f}"] for f in FIELDS},
}
REHEARSED = dict(precision={"rehearse.precision": "fp16"}, keep={"rehearse.keep": 2})


def options_of(name: str) -> dict:
    "Each option of a command: how it is typed, and what is then otherwise."
    places, own = LINES[name]
    options = {o: (given(o, value), changed) for o, (value, changed) in own.items()}
    if name in METHOD:
        options |= {f: (given(f, v), dict.fromkeys(METHOD[name].get(f, []), v)) for f, v in FIELDS.items()}
    if name == "train":
        for o, v in SETTINGS.items(): options[o] = given(o, v), {f"train_shards.settings.{o}": v, f"describe_run.settings.{o}": v}
    if name == "train, rehearsed":
        for o, v in SETTINGS.items(): options[o] = given(o, v), REHEARSED.get(o, {})
    together = lambda some: ([x for typed, _ in some for x in typed], {k: v for _, changed in some for k, v in changed.items()})
    inert = [o for o, (_, changed) in options.items() if not changed or name == "train, rehearsed" and o in FIELDS]  # in one line: reading it takes longest
    return {o: x for o, x in options.items() if o not in inert} | dict(inert=together([options[o] for o in inert]))


def test_each_option_and_each_field_is_in_the_tables():
    "A new one without an entry fails here."
    assert FIELDS.keys() == {f.name for f in dataclasses.fields(Recipe)} - {*WORDS}
    assert SETTINGS.keys() == {f.name for f in dataclasses.fields(Settings)} == USUAL.keys()
    assert {name.split(",")[0].split(" ")[0] for name in LINES} == cli.COMMANDS.keys()
    for name, (places, own) in LINES.items():
        fields = dataclasses.fields(cli.COMMANDS[name.split(",")[0].split(" ")[0]])
        assert [f.name for f in fields if f.default is dataclasses.MISSING] == (["source", "data"] if "shards" in name else [p for p in places if p[0] != "-"])
        assert {f.name for f in fields if f.default is not dataclasses.MISSING} == own.keys(), name


@pytest.mark.parametrize("name", LINES)
def test_an_option_arrives_where_it_acts_and_changes_nothing_else(name, arrives):
    command, places = name.split(",")[0].split(" ")[0], LINES[name][0]
    usual = arrives(command, *places)
    for typed, changed in options_of(name).values():
        found = arrives(command, *places, *typed)
        otherwise = {k: found.get(k) for k in {*found, *usual} if k not in found or k not in usual or found[k] != usual[k]}
        expected = {k: Path(v) if isinstance(otherwise.get(k), Path) else v for k, v in changed.items()}
        assert otherwise == expected, f"{command} {typed}: {otherwise}"
        for k, v in expected.items(): assert type(otherwise[k]) is type(v), (typed, k)


def test_without_options_the_usual_arrives(arrives):
    d = FOLDER
    assert arrives("shards", "photos", d) == {
        "folder_pairs.folder": "photos", "folder_pairs.table": "captions.csv", "folder_pairs.image_column": "image", "folder_pairs.caption_column": "caption",
        "write_shards.pairs": "folder", "write_shards.folder": d / "shards", "write_shards.per_shard": 1000, "write_shards.size": 256, "write_shards.progress": True}
    hub = arrives("shards", "hub:me/set", d)
    assert recipe_of(hub, "hub_pairs") == dict(name="me/set", split="train", image_column="image", caption_column="caption") and hub["write_shards.pairs"] == "hub"
    how = dict(pooling="last", layer=29, prompt='This image shows: "{}" in one word: "')
    embed = arrives("embed", d)
    assert recipe_of(embed, "load_teacher") == dict(name="smollm2", device="cpu", dtype=torch.float32)
    assert recipe_of(embed, "embed_captions") == how | dict(teacher=SimpleNamespace(source="SOURCE"), captions=["a caption"], tokens_per_batch=512, progress=False)
    assert {k: v for k, v in recipe_of(embed, "embed_shards").items() } == dict(
        urls=["data/shards/0.tar"], folder=d / "embeddings", rank=0, world_size=1, max_skipped=0.01, progress=True) | {f"provenance.{k}": v for k, v in (how | dict(teacher="SOURCE")).items()}
    cluster = arrives("cluster", d)
    assert recipe_of(cluster, "open_sidecars") == dict(folder=d / "embeddings", shards=["data/shards/0.tar"])
    assert {k: v for k, v in recipe_of(cluster, "cluster_shards").items() if k != "sidecars"} == dict(
        folder=d / "concepts", k=48, seed=0, normalise="unit", passes=2, rows=4096, save_every=60, progress=True)
    evaluate = arrives("evaluate", "run", "here/data")
    assert recipe_of(evaluate, "evaluate_run") == dict(run=Path("run"), urls=["here/data/shards/0.tar"], name="data", limit=5000, device="cpu")
    assert arrives("export", "run") == {"export_run.run": Path("run"), "export_run.checkpoint": None}


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_both_recipes_arrive_in_all_stages(name, arrives):
    paper = dict(student="ViT-B-32-quickgelu", pretrained="openai", imagenet=False, train_image="all", layer=-1, teacher="meta-llama/Llama-2-7b-hf", k=1000,
                 alpha=1.0, beta=0.01, epochs=100, batch_size=1024, lr=5e-5, warmup=1000)
    wanted = dataclasses.asdict(LAPTOP) | dict(word_table=False, words=0, first_steps=0) | (paper if name == "paper" else {})
    train = arrives("train", "data", "run", "--recipe", name)
    for place in ("check_agrees", "describe_run", "train_shards"): assert recipe_of(train, f"{place}.recipe") == wanted
    for place in ("describe_run", "train_shards"): assert recipe_of(train, f"{place}.settings") == USUAL
    assert train["write_json.path"] == Path("run/run.json") and train["train_shards.folder"] == train["export_run.run"] == Path("run") and train["train_shards.held_out"] == []
    assert recipe_of(train, "open_data") == dict(urls=["data/shards/0.tar"], embeddings_folder=FOLDER / "embeddings", concepts_folder=FOLDER / "concepts")
    assert (train["train_shards.data"], train["train_shards.progress"], train["train_shards.world"]) == ("DATA", True, World(0, 1, torch.device("cpu")))
    embed, cluster = (arrives(command, "data", f"--recipe={name}") for command in ("embed", "cluster"))
    assert (embed["load_teacher.name"], embed["embed_captions.layer"], cluster["cluster_shards.k"]) == (wanted["teacher"], wanted["layer"], wanted["k"])
    dry = arrives("train", "data", "run", "--dry-run", "--recipe", name)
    assert recipe_of(dry, "rehearse.recipe") == wanted and "train_shards.data" not in dry
    assert {k: v for k, v in recipe_of(dry, "rehearse").items() if "." not in k} == dict(data=FOLDER, shards=None, pairs=500_000, precision="auto", keep=3)


@pytest.mark.parametrize("line, place, value", [
    ("train data run --pretrained none --recipe paper", "train_shards.recipe.pretrained", None), ("train data run --max-norm none", "train_shards.settings.max_norm", None),
    ("train data run --shards=none --max_norm=none", "open_data.urls", ["data/shards/0.tar"]), ("export run --checkpoint none", "export_run.checkpoint", None),
    ("embed data --device none", "load_teacher.device", "cpu"), ("embed none", "embed_shards.folder", Path("none/embeddings")),
    ("train data run --student none", "train_shards.recipe.student", "none"), ("train data run --student=none", "train_shards.recipe.student", "none")])
def test_none_is_none_where_an_option_may_be(arrives, line, place, value):
    found = arrives(*line.split())[place]
    assert found == value and type(found) is type(value)


def test_the_help_states_the_defaults_that_arrive(capsys):
    recipe = dataclasses.asdict(LAPTOP)
    for name in ("shards", "embed", "cluster", "train", "export", "evaluate"):
        with pytest.raises(SystemExit): cli.main([name, "--help"])
        text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
        command = cli.COMMANDS[name]
        stated = {f.name: f.default for f in dataclasses.fields(command) if f.default is not dataclasses.MISSING}
        stated |= {f: recipe[f] for f in FIELDS} if name in METHOD else {}
        stated |= USUAL if name == "train" else {}
        for option, default in stated.items():
            entry = [part for part in text.split(f" --{option.replace('_', '-')}")[1:] if part[0] in " ,"][-1]
            assert re.search(r"\(default: ([^)]*)\)", entry)[1] in (str(default), repr(default)), (name, option, entry)


def test_processes_are_told_by_the_environment(arrives, monkeypatch):
    for name, value in dict(RANK=2, WORLD_SIZE=4, LOCAL_RANK=1).items(): monkeypatch.setenv(name, str(value))
    found = arrives("embed", "data")
    assert (found["embed_shards.rank"], found["embed_shards.world_size"], found["load_teacher.device"]) == (2, 4, "cpu")
    train = arrives("train", "data", "run")
    assert train["train_shards.world"][:2] == (2, 4) and train["train_shards.settings.streams"] == 4  # one a process
    assert not {"write_json.path", "export_run.run", "check_agrees.recipe.k"} & {*train}  # which the first process does
    assert arrives("train", "data", "run", "--streams", "8")["train_shards.settings.streams"] == 8
    monkeypatch.setenv("RANK", "0")
    assert {"write_json.path", "export_run.run", "check_agrees.recipe.k"} <= {*arrives("train", "data", "run")}


@pytest.mark.parametrize("name, value", [("RANK", "x"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "-1"), ("WORLD_SIZE", "0"), ("RANK", "1")])
@pytest.mark.parametrize("command", ["embed data", "train data run"])
def test_an_environment_that_makes_no_sense_is_named(name, value, command, monkeypatch, capsys):
    if name == "LOCAL_RANK" and "train" in command: monkeypatch.setattr(loader, "open_data", None)  # nothing is read before
    monkeypatch.setenv(name, value)
    assert cli.main(command.split()) == 1
    assert re.search(f"kklip {command.split()[0]}: {name}={value!r}; expected a whole|RANK={value or 0} of WORLD_SIZE|RANK=0 of WORLD_SIZE={value}", capsys.readouterr().err)


# --- one level deeper: what train_shards does with recipe and settings

OWN = (".folder", ".student", ".optimizer", ".scaler", ".world", ".centroids", ".data", ".state", "keep_checkpoint.steps", ".parts", ".step")  # of each call, or the same in all


def inside(data, tmp_path, recipe: Recipe, **settings) -> Calls:
    "train_shards with its workers replaced: no picture is read, no step is taken."
    calls, student = Calls(), SimpleNamespace(clip=SimpleNamespace(logit_scale=torch.ones(())), logit_scale=torch.ones(()), modules=lambda: [])
    losses = dict.fromkeys(("total", "distillation", "concept", "contrastive", "gradient_norm"), 1.0)
    def steps(student, data, recipe, streams, **how): return iter([[SimpleNamespace(epoch=0)] * 2] * (recipe.epochs * loader.epoch_steps(data, recipe, streams)))
    def group_of(parts, *args): return len(parts)
    saved, scored = [], []
    def save(folder, keep, steps, *state): saved.append(steps)
    def score(*args): return scored.append(1) or {}
    with pytest.MonkeyPatch.context() as patch:
        for name, result in (("start_student", student), ("make_optimizer", None), ("read_steps", steps), ("to_batch", group_of), ("global_step", losses), ("wrap", "MODEL"),
                             ("learning_rate", 0.5), ("resume", dict(step=-1, skipped=0)), ("keep_checkpoint", save), ("evaluate_shards", score), ("check_held_out", None), ("_board", None)):
            calls.replace(patch, long_run, name, result)
        patch.setattr(torch.amp, "GradScaler", lambda device, init_scale, enabled: calls.note("GradScaler.enabled", enabled) or SimpleNamespace(state_dict=lambda: {}))
        train_shards(recipe, data, tmp_path / f"run{len(list(tmp_path.iterdir()))}", ALONE, ["held/0.tar"], **settings)
    return Calls({k: v for k, v in calls.items() if ".recipe." in k or not k.endswith(OWN)}, saved=saved, scored=len(scored), parts=len(calls["to_batch.parts"]))


SMALL = dict(USUAL, streams=2, workers=0)
WITHIN = {  # what is otherwise inside train_shards, beside the recipe that is handed on
    "lr": {"make_optimizer.lr": 0.01, "learning_rate.peak": 0.01}, "weight_decay": {"make_optimizer.weight_decay": 0.3}, "warmup": {"learning_rate.warmup": 5},
    "temperature": {"to_batch.temperature": 0.5}, "epochs": {"learning_rate.steps": 12, "saved": [12]}, "batch_size": {"learning_rate.steps": 10, "saved": [10]},
    "streams": {"read_steps.streams": 6, "resume.meta.streams": 6}, "accumulate": {"global_step.micro_batches": [1, 1], "parts": 1}, "grad_checkpointing": {"start_student.grad_checkpointing": True},
    "compile": {"start_student.compile": True}, "max_norm": {"global_step.max_norm": 0.5, "resume.meta.max_norm": 0.5}, "augment": {"read_steps.augment": False, "resume.meta.augment": False},
    "precision": {"global_step.precision": "fp16", "resume.meta.precision": "fp16", "GradScaler.enabled": True}, "workers": {"read_steps.workers": 5},
    "keep": {"keep_checkpoint.keep": 2}, "tensorboard": {"_board.steps": 0}, "save_every": {"saved": [3, 6, 8]}, "eval_every": {"scored": 2},
}
HANDED_ON = ("start_student", "read_steps", "global_step", "wrap", "resume")


@pytest.mark.parametrize("name", [*FIELDS, *SETTINGS])
def test_inside_the_run_each_field_arrives_where_it_acts(name, data, tmp_path):
    recipe, settings = dataclasses.replace(RECIPE, batch_size=24, warmup=3, lr=0.2, imagenet=True), SMALL
    usual = inside(data, tmp_path, recipe, **settings)
    if name in FIELDS: recipe, expected = dataclasses.replace(recipe, **{name: FIELDS[name]}), {f"{w}.recipe.{name}": FIELDS[name] for w in HANDED_ON}
    else: settings, expected = settings | {name: SETTINGS[name]}, {}
    found = inside(data, tmp_path, recipe, **settings)
    expected |= WITHIN.get(name, {})
    otherwise = {k: found.get(k) for k in {*found, *usual} if k not in found or k not in usual or found[k] != usual[k]}
    assert otherwise == expected


@pytest.fixture(scope="session")
def tiny(data):
    return distributed.build_student("kklip-tiny", None, 16, 4, False, "all")


@pytest.mark.parametrize("name", FIELDS)
def test_the_student_is_built_as_the_recipe_says(name, data, tiny):
    places = dict(student="name", pretrained="pretrained", imagenet="imagenet", train_image="train_image", seed="seed", projection="projection")
    real, found = tiny, []
    usual = dataclasses.replace(RECIPE, imagenet=True)
    for recipe, world in ((usual, ALONE), (dataclasses.replace(usual, **{name: FIELDS[name]}), World(1, 2, ALONE.device))):  # the same in all processes
        calls = Calls()
        with pytest.MonkeyPatch.context() as patch:
            calls.replace(patch, distributed, "build_student", real)
            assert start_student(recipe, data, world) is real
        found.append(calls)
    otherwise = {k: v for k, v in found[1].items() if found[0][k] != v}
    assert otherwise == ({f"build_student.{places[name]}": FIELDS[name]} if name in places else {})
    assert (calls["build_student.teacher_dim"], calls["build_student.n_concepts"]) == (16, 4)  # of the embeddings and of the concepts


# --- and what the rehearsal does with a recipe

REHEARSAL = dict(pooling=["embed_captions.pooling", "embed_shards.provenance.pooling"], prompt=["embed_captions.prompt", "embed_shards.provenance.prompt"],
                 k=["cluster_shards.k", "train_shards.recipe.k"], seed=["cluster_shards.seed", "train_shards.recipe.seed"], normalise=["cluster_shards.normalise", "train_shards.recipe.normalise"],
                 student=["export_model.name", "train_shards.recipe.student"])
FIXED = dict(pretrained=None, imagenet=False, layer=-1, batch_size=8, epochs=1, warmup=1)  # whatever the recipe says: a short run without a download


def rehearsed(recipe: Recipe, folder: Path) -> Calls:
    calls = Calls()
    def embed(urls, folder, embed, *args, **how): embed([])
    with pytest.MonkeyPatch.context() as patch:
        for name, result in (("write_shards", None), ("list_shards", ["0.tar"]), ("random_teacher", SimpleNamespace(source="RANDOM")), ("embed_captions", None), ("embed_shards", embed), ("open_sidecars", "SIDECARS"),
                             ("cluster_shards", None), ("open_data", "DATA"), ("train_shards", "STUDENT"), ("export_model", "MODEL"), ("evaluate_export", lambda *args: ({"i2t_r1": 0.5}, 20))):
            calls.replace(patch, rehearsal, name, result)
        assert rehearsal.rehearse_stages(recipe, [(None, f"caption {i}") for i in range(20)], 48, folder) == {"i2t_r1": 0.5}
    return calls


@pytest.mark.parametrize("name", FIELDS)
def test_the_rehearsal_goes_through_the_stages_as_the_recipe_says(name, tmp_path):
    usual, recipe = dataclasses.replace(RECIPE, k=4), dataclasses.replace(RECIPE, **{name: FIELDS[name]})
    before, after = rehearsed(usual, tmp_path), rehearsed(recipe, tmp_path)
    expected = {} if name in FIXED else dict.fromkeys(REHEARSAL.get(name, [f"train_shards.recipe.{name}"]), FIELDS[name])
    if name in ("pooling", "prompt"): expected[f"train_shards.recipe.{name}"] = FIELDS[name]
    assert {k: v for k, v in after.items() if before[k] != v} == expected
    assert {k: after[f"train_shards.recipe.{k}"] for k in FIXED} == FIXED
    assert (after["embed_captions.layer"], after["random_teacher.width"], after["write_shards.per_shard"], after["train_shards.world"]) == (-1, 48, 20, ALONE)
    assert after["embed_shards.provenance.teacher"] == "RANDOM" and after["export_model.student"] == "STUDENT" and after["evaluate_export.folder"] == "MODEL"
    assert rehearsed(dataclasses.replace(RECIPE, k=999), tmp_path)["cluster_shards.k"] == 10  # a concept for two pairs at most
