"""Measures what a plan asks for and the results do not hold yet, and writes them down after every cell."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice

import torch

from regard.bench.plan import Plan, QualityTask, TimingTask
from regard.bench.quality import train
from regard.bench.results import QualityCell, Results, Settings, Store, TimingCell
from regard.bench.summary import summarize
from regard.bench.timing import time_layers

Task = TimingTask | QualityTask
Watch = Callable[[Task, str], None]
"""Told of each task when it is "started", and "done" or "failed"."""


def run(plan: Plan, results: Results, store: Store, *, budget: float, watch: Watch) -> int:
    """Measure until all is done or `budget` minutes are over, and return the number of tasks not started by then.

    Timing comes first and alone on the machine; models are trained side by side, one thread each. What is done is on
    disk; an exception, Ctrl-C included, ends the processes at work and loses only what they were at.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when a worker imports torch: its profiler warns
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it products on CUDA may differ between runs
    deadline = time.monotonic() + 60 * budget
    timing, quality = plan.waiting(results)
    _write(results, store)
    left = 0
    for tasks, workers, threads in ((timing, 1, results.machine.threads), (quality, plan.workers, 1)):
        left += _run_all(tasks, plan, results, store, workers, threads, deadline, watch)
    return left


def _run_all(
    tasks: list[TimingTask] | list[QualityTask],
    plan: Plan,
    results: Results,
    store: Store,
    workers: int,
    threads: int,
    deadline: float,
    watch: Watch,
) -> int:
    """Run tasks on so many workers; the number of those not started before the deadline."""
    waiting: Iterator[Task] = iter(tasks)
    running: dict[Future, Task] = {}
    started = 0
    if not tasks:
        return 0
    with _workers(min(workers, len(tasks)), threads) as pool:
        while True:
            free = workers - len(running) if time.monotonic() < deadline else 0
            for task in islice(waiting, free):
                started += 1
                running[pool.submit(measure, task, plan, plan.settings)] = task
                watch(task, "started")
            if not running:
                return len(tasks) - started
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                ok = _record(task, future, results)
                _write(results, store)
                watch(task, "done" if ok else "failed")


def measure(task: Task, plan: Plan, settings: Settings) -> tuple[TimingCell | QualityCell, dict[str, str]]:
    """One cell, and what failed in it by mechanism."""
    device = torch.device(settings.device)
    if isinstance(task, QualityTask):
        return train(task.task, task.variant, task.seed, device), {}
    return time_layers(
        plan.timed(task.pattern),
        task.pattern,
        task.length,
        dim=settings.dim,
        heads=settings.heads,
        dtype=getattr(torch, settings.dtype),
        device=device,
        seed=settings.seed,
    )


def _record(task: Task, future: Future, results: Results) -> bool:
    """Enter a finished task; whether all of it went well."""
    try:
        cell, failures = future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        results.failures[str(task)] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return False
    cells = results.quality if isinstance(task, QualityTask) else results.timing
    cells[str(task)] = cell
    results.failures.pop(str(task), None)
    results.failures |= {f"{task} {name}": reason for name, reason in failures.items()}
    return not failures


def _write(results: Results, store: Store) -> None:
    results.summary = summarize(results)
    store.write(results)


@contextmanager
def _workers(count: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (threads,))
    try:
        yield pool
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(threads: int) -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
