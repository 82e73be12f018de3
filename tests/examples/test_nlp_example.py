"""The example learns on two ranks, runs with every config template, alone, and with a Hugging Face model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool, reset_states

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "nlp_example.py"
TEMPLATES = sorted((ROOT / "examples" / "deepspeed_config_templates").glob("*.json"))
RESULT = re.compile(
    r"result: held-out accuracy (?P<accuracy>[\d.]+)% \(chance (?P<chance>[\d.]+)%\),"
    r" training loss (?P<first>[\d.]+) -> (?P<last>[\d.]+)"
)


def start(command: list[str]) -> tuple[dict[str, float], str]:
    """Runs a command in a process of its own; the numbers of its result line and all that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    results = list(RESULT.finditer(output))
    assert len(results) == 1, output  # rank 0 alone speaks
    return {name: float(number) for name, number in results[0].groupdict().items()}, output


def test_two_ranks_learn_through_the_launcher_and_say_nothing_else() -> None:
    result, output = start(
        [sys.executable, "-m", "zeroaccel", "launch", "--cpu", "--num_processes", "2", "--zero_stage", "2"]
        + [str(SCRIPT), "--num_epochs", "1"]
    )
    assert result["last"] < result["first"]
    assert result["accuracy"] >= result["chance"] + 10
    said = [line for line in re.split(r"[\r\n]+", output) if line.strip() and not line.startswith("epoch 1/1")]
    assert [line.split(":")[0].split(" on ")[0] for line in said] == ["2 rank(s)", "result"], output


def test_runs_alone_without_launcher_and_without_deepspeed() -> None:
    result, output = start([sys.executable, str(SCRIPT), "--cpu", "--num_epochs", "1", "--max_samples", "1600"])
    assert "1 rank(s) on cpu, plain PyTorch" in output
    assert result["last"] < result["first"]


def train_with(variables: dict[str, str], options: list[str]) -> tuple[Any, dict[str, Any]]:
    """The example on this rank, with what the launcher would export; its result and DeepSpeed's settings."""
    from examples import nlp_example

    os.environ.update(variables)
    try:
        args = nlp_example.make_parser().parse_args(["--cpu", "--num_epochs", "1", *options])
        accelerator = nlp_example.make_accelerator(args)
        result = nlp_example.training_function(accelerator, args)
        config = dict(accelerator.deepspeed_config or {})
        accelerator.free_memory()
        return result, config
    finally:
        for name in variables:
            del os.environ[name]


def train_with_each(templates: list[str]) -> list[tuple[Any, dict[str, Any]]]:
    """A few steps with each config file."""
    outcomes = []
    for template in templates:
        reset_states()
        variables = {"ZEROACCEL_USE_DEEPSPEED": "true", "ZEROACCEL_DEEPSPEED_CONFIG_FILE": template}
        outcomes.append(train_with(variables, ["--max_samples", "160", "--gradient_accumulation_steps", "2"]))
    return outcomes


def test_every_template_trains_alike(ranks: RankPool) -> None:
    assert [template.name for template in TEMPLATES] == [
        "zero_stage1_config.json",
        "zero_stage2_config.json",
        "zero_stage2_offload_config.json",
        "zero_stage3_config.json",
        "zero_stage3_offload_config.json",
    ]
    first, second = ranks.run(train_with_each, templates=[str(template) for template in TEMPLATES])
    for template, (result, config), (other, _) in zip(TEMPLATES, first, second, strict=True):
        zero = config["zero_optimization"]
        assert f"stage{zero['stage']}" in template.name
        assert ("offload" in template.name) == ("offload_optimizer" in zero)
        assert config["train_batch_size"] == 32 * 2 * 2
        assert result == other, f"{template.name}: the ranks disagree"
        # The stages share the work differently; what comes out is the same up to rounding.
        assert result.last_loss == pytest.approx(first[0][0].last_loss, abs=1e-4), template.name


def train_hugging_face(folder: str) -> Any:
    variables = {"ZEROACCEL_USE_DEEPSPEED": "true", "ZEROACCEL_DEEPSPEED_ZERO_STAGE": "2"}
    return train_with(variables, ["--model_name_or_path", folder, "--max_samples", "128", "--lr", "1e-3"])[0]


def test_trains_a_hugging_face_model_of_a_local_folder(ranks: RankPool, tmp_path: Path) -> None:
    save_small_bert(tmp_path)
    first, second = ranks.run(train_hugging_face, folder=str(tmp_path))
    assert first == second
    assert 0 < first.last_loss < 1.5


def save_small_bert(folder: Path) -> None:
    """A BERT with random weights and a vocabulary of letters and a few words."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "is", "and", *letters]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{letter}" for letter in letters)]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=len(words) + len(letters), **shape)).save_pretrained(folder)


def test_no_held_out_sentence_is_trained_on() -> None:
    from examples import nlp_example

    by_topic = nlp_example.read_neighbours()
    held_out, trained = (
        by_topic[:: nlp_example.HELD_OUT],
        [t for i, t in enumerate(by_topic) if i % nlp_example.HELD_OUT],
    )
    sentences = [{s for topic in part for pair in topic for s in pair} for part in (held_out, trained)]
    assert len(sentences[0]) > 300
    assert not sentences[0] & sentences[1]
    pairs = nlp_example.make_pairs(held_out, draws=1, seed=0)
    assert sum(label for _, _, label in pairs) * 2 == len(pairs)
