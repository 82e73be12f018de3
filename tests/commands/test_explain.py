"""`zeroaccel config explain`: what it foresees is what `prepare()` resolves, with sources that a user can find."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD

from tests.commands.runs import run as run_program
from tests.distributed.pool import RankPool
from tests.engine.small import Net, accelerator, loader
from zeroaccel.commands.config import explain
from zeroaccel.config.document import leaves
from zeroaccel.errors import ConfigError, ZeroAccelError
from zeroaccel.utils import DummyOptim, DummyScheduler

LAUNCH = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: 3
  gradient_accumulation_steps: 4
mixed_precision: bf16
num_processes: 2
"""
BUCKETS = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
SIZES = ["--hidden_size", "64", "--num_parameters", "161"]  # of `Net(hidden_size=64)`


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZEROACCEL_HOME", str(tmp_path / "home"))


def entries(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, dict[str, Any]]:
    """What `--json` prints, by key."""
    assert explain.run(["--json", *argv]) == 0
    return {entry["key"]: entry for entry in json.loads(capsys.readouterr().out)["entries"]}


def written(folder: Path, content: str | dict[str, Any], name: str) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return str(path)


# --- sources ----------------------------------------------------------------------------------------------------

# key -> value, parts of source and reason; with the launch configuration above.
SOURCES: dict[str, tuple[Any, str, str]] = {
    "zero_optimization.stage": (3, "zero_stage (launch.yaml:4)", ""),
    "gradient_accumulation_steps": (2, "--gradient_accumulation_steps", ""),
    "bf16.enabled": (True, "mixed_precision (launch.yaml:6)", ""),
    "gradient_clipping": (0.5, "ACCELERATE_GRADIENT_CLIPPING", ""),
    "train_micro_batch_size_per_gpu": (8, "DataLoader", "batch size 8"),
    "train_batch_size": (32, "rule", "8 (micro-batch) x 2 (accumulation) x 2 (ranks)"),
    "zero_optimization.offload_param.device": ("none", "default", ""),
    "steps_per_print": (float("inf"), "rule", "DeepSpeed's progress lines stay off stdout"),
    "zero_allow_untested_optimizer": (True, "rule", "the optimizer is the script's own"),
}


def test_sources_are_options_lines_and_variables(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    written(tmp_path, LAUNCH, "launch.yaml")
    typed = ["--config_file", "launch.yaml", "--gradient-accumulation-steps", "2", "--batch_size", "8"]
    found = entries(capsys, *typed)
    assert {key: tuple(found[key].values())[1:] for key in SOURCES} == SOURCES


def test_the_default_launch_configuration_is_read_as_launch_reads_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    path = written(tmp_path / "home", LAUNCH, "default_config.yaml")
    assert entries(capsys)["zero_optimization.stage"]["source"] == f"zero_stage ({path}:4)"


def test_values_of_a_deepspeed_config_have_their_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 1, "overlap_comm": True}}, "ds.json")
    found = entries(capsys, "--deepspeed_config_file", path)
    assert found["zero_optimization.overlap_comm"]["source"] == f"{path}:4"


def test_what_was_given_twice_is_warned_of_in_the_users_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 1}}, "ds.json")
    assert explain.run(["--deepspeed_config_file", path, "--zero_stage", "2"]) == 0
    told = capsys.readouterr().err
    assert f"zero_stage: 1 ({path}:3) holds, not 2 (--zero_stage)" in told
    assert "ZEROACCEL" not in told


# --- what prepare() will know -----------------------------------------------------------------------------------


def test_what_only_the_script_tells_stays_open_with_its_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {
        "zero_optimization": {"stage": 3, **BUCKETS},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }
    found = entries(capsys, "--deepspeed_config_file", written(tmp_path, config, "ds.json"))
    still_open = {key: entry["reason"] for key, entry in found.items() if entry["value"] == "auto"}
    size = "hidden size and number of parameters of the model"
    assert still_open == {
        "train_micro_batch_size_per_gpu": "batch size of the DataLoader",
        "zero_optimization.reduce_bucket_size": size,
        "zero_optimization.stage3_prefetch_bucket_size": size,
        "optimizer.params.lr": "the script's DummyOptim",
        "scheduler.params.warmup_num_steps": "the script's DummyScheduler",
    }


def test_a_model_folder_tells_hidden_size_and_number_of_parameters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    path = written(tmp_path, {"zero_optimization": {"stage": 3, **BUCKETS}}, "ds.json")
    found = entries(capsys, "--deepspeed_config_file", path, "--model", str(tmp_path))
    bucket = found["zero_optimization.reduce_bucket_size"]
    assert bucket["value"] == sum(p.numel() for p in BertForSequenceClassification(config).parameters())
    assert "hidden size squared is 1024" in bucket["reason"]


AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2, **BUCKETS},
}
DUMMIES = {
    **AUTO,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}},
}
# What is typed, and the same as fields of the plugin or as a DeepSpeed config.
SAME: dict[str, tuple[list[str], dict[str, Any]]] = {
    "no config": ([], {}),
    "offload": (
        ["--zero_stage", "2", "--offload_optimizer_device", "cpu"],
        {"zero_stage": 2, "offload_optimizer_device": "cpu"},
    ),
    "stage 0 offloads nothing": (
        ["--zero_stage", "0", "--offload_optimizer_device", "cpu"],
        {"zero_stage": 0, "offload_optimizer_device": "cpu"},
    ),
    "clipping": (["--gradient_clipping", "0.5"], {"gradient_clipping": 0.5}),
    "Accelerate's numbers": (["--auto_policy", "accelerate"], {"config": AUTO, "auto_policy": "accelerate"}),
    "a config full of auto": ([], {"config": AUTO}),
    "a config with optimizer and scheduler": ([], {"config": DUMMIES}),
}


def resolved_by_prepare(**fields: Any) -> dict[str, Any]:
    """What one rank's `prepare()` resolves with these fields of the plugin, by key."""
    model = Net(hidden_size=64)
    run = accelerator(**fields)
    if fields.get("config") == DUMMIES:
        optimizer = DummyOptim(model.parameters(), lr=0.1)
        run.prepare(model, optimizer, DummyScheduler(optimizer, warmup_num_steps=3), loader(4))
    else:
        run.prepare(model, SGD(model.parameters(), lr=0.1), loader(4))
    resolved = run.explain()
    assert resolved is not None
    return dict(leaves(resolved.config))


@pytest.fixture(scope="module")
def rank() -> Iterator[RankPool]:
    """A process of its own: `prepare()` would leave its process group in this one."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", list(SAME))
def test_it_foresees_what_prepare_resolves(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, rank: RankPool
) -> None:
    typed, fields = SAME[name]
    config = fields.get("config")
    if config is not None:
        typed = [*typed, "--deepspeed_config_file", written(tmp_path, config, "ds.json")]
    assert explain.run(["--json", "--cpu", "--num_processes", "1", "--batch_size", "4", *SIZES, *typed]) == 0
    foreseen = json.loads(capsys.readouterr().out)["config"]

    resolved = rank.run(resolved_by_prepare, **fields)[0]
    told = {key: value for key, value in leaves(foreseen) if value != "auto"}
    assert told == {key: resolved[key] for key in told}
    assert set(resolved) - set(told) == (
        {"optimizer.params.lr", "scheduler.params.warmup_num_steps", "scheduler.params.warmup_max_lr"}
        if config is DUMMIES
        else set()
    )


# --- the command ------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.run(["--cpu", "--zero_stage", "3"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["key", "value", "source", "reason"]
    assert any(row.split()[:3] == ["zero_optimization.stage", "3", "--zero_stage"] for row in rows)


def test_stdout_is_strict_json(tmp_path: Path) -> None:
    """DeepSpeed logs to stdout when it is imported, and infinity is no JSON."""
    command = (sys.executable, "-m", "zeroaccel", "config", "explain", "--json", "--cpu")
    ended = run_program(command, tmp_path, ZEROACCEL_HOME=str(tmp_path))
    assert ended.status == 0, ended.err

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(ended.out, parse_constant=refuse)["config"]["steps_per_print"] == float("inf")


# What is typed, and parts of the one error.
REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unresolvable": (["--deepspeed_config_file", "auto.json"], ("sub_group_size is 'auto'", "not understood")),
    "unknown key": (["--deepspeed_config_file", "unknown.json"], ("zero_optimization.stages", "did you mean 'stage'?")),
    "nvme without path": (["--offload_param_device", "nvme", "--zero_stage", "3"], ("'nvme' without nvme_path",)),
    "no config file": (["--config_file", "none.yaml"], ("there is no launch configuration 'none.yaml'",)),
    "no model": (["--model", "./none"], ("there is no folder './none'",)),
    "arithmetic": (
        ["--deepspeed_config_file", "batch.json", "--num_processes", "2"],
        ("train_batch_size is 9, but 4 (micro-batch)", "batch.json:2"),
    ),
    "ambiguous": (["--config_file", "beside.yaml"], ("the launch config file sets zero_stage",)),
}
FILES: dict[str, Any] = {
    "auto.json": {"zero_optimization": {"sub_group_size": "auto"}},
    "unknown.json": {"zero_optimization": {"stages": 3}},
    "batch.json": {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 4, "zero_optimization": {}},
    "beside.yaml": "distributed_type: DEEPSPEED\ndeepspeed_config:\n"
    "  deepspeed_config_file: batch.json\n  zero_stage: 3\n",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_is_one_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in FILES.items():
        written(tmp_path, content, file)
    typed, parts = REFUSED[name]
    with pytest.raises(ZeroAccelError) as caught:
        explain.run(["--cpu", *typed])
    assert isinstance(caught.value, ConfigError)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--batch_sise", "3"], "unknown option --batch_sise: did you mean --batch_size?"),
        (["--zero_stag", "3"], "unknown option --zero_stag: did you mean --zero_stage?"),
        (["--batch_size", "0"], "write a whole number, 1 or more"),
        (["--num_parameters", "many"], "write a number such as 350M, 7B or 7e9"),
        (["--model", "x", "--hidden_size", "3"], "leave one side away"),
    ],
)
def test_bad_options_are_one_line_and_status_2(typed: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        explain.run(typed)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("zeroaccel config explain: error: ")
    assert told in line
