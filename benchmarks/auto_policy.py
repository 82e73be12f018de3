"""What `auto` bucket sizes cost: policy `fast` against Accelerate's numbers, interleaved in one process, on a GPU.

Usage: python benchmarks/auto_policy.py [--stages 2 3] [--layers 24] [--hidden 1024] [--blocks 6] [--steps 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from zeroaccel import Accelerator, DeepSpeedPlugin
from zeroaccel.state import AcceleratorState, GradientState

BATCH, TOKENS = 8, 512
KEYS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


class Encoder(nn.Module):
    """A transformer encoder that tells its hidden size as models of transformers do."""

    def __init__(self, layers: int, hidden: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=hidden)
        layer = nn.TransformerEncoderLayer(hidden, hidden // 64, 4 * hidden, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def prepare(stage: int, policy: str, arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **dict.fromkeys(KEYS[: 1 if stage < 3 else 3], "auto")},
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, auto_policy=policy))
    torch.manual_seed(0)
    model = Encoder(arguments.layers, arguments.hidden)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    return accelerator, model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    print("| stage | parameters | Accelerate's numbers, ms a step | fast / Accelerate's |\n|---|---|---|---|")
    for stage in arguments.stages:
        runs = {policy: prepare(stage, policy, arguments) for policy in ("accelerate", "fast")}
        x = torch.randn(BATCH, TOKENS, arguments.hidden, device="cuda", dtype=torch.bfloat16)
        times: dict[str, list[float]] = {policy: [] for policy in runs}
        for block in range(-1, arguments.blocks):  # the first one warms up
            for policy, (accelerator, model, optimizer) in runs.items():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(arguments.steps):
                    accelerator.backward(model(x).float().square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
                torch.cuda.synchronize()
                if block >= 0:
                    times[policy].append((time.perf_counter() - begin) / arguments.steps * 1000)
        ratio = statistics.median(f / a for f, a in zip(times["fast"], times["accelerate"], strict=True))
        size = sum(getattr(p, "ds_numel", p.numel()) for p in runs["fast"][1].parameters())
        print(
            f"| {stage} | {size / 1e6:.0f}M | {statistics.median(times['accelerate']):.0f} | {ratio:.2f} |", flush=True
        )
        for _, model, _ in runs.values():
            model.destroy()


if __name__ == "__main__":
    main()
