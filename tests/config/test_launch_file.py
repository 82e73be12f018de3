"""The YAML file of `zeroaccel config`: what Accelerate's files say here, what ours say to Accelerate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zeroaccel.config import launch_file
from zeroaccel.config.launch_schema import PLACES, SCHEMA
from zeroaccel.errors import ConfigError

LOCAL = {"compute_environment": "LOCAL_MACHINE", "machine_rank": 0, "main_training_function": "main"}
# The launcher's options that LOCAL gives.
FIRST = {"machine_rank": 0}


def saved(folder: Path, content: str | dict[str, Any], name: str = "launch.yaml") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


# What users have: the content of a file and the options that it gives.
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 2": (
        {
            **LOCAL,
            "deepspeed_config": {
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 1.0,
                "offload_optimizer_device": "none",
                "offload_param_device": "none",
                "zero3_init_flag": True,
                "zero_stage": 2,
            },
            "distributed_type": "DEEPSPEED",
            "fsdp_config": {},
            "main_process_ip": None,
            "main_process_port": None,
            "mixed_precision": "fp16",
            "num_machines": 1,
            "num_processes": 2,
            "use_cpu": False,
        },
        {
            **FIRST,
            "use_deepspeed": True,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
            "zero3_init_flag": True,
            "zero_stage": 2,
            "mixed_precision": "fp16",
            "num_machines": 1,
            "num_processes": 2,
        },
    ),
    "stage 3 with offload, of 0.18": (
        {
            **LOCAL,
            "command_file": None,
            "commands": None,
            "deepspeed_config": {
                "gradient_accumulation_steps": 4,
                "offload_optimizer_device": "nvme",
                "offload_optimizer_nvme_path": "/disk",
                "offload_param_device": "cpu",
                "offload_param_nvme_path": "none",
                "zero3_init_flag": "false",
                "zero3_save_16bit_model": "true",
                "zero_stage": "3",
            },
            "distributed_type": "DEEPSPEED",
            "downcast_bf16": "no",
            "dynamo_backend": "NO",
            "dynamo_config": {},
            "fsdp_config": {},
            "gpu_ids": None,
            "main_process_ip": None,
            "main_process_port": "29511",
            "megatron_lm_config": {},
            "mixed_precision": "bf16",
            "num_machines": 1,
            "num_processes": 8,
            "rdzv_backend": "static",
            "same_network": True,
            "tpu_env": [],
            "tpu_name": None,
            "tpu_use_cluster": False,
            "tpu_use_sudo": False,
            "tpu_vm": None,
            "tpu_zone": None,
            "use_cpu": False,
        },
        {
            **FIRST,
            "use_deepspeed": True,
            "gradient_accumulation_steps": 4,
            "offload_optimizer_device": "nvme",
            "offload_optimizer_nvme_path": "/disk",
            "offload_param_device": "cpu",
            "zero3_init_flag": False,
            "zero3_save_16bit_model": True,
            "zero_stage": 3,
            "dynamo_backend": "NO",
            "main_process_port": 29511,
            "mixed_precision": "bf16",
            "num_machines": 1,
            "num_processes": 8,
            "rdzv_backend": "static",
            "same_network": True,
        },
    ),
    "scenario 1, a JSON file beside other fields": (
        {
            "command_file": None,
            "compute_environment": "LOCAL_MACHINE",
            "deepspeed_config": {
                "gradient_accumulation_steps": 1,
                "gradient_clipping": 1.0,
                "offload_optimizer_device": "cpu",
                "offload_param_device": "cpu",
                "zero3_init_flag": True,
                "zero3_save_16bit_model": True,
                "zero_stage": 3,
                "deepspeed_config_file": "ds_config.json",
            },
            "distributed_type": "DEEPSPEED",
            "num_processes": 2,
        },
        {
            "use_deepspeed": True,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "offload_optimizer_device": "cpu",
            "offload_param_device": "cpu",
            "zero3_init_flag": True,
            "zero3_save_16bit_model": True,
            "zero_stage": 3,
            "deepspeed_config_file": "ds_config.json",
            "num_processes": 2,
        },
    ),
    "scenario 2, a JSON file": (
        {
            **LOCAL,
            "deepspeed_config": {"deepspeed_config_file": "ds_config.json", "zero3_init_flag": True},
            "distributed_type": "DEEPSPEED",
            "downcast_bf16": "no",
            "dynamo_backend": "NO",
            "fsdp_config": {},
            "main_training_function": "main",
            "megatron_lm_config": {},
            "num_machines": 1,
            "num_processes": 4,
            "use_cpu": False,
        },
        {
            **FIRST,
            "use_deepspeed": True,
            "deepspeed_config_file": "ds_config.json",
            "zero3_init_flag": True,
            "dynamo_backend": "NO",
            "num_machines": 1,
            "num_processes": 4,
        },
    ),
    "scenario 3, all to be typed": ({"distributed_type": "DEEPSPEED", "num_processes": -1}, {"use_deepspeed": True}),
    "several machines": (
        {
            "deepspeed_config": {
                "deepspeed_exclusion_filter": "worker-1:0,2",
                "deepspeed_hostfile": "/job/hostfile",
                "deepspeed_multinode_launcher": "PDSH",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_stage": 1,
            },
            "distributed_type": "DEEPSPEED",
            "machine_rank": 1,
            "main_process_ip": "10.0.0.1",
            "main_process_port": 29500,
            "num_machines": 2,
            "num_processes": 16,
            "rdzv_backend": "c10d",
            "same_network": False,
        },
        {
            "use_deepspeed": True,
            "deepspeed_exclusion_filter": "worker-1:0,2",
            "deepspeed_hostfile": "/job/hostfile",
            "deepspeed_multinode_launcher": "pdsh",
            "zero_stage": 1,
            "machine_rank": 1,
            "main_process_ip": "10.0.0.1",
            "main_process_port": 29500,
            "num_machines": 2,
            "num_processes": 16,
            "rdzv_backend": "c10d",
        },
    ),
    "fp16 as up to 0.7": (
        {"distributed_type": "DEEPSPEED", "fp16": True, "deepspeed_config": {"zero_stage": 2}},
        {"use_deepspeed": True, "mixed_precision": "fp16", "zero_stage": 2},
    ),
    "fp16 beside its successor": (
        {"distributed_type": "NO", "mixed_precision": "bf16", "fp16": True},
        {"mixed_precision": "bf16"},
    ),
    "torch.compile as up to 0.17": (
        {"distributed_type": "NO", "dynamo_backend": "inductor"},
        {"dynamo_backend": "INDUCTOR"},
    ),
    "torch.compile": (
        {
            "distributed_type": "NO",
            "dynamo_config": {"dynamo_backend": "EAGER", "mode": "default", "use_dynamic": True},
        },
        {"dynamo_backend": "EAGER", "dynamo_mode": "default", "dynamo_use_dynamic": True},
    ),
    "one process": ({"distributed_type": "NO", "num_processes": 1}, {"num_processes": 1}),
    "GPUs": ({"distributed_type": "MULTI_GPU", "gpu_ids": "0,1"}, {"multi_gpu": True, "gpu_ids": "0,1"}),
    "a GPU by its number": ({"distributed_type": "NO", "gpu_ids": 0}, {"gpu_ids": "0"}),
    "CPUs": ({"distributed_type": "MULTI_CPU", "num_processes": 2}, {"cpu": True, "num_processes": 2}),
    "NPUs": ({"distributed_type": "MULTI_NPU", "num_processes": 2}, {"num_processes": 2}),
    "CPUs and DeepSpeed": (
        {"distributed_type": "DEEPSPEED", "use_cpu": True, "debug": True},
        {"use_deepspeed": True, "cpu": True, "debug": True},
    ),
    "sections of what was not chosen": (
        {
            "distributed_type": "DEEPSPEED",
            "fsdp_config": {"fsdp_version": 2},
            "ipex_config": {"ipex": False},
            "mpirun_config": {},
            "parallelism_config": {"parallelism_config_tp_size": 1},
            "tp_config": {},
            "fp8_config": {"backend": "TE"},
        },
        {"use_deepspeed": True},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_says(name: str, tmp_path: Path) -> None:
    content, options = FILES[name]
    assert launch_file.read(saved(tmp_path, content)) == options


@pytest.mark.parametrize("name", FILES)
def test_an_updated_file_says_the_same_and_is_one_of_todays(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, FILES[name][0])
    before = launch_file.read(path)
    launch_file.update(path)
    after, document = launch_file.read(path), yaml.safe_load(Path(path).read_text())
    added = {"machine_rank": 0, "num_machines": 1, "rdzv_backend": "static"}
    assert {**after, "dynamo_backend": after.get("dynamo_backend", "NO")} == {"dynamo_backend": "NO", **added, **before}
    assert not {"fp16", "dynamo_backend", "ipex_config", "tp_config"} & set(document)
    assert not [key for key, value in document.items() if value in (None, {})]
    accelerates_options(path)  # Accelerate knows every key


def test_unquoted_no_is_what_it_says_though_yaml_reads_false(tmp_path: Path) -> None:
    path = saved(tmp_path, "distributed_type: NO\nmixed_precision: no\ndynamo_backend: NO\ndowncast_bf16: no\n")
    assert launch_file.read(path) == {"mixed_precision": "no", "dynamo_backend": "NO"}
    launch_file.update(path)
    assert yaml.safe_load(Path(path).read_text())["distributed_type"] == "NO"


def test_anchors_and_merges_are_resolved(tmp_path: Path) -> None:
    text = (
        "deepspeed_config: &d\n  zero_stage: 2\ndistributed_type: DEEPSPEED\ndynamo_config: &e {}\n<<: {debug: true}\n"
    )
    assert launch_file.read(saved(tmp_path, text)) == {"use_deepspeed": True, "zero_stage": 2, "debug": True}


def test_every_option_has_its_line(tmp_path: Path) -> None:
    text = "# mine\ndistributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n\n  gradient_clipping: 1.0\n"
    assert launch_file.lines(saved(tmp_path, text)) == {"use_deepspeed": 2, "zero_stage": 4, "gradient_clipping": 6}


# --- what is refused ----------------------------------------------------------------------------------------------

D = "distributed_type: DEEPSPEED\n"
# The content: what each line of its error must hold, in order.
REFUSED = {
    "": ["this is empty"],
    "- 1\n": ["YAML mapping", "this is a list"],
    "zero\n": ["this is a str"],
    "a: [1\n": [r"launch\.yaml:2:1: not valid YAML"],
    "a: 2024-13-01\n": ["not valid YAML", "month"],
    "a: !!python/object:os.system {}\n": [r"launch\.yaml:1:4: not valid YAML"],
    "num_processes: 2\n": [":1:1: distributed_type is missing: add"],
    "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n": [":1:1: distributed_type is FSDP.*write DEEPSPEED"],
    "distributed_type: MEGATRON_LM\n": ["distributed_type is MEGATRON_LM"],
    "distributed_type: XLA\n": ["distributed_type is XLA"],
    "distributed_type: DEPSPEED\n": ["distributed_type is 'DEPSPEED': write one of NO, DEEPSPEED"],
    "distributed_type: MULTI_GPU\ndeepspeed_config: {zero_stage: 2}\n": [":2:1: deepspeed_config.*MULTI_GPU.*remove"],
    D + "compute_environment: AMAZON_SAGEMAKER\n": [":2:1: compute_environment.*write LOCAL_MACHINE"],
    D + "mpirun_config: {mpirun_hostfile: /hosts}\n": [":2:1: mpirun_config.*openmpi.*deepspeed_hostfile"],
    D + "parallelism_config: {parallelism_config_cp_size: 2}\n": [":2:1: parallelism_config splits.*remove it"],
    D + "num_proceses: 2\n": [":2:1: num_proceses is no key.*did you mean num_processes?"],
    D + "xyzzy: 2\n": [":2:1: xyzzy is no key.*: remove it"],
    D + "zero_stage: 2\n": [":2:1: zero_stage is no key.*it belongs below deepspeed_config"],
    D + "deepspeed_config: {num_processes: 2}\n": ["deepspeed_config.num_processes.*belongs to the top level"],
    D + "deepspeed_config: {zero_stge: 2}\n": ["deepspeed_config.zero_stge.*did you mean zero_stage"],
    D + "deepspeed_config: [2]\n": [r":2:1: deepspeed_config is \[2\]: write its keys below it"],
    D + "deepspeed_config:\n  zero_stage: 4\n": [":3:3: deepspeed_config.zero_stage is 4: write a whole number"],
    D + "deepspeed_config: {zero_stage: true}\n": ["zero_stage is True"],
    D + "deepspeed_config: {gradient_clipping: -1}\n": ["gradient_clipping is -1: write a number, 0 or more"],
    D + "deepspeed_config: {gradient_clipping: .nan}\n": ["gradient_clipping is nan"],
    D + "deepspeed_config: {gradient_accumulation_steps: 0}\n": ["is 0: write a whole number, 1 or more"],
    D + "deepspeed_config: {offload_param_device: disk}\n": ["is 'disk': write one of none, cpu, nvme"],
    D + "deepspeed_config: {zero3_init_flag: maybe}\n": ["is 'maybe': write true or false"],
    D + "deepspeed_config: {deepspeed_multinode_launcher: ssh}\n": ["is 'ssh': write one of pdsh"],
    D + "deepspeed_config: {deepspeed_hostfile: [a]}\n": [r"is \['a'\]: write text"],
    D + "num_processes: two\n": [":2:1: num_processes is 'two': write a whole number, 1 or more"],
    D + "num_processes: 0\n": ["num_processes is 0"],
    D + "num_processes: 2.5\n": ["num_processes is 2.5"],
    D + "main_process_port: 70000\n": ["main_process_port is 70000: write a whole number, 0 to 65535"],
    D + "mixed_precision: fp4\n": ["is 'fp4': write one of no, fp8, fp16, bf16"],
    D + "use_cpu: 3\n": ["use_cpu is 3: write true or false"],
    D + "use_cpu: {}\n": ["use_cpu is {}: write true or false"],
    D + "num_processes: 2\nnum_processes: 4\n": [":3:1: num_processes is there 2 times: keep one"],
    "num_proceses: 2\ndistributed_type: X\ndeepspeed_config:\n  zero_stage: 9\n  zero3_init_flog: true\ndebug: 2\n": [
        "5 problems",
        ":1:1: num_proceses",
        ":2:1: distributed_type",
        ":4:3: deepspeed_config.zero_stage",
        ":5:3: deepspeed_config.zero3_init_flog.*zero3_init_flag",
        ":6:1: debug is 2",
    ],
}


@pytest.mark.parametrize("content", REFUSED)
def test_what_cannot_work_is_refused_with_its_line_and_the_remedy(content: str, tmp_path: Path) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(ConfigError) as refused:
        launch_file.read(path)
    told = str(refused.value)
    assert path in told
    for number, expected in enumerate(REFUSED[content]):
        line = told.splitlines()[number] if len(REFUSED[content]) > 2 else told
        assert re.search(expected, line), f"{expected!r} is not in {line!r}"
    assert told.count("\n") == (len(REFUSED[content]) - 1 if len(REFUSED[content]) > 2 else 0)
    with pytest.raises(ConfigError):
        launch_file.update(path)
    assert Path(path).read_text() == content


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "file").write_text("")
    for name, error in {
        "absent.yaml": "no launch configuration .*absent",
        ".": "directory",
        "binary": "not valid",
    }.items():
        with pytest.raises(ConfigError, match=error):
            launch_file.read(str(tmp_path / name))
    with pytest.raises(ConfigError, match="cannot be written"):
        launch_file.write(str(tmp_path / "file" / "launch.yaml"), {})


# --- Accelerate reads what we write, and the other way round -------------------------------------------------------


def accelerates_options(path: str) -> dict[str, Any]:
    """What the installed Accelerate makes of a file: its top level and its sections, flat."""
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(path).to_dict()
    return {**loaded, **loaded.pop("deepspeed_config", {}), **loaded.pop("dynamo_config", {})}


def _values(option: str) -> st.SearchStrategy[Any]:
    """Values that an option can have."""
    section, name = PLACES[option]
    wanted = SCHEMA[section][name].kind.wanted
    if wanted.startswith("one of "):
        return st.sampled_from(wanted.removeprefix("one of ").split(", "))
    if wanted == "true or false":
        return st.just(True) if section != "deepspeed_config" else st.booleans()
    if wanted == "text":
        return st.sampled_from(["0,1", "10.0.0.1", "/a b/c: d", "no", "007", "# x"])
    highest = int(wanted.rpartition(" ")[2]) if " to " in wanted else 100
    return st.integers(min_value=1, max_value=highest).map(float if option == "gradient_clipping" else int)


ANSWERS = st.fixed_dictionaries({"use_deepspeed": st.just(True)}, optional={name: _values(name) for name in PLACES})


@given(answers=ANSWERS)
def test_what_is_written_is_read_here_and_by_accelerate(
    answers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    for ending in ("yaml", "json"):
        path = str(tmp_path_factory.getbasetemp() / "deep" / f"launch.{ending}")
        launch_file.write(path, answers)
        given = {"machine_rank": 0, "num_machines": 1, "rdzv_backend": "static", "same_network": True, **answers}
        assert launch_file.read(path) == given
        theirs = accelerates_options(path)
        assert theirs["distributed_type"] == "DEEPSPEED"
        assert {PLACES[name][1]: theirs[PLACES[name][1]] for name in given if name in PLACES} == {
            PLACES[name][1]: value for name, value in given.items() if name in PLACES
        }


# Answers: the type that the file has.
TYPES = [
    ({"use_deepspeed": True, "multi_gpu": True, "cpu": False}, "DEEPSPEED"),
    ({"multi_gpu": True, "num_processes": 2}, "MULTI_GPU"),
    ({"cpu": True, "num_processes": 2}, "MULTI_CPU"),
    ({"cpu": True, "num_processes": 1}, "NO"),
    ({}, "NO"),
]


@pytest.mark.parametrize(("answers", "kind"), TYPES)
def test_the_type_follows_from_the_answers(answers: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "launch.yaml")
    launch_file.write(path, answers)
    assert accelerates_options(path)["distributed_type"] == kind


def test_the_basic_file_of_accelerate_is_ours_too(tmp_path: Path) -> None:
    from accelerate.utils import write_basic_config as theirs

    from zeroaccel.utils import write_basic_config as ours

    theirs("bf16", str(tmp_path / "theirs.yaml"))
    ours("bf16", str(tmp_path / "ours.yaml"))
    expected = {**launch_file.read(str(tmp_path / "theirs.yaml")), "same_network": True}
    assert launch_file.read(str(tmp_path / "ours.yaml")) == expected


def test_the_default_place_is_in_the_cache_or_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZEROACCEL_HOME", raising=False)
    assert launch_file.default_path() == str(Path.home() / ".cache" / "zeroaccel" / "default_config.yaml")
    monkeypatch.setenv("ZEROACCEL_HOME", "~/elsewhere")
    assert launch_file.default_path() == str(Path.home() / "elsewhere" / "default_config.yaml")
