"""One of `--workers N`, started by a search: `python -m nas.search.workers.worker RUN PARENT`."""

from __future__ import annotations

import json
import logging
import signal
import sys

from ... import consent
from ...errors import NasError
from ...folders.run import Run
from ...machine.children import end_with_parent, ending_signals
from ..config import SearchConfig
from ..study import work


def main(path: str, parent: int) -> int:
    """Works until the run is done. Returns the exit status, 143 where the process was asked to stop.

    The standard input holds what the user of the search allowed, the arguments of `consent.allow` as JSON. The command
    line would be the wrong place: a storage's URL may hold a password, and everybody on the machine can read command
    lines.

    Args:
        path: folder of the run.
        parent: process of the search.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("nas.data").setLevel(logging.ERROR)  # the search itself has said what it found
    for number in ending_signals():
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then ends its workers
    end_with_parent(signal.SIGTERM, parent)  # hands its trial back, even during a training
    try:
        consent.allow(**json.load(sys.stdin))
        run = Run.open(path)
        work(run, SearchConfig.from_run(run), parent=parent)
    except NasError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
