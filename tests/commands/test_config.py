"""`zeroaccel config`: the questions in a pseudo-terminal and on a pipe, and its sub-commands."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest
import yaml

from tests.commands.runs import PROGRAMS, clean_environment, wait_until
from zeroaccel.commands import launch
from zeroaccel.commands.config.questions import QUESTIONS
from zeroaccel.commands.main import main
from zeroaccel.config import launch_file
from zeroaccel.config.launch_schema import PLACES

UP, DOWN, ENTER = "\x1b[A", "\x1b[B", "\r"
# What every file says.
ALWAYS = {"machine_rank": 0, "num_machines": 1, "rdzv_backend": "static", "same_network": True}
ONE = {**ALWAYS, "num_processes": 1}


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- on a pipe: numbered prompts ----------------------------------------------------------------------------------


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `zeroaccel config` on a pipe; returns the options of its file, and what it printed."""

    def answer(typed: Sequence[str]) -> tuple[dict[str, Any], str]:
        path = str(tmp_path / "launch.yaml")
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        assert main(["config", "--config_file", path]) == 0
        assert sys.stdin.read() == ""  # every answer was asked for
        return launch_file.read(path), capsys.readouterr().out

    return answer


# Who answers: what is typed, the options of the file, the questions' words that must not be asked.
NO, YES = "no", "yes"
ANSWERED: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "only Enter": (
        [""] * 10,
        {**ONE, "use_deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "none", "mixed_precision": "no"},
        ["machines", "GPUs, as in", "processes [", "parameters?", "zero.Init", "Hostfile", "NVMe", "agree"],
    ),
    "without DeepSpeed": (
        ["0", YES, NO, "fp16", NO],
        {**ONE, "cpu": True, "mixed_precision": "fp16"},
        ["ZeRO", "JSON", "offload", "clipping"],
    ),
    "stage 3 with everything on NVMe": (
        ["1", "", YES, NO, "3", "nvme", "/a", "nvme", "", "4", "0.5", YES, NO, "A,B", "2", "bf16", YES, NO],
        {
            **ALWAYS,
            "use_deepspeed": True,
            "cpu": True,
            "zero_stage": 3,
            "offload_optimizer_device": "nvme",
            "offload_optimizer_nvme_path": "/a",
            "offload_param_device": "nvme",
            "offload_param_nvme_path": "/nvme",
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 0.5,
            "zero3_save_16bit_model": True,
            "zero3_init_flag": False,
            "deepspeed_moe_layer_cls_names": "A,B",
            "num_processes": 2,
            "mixed_precision": "bf16",
            "debug": True,
        },
        ["GPUs, as in", "Stay on the CPU", "Hostfile"],
    ),
    "stage 0": (
        ["0", NO, YES, NO, "0", "", "", "no", NO],
        {**ONE, "use_deepspeed": True, "zero_stage": 0, "mixed_precision": "no"},
        ["Offload"],
    ),
    "GPUs by number": (
        ["2", "1", NO, "0,3", "", "bf16", NO, NO],
        {**ALWAYS, "multi_gpu": True, "gpu_ids": "0,3", "num_processes": 2, "mixed_precision": "bf16"},
        ["machine 0", "Stay on the CPU"],
    ),
    "machines by pdsh": (
        ["1", "2", YES, NO, "1", "", "", "", "pdsh", "", "1", "w:0", "", "", "8", "no", NO, NO],
        {
            **ALWAYS,
            "use_deepspeed": True,
            "cpu": True,
            "num_machines": 2,
            "zero_stage": 1,
            "offload_optimizer_device": "none",
            "deepspeed_multinode_launcher": "pdsh",
            "deepspeed_hostfile": "/job/hostfile",
            "deepspeed_exclusion_filter": "w:0",
            "main_process_port": 29500,
            "num_processes": 8,
            "mixed_precision": "no",
        },
        ["Which of the machines", "local network", "Only these"],
    ),
    "machines by torch's launcher": (
        ["1", "2", YES, NO, "1", "", "", "", "standard", "1", "10.0.0.1", "29511", NO, "c10d", "", "no", NO, NO],
        {
            "use_deepspeed": True,
            "cpu": True,
            "num_machines": 2,
            "zero_stage": 1,
            "offload_optimizer_device": "none",
            "deepspeed_multinode_launcher": "standard",
            "machine_rank": 1,
            "main_process_ip": "10.0.0.1",
            "main_process_port": 29511,
            "rdzv_backend": "c10d",
            "num_processes": 4,
            "mixed_precision": "no",
        },
        ["Hostfile", "hosts"],
    ),
    "torch.compile to the last setting": (
        ["0", YES, NO, "no", YES, "inductor", YES, "max-autotune", YES, YES, YES],
        {
            **ONE,
            "cpu": True,
            "mixed_precision": "no",
            "dynamo_backend": "INDUCTOR",
            "dynamo_mode": "max-autotune",
            "dynamo_use_fullgraph": True,
            "dynamo_use_dynamic": True,
            "dynamo_use_regional_compilation": True,
        },
        [],
    ),
    "after wrong answers": (
        [
            "7",
            "gpu",
            "0",
            "perhaps",
            NO,
            YES,
            NO,
            "stage",
            "-1",
            "2",
            "nvme",
            "1",
            "0",
            "2.5",
            "2",
            "-1",
            "nan",
            "1",
            "3",
            "1",
        ]
        + ["maybe", "y"]
        + ["INDUCTOR", "n"],
        {
            **ONE,
            "use_deepspeed": True,
            "zero_stage": 2,
            "offload_optimizer_device": "cpu",
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "mixed_precision": "fp16",
            "dynamo_backend": "INDUCTOR",
        },
        [],
    ),
}


@pytest.mark.parametrize("who", ANSWERED)
def test_the_answers_become_the_file_and_only_what_applies_is_asked(who: str, answered: Any) -> None:
    typed, options, unasked = ANSWERED[who]
    given, printed = answered(typed)
    assert given == options
    assert not [words for words in unasked if words in printed]


@pytest.mark.parametrize(("stage", "asked"), [(2, False), (3, True), (None, True)], ids=["2", "3", "no file yet"])
def test_a_json_file_answers_what_it_holds(stage: int | None, asked: bool, answered: Any, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    if stage is not None:
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    given, printed = answered(["0", NO, YES, YES, str(config), *(["", ""] if asked else []), NO])
    expected = {**ONE, "use_deepspeed": True, "deepspeed_config_file": str(config)}
    assert given == ({**expected, "zero3_init_flag": True} if asked else expected)
    assert ("not there yet" in printed) == (stage is None)
    assert not [words for words in ("ZeRO", "Offload", "clipping", "precision") if words in printed]


def test_a_json_file_that_cannot_be_read_is_asked_for_again(answered: Any, tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken.json", tmp_path / "whole.json"
    broken.write_text("{")
    whole.write_text('{"zero_optimization": {"stage": 1}}')
    given, printed = answered(["0", NO, YES, YES, "", str(broken), str(whole), NO])
    assert given["deepspeed_config_file"] == str(whole)
    assert f"{broken}:1:2: not valid JSON" in printed


def test_every_question_is_asked_in_one_of_these_tests() -> None:
    answers = {name for _, options, _ in ANSWERED.values() for name in options}
    names = {question.name for question in QUESTIONS if not question.name.startswith("_")}
    assert names - answers == {"deepspeed_config_file", "deepspeed_inclusion_filter"}


def test_answers_that_end_too_early_are_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("0\nno\n"))
    assert main(["config", "--config_file", str(tmp_path / "launch.yaml")]) == 2
    assert capsys.readouterr().err == (
        "zeroaccel config: error: the answers ended before the questions: nothing was written\n"
    )
    assert files_in(tmp_path) == []


# --- in a terminal ------------------------------------------------------------------------------------------------


@contextmanager
def terminal(*arguments: str, size: tuple[int, int] = (24, 80), **variables: str) -> Iterator[Any]:
    """A program of the `zeroaccel` in a pseudo-terminal of its own."""
    child = pexpect.spawn(
        sys.executable,
        ["-m", "zeroaccel", *arguments],
        env={**clean_environment(), "TERM": "xterm", **variables},
        encoding="utf-8",
        dimensions=size,
        timeout=30,
    )
    child.delaybeforesend = None
    try:
        yield child
    finally:
        child.close(force=True)


def replay(child: Any, *steps: tuple[str, str]) -> None:
    """Waits for words, then sends keys, step by step."""
    for words, keys in steps:
        child.expect_exact(words)
        child.send(keys)


def finished(child: Any) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return int(child.exitstatus)


def test_arrow_keys_choose(tmp_path: Path) -> None:
    with terminal("config", ZEROACCEL_HOME=str(tmp_path / "home")) as child:
        replay(
            child,
            ("> one process", DOWN),
            ("> several processes on CPUs", ENTER),
            ("machines? [1]", "\r"),
            ("DeepSpeed? [YES/no]", "\r"),
            ("[yes/NO]", "\r"),
            ("> stage 2", "\x1bOB"),  # the arrow of a keypad in application mode
            ("> stage 3", ENTER),
            ("> none", UP),  # from the first to the last
            ("> nvme", DOWN),
            ("> none", "1"),
            ("> cpu", "\x1b[C9x"),  # neither an arrow up or down, nor one of the choices
            ("cpu", ENTER),
            ("> none", UP + ENTER),
            ("[/nvme]", "/disk\r"),
            ("[as the script says]", "4\r"),
            ("[as the script says]", "\r"),
            ("[yes/NO]", "\r"),
            ("[YES/no]", "\r"),
            ("[there are none]", "\r"),
            ("[2]", "3\r"),
            ("> no", "jj" + ENTER),
            ("agree", "\r"),
            ("torch.compile?", "\r"),
            ("To train with it: zeroaccel launch SCRIPT", ""),
        )
        assert finished(child) == 0
    assert launch_file.read(str(tmp_path / "home" / "default_config.yaml")) == {
        **ALWAYS,
        "use_deepspeed": True,
        "cpu": True,
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "offload_param_device": "nvme",
        "offload_param_nvme_path": "/disk",
        "gradient_accumulation_steps": 4,
        "zero3_save_16bit_model": False,
        "zero3_init_flag": True,
        "num_processes": 3,
        "mixed_precision": "bf16",
    }


def test_keys_that_were_typed_ahead_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    with terminal("config", "--config_file", str(path)) as child:
        lines = ["jj", "1", "yes", "no", "k", "j", "2", "0.5", "0", "4", "k", "no", "no"]
        replay(child, ("> one process", "\r".join([*lines, ""])))
        assert finished(child) == 0
    assert launch_file.read(str(path)) == {
        **ALWAYS,
        "use_deepspeed": True,
        "zero_stage": 1,
        "offload_optimizer_device": "cpu",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "gpu_ids": "0",
        "num_processes": 4,
        "mixed_precision": "bf16",
    }


def test_a_menu_leaves_one_line_behind(tmp_path: Path) -> None:
    with terminal("config", "--config_file", str(tmp_path / "launch.yaml")) as child:
        replay(child, ("> one process", ENTER))
        child.expect_exact("CPU even if")
        menu = child.before
    assert menu.count("\x1b[3A\x1b[J") == 1  # up to its first line, and all below cleared
    assert menu.endswith("  one process, on one GPU or the CPU\r\n\x1b[?25hStay on the ")  # the cursor is back


# The terminal: why a menu cannot be drawn in it.
PLAIN = {"dumb": ({"TERM": "dumb"}, (24, 80)), "low": ({}, (3, 80))}


@pytest.mark.parametrize("why", PLAIN)
def test_a_terminal_without_room_or_cursor_gets_numbers(why: str, tmp_path: Path) -> None:
    variables, size = PLAIN[why]
    with terminal("config", "--config_file", str(tmp_path / "launch.yaml"), size=size, **variables) as child:
        replay(child, ("Number [0]: ", "1\r"), ("machines? [1]", "\r"))
        assert "\x1b" not in child.before


def test_long_choices_are_cut_so_that_the_menu_stays_in_its_lines(tmp_path: Path) -> None:
    with terminal("config", "--config_file", str(tmp_path / "launch.yaml"), size=(24, 20)) as child:
        child.expect_exact("> one process, on o\r\n")


@pytest.mark.parametrize("at", ["a menu", "a line"])
def test_ctrl_c_writes_nothing_and_leaves_the_terminal_as_it_was(at: str, tmp_path: Path) -> None:
    with terminal("config", "--config_file", str(tmp_path / "launch.yaml")) as child:
        before = termios.tcgetattr(child.child_fd)
        child.expect_exact("> one process")
        assert termios.tcgetattr(child.child_fd) != before  # it really was changed
        if at == "a line":
            replay(child, ("CPU", ENTER), ("[yes/NO]", ""))
        child.sendintr()
        child.expect_exact("\x1b[?25h" if at == "a menu" else "^C")
        assert termios.tcgetattr(child.child_fd) == before
        assert finished(child) == 130
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("at", ["a menu", "a line"])
def test_ctrl_d_is_the_end_of_the_answers(at: str, tmp_path: Path) -> None:
    with terminal("config", "--config_file", str(tmp_path / "launch.yaml")) as child:
        if at == "a line":
            replay(child, ("> one process", ENTER), ("[yes/NO]", "\x04"))
        else:
            replay(child, ("> one process", "\x04"))
        child.expect_exact("error: the answers ended before the questions: nothing was written\r\n")
        assert finished(child) == 2
    assert files_in(tmp_path) == []


MENUS = {"In which", "Which type of machine", "stage?", "states?", "parameters?", "mixed precision?"}


def test_the_same_answers_give_accelerates_questionnaire_the_same_file(tmp_path: Path) -> None:
    theirs, ours = str(tmp_path / "theirs.yaml"), str(tmp_path / "ours.yaml")
    child = pexpect.spawn(
        str(PROGRAMS / "accelerate"),
        ["config", "--config_file", theirs],
        env={**clean_environment(), "TERM": "xterm"},
        encoding="utf-8",
        timeout=60,
    )
    child.delaybeforesend = None
    steps = [
        *(("In which", "\r"), ("Which type of machine", "4\r"), ("machines", "\r"), ("operations", "\r")),
        *(("dynamo", "\r"), ("DeepSpeed?", "yes\r"), ("json", "no\r"), ("stage?", "3\r"), ("states?", "1\r")),
        *(("parameters?", "2\r"), ("Path", "/disk\r"), ("accumulation", "4\r"), ("clipping?", "yes\r")),
        *(("value?", "0.5\r"), ("16-bit", "yes\r"), ("zero.Init", "yes\r"), ("MoE", "no\r"), ("GPU(s)", "2\r")),
        ("mixed precision?", "2\r"),
    ]
    try:
        for words, keys in steps:
            child.expect_exact(words)
            child.expect(r"[:?>➔]")  # behind the question, where the answer is read
            if words in MENUS:  # which throw away what comes before they listen
                wait_until(lambda: not termios.tcgetattr(child.child_fd)[3] & termios.ICANON, "the menu listens")
            child.send(keys)
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
    typed = ["2", "", YES, NO, "3", "cpu", "nvme", "/disk", "4", "0.5", YES, YES, "", "", "2", "bf16", NO, NO]
    subprocess.run(
        [sys.executable, "-m", "zeroaccel", "config", "--config_file", ours],
        input="".join(f"{line}\n" for line in typed),
        env=clean_environment(),
        text=True,
        timeout=60,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert yaml.safe_load(Path(ours).read_text()) == yaml.safe_load(Path(theirs).read_text())


# --- sub-commands and errors --------------------------------------------------------------------------------------


def test_default_writes_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZEROACCEL_HOME", str(tmp_path))
    path = tmp_path / "default_config.yaml"
    assert main(["config", "default", "--mixed-precision", "BF16"]) == 0
    assert capsys.readouterr().out == f"Written: {path}\n"
    assert launch_file.read(str(path)) == {**ONE, "cpu": True, "mixed_precision": "bf16"}
    assert main(["config", "default"]) == 0
    assert f"{path} is there and stays as it is" in capsys.readouterr().out
    assert launch_file.read(str(path))["mixed_precision"] == "bf16"


def test_update_rewrites_the_file_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("distributed_type: DEEPSPEED\nfp16: true\nfsdp_config: {}\n")
    assert main(["config", "update", "--config_file", str(path)]) == 0
    assert capsys.readouterr().out == f"Updated: {path}\n"
    document = yaml.safe_load(path.read_text())
    assert (document["mixed_precision"], "fp16" in document, "fsdp_config" in document) == ("fp16", False, False)


# The command line: what its one line of error must hold.
REFUSED = {
    "config defualt": ["'defualt'", "default, update, explain, validate"],
    "config --confg_file x": ["--confg_file", "did you mean --config_file?"],
    "config --config_file .": [". is a folder: name a file in it"],
    "config --config_file /dev/null/launch.yaml": ["/dev/null/launch.yaml cannot be written", "/dev/null stands"],
    "config default --mixed_precision fp4": ["--mixed_precision", "'fp4'", "'bf16'"],
    "config default --config_file /dev/null/launch.yaml": ["cannot be written"],
    "config update --config_file absent.yaml": ["no launch configuration 'absent.yaml'"],
    "config update extra": ["extra"],
}


@pytest.mark.parametrize("command", REFUSED)
def test_a_wrong_command_line_is_one_line_and_status_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status: Any = None
    try:
        status = main(command.split())
    except SystemExit as stop:
        status = stop.code
    told = capsys.readouterr()
    assert (status, told.out, told.err.count("\n")) == (2, "", 1)
    assert all(part in told.err for part in REFUSED[command])


@pytest.mark.parametrize("command", ["config", "config default", "config update"])
def test_help_loads_no_torch(command: str) -> None:
    code = f"import sys\nfrom zeroaccel.commands.main import main\ntry: main({[*command.split(), '--help']})\nfinally: "
    code += "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], text=True, timeout=60, check=True, stdout=subprocess.PIPE
    ).stdout
    assert "--config_file FILE" in told


def test_every_option_of_a_file_is_one_of_the_launcher() -> None:
    options = vars(launch.parse([__file__]))
    assert {*PLACES, "use_deepspeed", "multi_gpu"} <= set(options)
