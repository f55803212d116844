"""One training step of a bfloat16 Qwen3-MoE as bench/train.py times it: model, loss, optimizer."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trainer.config import TrainConfig
from trainer.data import Batches
from trainer.footprint import Layout, is_out_of_memory
from trainer.model import RoutingTap, new_model

LOGIT_ROWS = 4096  # tokens whose logits exist at a time
BUCKET = 1 << 26  # parameters the optimizer converts to float32 at a time
# bfloat16 parameters and gradients; float32 master weights and moments.
LAYOUT = Layout(
    state=14,
    gradient=2,
    cast=0,
    element=2,
    residual=2,
    logit_rows=LOGIT_ROWS,
    optimizer=8 * BUCKET,
)


@dataclasses.dataclass(frozen=True)
class Mode:
    """Which of torch's means against launch costs are on."""

    compile: str = ""  # "layers": each decoder layer; "model": all layers at once
    graph: bool = False  # forward and backward replayed as one CUDA graph


MODES = {
    "plain": Mode(),
    "compile": Mode("layers"),
    "compile-model": Mode("model"),
    "graph": Mode(graph=True),
    "compile+graph": Mode("layers", graph=True),
}


def experts_by_select(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """transformers' experts on grouped_mm with index_select instead of indexing: its backward adds
    rows instead of sorting indices."""
    from bench.systems import grouped_experts

    return grouped_experts(
        hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights
    )


def build(config: TrainConfig, vocab_size: int, device: torch.device):
    """A model with bfloat16 parameters, a function of the seed and the device."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("grouped_mm_select", experts_by_select)
    with torch.device(device):
        model = new_model(config, vocab_size, 0)
    for parameter in model.parameters():  # not .to(): the rotary frequencies stay in float32
        parameter.data = parameter.data.bfloat16()
    return model.train()


def hidden_states(model, tokens: torch.Tensor) -> torch.Tensor:
    """The layers' result. transformers' own loop looks for packed sequences, which waits for the
    GPU, and under torch.compile takes attention with a mask for it."""
    inner = model.model
    hidden = inner.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotary = inner.rotary_emb(hidden, position_ids=positions)
    for layer in inner.layers:
        hidden = layer(
            hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary
        )
    return inner.norm(hidden)


def chunk_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")


class MasterAdamW:
    """AdamW on float32 masters of bfloat16 parameters, with the gradient's norm clipped to 1.

    Works through buckets of parameters, so that float32 gradients exist for one bucket at a time.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, warmup: int) -> None:
        self.parameters, self.lr, self.warmup, self.steps = parameters, lr, warmup, 0
        self.buckets = []
        for bucket in _buckets(parameters, BUCKET):
            masters = [p.detach().float() for p in bucket]
            optimizer = torch.optim.AdamW(
                masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
            )
            self.buckets.append((bucket, masters, optimizer))

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        rate = self.lr * min(1.0, self.steps / max(1, self.warmup))
        gradients = [p.grad for p in self.parameters]
        scale = (1.0 / torch.nn.utils.get_total_norm(gradients).float()).clamp(max=1.0)
        for bucket, masters, optimizer in self.buckets:
            for parameter, master in zip(bucket, masters, strict=True):
                master.grad = parameter.grad.float().mul_(scale)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_copy_(bucket, masters)

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _buckets(parameters: list, size: int) -> Iterator[list]:
    bucket, count = [], 0
    for parameter in parameters:
        bucket.append(parameter)
        count += parameter.numel()
        if count >= size:
            yield bucket
            bucket, count = [], 0
    if bucket:
        yield bucket


class Step:
    """A model, its optimizer and the static tensors of one microbatch, which is one step."""

    def __init__(
        self, config: TrainConfig, tokens, vocab_size: int, device: torch.device, mode: Mode
    ) -> None:
        self.config, self.text, self.device, self.mode = config, tokens, device, mode
        self.model = build(config, vocab_size, device)
        self.tap = RoutingTap(self.model, config)
        parameters = [p for _, p in sorted(self.model.named_parameters())]
        self.optimizer = MasterAdamW(parameters, config.lr, config.warmup)
        self.checksum = float(sum(p.detach().double().abs().sum() for p in parameters))
        self._hidden, self._loss = hidden_states, chunk_loss
        if mode.compile:
            self._compile()

    def _compile(self) -> None:
        torch._dynamo.config.recompile_limit = 32  # past it torch would silently run eagerly
        self._loss = torch.compile(chunk_loss)
        if self.mode.compile == "model":
            self._hidden = torch.compile(hidden_states)
            return
        for layer in self.model.model.layers:
            layer.compile()

    def set_microbatch(self, sequences: int, recompile: bool = True) -> None:
        """Another number of sequences; the steps count from 0 again. Captures the CUDA graph.

        Without `recompile` torch.compile takes the sequences as unknown, once for many numbers."""
        config = dataclasses.replace(self.config, batch_size=sequences)
        self.batches, self.position, self.graph = Batches(self.text, config), 0, None
        self.optimizer.drop_gradients()
        if self.mode.compile and recompile:
            torch._dynamo.reset()
        self.tokens, self.targets = (t.to(self.device) for t in self.batches(0))
        if self.mode.graph:
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward_backward()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.drop_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward_backward()
        self.graph = graph

    def load(self) -> None:
        """The next microbatch into the static tensors."""
        for static, fresh in zip(
            (self.tokens, self.targets), self.batches(self.position), strict=True
        ):
            static.copy_(fresh)
        self.position += 1

    def forward_backward(self) -> None:
        """Leaves the cross-entropy of the microbatch in `loss`, the gradients in the parameters."""
        if self.graph:
            self.graph.replay()
        else:
            self._forward_backward()

    def _forward_backward(self) -> None:
        hidden = self._hidden(self.model, self.tokens).flatten(0, 1)
        targets, head = self.targets.flatten(), self.model.lm_head.weight
        parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        total = sum(
            checkpoint(self._loss, h, head, t, use_reentrant=False, preserve_rng_state=False)
            for h, t in parts
        )
        loss = total / targets.numel()
        (loss + self.config.aux_coef * self.tap.balancing_loss()).backward()
        self.loss = loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        if not self.graph:
            self.optimizer.drop_gradients()

    def __call__(self) -> None:
        self.load()
        self.forward_backward()
        self.update()


# ------------------------------------------------------------------------------------- measurement


class Clock:
    """Marks on the GPU's stream, or on the CPU the time of day."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, begin, end) -> float:
        """After wait()."""
        return begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin)


def timed(step: Step, warmup: int, steps: int) -> dict[str, float]:
    """Medians over `steps` steps, in milliseconds: the step, and its optimizer."""
    clock = Clock(step.device)
    for _ in range(warmup):
        step()
    clock.wait()
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    marks = []
    for _ in range(steps):
        begin = clock.mark()
        step.load()
        step.forward_backward()
        middle = clock.mark()
        step.update()
        marks.append((begin, middle, clock.mark()))
    clock.wait()
    return {
        "step_ms": statistics.median(clock.ms(a, c) for a, _, c in marks),
        "optimizer_ms": statistics.median(clock.ms(b, c) for _, b, c in marks),
    }


def moe_ms(step: Step, steps: int) -> dict[str, float]:
    """Milliseconds per step inside the MoE layers, forward and backward: marks on the stream around
    each. For a step without torch.compile and CUDA graph."""
    clock = Clock(step.device)
    spans: dict[str, list] = {"forward": [], "backward": []}
    opened = []

    def begin(*unused) -> None:
        opened.append(clock.mark())

    def end(name: str) -> Callable:
        def close(*unused) -> None:
            spans[name].append((opened.pop(), clock.mark()))

        return close

    handles = []
    for layer in step.model.model.layers:
        handles += [
            layer.mlp.register_forward_pre_hook(begin),
            layer.mlp.register_forward_hook(end("forward")),
            layer.mlp.register_full_backward_pre_hook(begin),
            layer.mlp.register_full_backward_hook(end("backward")),
        ]
    for _ in range(steps):
        step()
    clock.wait()
    for handle in handles:
        handle.remove()
    forward, backward = (
        sum(clock.ms(a, b) for a, b in spans[name]) / steps for name in ("forward", "backward")
    )
    return {"moe_forward_ms": forward, "moe_backward_ms": backward}


def fits(step: Step, sequences: int) -> bool:
    """Whether two steps of this microbatch run within the memory."""
    try:
        step.set_microbatch(sequences, recompile=False)
        for _ in range(2):
            step()
        Clock(step.device).wait()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    release(step)  # outside the handler: nothing holds the step's tensors any more
    return False


def release(step: Step) -> None:
    step.optimizer.drop_gradients()
    step.graph = None
    for block in step.model.model.layers:
        block.mlp.gate.last_output = None
    gc.collect()
    torch.cuda.empty_cache()


def largest(fit: Callable[[int], bool], start: int, most: int) -> tuple[int, dict[int, bool]]:
    """The largest number within `most` that fits, by doubling from `start`, then bisection; and all
    that was tried. 0 where not even 1 fits."""
    tried: dict[int, bool] = {}

    def try_one(number: int) -> bool:
        if number not in tried:
            tried[number] = fit(number)
        return tried[number]

    low, high = 0, start
    while high <= most and try_one(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if try_one(middle) else (low, middle)
    return low, tried
