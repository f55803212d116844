"""The run of train_small.py under Lightning: its model in a LightningModule.

pip install lightning
python examples/lightning_module.py --steps 60
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from train_small import CONTEXT, Model, read_text


class LanguageModel(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def training_step(self, windows, _):
        """windows [B, CONTEXT + 1]: bytes."""
        logits, balance = self.model(windows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss + 0.01 * balance

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(steps=200, size=32, **options):
    """Returns Lightning's Trainer, made with `options`."""
    lightning.seed_everything(0, verbose=False)
    windows = read_text().long().unfold(0, CONTEXT + 1, CONTEXT // 4)
    precision = "bf16-mixed" if torch.cuda.is_available() else "32-true"
    trainer = lightning.Trainer(
        max_steps=steps, precision=precision, logger=False, enable_checkpointing=False, **options
    )
    trainer.fit(LanguageModel(), DataLoader(windows, batch_size=size, shuffle=True))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    train(parser.parse_args().steps)
