"""The step contract, row by row: what a call means in an accumulation window."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroaccel.engine.window import Cutter, Window, micro_batch
from zeroaccel.errors import UsageError


def run_library(window: Window, batches: int) -> list[bool]:
    """A loop that calls step() after every batch."""
    real = []
    for batch in range(batches):
        window.backward(batch)
        real.append(window.step())
        if real[-1]:
            window.close()
    return real


@given(size=st.integers(1, 8), batches=st.integers(1, 40))
def test_library_counts_to_n(size: int, batches: int) -> None:
    window = Window(size)
    assert run_library(window, batches) == [(batch + 1) % size == 0 for batch in range(batches)]
    assert window.micro_batches == batches % size


@given(size=st.integers(1, 8), per_step=st.integers(2, 8), steps=st.integers(1, 5))
def test_every_step_is_real_where_the_script_cuts(size: int, per_step: int, steps: int) -> None:
    window = Window(size)
    for step in range(steps):
        for batch in range(per_step):
            window.backward(step * per_step + batch)
        assert window.step()
        assert window.cutter is Cutter.SCRIPT
        assert window.correction == 1.0
        window.close()


@given(size=st.integers(1, 8), blocks=st.integers(1, 30))
def test_accumulate_closes_each_nth_block_and_the_last(size: int, blocks: int) -> None:
    window, counted = Window(size), 0
    for block in range(blocks):
        closing = (block + 1) % size == 0 or block == blocks - 1
        window.enter_context(closing)
        window.backward(block)
        counted += 1
        assert window.step() is closing
        if closing:
            assert window.correction == (size / counted if counted < size else 1.0)
            window.close()
            counted = 0
        window.leave_context()


@given(losses=st.integers(1, 4), size=st.integers(1, 5))
def test_several_backwards_of_one_batch_are_one_micro_batch(losses: int, size: int) -> None:
    window = Window(size)
    for batch in range(size):
        for _ in range(losses):
            window.backward(batch)
        assert window.micro_batches == batch + 1
        assert window.step() is (batch + 1 == size)


def test_without_a_loader_a_micro_batch_lies_between_two_steps() -> None:
    window = Window(2)
    for expected in (False, True, False, True):
        window.backward(None)
        window.backward(None)
        assert window.step() is expected
        if expected:
            window.close()


def test_a_window_open_at_the_end_of_an_epoch_goes_on_under_the_librarys_count() -> None:
    window = Window(4)
    assert run_library(window, 6) == [False, False, False, True, False, False]
    window.backward(100)
    assert not window.step()
    window.backward(101)
    assert window.step()
    assert window.correction == 1.0


def test_a_step_right_behind_the_context_belongs_to_it() -> None:
    window = Window(2)
    window.enter_context(closing=False)
    window.backward(0)
    window.leave_context()
    assert not window.step()
    window.enter_context(closing=True)
    window.backward(1)
    window.leave_context()
    assert window.step()


def test_assigning_sync_gradients_makes_the_script_cut() -> None:
    window = Window(4)
    window.backward(0)
    assert not window.step(script_cuts=True, script_syncs=False)
    window.backward(1)
    assert window.step(script_cuts=True, script_syncs=True)
    assert window.cutter is Cutter.SCRIPT


def test_step_without_a_backward_does_nothing() -> None:
    window = Window(1)
    assert not window.step()
    window.enter_context(closing=True)
    assert not window.step()


@pytest.mark.parametrize("order", ["zero_grad first", "zero_grad last"])
def test_zero_grad_in_an_open_window_keeps_the_gradients(order: str) -> None:
    window = Window(3)
    for block in range(3):
        window.enter_context(closing=block == 2)
        if order == "zero_grad first":
            assert window.clears is (block == 0)
        window.backward(block)
        if order == "zero_grad last" and not window.step():
            assert not window.clears
        window.leave_context()
    assert window.step()


def test_zero_grad_after_the_backward_of_the_closing_block_throws_away() -> None:
    window = Window(2)
    for block, closing in enumerate((False, True)):
        window.enter_context(closing)
        window.backward(block)
    assert window.clears


def test_zero_grad_in_a_new_window_throws_away_what_another_models_pass_left() -> None:
    window = Window(2)
    for block, closing in enumerate((False, True)):
        window.enter_context(closing)
        window.backward(block)
    assert window.step()
    window.close()
    window.backward(2)  # of another model, in that one's block
    window.leave_context()
    window.enter_context(closing=False)
    assert window.clears


def test_each_model_counts_the_blocks_that_name_it() -> None:
    one, two = Window(2), Window(3)
    seen: list[bool] = []
    closed: list[tuple[bool, bool]] = []
    shown = SimpleNamespace(_mirror_sync_gradients=seen.append)
    for number, named in enumerate(([one], [two], [one], [two], [], [two])):
        with micro_batch([one, two], named, False, shown):
            closed.append((one._closing, two._closing))
            if named == [two]:  # which blocks of the other one leave alone
                assert two.clears is (number in (1, 5))
                two.backward(number)
        if two._closing and named != [one]:
            two.close()
    # An unnamed window follows the block; a block that names none is one of all.
    assert closed == [(False, False), (False, False), (True, True), (False, False), (False, True), (False, False)]
    assert seen == [False, False, True, False, False, False]
    with micro_batch([one, two], [two], True, shown):
        assert two._closing
    assert seen[-1]


def test_zero_grad_is_real_where_the_script_cuts() -> None:
    window = Window(4)
    window.backward(0)
    assert window.clears


def test_a_loss_that_is_scaled_already_is_never_rescaled() -> None:
    window = Window(4)
    window.enter_context(closing=True)
    window.backward(0, scaled=False)
    assert window.step()
    assert window.correction == 1.0


def test_a_loop_that_never_steps_is_noticed_after_a_full_window() -> None:
    window = Window(2)
    window.backward(0)
    assert not window.forgotten
    window.backward(1)
    assert window.forgotten
    window.step()
    assert not window.forgotten


# --- whole loops: what each loss counts in the step that it belongs to ---------------------------------------------


@st.composite
def loops(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Accumulation steps, and for each epoch the number of backward passes in each of its batches."""
    epochs = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=3)
    return draw(st.integers(1, 5)), draw(epochs)


class Counted:
    """A loop's windows: per real step the coefficient of every loss in it."""

    def __init__(self, size: int) -> None:
        self.window = Window(size)
        self.open: list[float] = []
        self.steps: list[list[float]] = []
        self.batch = 0

    def backward(self, passes: int) -> None:
        self.batch += 1
        for _ in range(passes):
            self.window.backward(self.batch)
            self.open.append(1 / self.window.size)

    def step(self) -> None:
        if self.window.step():
            self.steps.append([coefficient * self.window.correction for coefficient in self.open])
            self.open = []
            self.window.close()

    def zero_grad(self) -> None:
        if self.window.clears:
            self.open = []
            self.window.close()


@given(loops(), st.booleans())
def test_accumulate_gives_every_loss_the_mean_over_its_window(loop: tuple[int, list[list[int]]], first: bool) -> None:
    """zero_grad at the begin of a block or at its end, several losses a block: none is lost or counted twice."""
    size, epochs = loop
    counted = Counted(size)
    expected = []
    for epoch in epochs:
        for number, passes in enumerate(epoch):
            counted.window.enter_context(closing=(number + 1) % size == 0 or number + 1 == len(epoch))
            if first:
                counted.zero_grad()
            counted.backward(passes)
            counted.step()
            if not first:
                counted.zero_grad()
            counted.window.leave_context()
        windows = [epoch[start : start + size] for start in range(0, len(epoch), size)]
        expected += [[1 / len(window)] * sum(window) for window in windows]
    assert [len(step) for step in counted.steps] == [len(step) for step in expected]
    for step, wanted in zip(counted.steps, expected, strict=True):
        assert step == pytest.approx(wanted)


@given(loops())
def test_the_librarys_count_runs_through_the_epochs(loop: tuple[int, list[list[int]]]) -> None:
    size, epochs = loop
    counted = Counted(size)
    for passes in (passes for epoch in epochs for passes in epoch):
        counted.backward(passes)
        counted.step()
        counted.zero_grad()
    batches = [passes for epoch in epochs for passes in epoch]
    full = [batches[start : start + size] for start in range(0, len(batches) - size + 1, size)]
    assert counted.steps == [[1 / size] * sum(window) for window in full]
    assert len(counted.open) == sum(batches[len(full) * size :])  # kept for the next epoch


@given(loops(), st.integers(2, 4))
def test_windows_that_the_script_cuts_keep_the_configured_division(loop: tuple[int, list[list[int]]], cut: int) -> None:
    size, epochs = loop
    batches = [passes for epoch in epochs for passes in epoch]
    windows = [batches[start : start + cut] for start in range(0, len(batches) - cut + 1, cut)]
    counted = Counted(size)
    for window in windows:
        for passes in window:
            counted.backward(passes)
        counted.step()
        counted.zero_grad()
    assert counted.steps == [[1 / size] * sum(window) for window in windows]


@given(
    st.lists(st.sampled_from(["backward", "step", "zero_grad", "enter", "leave", "read"]), max_size=30),
    st.integers(1, 4),
)
def test_reading_decides_nothing(calls: list[str], size: int) -> None:
    """Whatever a loop does: looking at the gradients in between leaves every later answer as it was."""
    answers = []
    for looking in (False, True):
        window, given = Window(size), []
        for number, call in enumerate(calls):
            if call == "backward":
                window.backward(number)
            elif call == "step":
                given.append(real := window.step())
                if real:
                    window.close()
            elif call == "zero_grad" and window.clears:
                window.close()
            elif call == "enter":
                window.enter_context(closing=number % 2 == 0)
            elif call == "leave":
                window.leave_context()
            elif call == "read" and looking:
                window.would_close()
            given.append(window.micro_batches)
        answers.append(given)
    assert answers[0] == answers[1]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.booleans())
def test_weights_add_up_and_replace_the_correction(weights: list[int], short: bool) -> None:
    window = Window(len(weights) + short)
    for batch, weight in enumerate(weights):
        window.enter_context(closing=batch == len(weights) - 1)
        window.check_weight(True)
        window.backward(batch, weight=weight)
    assert window.step()
    assert window.weight == sum(weights)
    assert window.correction == 1.0
    window.close()
    assert window.weight is None


@pytest.mark.parametrize("weighted", [True, False])
def test_losses_with_and_without_weight_do_not_mix(weighted: bool) -> None:
    window = Window(2)
    window.backward(0, weight=3.0 if weighted else None)
    with pytest.raises(UsageError, match="mixed in one accumulation window"):
        window.check_weight(not weighted)
    window.close()
    window.check_weight(not weighted)  # the next window is free to choose
