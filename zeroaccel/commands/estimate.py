"""`zeroaccel estimate-memory`: what a model's training needs on each GPU and host, and what of it fits this machine."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from zeroaccel.commands.arguments import OneLineParser, add_option, boolean, count, number
from zeroaccel.config.generic import convert_bytes, convert_file_size_to_int
from zeroaccel.engine.estimate import (
    DTYPE_BYTES,
    REDUCE_BUCKET,
    Batch,
    Estimate,
    ModelShape,
    Setting,
    activations,
    combinations,
    estimate,
)
from zeroaccel.errors import ConfigError

_GIB = 2**30
# Bits of a weight: int8 and int4 can be loaded for inference, not trained.
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
_DEFAULT_DTYPES = ("float32", "float16", "int8", "int4")
# Above this part of the memory, what the estimate leaves out (CUDA context, NCCL, fragments) may be too much.
_COMFORTABLE = 0.9


def _size(text: str) -> int:
    """A value type: bytes such as 80GB or 80GiB; a bare number is in GiB."""
    try:
        return convert_file_size_to_int(f"{text}GiB" if text.replace(".", "", 1).isdigit() else text)
    except ConfigError:
        raise argparse.ArgumentTypeError(f"got {text!r}, write a number of GiB, or a size such as 80GB") from None


def estimate_command_parser() -> OneLineParser:
    """The parser of `zeroaccel estimate-memory`."""
    parser = OneLineParser(
        prog="zeroaccel estimate-memory",
        usage="zeroaccel estimate-memory MODEL | --num_parameters N [options]",
        description="What training a model needs of GPUs and hosts, over ZeRO stages, offload, dtypes and GPUs.",
        epilog="The CUDA context, NCCL and fragments come on top, 1 to 2 GiB a GPU. Options work with dashes, too.",
    )
    _add_model_options(parser)
    _add_run_options(parser)
    return parser


def _add_model_options(parser: OneLineParser) -> None:
    parser.add_argument(
        "model_name", metavar="MODEL", nargs="?", help="folder with a config.json, or a model of the Hugging Face hub"
    )
    group = parser.add_argument_group("model")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add("--num_parameters", type=count, metavar="N", help="parameters in place of MODEL: 350M, 7B, 7e9")
    add("--hidden_size", type=number(int, 1), metavar="H", help="width of a transformer")
    add("--num_layers", type=number(int, 1), metavar="L", help="layers of a transformer")
    add("--num_heads", type=number(int, 1), metavar="A", help="attention heads of a transformer")
    add("--vocab_size", type=number(int, 1), metavar="V", help="vocabulary of a language model")
    add("--largest_layer", type=count, metavar="N", help="parameters of the largest layer (default: 12 x H x H)")
    add("--library_name", choices=("transformers", "timm"), help="what builds MODEL; only transformers can")
    add("--trust_remote_code", action="store_true", default=False, help="run the Python code that MODEL brings")


def _add_run_options(parser: OneLineParser) -> None:
    group = parser.add_argument_group("training")

    def add(*names: str, **kwargs: object) -> None:
        add_option(parser, group, *names, **kwargs)

    add(
        "--dtypes",
        nargs="+",
        choices=tuple(_BITS),
        default=list(_DEFAULT_DTYPES),
        metavar="DTYPE",
        help=f"of the weights: {', '.join(_BITS)} (default: all but bfloat16, which is like float16)",
    )
    add(
        "--num_gpus_per_node",
        "--num_gpus",
        nargs="+",
        type=number(int, 1),
        metavar="N",
        help="GPUs of a node, or several numbers to compare (default: this machine's, else 1 and 8)",
    )
    add("--num_nodes", type=number(int, 1), default=1, metavar="N", help="machines like this one (default: 1)")
    add("--seq_len", type=number(int, 1), metavar="S", help="tokens of a sequence, for activations")
    add("--micro_batch", type=number(int, 1), metavar="B", help="sequences a GPU at once, for activations (default: 1)")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="eager keeps the attention scores")
    add("--activation_checkpointing", action="store_true", help="layers keep their inputs only")
    add(
        "--reduce_bucket_size",
        type=count,
        default=REDUCE_BUCKET,
        metavar="N",
        help="of the DeepSpeed config, in elements (default: 5e8, as DeepSpeed's)",
    )
    add("--zero3_init_flag", type=boolean, default=True, metavar="true|false", help="stage 3 builds the model split")
    add("--gpu_memory", type=_size, metavar="SIZE", help="of each GPU: 80GB; a bare number is GiB (default: as here)")
    add("--host_memory", type=_size, metavar="SIZE", help="of each machine (default: as here)")
    add("--json", action="store_true", help="everything in bytes, for programs")


@dataclass(frozen=True)
class Machine:
    """What there is: bytes of each GPU (None: the ranks run on the CPU), GPUs of a node, bytes of a node's memory."""

    gpu_memory: int | None
    gpus: int
    host_memory: int

    def verdict(self, need: Estimate) -> str:
        """Whether an estimate fits: "yes", "tight", or what is too small."""
        host = need.node_host
        if self.gpu_memory is None:
            host += need.gpu.total * need.setting.gpus_per_node
        shares = {"host": host / self.host_memory}
        if self.gpu_memory is not None:
            shares["GPU"] = need.gpu.total / self.gpu_memory
        if lacking := [name for name, share in shares.items() if share > 1]:
            return f"no: {' and '.join(lacking)}"
        return "tight" if max(shares.values()) > _COMFORTABLE else "yes"


def run(argv: Sequence[str]) -> int:
    """Runs `zeroaccel estimate-memory`; returns its exit status."""
    return estimate_command(estimate_command_parser().parse_args(argv))


def estimate_command(args: argparse.Namespace) -> int:
    """Prints what the options of `estimate_command_parser` ask for.

    Raises:
        ConfigError: neither a model nor its size is given, or the model cannot be built.
        EnvironmentProblem: the model is on a hub that cannot be reached.
    """
    model = _model(args)
    shape = _shape(args, model)
    machine = _machine(args)
    counts = args.num_gpus_per_node or ([machine.gpus] if machine.gpus else [1, 8])
    trained = [dtype for dtype in args.dtypes if dtype in DTYPE_BYTES]
    kept = {dtype: _activations(args, shape, model, dtype) for dtype in trained}
    blocks = [
        [_estimate(args, shape, dtype, count, stage, offload, kept[dtype]) for stage, offload in combinations()]
        for dtype in trained
        for count in counts
    ]
    if args.json:
        print(json.dumps(_as_dict(shape, machine, blocks), indent=2))
    else:
        print("\n\n".join([_about_model(args, shape, model), *(_table(block, machine) for block in blocks)]))
    return 0


# --- what is asked for ------------------------------------------------------------------------------------------------


def _model(args: argparse.Namespace) -> Any:
    """The model on the meta device, None where only its size is given."""
    if (args.model_name is None) == (args.num_parameters is None):
        raise ConfigError("name a model's folder, or give its size with --num_parameters: one of the two")
    if args.library_name == "timm":
        raise ConfigError("--library_name timm: models of timm cannot be built here, give --num_parameters")
    if args.model_name is None:
        return None
    from zeroaccel.engine.pretrained import empty_model

    return empty_model(args.model_name, args.trust_remote_code)


def _shape(args: argparse.Namespace, model: Any) -> ModelShape:
    typed = {
        name: value
        for name in ("hidden_size", "num_layers", "num_heads", "vocab_size", "largest_layer")
        if (value := getattr(args, name)) is not None
    }
    if model is not None:
        from zeroaccel.engine.pretrained import shape_of

        return replace(shape_of(model), **typed)
    hidden = typed.get("hidden_size", 0)
    # Of a transformer's layer, 4 h^2 are attention and 8 h^2 the MLP, in two matrices.
    layer = typed.setdefault("largest_layer", 12 * hidden * hidden)
    parameter = max(4 * hidden, typed.get("vocab_size", 0)) * hidden
    largest = min(parameter or layer, args.num_parameters)
    return ModelShape(args.num_parameters, largest_parameter=largest, **typed)


def _machine(args: argparse.Namespace) -> Machine:
    from zeroaccel.commands.launch_memory import Memory
    from zeroaccel.engine.machine import gpus

    here = gpus()
    memory = args.gpu_memory or (min(gpu.memory for gpu in here) if here else None)
    return Machine(memory, len(here), args.host_memory or Memory.read().limit)


def _activations(args: argparse.Namespace, shape: ModelShape, model: Any, dtype: str) -> int:
    if args.seq_len is None:
        if args.micro_batch is not None:
            raise ConfigError("--micro_batch without --seq_len: activations follow from both")
        return 0
    eager = args.attention == "eager"
    batch = Batch(args.micro_batch or 1, args.seq_len, eager, bool(args.activation_checkpointing))
    kept = None
    if model is not None:
        from zeroaccel.engine.pretrained import kept_activations

        kept = kept_activations(model, batch, dtype)
    return activations(shape, batch, dtype, kept)


def _estimate(
    args: argparse.Namespace, shape: ModelShape, dtype: str, count: int, stage: int, offload: str, kept: int
) -> Estimate:
    setting = Setting(
        stage,
        offload,
        dtype,
        count,
        args.num_nodes,
        reduce_bucket=args.reduce_bucket_size,
        zero_init=args.zero3_init_flag,
    )
    return estimate(shape, setting, kept)


def gather_data(args: argparse.Namespace) -> list[list[Any]]:
    """Sizes of the model of the options, one row a dtype, as `accelerate.commands.estimate.gather_data` gives them.

    Returns:
        Rows of dtype, bytes of the largest layer, bytes of all weights, and a dictionary of the bytes that training
        with Adam at stage 0 needs on one GPU: `model`, `gradients`, `optimizer` (with fp32 masters) and `step`, the
        peak; -1 where the dtype cannot be trained.
    """
    shape = _shape(args, _model(args))
    return [_row(shape, dtype) for dtype in args.dtypes]


def _row(shape: ModelShape, dtype: str) -> list[Any]:
    usage = dict.fromkeys(("model", "optimizer", "gradients", "step"), -1)
    if dtype in DTYPE_BYTES:
        gpu = estimate(shape, Setting(0, dtype=dtype)).gpu
        usage = {
            "model": gpu.weights,
            "optimizer": gpu.masters + gpu.optimizer,
            "gradients": gpu.gradients,
            "step": gpu.total,
        }
    return [dtype, shape.largest_layer * _BITS[dtype] / 8, shape.parameters * _BITS[dtype] / 8, usage]


# --- what is printed --------------------------------------------------------------------------------------------------


def _as_dict(shape: ModelShape, machine: Machine, blocks: list[list[Estimate]]) -> dict[str, Any]:
    """Everything in bytes; `gpu` is for each GPU, `host` and `nvme` for each rank, `node` for all ranks of a node."""
    return {
        "model": asdict(shape),
        "machine": asdict(machine),
        "estimates": [
            {
                **asdict(need.setting),
                "gpu": {**asdict(need.gpu), "total": need.gpu.total},
                "host": {**asdict(need.host), "total": need.host.total},
                "nvme": need.nvme,
                "node": {"host": need.node_host, "nvme": need.node_nvme},
                "fits": machine.verdict(need),
            }
            for block in blocks
            for need in block
        ],
    }


def _about_model(args: argparse.Namespace, shape: ModelShape, model: Any) -> str:
    name = f"{type(model).__name__} of {args.model_name}" if model is not None else "A model"
    rows = [("dtype", "largest layer", "weights", "training on one GPU")]
    for dtype, layer, weights, usage in (_row(shape, dtype) for dtype in args.dtypes):
        training = convert_bytes(usage["step"]) if usage["step"] > 0 else "-"
        rows.append((dtype, convert_bytes(layer) if layer else "?", convert_bytes(weights), training))
    return "\n".join([f"{name} with {shape.parameters:,} parameters", "", *_aligned(rows)])


def _table(block: list[Estimate], machine: Machine) -> str:
    """The estimates of one dtype on one number of GPUs, in GiB."""
    setting = block[0].setting
    rows = [["stage", "offload", "weights", "gradients", "optimizer", "working", "GPU", "host", "NVMe", "fits"]]
    for need in block:
        gpu = need.gpu
        parts = (gpu.weights, gpu.gradients, gpu.masters + gpu.optimizer, gpu.working, gpu.total)
        numbers = [_gib(value) for value in (*parts, need.node_host, need.node_nvme)]
        rows.append([str(need.setting.stage), need.setting.offload, *numbers, machine.verdict(need)])
    first = next((need.setting for need in block if machine.verdict(need) == "yes"), None)
    if first is None:
        advice = "nothing fits with room to spare"
    else:
        offload = "without offload" if first.offload == "none" else f"with offload {first.offload}"
        advice = f"the fastest that fits: stage {first.stage} {offload}"
    return "\n".join([_heading(setting, machine), "", *_aligned(rows), "", advice])


def _heading(setting: Setting, machine: Machine) -> str:
    count, nodes = setting.gpus_per_node, setting.nodes
    kind = "CPU rank" if machine.gpu_memory is None else "GPU"
    ranks = f"{count} {kind}{'s' if count > 1 else ''}"
    memory = "" if machine.gpu_memory is None else f" of {_gib(machine.gpu_memory)}"
    where = f" on each of {nodes} nodes" if nodes > 1 else ""
    heading = f"{setting.dtype}, {ranks}{memory}{where}, {_gib(machine.host_memory)} of host memory (GiB)"
    return heading if machine.gpu_memory else f"{heading}; without a GPU the host holds the column GPU, too"


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}" if size / _GIB < 1000 else f"{math.ceil(size / _GIB)}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns: words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = [
        not any(character.isdigit() for character in "".join(row[column] for row in rows))
        for column in range(len(widths))
    ]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in rows
    ]


def main() -> int:
    """`zeroaccel estimate-memory` with the arguments of this program; returns its exit status."""
    from zeroaccel.commands import main as program

    return program.main(["estimate-memory", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
