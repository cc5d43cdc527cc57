"""States and the loop of elastic training, in one process."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest

pytest.importorskip("horovod")

from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod.runner.elastic.worker import HostUpdateResult

from hvdx import agreement, elastic
from hvdx.errors import LaunchError, MismatchError


class Schedule:
    """Has what the framework's own have."""

    def __init__(self):
        self.steps = [0]

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def make(received=None, **parts):
    """A state whose broadcasts return what ``received`` makes of what is sent; just that else."""
    return elastic.ObjectState(
        lambda sent: sent if received is None else received(sent), None, **parts
    )


def test_restore_undoes_changes_within_objects():
    state = make(epoch=0, seen=[1], schedule=Schedule())
    schedule = state.schedule
    state.epoch = 1
    state.seen.append(2)
    schedule.steps.append(1)
    state.restore()
    assert (state.epoch, state.seen, state.schedule.steps) == (0, [1], [0])
    assert state.schedule is schedule
    state.seen.append(2)
    schedule.steps.append(1)
    state.commit()
    for _ in range(2):  # what was loaded must not become what is saved
        state.seen.append(3)
        schedule.steps.append(2)
        state.restore()
    assert (state.seen, schedule.steps) == ([1, 2], [0, 1])


def test_sync_sends_what_training_has_reached_and_restore_returns_there():
    sent = []
    state = make(lambda value: sent.append(copy.deepcopy(value)) or value, epoch=0, seen=[])
    state.epoch, state.seen = 3, [7]  # not committed
    state.sync()
    assert sent == [{"epoch": 3, "seen": [7]}]
    state.epoch = 9
    state.restore()
    assert (state.epoch, state.seen) == (3, [7])


def test_sync_takes_what_rank_0_has():
    state = make(lambda sent: {"steps": [5]} if "steps" in sent else {"epoch": 4},
                 epoch=0, schedule=Schedule())  # fmt: skip
    state.sync()
    assert (state.epoch, state.schedule.steps) == (4, [5])


def test_a_replaced_part_is_watched():
    state = make(schedule=Schedule())
    other = state.schedule = Schedule()
    other.steps.append(1)
    state.restore()
    assert state.schedule is other
    assert other.steps == [0]


@pytest.mark.parametrize(
    ("updates", "skips"),
    [
        ([HostUpdateResult.added], False),
        ([HostUpdateResult.removed], True),
        ([HostUpdateResult.removed, HostUpdateResult.added], False),
    ],
)
def test_hosts_that_come_or_go_interrupt_once(updates, skips):
    state = make(epoch=0)
    state.check_host_updates()
    for timestamp, update in enumerate(updates, 1):
        state.on_hosts_updated(timestamp, update)
    with pytest.raises(HostsUpdatedInterrupt) as caught:
        state.commit()
    assert caught.value.skip_sync == skips
    state.commit()
    state.on_hosts_updated(1, HostUpdateResult.added)  # told again
    state.check_host_updates()


def test_all_ranks_are_interrupted_by_what_rank_0_was_told():
    state = make(lambda sent: (0, 8, HostUpdateResult.added) if isinstance(sent, tuple) else sent)
    with pytest.raises(HostsUpdatedInterrupt):
        state.check_host_updates()


def test_a_state_that_cannot_be_restored_is_refused_before_it_is_needed():
    class Half(elastic.State):
        def save(self):
            pass

    with pytest.raises(TypeError, match=r"restore.*sync"):
        Half(lambda sent: sent, None)


class Recorder(elastic.ObjectState):
    """Writes down what the loop asks of it."""

    def __init__(self):
        super().__init__(lambda sent: sent, None, epoch=0)
        self.told = []
        self.register_reset_callbacks([lambda: self.told.append("callback")])

    def sync(self):
        self.told.append("sync")

    def restore(self):
        self.told.append("restore")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (HorovodInternalError("gone"), ["sync", "restore", "reset", "callback", "sync"]),
        (HostsUpdatedInterrupt(False), ["sync", "reset", "callback", "sync"]),
        (HostsUpdatedInterrupt(True), ["sync", "reset", "callback"]),
    ],
)
def test_the_function_is_called_again(error, told):
    state, errors = Recorder(), [error]

    def train(given, word):
        assert given is state
        if errors:
            raise errors.pop()
        return word

    run = elastic.run_fn(train, lambda: state.told.append("reset"))
    assert run(state, "done") == "done"
    assert state.told == told
    assert run.__name__ == "train"


def test_a_rank_lost_while_ranks_meet_again_is_no_end():
    state, errors = Recorder(), [HorovodInternalError("first"), HorovodInternalError("second")]

    def fail():
        if errors:
            raise errors.pop(0)

    assert elastic.run_fn(lambda _: fail() or "done", fail)(state) == "done"


@pytest.mark.parametrize(
    "error",
    [ValueError("mine"), MismatchError("no"), HorovodInternalError("Mismatched ALLREDUCE shapes")],
)
def test_what_no_retry_mends_is_raised(error):
    def train(_):
        raise error

    with pytest.raises(type(error)):
        elastic.run_fn(train, lambda: pytest.fail("tried again"))(Recorder())


def test_without_an_elastic_launcher_the_failure_is_named():
    def refuse():
        raise LaunchError("closed")

    def train(_):
        raise HorovodInternalError("rank 1 is gone")

    with pytest.raises(LaunchError, match="closed") as caught:
        elastic.run_fn(train, refuse)(Recorder())
    assert "rank 1 is gone" in str(caught.value.__cause__)


def test_tensorflows_errors():
    if find_spec("tensorflow") is None:
        pytest.skip("needs TensorFlow")
    import tensorflow as tf

    def unknown(text):
        return tf.errors.UnknownError(None, None, text)

    assert elastic.is_lost_rank(unknown("{{node HorovodAllreduce_0}} Horovod has been shut down"))
    assert not elastic.is_lost_rank(unknown("the disk is full"))
    assert not elastic.is_lost_rank(unknown("HorovodAllreduce: Mismatched ALLREDUCE shapes"))
    assert not elastic.is_lost_rank(RuntimeError("Horovod"))


def test_newcomers_count_names_as_the_others_do(monkeypatch):
    monkeypatch.setattr(agreement, "_named", type(agreement._named)())
    agreement.next_name("thing")
    agreement.count_from([{("thing", 0): 1}, {("thing", 0): 4, ("other", 2): 1}])
    assert agreement.next_name("thing") == "hvdx.thing.5"
    assert agreement.counts() == {("thing", 0): 5, ("other", 2): 1}
