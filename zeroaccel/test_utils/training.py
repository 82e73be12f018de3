"""The smallest training problem: a line through noisy points."""

from __future__ import annotations

import numpy
import torch


class RegressionDataset:
    """Points of the line y = a x + b with a little noise (0.1): items are `{"x": ..., "y": ...}` in float32.

    Args:
        a: slope.
        b: intercept.
        length: number of points.
        seed: seed of the points; None: other ones each time.
    """

    def __init__(self, a: float = 2, b: float = 3, length: int = 64, seed: int | None = None) -> None:
        generator = numpy.random.default_rng(seed)
        self.length = length
        self.x = generator.normal(size=length).astype(numpy.float32)
        noise = generator.normal(scale=0.1, size=length).astype(numpy.float32)
        self.y = a * self.x + b + noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, numpy.float32]:
        return {"x": self.x[i], "y": self.y[i]}


class RegressionModel(torch.nn.Module):
    """The line `a x + b`, with parameters `a` and `b` to be found.

    Args:
        a: slope to begin with.
        b: intercept to begin with.
        double_output: accepted and without effect, as in Accelerate.
    """

    def __init__(self, a: float = 0, b: float = 0, double_output: bool = False) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(float(a)))
        self.b = torch.nn.Parameter(torch.tensor(float(b)))
        self.first_batch = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The line's points above `x`; the first call prints the types in use."""
        if self.first_batch:
            print(f"Model dtype: {self.a.dtype}, {self.b.dtype}. Input dtype: {x.dtype}")
            self.first_batch = False
        return x * self.a + self.b
