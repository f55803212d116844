"""The metrics file and its pictures."""

from __future__ import annotations

import json
from pathlib import Path

from . import files
from .schema import Rule, UserError, check_fields, list_of, number, whole

_COUNT = whole(0, 2**62)
RULES: dict[str, Rule] = {
    "step": whole(1),
    "loss": number(),
    "aux_loss": number(),
    "lr": number(),
    "grad_norm": number(),
    "tokens": _COUNT,
    "rows": _COUNT,
    "rows_dropped": _COUNT,
    "rows_added": _COUNT,
    "tokens_per_second": number(),
    "val_loss": number(),
    "expert_shares": list_of(list_of(number(0, 1))),
    "tokens_per_second_per_process": number(),
    "rows_per_process": list_of(number(), least=3),  # least, mean, most
    "rows_over_capacity": _COUNT,
}
AT_VALIDATIONS = {"val_loss", "expert_shares"}
OF_SEVERAL = {"tokens_per_second_per_process", "rows_per_process", "rows_over_capacity"}


class MetricsLog:
    """runs/NAME/metrics.jsonl: one JSON object per training step, appended as it happens."""

    def __init__(self, path: Path, step: int) -> None:
        """Opens the log after `step`; lines of later steps, cut lines too, are removed."""
        self.path, self.lines = path, read_metrics(path, step)
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = path.open("ab", buffering=0)

    def append(self, **fields) -> None:
        self.lines.append(fields)
        try:
            self._file.write((json.dumps(fields) + "\n").encode())
        except OSError as error:
            error.filename = str(self.path)
            raise

    def sync(self) -> None:
        files.sync(self.path)

    def close(self) -> None:
        self._file.close()


class Board:
    """The metrics for TensorBoard, in a folder of event files: the numbers of every line, and the
    busiest expert's rows over the mean for each layer."""

    def __init__(self, folder: Path, step: int) -> None:
        """Events after `step`, of a run that went on from it, are no longer shown."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def append(self, line: dict) -> None:
        scalars = {name: value for name, value in line.items() if name in self.SCALARS}
        for layer, shares in enumerate(line.get("expert_shares", [])):
            scalars[f"busiest_expert/layer_{layer}"] = max(shares) * len(shares)
        if rows := line.get("rows_per_process"):
            names = (f"rows_per_process/{name}" for name in ("least", "mean", "most"))
            scalars |= dict(zip(names, rows, strict=True))
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()

    SCALARS = RULES.keys() - {"step", "expert_shares", "rows_per_process"}


def read_metrics(path: Path, step: int | None = None) -> list[dict]:
    """The lines of a metrics file, up to `step` where it is given. UserError for a damaged line,
    and where the file ends before `step`.

    A kill may have cut the last line short. A file that is absent has no lines, whatever the step:
    who removes it goes on without them, so it may begin at any step.
    """
    try:
        content = files.read_bytes(path, most=1 << 34)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {files.reason(error)}") from error
    lines, reached = [], 0
    for index, part in enumerate(content.split(b"\n")[:-1]):
        place = f"{path}: line {index + 1}"
        try:
            line = _checked(part, place)
        except UserError:
            if step is None or reached < step:
                raise
            break  # the disk may have lost what came after the checkpoint
        if reached and line["step"] != reached + 1:
            raise UserError(f"{place}: step: expected {reached + 1}, got {line['step']}")
        reached = line["step"]
        lines.append(line)
    if step is not None and reached < step:
        raise UserError(
            f"{path} ends at step {reached}, the checkpoint is of step {step}: restore it, "
            f"or remove it to go on without its lines"
        )
    return [line for line in lines if step is None or line["step"] <= step]


def _checked(part: bytes, place: str) -> dict:
    try:
        return check_fields(RULES, files.parse_json(part), place, AT_VALIDATIONS | OF_SEVERAL)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {files.reason(error)}") from error


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

    try:
        with files.replacing(path) as file:
            figure.savefig(file, format="png", dpi=120)
    finally:
        pyplot.close(figure)


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
