"""Whole runs beside one written out by hand: every setting arrives where it acts and nowhere else, held-out rows move nothing that is fitted."""

import dataclasses
import inspect
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from sklearn.cluster import KMeans

from kklip_nb import student as student_module
from kklip_nb import training
from kklip_nb.data import Pairs, caption_batches
from kklip_nb.recipe import Recipe
from kklip_nb.student import WordTable
from kklip_nb.training import Material

N, D, WIDTH, SIZE, CONTEXT, VOCABULARY = 26, 24, 16, 16, 12, 80
ROWS = np.array([i for i in range(N) if i % 5 != 2])  # 21 training rows, all over the table
HELD_OUT = np.setdiff1d(np.arange(N), ROWS)
NAMES = ("dog", "Dog", "a red fire engine", "pizza", "two people walking along a very long road", "sun", "old house by the sea", "green apple", "octopus", "rocket at night")
CAPTIONS = [*NAMES, *(f"{name} number {i}" if i % 3 else f"{i} {name}" for i, name in zip(range(N), NAMES * 2) if i < N - len(NAMES))]
WORDS = ["house", "to walk", "green", "a slow old train", "sea", "night", "hope"]
PIXELS = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]).view(2, 3, 1, 1)  # OpenAI's mean and deviation
BASE = Recipe(student="tiny-run", imagenet=False, train_image="all", k=4, temperature=0.5, alpha=2.0, beta=0.5, gamma=1.5, words=7, first_steps=4, first_batch=11, first_lr=5e-3,
              epochs=3, batch_size=6, lr=2e-3, weight_decay=0.2, warmup=2)

# where each setting acts; `key` is always another
START, PAIRS = "start first", "parts total weights"
ACTS = dict(
    student=("tiny-run-wide", f"asked built {START} {PAIRS} first_key"), pretrained=("made in the test", f"asked built {START} {PAIRS} first_key"),
    imagenet=(True, "asked"), train_image=("head", "asked groups weights"), projection=("mlp", f"asked built groups {START} {PAIRS} first_key"),
    teacher=("gpt2", ""), pooling=("mean", ""), layer=(-1, ""), prompt=("{}", ""), words=(5, ""),  # of recordings, see below
    k=(5, f"asked built start centroids labels {PAIRS}"), normalise=("raw", f"targets centroids labels texts first {PAIRS} first_key"),
    temperature=(0.2, f"labels {PAIRS}"), concept_on=("image", PAIRS), alpha=(0.7, "total weights"), beta=(1.1, "total weights"), gamma=(0.9, "total weights"),
    word_table=(False, f"{START} {PAIRS} first_key"), first_steps=(3, f"first_rows first_rates first {PAIRS} first_key"),
    first_batch=(7, f"first_rows first {PAIRS} first_key"), first_lr=(1e-2, f"first_rates first {PAIRS} first_key"),
    epochs=(2, "order rates weights"), batch_size=(5, f"order rates {PAIRS}"), lr=(3e-3, "rates weights"),
    weight_decay=(0.4, f"groups first {PAIRS} first_key"), warmup=(3, f"first_rates first rates {PAIRS} first_key"),
    seed=(1, f"asked built {START} centroids labels first_rows order {PAIRS} first_key"))
ALL = {"key"}.union(*(kinds.split() for _, kinds in ACTS.values()))
FIRST = {"student", "pretrained", "word_table", "normalise", "projection", "first_steps", "first_batch", "first_lr", "weight_decay", "warmup", "seed"}


PIECES = {piece: i for i, piece in enumerate(sorted({p for text in [*CAPTIONS, *WORDS] for p in text.split()}), 1)}


def tokens_of(texts) -> torch.Tensor:
    "A tokeniser of few words; as in CLIP's, zeros stand behind the largest id, which ends a text."
    ids = [[PIECES.get(piece, VOCABULARY - 2) for piece in text.split()][:CONTEXT - 1] + [VOCABULARY - 1] for text in texts]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in ids])


def made_material() -> Material:
    "Noise with a mean, so that centring matters, and no clear clusters, so that seeds matter."
    rng = np.random.default_rng(5)
    pairs = Pairs(rng.integers(256, size=(N, SIZE, SIZE, 3), dtype=np.uint8), CAPTIONS, CAPTIONS, [None] * N, [None] * N)
    embeddings, words = ((rng.normal(size=(n, D)) * 3 + np.arange(D) / 4).astype(np.float32) for n in (N, len(WORDS)))
    ids = np.array([PIECES[piece] for piece in "dog pizza house sea to old green a".split()])
    return Material(pairs, embeddings, WORDS, words, WordTable(ids, rng.normal(size=(len(ids), WIDTH)).astype(np.float32)))


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "A cache that all runs share, two small models for open_clip, and pretrained weights of one."
    folder = tmp_path_factory.mktemp("whole")
    (folder / "configs").mkdir()
    for name, dim in (("tiny-run", 16), ("tiny-run-wide", 20)):
        model = dict(embed_dim=dim, vision_cfg=dict(image_size=SIZE, patch_size=8, width=32, head_width=16, layers=1),
                     text_cfg=dict(context_length=CONTEXT, vocab_size=VOCABULARY, width=WIDTH, heads=2, layers=1))
        (folder / "configs" / f"{name}.json").write_text(json.dumps(model))
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in dict(_MODEL_CONFIG_PATHS=list, _MODEL_CONFIGS=dict).items():  # other tests list open_clip's models
            patch.setattr(open_clip.factory, name, kind(getattr(open_clip.factory, name)))
        open_clip.add_model_config(folder / "configs")
        torch.manual_seed(77)
        torch.save(open_clip.create_model("tiny-run").state_dict(), folder / "pretrained.pt")
        patch.setenv("KKLIP_CACHE", str(folder / "cache"))
        patch.setattr(training, "tokenize", lambda student, texts: tokens_of(texts))
        patch.setattr(student_module, "_PIECES", VOCABULARY)  # of that toy tokeniser
        yield folder


def copied(module: torch.nn.Module) -> dict:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def watched(recipe: Recipe, material: Material, rows=ROWS) -> dict:
    "run_recipe in double precision, and what each of its steps was given and gave."
    seen = defaultdict(list)
    def note(name, given, result):
        if name == "make_targets": seen.update(targets=result[0], centroids=result[1].centroids, labels=result[2])
        if name == "build_student": seen.update(asked=dict(given), built=copied(result))
        if name == "prepare_inputs": seen["start"] = copied(given["student"])
        if name == "first_texts": seen["texts"] = result
        if name == "cached_first_stage": seen["first_key"] = given["key"]
        if name == "text_batches": seen["first_epochs"].append(result)
        if name == "caption_batches": seen["epochs"].append((given["seed"], result))
        if name == "make_optimizer":
            names = {id(p): n for n, p in given["student"].named_parameters()}
            seen["optimizer"].append([({names[id(p)] for p in g["params"]}, g["weight_decay"], g["betas"], g["eps"]) for g in result.param_groups])
        if name == "train_step": seen["batches"].append(given["batch"])
        if name == "optimizer_step": seen["used"].append([(g["lr"], g["weight_decay"]) for g in given["optimizer"].param_groups])
    def spy(name):
        real = getattr(training, name)
        def call(*args, **kwargs):
            given = inspect.signature(real).bind(*args, **kwargs)
            given.apply_defaults()
            result = real(*args, **kwargs)
            note(name, given.arguments, result)
            return result
        patch.setattr(training, name, call)
    real_images = training.image_inputs
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_targets", "build_student", "prepare_inputs", "first_texts", "cached_first_stage", "text_batches", "caption_batches", "make_optimizer", "train_step", "optimizer_step"): spy(name)
        patch.setattr(training, "image_inputs", lambda student, *args: real_images(student.double(), *args).double())
        run = training.run_recipe(recipe, material, rows)
    first = [(h["lr"], h["distillation"]) for h in run.first]
    parts = {k: run.history[0][k] for k in ("distillation", "concept", "contrastive")}
    ran = bool(seen["first_epochs"])
    return seen | dict(run=run, order=[b.captions for b in seen["batches"]], groups=seen["optimizer"][-1], first=first, parts=parts, total=run.history[0]["total"], weights=copied(run.student), ran=ran,
                       rates=[h["lr"] for h in run.history], first_rates=[h["lr"] for h in run.first], first_rows=[r for e in seen["first_epochs"] for r in e] if ran else None,
                       key=training.run_key(recipe, material, rows))


@pytest.fixture(scope="module")
def material():
    return made_material()


@pytest.fixture(scope="module")
def base(home, material):
    return watched(BASE, material)


def changed(field: str, home: Path) -> Recipe:
    value = str(home / "pretrained.pt") if field == "pretrained" else ACTS[field][0]
    return dataclasses.replace(BASE, **{field: value})


def same(a, b) -> bool:
    "Equal to the last bit, whatever it is made of; a loss up to the order of its sums."
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, float): return math.isclose(a, b, rel_tol=1e-12)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


# ---- a run written out by hand

def by_hand(recipe: Recipe, material: Material, rows, targets: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor) -> dict:
    "Both stages with torch's derivatives alone: the start, the losses of every step, the weights and features in the end."
    torch.manual_seed(recipe.seed)
    clip = open_clip.create_model(recipe.student, pretrained=recipe.pretrained)
    dim = clip.text_projection.shape[1]
    linear = torch.nn.Linear
    to_teacher = linear(dim, D) if recipe.projection == "linear" else torch.nn.Sequential(linear(dim, 64), torch.nn.ReLU(), linear(64, D))
    net = torch.nn.ModuleDict(dict(clip=clip, to_teacher=to_teacher, image_concepts=linear(dim, recipe.k), text_concepts=linear(dim, recipe.k))).double().train()
    built = copied(net)
    with torch.no_grad():
        if recipe.word_table:
            for i, vector in zip(material.word_table.ids, material.word_table.vectors): clip.token_embedding.weight[i] = torch.from_numpy(vector)
    start = copied(net)
    trained = {n: p for n, p in net.named_parameters() if recipe.train_image == "all" or "visual" not in n or n == "clip.visual.proj"}
    tokens, texts = tokens_of(material.pairs.captions), tokens_of([*material.words, *(material.pairs.captions[r] for r in rows)])
    images = (torch.from_numpy(material.pairs.images).permute(0, 3, 1, 2).float() / 255 - PIXELS[0]) / PIXELS[1]

    def adamw(memory, lr):
        "Loshchilov and Hutter's step, for each parameter that has a gradient."
        memory["t"] += 1
        with torch.no_grad():
            for name, p in trained.items():
                if p.grad is None: continue
                m, v = memory.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
                m.mul_(0.9).add_(p.grad, alpha=0.1); v.mul_(0.98).add_(p.grad ** 2, alpha=0.02)
                p.mul_(1 - lr * (recipe.weight_decay if p.ndim > 1 else 0))
                p.sub_(lr * (m / (1 - 0.9 ** memory["t"])) / ((v / (1 - 0.98 ** memory["t"])).sqrt() + 1e-6))
                p.grad = None

    def rate(step, steps, peak):
        return peak * (step + 1) / recipe.warmup if step < recipe.warmup else peak * (1 + math.cos(math.pi * (step - recipe.warmup) / (steps - recipe.warmup))) / 2

    def distance(text, wanted): return ((to_teacher(text / text.norm(dim=1, keepdim=True)) - wanted) ** 2).sum(1).mean()

    first, memory, first_rows = [], dict(t=0), []
    for epoch in range(9):  # words of like length together, in an order that seed and epoch fix
        random, lengths = np.random.default_rng([recipe.seed, epoch]), (texts != 0).sum(1).numpy()
        order = random.permutation(len(texts))
        order = order[np.argsort(lengths[order], kind="stable")]
        parts = np.array_split(order, -(-len(texts) // recipe.first_batch))
        first_rows += [parts[i] for i in random.permutation(len(parts))]
    first_rows = first_rows[:recipe.first_steps]
    for step, batch in enumerate(first_rows):
        lr = rate(step, recipe.first_steps, recipe.first_lr)
        loss = distance(clip.encode_text(texts[batch]), wanted[batch])
        loss.backward()
        adamw(memory, lr)
        first.append((lr, loss.item()))

    captions = [material.pairs.captions[r] for r in rows]
    epochs = [caption_batches(captions, recipe.batch_size, recipe.seed * 10_000 + epoch) for epoch in range(recipe.epochs)]
    steps, history, memory, used = [b for e in epochs for b in e], [], dict(t=0), []
    for step, batch in enumerate(rows[b] for b in steps):
        lr = rate(step, len(steps), recipe.lr)
        image, text = clip.encode_image(images[batch].double()), clip.encode_text(tokens[batch])
        logits = [net[f"{m}_concepts"](f / (f ** 2).mean(1, keepdim=True).sqrt()) for m, f in (("image", image), ("text", text)) if recipe.concept_on in (m, "both")]
        distillation = distance(text, targets[batch])
        concept = sum(-(labels[batch] * z.log_softmax(1)).sum(1).mean() for z in logits) / len(logits)
        contrastive = open_clip.loss.ClipLoss()(image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True), clip.logit_scale.exp())
        total = recipe.alpha * distillation + recipe.beta * concept + recipe.gamma * contrastive
        total.backward()
        length = math.sqrt(sum((p.grad ** 2).sum().item() for p in trained.values() if p.grad is not None))
        adamw(memory, lr)
        history.append(dict(epoch=[i for i, e in enumerate(epochs) for _ in e][step], lr=lr, total=total.item(), distillation=distillation.item(), concept=concept.item(),
                            contrastive=contrastive.item(), gradient_norm=length))
        used.append(batch)
    net.eval()
    with torch.no_grad(): features = clip.encode_image(images.double()), clip.encode_text(tokens)
    return dict(built=built, start=start, first=first, first_rows=first_rows, history=history, rows=used, weights=copied(net), features=features, tokens=tokens, images=images, trained=trained, texts=texts)


def check_values(recipe: Recipe, material: Material, seen: dict, rows=ROWS) -> None:
    "Everything that a run has read, used and made, against values from outside."
    x, how = material.embeddings.astype(np.float64), recipe.normalise
    mean, length = x[rows].mean(0), math.sqrt(np.mean([row @ row for row in x[rows]]))
    def scaled(rows): return [(row - mean) / np.linalg.norm(row - mean) if how == "unit" else row / length for row in rows.astype(np.float64)]
    np.testing.assert_allclose(seen["targets"], scaled(x), atol=1e-6)
    np.testing.assert_allclose(seen["texts"].targets, [*scaled(material.word_embeddings), *seen["targets"][rows]], atol=1e-6)
    kmeans = KMeans(recipe.k, n_init=4, random_state=recipe.seed).fit(seen["targets"][rows].astype(np.float64))
    np.testing.assert_allclose(seen["centroids"], kmeans.cluster_centers_, atol=1e-6)
    for target, label in zip(seen["targets"], seen["labels"]):
        raised = np.exp([-((target - c).astype(np.float64) ** 2).sum() / recipe.temperature for c in seen["centroids"]])
        np.testing.assert_allclose(label, raised / raised.sum(), atol=1e-6)
    ours = by_hand(recipe, material, rows, *(torch.from_numpy(seen[k]).double() for k in ("targets", "labels")), seen["texts"].targets.double())
    for name, weight in seen["built"].items(): assert same(weight.double(), ours["built"][name]), name
    assert same(seen["start"], ours["start"])
    assert seen["texts"].tokens.equal(ours["texts"])
    if seen["ran"]: assert same(seen["first_rows"][:recipe.first_steps], ours["first_rows"])
    np.testing.assert_allclose(seen["first"], ours["first"], rtol=1e-9)
    for got, want in zip(seen["run"].history, ours["history"], strict=True): assert got == pytest.approx(want, rel=1e-9)
    for name, weight in seen["weights"].items(): torch.testing.assert_close(weight, ours["weights"][name], rtol=1e-8, atol=1e-10, msg=name)
    for got, want in zip((seen["run"].image_features, seen["run"].text_features), ours["features"]): torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    # each step: rows of one batch, all of the pairs that they claim to be, at the rate and decay that are said
    captions = material.pairs.captions
    for batch, pairs_of in zip(seen["batches"], ours["rows"], strict=True):
        assert batch.captions == [captions[i] for i in pairs_of]
        for row, i in enumerate(map(captions.index, batch.captions)):
            t = batch.tokens.shape[1]
            assert same([batch.tokens[row], batch.targets[row], batch.labels[row]], [ours["tokens"][i, :t], torch.from_numpy(seen["targets"][i]), torch.from_numpy(seen["labels"][i])])
            assert not ours["tokens"][i, t:].any()
            torch.testing.assert_close(batch.images[row].float(), ours["images"][i], rtol=0, atol=1e-5)
        assert batch.tokens[:, -1].any()
    rates = [lr for lr, _ in ours["first"]] * seen["ran"] + [h["lr"] for h in ours["history"]]
    for used, lr in zip(seen["used"], rates, strict=True): assert used == [(pytest.approx(lr, rel=1e-12), recipe.weight_decay), (pytest.approx(lr, rel=1e-12), 0.0)]
    for decayed, free in seen["optimizer"]:
        assert decayed[0] == {n for n, p in ours["trained"].items() if p.ndim > 1} and free[0] == {n for n, p in ours["trained"].items() if p.ndim < 2}
        assert decayed[1:] == (recipe.weight_decay, (0.9, 0.98), 1e-6) and free[1:] == (0.0, (0.9, 0.98), 1e-6)


def test_the_run_is_the_one_written_out_by_hand(base, material):
    check_values(BASE, material, base)
    epochs = [[sorted(b.captions) for b in base["batches"][i:i + 3]] for i in (0, 3, 6)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(len({c for batch in epoch for c in batch}) == 18 for epoch in epochs), "no pair twice in an epoch"
    assert [h["epoch"] for h in base["run"].history] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert base["asked"] == dict(name="tiny-run", pretrained=None, teacher_dim=D, n_concepts=4, imagenet=False, train_image="all", seed=0, projection="linear")
    assert not base["run"].student.training and same(base["run"].concepts.centroids, base["centroids"])


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Recipe)])
def test_every_setting_acts_where_it_is_said_to_and_nowhere_else(field, base, home, material):
    assert field in ACTS, "say where the new setting acts"
    recipe = changed(field, home)
    seen = watched(recipe, material)
    assert seen["ran"] == (field in FIRST), "only what the first stage reads makes another one"
    if not seen["ran"]: seen["first_rows"] = base["first_rows"]
    moved = {kind for kind in ALL if not same(base[kind], seen[kind])}
    assert moved == {*ACTS[field][1].split(), "key"}
    if "weights" in moved: check_values(recipe, material, seen)


# ---- rows that are held out

@pytest.mark.parametrize("settings", [{}, dict(normalise="raw"), dict(first_steps=0, word_table=False), dict(normalise="raw", word_table=False, concept_on="concat", projection="mlp")],
                         ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()) or "as it is")
def test_held_out_rows_move_nothing_that_is_fitted_and_one_training_row_moves_it_all(settings, material):
    recipe, rng = dataclasses.replace(BASE, epochs=2, **settings), np.random.default_rng(9)
    def spoiled(rows, *columns):
        pairs, embeddings = material.pairs, material.embeddings.copy()
        images, captions, bases = pairs.images.copy(), [*pairs.captions], [*pairs.bases]
        classes = [None] * N
        for row in rows:
            if "embedding" in columns: embeddings[row] = rng.normal(size=D) * 40 + 7
            if "picture" in columns: images[row] = 255 - images[row]
            if "caption" in columns: captions[row] = "something else that is as long as the context allows for once"
            if "class" in columns: bases[row], classes[row] = captions[rows[0]], "spoiled"
        return material._replace(pairs=Pairs(images, captions, bases, classes, classes), embeddings=embeddings)
    fitted = ("centroids", "texts", "first", "weights", "rates", "groups")
    def run(material):
        seen = watched(recipe, material)
        return {k: seen[k] for k in fitted} | dict(targets=seen["targets"][ROWS], labels=seen["labels"][ROWS], concepts=seen["run"].concepts, order=seen["order"], first_rows=seen["first_rows"],
                                                  history=seen["run"].history)
    plain, other = run(material), run(spoiled(HELD_OUT, "embedding", "picture", "caption", "class"))
    if plain["first_rows"] is None or other["first_rows"] is None: del plain["first_rows"], other["first_rows"]  # one was read from the cache
    for kind in plain: assert same(plain[kind], other[kind]), kind
    moves = dict(embedding="targets centroids labels history weights", picture="history weights", caption="history weights")
    for column, kinds in moves.items():
        moved = run(spoiled(ROWS[3:4], column))
        kinds = kinds.split() + (["texts", "first"] if recipe.first_steps and column != "picture" else [])
        for kind in kinds: assert not same(plain[kind], moved[kind]), (column, kind)
    if recipe.first_steps:  # the words are scaled by the training captions: by one row more or less
        words = run(spoiled(ROWS[3:4], "embedding"))["texts"].targets[:len(WORDS)]
        assert not same(words, plain["texts"].targets[:len(WORDS)])


# ---- runs that are kept

@pytest.mark.parametrize("settings", [{}, dict(projection="mlp", train_image="head", k=3, seed=2)], ids=["as it is", "changed"])
def test_a_run_is_kept_found_again_and_its_student_read_back(settings, material, tmp_path, monkeypatch):
    recipe = dataclasses.replace(BASE, epochs=1, **settings)
    run = training.run_recipe(recipe, material, ROWS, tmp_path / "runs")
    path = training.checkpoint_path(tmp_path / "runs", recipe, material, ROWS)
    assert [*(tmp_path / "runs").iterdir()] == [path]
    student = training.load_student(path)
    assert same(copied(student), copied(run.student)) and not student.training
    assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in run.student.parameters()]
    assert student.clip.visual.proj.shape == (32, 16) and len(student.image_concepts.bias) == recipe.k and len(student.predict_teacher(torch.ones(1, 16))[0]) == D
    steps, asked, build = [], [], training.build_student
    monkeypatch.setattr(training, "train_step", lambda *args: steps.append(args))
    monkeypatch.setattr(training, "build_student", lambda *args: asked.append(args) or build(*args))
    again = training.run_recipe(recipe, material, ROWS, tmp_path / "runs")
    training.load_student(path)
    assert asked[0] == asked[1] == (recipe.student, None, D, recipe.k, False, recipe.train_image, recipe.seed, recipe.projection), "built again as the recipe says"
    assert not steps and again.history == run.history and again.first == run.first
    assert same(copied(again.student), copied(run.student)) and same([*again[3:5]], [*run[3:5]])


def test_without_a_folder_nothing_is_kept_and_without_a_first_stage_none_is_made(material, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = training.run_recipe(dataclasses.replace(BASE, first_steps=0, epochs=1), material, ROWS)
    assert run.first == [] and not [*tmp_path.rglob("*")]


def test_rows_may_be_booleans_and_no_words_are_needed(material, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    recipe, wordless = dataclasses.replace(BASE, epochs=1, words=0), material._replace(words=[], word_embeddings=material.word_embeddings[:0])
    by_number, by_truth = watched(recipe, wordless, ROWS), watched(recipe, wordless, np.isin(np.arange(N), ROWS))
    assert len(by_number["texts"].tokens) == len(ROWS) and by_number["ran"] and not by_truth["ran"], "one key"
    assert same(by_number["weights"], by_truth["weights"]) and same(by_number["order"], by_truth["order"])


def test_the_student_trains_on_the_device_that_is_named(material, monkeypatch):
    places, to = [], training.Student.to
    monkeypatch.setattr(training.Student, "to", lambda self, place: places.append(place) or to(self, place))
    place = torch.device("cpu", 0)
    training.run_recipe(dataclasses.replace(BASE, epochs=1), material, ROWS, device=place)
    training.train(training.build_student("tiny-run", None, D, 4, False, "all"), training.Inputs([*"abcdefgh"], torch.zeros(8, 3, SIZE, SIZE), tokens_of(WORDS + ["sun"]), torch.zeros(8, D), torch.full((8, 4), 0.25)),
                   dataclasses.replace(BASE, epochs=1), device=place)
    assert places.count(place) == 2 and places[0] is place


@pytest.mark.parametrize("column", ["pictures", "embeddings", "train"])
def test_a_table_that_does_not_fit_is_refused_before_a_step(column, material, monkeypatch):
    monkeypatch.setattr(training, "optimizer_step", None)
    rows, made = ROWS, material
    if column == "pictures": made = made._replace(pairs=made.pairs._replace(images=made.pairs.images[1:]))
    if column == "embeddings": made = made._replace(embeddings=made.embeddings[:-1])
    if column == "train": rows = [*ROWS, N]
    with pytest.raises(ValueError, match=f"{N}|{N - 1}"): training.run_recipe(BASE, made, rows)
