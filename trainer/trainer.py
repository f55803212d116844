"""A model in training: text, optimizer, one step, validation, sample."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from . import checkpoint, data, files, memory, restore
from .config import TrainConfig
from .model import RoutingTap, cross_entropy, sample_text, summed_cross_entropy
from .precision import Autocast
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


def load_text(config: TrainConfig, run_dir: Path | None, digest: str) -> Text:
    """Reads the text, whose digest, unless empty, has to be `digest`; the tokenizer comes from the
    run, else from the file of tokens, else is trained."""
    tokens = _read_tokens(config, run_dir)
    if digest and tokens.digest != digest:
        raise UserError(f"the text ({tokens.source}) has changed since the run began")
    batches = data.Batches(tokens.train, config)
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
    if config.data.endswith(".bin"):
        return data.load_tokens(config.data)
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


class Trainer:
    """A model with everything that one training step needs."""

    summed_cross_entropy = staticmethod(summed_cross_entropy)

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        model: Qwen3MoeForCausalLM,
        text: Text | None,
        precision: type[Autocast] = Autocast,
    ) -> None:
        """text: None where a subclass has its own batch()."""
        self.config, self.device, self.text = config, device, text
        self.precision = precision(config, device)
        self.model = self.precision.prepare(model)
        self.tap = RoutingTap(self.model, config)
        self.optimizer = self.precision.optimizer(self.model)
        self.step = 0
        self.doing = "the first forward pass"  # for the message of a failure

    def state(self) -> checkpoint.TrainerState:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        settings = checkpoint.settings_of(self.config, self.text.digest)
        return checkpoint.TrainerState(
            self.step, self.optimizer.state_dict(), torch.get_rng_state(), cuda, settings
        )

    def restore(self, state: checkpoint.TrainerState) -> None:
        """The optimizer's settings are the configuration's; of the state come its moments."""
        groups = self.optimizer.state_dict()["param_groups"]
        shapes = [p.shape for group in self.optimizer.param_groups for p in group["params"]]
        moments = restore.moments_of(state, shapes)
        try:
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            torch.set_rng_state(state.torch_rng)
            if self.device.type == "cuda" and state.cuda_rng is not None:
                torch.cuda.set_rng_state(state.cuda_rng, self.device)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"--resume: trainer.pt does not fit: {files.reason(error)}") from error
        self.step = state.step

    # One step, in parts that bench/lib/step.py times one by one.

    def batch(self, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets of a part of this step, [B, S] each."""
        tokens, targets = self.text.batches(self.step, part)
        return tokens.to(self.device), targets.to(self.device)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S, d]: what the head turns into logits."""
        return self.model.model(tokens, use_cache=False).last_hidden_state

    def forward(self, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and load balancing loss of a batch of this step."""
        tokens, targets = self.batch(part)
        self.model.train()
        with self.precision.autocast():
            hidden, head = self.hidden(tokens), self.model.lm_head.weight
            loss = cross_entropy(
                hidden, head, targets, self.precision.logit_rows, self.summed_cross_entropy
            )
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
        self.tap.begin_step()
        losses = []
        for part in range(self.config.accumulate):
            losses.append(torch.stack(self.forward_backward(part)))
            self.tap.count()
        loss, aux = torch.stack(losses).mean(0)
        norm = self.precision.clip(self.model, self.optimizer)
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
            **self.tap.row_counts(),
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Nats per token over the validation batches, with plain top-K routing."""
        self.doing = f"validation after step {self.step}"
        self.model.eval()
        total, count = 0.0, 0
        for tokens, targets in self.text.validation:
            targets = targets.to(self.device)
            with self.precision.autocast():
                hidden = self.hidden(tokens.to(self.device))
                loss = summed_cross_entropy(hidden, self.model.lm_head.weight, targets)
            total += loss.item()
            count += targets.numel()
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
