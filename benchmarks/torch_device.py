"""What every side in PyTorch does with its device."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


def repeated(step: Callable[[], Any], device: torch.device) -> Callable[[int], None]:
    """Make run(n): call step n times and wait until the device has done them."""

    def run(times: int) -> None:
        for _ in range(times):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def shuffled_rows(count: int, size: int) -> Iterator[torch.Tensor]:
    """Give the rows of one batch after another, every epoch in a new order, without its rest."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < size:
            order = torch.randperm(count)
        rows, order = order[:size], order[size:]
        yield rows


def peak_memory(device: torch.device) -> int:
    """The most bytes that the device has held, 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
