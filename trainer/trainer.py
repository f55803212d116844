"""A model in training: text, optimizer, one step, validation, sample."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from . import checkpoint, data, memory, moments, parallel, restore
from .config import TrainConfig
from .group import Group
from .layout import Layout
from .model import sample_text
from .precision import Autocast
from .routing import RoutingTap
from .schema import UserError


@dataclasses.dataclass
class Text:
    """Tokenizer and tokens of a run."""

    tokenizer: PreTrainedTokenizerFast
    batches: data.Batches
    validation: list
    unigram: float  # cross-entropy of the validation batches, nats per token
    digest: str
    description: str


def load_text(config: TrainConfig, run_dir: Path | None, digest: str, group: Group) -> Text:
    """Reads the text, whose digest, unless empty, has to be `digest`; the tokenizer comes from the
    run, else from the file of tokens, else is trained. A .bin is mapped by every process, a text
    is read by the first."""
    if config.data.endswith(".bin"):
        tokens = data.load_tokens(config.data)
    else:
        tokens = group.share(lambda: _read_tokens(config, run_dir))
    if digest and tokens.digest != digest:
        raise UserError(f"the text ({tokens.source}) has changed since the run began")
    batches = data.Batches(tokens.train, config, group.rank, group.size)
    validation = data.validation_batches(tokens.validation, config)
    unigram = data.unigram_cross_entropy(tokens.train, validation, len(tokens.tokenizer))
    description = (
        f"{tokens.source}: {len(tokens.train):,} training tokens, {len(tokens.tokenizer)} in the "
        f"vocabulary, held out: {', '.join(tokens.validation_names[:3])}"
    )
    if len(tokens.validation_names) > 3:
        description += f" and {len(tokens.validation_names) - 3} more files"
    return Text(tokens.tokenizer, batches, validation, unigram, tokens.digest, description)


def _read_tokens(config: TrainConfig, run_dir: Path | None) -> data.Tokens:
    corpus = data.load_corpus(config.data)
    if run_dir:
        tokenizer = restore.load_tokenizer(run_dir)
    else:
        tokenizer = data.train_tokenizer(corpus.train, config.vocab_size)
    return data.tokenized(corpus, tokenizer)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warmup, then a cosine down to min_lr_ratio of the peak; step counts from 0."""
    warmup = min(config.warmup, config.steps // 5)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def seed_of(config: TrainConfig, step: int, rank: int) -> int:
    """Of the numbers that a process draws in a step: a run that goes on draws those it would
    have."""
    return (config.seed * 0x9E3779B97F4A7C15 + step * 65537 + rank) % 2**63


class Trainer:
    """A model with everything that one training step needs, on one process or on each of
    several."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        model: Qwen3MoeForCausalLM,
        text: Text | None,
        precision: type[Autocast] = Autocast,
        layout: Layout | None = None,
        group: Group | None = None,
    ) -> None:
        """text: None where a subclass has its own batch()."""
        self.config, self.device, self.text = config, device, text
        self.layout, self.group = layout or Layout(), group or Group(device)
        self.precision = precision(config, device)
        self.model = model if self.layout.sharded else self.precision.prepare(model)
        self.tap = RoutingTap(self.model, config, self.layout, self.group)
        self.called = parallel.spread(self.model, config, self.layout, self.group)
        self.optimizer = self.precision.optimizer(self.model)
        self.step = 0
        self.doing = "the first forward pass"  # for the message of a failure

    def content(self) -> checkpoint.Content:
        """For a checkpoint."""
        return checkpoint.Content(
            self.step,
            checkpoint.settings_of(self.config, self.text.digest),
            self.model,
            moments.of(self.optimizer, parallel.by_stock_name(self.model)),
            self.text.tokenizer,
        )

    def restore(self, run_dir: Path, step: int) -> None:
        """Goes on from a checkpoint whose weights the model has."""
        parameters = parallel.by_stock_name(self.model)
        saved = restore.load_moments(run_dir, step, self.model, self.group)
        moments.put(self.optimizer, parameters, saved, step)
        self.step = step

    # One step, in parts that bench/lib/step.py times one by one.

    def batch(self, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets of a part of this step, [B, S] each."""
        tokens, targets = self.text.batches(self.step, part)
        return tokens.to(self.device), targets.to(self.device)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B S, V] float32."""
        return self.called(tokens, use_cache=False).logits.float().flatten(0, 1)

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(tokens), targets.flatten())

    def forward(self, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and load balancing loss of a batch of this step."""
        tokens, targets = self.batch(part)
        self.model.train()
        with self.precision.autocast():
            loss = self.loss(tokens, targets)
        return loss, self.tap.balancing_loss()

    def forward_backward(self, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of forward(); adds the gradients of their sum, over --accumulate, to those in
        the parameters."""
        loss, aux = self.forward(part)
        ((loss + self.config.aux_coef * aux) / self.config.accumulate).backward()
        return loss.detach(), aux.detach()

    def update(self) -> float:
        """The optimizer's step on gradients that were clipped; returns its learning rate."""
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.drop_gradients()
        self.step += 1
        return rate

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def train_step(self) -> dict:
        """One optimizer step; returns its line of metrics. ArithmeticError where it diverges,
        before the weights are changed."""
        self.doing = f"step {self.step + 1}"
        torch.manual_seed(seed_of(self.config, self.step, self.group.rank))
        self.tap.begin_step()
        losses = []
        for part in range(self.config.accumulate):
            parallel.begin_batch(self.called, part + 1 == self.config.accumulate)
            losses.append(torch.stack(self.forward_backward(part)))
            self.tap.count()
        loss, aux = self.group.mean(torch.stack(losses).mean(0))
        norm = self.clip()
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise ArithmeticError(f"the loss is {loss.item()}, the gradient norm {norm.item()}")
        rate = self.update()
        return {
            "step": self.step,
            "loss": loss.item(),
            "aux_loss": aux.item(),
            "lr": rate,
            "grad_norm": norm.item(),
            "tokens": self.step * self.config.tokens_per_step,
        }

    def clip(self) -> torch.Tensor:
        """The gradients' norm, brought down to --grad-clip."""
        if self.group.size > 1:
            return parallel.clip(self.model, self.config.grad_clip)
        return self.precision.clip(self.model, self.optimizer)

    @torch.no_grad()
    def validate(self) -> float:
        """Nats per token over the validation batches, with plain top-K routing."""
        self.doing = f"validation after step {self.step}"
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # nats, tokens
        for batch in self.text.validation:
            tokens, targets = data.slice_of(batch, self.group.rank, self.group.size)
            targets = targets.flatten().to(self.device)
            with self.precision.autocast():
                logits = self.logits(tokens.to(self.device))
            sums[0] += F.cross_entropy(logits, targets, reduction="sum")
            sums[1] += (targets != data.NO_TARGET).sum()
        total, count = self.group.gather(sums).sum(0).tolist()
        if not math.isfinite(total):
            raise ArithmeticError(f"the loss is {total}")
        return total / count

    def sample(self) -> str:
        """Text written by the model; leaves the random state as it was."""
        config = self.config
        self.doing = f"sample after step {self.step}"
        self.model.eval()
        with self.precision.autocast():
            return sample_text(
                self.model,
                self.text.tokenizer,
                config.sample_prompt,
                config.sample_tokens,
                config.seed,
            )

    def memory(self) -> dict:
        with torch.random.fork_rng():  # rounding may draw numbers
            measured = memory.measure_kept_bytes(self.model, self.forward)
        rows = [int(layer.rows.sum()) for layer in self.tap.layers()]
        return memory.memory_report(self.config, measured, rows)
