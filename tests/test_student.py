"""The student against open_clip itself; what trains and what does not; the start from words and from ImageNet."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from kklip_nb import student as S

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
])
def test_wrong_builds_are_refused(arguments, says):
    with pytest.raises((ValueError, RuntimeError), match=says): S.build_student(**arguments)


def test_matching_activation_passes():
    S.check_activation("ViT-B-32-quickgelu", "openai")
    S.check_activation("ViT-B-32", "laion2b_s34b_b79k")


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
