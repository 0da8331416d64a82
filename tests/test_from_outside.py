"""Inputs that people give, one after the other through the whole package; the right value or the right word for each."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kklip_nb import student as S
from kklip_nb.concepts import score_concepts, soft_labels
from kklip_nb.evaluation import chance_levels, item_scores, words_seen
from kklip_nb.evidence.other_words import score_lines
from kklip_nb.evidence.study import Difference, plot_differences, write_rows
from kklip_nb.evidence.text_probe import matches_by_kind
from kklip_nb.scale.shards import usable_samples
from kklip_nb.search import search
from kklip_nb.teacher import load_teacher
from kklip_nb.training import load_checkpoint
from kklip_nb.visualization import concept_names, plot_concepts

CAFES = ["caf\u00e9", "cafe\u0301"]  # é in one code point and in two


@pytest.fixture(scope="module")
def student(): return S.build_student("kklip-laptop-vit", None, 8, 3, imagenet=False, train_image="all")


def test_features_of_any_length_are_searched_by_their_cosines(student):
    pictures = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    rows, cosines = search(student, pictures * torch.tensor([[1.0], [9], [3], [0.2], [5], [1]]), "dog", 6)
    with torch.inference_mode(): dog = F.normalize(student.eval().encode_text(S.tokenize(student, ["dog"])), dim=1)
    wanted = (F.normalize(pictures, dim=1) @ dog.T)[:, 0].numpy()
    np.testing.assert_allclose(cosines[0], wanted[rows[0]], atol=1e-5)
    assert rows[0].tolist() == np.argsort(-wanted).tolist()


def test_classes_in_a_tensor_are_the_classes_of_a_list():
    asked = []
    def encode(texts): asked.extend(texts); return np.ones((len(texts), 4))
    classes = torch.tensor([0, 1, 0, 1])
    assert chance_levels(classes, [2, 3], [0, 1]) == chance_levels(classes.tolist(), [2, 3], [0, 1])
    item_scores(np.eye(4), np.eye(4), encode, classes, [0, 1], [2, 3])
    assert asked[:2] == ["0", "1"]


def test_classes_and_kinds_in_two_accents_are_one(rng):
    x = rng.normal(size=(12, 3))
    assert score_concepts(x, 2, CAFES * 3 + ["tee"] * 6)["nmi"] == score_concepts(x, 2, CAFES[:1] * 6 + ["tee"] * 6)["nmi"]
    assert matches_by_kind(["a", "b"], ["a", "c"], iter(CAFES)) == {CAFES[0]: (0.5, 2)}


def test_a_single_text_is_one_text():
    scores = dict(ap=np.array([0.5, 1.0]), r1=np.array([0.0, 1.0]), r5=np.array([1.0, 1.0]), rank=np.array([2.0, 1.0]))
    assert [line["asked"] for line in score_lines(scores, ["dog", "cat"], "dog")] == ["yes", "no", "all"]
    assert words_seen(["a dog"], "a dog").tolist() == ["all"]


def test_korean_words_of_one_syllable_name_concepts():
    captions = ["검은 개", "하얀 개", "작은 개", "검은 곰", "하얀 곰", "작은 곰"]
    assert concept_names(captions, [0, 0, 0, 1, 1, 1]) == {0: "개", 1: "곰"}


def test_a_label_of_noise_is_not_the_last_name():
    with pytest.raises(ValueError, match="concept -1 has no name"): plot_concepts(np.zeros((2, 2)), [0, -1], ["dogs", "cats"], [0, -1])


def test_a_row_that_begins_with_an_underscore_stands_in_the_legend():
    figure, ax = plt.subplots()
    plot_differences({(name, "openmoji", "x"): Difference(1.0, 0.5, 0.1) for name in ("_KKLIP", "b")}, {("openmoji", "x"): "c"}, ax)
    assert [str(text.get_text()) for text in ax.legend().get_texts()] == ["_KKLIP", "b"]
    plt.close(figure)


def test_lines_with_other_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match="line 1 .*columns"): write_rows(tmp_path / "a.csv", [dict(a=1, b=2), dict(a=3)])


def test_raw_pixels_are_no_prepared_images(student):
    for pixels in (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected those of prepare_images"): student.encode_image(pixels)


def test_a_slash_in_a_model_s_name_is_open_clip_s_own_way(monkeypatch):
    class Built(Exception): pass
    def build(name, pretrained, **how): raise Built(name, pretrained)
    monkeypatch.setattr(S, "_create_clip", build)
    with pytest.raises(ValueError, match="need quick_gelu"): S.build_student("ViT-B/32", "openai", 8, 3)
    with pytest.raises(Built) as found: S.build_student("ViT-B/32-quickgelu", "openai", 8, 3)
    assert found.value.args == ("ViT-B-32-quickgelu", "openai")


def test_whole_numbers_have_soft_labels_that_are_not_whole():
    for x in ([[0, 0], [2, 0]], torch.tensor([[0, 0], [2, 0]])):
        labels = soft_labels(x, [[0.0, 0.0], [1.0, 0.0]], 1.0)
        np.testing.assert_allclose(np.asarray(labels), [[1 / (1 + np.exp(-1)), 1 / (1 + np.e)], [1 / (1 + np.exp(3)), 1 / (1 + np.exp(-3))]], atol=1e-6)


def test_a_folder_is_no_checkpoint(student, tmp_path):
    with pytest.raises(ValueError, match="is a folder"): load_checkpoint(tmp_path, student, None, None)


def test_a_teacher_s_folder_that_is_not_there_is_a_folder_that_is_not_there(tmp_path):
    for name in ("./nowhere", tmp_path / "nowhere", str(tmp_path / "a" / "b"), "~/nowhere"):
        with pytest.raises(FileNotFoundError, match="there is no such folder"): load_teacher(name)


def test_what_a_shard_s_sample_holds_is_told():
    _, skipped = usable_samples([dict(__key__="0", gif=b"GIF89a", txt=b"a dog")])
    assert skipped == {"0": "there is no picture; its members: gif, txt"}


def test_one_address_is_one_shard(tmp_path):
    from kklip_nb.scale.export import _held_out
    from kklip_nb.scale.shards import write_shards
    (path,) = write_shards([(np.full((8, 8, 3), i, np.uint8), f"thing {i}") for i in range(4)], tmp_path, size=8)
    assert [s.caption for s in _held_out(str(path), 9, ())] == [f"thing {i}" for i in range(4)]


@pytest.mark.parametrize("text", ['"run"', '{"recipe": null, "data": 1}', "[1]", "null"])
def test_a_file_of_a_run_that_says_nothing_is_named(tmp_path, text):
    from kklip_nb.scale.export import read_json
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json is damaged or not of this package.*run it again"): read_json(tmp_path / "run.json", ("recipe", "data"), "run it again")
