"""What `zeroaccel config` asks: one table, in order; a question is asked where it applies.

The answers are options of `zeroaccel launch` by name; those whose name begins with `_` only steer the questions.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zeroaccel.commands.arguments import boolean, number
from zeroaccel.commands.menu import ask, choose
from zeroaccel.config.constants import DEEPSPEED_MULTINODE_LAUNCHERS, TORCH_DYNAMO_MODES
from zeroaccel.config.document import HfDeepSpeedConfig
from zeroaccel.config.types import DynamoBackend
from zeroaccel.errors import ConfigError

Answers = Mapping[str, Any]
_Way = Callable[[str, Answers], Any]

# --- ways to ask --------------------------------------------------------------------------------------------------


def _menu(choices: Mapping[Any, str] | list[str], default: Any = None) -> _Way:
    """One of some values, each with its line in the menu; the first one unless told otherwise."""
    labels = choices if isinstance(choices, Mapping) else {choice: choice for choice in choices}
    values = list(labels)

    def way(question: str, _: Answers) -> Any:
        start = 0 if default is None else values.index(default)
        return values[choose(question, list(labels.values()), start)]

    return way


def _yes_no(default: bool) -> _Way:
    shown = "YES/no" if default else "yes/NO"
    return lambda question, _: ask(question, boolean, str(default), shown)


def _number(kind: Callable[[str], Any], lowest: int, default: int) -> _Way:
    return lambda question, _: ask(question, number(kind, lowest), str(default))


def _number_or_script(kind: Callable[[str], Any], lowest: int) -> _Way:
    """A number, or nothing: what the script says holds."""
    convert = number(kind, lowest)
    return lambda question, _: ask(question, lambda text: convert(text) if text else None, shown="as the script says")


def _optional(shown: str) -> _Way:
    """Text, or nothing."""
    return lambda question, _: ask(question, lambda text: text or None, shown=shown)


def _text(default: str = "") -> _Way:
    def convert(text: str) -> str:
        if not text:
            raise argparse.ArgumentTypeError("this has no default: write it")
        return text

    return lambda question, _: ask(question, convert, default)


def _json_file(question: str, _: Answers) -> str:
    """The path of a DeepSpeed config, which is read where it is there already."""

    def convert(text: str) -> str:
        path = os.path.expanduser(text)
        if not text:
            raise argparse.ArgumentTypeError("this has no default: write it")
        if not os.path.exists(path):
            print(f"  note: {path} is not there yet")
            return path
        try:
            HfDeepSpeedConfig(path)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return path

    return ask(question, convert)


def _offload(question: str, answers: Answers) -> Any:
    # Below stage 3 DeepSpeed takes CPU memory where NVMe is asked for.
    return _menu(["none", "cpu", "nvme"] if _stage(answers, 3) else ["none", "cpu"])(question, answers)


def _machine_rank(question: str, answers: Answers) -> int:
    last: int = answers["num_machines"] - 1
    return ask(question, number(int, 0, last), "0")


def _gpus(question: str, _: Answers) -> str | None:
    def convert(text: str) -> str | None:
        if text and not re.fullmatch(r"[\w-]+(,[\w-]+)*", text):  # numbers, or names as `nvidia-smi -L` tells them
            raise argparse.ArgumentTypeError(f"got {text!r}, write numbers with commas between them")
        return text or None

    return ask(question, convert, shown="all")


def _processes(question: str, answers: Answers) -> int:
    """How many ranks; one for each GPU unless told otherwise."""
    here = 2
    if (named := answers.get("gpu_ids")) is not None:
        here = len(named.split(","))
    elif answers["_machine"] == "gpus":
        from zeroaccel.commands import launch_elastic

        here = max(launch_elastic.device_count(), 1)
    machines: int = answers["num_machines"]
    where = f" on all {machines} machines together" if machines > 1 else ""
    return ask(question + where, number(int, machines), str(here * machines))


# --- when to ask --------------------------------------------------------------------------------------------------


def _several(answers: Answers) -> bool:
    return bool(answers["_machine"] != "one")


def _many_machines(answers: Answers) -> bool:
    return bool(answers.get("num_machines", 1) > 1)


def _deepspeed(answers: Answers) -> bool:
    return bool(answers["use_deepspeed"])


def _plugin(answers: Answers) -> bool:
    return _deepspeed(answers) and not answers["_json"]


def _stage(answers: Answers, *stages: int) -> bool:
    return answers.get("zero_stage") in stages


def _stage_3(answers: Answers) -> bool:
    """Whether it is stage 3, or may be: a DeepSpeed config that is not there yet."""
    path = answers.get("deepspeed_config_file")
    if path is None:
        return _stage(answers, 3)
    return not os.path.exists(path) or HfDeepSpeedConfig(path).is_zero3()


def _own_launcher(answers: Answers) -> bool:
    """Whether one of DeepSpeed's own launchers goes to the other machines."""
    return answers.get("deepspeed_multinode_launcher") not in (None, "standard")


def _started_on_each(answers: Answers) -> bool:
    """Whether the launcher is started on every machine by itself."""
    return _many_machines(answers) and answers.get("deepspeed_multinode_launcher") in (None, "standard", "nossh")


def _through_torch(answers: Answers) -> bool:
    return _many_machines(answers) and not _own_launcher(answers)


def _compiled(answers: Answers) -> bool:
    return bool(answers["_compile"])


def _customized(answers: Answers) -> bool:
    return bool(answers.get("_customize"))


# --- the questions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        name: the option that the answer is for.
        text: what is asked.
        way: how it is asked; an answer of None leaves the option out.
        when: whether it applies, as the answers before it tell.
    """

    name: str
    text: str
    way: _Way
    when: Callable[[Answers], bool] = lambda _: True


MACHINES = {
    "one": "one process, on one GPU or the CPU",
    "cpus": "several processes on CPUs",
    "gpus": "several GPUs, or other accelerators",
}
STAGES = {
    0: "stage 0: nothing, plain data parallelism",
    1: "stage 1: optimizer states",
    2: "stage 2: optimizer states and gradients",
    3: "stage 3: optimizer states, gradients and parameters",
}
FILTERS = {"all": "all of its hosts", "exclude": "all but some", "include": "only some"}
_FILTER_SYNTAX = "as in worker-1:0,2@worker-2"

QUESTIONS = [
    Question("_machine", "What does it train on?", _menu(MACHINES)),
    Question("cpu", "Stay on the CPU even if there is a GPU?", _yes_no(False), lambda a: not _several(a)),
    Question("num_machines", "How many machines?", _number(int, 1, 1), _several),
    Question("use_deepspeed", "Train through DeepSpeed?", _yes_no(True)),
    Question("_json", "Do you have a DeepSpeed config, a JSON file?", _yes_no(False), _deepspeed),
    Question("deepspeed_config_file", "Its path", _json_file, lambda a: _deepspeed(a) and a["_json"]),
    Question("zero_stage", "What does ZeRO split over the ranks?", _menu(STAGES, 2), _plugin),
    Question(
        "offload_optimizer_device",
        "Offload optimizer states?",
        _offload,
        lambda a: _stage(a, 1, 2, 3),
    ),
    Question(
        "offload_optimizer_nvme_path",
        "Folder on NVMe for optimizer states",
        _text("/nvme"),
        lambda a: a.get("offload_optimizer_device") == "nvme",
    ),
    Question(
        "offload_param_device",
        "Offload parameters?",
        _offload,
        lambda a: _stage(a, 3),
    ),
    Question(
        "offload_param_nvme_path",
        "Folder on NVMe for parameters",
        _text("/nvme"),
        lambda a: a.get("offload_param_device") == "nvme",
    ),
    Question("gradient_accumulation_steps", "Gradient accumulation steps", _number_or_script(int, 1), _plugin),
    Question("gradient_clipping", "Gradient clipping, the largest norm (0: off)", _number_or_script(float, 0), _plugin),
    Question(
        "zero3_save_16bit_model", "Gather the parameters in 16 bit on saving?", _yes_no(False), lambda a: _stage(a, 3)
    ),
    Question("zero3_init_flag", "Build models already split (zero.Init)?", _yes_no(True), _stage_3),
    Question(
        "deepspeed_moe_layer_cls_names",
        "Classes of Mixture-of-Experts layers, by commas",
        _optional("there are none"),
        _stage_3,
    ),
    Question(
        "deepspeed_multinode_launcher",
        "Which launcher goes to the other machines? (standard: torch's, started on each of them)",
        _menu(DEEPSPEED_MULTINODE_LAUNCHERS),
        lambda a: _deepspeed(a) and _many_machines(a),
    ),
    Question("deepspeed_hostfile", "Hostfile, lines of `name slots=8`", _text("/job/hostfile"), _own_launcher),
    Question("_filter", "Which of its hosts?", _menu(FILTERS), _own_launcher),
    Question(
        "deepspeed_exclusion_filter", f"Not these, {_FILTER_SYNTAX}", _text(), lambda a: a.get("_filter") == "exclude"
    ),
    Question(
        "deepspeed_inclusion_filter", f"Only these, {_FILTER_SYNTAX}", _text(), lambda a: a.get("_filter") == "include"
    ),
    Question("machine_rank", "Which of the machines is this, from 0?", _machine_rank, _started_on_each),
    Question("main_process_ip", "Address of machine 0", _text(), _through_torch),
    Question(
        "main_process_ip",
        "Address where the ranks meet",
        _optional("the first host's"),
        lambda a: _many_machines(a) and _own_launcher(a),
    ),
    Question(
        "main_process_port",
        "Port that the ranks meet on",
        lambda question, _: ask(question, number(int, 1, 65535), "29500"),
        _many_machines,
    ),
    Question("same_network", "Are the machines in one local network?", _yes_no(True), _through_torch),
    Question(
        "rdzv_backend",
        "How do they find each other?",
        _menu(["static", "c10d"]),
        lambda a: _through_torch(a) and not a["same_network"],
    ),
    Question(
        "gpu_ids",
        "Which GPUs, as in 0,1?",
        _gpus,
        lambda a: a["_machine"] == "gpus" and not _many_machines(a),
    ),
    Question("num_processes", "How many processes", _processes, _several),
    Question(
        "mixed_precision",
        "Mixed precision?",
        _menu(["no", "fp16", "bf16"]),
        lambda a: not (_deepspeed(a) and a["_json"]),
    ),
    Question("debug", "Check that the ranks agree before they communicate? (slower)", _yes_no(False), _several),
    Question("_compile", "Compile models with torch.compile?", _yes_no(False)),
    Question(
        "dynamo_backend",
        "With which backend?",
        _menu([name for name in DynamoBackend.list() if name != "NO"], "INDUCTOR"),
        _compiled,
    ),
    Question("_customize", "Change its other settings?", _yes_no(False), _compiled),
    Question("dynamo_mode", "Mode of torch.compile?", _menu(TORCH_DYNAMO_MODES), _customized),
    Question("dynamo_use_fullgraph", "Refuse models that break into several graphs?", _yes_no(False), _customized),
    Question("dynamo_use_dynamic", "Trace shapes as dynamic?", _yes_no(False), _customized),
    Question("dynamo_use_regional_compilation", "Compile repeated blocks once?", _yes_no(False), _customized),
]


def ask_all() -> dict[str, Any]:
    """Asks what applies; the answers are what `launch_file.write` takes.

    Raises:
        ConfigError: the input ends before the questions do.
    """
    answers: dict[str, Any] = {}
    for question in QUESTIONS:
        if question.when(answers):
            answers[question.name] = question.way(question.text, answers)
    options = {name: value for name, value in answers.items() if value is not None and not name.startswith("_")}
    if answers["_machine"] == "cpus":
        options["cpu"] = True
    if answers["_machine"] == "gpus":
        options["multi_gpu"] = True
    return {"num_processes": 1, **options}
