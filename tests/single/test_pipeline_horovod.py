"""The channel of rounds between threads, with an alltoall of theirs in the place of Horovod's."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hvdx.errors import MismatchError, PipelineError
from hvdx.pipeline.channel import Failure, Key
from hvdx.pipeline.horovod_channel import HorovodChannel, joined, parsed, segment
from hvdx.pipeline.run import run
from hvdx.pipeline.schedule import Action, Schedule, needs, validate


class Job:
    """Ranks that exchange rows as Horovod's alltoall does, and run a function each."""

    def __init__(self, size, seconds=5.0, place=None):
        self._barrier = threading.Barrier(size)
        self._sent = [None] * size
        self.channels = [
            HorovodChannel(
                place or range(size), rank, size,
                lambda rows, counts, rank=rank: self._alltoall(rank, rows, counts),
                seconds=seconds,
            )
            for rank in range(size)
        ]  # fmt: skip

    def _alltoall(self, rank, rows, counts):
        assert rows.dtype == np.int64 and rows.shape == (sum(counts), 8)
        self._sent[rank] = np.split(rows, np.cumsum(counts)[:-1])
        self._barrier.wait()
        mine = [each[rank] for each in self._sent]
        self._barrier.wait()
        return np.concatenate(mine), [len(each) for each in mine]

    def stop(self):
        self._barrier.abort()

    def run(self, work):
        """Return what ``work(rank, channel)`` returns, or raises, on each rank."""

        def one(rank):
            try:
                return work(rank, self.channels[rank])
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(self.channels)) as threads:
            return list(threads.map(one, range(len(self.channels))))


def test_segments_come_out_as_they_went_in():
    sent = [[b"header", np.arange(9, dtype=np.uint8), b""], [b"x" * 200], [b"y", memoryview(b"z")]]
    segments = [segment(True, sent), segment(False, [])]
    rows = joined(segments)
    flat = rows.reshape(-1).view(np.uint8)
    done, found = parsed(flat[: len(flat) - 64])
    assert done
    assert [[bytes(part) for part in each] for each in found] == [
        [bytes(part) for part in each] for each in sent
    ]
    start = flat.ctypes.data
    places = [np.frombuffer(part, np.uint8).ctypes.data for m in found for part in m if len(part)]
    assert all((place - start) % 64 == 0 for place in places)
    assert parsed(flat[-64:]) == (False, [])


def test_keys_may_be_asked_for_in_any_order():
    """Each rank sends to each other, and asks in another order for what came in several rounds."""
    size, count = 4, 5

    def work(rank, channel):
        found = {}
        others = [peer for peer in range(size) if peer != rank]
        with channel.session():
            for k in range(count):
                for peer in others:
                    tensors = [np.full((k, 3), float(rank)), None, np.array(k)]
                    channel.send(peer, Key("T", 0, rank, k), tensors)
            for k in reversed(range(count)):
                for peer in reversed(others):
                    found[peer, k] = channel.receive(peer, Key("T", 0, peer, k))
        return found

    for rank, found in enumerate(Job(size).run(work)):
        assert len(found) == count * (size - 1)
        for (peer, k), (whole, nothing, number) in found.items():
            assert peer != rank and nothing is None and number == k
            assert whole.shape == (k, 3) and (whole == peer).all()


class Ones:
    """A stage that passes ones on."""

    unit = None

    def forward(self, micro_batch, inputs):
        return [np.ones(1)]

    def backward(self, micro_batch, gradients):
        return [np.ones(1)]


def random_schedule(draw):
    """Each rank's actions in an order in which they happened to become possible."""
    ranks, stages, micro = (int(n) for n in draw.integers([2, 4, 1], [5, 8, 6]))
    place = [*range(ranks), *draw.integers(0, ranks, stages - min(ranks, stages)).tolist()]
    draw.shuffle(place)
    following = {(kind, stage): 0 for kind in "FB" for stage in range(len(place))}
    rows, done = [[] for _ in range(ranks)], set()
    while following:
        actions = [Action(kind, stage, k) for (kind, stage), k in following.items()]
        able = [each for each in actions if done.issuperset(needs(each, len(place)))]
        action = able[draw.integers(len(able))]
        done.add(action)
        rows[place[action.stage]].append(action)
        if action.micro_batch + 1 == micro:
            del following[action.kind, action.stage]
        else:
            following[action.kind, action.stage] += 1
    return Schedule(tuple(map(tuple, rows)), tuple(place), micro)


def test_no_order_of_actions_can_block_the_rounds():
    draw = np.random.default_rng(0)
    for step in range(15):
        schedule = random_schedule(draw)
        validate(schedule)
        stages = dict.fromkeys(range(schedule.stages), Ones())

        def work(rank, channel, schedule=schedule, stages=stages, step=step):
            with channel.session():
                return len(run(schedule, rank, stages, channel, step))

        told = Job(schedule.ranks, place=schedule.place).run(work)
        assert told == [len(row) for row in schedule.rows]


def test_sessions_follow_each_other_and_leave_no_thread():
    before = threading.active_count()

    def work(rank, channel):
        for step in range(20):
            with channel.session():
                if rank == 0:
                    channel.put(Key("F", step, 1, 0), [np.array(step)])
                else:
                    assert channel.get(Key("F", step, 1, 0)) == [step]
        channel.close()
        return step

    assert Job(2).run(work) == [19, 19]
    assert threading.active_count() == before


def test_a_failure_reaches_who_waits_and_who_computes():
    def work(rank, channel):
        with channel.session():
            if rank == 0:
                channel.fail(Failure(0, "ValueError: no"))
                raise ValueError("no")
            if rank == 1:
                channel.get(Key("F", 0, 1, 0))
            time.sleep(0.3)  # and is done: rank 2 learns of it at the end

    started = time.monotonic()
    told = Job(3).run(work)
    assert isinstance(told[0], ValueError)
    for error in told[1:]:
        assert isinstance(error, PipelineError) and str(error) == "rank 0: ValueError: no"
    assert time.monotonic() - started < 2


def test_what_does_not_come_is_told():
    job = Job(2, seconds=0.2)

    def work(rank, channel):
        with channel.session():
            if rank == 1:
                channel.get(Key("F", 3, 1, 2))
            time.sleep(0.5)

    told = job.run(work)
    assert isinstance(told[1], TimeoutError)
    assert "stage 1 has waited 0.2 s for the activations of micro-batch 2 in step 3" in str(told[1])

    def alone(rank, channel):
        if rank == 0:
            with channel.session():
                pass

    job = Job(2, seconds=0.2)
    assert "has waited 0.2 s for the others to finish" in str(job.run(alone)[0])
    job.stop()
    for channel in job.channels:
        channel.close()
        with pytest.raises(OSError, match="has been closed"):
            channel.get(Key("F", 0, 1, 0))


def test_other_batches_and_the_end_of_horovod_are_told():
    def different(rank, channel):
        channel.note = f"step 0 with {rank + 3} rows"
        with channel.session():
            if rank == 0:
                channel.put(Key("F", 0, 1, 0), [])
            else:
                channel.get(Key("F", 0, 1, 0))

    told = Job(2).run(different)
    assert isinstance(told[1], MismatchError) and "rank 0 is at step 0 with 3 rows" in str(told[1])

    job = Job(2)

    def ended(rank, channel):
        with channel.session():
            if rank == 0:
                job.stop()
            channel.receive(1 - rank, Key("X", 0, 0, 0))

    for error in job.run(ended):
        assert isinstance(error, ConnectionError)
        assert isinstance(error.__cause__, threading.BrokenBarrierError)


@pytest.mark.parametrize("parts", [[b"garbage"], [b"[]"], [b'[1, "F", 0, 1, 0, "", [["<f4"]]]']])
def test_garbage_is_told(parts):
    def work(rank, channel):
        with channel.session():
            if rank == 0:
                channel._post(1, parts)
            else:
                channel.get(Key("F", 0, 1, 0))

    nothing, told = Job(2).run(work)
    assert nothing is None and isinstance(told, OSError)
    assert "rank 0 sent what is no message: " in str(told)
