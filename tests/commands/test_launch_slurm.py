"""Inside `srun`: machines, ranks and addresses are SLURM's. Its variables are set here; there is no SLURM to ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.commands.runs import SCRIPTS, ZEROACCEL_LAUNCH, ended, reports, started
from tests.commands.settled import SCRIPT, elastic, job_of, nothing_launched, settled
from tests.distributed.pool import free_port
from zeroaccel.commands.launch_slurm import TaskJob, expand_counts, first_host
from zeroaccel.config import environment
from zeroaccel.errors import ConfigError

__all__ = ["nothing_launched"]


def srun(nodes: int, tasks_per_node: int, task: int, nodelist: str = "gpu[03-04,9],big1") -> dict[str, str]:
    """The variables of one task, as SLURM 23.11 sets them (and more that nobody reads)."""
    return {
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NODELIST": nodelist,
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(nodes * tasks_per_node),
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks_per_node}(x{nodes})" if nodes > 1 else str(tasks_per_node),
        "SLURM_NTASKS": str(nodes * tasks_per_node),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODEID": str(task // tasks_per_node),
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % tasks_per_node),
    }


def inside(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Makes this process a task."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


PORT = 15000 + (1234567 * 31 + 2) % 16000


def test_with_one_task_a_machine_each_task_launches_the_ranks_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, srun(nodes=2, tasks_per_node=1, task=1))
    job = elastic("", devices=8)
    assert (job.num_processes, job.world_size) == (8, 16)
    assert job.command()[1:6] == [
        *("--nnodes=2", "--node_rank=1", "--master_addr=gpu03", f"--master_port={PORT}"),
        "--nproc_per_node=8",
    ]


def test_with_more_tasks_each_task_becomes_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, srun(nodes=2, tasks_per_node=4, task=6))
    job = job_of("--use_deepspeed")
    assert isinstance(job, TaskJob)
    assert {name: value for name, value in job.environment.items() if not name.startswith(("PYTHON", "OMP"))} == {
        "RANK": "6",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(PORT),
        "ZEROACCEL_USE_DEEPSPEED": "true",
    }
    assert job.command()[1:] == ["-u", SCRIPT]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")  # --gpus-per-task=1
    assert job_of("").environment["LOCAL_RANK"] == "0"


# What is typed inside two machines with one task each: torchrun's first arguments.
TYPED = {
    "--main_process_port 29511": ["--nnodes=2", "--node_rank=0", "--master_addr=gpu03", "--master_port=29511"],
    "--main_process_ip 10.0.0.1": ["--nnodes=2", "--node_rank=0", "--master_addr=10.0.0.1", f"--master_port={PORT}"],
    "--num_machines 2 --machine_rank 1": ["--nnodes=2", "--node_rank=1"],
    "--num_machines 1": ["--nnodes=1", "--standalone"],
    "--rdzv_backend c10d": ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=gpu03:{PORT}"],
}


@pytest.mark.parametrize("options", TYPED)
def test_typed_options_beat_slurm(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, srun(nodes=2, tasks_per_node=1, task=0))
    command = elastic(options).command()
    assert command[1 : 1 + len(TYPED[options])] == TYPED[options]


def test_slurm_beats_the_machines_of_the_launch_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = {"distributed_type": "DEEPSPEED", "num_machines": 1, "machine_rank": 0, "num_processes": 6}
    section = {"deepspeed_multinode_launcher": "pdsh", "deepspeed_hostfile": "/nowhere"}
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump({**file, "main_process_ip": "old", "deepspeed_config": section}))
    inside(monkeypatch, srun(nodes=2, tasks_per_node=1, task=0))
    job = elastic(f"--config_file {path}", devices=4)
    assert (job.num_processes, job.meeting.nodes, job.meeting.address) == (3, 2, "gpu03")
    note = f"SLURM's num_machines 2 holds, not 1 ({path}:7)"
    assert settled(f"--config_file {path}").notes == [note]
    inside(monkeypatch, srun(nodes=2, tasks_per_node=1, task=1))
    assert settled(f"--config_file {path}").notes == [], "one machine says it for all"


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "more than one task"])
def test_outside_srun_and_as_the_only_task_slurm_says_nothing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, srun(nodes=1, tasks_per_node=1 if missing == "more than one task" else 4, task=0))
    monkeypatch.delenv(missing, raising=False)
    assert elastic("").command()[1:3] == ["--nnodes=1", "--standalone"]


# What is typed where SLURM has started the ranks: what the error must hold.
REFUSED = {
    "--num_processes 2": ["--num_processes is 2", "srun has started 8 tasks", "--ntasks-per-node=1"],
    "--max_restarts 1 --tee 3": ["--max_restarts, --tee", "there is no launcher", "--ntasks-per-node=1"],
}


@pytest.mark.parametrize("options", REFUSED)
def test_a_rank_of_slurms_cannot_serve_what_needs_a_launcher(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, srun(nodes=2, tasks_per_node=4, task=0))
    with pytest.raises(ConfigError) as caught:
        job_of(options)
    assert all(part in str(caught.value) for part in REFUSED[options])


HOSTS = {
    "node1": "node1",
    "node1,node2": "node1",
    "gpu[03-05,7],big1": "gpu03",
    "rack[2-3]n[10,12-14]": "rack2n10",
    "a-b[01].site.org,c": "a-b01.site.org",
}


@pytest.mark.parametrize("text", HOSTS)
def test_the_first_host_of_a_list(text: str) -> None:
    assert first_host(text) == HOSTS[text]


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2),12", [1, 4, 4, 12])], ids=str
)
def test_tasks_of_each_machine(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


def test_ranks_that_only_slurm_numbers_know_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, srun(nodes=2, tasks_per_node=4, task=6))
    assert environment.launched_ranks() is None, "a script in an allocation is no rank"
    monkeypatch.setenv("ZEROACCEL_RANKS_FROM", "slurm")
    ranks = environment.launched_ranks()
    assert ranks is not None
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (6, 8, 2)


def test_two_tasks_are_two_ranks_that_train_together(tmp_path: Path) -> None:
    port = str(free_port())
    command = (*ZEROACCEL_LAUNCH, "--cpu", "--main_process_port", port, "--zero_stage", "1")
    variables = [srun(nodes=1, tasks_per_node=2, task=task, nodelist="localhost") for task in (0, 1)]
    (tmp_path / "other").mkdir()
    whole = (*command, str(SCRIPTS / "report.py"), str(tmp_path))
    with (
        started(whole, tmp_path, **variables[0]) as first,
        started(whole, tmp_path / "other", **variables[1]) as second,
    ):
        results = ended(first, tmp_path), ended(second, tmp_path / "other")
    assert [result.status for result in results] == [0, 0], [result.err for result in results]
    assert [report["world_size"] for report in reports(tmp_path)] == [2, 2]
    assert json.loads((tmp_path / "rank1.json").read_text())["plugin"]["zero_stage"] == 1
