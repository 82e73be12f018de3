"""The options of `zeroaccel launch`: those of `accelerate launch` 1.15, some of ours, and why some are refused."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from zeroaccel.commands.arguments import OneLineParser, add_option, boolean, number
from zeroaccel.config.constants import DEEPSPEED_MULTINODE_LAUNCHERS, TORCH_DYNAMO_MODES
from zeroaccel.config.types import DynamoBackend, PrecisionType

DEVICES = ("none", "cpu", "nvme")
RENDEZVOUS = ("static", "c10d")

# One of these without --use_deepspeed turns DeepSpeed on: they mean nothing without it.
DEEPSPEED_ONLY = (
    "zero_stage",
    "gradient_clipping",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
    "deepspeed_config_file",
    "deepspeed_moe_layer_cls_names",
    "auto_policy",
)

_FSDP = "FSDP does not run here; ZeRO stage 3 (--zero_stage 3) splits weights, gradients and optimizer states"
_GROUPS = "ranks are not split into groups here, all of them share one model: leave it away"
_MEGATRON = "Megatron-LM does not run here: leave it away"
_TPU = "DeepSpeed does not run on TPUs: leave it away"
_FP8 = "fp8 trains in bf16 here, no layer is replaced: --mixed_precision fp8 is all there is"
_AWS = "jobs start on the machines named here, not on SageMaker: leave it away"
_MPIRUN = "use DeepSpeed's mpirun: --deepspeed_multinode_launcher openmpi with --deepspeed_hostfile"

# Options of `accelerate launch` that cannot be here: the name, or its beginning up to a "_", and the reason.
REFUSED = {
    "use_fsdp": _FSDP,
    "fsdp_": _FSDP,
    "use_parallelism_config": _GROUPS,
    "parallelism_config_": _GROUPS,
    "use_megatron_lm": _MEGATRON,
    "megatron_lm_": _MEGATRON,
    "tpu": _TPU,
    "tpu_": _TPU,
    "no_tpu_cluster": _TPU,
    "vm": _TPU,
    "env": _TPU,
    "main_training_function": _TPU,
    "downcast_bf16": _TPU,
    "fp8_": _FP8,
    "aws_": _AWS,
    "mpirun_hostfile": _MPIRUN,
}


def refusal(typed: str) -> str | None:
    """Why an option of `accelerate launch` is refused, in either spelling; None if it is no refused one."""
    name = typed.lstrip("-").replace("-", "_")
    return next((why for key, why in REFUSED.items() if name == key or (key[-1] == "_" and name.startswith(key))), None)


class LaunchParser(OneLineParser):
    """The parser of `zeroaccel launch`, which also knows what Accelerate has and this library has not."""

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Ends the program if options are left over, with the reason or the nearest known one."""
        for typed in (word.partition("=")[0] for word in unknown):
            if why := refusal(typed):
                self.error(f"{typed}: {why}")
        super().refuse_unknown(unknown)


def launch_command_parser() -> LaunchParser:
    """The parser of `zeroaccel launch`. Every option that was not typed is None."""
    parser = LaunchParser(
        prog="zeroaccel launch",
        usage="zeroaccel launch [options] SCRIPT [script arguments]",
        description="Start SCRIPT on every device of this machine, or of several. Options work with dashes, too.",
        epilog="What is typed beats the launch configuration (--config_file), which beats the defaults.",
    )
    for add_group in (_what_runs, _processes, _meeting, _watching, _training, _deepspeed, _deepspeed_launchers):
        add_group(parser)
    parser.add_argument("training_script", metavar="SCRIPT", help="Python file; a module with -m")
    rest = parser.add_argument("training_script_args", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # Python 3.11 names it beside SCRIPT where only SCRIPT is missing
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; ends the program with one line and status 2 where it makes no sense."""
    return launch_command_parser().parse_args(argv)


# --- value types --------------------------------------------------------------------------------------------------


def _matching(pattern: str, wanted: str) -> Callable[[str], str]:
    """A value type: text, without its spaces, of this form."""

    def parse(text: str) -> str:
        text = re.sub(r"\s", "", text)
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"got {text!r}, write {wanted}")
        return text

    return parse


_gpu_ids = _matching(r"[\w/-]+(,[\w/-]+)*", "numbers with commas between, 0,1, or all")
_streams = _matching(r"[0-3]|\d+:[0-3](,\d+:[0-3])*", "1 (stdout), 2 (stderr) or 3 (both), or 0:1,1:3 by local rank")
_pairs = _matching(r"(\w+=[^,=]+(,\w+=[^,=]+)*)?", "key=value, with commas between several")


# --- groups -------------------------------------------------------------------------------------------------------


def _adder(parser: OneLineParser, title: str, description: str | None = None) -> Callable[..., None]:
    group = parser.add_argument_group(title, description)

    def add(*names: str, **kwargs: Any) -> None:
        add_option(parser, group, *names, **kwargs)

    return add


def _what_runs(parser: OneLineParser) -> None:
    add = _adder(parser, "what runs")
    add(
        "--config_file",
        metavar="FILE",
        help="launch configuration (default: the one that `zeroaccel config` wrote, unless --cpu is typed)",
    )
    add("-m", "--module", action="store_true", dest="module", help="SCRIPT is a module, as in `python -m`")
    add("--no_python", action="store_true", help="SCRIPT is a program: run it without Python")
    add("--debug", action="store_true", help="sets `PartialState().debug` in the script")
    add("--dry_run", action="store_true", help="print the environment and the command, start nothing")
    add("-q", "--quiet", action="store_true", dest="quiet", help="no log lines of DeepSpeed's own launchers")


def _processes(parser: OneLineParser) -> None:
    add = _adder(parser, "processes and devices")
    add("--cpu", "--use_cpu", action="store_true", help="stay on the CPU even if there are GPUs")
    add("--multi_gpu", action="store_true", help="insist on GPUs: never fall back to the CPU")
    add("--gpu_ids", type=_gpu_ids, metavar="IDS", help="GPUs to use, as in CUDA_VISIBLE_DEVICES: 0,1 (default: all)")
    add(
        "--num_processes",
        type=number(int, 1),
        metavar="N",
        help="ranks on all machines together (default: one a GPU; one a machine on CPUs)",
    )
    add(
        "--num_cpu_threads_per_process",
        type=number(int, 1),
        metavar="N",
        help="OMP_NUM_THREADS of each rank (default: the cores divided by the ranks)",
    )
    add(
        "--enable_cpu_affinity",
        action="store_true",
        help="keep each rank on the cores beside its GPU; on CPUs, on its share of the cores",
    )


def _meeting(parser: OneLineParser) -> None:
    add = _adder(parser, "several machines, and where the ranks meet", "Inside `srun` these come from SLURM.")
    add("--num_machines", type=number(int, 1), metavar="N", help="machines (default: 1)")
    add("--machine_rank", type=number(int, 0), metavar="N", help="which of the machines this is, from 0")
    add("--main_process_ip", metavar="ADDRESS", help="address of machine 0 (default on one machine: 127.0.0.1)")
    add(
        "--main_process_port",
        type=number(int, 0, 65535),
        metavar="PORT",
        help="port that the ranks meet on (default: 29500 with several machines; else a free one, also if it is taken)",
    )
    add("--rdzv_backend", choices=RENDEZVOUS, help="how machines meet: static (default), or c10d, which ranks them")
    add("--rdzv_conf", type=_pairs, metavar="K=V,...", help="settings of the rendezvous, e.g. timeout=60")
    add("--same_network", action="store_true", help="nothing to choose: machines meet at ADDRESS:PORT in any case")


def _watching(parser: OneLineParser) -> None:
    add = _adder(parser, "watching the ranks")
    add("--max_restarts", type=number(int, 0), metavar="N", help="start all ranks again so often after a failure (0)")
    add("--monitor_interval", type=number(float, 0.0), metavar="SECONDS", help="between two looks at the ranks (0.1)")
    add(
        "-t", "--tee", type=_streams, dest="tee", metavar="WHAT", help="also write to files: 1 stdout, 2 stderr, 3 both"
    )
    add("--log_dir", metavar="FOLDER", help="where these files go (default: a new temporary folder)")
    add("--role", metavar="NAME", help="what torch's launcher calls the ranks in its own log (default)")


def _training(parser: OneLineParser) -> None:
    add = _adder(parser, "training")
    add(
        "--mixed_precision",
        type=str.lower,
        choices=PrecisionType.list(),
        help="number format of the forward pass",
    )
    add("--gradient_accumulation_steps", type=number(int, 1), metavar="N", help="micro-batches an optimizer step")
    add(
        "--dynamo_backend",
        type=str.upper,
        choices=DynamoBackend.list(),
        metavar="NAME",
        help="compile models with this backend of torch.compile (default: no)",
    )
    add("--dynamo_mode", choices=TORCH_DYNAMO_MODES, help="mode of torch.compile")
    add("--dynamo_use_fullgraph", action="store_true", help="refuse to break the model into several graphs")
    add("--dynamo_use_dynamic", action="store_true", help="compile for changing shapes")
    add("--dynamo_use_regional_compilation", action="store_true", help="compile repeated blocks once")


def _deepspeed(parser: OneLineParser) -> None:
    add = _adder(parser, "DeepSpeed", "Each of these turns DeepSpeed on.")
    add(
        "--use_deepspeed",
        action="store_true",
        help="train through DeepSpeed (ZeRO stage 2 unless told otherwise)",
    )
    add(
        "--zero_stage",
        type=number(int, 0, 3),
        metavar="0-3",
        help="1 splits optimizer states, 2 gradients, 3 weights",
    )
    add("--gradient_clipping", type=number(float, 0.0), metavar="NORM", help="largest gradient norm; 0 is off")
    add("--offload_optimizer_device", type=str.lower, choices=DEVICES, help="where optimizer states live")
    add("--offload_param_device", type=str.lower, choices=DEVICES, help="where stage 3 keeps parameters")
    add("--offload_optimizer_nvme_path", metavar="FOLDER", help="for optimizer states on NVMe")
    add("--offload_param_nvme_path", metavar="FOLDER", help="for parameters on NVMe")
    add("--zero3_init_flag", type=boolean, metavar="true|false", help="build models already split (stage 3)")
    add(
        "--zero3_save_16bit_model",
        type=boolean,
        metavar="true|false",
        help="gather 16-bit weights on saving (stage 3)",
    )
    add("--deepspeed_config_file", metavar="FILE", help="DeepSpeed JSON configuration")
    add("--deepspeed_moe_layer_cls_names", metavar="A,B", help="classes of mixture-of-experts layers (stage 3)")
    add(
        "--auto_policy",
        choices=("fast", "accelerate"),
        help="numbers for `auto` buckets: ours, or Accelerate's",
    )


def _deepspeed_launchers(parser: OneLineParser) -> None:
    add = _adder(parser, "DeepSpeed's own launchers, for several machines")
    add(
        "--deepspeed_multinode_launcher",
        type=str.lower,
        choices=DEEPSPEED_MULTINODE_LAUNCHERS,
        help="standard is torch's (default: pdsh with a hostfile, else standard)",
    )
    add("--deepspeed_hostfile", metavar="FILE", help="machines, one a line: `name slots=4`")
    add("--deepspeed_inclusion_filter", metavar="NODES", help="only these of them: name@name:0,2")
    add("--deepspeed_exclusion_filter", metavar="NODES", help="all but these of them")
