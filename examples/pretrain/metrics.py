"""The metrics file and its pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .checkpoint import sync


class MetricsLog:
    """runs/NAME/metrics.jsonl: one JSON object per training step, appended as it happens."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log after `step`; lines of later steps, cut lines too, are removed."""
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, **fields) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def sync(self) -> None:
        self._file.flush()
        sync(self.path)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of a metrics file; a kill may have cut the last one short."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def new_figure(title: str, ylabel: str = "loss (nats per token)", panels: int = 1):
    """The figure and its axes: one, or with more panels, stacked, an array of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        panels, sharex=True, squeeze=False, figsize=(8, 2 + 3 * panels), layout="constrained"
    )
    for panel in axes[:, 0]:
        panel.grid(alpha=0.3)
    axes[0, 0].set(title=title, ylabel=ylabel)
    axes[-1, 0].set(xlabel="step")
    return figure, axes[0, 0] if panels == 1 else axes[:, 0]


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    os.replace(temporary, path)


def plot_loss(metrics: list[dict], unigram: float, title: str, path: Path) -> None:
    """Training loss, validation loss and the unigram cross-entropy to beat."""
    figure, axes = new_figure(title)
    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, smoothed(losses), color="tab:blue", label="training")
    validated = [m for m in metrics if "val_loss" in m]
    axes.plot(
        [m["step"] for m in validated],
        [m["val_loss"] for m in validated],
        color="tab:orange",
        marker="o",
        markersize=4,
        label="validation",
    )
    axes.axhline(unigram, color="gray", linestyle="--", label="unigram cross-entropy (validation)")
    axes.legend()
    save_figure(figure, path)
