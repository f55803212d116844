"""workspace_limit bounds what an operator allocates beside its results, and changes no bit.

The profiler sees every allocation that an operator takes from torch. Only the slabs of columns of d
depend on the limit, so a call that needs less scratch than under a limit that does not bind ran in
more than one slab. Without a limit, a CPU thread keeps its scratch for the next call.
"""

import re

import pytest
import sonicmoe_cpp as sm
import torch
from torch.profiler import ProfilerActivity, profile

T, D, N, E, K = 1024, 1024, 16, 5, 3


def experts(x, w1, w2, router_weight, limit):
    ids = torch.arange(T * K).view(T, K) % E
    weights = torch.linspace(0.1, 1, T * K).view(T, K)
    return (sm.moe(x, w1, w2, ids, weights, workspace_limit=limit),)


def layer(x, w1, w2, router_weight, limit):
    return sm.moe_layer(x, router_weight, w1, w2, K, workspace_limit=limit)


def traced(call):
    """The result of `call`, and the bytes it holds after each allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = torch.tensor([event.nbytes() for event in events]).cumsum(0)
    return result, held


def scratch(call):
    """The result of `call`, and the bytes allocated at its peak beyond what it leaves behind."""
    result, held = traced(call)
    return result, int(held.max() - held[-1])


def minimum(call):
    """The least legal limit of `call(limit)`, as its error names it."""
    with pytest.raises(RuntimeError, match=r"^moe(_layer)?_forward: workspace_limit: ") as error:
        call(1)
    return int(re.search(r"expected at least (\d+) bytes", str(error.value))[1])


@pytest.mark.parametrize("operation", [experts, layer])
def test_the_limit_bounds_the_scratch_and_changes_no_bit(operation):
    x, w1, w2 = torch.randn(T, D), torch.randn(E, 2 * N, D) / D**0.5, torch.randn(E, D, N) / N**0.5
    leaves = [t.requires_grad_() for t in (x, w1, w2, torch.randn(E, D) / D**0.5)]
    wanted = leaves if operation is layer else leaves[:3]
    grad = torch.randn(T, D)

    def forward_and_backward(limit):
        outputs, forward = scratch(lambda: operation(*leaves, limit))
        gradients, backward = scratch(
            lambda: torch.autograd.grad(
                outputs[0], wanted, grad, retain_graph=True
            )  # frees nothing
        )
        return (outputs[0].detach(), *gradients), forward, backward

    values, *unlimited = forward_and_backward(1 << 40)
    least = minimum(lambda limit: operation(*leaves, limit))
    for limit in (least, (least + unlimited[0]) // 2):
        bounded, *bytes_used = forward_and_backward(limit)
        for used, whole in zip(bytes_used, unlimited, strict=True):
            assert used <= limit < whole
        for ours, theirs in zip(bounded, values, strict=True):
            assert theirs.abs().max() > 0 and torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match=f"expected at least {least} bytes, got {least - 1}"):
        operation(*leaves, least - 1)


def test_a_thread_keeps_its_scratch_until_a_call_has_a_limit():
    x, w1, w2 = torch.randn(T, D), torch.randn(E, 2 * N, D), torch.randn(E, D, N)

    def left_behind(limit):
        (y,), held = traced(lambda: experts(x, w1, w2, None, limit))
        return y, int(held[-1])

    limits = (1 << 40, None, None, 1 << 40)
    results, left = zip(*map(left_behind, limits), strict=True)
    kept = left[1] - left[2]
    assert kept >= T * K * D * 4 and left[2] == results[0].numel() * 4
    assert left[3] == left[2] - kept
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.skipif(
    not any(b.available for b in sm.backends() if b.name == "cpu"),
    reason="the reference backend allocates by itself",
)
@pytest.mark.parametrize("training", [False, True])
def test_out_of_memory_says_so(training):
    """H (training) would take 2^49 bytes, the workspace 2^48: more than the address space holds."""
    tokens, n = 2**22, 2**24
    w1 = torch.zeros(1, 2 * n, 1)
    w2 = torch.zeros(1, 1, n)
    x = torch.zeros(tokens, 1, requires_grad=training)
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"out of memory\. sonicmoe_cpp could not allocate"):
        sm.moe(x, w1, w2, ids, torch.ones(tokens, 1))
