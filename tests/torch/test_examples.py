"""Every example trains: the loss starts near that of guessing a byte, and falls."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import own_router
import train_small

GUESSING = math.log(256)


def assert_learns(losses):
    assert GUESSING - 1 < losses[0] < GUESSING + 1
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("new_model", [train_small.Model, own_router.new_model])
def test_plain_pytorch(new_model):
    losses = train_small.train(steps=12, size=4, new_model=new_model)
    assert len(losses) == 12
    assert_learns(losses)


def test_the_routers_weights_get_gradients():
    layer = own_router.NoisyMoE(32, 16, num_experts=4, top_k=2)
    layer(train_small.torch.randn(2, 5, 32)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())


def test_transformers_trainer(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import transformers_trainer

    log = transformers_trainer.train(steps=20, size=4, folder=tmp_path)
    first, second = (line["loss"] for line in log)
    assert second < first < GUESSING + 0.5


def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    import lightning_module

    losses = []

    class Losses(lightning_module.lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(float(trainer.callback_metrics["loss"]))

    monkeypatch.chdir(tmp_path)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    lightning_module.train(steps=12, size=4, callbacks=[Losses()], **quiet)
    assert len(losses) == 12
    assert_learns(losses)


def test_fsdp2_on_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, EXAMPLES / "fsdp2.py", "--steps", "12", "--size", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step .* (\S+) nats a byte$", done.stdout, re.M)]
    assert len(losses) == 3  # one process tells the steps 0, 10 and 11
    assert_learns(losses)


def test_every_example_is_listed():
    listed = re.findall(r"^\| \[(\S+)\]", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("[a-z]*[!_]"))
