"""Further worker processes on this machine, which end with the search."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from ...errors import one_line
from ...folders.run import Run
from ...machine.children import python_module

log = logging.getLogger(__name__)

STOP_SECONDS = 20.0
"""A local worker that is asked to end is killed after this long."""


@contextlib.contextmanager
def local_workers(run: Run, count: int) -> Iterator[None]:
    """Runs further worker processes on this machine, which end with the context.

    Their logs go to `workers/N.log` of the run folder. If a worker dies, the search logs a warning and continues.

    Args:
        run: the run that they work on.
        count: number of processes.
    """
    processes: list[subprocess.Popen[str]] = []
    ending = threading.Event()

    def watch(process: subprocess.Popen[str], log_file: Path) -> None:
        status = process.wait()
        if status and not ending.is_set():
            how = f"signal {-status}" if status < 0 else f"status {status}"
            last = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            why = f": {one_line(last[0], 200)}" if last else ""
            log.warning("a worker of this search died (%s), see %s%s", how, log_file, why)

    # the workers may use what the user allowed here
    allowed = {"storage": run.manifest.config.storage, "command": run.manifest.config.command}
    try:
        for number in range(1, count + 1):
            file = run.path / "workers" / f"{number}.log"
            file.parent.mkdir(exist_ok=True)
            command, environment = python_module("nas.search.workers.worker", str(run.path), str(os.getpid()))
            with file.open("a", encoding="utf-8") as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, text=True
                )
            processes.append(process)
            with contextlib.suppress(BrokenPipeError), process.stdin:  # type: ignore[union-attr]
                json.dump(allowed, process.stdin)  # type: ignore[arg-type]
            threading.Thread(target=watch, args=(processes[-1], file), daemon=True).start()
        yield
    finally:
        ending.set()
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
