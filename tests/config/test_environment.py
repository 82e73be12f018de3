"""The one place that reads variables."""

from __future__ import annotations

import pytest

from zeroaccel.config import environment
from zeroaccel.config.environment import Ranks
from zeroaccel.config.plugin import DeepSpeedPlugin


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"ZEROACCEL_X": "1"}, ("1", "ZEROACCEL_X")),
        ({"ACCELERATE_X": "2"}, ("2", "ACCELERATE_X")),
        ({"ZEROACCEL_X": "1", "ACCELERATE_X": "2"}, ("1", "ZEROACCEL_X")),
        ({"ZEROACCEL_X": "", "ACCELERATE_X": "2"}, ("2", "ACCELERATE_X")),
    ],
)
def test_ours_come_first_and_accelerates_are_the_fallback(
    variables: dict[str, str], found: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    setting = environment.lookup("X")
    assert (None if setting is None else (setting.value, setting.variable)) == found


@pytest.mark.parametrize("name", list(environment.UNTYPED_FALLBACKS))
def test_what_accelerate_launch_exports_untyped_is_no_wish(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = environment.UNTYPED_FALLBACKS[name]
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert environment.text(name) is None
    monkeypatch.setenv(f"ZEROACCEL_{name}", value)
    assert environment.text(name) == value


@pytest.mark.parametrize(
    ("text", "meaning"),
    [(text, True) for text in ("1", "true", "T", "yes", "Y", "ON")] + [(text, False) for text in ("0", "False", "off")],
)
def test_flags_are_read_as_people_write_them(text: str, meaning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROACCEL_USE_CPU", text)
    assert environment.flag("USE_CPU") is meaning


EXPORTED = {
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.5,
    "zero_stage": 3,
    "offload_optimizer_device": "nvme",
    "offload_param_device": "cpu",
    "offload_optimizer_nvme_path": "/disk",
    "offload_param_nvme_path": "/other",
    "zero3_init_flag": False,
    "zero3_save_16bit_model": True,
    "auto_policy": "accelerate",
}


def test_what_the_launcher_exports_is_what_the_plugin_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.exports({**EXPORTED, "cpu": None}).items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert {name: getattr(plugin, name) for name in EXPORTED} == EXPORTED


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Ranks(1, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, Ranks(3, 4, 3, 4)),
    ],
)
def test_ranks_are_those_that_the_launcher_announced(
    variables: dict[str, str], ranks: Ranks | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for names in environment._RANK_VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.launched_ranks() == ranks
