"""Tensors of one call on different devices, on a GPU: refused by name before anything runs, and the
GPU's context lives on. Skipped without a GPU, as test_cuda.py."""

import threading

import pytest
import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp.options import RoutedExpertOptions

CUDA = next((b for b in sm.backends() if b.name == "cuda"), None)
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or CUDA is None or not CUDA.available,
    reason=f"no usable GPU: {CUDA.reason if CUDA else 'the build has no CUDA backend'}",
)

T, D, N, E, K = 128, 64, 64, 8, 2
BF16 = torch.bfloat16


def experts():
    return {
        "x": torch.randn(T, D).to(BF16),
        "w1": torch.randn(E, 2 * N, D).to(BF16),
        "w2": torch.randn(E, D, N).to(BF16),
        "b1": torch.randn(E, 2 * N).to(BF16),
        "b2": torch.randn(E, D).to(BF16),
    }


def slots():
    return {"topk_ids": torch.randint(0, E, (T, K)), "topk_weights": torch.rand(T, K)}


def pairs():
    return {
        "token_ids": torch.arange(T),
        "expert_ids": torch.randint(0, E, (T,)),
        "pair_weights": torch.rand(T),
    }


def sorted_rows():
    rows = experts()
    ends = torch.arange(1, E + 1, dtype=torch.int32) * (T // E)
    return {**rows, "offsets": ends, "row_weights": torch.rand(T)}


def whole_layer():
    router = {
        "router_weight": torch.randn(E, D),
        "router_bias": torch.randn(E),
        "selection_bias": torch.randn(E),
    }
    return experts() | router


CALLS = {
    "moe": (sm.moe, lambda: experts() | slots(), {}),
    "moe_pairs": (sm.moe_pairs, lambda: experts() | pairs(), {}),
    "moe_sorted": (sm.moe_sorted, sorted_rows, {}),
    "moe_layer": (sm.moe_layer, whole_layer, {"top_k": K, "scoring": "sigmoid_topk"}),
    "route": (
        sm.route,
        lambda: {"logits": torch.randn(T, E), "selection_bias": torch.randn(E)},
        {"top_k": K, "scoring": "sigmoid_topk"},
    ),
    "round_tokens": (
        sm.round_tokens,
        lambda: {"logits": torch.randn(T, E), "seed": torch.tensor([3])},
        {"top_k": K, "tile": 16, "policy": "stochastic"},
    ),
    "load_balancing_loss": (
        sm.load_balancing_loss,
        lambda: {
            "logits": torch.randn(T, E),
            "rows_per_expert": torch.full((E,), T * K // E, dtype=torch.int32),
        },
        {"top_k": K},
    ),
    "update_expert_bias_": (
        sm.update_expert_bias_,
        lambda: {
            "selection_bias": torch.zeros(E),
            "rows_per_expert": torch.arange(E, dtype=torch.int32),
        },
        {"rate": 0.1},
    ),
}
CASES = [(name, argument) for name, (_, make, _) in CALLS.items() for argument in make()]


@pytest.mark.parametrize("elsewhere", ["cpu", "meta"])
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_one_argument_elsewhere_is_refused(name, argument, elsewhere):
    call, make, options = CALLS[name]
    tensors = {key: tensor.cuda() for key, tensor in make().items()}
    with pytest.raises((RuntimeError, ValueError)) as error:
        call(**tensors | {argument: tensors[argument].to(elsewhere)}, **options)
    message = str(error.value)
    assert "cuda:0" in message and elsewhere in message, message
    others = [key for key in tensors if key != argument]
    named = [argument, "router_weight", "router_bias", "selection_bias", "seed_tensor", "x"]
    assert any(f"{key}: " in message for key in (*named, *others)), message
    torch.cuda.synchronize()  # an error of a kernel would surface here
    results = call(**{key: tensor.cuda() for key, tensor in make().items()}, **options)
    torch.cuda.synchronize()
    for result in results if isinstance(results, tuple) else (results,):
        assert result.double().abs().sum() > 0


@pytest.mark.parametrize("argument", ["grad_out", "h", "metadata", "weights", "b1"])
def test_backward_operators_compare_devices(argument):
    ops = torch.ops.sonicmoe_cpp
    t = {key: tensor.cuda() for key, tensor in (experts() | slots()).items()}
    codes = RoutedExpertOptions().pack()
    routing = (0, t["topk_ids"], None, t["topk_weights"])
    weights = (t["w1"], t["b1"], t["w2"], t["b2"])
    y, h, metadata, _ = ops.moe_forward(t["x"], *weights, *routing, *codes, True)
    given = {
        "grad_out": y, "x": t["x"], "w1": t["w1"], "b1": t["b1"], "w2": t["w2"], "b2": t["b2"],
        "form": 0, "ids": t["topk_ids"], "token_ids": None, "weights": t["topk_weights"],
        "h": h, "metadata": metadata,
    }  # fmt: skip

    def backward(arguments):
        *others, h, metadata = arguments.values()
        return ops.moe_backward(*others, [h, metadata], *codes, [True] * 6)

    with pytest.raises(RuntimeError, match="expected a tensor on cuda:0, got one on cpu"):
        backward(given | {argument: given[argument].cpu()})
    torch.cuda.synchronize()
    assert all(g.double().abs().sum() > 0 for g in backward(given))


def test_the_first_use_of_the_gpu_in_a_thread():
    """The thread has no current context until somebody makes the device's current."""
    tensors = {key: tensor.cuda() for key, tensor in (experts() | slots()).items()}
    expected = sm.moe(**tensors)
    results = []
    thread = threading.Thread(target=lambda: results.append(sm.moe(**tensors)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_other_gpu_is_another_device():
    tensors = {key: tensor.cuda() for key, tensor in (experts() | slots()).items()}
    for argument in tensors:
        with pytest.raises(RuntimeError, match="cuda:[01]"):
            sm.moe(**tensors | {argument: tensors[argument].to("cuda:1")})
    moved = {key: tensor.to("cuda:1") for key, tensor in tensors.items()}
    torch.testing.assert_close(sm.moe(**moved).cpu(), sm.moe(**tensors).cpu(), rtol=0, atol=0)
