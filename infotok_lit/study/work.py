"""Working off a queue with some local workers, each running one job at a time."""

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from optuna.trial import TrialState

from infotok_lit.study.display import Display
from infotok_lit.study.launch import Launcher
from infotok_lit.study.queue import Claim, JobQueue
from infotok_lit.study.record import is_finished, read_record

IDLE_SECONDS = 1.0
"""Between two looks at a queue that has nothing for us, but is not done."""


def work_off(queue: JobQueue, launchers: Sequence[Launcher], display: Display) -> None:
    """Run jobs until none is left here or elsewhere; one worker per launcher. The launchers start nothing after that.

    Raises:
        KeyboardInterrupt: after the runs under way have been ended.
    """
    stop = launchers[0].stop
    with ThreadPoolExecutor(len(launchers)) as pool:
        workers = [pool.submit(_work, queue, launcher, display) for launcher in launchers]
        try:
            done, _ = wait(workers, return_when=FIRST_EXCEPTION)
            for worker in done:
                worker.result()
        finally:
            stop.set()


def _work(queue: JobQueue, launcher: Launcher, display: Display) -> None:
    while not launcher.stop.is_set():
        claim = queue.claim()
        if claim is not None:
            _run(queue, claim, launcher, display)
            continue
        for job in queue.recover():
            display.say(f"{job.key}: its worker died; queued again")
        live = queue.live()
        if not live:
            return
        display.elsewhere([job.key for trial, job in live if trial.state == TrialState.RUNNING])
        launcher.stop.wait(IDLE_SECONDS)


def _run(queue: JobQueue, claim: Claim, launcher: Launcher, display: Display) -> None:
    claim.job.write_point()
    records = []
    for cell in claim.job.cells:
        if is_finished(cell.folder):
            records.append(read_record(cell.folder))
            continue
        display.started(cell)
        records.append(launcher.run(cell, claim.lock))
        display.ended(cell, records[-1])
        if records[-1].state != "finished":
            break
    finished = all(record.state == "finished" for record in records)
    queue.finish(claim, queue.values(claim.job, records) if finished else None)
