"""Several machines through DeepSpeed's launchers: the exact command, what travels, and what is refused.

`nossh` and `pdsh` run for real, the latter on machines that are all this one. MPI and SLURM are not here: DeepSpeed's
own launcher runs, up to the command that it would give to them.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from tests.commands.runs import SCRIPTS, ZEROACCEL_LAUNCH, ended, reports, run, started
from tests.commands.settled import SCRIPT, elastic, job_of, nothing_launched
from tests.distributed.pool import free_port
from zeroaccel.commands.launch_deepspeed import DeepSpeedJob, without_secrets
from zeroaccel.commands.launch_hosts import filtered, read_hostfile
from zeroaccel.commands.main import main
from zeroaccel.errors import ConfigError, EnvironmentProblem

__all__ = ["nothing_launched"]

ENVIRON = str(SCRIPTS / "environ.py")
HOSTFILE = "# the cluster\nh0 slots=2\n\nh1 slots=2\nh2 slots=4\n"


def hostfile(folder: Path, text: str = "h0 slots=2\nh1 slots=2\n") -> Path:
    """A hostfile of two equal machines, or another one."""
    file = folder / "hostfile"
    file.write_text(text)
    return file


def runner(options: str, script: str = SCRIPT) -> DeepSpeedJob:
    """The job of a command line that ends in one of DeepSpeed's launchers."""
    job = job_of(options, script=script)
    assert isinstance(job, DeepSpeedJob)
    return job


# What is typed beside the hostfile: arguments of DeepSpeed's launcher behind it.
COMMANDS = {
    "": "--no_local_rank --launcher pdsh --master_port 29500",
    "--num_machines 2 --num_processes 4": "--no_local_rank --launcher pdsh --master_port 29500",
    "--num_machines 2 --num_processes 2": "--no_local_rank --launcher pdsh --num_gpus 1 --master_port 29500",
    "--main_process_ip 10.0.0.1 --main_process_port 5 -q": (
        "--no_local_rank --launcher pdsh --master_addr 10.0.0.1 --master_port 5 --quiet"
    ),
    "--deepspeed_inclusion_filter h1@h0:1 --num_processes 3": (
        "--no_local_rank --launcher pdsh --include h1@h0:1 --master_port 29500"
    ),
    "--deepspeed_exclusion_filter h1:1": "--no_local_rank --launcher pdsh --exclude h1:1 --master_port 29500",
    "--deepspeed_multinode_launcher openmpi": (
        "--no_local_rank --launcher openmpi --no_ssh_check --master_addr h0 --master_port 29500"
    ),
    "--deepspeed_multinode_launcher mvapich --num_processes 4": (
        "--no_local_rank --launcher mvapich --no_ssh_check --master_addr h0 --master_port 29500"
    ),
    "--deepspeed_multinode_launcher mpich --main_process_ip 10.0.0.1": (
        "--no_local_rank --launcher mpich --no_ssh_check --master_addr 10.0.0.1 --master_port 29500"
    ),
    "--deepspeed_multinode_launcher SLURM --num_processes 2": (
        "--no_local_rank --launcher slurm --num_gpus 1 --no_ssh_check --master_addr h0 --master_port 29500"
    ),
    "--deepspeed_multinode_launcher nossh --machine_rank 1": (
        "--no_local_rank --no_ssh --node_rank 1 --no_ssh_check --master_addr h0 --master_port 29500"
    ),
}


@pytest.mark.parametrize("options", COMMANDS)
def test_the_command_of_deepspeeds_launcher(options: str, tmp_path: Path) -> None:
    file = hostfile(tmp_path)
    python, *words = runner(f"--deepspeed_hostfile {file} {options}").command()
    assert python == sys.executable
    expected = ["-m", "deepspeed.launcher.runner", "--hostfile", str(file), *COMMANDS[options].split(), SCRIPT]
    assert words == expected


def test_modules_and_programs_are_announced_and_words_reach_the_other_shell_unchanged(tmp_path: Path) -> None:
    file = hostfile(tmp_path)
    options = f"--deepspeed_hostfile {file}"
    assert runner(f"{options} -m", script="this").command()[-2:] == ["--module", "this"]
    assert runner(f"{options} --no_python", script="sh").command()[-2:] == ["--no_python", "sh"]


# --- what travels ---------------------------------------------------------------------------------------------------


def test_dry_run_prints_a_shell_script_with_all_that_travels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = hostfile(tmp_path)
    typed = ["--deepspeed_hostfile", str(file), "--zero_stage", "2", "--num_cpu_threads_per_process", "3"]
    assert main(["launch", "--dry_run", *typed, SCRIPT, "a b"]) == 0
    *head, command = capsys.readouterr().out.splitlines()
    assert head == [
        *("cat > deepspeed_env <<'END'", "OMP_NUM_THREADS=3"),
        *("ZEROACCEL_DEEPSPEED_ZERO_STAGE=2", "ZEROACCEL_USE_DEEPSPEED=true"),
        *("END", "DS_ENV_FILE=$PWD/deepspeed_env \\"),
    ]
    assert command.startswith(f"{sys.executable} -m deepspeed.launcher.runner --hostfile {file}")
    assert command.endswith(f"{SCRIPT} 'a b'")


def test_ranks_of_mpi_and_slurm_are_told_where_to_meet(tmp_path: Path) -> None:
    told = {"MASTER_ADDR": "h0", "MASTER_PORT": "29500"}
    for launcher, expected in {
        "openmpi": told,
        "mvapich": told,
        "slurm": {**told, "ZEROACCEL_RANKS_FROM": "slurm"},
        "mpich": {},
        "pdsh": {},
    }.items():
        job = runner(f"--deepspeed_hostfile {hostfile(tmp_path)} --deepspeed_multinode_launcher {launcher}")
        assert {name: value for name, value in job.environment.items() if name != "PYTHONPATH"} == expected


def test_what_deepspeed_would_hand_on_by_itself_goes_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    variables = {"MLFLOW_TRACKING_URI": "u", "MLFLOW_TRACKING_TOKEN": "t", "NCCL_DEBUG": "INFO", "HF_TOKEN": "t"}
    assert without_secrets(variables) == {
        name: value for name, value in variables.items() if "MLFLOW_TR" not in name
    } | {"MLFLOW_TRACKING_URI": "u"}
    assert "MLFLOW_TRACKING_TOKEN would stand in the process lists" in capsys.readouterr().err


def install(folder: Path, **programs: str) -> str:
    """Programs of these texts; returns the PATH on which they come first."""
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_only_our_own_variables_travel_through_pdsh(tmp_path: Path) -> None:
    """A real run: DeepSpeed's launcher, on two machines that are this one, each with a login's variables only."""
    (tmp_path / "bin").mkdir()
    pdsh = f'#!/bin/sh\nexec {sys.executable} {SCRIPTS / "pdsh.py"} "$@"\n'
    path = install(tmp_path / "bin", pdsh=pdsh, ssh="#!/bin/sh\nexit 0\n")
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nMINE=own file\n")
    file = hostfile(tmp_path, "h0 slots=1\nh1 slots=1\n")
    words = ["a b", "$HOME", "x;y", 'say "hi" `pwd`', "*"]
    command = (
        *(*ZEROACCEL_LAUNCH, "--deepspeed_hostfile", str(file), "--main_process_ip", "127.0.0.1", "--zero_stage", "3"),
        *(ENVIRON, str(tmp_path), *words),
    )
    secrets = {"HF_TOKEN": "hidden", "WANDB_API_KEY": "hidden", "MLFLOW_TRACKING_TOKEN": "hidden", "ANYTHING": "else"}
    result = run(command, tmp_path, HOME=str(tmp_path), PATH=path, **secrets)
    assert result.status == 0, result.err
    for rank, report in enumerate(reports(tmp_path)):
        variables = report["variables"]
        assert report["arguments"] == words
        assert report["folder"] == os.getcwd()
        assert not set(secrets) & set(variables)
        assert "hidden" not in variables.values()
        ours = {name: value for name, value in variables.items() if name.startswith("ZEROACCEL_")}
        assert ours == {"ZEROACCEL_DEEPSPEED_ZERO_STAGE": "3", "ZEROACCEL_USE_DEEPSPEED": "true"}
        assert variables["MINE"] == "own file"
        ranks = (variables["RANK"], variables["WORLD_SIZE"], variables["MASTER_ADDR"], variables["MASTER_PORT"])
        assert ranks == (str(rank), "2", "127.0.0.1", "29500")
    assert not list(Path(tmp_path).glob("deepspeed_env*"))


@pytest.mark.full
def test_each_machine_starts_its_own_ranks_without_ssh(tmp_path: Path) -> None:
    """A real run: two launchers of one rank each, which train together."""
    file = hostfile(tmp_path, "h0 slots=1\nh1 slots=1\n")
    where = ("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    options = ("--deepspeed_hostfile", str(file), "--deepspeed_multinode_launcher", "nossh", "--zero_stage", "1")
    commands = [
        (*ZEROACCEL_LAUNCH, *where, *options, "--use_cpu", "--machine_rank", node, "-q", SCRIPT, str(tmp_path), "--x")
        for node in ("0", "1")
    ]
    (tmp_path / "other").mkdir()
    cpu = {"DS_ACCELERATOR": "cpu"}
    with started(commands[0], tmp_path, **cpu) as first, started(commands[1], tmp_path / "other", **cpu) as second:
        results = ended(first, tmp_path), ended(second, tmp_path / "other")
    assert [result.status for result in results] == [0, 0], [result.err for result in results]
    for report in reports(tmp_path):
        assert (report["world_size"], report["plugin"]["zero_stage"]) == (2, 1)
        assert report["arguments"] == [str(tmp_path), "--x"], "without the --local_rank that DeepSpeed would add"


# The program that DeepSpeed would start, and the words before Python: {env} stands for our variables as it writes them.
BEYOND = {
    "openmpi": (
        "mpirun",
        "-n 4 -hostfile {hostfile} --mca btl ^openib --mca btl_tcp_if_include eth0",
        "-x {name}={value}",
    ),
    "mpich": ("mpirun", "-n 4 -ppn 2", "-genv {name}={value}"),
    "mvapich": ("mpirun", "-np 4 -ppn 2 --hostfile", "-env {name}={value}"),
    "slurm": ("srun", "-n 4 --export=ALL", None),
}
RECORD = f"""#!{sys.executable}
import json, os, sys
json.dump({{"arguments": sys.argv[1:], "variables": dict(os.environ)}}, open(os.environ["HOME"] + "/record.json", "w"))
"""


@pytest.mark.full
@pytest.mark.parametrize("launcher", BEYOND)
def test_deepspeed_starts_mpi_and_slurm_with_our_variables(launcher: str, tmp_path: Path) -> None:
    program, words, export = BEYOND[launcher]
    (tmp_path / "bin").mkdir()
    marks = {"ompi_info": "#!/bin/sh\n", "mpiname": "#!/bin/sh\necho MVAPICH2-GDR\n", "sinfo": "#!/bin/sh\n"}
    path = install(tmp_path / "bin", **{program: RECORD}, **marks)
    file = hostfile(tmp_path)
    options = ("--deepspeed_hostfile", str(file), "--deepspeed_multinode_launcher", launcher, "--zero_stage", "2")
    result = run(
        (*ZEROACCEL_LAUNCH, *options, ENVIRON, "a b"), tmp_path, HOME=str(tmp_path), PATH=path, SECRET="hidden"
    )
    assert result.status == 0, result.err
    record = json.loads((tmp_path / "record.json").read_text())
    line = " ".join(record["arguments"])
    assert line.startswith(words.format(hostfile=file))
    assert record["arguments"][-2:] == [ENVIRON, "a b"]
    assert "hidden" not in line
    sent = {"ZEROACCEL_DEEPSPEED_ZERO_STAGE": "2", "ZEROACCEL_USE_DEEPSPEED": "true"}
    if launcher != "mpich":
        sent |= {"MASTER_ADDR": "h0", "MASTER_PORT": "29500"}
    for name, value in sent.items():
        if export is None:  # srun hands on all that it has
            assert record["variables"][name] == value
        else:
            assert export.format(name=name, value=value) in line


# --- what is refused ------------------------------------------------------------------------------------------------

# What is typed; HOSTS is a hostfile of h0 and h1 with 2 slots each: what the error must hold.
REFUSED = {
    "--deepspeed_hostfile nowhere": ["--deepspeed_hostfile nowhere cannot be read", "No such file"],
    "--num_machines 2 --deepspeed_multinode_launcher pdsh": [
        "--deepspeed_multinode_launcher pdsh needs --deepspeed_host"
    ],
    "--deepspeed_hostfile HOSTS --num_machines 1": ["--deepspeed_hostfile is for", "--num_machines is not"],
    "--deepspeed_inclusion_filter h0": ["--deepspeed_inclusion_filter is for", "one machine is not"],
    "--deepspeed_hostfile HOSTS --deepspeed_multinode_launcher standard": ["--deepspeed_multinode_launcher is not"],
    "--deepspeed_hostfile HOSTS --num_machines 3": ["leaves 2 machine(s) with 4 slots, but --num_machines is 3"],
    "--deepspeed_hostfile HOSTS --num_processes 3": ["--num_processes is 3: write a multiple of 2, at most 4"],
    "--deepspeed_hostfile HOSTS --num_processes 6": ["--num_processes is 6: write a multiple of 2, at most 4"],
    "--deepspeed_hostfile HOSTS --num_processes 2 --deepspeed_multinode_launcher openmpi": ["write 4"],
    "--deepspeed_hostfile HOSTS --deepspeed_inclusion_filter h1": ["leaves 1 machine(s)", "leave the hostfile away"],
    "--deepspeed_hostfile HOSTS --deepspeed_inclusion_filter h1 --deepspeed_exclusion_filter h0": ["pass one of them"],
    "--deepspeed_hostfile HOSTS --deepspeed_inclusion_filter h1:0@h0 --deepspeed_multinode_launcher mpich": [
        "2 problems",
        "mpich launcher takes the whole hostfile",
        "same number of ranks on every machine, the hostfile has [2, 1]",
    ],
    "--deepspeed_hostfile HOSTS --main_process_port 0": ["--main_process_port 0", "cannot guess a free port"],
    "--deepspeed_hostfile HOSTS --deepspeed_multinode_launcher nossh": ["write --machine_rank, 0 to 1"],
    "--deepspeed_hostfile HOSTS --max_restarts 1 --tee 3": ["pdsh launcher has no --max_restarts, --tee"],
    "--deepspeed_hostfile HOSTS --gpu_ids 0,1": ["--gpu_ids is for one machine", "--deepspeed_inclusion_filter"],
    "--deepspeed_hostfile HOSTS --deepspeed_multinode_launcher slurm --no_python": ["slurm launcher runs Python files"],
    "--deepspeed_hostfile HOSTS --offload_param_nvme_path /a$b": [
        "ZEROACCEL_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH='/a$b' cannot travel",
        "use another path",
    ],
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_fit_is_refused(options: str, tmp_path: Path) -> None:
    script = "sh" if "no_python" in options else SCRIPT
    with pytest.raises(ConfigError) as caught:
        job_of(options.replace("HOSTS", str(hostfile(tmp_path))), script=script)
    assert all(part in str(caught.value) for part in REFUSED[options])


def test_a_launcher_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=r"needs `pdsh`, which is not on the PATH.*write `standard`"):
        runner(f"--deepspeed_hostfile {hostfile(tmp_path)}").run()


def test_runners_of_the_launch_configuration_are_for_several_machines_only(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    section = f"deepspeed_config:\n  deepspeed_hostfile: {hostfile(tmp_path)}\n  deepspeed_multinode_launcher: pdsh\n"
    path.write_text(f"distributed_type: DEEPSPEED\nnum_machines: 2\n{section}")
    assert runner(f"--config_file {path}").launcher == "pdsh"
    assert elastic(f"--config_file {path} --num_machines 1").meeting.nodes == 1


# --- the hostfile ---------------------------------------------------------------------------------------------------


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    file = str(hostfile(tmp_path, HOSTFILE))
    assert {name: len(slots) for name, slots in read_hostfile(file).items()} == dict(fetch_hostfile(file))


BAD_LINES = {
    "h0\n": "hostfile:1: 'h0' is no machine",
    "a slots=1\na slots=2\n": "hostfile:2: a is there twice",
    "": "no m",
}


@pytest.mark.parametrize("text", BAD_LINES)
def test_a_bad_hostfile_is_told_with_its_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=BAD_LINES[text]):
        read_hostfile(str(hostfile(tmp_path, text)))


FILTERS = [
    ("h1", None),
    ("h2:1,3@h0", None),
    ("h1:0@h1:1", None),
    (None, "h1"),
    (None, "h2:0,1@h0:1"),
    (None, None),
]


@pytest.mark.parametrize(("include", "exclude"), FILTERS)
def test_a_filter_leaves_what_deepspeed_leaves(include: str | None, exclude: str | None, tmp_path: Path) -> None:
    from deepspeed.launcher.runner import parse_resource_filter

    hosts = read_hostfile(str(hostfile(tmp_path, HOSTFILE)))
    expected = parse_resource_filter(hosts, include_str=include or "", exclude_str=exclude or "")
    assert list(filtered(hosts, include, exclude).items()) == list(expected.items())


@pytest.mark.parametrize(
    ("include", "exclude", "error"),
    [
        ("h9", None, "inclusion_filter: 'h9' is not in the hostfile: write some of h0, h1, h2"),
        ("h0:2", None, "h0 has no slot 2, its slots are 0 to 1"),
        ("h0:a", None, "'h0:a' cannot be read: write name:0,2"),
        (None, "h0@h1@h2", "exclusion_filter h0@h1@h2 leaves no machine"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(
    include: str | None, exclude: str | None, error: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=error):
        filtered(read_hostfile(str(hostfile(tmp_path, HOSTFILE))), include, exclude)
