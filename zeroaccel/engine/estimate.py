"""What a ZeRO stage and offload need of GPU, host and disk: arithmetic only, no torch.

The terms are what DeepSpeed 0.19.8 allocates for training with PyTorch's AdamW, which becomes DeepSpeed's CPU Adam
under offload. Left out: the CUDA context, NCCL's buffers and the allocator's fragments, 1 to 2 GiB a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from zeroaccel.errors import ConfigError

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000
MAX_PARAMETERS_IN_CPU = 1_000_000_000
OPTIMIZER_SWAP_BUFFERS = 4
PARAMETER_SWAP_BUFFERS = 5 * 100_000_000

FP32 = 4
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# Offload -> the stages that can do it.
OFFLOADS = {
    "none": (0, 1, 2, 3),
    "optimizer cpu": (1, 2, 3),
    "optimizer+param cpu": (3,),
    "nvme": (3,),
}


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model; 0 is unknown.

    Attributes:
        parameters: all, which are taken to be trained.
        largest_parameter: elements of the largest one.
        largest_layer: parameters of the largest layer, which has to be whole on the GPU.
        hidden_size, num_layers, num_heads, vocab_size: of a transformer, for activations.
    """

    parameters: int
    largest_parameter: int = 0
    largest_layer: int = 0
    hidden_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    vocab_size: int = 0


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once on one GPU.

    Attributes:
        micro_batch: sequences.
        seq_len: tokens of each.
        eager_attention: the matrix of attention scores is kept (PyTorch's `sdpa` and flash attention keep none).
        checkpointing: only the inputs of layers are kept, and what is between them computed again.
    """

    micro_batch: int
    seq_len: int
    eager_attention: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Setting:
    """How the model is trained.

    Attributes:
        stage: ZeRO stage.
        offload: key of `OFFLOADS`.
        dtype: key of `DTYPE_BYTES`: of weights and gradients; fp32 masters are kept beside 16-bit weights.
        gpus_per_node, nodes: their product is the number of ranks.
        reduce_bucket: `reduce_bucket_size` of the config.
        zero_init: stage 3 builds the model already split (`zero3_init_flag`), else every rank has it whole at first.
    """

    stage: int
    offload: str = "none"
    dtype: str = "bfloat16"
    gpus_per_node: int = 1
    nodes: int = 1
    reduce_bucket: int = REDUCE_BUCKET
    zero_init: bool = True

    @property
    def ranks(self) -> int:
        return self.gpus_per_node * self.nodes


@dataclass(frozen=True)
class OnGpu:
    """Bytes on each GPU.

    Attributes:
        weights, gradients: in the dtype; gradients as they are at the end of the backward pass.
        masters: fp32 weights that the optimizer changes.
        optimizer: Adam's two moments.
        buffers: what DeepSpeed keeps for communication and copies.
        activations: what the forward pass keeps for the backward pass; 0 where nobody said what goes in.
        passing: what else the backward pass needs for moments: gathered weights, the gradient just made.
        step: copies that the optimizer step makes, counted from the end of the backward pass.
        start: what `prepare()` needs before anything is split.
    """

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    optimizer: int = 0
    buffers: int = 0
    activations: int = 0
    passing: int = 0
    step: int = 0
    start: int = 0

    @property
    def working(self) -> int:
        """What comes and goes: in the backward pass or in the step, whichever is more."""
        return max(self.buffers + self.activations + self.passing, self.step)

    @property
    def total(self) -> int:
        """The peak."""
        kept = self.weights + self.gradients + self.masters + self.optimizer
        return max(kept + self.working, self.start)


@dataclass(frozen=True)
class OnHost:
    """Bytes of host memory for each rank; as in `OnGpu`, and `start` for the model before `prepare()`."""

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    optimizer: int = 0
    buffers: int = 0
    start: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return max(self.weights + self.gradients + self.masters + self.optimizer + self.buffers, self.start)


@dataclass(frozen=True)
class Estimate:
    """What one setting needs: of each GPU, of the host for each rank, and of the disk for each rank (bytes)."""

    setting: Setting
    gpu: OnGpu
    host: OnHost
    nvme: int = 0

    @property
    def node_host(self) -> int:
        """OnHost memory of a node."""
        return self.host.total * self.setting.gpus_per_node

    @property
    def node_nvme(self) -> int:
        """Disk of a node."""
        return self.nvme * self.setting.gpus_per_node


def combinations() -> Iterator[tuple[int, str]]:
    """Every ZeRO stage with every offload that it can do, from the fastest to the most frugal."""
    for offload, stages in OFFLOADS.items():
        for stage in stages:
            yield stage, offload


@dataclass(frozen=True)
class _Sizes:
    """The quantities that the terms are made of: `whole` and `part` in elements, the others in bytes."""

    shape: ModelShape
    setting: Setting

    @property
    def w(self) -> int:
        return DTYPE_BYTES[self.setting.dtype]

    @property
    def whole(self) -> int:
        return self.shape.parameters

    @property
    def part(self) -> int:
        return math.ceil(self.whole / self.setting.ranks)

    @property
    def bucket(self) -> int:
        return self.w * self.setting.reduce_bucket

    @property
    def newest_gradient(self) -> int:
        return self.w * self.shape.largest_parameter

    @property
    def norm(self) -> int:
        """The norm of the largest piece of a gradient is taken in 64 bit."""
        return 8 * min(self.shape.largest_parameter, self.part)


def estimate(shape: ModelShape, setting: Setting, activations: int = 0) -> Estimate:
    """What a setting needs.

    Args:
        shape: the model.
        setting: how it is trained; an offload that its stage can do.
        activations: bytes that the forward pass keeps, of the function of this name.
    """
    stages = {0: _stage0, 1: _stage12, 2: _stage12, 3: _stage3}
    return stages[setting.stage](_Sizes(shape, setting), activations)


def _stage0(s: _Sizes, kept: int) -> Estimate:
    mixed = s.w < FP32
    # Gradients are averaged in buckets of at most 500 million elements, whatever the config says.
    bucket = s.w * min(s.whole, REDUCE_BUCKET) if s.setting.ranks > 1 else 0
    gpu = OnGpu(
        weights=s.w * s.whole,
        gradients=s.w * s.whole,
        masters=FP32 * s.whole if mixed else 0,
        optimizer=2 * FP32 * s.whole,
        activations=kept,
        # fp32 copies of the gradients, and the denominator of Adam's fraction, which PyTorch makes for all at once
        step=max(bucket, (2 if mixed else 1) * FP32 * s.whole),
    )
    return Estimate(s.setting, gpu, OnHost(start=FP32 * s.whole))


def _stage12(s: _Sizes, kept: int) -> Estimate:
    start = OnHost(start=FP32 * s.whole)
    split = s.setting.stage == 2
    if s.setting.offload == "none":
        gradients = s.w * (s.part if split else s.whole)
        # Averaged gradients, the same in one piece, and (16 bit) in fp32; then Adam's denominator beside the last.
        copies = max((2 * s.w + (FP32 if s.w < FP32 else 0)) * s.part, 2 * FP32 * s.part, s.w * s.part + s.norm)
        gpu = OnGpu(
            weights=s.w * s.whole,
            gradients=gradients,
            masters=FP32 * s.part,
            optimizer=2 * FP32 * s.part,
            buffers=s.bucket,
            activations=kept,
            passing=s.newest_gradient if split else s.w * s.part,
            step=max(0, copies - gradients),
        )
        return Estimate(s.setting, gpu, start)
    gpu = OnGpu(
        weights=s.w * s.whole,
        gradients=0 if split else s.w * s.whole,
        buffers=s.bucket + s.newest_gradient,
        activations=kept,
        passing=s.newest_gradient if split else 0,
    )
    host = OnHost(
        gradients=FP32 * s.part + (s.w * s.part if split else 0),
        masters=FP32 * s.part,
        optimizer=2 * FP32 * s.part,
        buffers=s.w * s.part + s.newest_gradient,  # new weights on their way to the GPU
        start=start.start,
    )
    return Estimate(s.setting, gpu, host)


def _stage3(s: _Sizes, kept: int) -> Estimate:
    offload = s.setting.offload
    on_gpu = offload in ("none", "optimizer cpu")
    sub_group = min(s.part, SUB_GROUP)
    gathered = s.w * min(s.whole, max(MAX_LIVE_PARAMETERS, s.shape.largest_layer))
    gpu = OnGpu(
        weights=s.w * s.part if on_gpu else 0,
        gradients=s.w * s.part if offload == "none" else 0,
        masters=FP32 * s.part if offload == "none" else 0,
        optimizer=2 * FP32 * s.part if offload == "none" else 0,
        buffers=s.bucket,
        activations=kept,
        passing=gathered + s.newest_gradient,
        # A sub-group's gradients in fp32, and Adam's denominator.
        step=s.bucket + max(2 * FP32 * sub_group, s.norm) if offload == "none" else 0,
        start=0 if s.setting.zero_init else s.w * (s.whole + s.part),
    )
    start = 0 if s.setting.zero_init else FP32 * s.whole
    if offload == "none":
        return Estimate(s.setting, gpu, OnHost(start=start))
    if offload != "nvme":
        host = OnHost(
            weights=0 if on_gpu else s.w * s.part,
            gradients=(s.w + FP32) * s.part,
            masters=FP32 * s.part,
            optimizer=2 * FP32 * s.part,
            start=start,
        )
        return Estimate(s.setting, gpu, host)
    in_cpu = min(s.part, MAX_PARAMETERS_IN_CPU)
    host = OnHost(
        weights=s.w * in_cpu,
        gradients=s.w * s.part,
        buffers=OPTIMIZER_SWAP_BUFFERS * FP32 * sub_group + s.w * PARAMETER_SWAP_BUFFERS,
        start=start,
    )
    return Estimate(s.setting, gpu, host, nvme=4 * FP32 * s.part + s.w * (s.part - in_cpu))


def activations(shape: ModelShape, batch: Batch, dtype: str, kept: int | None = None) -> int:
    """Bytes that the forward pass of a transformer keeps for the backward pass, and the backward pass computes again.

    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equations 1 to 4 without
    parallelism. With s tokens in each of b sequences, hidden size h, a heads and vocabulary v, in 16 bit: a layer keeps
    `s b h (34 + 5 a s / h)` bytes, of which `5 a s / h` are attention scores; the output `4 s b h (1 + v / h)`. In fp32
    all but the dropout masks and the output's logits is twice as large. With checkpointing a layer keeps its input,
    `2 s b h`, and one layer at a time is there in full.

    The formula is one of fused kernels and a plain MLP. What PyTorch keeps of Hugging Face models was 1.1 to 1.3 times
    as much for Llama, 1.4 to 2.5 times for GPT-2, whose GELU is written in single operations.

    Args:
        shape: of the model.
        batch: what goes through it.
        dtype: of the weights.
        kept: what the forward pass was found to keep without checkpointing, in place of the formula.

    Raises:
        ConfigError: the shape lacks a size that the formula needs.
    """
    needed = {"hidden_size": shape.hidden_size, "num_layers": shape.num_layers}
    if batch.eager_attention:
        needed["num_heads"] = shape.num_heads
    if (missing := [f"--{name}" for name, size in needed.items() if not size]) and (
        kept is None or batch.checkpointing
    ):
        raise ConfigError(f"activations follow from the model's sizes: add {' and '.join(missing)}")
    tokens = batch.seq_len * batch.micro_batch
    wide = DTYPE_BYTES[dtype] // 2
    output = 4 * tokens * (shape.hidden_size * wide + shape.vocab_size)
    layer = tokens * shape.hidden_size * (32 * wide + 2)
    if batch.eager_attention:
        layer += tokens * shape.num_heads * batch.seq_len * (4 * wide + 1)
    layers = shape.num_layers * layer if kept is None else max(kept - output, 0)
    if batch.checkpointing:
        return shape.num_layers * 2 * wide * tokens * shape.hidden_size + layers // shape.num_layers + output
    return layers + output if kept is None else kept
