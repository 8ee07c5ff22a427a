"""Worker pools: the extension's and Python's behave alike, also at their ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest

from gen3r_engine.native import native, why_missing
from gen3r_engine.workers import PythonPool, WorkerPool, worker_pool

BUILT = pytest.mark.skipif(native() is None, reason=f"the extension is {why_missing()}")
MAKERS = [PythonPool, pytest.param(worker_pool, marks=BUILT)]
LONG = 20.0  # seconds; nothing here takes as long
Maker = Callable[..., WorkerPool]


class Gate:
    """A job that runs until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.go.wait(LONG)
        return "through"


@pytest.mark.parametrize("maker", MAKERS)
def test_results_and_errors_come_back(maker: Maker) -> None:
    pool = maker(2, 3)

    def fail() -> None:
        raise OSError(28, "No space left on device", "x.ply")

    jobs = [pool.submit(pow, 2, exp=n) for n in range(20)]
    bad = pool.submit(fail)
    assert [job.result(LONG) for job in jobs] == [2**n for n in range(20)]
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as raised:
            bad.result(LONG)
        assert raised.value.filename == "x.ply"
        assert any("fail" in str(entry.name) for entry in raised.traceback)
    assert isinstance(bad.exception(), OSError) and jobs[0].exception() is None
    pool.close()
    with pytest.raises(RuntimeError, match="closed and takes no more"):
        pool.submit(list)
    pool.close()


@pytest.mark.parametrize("maker", MAKERS)
def test_many_give_and_the_queue_is_bounded(maker: Maker) -> None:
    pool, gate, given = maker(1, 2), Gate(), list[int]()
    running = pool.submit(gate)
    assert gate.begun.wait(LONG)

    def give() -> None:
        for i in range(3):
            pool.submit(given.append, i)

    givers = [threading.Thread(target=give) for _ in range(3)]
    for giver in givers:
        giver.start()
    time.sleep(0.15)
    assert all(giver.is_alive() for giver in givers), "they wait for a place"
    with pytest.raises(TimeoutError):
        running.result(0.01)
    gate.go.set()
    for giver in givers:
        giver.join(LONG)
    pool.close()
    assert running.result() == "through" and sorted(given) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("maker", MAKERS)
def test_cancelling(maker: Maker) -> None:
    pool, gate = maker(1, 2), Gate()
    running = pool.submit(gate)
    assert gate.begun.wait(LONG)
    waiting = pool.submit(list)
    assert not waiting.done() and waiting.cancel() and waiting.cancel()
    assert waiting.done() and waiting.cancelled() and not running.cancel()
    for ask in (waiting.result, waiting.exception):
        with pytest.raises(CancelledError):
            ask()
    dropped = pool.submit(list)
    threading.Timer(0.1, gate.go.set).start()
    pool.close(cancel=True)
    assert running.result() == "through" and dropped.cancelled()


@pytest.mark.parametrize("maker", MAKERS)
def test_a_job_can_not_wait_for_itself(maker: Maker) -> None:
    pool, gate = maker(1, 1), Gate()

    def greedy() -> None:
        for _ in range(4):
            pool.submit(list)

    with pytest.raises(RuntimeError, match="its own pool a job while the queue is full"):
        pool.submit(greedy).result(LONG)
    with pytest.raises(RuntimeError, match="can not close its own pool"):
        pool.submit(pool.close).result(LONG)
    gate.go.set()
    pool.close()
    with pytest.raises(ValueError, match="threads 0 and waiting 1 must be at least 1"):
        maker(0, 1)


@BUILT
def test_nothing_is_kept_alive() -> None:
    import weakref

    class Big:
        def work(self) -> None: ...

    pool, big = worker_pool(1, 1), Big()
    seen = weakref.ref(big)
    job = pool.submit(big.work)
    job.result(LONG)
    del big
    gc.collect()
    assert seen() is None
    del pool  # its threads end without being told
    gc.collect()
    assert job.done()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told(maker: Maker) -> None:
    pool = maker(1, 1)
    pool.submit(list).result(LONG)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pool.submit(list)
        except RuntimeError as error:
            code = 0 if "after the fork" in str(error) else 2
        finally:
            del pool
            gc.collect()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pool.close()


PROGRAM = """
import sys, time, threading
from gen3r_engine.workers import PythonPool, worker_pool
pool = (PythonPool if sys.argv[1] == "python" else worker_pool)(2, 50)
def job(i):
    time.sleep(0.02)
    sys.stdout.write(f"{i} "); sys.stdout.flush()
for i in range(6):
    pool.submit(job, i)
"""
KINDS = ["python", pytest.param("native", marks=BUILT)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_ending_interpreter_finishes_what_was_given(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(done.stdout.split()) == [str(i) for i in range(6)]


@BUILT
def test_ctrl_c_gets_through_a_wait() -> None:
    code = PROGRAM + (
        "gate = threading.Event()\njob = pool.submit(gate.wait, 20)\nprint('ready', flush=True)\n"
        "try:\n    job.result()\nexcept KeyboardInterrupt:\n    gate.set(); print('stopped')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "native"], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        text = ""
        while "ready" not in text:
            text += child.stdout.read(1)
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        assert "stopped" in child.stdout.read()
        assert child.wait(LONG) == 0
