"""One system in one mode of bench/train.py, in a process of its own: measures, and prints rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time

from trainer import footprint
from trainer.config import TrainConfig, UserError

PEAK_FLOPS = 989e12  # per second
SYSTEMS = {
    "sonicmoe": {"experts": "sonicmoe_cpp"},
    "sonicmoe-rounding": {"experts": "sonicmoe_cpp", "router": "token-rounding"},
    "grouped_mm": {"experts": "grouped_mm"},
    "grouped_mm_select": {"experts": "grouped_mm_select"},
    "eager": {"experts": "eager"},
}
KINDS = {  # of kernels, the first that fits
    "sonicmoe": "sonicmoe",
    "attention": "flash|fmha|sdpa|attention",
    "optimizer": "multi_tensor|fused_adam|FusedAdam|lpnorm",
    "products": "nvjet|gemm|cutlass|xmma|splitK",
    "compiled": "^triton_",
    "sort and index": "sort|radix|scatter|gather|index|histogram|cub::",
    "copies": "Memcpy|Memset|copy_kernel",
}


def failure(system: str, mode: str, reason: str) -> dict:
    return {"system": system, "mode": mode, "kind": "failed", "reason": reason}


def model_config(arguments: argparse.Namespace, system: str) -> TrainConfig:
    """dtype float32 means that nothing is cast: the parameters are bfloat16 themselves."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given |= {"batch_size": arguments.microbatch, "dtype": "float32"}
    given |= {"steps": 1 << 30, "warmup": 50, "min_lr_ratio": 1.0}  # constant after the warm-up
    return TrainConfig(**given | SYSTEMS[system])


def with_layers(arguments: argparse.Namespace, config: TrainConfig, vocab_size: int) -> TrainConfig:
    """As many layers as fit with grouped_mm's experts, so that every system has the same model."""
    from bench.lib.step import LAYOUT

    if config.layers:
        return config
    layers = footprint.layers_that_fit(
        dataclasses.replace(config, experts="grouped_mm", router="topk"),
        LAYOUT,
        vocab_size,
        int(arguments.memory_gib * footprint.GIB),
        arguments.microbatch,
        arguments.most_parameters,
    )
    if not layers:
        raise SystemExit(f"bench.train: not one layer fits {arguments.memory_gib} GiB")
    return dataclasses.replace(config, layers=layers)


class Worker:
    """Measures one system in one mode, and prints a row as soon as it is known."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        from bench.lib.step import LAYOUT, MODES, Step

        self.begin = time.monotonic()
        self.arguments = arguments
        system, _, mode = arguments.run[0].partition(":")
        self.plain = mode == "plain"
        self.head = {"system": system, "mode": mode}
        self.layout, self.device = LAYOUT, torch.device(arguments.device)
        if mode not in MODES:
            raise UserError(f"--run: expected one of {', '.join(MODES)} after the colon")
        if MODES[mode].graph and self.device.type != "cuda":
            raise UserError("a CUDA graph needs a GPU")
        if system == "eager" and not self.plain:
            raise UserError(
                "transformers' loop depends on the routing: neither compiled nor captured"
            )
        tokens, self.vocab_size = read_tokens(arguments)
        config = model_config(arguments, system)
        self.config = with_layers(arguments, config, self.vocab_size)
        self.step = Step(self.config, tokens, self.vocab_size, self.device, MODES[mode])
        self.capacity = self.cap_memory(footprint.capacity_of(self.device.type))

    def cap_memory(self, capacity: int) -> int:
        """Holds torch to --cap-gib; the bytes that are then left of the capacity."""
        import torch

        if not self.arguments.cap_gib or self.device.type != "cuda":
            return capacity
        cap = int(self.arguments.cap_gib * footprint.GIB)
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        return min(cap, capacity)

    def seconds_left(self) -> float:
        return self.arguments.limit - (time.monotonic() - self.begin)

    def emit(self, kind: str, **figures) -> None:
        print("ROW " + json.dumps({**self.head, "kind": kind, **figures}), flush=True)

    def run(self) -> None:
        arguments, common = self.arguments, self.arguments.microbatch
        count = footprint.parameters(self.config, self.vocab_size)
        self.emit(
            "model",
            **dataclasses.asdict(count) | {"vocab_size": self.vocab_size},
            checksum=f"{self.step.checksum:.9e}",
            **product_speed(self.device),
            set_up_s=round(time.monotonic() - self.begin, 1),
        )
        begin = time.monotonic()
        self.step.set_microbatch(common)
        if arguments.loss_steps:
            self.losses(common, begin)
        self.timing(common)
        if not arguments.most or "graph" in self.head["mode"]:
            return
        if best := self.search(common):
            self.step.set_microbatch(best)
            self.timing(best)

    def losses(self, sequences: int, begin: float) -> None:
        """Stops early, with what there is, to leave time for the rest."""
        losses, first = [], None
        for index in range(self.arguments.loss_steps):
            self.step()
            losses.append(self.step.losses[0].clone())
            if index % 10 == 0:
                losses[-1].item()  # waits, so that the clock below says how far the device is
                first = first or time.monotonic() - begin
                if self.seconds_left() < 0.35 * self.arguments.limit:
                    break
        values = [round(float(loss), 5) for loss in losses]
        self.emit("losses", microbatch=sequences, first_step_s=round(first, 1), losses=values)

    def timing(self, sequences: int) -> None:
        from bench.lib.step import moe_ms, timed

        figures = timed(self.step, self.arguments.warmup, self.arguments.steps)
        tokens = sequences * self.config.seq_len
        speed = tokens / figures["step_ms"] * 1e3
        flops = footprint.flops_per_token(self.config, self.vocab_size)
        figures |= {"tokens_per_s": speed, "mfu": speed * flops / PEAK_FLOPS}
        if self.device.type == "cuda":
            figures |= cuda_memory()
        if self.plain:
            figures["predicted_mib"] = self.peak(sequences) / footprint.MIB
            figures |= moe_ms(self.step, 3)
            moe = figures["moe_forward_ms"] + figures["moe_backward_ms"]
            figures["moe_share"] = moe / figures["step_ms"]
        if self.device.type == "cuda" and not self.arguments.no_kernels:
            figures |= kernels(self.step)
        self.emit("timing", microbatch=sequences, **figures)

    def peak(self, sequences: int) -> int:
        return footprint.peak(self.config, self.layout, self.vocab_size, sequences)["peak"]

    def search(self, start: int) -> int:
        from bench.lib.step import fits, largest

        def fit(sequences: int) -> bool:
            return self.seconds_left() > 0 and fits(self.step, sequences)

        best, tried = largest(fit, start, self.arguments.most)
        predicted = footprint.largest_microbatch(
            self.config, self.layout, self.vocab_size, self.capacity
        )
        tried = {str(number): fitted for number, fitted in sorted(tried.items())}
        complete = self.seconds_left() > 0
        self.emit("search", largest=best, predicted=predicted, tried=tried, complete=complete)
        return best if complete else 0

    def out_of_memory(self) -> str:
        return footprint.out_of_memory_report(
            self.config, self.layout, self.vocab_size, self.arguments.microbatch, self.capacity
        )


def read_tokens(arguments: argparse.Namespace):
    """Tokens and the size of their vocabulary."""
    import numpy as np

    if arguments.data:
        from trainer.data import load_tokens

        tokens = load_tokens(arguments.data)
        return tokens.train, len(tokens.tokenizer)
    count = max(1 << 20, arguments.most * arguments.seq_len * 2)
    draw = np.random.default_rng(arguments.seed)
    return draw.integers(arguments.vocab_size, size=count).astype(np.uint32), arguments.vocab_size


def cuda_memory() -> dict[str, float]:
    import torch

    return {
        "peak_mib": torch.cuda.max_memory_allocated() / footprint.MIB,
        "reserved_mib": torch.cuda.max_memory_reserved() / footprint.MIB,
    }


def product_speed(device, size: int = 8192) -> dict[str, float]:
    """TFLOP/s of a bfloat16 product, by which GPUs of one kind differ from each other."""
    import torch

    if device.type != "cuda":
        return {}
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 150  # 0.2 s, of which the first third settles the clock
    for index in range(repeats):
        if index == repeats // 3:
            begin.record()
        a @ a.T
    end.record()
    torch.cuda.synchronize()
    flops = 2 * size**3 * (repeats - repeats // 3)
    return {"product_tflops": flops / begin.elapsed_time(end) / 1e9}


def kind_of(kernel: str) -> str:
    return next((kind for kind, part in KINDS.items() if re.search(part, kernel)), "pointwise")


def kernels(step) -> dict:
    """What the GPU does in a step, from two: milliseconds by kind, and the longest kernels."""
    from bench.lib.profile import busy_us

    by_kernel = busy_us(step, repeats=2)
    by_kind: dict[str, float] = {}
    for name, us in by_kernel.items():
        by_kind[kind_of(name)] = by_kind.get(kind_of(name), 0.0) + us / 1e3
    longest = sorted(by_kernel.items(), key=lambda item: -item[1])[:15]
    return {
        "busy_ms": sum(by_kernel.values()) / 1e3,
        "kernels": by_kind,
        "longest_kernels_ms": {name[:100]: us / 1e3 for name, us in longest},
    }


def work(arguments: argparse.Namespace) -> int:
    """Runs in a process of its own; prints rows."""
    worker = None
    try:
        worker = Worker(arguments)
        worker.run()
    except RuntimeError as error:
        if worker is None or not footprint.is_out_of_memory(error):
            raise
        first_line = str(error).splitlines()[0]
        worker.emit("failed", out_of_memory=True, reason=first_line, sizes=worker.out_of_memory())
        return 1
    except UserError as error:
        system, _, mode = arguments.run[0].partition(":")
        print("ROW " + json.dumps(failure(system, mode, str(error))), flush=True)
        return 2
    return 0
