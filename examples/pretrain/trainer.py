"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

from . import checkpoint, data, footprint, memory, metrics
from .config import Request, TrainConfig, UserError, merge_for_resume
from .model import RoutingTap, autocast, choose_device, new_model
from .screen import Screen
from .signals import Signals


@dataclasses.dataclass
class Text:
    """Tokenizer and tokens of a run."""

    tokenizer: PreTrainedTokenizerFast
    batches: data.Batches
    validation: list
    unigram: float  # cross-entropy of the validation batches, nats per token
    digest: str
    description: str


def load_text(config: TrainConfig, run_dir: Path | None, digest: str = "") -> Text:
    """Reads the text; the tokenizer comes from the run, else from the file of tokens, else is
    trained."""
    tokens = _read_tokens(config, run_dir)
    if run_dir and tokens.digest != digest:
        raise UserError(f"--resume: the text ({tokens.source}) has changed since the run began")
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
        tokenizer = checkpoint.load_tokenizer(run_dir)
    else:
        tokenizer = data.train_tokenizer(corpus.train, config.vocab_size)
    return data.tokenized(corpus, tokenizer)


def new_optimizer(model: Qwen3MoeForCausalLM, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only; parameters in the order of their names."""
    named = sorted(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for _, p in named if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )


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

    def __init__(
        self, config: TrainConfig, device: torch.device, model: Qwen3MoeForCausalLM, text: Text
    ) -> None:
        self.config, self.device, self.text = config, device, text
        self.model = model.to(device)
        self.tap = RoutingTap(self.model, config)
        self.optimizer = new_optimizer(self.model, config)
        self.step = 0

    def state(self) -> checkpoint.TrainerState:
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return checkpoint.TrainerState(
            self.step, self.optimizer.state_dict(), torch.get_rng_state(), cuda
        )

    def restore(self, state: checkpoint.TrainerState) -> None:
        saved = state.optimizer["state"]
        for index, parameter in enumerate(
            p for g in self.optimizer.param_groups for p in g["params"]
        ):
            if index in saved and saved[index]["exp_avg"].shape != parameter.shape:
                raise UserError(
                    "--resume: the optimizer in the checkpoint has another shape than its model"
                )
        try:
            self.optimizer.load_state_dict(state.optimizer)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"--resume: the optimizer in the checkpoint does not fit: {error}"
            ) from error
        torch.set_rng_state(state.torch_rng)
        if self.device.type == "cuda" and state.cuda_rng:
            torch.cuda.set_rng_state_all(state.cuda_rng)
        self.step = state.step

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with autocast(self.config, self.device):
            return self.model(tokens.to(self.device), use_cache=False).logits

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and load balancing loss of the batch of this step."""
        tokens, targets = self.text.batches(self.step)
        self.model.train()
        logits = self.logits(tokens).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(self.device))
        return loss, self.tap.balancing_loss()

    def train_step(self) -> dict:
        """One optimizer step; returns its line of metrics."""
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, aux = self.forward()
        (loss + self.config.aux_coef * aux).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise ArithmeticError(
                f"step {self.step + 1}: the loss is {loss.item()}, the gradient "
                f"norm {norm.item()}; the last checkpoint is kept"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {
            "step": self.step,
            "loss": loss.item(),
            "aux_loss": aux.item(),
            "lr": rate,
            "grad_norm": norm.item(),
            "tokens": self.step * self.config.tokens_per_batch,
            **self.tap.row_counts(),
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Nats per token over the validation batches, with plain top-K routing."""
        self.model.eval()
        total, count = 0.0, 0
        for tokens, targets in self.text.validation:
            logits = self.logits(tokens).float().flatten(0, 1)
            targets = targets.flatten().to(self.device)
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            count += targets.numel()
        return total / count

    def sample(self) -> str:
        """Text written by the model; leaves the random state as it was."""
        tokenizer, config = self.text.tokenizer, self.config
        self.model.eval()
        prompt = tokenizer(config.sample_prompt or data.END_OF_TEXT, return_tensors="pt")
        with torch.random.fork_rng(), autocast(config, self.device):
            torch.manual_seed(config.seed)
            ids = self.model.generate(
                prompt.input_ids.to(self.device),
                do_sample=True,
                temperature=0.8,
                top_k=50,
                max_new_tokens=config.sample_tokens,
                eos_token_id=None,
                pad_token_id=tokenizer.eos_token_id,
                attention_mask=torch.ones_like(prompt.input_ids, device=self.device),
            )
        return tokenizer.decode(ids[0])

    def memory(self) -> dict:
        with torch.random.fork_rng():  # rounding may draw numbers
            measured = memory.measure_kept_bytes(self.model, self.forward)
        rows = [int(layer.rows.sum()) for layer in self.tap.layers()]
        return memory.memory_report(self.config, measured, rows)


class Run:
    """A trainer at work in its folder."""

    def __init__(self, trainer: Trainer, run_dir: Path, signals: Signals) -> None:
        self.trainer, self.run_dir, self.signals = trainer, run_dir, signals
        self.config = trainer.config
        self.log = metrics.MetricsLog(run_dir / "metrics.jsonl", trainer.step)

    def save(self) -> None:
        self.log.sync()
        checkpoint.save(
            self.run_dir, self.trainer.state(), self.trainer.model, self.trainer.text.tokenizer
        )
        self.plot()

    def plot(self) -> None:
        lines = metrics.read_metrics(self.run_dir / "metrics.jsonl")
        if lines:
            metrics.plot_loss(
                lines, self.trainer.text.unigram, self.config.name, self.run_dir / "loss.png"
            )

    def loop(self, screen: Screen) -> int:
        """Trains to the last step; returns the exit code."""
        trainer, config, speed = self.trainer, self.config, 0.0
        while trainer.step < config.steps:
            begin = time.monotonic()
            line = trainer.train_step()
            last = trainer.step == config.steps
            latest = config.tokens_per_batch / (time.monotonic() - begin)
            speed = 0.9 * speed + 0.1 * latest if speed else latest
            line["tokens_per_second"] = round(latest, 1)
            shares = trainer.tap.shares()
            if last or trainer.step % config.eval_every == 0:
                line["val_loss"] = trainer.validate()
                line["expert_shares"] = [[round(s, 5) for s in layer] for layer in shares]
                screen.validated(trainer.step, line["val_loss"])
            self.log.append(**line)
            screen.update(trainer.step, line["loss"], speed, shares)
            if self.signals.received:
                self.save()
                screen.say(
                    f"stopped and saved at step {trainer.step}; "
                    f"--resume --name {config.name} continues"
                )
                return 128 + self.signals.received
            if last or trainer.step % config.save_every == 0:
                self.save()
        return 0

    def finish(self, screen: Screen) -> None:
        lines = metrics.read_metrics(self.run_dir / "metrics.jsonl")
        final, unigram = lines[-1]["val_loss"], self.trainer.text.unigram
        if self.config.sample_tokens:
            checkpoint.write_atomically(self.run_dir / "sample.txt", self.trainer.sample() + "\n")
        share = final / unigram
        summary = {
            "step": self.trainer.step,
            "val_loss": final,
            "unigram_cross_entropy": unigram,
            "share_of_unigram": share,
        }
        checkpoint.write_atomically(
            self.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n"
        )
        screen.say(
            f"validation loss {final:.3f} nats/token; unigram cross-entropy of the same "
            f"text {unigram:.3f}; the model is at {share:.1%} of it"
        )
        screen.say(
            f"in {self.run_dir}/: metrics.jsonl, loss.png, sample.txt, memory.json, checkpoint/"
        )


def train(request: Request, signals: Signals) -> int:
    """Starts or resumes the run that the request describes; returns the exit code."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run_dir = request.config.run_dir
    if request.resume:
        saved, digest = checkpoint.read_config(run_dir)
        config = merge_for_resume(saved, request)
        with checkpoint.exclusive(run_dir):
            return _continue(_resumed(config, digest), run_dir, signals)
    config = request.config
    checkpoint.check_free(run_dir, request.overwrite)
    trainer = _started(config)  # settles config.dtype, which is written below
    with checkpoint.new_run(run_dir) as folder, checkpoint.exclusive(folder):
        checkpoint.write_config(folder, config, trainer.text.digest)
        checkpoint.save(folder, trainer.state(), trainer.model, trainer.text.tokenizer)
        checkpoint.check_free(run_dir, request.overwrite)
        checkpoint.publish(folder, run_dir)
        return _continue(trainer, run_dir, signals)


def _started(config: TrainConfig) -> Trainer:
    device = _prepare(config)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    text = load_text(config, None)
    model = new_model(config, len(text.tokenizer), text.tokenizer.eos_token_id)
    return Trainer(config, device, model, text)


def _resumed(config: TrainConfig, digest: str) -> Trainer:
    device = _prepare(config)
    state = checkpoint.load_state(config.run_dir)
    model = checkpoint.load_model(config.run_dir, config)
    trainer = Trainer(config, device, model, load_text(config, config.run_dir, digest))
    trainer.restore(state)
    checkpoint.write_config(config.run_dir, config, digest)
    checkpoint.remove_incomplete(config.run_dir)
    return trainer


def _prepare(config: TrainConfig) -> torch.device:
    if config.threads:
        torch.set_num_threads(config.threads)
    return choose_device(config)


@contextlib.contextmanager
def _out_of_memory_explained(trainer: Trainer):
    """Turns torch's error into one that names the sizes and a microbatch that fits."""
    try:
        yield
    except RuntimeError as error:
        if not footprint.is_out_of_memory(error):
            raise
        config = trainer.config
        raise MemoryError(
            footprint.out_of_memory_report(
                config,
                footprint.layout_of(config),
                len(trainer.text.tokenizer),
                config.batch_size,
                footprint.capacity_of(trainer.device.type),
            )
        ) from error


def _continue(trainer: Trainer, run_dir: Path, signals: Signals) -> int:
    with _out_of_memory_explained(trainer):
        return _trained(trainer, run_dir, signals)


def _trained(trainer: Trainer, run_dir: Path, signals: Signals) -> int:
    config = trainer.config
    screen = Screen(config.steps, trainer.step, trainer.text.unigram)
    _introduce(trainer, screen, run_dir)
    run = Run(trainer, run_dir, signals)
    if trainer.step >= config.steps:
        screen.say("all steps are done; a larger --steps goes further")
        run.finish(screen)
        return 0
    report = json.dumps(trainer.memory(), indent=2) + "\n"
    checkpoint.write_atomically(run_dir / "memory.json", report)
    signals.deferred = True
    try:
        with screen:
            code = run.loop(screen)
    finally:
        signals.deferred = False
        run.log.close()
    if code == 0:
        run.finish(screen)
    return code


def _introduce(trainer: Trainer, screen: Screen, run_dir: Path) -> None:
    config, model = trainer.config, trainer.model
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    active = total - experts + experts * config.top_k // config.num_experts
    router = config.router
    if router == "token-rounding":
        router += f" ({config.policy}, tile {config.tile})"
    screen.say(f"text       {trainer.text.description}")
    screen.say(
        f"model      Qwen3-MoE, {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active; "
        f"{config.layers} layers of {config.num_experts} experts, top-{config.top_k}"
    )
    screen.say(f"experts    {config.experts}, router {router}, {config.dtype} on {trainer.device}")
    screen.say(f"unigram    {trainer.text.unigram:.3f} nats/token is the cross-entropy to beat")
    screen.say(f"run        {run_dir}/, step {trainer.step} of {config.steps}")
