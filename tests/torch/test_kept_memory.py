"""Memory of large CPU results: kept when they are freed, never shared while they live."""

import pytest
import sonicmoe_cpp as sm
import torch

HAS_DELETERS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
pytestmark = pytest.mark.skipif(not HAS_DELETERS, reason="torch 2.10 cannot free them through us")

T, D, N, E, K = 256, 512, 1024, 4, 2


def weights(transposed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """w1 [E, 2N, D] (8 MiB a float32 expert pair) and w2 [E, D, N], leaves; w1 as [E, D, 2N]."""
    generator = torch.Generator().manual_seed(0)
    shape = (E, D, 2 * N) if transposed else (E, 2 * N, D)
    w1 = torch.randn(shape, generator=generator)
    w2 = torch.randn(E, D, N, generator=generator)
    return (w1.transpose(1, 2) if transposed else w1).requires_grad_(), w2.requires_grad_()


def gradients(w1: torch.Tensor, w2: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=generator)
    ids = torch.rand(T, E, generator=generator).topk(K).indices
    y = sm.moe(x, w1, w2, ids, torch.full((T, K), scale))
    return list(torch.autograd.grad(y.sum(), (w1, w2)))


def test_memory_of_a_freed_gradient_serves_the_next() -> None:
    w1, w2 = weights()
    first = gradients(w1, w2)
    addresses = {gradient.data_ptr() for gradient in first}
    del first
    second = gradients(w1, w2)
    assert {gradient.data_ptr() for gradient in second} == addresses


def test_living_gradients_share_no_memory() -> None:
    w1, w2 = weights()
    first = gradients(w1, w2)
    copies = [gradient.clone() for gradient in first]
    second = gradients(w1, w2, scale=2.0)
    for gradient, copy, doubled in zip(first, copies, second, strict=True):
        assert torch.equal(gradient, copy)
        torch.testing.assert_close(doubled, 2 * copy)
        assert doubled.data_ptr() != gradient.data_ptr()


def test_gradients_keep_the_layout_of_transposed_weights() -> None:
    w1, w2 = weights(transposed=True)
    expected = gradients(w1.detach().contiguous().requires_grad_(), w2)[0]
    for _ in range(2):  # in new memory, then in memory that held something else
        gradient = gradients(w1, w2)[0]
        assert gradient.stride() == w1.stride()
        # Another layout may mean another order of the sums.
        assert (gradient - expected).norm() < 1e-6 * expected.norm()
        del gradient


def test_a_view_outlives_its_gradient() -> None:
    w1, w2 = weights()
    row = gradients(w1, w2)[0][1, 5]
    copy = row.clone()
    gradients(w1, w2, scale=3.0)
    assert torch.equal(row, copy)
