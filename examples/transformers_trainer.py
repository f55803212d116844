"""The run of train_small.py with a model and the Trainer of transformers.

    python examples/transformers_trainer.py --steps 60

`replace_moe_blocks` is the one line of this library. The rest is as for any model of transformers.
"""

import argparse

from sonicmoe_cpp.integrations.transformers import replace_moe_blocks
from train_small import BLOCKS, CONTEXT, EXPERTS, HEADS, TOP_K, WIDTH, read_text
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments, set_seed


def train(steps=200, size=32, folder="runs/transformers"):
    """Returns transformers' log: one dict for every 10 steps, with the loss in nats a byte."""
    set_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256, hidden_size=WIDTH, num_hidden_layers=BLOCKS, head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, num_experts=EXPERTS,
            num_experts_per_tok=TOP_K, moe_intermediate_size=WIDTH, output_router_logits=True,
        )
    )  # fmt: skip
    replace_moe_blocks(model)
    windows = read_text().long().unfold(0, CONTEXT, CONTEXT // 4)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=size, learning_rate=3e-3,
        logging_steps=10, save_strategy="no", report_to="none",
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    train(parser.parse_args().steps)
