"""The losses against open_clip, torch, naive loops and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kklip_nb.losses import concept_loss, contrastive_loss, kklip_loss, text_distillation_loss

NAN, INF = float("nan"), float("inf")


def pair(n=5, d=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=dtype) for _ in range(2)]


def broken(value, n=4, d=3):
    "A matrix with one bad entry."
    x = torch.ones(n, d)
    x[2, 1] = value
    return x


def number(x):
    assert isinstance(x, torch.Tensor) and x.shape == ()
    return x.item()


# ---- contrastive_loss


def naive_contrastive(images, texts, scale):
    "The definition, one number at a time, in Python floats."
    unit = lambda rows: [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows.tolist()]
    images, texts = unit(images), unit(texts)
    n, total = len(images), 0.0
    score = lambda i, j: scale * sum(a * b for a, b in zip(images[i], texts[j]))
    for i in range(n):
        total -= score(i, i) - math.log(sum(math.exp(score(i, j)) for j in range(n)))  # image i picks its text
        total -= score(i, i) - math.log(sum(math.exp(score(j, i)) for j in range(n)))  # text i picks its image
    return total / (2 * n)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [0.5, 1 / 0.07, 100.0])
@pytest.mark.parametrize("n, d", [(2, 1), (2, 8), (9, 4)])
def test_contrastive_loss_equals_open_clip_and_a_naive_loop(n, d, scale, dtype, tolerance):
    open_clip_loss = pytest.importorskip("open_clip.loss").ClipLoss()
    images, texts = pair(n, d, dtype)
    ours = number(contrastive_loss(images, texts, scale))
    unit = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    assert ours == pytest.approx(open_clip_loss(*unit, scale).item(), rel=tolerance, abs=tolerance)
    assert ours == pytest.approx(naive_contrastive(images, texts, scale), rel=tolerance * 10, abs=tolerance * 10)


@pytest.mark.parametrize(
    "make",
    [
        float,
        torch.tensor,
        lambda s: torch.nn.Parameter(torch.tensor(s)),
        lambda s: torch.nn.Parameter(torch.tensor(math.log(s))).exp(),
        int,
    ],
)
def test_the_scale_may_be_a_number_a_tensor_or_a_parameter(make):
    images, texts = pair(dtype=torch.float32)
    expected = naive_contrastive(images, texts, 20.0)
    assert number(contrastive_loss(images, texts, make(20.0))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_keeps_the_dtype_of_the_features(dtype):
    assert contrastive_loss(*pair(dtype=dtype), 10.0).dtype == dtype
    assert contrastive_loss(*pair(dtype=dtype), torch.tensor(10.0)).dtype == dtype


@given(
    n=st.integers(2, 8), d=st.integers(1, 6), seed=st.integers(0, 999), a=st.floats(1e-4, 1e4), b=st.floats(1e-4, 1e4)
)
def test_the_length_of_the_features_changes_nothing(n, d, seed, a, b):
    images, texts = pair(n, d, seed=seed)
    rows = torch.logspace(-2, 2, n, dtype=images.dtype)[:, None]  # every row its own length
    expected = number(contrastive_loss(images, texts, 10.0))
    assert number(contrastive_loss(a * images * rows, b * texts / rows, 10.0)) == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )


@given(order=st.permutations(range(6)), seed=st.integers(0, 999))
def test_permuting_the_batch_changes_nothing(order, seed):
    images, texts = pair(6, 4, seed=seed)
    expected = number(contrastive_loss(images, texts, 10.0))
    assert number(contrastive_loss(images[list(order)], texts[list(order)], 10.0)) == pytest.approx(expected, rel=1e-12)


@given(seed=st.integers(0, 999))
def test_images_and_texts_play_the_same_part(seed):
    images, texts = pair(5, 4, seed=seed)
    expected = number(contrastive_loss(images, texts, 10.0))
    assert number(contrastive_loss(texts, images, 10.0)) == pytest.approx(expected, rel=1e-12)


def test_breaking_the_pairs_makes_a_perfect_batch_worse():
    x = torch.eye(6)
    assert number(contrastive_loss(x, x, 50.0)) < 1e-6
    assert number(contrastive_loss(x, x.roll(1, 0), 50.0)) == pytest.approx(50, rel=1e-3)


def test_gradient_reaches_images_texts_and_scale_and_is_right():
    images, texts = (x.requires_grad_() for x in pair(4, 3))
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    contrastive_loss(images, texts, log_scale.exp()).backward()
    for x in (images, texts, log_scale):
        assert x.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, s.exp()), (images, texts, log_scale))


@pytest.mark.parametrize("n", [2, 10, 100])
def test_a_scale_near_zero_gives_ln_n(n):
    assert number(contrastive_loss(*pair(n, 16), 1e-9)) == pytest.approx(math.log(n), abs=1e-8)


@pytest.mark.parametrize("scale", [1.0, 5.0, 1 / 0.07])
def test_independent_random_features_give_about_ln_n_plus_half_the_variance(scale):
    n, d = 512, 256
    losses = [number(contrastive_loss(*pair(n, d, seed=seed), scale)) for seed in range(5)]
    assert np.mean(losses) == pytest.approx(math.log(n) + scale**2 / (2 * d), abs=0.05)


def test_collapsed_features_give_ln_n_at_any_scale():
    x = torch.ones(8, 4)
    assert number(contrastive_loss(x, x, 100.0)) == pytest.approx(math.log(8), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, -14.3, NAN, INF, -INF])
@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale, make):
    with pytest.raises(ValueError, match=str(scale)):
        contrastive_loss(*pair(), make(scale))


@pytest.mark.parametrize(
    "images, texts, given_shapes",
    [
        ((4, 3), (5, 3), ["(4, 3)", "(5, 3)"]),
        ((4, 3), (4, 2), ["(4, 3)", "(4, 2)"]),
        ((4, 3), (1, 3), ["(4, 3)", "(1, 3)"]),
        ((12,), (12,), ["(12,)"]),
        ((2, 2, 3), (2, 2, 3), ["(2, 2, 3)"]),
        ((0, 3), (0, 3), ["(0, 3)"]),
        ((4, 0), (4, 0), ["(4, 0)"]),
    ],
)
def test_contrastive_loss_refuses_shapes_that_do_not_match(images, texts, given_shapes):
    with pytest.raises(ValueError) as error:
        contrastive_loss(torch.ones(images), torch.ones(texts), 10.0)
    for shape in given_shapes:
        assert shape in str(error.value)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match=r"batch of (one|1)|\(1, 3\)") as error:
        contrastive_loss(torch.ones(1, 3), torch.ones(1, 3), 10.0)
    assert "2" in str(error.value)  # what was expected


def test_more_than_one_scale_is_refused():
    with pytest.raises(ValueError, match=r"\(5,\)"):
        contrastive_loss(*pair(), torch.full((5,), 10.0))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["image", "text"])
def test_contrastive_loss_refuses_nan_and_infinity_and_names_the_side(side, value):
    good, bad = torch.ones(4, 3), broken(value)
    with pytest.raises(ValueError, match=rf"{side}(?s:.*)(NaN|nan|inf)"):
        contrastive_loss(*((bad, good) if side == "image" else (good, bad)), 10.0)


# ---- text_distillation_loss


@given(n=st.integers(1, 8), d=st.integers(1, 8), seed=st.integers(0, 999))
def test_distillation_is_the_mean_over_rows_of_the_squared_distance(n, d, seed):
    student, teacher = pair(n, d, seed=seed)
    naive = sum(math.dist(s, t) ** 2 for s, t in zip(student.tolist(), teacher.tolist())) / n
    ours = number(text_distillation_loss(student, teacher))
    assert ours == pytest.approx(naive, rel=1e-12)
    assert ours == pytest.approx(d * F.mse_loss(student, teacher).item(), rel=1e-12)  # summed over d, not averaged


def test_distillation_gradient_has_its_closed_form_and_spares_the_teacher():
    student, teacher = (x.requires_grad_() for x in pair(5, 3))
    text_distillation_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / 5)
    assert teacher.grad is None


def test_distillation_is_zero_only_for_equal_embeddings():
    student, teacher = pair()
    assert number(text_distillation_loss(student, student.clone())) == 0
    assert number(text_distillation_loss(student, teacher)) > 0


@given(order=st.permutations(range(6)))
def test_distillation_does_not_care_about_the_order_of_the_batch(order):
    student, teacher = pair(6, 4)
    expected = number(text_distillation_loss(student, teacher))
    assert number(text_distillation_loss(student[list(order)], teacher[list(order)])) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(
    "student, teacher",
    [
        ((4, 3), (1, 3)),
        ((1, 3), (4, 3)),
        ((4, 3), (4, 1)),
        ((4, 3), (3,)),
        ((3,), (3,)),
        ((4, 3), (4, 5)),
        ((0, 3), (0, 3)),
    ],
)
def test_distillation_never_broadcasts(student, teacher):
    with pytest.raises(ValueError) as error:
        text_distillation_loss(torch.ones(student), torch.ones(teacher))
    assert str(student) in str(error.value) or str(teacher) in str(error.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_distillation_refuses_nan_and_infinity_and_names_the_side(side, value):
    arguments = dict(student=torch.ones(4, 3), teacher=torch.ones(4, 3)) | {side: broken(value)}
    with pytest.raises(ValueError, match=rf"{side}(?s:.*)(NaN|nan|inf)"):
        text_distillation_loss(**arguments)


# ---- concept_loss


def probabilities(n, k, dtype=torch.float64, seed=1):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32, torch.uint8])
def test_concept_loss_with_ids_equals_torch(dtype, id_dtype):
    logits = pair(6, 4, dtype)[0]
    ids = torch.tensor([0, 3, 1, 2, 3, 0], dtype=id_dtype)
    torch.testing.assert_close(concept_loss(logits, ids), F.cross_entropy(logits, ids.long()))


@given(n=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_concept_loss_with_probabilities_equals_torch_and_a_naive_loop(n, k, seed):
    logits, soft = pair(n, k, seed=seed)[0], probabilities(n, k, seed=seed)
    naive = 0.0
    for row, q in zip(logits.tolist(), soft.tolist()):
        norm = math.log(sum(math.exp(v) for v in row))
        naive -= sum(b * (a - norm) for a, b in zip(row, q)) / n
    ours = number(concept_loss(logits, soft))
    assert ours == pytest.approx(naive, rel=1e-9, abs=1e-9)
    assert ours == pytest.approx(F.cross_entropy(logits, soft).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 64])
def test_zero_logits_cost_ln_k(k):
    for concepts in (torch.zeros(5, dtype=torch.long), probabilities(5, k)):
        assert number(concept_loss(torch.zeros(5, k), concepts)) == pytest.approx(math.log(k), abs=1e-6)


def test_a_soft_one_hot_row_costs_what_the_id_costs():
    logits, ids = pair(6, 4)[0], torch.tensor([0, 3, 1, 2, 3, 0])
    hard = number(concept_loss(logits, ids))
    assert number(concept_loss(logits, F.one_hot(ids, 4).double())) == pytest.approx(hard, rel=1e-12)


def test_concepts_get_no_gradient_and_logits_get_softmax_minus_label():
    logits, soft = pair(6, 4)[0].requires_grad_(), probabilities(6, 4).requires_grad_()
    concept_loss(logits, soft).backward()
    assert soft.grad is None
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - soft).detach() / 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_labels_of_another_precision_are_welcome(dtype):
    logits, soft = pair(6, 4, torch.float32)[0].requires_grad_(), probabilities(6, 4, dtype)
    loss = concept_loss(logits, soft)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits, soft.float()).item(), rel=1e-6)


def test_a_probability_is_not_taken_for_a_logit_nor_the_other_way_round():
    sure = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    assert number(concept_loss(sure, torch.tensor([0, 1]))) < 1e-3  # a second softmax would give 0.31


@pytest.mark.parametrize(
    "ids, said",
    [
        ([0, 1, 4], "4"),
        ([0, -1, 2], "-1"),
        ([0, -100, 2], "-100"),
        ([-100, -100, -100], "-100"),
        ([0, 1, 999], "999"),
    ],
)
def test_ids_out_of_range_are_refused(ids, said):
    with pytest.raises(ValueError, match=rf"{said}\b"):
        concept_loss(torch.zeros(3, 4), torch.tensor(ids))


@pytest.mark.parametrize(
    "row, said",
    [
        ([-0.25, 1.25], "-0.25"),
        ([0.25, 0.25], "0.5"),
        ([2.0, 3.0], "5"),
        ([0.0, 0.0], "0"),
        ([0.5, 0.6], "1.1"),
        ([0.5, 0.48], "0.98"),
    ],
)
def test_rows_that_are_no_probabilities_are_refused(row, said):
    with pytest.raises(ValueError) as error:
        concept_loss(torch.zeros(2, 2), torch.tensor([[0.5, 0.5], row]))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "logits, concepts, given_shapes",
    [
        ((3, 4), torch.zeros(2, dtype=torch.long), ["(2,)", "3"]),
        ((3, 4), torch.zeros(3, 1, dtype=torch.long), ["(3, 1)"]),
        ((3, 4), torch.zeros(3, 4, dtype=torch.long), ["(3, 4)"]),
        ((3, 4), torch.full((3, 5), 0.2), ["(3, 5)", "(3, 4)"]),
        ((3, 4), torch.full((1, 4), 0.25), ["(1, 4)", "(3, 4)"]),
        ((3, 4), torch.full((4,), 0.25), ["(4,)"]),
        ((4,), torch.zeros(4, dtype=torch.long), ["(4,)"]),
        ((0, 4), torch.zeros(0, dtype=torch.long), ["(0, 4)"]),
        ((3, 0), torch.zeros(3, dtype=torch.long), ["(3, 0)"]),
    ],
)
def test_concept_loss_refuses_shapes_that_do_not_match(logits, concepts, given_shapes):
    with pytest.raises(ValueError) as error:
        concept_loss(torch.zeros(logits), concepts)
    for shape in given_shapes:
        assert shape in str(error.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["logits", "concepts"])
def test_concept_loss_refuses_nan_and_infinity_and_names_the_side(side, value):
    arguments = dict(logits=torch.ones(4, 3), concepts=torch.full((4, 3), 1 / 3)) | {side: broken(value)}
    with pytest.raises(ValueError, match=rf"{side}(?s:.*)(NaN|nan|inf)"):
        concept_loss(**arguments)


def test_infinite_logits_are_refused_with_ids_too():
    with pytest.raises(ValueError, match="logits"):
        concept_loss(broken(INF), torch.zeros(4, dtype=torch.long))


# ---- kklip_loss


def test_the_total_is_the_weighted_sum_and_the_parts_come_by_name():
    parts = [torch.tensor(v) for v in (2.0, 30.0, 0.5)]
    total, named = kklip_loss(*parts, alpha=3.0, beta=0.1, gamma=4.0)
    assert number(total) == pytest.approx(3 * 2 + 0.1 * 30 + 4 * 0.5)
    assert set(named) == {"distillation", "concept", "contrastive"}
    assert [number(named[name]) for name in ("distillation", "concept", "contrastive")] == [2.0, 30.0, 0.5]


def test_the_default_weights_are_the_papers():
    total, _ = kklip_loss(torch.tensor(2.0), torch.tensor(30.0), torch.tensor(0.5))
    assert number(total) == pytest.approx(1.0 * 2 + 0.01 * 30 + 1.0 * 0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("place, weight", [(0, 3.0), (1, 0.1), (2, 4.0)])
def test_each_weight_scales_the_gradient_of_its_own_part(place, weight):
    parts = [torch.tensor(1.0, requires_grad=True) for _ in range(3)]
    weights = [1.0, 1.0, 1.0]
    weights[place] = weight
    kklip_loss(*parts, *weights)[0].backward()
    assert [p.grad.item() for p in parts] == pytest.approx(weights)


def test_a_weight_of_zero_switches_a_part_off():
    total, _ = kklip_loss(torch.tensor(2.0), torch.tensor(30.0), torch.tensor(0.5), alpha=0, beta=0, gamma=1)
    assert number(total) == 0.5


@pytest.mark.parametrize(
    "bad, said", [(torch.ones(3), r"\(3,\)"), (torch.tensor(NAN), "nan"), (torch.tensor(INF), "inf")]
)
@pytest.mark.parametrize("name", ["distillation", "concept", "contrastive"])
def test_a_part_that_is_no_finite_scalar_is_refused_by_name(name, bad, said):
    parts = dict(distillation=torch.tensor(1.0), concept=torch.tensor(1.0), contrastive=torch.tensor(1.0)) | {name: bad}
    with pytest.raises(ValueError, match=rf"{name}.*{said}"):
        kklip_loss(**parts)
