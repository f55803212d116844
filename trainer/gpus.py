"""The GPUs that processes side by side are spread over."""

from __future__ import annotations

import os


def gpu_names(count: int) -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES, at most `count`, each of which shows a process one of the
    GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return names[:count]
