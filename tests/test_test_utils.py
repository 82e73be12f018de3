"""The helpers for test suites do what they say."""

from __future__ import annotations

import os
import sys
import unittest
from pathlib import Path
from unittest import mock

import accelerate.test_utils as theirs
import numpy
import pytest
import torch

import zeroaccel.test_utils as ours
from tests.distributed.pool import RankPool
from zeroaccel.state import AcceleratorState, PartialState
from zeroaccel.test_utils import conditions, testing, training

SHARED = [name for name in conditions.__all__ if name.startswith("require_") and hasattr(theirs.testing, name)]
SHARED.remove("require_torch_min_version")
REFUSED = ["require_fsdp2", "require_pippy", "require_tp", "require_transformer_engine_mxfp8"]


def _runs(decorator: object) -> bool:
    """Whether a decorated test is run on this machine."""

    def test() -> None: ...

    return not getattr(decorator(test), "__unittest_skip__", False)  # type: ignore[operator]


@pytest.mark.parametrize("name", REFUSED)
def test_tests_of_what_is_refused_do_not_run(name: str) -> None:
    assert not _runs(getattr(testing, name))


@pytest.mark.parametrize("name", sorted(set(SHARED) - set(REFUSED)))
def test_conditions_hold_where_accelerates_do(name: str) -> None:
    assert _runs(getattr(testing, name)) is _runs(getattr(theirs.testing, name))


def test_conditions_on_versions_and_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _runs(testing.require_torch_min_version(version="2.0"))
    assert not _runs(testing.require_torch_min_version(version="1000"))
    assert not _runs(testing.skip)
    assert not _runs(testing.slow)
    monkeypatch.setenv("RUN_SLOW", "yes")
    assert _runs(testing.slow)


def test_a_condition_skips_a_whole_class_with_its_reason() -> None:
    @conditions._require(lambda: False, "a unicorn")
    class Tests(unittest.TestCase):
        def test(self) -> None:
            raise AssertionError

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Tests).run(result)
    assert [reason for _, reason in result.skipped] == ["needs a unicorn"]
    assert result.wasSuccessful()


def test_the_backend_is_accelerates() -> None:
    assert (testing.torch_device, testing.device_count) == (theirs.torch_device, theirs.device_count)
    assert testing.memory_allocated_func() == theirs.memory_allocated_func()


def test_launch_commands_are_zeroaccels() -> None:
    options = {"num_processes": 2, "cpu": True, "zero_stage": None, "zero3_init_flag": False}
    command = ours.get_launch_command(**options)
    assert command[0] == "zeroaccel"
    assert command[1:] == theirs.get_launch_command(**options)[1:]
    assert ours.get_launch_command(num_processes=testing.device_count) == ours.DEFAULT_LAUNCH_COMMAND


def _run(case: type[unittest.TestCase]) -> None:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert result.testsRun == 2
    assert [text for _, text in result.errors + result.failures] == []


def test_a_temporary_folder_is_empty_for_each_test_and_gone_afterwards() -> None:
    folders = []

    class Tests(testing.TempDirTestCase):
        def test_one(self) -> None:
            folders.append(self.tmpdir)
            assert list(self.tmpdir.iterdir()) == []
            (self.tmpdir / "deep").mkdir()
            (self.tmpdir / "deep" / "file").touch()
            (self.tmpdir / "file").touch()

        test_two = test_one

    _run(Tests)
    assert folders[0] == folders[1]
    assert not folders[0].exists()


def test_each_accelerate_test_begins_without_state() -> None:
    class Tests(testing.AccelerateTestCase):
        def test_one(self) -> None:
            assert AcceleratorState._shared_state == PartialState._shared_state == {}
            AcceleratorState(cpu=True, _from_accelerator=True)

        test_two = test_one

    _run(Tests)
    assert AcceleratorState._shared_state == PartialState._shared_state == {}


def test_mocks_hold_during_each_test_only() -> None:
    class Tests(testing.MockingTestCase):
        def setUp(self) -> None:
            super().setUp()
            self.add_mocks(mock.patch.dict(os.environ, {"ZA_MOCKED": "1"}))

        def test_one(self) -> None:
            assert os.environ.pop("ZA_MOCKED") == "1"

        test_two = test_one

    _run(Tests)
    assert "ZA_MOCKED" not in os.environ


def _compare(same: bool) -> bool:
    AcceleratorState(cpu=True, _from_accelerator=True)
    return testing.are_the_same_tensors(torch.arange(3) + (0 if same else PartialState().process_index))


def test_tensors_are_compared_over_the_ranks(ranks: RankPool) -> None:
    assert ranks.run(_compare, same=True) == [True, True]
    assert ranks.run(_compare, same=False) == [False, False]


def test_an_expected_exception_is_looked_for_with_its_text() -> None:
    with ours.assert_exception(KeyError, "name"):
        raise KeyError("some name")
    with (
        pytest.raises(AssertionError, match=r"KeyError.* was expected, nothing was raised"),
        ours.assert_exception(KeyError),
    ):
        pass
    with pytest.raises(AssertionError, match="'x' was expected"), ours.assert_exception(KeyError, "x"):
        raise KeyError("y")
    with pytest.raises(AssertionError, match=r"KeyError.* was expected, .*ValueError.* was raised: z"):
        with ours.assert_exception(KeyError):
            raise ValueError("z")


def test_what_a_call_prints_is_returned() -> None:
    assert ours.capture_call_output(print, "a", 2, sep="-") == "a-2\n"


PROGRAM = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(int(sys.argv[1]))"


def test_commands_are_run_and_failures_shown() -> None:
    assert testing.run_command([sys.executable, "-c", "print('out')"], return_stdout=True) == "out\n"
    assert testing.run_command([Path(sys.executable), "-c", "pass"]) is None
    with pytest.raises(testing.SubprocessCallException, match=r"(?s)ended with status 3.*err"):
        testing.run_command([sys.executable, "-c", PROGRAM, "3"])


def test_long_commands_are_shown_while_they_run(capfd: pytest.CaptureFixture[str]) -> None:
    result = ours.execute_subprocess_async([Path(sys.executable), "-c", PROGRAM, "0"])
    assert (result.returncode, result.stdout, result.stderr) == (0, ["out"], ["err"])
    shown = capfd.readouterr()
    assert "Running:" in shown.out
    assert (shown.out.endswith("out\n"), shown.err) == (True, "err\n")
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 3, and on stderr:\nerr"):
        ours.execute_subprocess_async([sys.executable, "-c", PROGRAM, "3"], quiet=True, echo=False)
    assert capfd.readouterr() == ("", "")


def test_a_command_that_takes_too_long_is_killed() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)status -9.*killed after 0.2 s"):
        ours.execute_subprocess_async([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)


def test_paths_and_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours.path_in_accelerate_package("test_utils", "training.py") == Path(training.__file__)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert ours.get_torch_dist_unique_port() == 29500
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    assert (ours.pytest_xdist_worker_id(), ours.get_torch_dist_unique_port()) == (3, 29503)


def test_the_regression_problem_is_accelerates() -> None:
    mine, other = (
        ours.RegressionDataset(a=4, b=1, length=8, seed=3),
        theirs.RegressionDataset(a=4, b=1, length=8, seed=3),
    )
    assert len(mine) == len(other) == 8
    for i in range(8):
        assert {key: (value, value.dtype) for key, value in mine[i].items()} == {
            key: (value, value.dtype) for key, value in other[i].items()
        }
    model = ours.RegressionModel(a=2, b=3)
    assert [name for name, _ in model.named_parameters()] == ["a", "b"]
    output = ours.capture_call_output(model, torch.ones(1))
    assert output == theirs.capture_call_output(theirs.RegressionModel(a=2, b=3), torch.ones(1))
    assert model(torch.tensor(numpy.float32(2))).item() == 7
    assert ours.capture_call_output(model, torch.ones(1)) == ""
