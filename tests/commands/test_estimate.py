"""`zeroaccel estimate-memory`: its options, tables and verdicts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from zeroaccel.commands import estimate as command
from zeroaccel.commands.main import main
from zeroaccel.engine.estimate import Estimate, OnGpu, OnHost, Setting, combinations

BIG = ("--gpu_memory", "80", "--host_memory", "1000")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config of a small Llama, and nothing else."""
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=500,
    ).save_pretrained(folder)
    return str(folder)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["estimate-memory", *words]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(told(capsys, *words, "--json"))


def test_a_table_has_every_stage_and_offload(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--num_parameters", "7B", "--num_gpus", "8", "--dtypes", "bfloat16", *BIG)
    lines = text.splitlines()
    assert lines[0] == "A model with 7,000,000,000 parameters"
    assert "bfloat16, 8 GPUs of 80.0, 1000 of host memory (GiB)" in lines
    title = next(number for number, line in enumerate(lines) if line.startswith("stage"))
    rows = [line.split() for line in lines[title + 1 : lines.index("", title)]]
    assert [(int(row[0]), row[1]) for row in rows] == [(stage, offload.split()[0]) for stage, offload in combinations()]
    # stage 0: 2 + 2 + 12 bytes a parameter, and copies of the gradients in the step
    assert rows[0][2:5] == ["13.0", "13.0", "78.2"]
    assert " ".join(rows[0][-2:]) == "no: GPU"
    assert lines[-1] == "the fastest that fits: stage 1 without offload"


def test_a_local_folder_tells_its_sizes(capsys: pytest.CaptureFixture[str], llama: str) -> None:
    found = as_json(capsys, llama, "--num_gpus_per_node", "2", "4", "--num_nodes", "3", "--dtypes", "float32")
    shape = found["model"]
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert shape == {
        "parameters": 2 * 500 * 64 + 2 * layer + 64,
        "largest_parameter": 500 * 64,
        "largest_layer": layer,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 500,
    }
    assert [(each["gpus_per_node"], each["nodes"]) for each in found["estimates"]] == 9 * [(2, 3)] + 9 * [(4, 3)]
    stage1 = found["estimates"][1]
    assert (stage1["stage"], stage1["offload"], stage1["dtype"]) == (1, "none", "float32")
    assert stage1["gpu"]["optimizer"] == 8 * -(-shape["parameters"] // 6)
    assert stage1["node"]["host"] == 2 * stage1["host"]["total"] == 2 * 4 * shape["parameters"]


SCORES = 2 * 4 * 128 * 128 * 2  # layers, heads, tokens and tokens, 16 bit


@pytest.mark.parametrize(
    ("options", "lowest", "highest"),
    [
        (("--micro_batch", "3"), lambda kept: 2.95 * kept, lambda kept: 3 * kept),
        (("--dtypes", "float32"), lambda kept: 1.3 * kept, lambda kept: 2 * kept),
        (("--activation-checkpointing",), lambda kept: kept / 2, lambda kept: kept - 1),
        (("--attention", "eager"), lambda kept: kept + SCORES, lambda kept: kept + 5 * SCORES),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_activations_are_those_of_the_model(
    options: tuple[str, ...], lowest: Any, highest: Any, capsys: pytest.CaptureFixture[str], llama: str
) -> None:
    base = (llama, "--num_gpus", "1", "--seq-len", "128", "--dtypes", "bfloat16")
    kept, found = (as_json(capsys, *base, *more)["estimates"][0]["gpu"]["activations"] for more in ((), options))
    assert lowest(kept) <= found <= highest(kept) * 1.01


def test_sizes_can_be_given_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num_parameters", "7e9", "--hidden_size", "4096", "--num_layers", "32", "--vocab_size", "32000"]
    found = as_json(capsys, *words, "--seq_len", "2048", "--num_gpus", "1", "--dtypes", "float16")
    assert found["model"]["largest_layer"] == 12 * 4096 * 4096
    assert found["model"]["largest_parameter"] == 32000 * 4096
    activations = 2048 * 4096 * 34 * 32 + 4 * 2048 * (4096 + 32000)
    assert {each["gpu"]["activations"] for each in found["estimates"]} == {activations}


def need(gpu: int, host: int, ranks: int = 2) -> Estimate:
    return Estimate(Setting(2, gpus_per_node=ranks), OnGpu(weights=gpu), OnHost(weights=host))


@pytest.mark.parametrize(
    ("estimate", "gpu_memory", "verdict"),
    [
        (need(50, 10), 100, "yes"),
        (need(91, 10), 100, "tight"),
        (need(50, 46), 100, "tight"),
        (need(101, 10), 100, "no: GPU"),
        (need(50, 51), 100, "no: host"),
        (need(101, 51), 100, "no: host and GPU"),
        (need(30, 10), None, "yes"),
        (need(40, 11), None, "no: host"),  # two ranks on the CPU share what is there
    ],
)
def test_what_fits(estimate: Estimate, gpu_memory: int | None, verdict: str) -> None:
    assert command.Machine(gpu_memory, gpus=0, host_memory=100).verdict(estimate) == verdict


def test_without_gpus_the_host_holds_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    if as_json(capsys, "--num_parameters", "1M")["machine"]["gpu_memory"] is not None:
        pytest.skip("this machine has GPUs")
    text = told(capsys, "--num_parameters", "1M", "--host_memory", "16GiB")
    assert "float32, 1 CPU rank, 16.0 of host memory (GiB); without a GPU the host holds the column GPU, too" in text
    assert "float16, 8 CPU ranks, " in text


def test_accelerates_spelling_is_understood(capsys: pytest.CaptureFixture[str], llama: str) -> None:
    text = told(capsys, llama, "--dtypes", "float32", "int4", "--library-name", "transformers", "--trust-remote-code")
    assert text.startswith(f"LlamaForCausalLM of {llama} with ")
    assert "float32, " in text
    assert "int4, " not in text, "int4 is not trained"
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["dtype", "float32", "int4"]


def test_rows_are_accelerates(llama: str) -> None:
    args = command.estimate_command_parser().parse_args([llama, "--dtypes", "float32", "float16", "int8"])
    rows = command.gather_data(args)
    assert isinstance(args, argparse.Namespace)
    assert [row[0] for row in rows] == ["float32", "float16", "int8"]
    total, layer = rows[0][2], rows[0][1]
    assert [(row[1], row[2]) for row in rows] == [(layer, total), (layer / 2, total / 2), (layer / 4, total / 4)]
    assert rows[0][3] == {"model": total, "gradients": total, "optimizer": 2 * total, "step": 5 * total}
    assert set(rows[2][3].values()) == {-1}


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "name a model's folder, or give its size with --num_parameters: one of the two"),
    "both": (("x", "--num_parameters", "7B"), "name a model's folder, or give its size"),
    "no folder": (("./nowhere",), "there is no folder './nowhere'"),
    "no config": (("tests",), "there is no config.json in 'tests'"),
    "number": (("--num_parameters", "7Q"), "got '7Q', write a number such as 350M, 7B or 7e9"),
    "no GPU": (("--num_parameters", "7B", "--num_gpus", "0"), "got '0', write a whole number, 1 or more"),
    "size": (("--num_parameters", "7B", "--gpu_memory", "3x"), "got '3x', write a number of GiB, or a size"),
    "misspelt": (
        ("--num_parameters", "7B", "--host_mem", "3"),
        "unknown option --host_mem: did you mean --host_memory?",
    ),
    "batch": (("--num_parameters", "7B", "--micro_batch", "3"), "--micro_batch without --seq_len"),
    "shape": (("--num_parameters", "7B", "--seq_len", "3"), "add --hidden_size and --num_layers"),
    "timm": (("resnet", "--library_name", "timm"), "models of timm cannot be built here"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = MISTAKES[name]
    try:
        status = main(["estimate-memory", *words])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("zeroaccel estimate-memory: error: ")
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a valid JSON file"),
        ("{}", "model_type"),
        ('{"model_type": "no_such_model"}', "no_such_model"),
        ('{"model_type": "llama", "architectures": ["NoSuchModel"]}', ""),
    ],
)
def test_a_broken_config_is_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(content)
    status = main(["estimate-memory", str(tmp_path), "--num_gpus", "1"])
    out, err = capsys.readouterr()
    if not message:  # a class that transformers does not have: its base model then
        assert (status, err) == (0, "")
        assert out.startswith("LlamaModel of ")
        return
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_hub_that_is_out_of_reach_is_one_line() -> None:
    command = [sys.executable, "-m", "zeroaccel", "estimate-memory", "no-such-name/no-such-model"]
    done = subprocess.run(
        ["env", "HF_HUB_OFFLINE=1", *command], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "neither a folder here nor in the cache" in done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr
