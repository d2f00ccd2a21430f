"""Compiles many launches for many targets, on several processes, each within a time limit."""

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from .capture import Launch
from .machine_code import disassembled, read
from .model import cost, kept_cost
from .rules import Compiled

_CHUNK = 24  # kernels a disassembler run shares

_jobs: list[tuple[Launch, int]] = []  # read by the forked workers


@dataclass(frozen=True)
class Failure:
    """A launch that did not compile."""

    launch: Launch
    arch: int
    message: str


def _compile_one(launch: Launch, arch: int, seconds: float) -> Any:
    """The compiled kernel, or why there is none; ptxas is killed at the limit."""
    rung: list[int] = []

    def out_of_time(signum: int, frame: Any) -> None:
        rung.append(signum)
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, should something swallow it
    try:
        return launch.compile(arch)
    except Exception as caught:  # the compiler's own, of any kind
        if rung:  # whatever the compiler made of it
            return f"not compiled after {seconds:.0f} s"
        error: BaseException | None = caught
        causes = []
        while error is not None:
            last = (str(error).strip().splitlines() or [""])[-1]
            causes.append(f"{type(error).__name__}: {last[:200]}")
            error = error.__cause__
        return " < ".join(causes)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _compile_chunk(chunk: Sequence[int], seconds: float, modelled: bool) -> list[Any]:
    """For each job a message, or the fields of ``Compiled`` that follow launch and arch."""
    compiled = [_compile_one(*_jobs[i], seconds) for i in chunk]
    good = [c for c in compiled if not isinstance(c, str)]
    code = disassembled([c for c in good if modelled and kept_cost(c) is None])
    facts = iter(read(good, code))
    answers: list[Any] = []
    for c in compiled:
        if isinstance(c, str):
            answers.append(c)
        else:
            fact = next(facts)
            known = modelled or fact.spills  # the report says where the spills are
            report = cost(c, code.get(c.hash)) if known else None
            answers.append((c.asm["ttir"], c.asm["ttgir"], fact, report))
    return answers


def compile_all(
    jobs: Sequence[tuple[Launch, int]],
    *,
    processes: int = 2,
    seconds: float = 60.0,
    modelled: bool = False,
) -> list[Compiled | Failure]:
    """Compiles each launch for the compute capability beside it.

    Args:
        jobs: Launches and capabilities such as 90.
        processes: Worker processes; 1 compiles in this one.
        seconds: Limit of each compilation, which then counts as failed.
        modelled: Whether to run the cost model on each as well.
    """
    global _jobs
    _jobs = list(jobs)
    chunks = [list(range(i, min(i + _CHUNK, len(_jobs)))) for i in range(0, len(_jobs), _CHUNK)]
    if processes == 1 or len(chunks) < 2:
        answers = [_compile_chunk(chunk, seconds, modelled) for chunk in chunks]
    else:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            answers = list(pool.map(_compile_chunk, chunks, repeat(seconds), repeat(modelled)))
    results: list[Compiled | Failure] = []
    for (launch, arch), answer in zip(_jobs, (a for part in answers for a in part), strict=True):
        if isinstance(answer, str):
            results.append(Failure(launch, arch, answer))
        else:
            results.append(Compiled(launch, arch, *answer))
    return results
