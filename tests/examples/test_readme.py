"""What the README shows is what runs: its diff, its links, its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPool, reset_states

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def side(sign: str) -> str:
    """One side of the diff: "-" the plain loop, "+" ours."""
    other = {"-": "+", "+": "-"}[sign]
    (diff,) = blocks("diff")
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(other))


def run(source: str) -> tuple[list[float], Any]:
    """Runs a loop's text; the losses that it printed, on this rank, and its weights."""
    printed: list[str] = []
    names: dict[str, Any] = {"print": lambda text: printed.append(text)}
    exec(compile(source.replace("accelerator.print(", "print("), "README.md", "exec"), names)
    weights = [parameter.detach().clone() for parameter in names["model"].parameters()]
    return [float(line.rsplit(" ", 1)[1]) for line in printed], weights


def test_the_changed_loop_alone_is_the_plain_loop() -> None:
    import torch

    reset_states()
    try:
        losses, weights = run(side("+"))
        plain_losses, plain_weights = run(side("-"))
    finally:
        reset_states()
    assert losses == plain_losses
    assert plain_losses[-1] < plain_losses[0]
    assert all(torch.equal(one, other) for one, other in zip(weights, plain_weights, strict=True))


def run_under_zero(source: str, variables: dict[str, str]) -> list[float]:
    """The loop on this rank, as the launcher would start it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return run(source)[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_changed_loop_learns_on_two_ranks(stage: int, ranks: RankPool) -> None:
    variables = {"ZEROACCEL_USE_DEEPSPEED": "true", "ZEROACCEL_DEEPSPEED_ZERO_STAGE": str(stage)}
    for losses in ranks.run(run_under_zero, source=side("+"), variables=variables):
        assert len(losses) == 3
        assert losses[-1] < losses[0]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert "docs/differences.md" in links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_rooms_exist() -> None:
    rows = re.findall(r"^\| (`.*?) \|", README.partition("Where to look")[2], flags=re.MULTILINE)
    rooms = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(rooms) > 8
    assert [room for room in rooms if not (ROOT / "zeroaccel" / room).exists()] == []


def test_launch_lines_are_understood() -> None:
    from zeroaccel.commands.launch import parse

    lines = [line.split(" #")[0] for block in blocks("sh") for line in block.splitlines()]
    launches = [shlex.split(line)[2:] for line in lines if line.startswith("zeroaccel launch")]
    assert len(launches) == 3
    for arguments in launches:
        options = parse(arguments)
        assert options.training_script == "train.py"
        assert options.deepspeed_config_file is None or (ROOT / options.deepspeed_config_file).exists()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets
