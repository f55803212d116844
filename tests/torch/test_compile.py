"""opcheck of every operator, and torch.compile with a changing number of tokens."""

import math
import re
import shutil

import pytest
import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp._library import POLICIES
from sonicmoe_cpp.options import (
    ExpertOptions,
    LayerOptions,
    RoundingOptions,
    RoutedExpertOptions,
    RouterOptions,
    joined,
)
from torch.library import opcheck

ops = torch.ops.sonicmoe_cpp
T, D, N, E, K = 32, 16, 8, 4, 2
EXPERT_OPTIONS = RoutedExpertOptions().pack()
ROUTER_OPTIONS = RouterOptions(top_k=K, renormalize=True).pack()


# Of opcheck; test_backward_steps.py traces the steps.
UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")


def tensors(grad):
    x, wr = torch.randn(T, D), torch.randn(E, D)
    w1, w2 = torch.randn(E, 2 * N, D), torch.randn(E, N, D).transpose(1, 2)
    b1, b2 = torch.randn(E, 2 * N), torch.randn(E, D)
    return [t.requires_grad_(grad) for t in (x, wr, w1, b1, w2, b2)]


def moe_args(form, grad):
    x, _, w1, b1, w2, b2 = tensors(grad)
    ids = {
        0: torch.randint(0, E, (T, K)),
        1: torch.tensor([8, 8, 20, T], dtype=torch.int32),
    }
    tokens = torch.randint(0, T, (50,))
    routing = (ids[form], None) if form < 2 else (torch.randint(0, E, (50,)), tokens)
    weights = torch.rand({0: (T, K), 1: (T,), 2: (50,)}[form]).requires_grad_(grad)
    return x, w1, b1, w2, b2, form, *routing, weights


def backward_args(grad, args, h, metadata, needs):
    return grad, *args, [h, metadata], *EXPERT_OPTIONS, needs


def step_args(grad, args, h, metadata):
    """Of the operators of a backward in steps; no place of what they hand on is undefined."""
    hidden = (grad, *args, [h, metadata], *EXPERT_OPTIONS, True)
    grad_h, scaled_a, lists, _ = ops.moe_backward_hidden(*hidden)
    down = (grad, *args, [metadata, scaled_a, lists], *EXPERT_OPTIONS, (True, True))
    up = (*args, [metadata, grad_h, lists], *EXPERT_OPTIONS, (True, True, True))
    return {"moe_backward_hidden": hidden, "moe_backward_down": down, "moe_backward_up": up}


def layer_step_args(backward, main):
    """Likewise of the layer, from the arguments of moe_layer_backward."""
    grad, grad_logits, x, wr, br, *experts, saved, integers, reals, needs = backward
    *routing, h, metadata = saved
    options, routing = (integers, reals), [*routing, metadata]
    hidden = (grad, x, wr, *experts, [*routing, h], *options)
    grad_h, scaled_a, lists, ds = ops.moe_layer_backward_hidden(*hidden)
    handed_on = [*routing, scaled_a, lists]
    down = (grad, x, wr, *experts, handed_on, *options, needs[-2:], main[-2:])
    handed_on = [*routing, grad_h, lists, ds]
    up = (x, grad_logits, wr, br, *experts, handed_on, *options, needs[:-2], main[:-2])
    names = ("moe_layer_backward_hidden", "moe_layer_backward_down", "moe_layer_backward_up")
    return dict(zip(names, (hidden, down, up), strict=True))


@pytest.mark.parametrize("form", [0, 1, 2])
def test_opcheck_moe(form):
    opcheck(ops.moe_forward, (*moe_args(form, True), *EXPERT_OPTIONS, True))
    args = moe_args(form, False)
    opcheck(ops.moe_forward, (*args, *EXPERT_OPTIONS, False))
    _, h, metadata, _ = ops.moe_forward(*args, *EXPERT_OPTIONS, True)
    for needs in ((True,) * 6, (False, True, False, True, False, False)):
        opcheck(ops.moe_backward, backward_args(torch.randn(T, D), args, h, metadata, needs))
    for name, given in step_args(torch.randn(T, D), args, h, metadata).items():
        opcheck(getattr(ops, name), given, test_utils=UNTRACED)


def layer_args(rounding, grad):
    """Tensors and options of moe_layer_forward."""
    # A tile of one row leaves no unused place, whose H is never written: opcheck compares all bits.
    x, wr, w1, b1, w2, b2 = tensors(grad)
    router = RouterOptions(top_k=K, renormalize=True)
    options = LayerOptions(ExpertOptions(), router, RoundingOptions(tile=1) if rounding else None)
    return (x, wr, None, w1, b1, w2, b2, None), options.pack()


def layer_backward_args(rounding):
    """Of moe_layer_backward, without main_grads; and a buffer for every parameter."""
    given, options = layer_args(rounding, False)
    _, logits, _, *saved, _ = ops.moe_layer_forward(*given, None, *options, True)
    x, *parameters, _ = given
    needs = [True, *(p is not None for p in parameters)]
    main = [torch.zeros(p.shape) for p in parameters if p is not None]
    grads = (torch.randn(T, D), torch.randn(T, E))
    return (*grads, x, *parameters, [logits, *saved], *options, needs), main


@pytest.mark.parametrize("rounding", [False, True])
def test_opcheck_moe_layer(rounding):
    given, options = layer_args(rounding, True)
    opcheck(ops.moe_layer_forward, (*given, None, *options, True))
    backward, main = layer_backward_args(rounding)
    opcheck(ops.moe_layer_backward, (*backward, []))
    opcheck(ops.moe_layer_backward, (*backward, main))
    for buffers in ([], main):
        for name, args in layer_step_args(backward, buffers).items():
            opcheck(getattr(ops, name), args, test_utils=UNTRACED)


def test_the_layer_adds_to_main_grads_what_it_returns_without():
    backward, main = layer_backward_args(True)
    versions = [buffer._version for buffer in main]
    grad_x, *grads = ops.moe_layer_backward(*backward, [])
    ours, *empty = ops.moe_layer_backward(*backward, main)
    assert torch.equal(ours, grad_x) and all(g.numel() == 0 for g in empty)
    grads = [g for g in grads if g.numel()]
    for buffer, version, right in zip(main, versions, grads, strict=True):
        assert buffer._version == version + 1
        assert right.abs().max() > 0 and torch.equal(buffer, right)
    for wrong in (main[:-1], [*main, main[0]]):
        with pytest.raises(RuntimeError, match="main_grads: expected 5 values, got"):
            ops.moe_layer_backward(*backward, wrong)


def test_packed_options_of_another_version_are_refused():
    """Fewer or more than the library has, or no enumerator: as another's exported graph would."""
    given, (integers, reals) = layer_args(True, False)
    for options in (
        (integers[:-1], reals), ((*integers, 0), reals), (integers, reals[:-1]),
        (integers, (*reals, 1.0)), ((300, *integers[1:]), reals), ((-1, *integers[1:]), reals),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="(options|reals): expected .+, got"):
            ops.moe_layer_forward(*given, None, *options, True)


def test_opcheck_router():
    logits = torch.randn(T, E, requires_grad=True)
    plain = logits.detach()
    # opcheck's own loss adds results up in place, which fails where an integer comes first: with
    # gradients the tracing is left to the compile tests below.
    graded = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.route_forward, (plain, None, *ROUTER_OPTIONS))
    opcheck(ops.route_forward, (logits, None, *ROUTER_OPTIONS), test_utils=graded)
    ids, weights = ops.route_forward(plain, None, *ROUTER_OPTIONS)
    opcheck(ops.route_backward, (weights, plain, ids, *ROUTER_OPTIONS))
    for policy in POLICIES:
        options = joined(ROUTER_OPTIONS, RoundingOptions(tile=8, policy=policy, seed=1).pack())
        args = (None, None, *options)
        opcheck(ops.round_tokens_forward, (plain, *args))
        opcheck(ops.round_tokens_forward, (logits, *args), test_utils=graded)
    options = joined(ROUTER_OPTIONS, RoundingOptions(tile=8, policy="stochastic").pack())
    tokens, experts, weights, ids, _, rows = ops.round_tokens_forward(
        plain, None, torch.tensor([1]), *options
    )
    opcheck(ops.round_tokens_backward, (weights, plain, ids, tokens, experts, *options))
    x, weight, bias = torch.randn(T, D), torch.randn(E, D), torch.randn(E)
    opcheck(ops.router_logits_forward, (x, weight.requires_grad_(), bias))
    backward = (plain, x.bfloat16(), weight.detach(), None, [True, True, False])
    opcheck(ops.router_logits_backward, backward)
    opcheck(ops.load_balancing_loss_forward, (logits, rows, K, 1))
    opcheck(ops.load_balancing_loss_backward, (torch.ones(1), plain, rows, K, 1))
    opcheck(ops.router_z_loss_forward, (logits,))
    opcheck(ops.router_z_loss_backward, (torch.ones(1), plain))
    opcheck(ops.update_expert_bias_, (torch.zeros(E), rows, 0.1))


def compare_compiled(function, backend, sizes=(32, 48, 40, 64)):
    """Compiled equals eager at every size, in at most two compilations (the second is dynamic)."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for size in sizes:
        x = torch.randn(size, D, requires_grad=True)
        y, expected = compiled(x), function(x)
        assert torch.equal(y, expected)
        (a,) = torch.autograd.grad(y.square().sum(), x)
        (b,) = torch.autograd.grad(expected.square().sum(), x)
        assert b.abs().max() > 0 and torch.equal(a, b)
    assert 1 <= counter.frame_count <= 2


def functions():
    _, wr, w1, b1, w2, b2 = tensors(True)
    weights = {"b1": b1, "b2": b2}

    def functional(x):
        ids, s = sm.route(x @ wr.T, K, renormalize=True)
        return sm.moe(x, w1, w2, ids, s, **weights)

    def pairs(x):
        tokens, experts, s = sm.round_tokens(x @ wr.T, K, tile=8)
        return sm.moe_pairs(x, w1, w2, tokens, experts, s, **weights)

    def rounded(x):
        y, logits, rows = sm.moe_layer(
            x,
            wr,
            w1,
            w2,
            K,
            router="token_rounding",
            tile=8,
            seed=torch.tensor(3),
            **weights,
        )
        return y + sm.load_balancing_loss(logits, rows, top_k=K) + sm.router_z_loss(logits)

    return {"functional": functional, "pairs": pairs, "rounded": rounded}


@pytest.mark.parametrize("name", ["functional", "pairs", "rounded"])
def test_compile_functions(name):
    compare_compiled(functions()[name], "aot_eager")


@pytest.mark.parametrize("router", ["topk", "token_rounding"])
def test_compile_module(router):
    compare_compiled(sm.MoE(D, N, E, K, router=router, tile=8), "aot_eager")


def test_compiled_batches_below_the_tile_are_plain_top_k():
    module = sm.MoE(D, N, E, K, router="token_rounding", tile=40)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for size in (48, 39, 40, 7, 64):
        x = torch.randn(size, D)
        assert torch.equal(compiled(x), module(x))
        rounded = bool((module.last_rows_per_expert % 40 == 0).all())
        assert rounded is (size >= 40)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    """Ours stays one call inside the graph; inductor may contract what is around it."""
    module = sm.MoE(D, N, E, K)

    def function(x):
        y, logits, rows = module(x.tanh(), return_router=True)
        return y * 2 + sm.load_balancing_loss(logits, rows, top_k=K)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    for size in (T, T + 16):
        x = torch.randn(size, D, requires_grad=True)
        y, expected = compiled(x), function(x)
        torch.testing.assert_close(y, expected)
        (a,) = torch.autograd.grad(y.square().sum(), x)
        (b,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_compile_under_autocast():
    module = sm.MoE(D, N, E, K)
    x = torch.randn(T, D)

    def run(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(x)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = run(compiled)
    assert y.dtype == torch.bfloat16 and torch.equal(y, run(module))


def test_compile_the_bias_update():
    rows = torch.tensor([3, 0, 1, 2], dtype=torch.int32)

    def function(bias):
        return 2 * sm.update_expert_bias_(bias, rows, 0.5)

    torch._dynamo.reset()
    ours, right = torch.zeros(E), torch.zeros(E)
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(ours)
    assert torch.equal(y, function(right)) and torch.equal(ours, right)
    assert ours._version > 0 and ours.abs().max() == 0.5


def test_compile_with_options_that_change():
    """Whatever dynamo makes of an int, an option is a constant: each value is a graph."""
    _, wr, w1, _, w2, _ = tensors(False)
    ids, weights = torch.randint(0, E, (T, K)), torch.rand(T, K)

    def layer(x, seed):
        options = {"router": "token_rounding", "policy": "stochastic", "tile": 8}
        return sm.moe_layer(x, wr, w1, w2, K, seed=seed, **options)[0]

    def limited(x, limit):
        return sm.moe(x, w1, w2, ids, weights, workspace_limit=limit)

    x = torch.randn(T, D)
    for function, values in ((layer, (3, 4, 5, 2**63 - 1)), (limited, (2**30, 2**31, 2**40))):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for value in values:
            assert torch.equal(compiled(x, value), function(x, value))
    assert any(not torch.equal(layer(x, 3), layer(x, seed)) for seed in range(4, 12))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_two_dynamic_dimensions(strict, tmp_path):
    """Also through a file, where the options are numbers in the graph."""
    module = sm.MoE(D, N, E, K, scoring="sigmoid_topk", selection_bias=True, scale=0.5).eval()
    batch, length = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "length"))
    program = torch.export.export(
        module, (torch.randn(2, 6, D),), {"return_router": True},
        dynamic_shapes={"x": {0: batch, 1: length}, "return_router": None}, strict=strict,
    )  # fmt: skip
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for shape in ((2, 6, D), (3, 5, D), (1, 1, D)):
        x = torch.randn(shape)
        for ours, right in zip(loaded(x, return_router=True), module(x, True), strict=True):
            assert torch.equal(ours, right)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_aot_inductor(tmp_path):
    """Lists of numbers (an infinite one too, which JSON does not have), absent tensors and two
    dynamic dimensions, without Python at run time."""
    options = {"activation": "swiglu_clamped", "limit": math.inf, "workspace_limit": 2**30}
    module = sm.MoE(D, N, E, K, router_bias=True, **options).eval()
    dims = {index: torch.export.Dim(f"d{index}", min=1, max=64) for index in (0, 1)}
    with torch.no_grad():
        x = torch.randn(2, 6, D)
        program = torch.export.export(module, (x,), dynamic_shapes={"x": dims})
        path = str(tmp_path / "layer.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        loaded = torch._inductor.aoti_load_package(path)
        for shape in ((2, 6, D), (3, 5, D)):
            x = torch.randn(shape)
            right = module(x)
            assert right.abs().max() > 0 and torch.equal(loaded(x), right)


def test_compile_torch_func():
    _, wr, w1, b1, w2, b2 = tensors(False)

    def loss(x):
        return sm.moe_layer(x, wr, w1, w2, K, b1=b1, b2=b2)[0].square().sum()

    gradient = torch.func.grad(loss)
    batch = torch.randn(3, 8, D)
    right = torch.func.vmap(gradient)(batch)
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.vmap(gradient), fullgraph=True, backend="aot_eager")
    assert right.abs().max() > 0 and torch.equal(compiled(batch), right)


def test_fakes_cover_every_operator_with_meta_tensors():
    meta = [t.detach().to("meta") for t in tensors(False)]
    x, wr, w1, b1, w2, b2 = meta
    y, logits, rows = sm.moe_layer(x, wr, w1, w2, K, b1=b1, b2=b2)
    assert y.shape == (T, D) and logits.shape == (T, E) and rows.shape == (E,)


def operator_calls():
    """Every operator with legal arguments."""
    plain = moe_args(0, False)
    _, h, metadata, _ = ops.moe_forward(*plain, *EXPERT_OPTIONS, True)
    given, options = layer_args(True, False)
    layer, main = layer_backward_args(True)
    logits, seed, bias = torch.randn(T, E), torch.tensor([1]), torch.randn(E)
    router = RouterOptions(top_k=K, scoring="sigmoid_topk").pack()  # takes a bias
    rounding = joined(router, RoundingOptions(tile=8, policy="stochastic").pack())
    tokens, experts, weights, ids, _, rows = ops.round_tokens_forward(logits, bias, seed, *rounding)
    chosen, chosen_weights = ops.route_forward(logits, bias, *router)
    return {
        "moe_forward": (*plain, *EXPERT_OPTIONS, True),
        "moe_backward": backward_args(torch.randn(T, D), plain, h, metadata, [True] * 6),
        **step_args(torch.randn(T, D), plain, h, metadata),
        **layer_step_args(layer, main),
        "moe_layer_forward": (*given, seed, *options, True),
        "moe_layer_backward": (*layer, main),
        "router_logits_forward": (torch.randn(T, D), torch.randn(E, D), bias),
        "router_logits_backward": (
            logits,
            torch.randn(T, D),
            torch.randn(E, D),
            bias,
            [True] * 3,
        ),
        "route_forward": (logits, bias, *router),
        "route_backward": (chosen_weights, logits, chosen, *router),
        "round_tokens_forward": (logits, bias, seed, *rounding),
        "round_tokens_to_forward": (logits, bias, torch.full((E,), 8).int(), *rounding),
        "round_tokens_backward": (weights, logits, ids, tokens, experts, *rounding),
        "load_balancing_loss_forward": (logits, rows, K, 1),
        "load_balancing_loss_backward": (torch.ones(1), logits, rows, K, 1),
        "router_z_loss_forward": (logits,),
        "router_z_loss_backward": (torch.ones(1), logits),
        "update_expert_bias_": (bias, rows, 0.1),
    }


def moved(arguments, place, device):
    """The arguments with the tensor at `place`, an index or that of a list and one within it,
    elsewhere."""
    first, *within = place
    arguments = list(arguments)
    if within:
        arguments[first] = list(moved(arguments[first], within, device))
    else:
        arguments[first] = arguments[first].to(device)
    return arguments


def places_of_tensors(names, arguments):
    """(place, name) of every tensor, those of lists as well."""
    for index, (name, value) in enumerate(zip(names, arguments, strict=True)):
        if isinstance(value, torch.Tensor):
            yield (index,), name
        elif isinstance(value, list):
            for inner, tensor in enumerate(value):
                if isinstance(tensor, torch.Tensor):
                    yield (index, inner), f"{name}[{inner}]"


def test_no_operator_takes_tensors_of_several_devices():
    """torch runs the fake as soon as one tensor is on meta: it would return memory as it is."""
    for name, arguments in operator_calls().items():
        operator = getattr(ops, name)
        operator(*arguments)
        names = [argument.name for argument in operator.default._schema.arguments]
        places = list(places_of_tensors(names, arguments))
        for place, named in places if len(places) > 1 else ():
            (_, first), (_, second) = places[:2]
            devices = "cpu", "meta"
            if place == places[0][0]:
                named, devices = second, devices[::-1]
            message = re.escape(f"{name}: {named}: expected a tensor on {devices[0]}, as {first}, ")
            with pytest.raises(RuntimeError, match=f"{message}got {devices[1]}"):
                operator(*moved(arguments, place, "meta"))
        meta = arguments
        for place, _ in places:
            meta = moved(meta, place, "meta")
        outputs = operator(*meta)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs or ()
        assert all(output.device.type == "meta" for output in outputs)


def test_fakes_refuse_gradients_of_absent_tensors():
    arguments = operator_calls()["moe_backward"]
    names = [argument.name for argument in ops.moe_backward.default._schema.arguments]
    for place, _ in places_of_tensors(names, arguments):
        arguments = moved(arguments, place, "meta")
    arguments[3] = None
    with pytest.raises(RuntimeError, match="needs: expected False for grad_b1, as the tensor is"):
        ops.moe_backward(*arguments)


def test_operators_refuse_gradients_of_absent_tensors():
    arguments = list(operator_calls()["moe_backward"])
    arguments[3] = None
    with pytest.raises(RuntimeError, match="needs: expected false for grad_b1, as the tensor is"):
        ops.moe_backward(*arguments)
