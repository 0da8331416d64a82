"""The student against open_clip itself; what trains and what does not; the start from words and from ImageNet."""

import io
import json
import random

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

CAPTIONS = ["dog face", "a red apple", "pizza"]


@pytest.fixture(scope="module")
def student() -> S.Student:
    return S.build_student(seed=0).eval()


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
    with pytest.raises(RuntimeError): towers.encode_text(torch.full((2, 20), 7))


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


def test_the_head_and_the_last_stage_train_and_nothing_before(last):
    trained = {n for n, p in last.clip.visual.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in last.clip.visual.named_parameters() if n.startswith(LATE)}
    assert all(p.requires_grad for n, p in last.named_parameters() if "visual" not in n)
    for imagenet in (True, False):
        norms = [m for m in S.build_student(train_image="last", imagenet=imagenet).modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms and not any(m.training for m in norms)
    assert last.state_dict().keys() == S.build_student(imagenet=False, train_image="all").state_dict().keys()
    for name in ("kklip-laptop-vit", "RN50"):
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
