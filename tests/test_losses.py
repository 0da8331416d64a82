"""The losses against open_clip, torch, naive loops and closed forms."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

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
        contrastive_loss(*pair(), make(scale), validate=True)


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


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF])
def test_a_number_as_scale_is_checked_without_validate(scale):
    with pytest.raises(ValueError, match=str(scale)):
        contrastive_loss(*pair(), scale)


def test_integer_features_are_refused():
    whole = torch.ones(4, 3, dtype=torch.long)
    for loss in (lambda x: contrastive_loss(x, x, 10.0), lambda x: text_distillation_loss(x, x), lambda x: concept_loss(x, x[:, 0])):
        with pytest.raises(ValueError, match="int64"):
            loss(whole)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match=r"batch of (one|1)|\(1, 3\)") as error:
        contrastive_loss(torch.ones(1, 3), torch.ones(1, 3), 10.0)
    assert "2" in str(error.value)  # what was expected


def test_a_scale_of_shape_one_and_another_precision_is_welcome():
    images, texts = pair(dtype=torch.float32)
    expected = contrastive_loss(images, texts, 20.0)
    for scale in (torch.tensor([20.0]), torch.tensor([20.0], dtype=torch.float64), torch.tensor(20.0, dtype=torch.float16)):
        torch.testing.assert_close(contrastive_loss(images, texts, scale), expected)


def test_more_than_one_scale_is_refused():
    with pytest.raises(ValueError, match=r"\(5,\)"):
        contrastive_loss(*pair(), torch.full((5,), 10.0))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["image", "text"])
def test_contrastive_loss_refuses_nan_and_infinity_and_names_the_side(side, value):
    good, bad = torch.ones(4, 3), broken(value)
    with pytest.raises(ValueError, match=rf"{side}(?s:.*)(NaN|nan|inf)"):
        contrastive_loss(*((bad, good) if side == "image" else (good, bad)), 10.0, validate=True)


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
        text_distillation_loss(**arguments, validate=True)


# ---- concept_loss


def probabilities(n, k, dtype=torch.float64, seed=1):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
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
        concept_loss(torch.zeros(3, 4), torch.tensor(ids), validate=True)


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
        concept_loss(torch.zeros(2, 2), torch.tensor([[0.5, 0.5], row]), validate=True)
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
        concept_loss(**arguments, validate=True)


def test_infinite_logits_are_refused_with_ids_too():
    with pytest.raises(ValueError, match="logits"):
        concept_loss(broken(INF), torch.zeros(4, dtype=torch.long), validate=True)


IDS = torch.tensor([0, 3, 1, 2, 3, 0])


@pytest.mark.parametrize("bad", [-(2**63), -100, -1, 4, 999])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"weight": torch.ones(4)}, {"ignore_index": 255}])
def test_no_id_out_of_range_is_skipped_silently(bad, options):
    ids = IDS.clone()
    ids[2] = bad
    with pytest.raises(IndexError, match=f"{bad} is out of bounds"):
        concept_loss(pair(6, 4, torch.float32)[0], ids, **options)
    with pytest.raises(ValueError, match=rf"{bad}\b"):
        concept_loss(pair(6, 4, torch.float32)[0], ids, **options, validate=True)


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("labels", ["ids", "holes", "soft"])
def test_the_options_of_cross_entropy_mean_what_they_mean_in_torch(labels, weighted, smoothing, reduction, validate):
    logits = pair(6, 4)[0].requires_grad_()
    concepts = dict(ids=IDS, holes=torch.tensor([0, -100, 1, 2, -100, 0]), soft=probabilities(6, 4))[labels]
    options = dict(weight=torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64) if weighted else None,
                   reduction=reduction, label_smoothing=smoothing) | (dict(ignore_index=-100) if labels == "holes" else {})
    ours, theirs = concept_loss(logits, concepts, **options, validate=validate), F.cross_entropy(logits, concepts, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)))


def test_an_id_to_skip_may_also_be_one_of_the_concepts():
    logits = pair(6, 4)[0]
    torch.testing.assert_close(concept_loss(logits, IDS, ignore_index=3), F.cross_entropy(logits[IDS != 3], IDS[IDS != 3]))
    assert concept_loss(logits, IDS * 0 + 3, ignore_index=3).isnan()  # 0/0 as in torch: it shows


def test_options_that_cannot_be_are_refused():
    logits, soft = pair(6, 4)[0], probabilities(6, 4)
    with pytest.raises(ValueError, match="ignore_index=2"):
        concept_loss(logits, soft, ignore_index=2)
    with pytest.raises(ValueError, match="median"):
        concept_loss(logits, soft, reduction="median")
    for concepts in (soft, IDS):
        with pytest.raises(ValueError, match="label_smoothing"):
            concept_loss(logits, concepts, label_smoothing=2.0)
        with pytest.raises(ValueError, match="weight"):
            concept_loss(logits, concepts, weight=torch.ones(3))
    with pytest.raises(ValueError, match="booleans"):
        concept_loss(logits, IDS > 1)


# ---- contrastive_loss in chunks


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 9, 100])
@pytest.mark.parametrize("scale", [0.5, 1 / 0.07, 100.0])
def test_chunks_change_neither_value_nor_gradients(chunk, scale):
    open_clip_loss = pytest.importorskip("open_clip.loss").ClipLoss()
    leaves = [x.requires_grad_() for x in (*pair(8, 5), torch.tensor(scale, dtype=torch.float64))]
    losses = (contrastive_loss(*leaves, chunk=chunk), contrastive_loss(*leaves),
              open_clip_loss(F.normalize(leaves[0], dim=1), F.normalize(leaves[1], dim=1), leaves[2]))
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    for other in (1, 2):
        torch.testing.assert_close(losses[0], losses[other], rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients[0], gradients[other], rtol=0, atol=1e-10)


@given(n=st.integers(2, 9), d=st.integers(1, 6), chunk=st.integers(1, 10), seed=st.integers(0, 999))
def test_chunks_equal_the_naive_loop(n, d, chunk, seed):
    images, texts = pair(n, d, seed=seed)
    assert number(contrastive_loss(images, texts, 10.0, chunk=chunk)) == pytest.approx(naive_contrastive(images, texts, 10.0), abs=1e-9)


def test_the_gradients_of_chunks_are_right_to_second_order():
    leaves = [x.requires_grad_() for x in (*pair(4, 3), torch.tensor(2.0, dtype=torch.float64))]
    loss = lambda *args: contrastive_loss(*args, chunk=3)
    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


def test_perfect_pairs_cost_nothing_in_chunks():
    x = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    assert 0 <= number(contrastive_loss(x, x, 1e4, chunk=7)) < 1e-6


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_below_one_is_refused(chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk}"):
        contrastive_loss(*pair(), 10.0, chunk=chunk)


class Sizes(TorchDispatchMode):
    "The largest number of elements of any tensor that is made."

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor): self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("chunk, most", [(1, 64 * 8), (16, 16 * 64), (None, 64 * 64)])
def test_no_tensor_is_larger_than_chunk_times_n(chunk, most):
    leaves = [x.requires_grad_() for x in (*pair(64, 8), torch.tensor(10.0, dtype=torch.float64))]
    with Sizes() as sizes: contrastive_loss(*leaves, chunk=chunk).backward()
    assert sizes.largest == most


def test_chunks_need_the_memory_of_chunks():
    "One n × n matrix would be 256 MiB; measured in a process of its own."
    pytest.importorskip("resource")  # not on Windows
    code = """if True:
        import resource, sys, torch
        from kklip_nb.losses import contrastive_loss
        def peak(n):
            a, b = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
            contrastive_loss(a, b, 10.0, chunk=64).backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        torch.set_num_threads(1)
        before = peak(128)
        print(peak(8192) - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64


# ---- half precision

HALF = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])


def features(n=8, d=512):
    "Pairs that resemble each other, of which half precision keeps enough."
    a, noise = pair(n, d, torch.float32)
    return a, a + 0.1 * noise


@HALF
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("factor", [1e-4, 1.0, 3000.0])
def test_long_and_short_rows_keep_their_direction_in_half_precision(factor, chunk, half):
    images, texts = ((factor * x).to(half) for x in features())
    expected = contrastive_loss(images.double(), texts.double(), 14.0).item()
    loss = contrastive_loss(images, texts, torch.tensor(14.0, dtype=half), chunk=chunk)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_of_zeros_costs_its_share_and_has_a_finite_gradient(dtype):
    images, texts = (x.to(dtype) for x in features())
    images[0] = 0
    images.requires_grad_()
    loss = contrastive_loss(images, texts, 14.0)
    loss.backward()
    u, v = F.normalize(images.detach().double(), dim=1), F.normalize(texts.double(), dim=1)
    z, targets = 14 * u @ v.T, torch.arange(8)
    expected = (F.cross_entropy(z, targets) + F.cross_entropy(z.T, targets)) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert images.grad.isfinite().all() and images.grad.abs().max() < 1e3


EXTREME = [(torch.float32, 1e-17), (torch.float32, 1e17), (torch.bfloat16, 1e-17), (torch.bfloat16, 1e17),
           (torch.float16, 5e-6), (torch.float16, 9000.0), (torch.float64, 1e-150), (torch.float64, 1e150)]


def test_a_length_that_overflows_shows():
    images, texts = features()
    for dtype in (torch.float32, torch.bfloat16):
        assert contrastive_loss((1e30 * images).to(dtype), texts.to(dtype), 14.0).isnan()


def test_without_a_row_there_is_no_mean():
    ids = torch.full((3,), -100)
    assert concept_loss(torch.randn(3, 4), ids, ignore_index=-100).isnan()  # as torch has it
    with pytest.raises(ValueError, match="all rows are skipped"): concept_loss(torch.randn(3, 4), ids, ignore_index=-100, validate=True)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("dtype, factor", EXTREME)
def test_long_and_short_rows_have_value_and_direction_of_gradient(dtype, factor, chunk):
    images, texts = (x.double() for x in pair(6, 16, torch.float32))
    given = torch.cat([(factor * images[:3]).to(dtype), images[3:].to(dtype)]).requires_grad_()  # both kinds in one batch
    loss = contrastive_loss(given, texts.to(dtype), 14.0, chunk=chunk)
    (gradient,) = torch.autograd.grad(loss, given)
    scales = torch.tensor([[factor]] * 3 + [[1.0]] * 3, dtype=torch.float64)
    plain = (given.detach().double() / scales).requires_grad_()
    u, v = plain / plain.norm(dim=1, keepdim=True), F.normalize(texts.to(dtype).double(), dim=1)
    z, targets = 14 * u @ v.T, torch.arange(6)
    expected = (F.cross_entropy(z, targets) + F.cross_entropy(z.T, targets)) / 2
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    (wanted,) = torch.autograd.grad(expected, plain)
    wanted = wanted / scales
    wanted[wanted.abs() > torch.finfo(dtype).max] *= INF  # too steep to be said in this dtype
    rounding = dict(rtol=4 * torch.finfo(dtype).eps, atol=0.02) if dtype.itemsize < 4 else dict(rtol=1e-4, atol=1e-6)
    seen = wanted.abs() > torch.finfo(dtype).smallest_normal
    torch.testing.assert_close((gradient.double() * scales)[seen], (wanted * scales)[seen], **rounding)
    assert not gradient.isnan().any()


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("a", FLOATS)
@pytest.mark.parametrize("b", FLOATS)
def test_the_two_sides_may_have_two_precisions(a, b, validate):
    left, right = (x.to(kind) for x, kind in zip(pair(6, 4, torch.float32), (a, b)))
    soft = torch.eye(4)[IDS].to(b)
    wide = left.double(), right.double()
    kinds = {torch.promote_types(*(torch.float32 if k.itemsize < 4 else k for k in (a, b)))}
    for chunk in (None, 4):
        loss = contrastive_loss(left, right, 5.0, chunk=chunk, validate=validate)
        assert {loss.dtype} == kinds and loss.item() == pytest.approx(naive_contrastive(*wide, 5.0), rel=1e-5)
    loss = text_distillation_loss(left, right, validate=validate)
    assert {loss.dtype} == kinds and loss.item() == pytest.approx((wide[0] - wide[1]).square().sum().item() / 6, rel=1e-5)
    loss = concept_loss(left, soft, weight=torch.tensor([1.0, 2.0, 0.5, 1.0]).to(b), label_smoothing=0.1, validate=validate)
    wanted = F.cross_entropy(wide[0], soft.double(), torch.tensor([1.0, 2.0, 0.5, 1.0]).double(), label_smoothing=0.1)
    assert loss.dtype == (torch.float64 if a == torch.float64 else torch.float32) and loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_probabilities_in_half_precision_pass_the_check():
    for dtype in (torch.float16, torch.bfloat16):
        soft = probabilities(200, 48, dtype)
        assert (soft.double().sum(1) != 1).any()
        concept_loss(torch.zeros(200, 48), soft, validate=True)


def test_what_is_no_tensor_or_lies_elsewhere_is_refused_by_name():
    a, b = pair(6, 4)
    calls = dict(student=lambda x: text_distillation_loss(x, b), teacher=lambda x: text_distillation_loss(a, x), text_features=lambda x: contrastive_loss(a, x, 2.0),
                 logits=lambda x: concept_loss(x, IDS), concepts=lambda x: concept_loss(a, x), weight=lambda x: concept_loss(a, IDS, weight=x),
                 concept=lambda x: kklip_loss(torch.tensor(1.0), x, torch.tensor(1.0)))
    for name, call in calls.items():
        for x in (a.numpy(), a.tolist(), None, 0.0):
            if name == "weight" and x is None: continue
            with pytest.raises(ValueError, match=f"^{name} is a {type(x).__name__}; expected a tensor"): call(x)
    for name in ("teacher", "text_features", "concepts"):
        with pytest.raises(ValueError, match=f"on cpu, {name} on meta"): calls[name](b.to("meta"))
    with pytest.raises(ValueError, match="on cpu, concepts on meta"): concept_loss(a, IDS.to("meta"))
    with pytest.raises(ValueError, match="concepts are complex"): concept_loss(a, IDS.to(torch.complex64))


@pytest.mark.parametrize("bad", ["10", None, 2j, [10.0]])
def test_settings_that_are_no_numbers_are_refused_by_name(bad):
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="logit_scale="): contrastive_loss(*pair(), bad)
    if bad is not None:
        with pytest.raises(ValueError, match="chunk="): contrastive_loss(*pair(), 10.0, chunk=bad)
    for name in ("alpha", "beta", "gamma"):
        with pytest.raises(ValueError, match=f"{name}="): kklip_loss(one, one, one, **{name: bad})
    with pytest.raises(ValueError, match="label_smoothing="): concept_loss(pair(6, 4)[0], IDS, label_smoothing=bad)


def test_numbers_of_numpy_are_numbers():
    one, images_and_texts = torch.tensor(2.0), pair(dtype=torch.float32)
    for kind in (np.float64, np.float32, np.float16, np.int64):
        x = [i.clone().requires_grad_() for i in images_and_texts]
        assert number(contrastive_loss(*x, kind(10), chunk=np.int64(2))) == pytest.approx(naive_contrastive(*images_and_texts, 10.0), rel=1e-5)
        assert number(kklip_loss(one, one, one, kind(3), kind(2), kind(1))[0]) == 12


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_a_weight_in_a_tensor_is_one_number_and_is_looked_at_on_request(name):
    one = torch.tensor(1.0)
    assert number(kklip_loss(one, one, one, **(dict(alpha=0, beta=0, gamma=0) | {name: torch.tensor(3.0, dtype=torch.float16)}))[0]) == 3
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\)"): kklip_loss(one, one, one, **{name: torch.ones(1)})
    for bad in (-1.0, NAN, INF):
        with pytest.raises(ValueError, match=f"{name}={bad}"): kklip_loss(one, one, one, **{name: torch.tensor(bad)}, validate=True)
        kklip_loss(one, one, one, **{name: torch.tensor(bad)})


@pytest.mark.parametrize("smoothing", [-0.1, NAN])
def test_label_smoothing_that_torch_would_take_for_none_is_refused(smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing={smoothing}"): concept_loss(pair(6, 4)[0], IDS, label_smoothing=smoothing)


@HALF
@pytest.mark.parametrize("both", [False, True])
def test_distillation_is_summed_in_float32(half, both):
    student, teacher = torch.full((3, 400), 16.0, dtype=half), torch.zeros(3, 400, dtype=half if both else torch.float32)
    loss = text_distillation_loss(student.requires_grad_(), teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 400 * 256  # above float16's 65,504, between two of bfloat16
    assert student.grad.dtype == half and student.grad[0, 0].item() == pytest.approx(2 * 16 / 3, rel=1e-2)


@HALF
@pytest.mark.parametrize("labels", ["ids", "soft"])
def test_concept_loss_is_computed_in_float32(half, labels):
    logits = pair(6, 4, torch.float32)[0].to(half).requires_grad_()
    concepts = IDS if labels == "ids" else probabilities(6, 4, half)
    weight = torch.tensor([0.5, 2.0, 0.1, 1.0], dtype=half)
    loss = concept_loss(logits, concepts, weight=weight)
    expected = F.cross_entropy(logits.float(), concepts if labels == "ids" else concepts.float(), weight.float())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad.dtype == half
    many = torch.zeros(20_000, 64, dtype=half)
    assert concept_loss(many, torch.zeros(20_000, dtype=torch.long), reduction="sum").item() == pytest.approx(20_000 * math.log(64), rel=1e-4)


@HALF
def test_the_total_is_summed_in_float32(half):
    parts = [torch.tensor(v, dtype=half) for v in (60000.0, 60000.0, 60000.0)]
    total, named = kklip_loss(*parts, 2, 3, 4)  # each product is beyond float16
    assert total.dtype == torch.float32 and total.item() == pytest.approx(9 * parts[0].item())
    assert [p.dtype for p in named.values()] == [half] * 3


# ---- inside other people's code: host reads, meta tensors, autocast, torch.func, torch.compile

CALLS = {
    "distillation": (lambda a, b: text_distillation_loss(a, b), pair(6, 4)),
    "ids": (lambda a: concept_loss(a, IDS), pair(6, 4)[:1]),
    "soft": (lambda a, q: concept_loss(a, q), [pair(6, 4)[0], probabilities(6, 4)]),
    "options": (lambda a, w: concept_loss(a, IDS, weight=w, ignore_index=3, label_smoothing=0.1, reduction="sum"),
                [pair(6, 4)[0], probabilities(1, 4)[0]]),
    "contrastive": (lambda a, b, s: contrastive_loss(a, b, s), [*pair(6, 4), torch.tensor(9.0, dtype=torch.float64)]),
    "number": (lambda a, b: contrastive_loss(a, b, 9.0), pair(6, 4)),
    "chunks": (lambda a, b, s: contrastive_loss(a, b, s, chunk=4), [*pair(6, 4), torch.tensor(9.0, dtype=torch.float64)]),
    "all": (lambda a, b, s: kklip_loss(text_distillation_loss(a, b), concept_loss(a, IDS), contrastive_loss(a, b, s), 2.0, 0.5, 1.0)[0],
            [*pair(6, 4), torch.tensor(9.0, dtype=torch.float64)]),
}
EACH = pytest.mark.parametrize("call", CALLS)


def with_gradient(loss, arguments):
    "Value, and gradient of the first argument."
    first = arguments[0].clone().requires_grad_()
    value = loss(first, *arguments[1:])
    return value.detach(), torch.autograd.grad(value, first)[0]


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number was read back"
        return function(*args, **(kwargs or {}))


@EACH
def test_no_number_is_read_back(call):
    loss, arguments = CALLS[call]
    with NoHostReads(): with_gradient(loss, arguments)
    with pytest.raises(AssertionError, match="read back"), NoHostReads():  # the detector detects
        bool(arguments[0].isfinite().all())


@EACH
def test_meta_tensors_give_a_shape(call):
    loss, arguments = CALLS[call]
    global IDS
    real, IDS = IDS, IDS.to("meta")
    try: value, gradient = with_gradient(loss, [x.to("meta") for x in arguments])
    finally: IDS = real
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float64, "meta")
    assert gradient.shape == arguments[0].shape


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_little(call, dtype):
    loss, arguments = CALLS[call]
    arguments = [x.to(dtype) for x in arguments]
    first = arguments[0].requires_grad_()
    expected = with_gradient(loss, [x.detach().float() for x in arguments])
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*arguments)
        inside = torch.autograd.grad(value, first, retain_graph=True)[0]
    after = torch.autograd.grad(value, first)[0]  # outside, as torch advises
    torch.testing.assert_close(value.detach(), expected[0], rtol=1e-6, atol=1e-6)
    own = 1e-6 if dtype == torch.float32 else 1e-2
    for gradient, tolerance in ((inside, own if call == "chunks" else 1e-2), (after, own)):  # chunks have a backward of their own
        torch.testing.assert_close(gradient.float(), expected[1], rtol=tolerance, atol=tolerance * expected[1].abs().max().item())


@EACH
def test_torch_func_grad_equals_autograd(call):
    loss, arguments = CALLS[call]
    torch.testing.assert_close(torch.func.grad(loss)(*arguments), with_gradient(loss, arguments)[1])


@EACH
def test_vmap_equals_a_loop(call):
    loss, arguments = CALLS[call]
    batches = [torch.stack([x, x.flip(0) if x.ndim else 2 * x, 0.5 * x if x.ndim < 2 else x.roll(1, 0)]) for x in arguments]
    for f in (loss, torch.func.grad(loss)):
        torch.testing.assert_close(torch.func.vmap(f)(*batches), torch.stack([f(*each) for each in zip(*batches)]))


@pytest.mark.parametrize("which", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_vmap_in_chunks_over_one_argument(which):
    one, scales = pair(6, 4), torch.tensor([2.0, 9.0], dtype=torch.float64)
    arguments = [torch.stack([x, x.roll(1, 0)]) if w == 0 else x for x, w in zip(one, which)] + [scales if which[2] == 0 else scales[1]]
    found = []
    for loss in (lambda *x: contrastive_loss(*x, chunk=4), contrastive_loss):
        inside = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), which)
        outside = torch.func.grad(lambda *x, loss=loss: torch.func.vmap(loss, which)(*x).sum(), (0, 1, 2))
        found.append((inside(*arguments), outside(*arguments)))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore")
@EACH
def test_each_compiles_without_a_break(call):
    torch._dynamo.reset()
    loss, arguments = CALLS[call]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradient(compiled, arguments), with_gradient(loss, arguments))


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_takes_another_scale_and_another_batch():
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b, s, c: contrastive_loss(a, b, s, chunk=c), fullgraph=True, backend="eager")
    for n, scale, chunk in ((6, 2.0, None), (6, 3.0, None), (7, 4.0, None), (9, 5.0, 4), (10, 6.0, 4)):
        images, texts = pair(n, 4)
        torch.testing.assert_close(compiled(images, texts, scale, chunk), contrastive_loss(images, texts, scale))


@pytest.mark.filterwarnings("ignore")
def test_inductor_gives_the_same_numbers_and_skips_no_id():
    if not shutil.which("g++"): pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    logits, compiled = pair(6, 4, torch.float32)[0], torch.compile(concept_loss, fullgraph=True)
    torch.testing.assert_close(compiled(logits, IDS), concept_loss(logits, IDS))
    with pytest.raises((IndexError, RuntimeError)): compiled(logits, IDS - 1)


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
        kklip_loss(**parts, validate=True)


def test_without_validate_nan_shows_in_the_total():
    assert kklip_loss(torch.tensor(1.0), torch.tensor(NAN), torch.tensor(1.0))[0].isnan()


@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_a_part_that_is_no_scalar_is_refused_without_validate(shape):
    with pytest.raises(ValueError, match="concept has shape"):
        kklip_loss(torch.tensor(1.0), torch.ones(shape), torch.tensor(1.0))


@pytest.mark.parametrize("bad", [-1.0, NAN, INF])
@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_a_weight_that_is_negative_or_not_finite_is_refused_by_name(name, bad):
    with pytest.raises(ValueError, match=f"{name}={bad}"):
        kklip_loss(*[torch.tensor(1.0)] * 3, **{name: bad})


@pytest.mark.parametrize("value", [NAN, INF])
def test_without_validate_bad_input_shows_in_the_scalar(value):
    bad, good = broken(value), torch.ones(4, 3)
    for loss in (contrastive_loss(bad, good, 10.0), contrastive_loss(good, bad, 10.0, chunk=3), text_distillation_loss(bad, good),
                 text_distillation_loss(good, bad), concept_loss(bad, torch.full((4, 3), 1 / 3))):
        assert not loss.isfinite()
    assert contrastive_loss(good, good, torch.tensor(NAN)).isnan()
