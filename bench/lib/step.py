"""The trainer's step on bfloat16 weights as bench/train.py times it, and its measurements."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Callable

import torch

from bench.lib.timing import Clock
from bench.systems.grouped_mm import grouped_experts
from trainer.config import TrainConfig
from trainer.data import Batches
from trainer.footprint import Layout, is_out_of_memory
from trainer.model import cross_entropy, new_model, summed_cross_entropy
from trainer.precision import BUCKET, Masters
from trainer.trainer import Trainer

# bfloat16 parameters and gradients; float32 master weights and moments.
LAYOUT = Layout(
    state=14,
    gradient=2,
    cast=0,
    element=2,
    residual=2,
    logit_rows=Masters.logit_rows,
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
    return grouped_experts(
        hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights
    )


def build(config: TrainConfig, vocab_size: int, device: torch.device):
    """A model on the device, a function of the seed and the device."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("grouped_mm_select", experts_by_select)
    with torch.device(device):
        return new_model(config, vocab_size, 0)


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


class Step(Trainer):
    """The trainer with static tensors for one microbatch, which is one step; it waits for
    nothing."""

    def __init__(
        self, config: TrainConfig, tokens, vocab_size: int, device: torch.device, mode: Mode
    ) -> None:
        super().__init__(config, device, build(config, vocab_size, device), None, Masters)
        self.source, self.mode, self.graph = tokens, mode, None
        self.checksum = float(sum(p.detach().double().abs().sum() for p in self.model.parameters()))
        self._hidden, self.summed = hidden_states, summed_cross_entropy
        if mode.compile:
            self._compile()

    def _compile(self) -> None:
        torch._dynamo.config.recompile_limit = 32  # past it torch would silently run eagerly
        self.summed = torch.compile(summed_cross_entropy)
        if self.mode.compile == "model":
            self._hidden = torch.compile(hidden_states)
            return
        for layer in self.model.model.layers:
            layer.compile()

    def set_microbatch(self, sequences: int, recompile: bool = True) -> None:
        """Another number of sequences; the steps count from 0 again. Captures the CUDA graph.

        Without `recompile` torch.compile takes the sequences as unknown, once for many numbers."""
        config = dataclasses.replace(self.config, batch_size=sequences)
        self.batches, self.step, self.graph = Batches(self.source, config), 0, None
        self.optimizer.zero_grad()
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
                super().forward_backward()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.losses = super().forward_backward()
        self.graph = graph

    def load(self) -> None:
        """The next microbatch into the static tensors."""
        for static, fresh in zip((self.tokens, self.targets), self.batches(self.step), strict=True):
            static.copy_(fresh)

    def batch(self, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens, self.targets

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Some rows of logits at a time."""
        hidden, head = self._hidden(self.model, tokens), self.model.lm_head.weight
        return cross_entropy(hidden, head, targets, self.precision.logit_rows, self.summed)

    def forward_backward(self, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graph:
            self.graph.replay()
        else:
            self.losses = super().forward_backward()
        return self.losses

    def update(self) -> float:
        self.precision.clip(self.model, self.optimizer)
        return super().update()

    def drop_gradients(self) -> None:
        if not self.graph:  # which writes its gradients where they lie
            super().drop_gradients()

    def __call__(self) -> None:
        self.load()
        self.forward_backward()
        self.update()


# ------------------------------------------------------------------------------------- measurement


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
    step.optimizer.zero_grad()
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
