"""What only a GPU can show. All of it is skipped where there is none."""

import numpy as np
import pytest
import torch
from little_shards import RECIPE, STEPS, data, folder  # noqa: F401, two fixtures

from kklip_nb.scale.distributed import World
from kklip_nb.scale.long_run import train_shards

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = torch.device("cuda")


@pytest.fixture
def no_reads():
    "Any wait of the processor for the GPU is an error."
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def features(n: int = 64, d: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, n, d, generator=random)
    return a.to(CUDA).requires_grad_(), b.to(CUDA).requires_grad_(), c.softmax(1).to(CUDA)


def test_losses_and_their_gradients_never_wait_for_the_gpu(no_reads):
    from kklip_nb.losses import concept_loss, contrastive_loss, kklip_loss, text_distillation_loss
    a, b, labels = features()
    scale = torch.ones((), device=CUDA, requires_grad=True)
    total, _ = kklip_loss(text_distillation_loss(a, b), concept_loss(a, labels), contrastive_loss(a, b, scale.exp()))
    total.backward()
    contrastive_loss(a, b, scale.exp(), chunk=10).backward()


def test_losses_equal_those_of_the_processor():
    from kklip_nb.losses import concept_loss, contrastive_loss, text_distillation_loss
    a, b, labels = features()
    for function, *given in ((text_distillation_loss, a, b), (concept_loss, a, labels), (contrastive_loss, a, b, 14.3)):
        there = function(*given)
        here = function(*(x.detach().cpu() if isinstance(x, torch.Tensor) else x for x in given))
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


def test_labels_are_exact_even_where_products_are_rounded(monkeypatch):
    from kklip_nb.concepts import concept_labels, soft_labels
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x, c = np.random.default_rng(0).normal(size=(2, 64, 576)).astype(np.float32) / 24
    with torch.autocast("cuda", torch.bfloat16): labels = concept_labels(torch.from_numpy(x).to(CUDA), torch.from_numpy(c).to(CUDA), 0.1)
    np.testing.assert_allclose(labels.cpu().numpy(), soft_labels(x.astype(float), c.astype(float), 0.1), atol=1e-6)


@pytest.mark.parametrize("settings", [dict(precision="bf16"), dict(precision="fp16"), dict(precision="bf16", compile=True)], ids=str)
def test_a_student_trains_in_half_precision(tmp_path, data, settings):
    student = train_shards(RECIPE, data, tmp_path, World(0, 1, CUDA), workers=0, **settings)
    assert all(p.isfinite().all() for p in student.parameters())
    assert (tmp_path / "log.csv").read_text().count("\n") == STEPS + 1


def test_the_teacher_says_the_same_on_both(tmp_path):
    from kklip_nb.scale.rehearsal import random_teacher
    from kklip_nb.teacher import embed_captions
    captions = ["a dog", "two cats on a mat", "a red car"]
    teacher = random_teacher(captions, 64)
    here = embed_captions(teacher, captions, "last", -1, 'In one word: "{}" ')
    teacher.model.to(CUDA)
    np.testing.assert_allclose(embed_captions(teacher, captions, "last", -1, 'In one word: "{}" '), here, atol=1e-3)
