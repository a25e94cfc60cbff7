"""One of `--workers N`, started by a search: `python -m nas.search.worker RUN PARENT STORAGE COMMAND`."""

from __future__ import annotations

import logging
import signal
import sys

from .. import consent
from ..errors import NasError
from ..machine.children import end_with_parent, ending_signals
from ..runs import Run
from .config import SearchConfig
from .study import work


def main(path: str, parent: int, storage: str, command: str) -> int:
    """Work until the run is done; 143 where it was asked to stop.

    Args:
        path: of the run.
        parent: the search's process.
        storage: what the search's user allowed; empty for none.
        command: likewise.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("nas.data").setLevel(logging.ERROR)  # the search says what its images are, once for all
    for number in ending_signals():
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then ends its workers
    end_with_parent(signal.SIGTERM, parent)  # hands its trial back, even in the midst of a training
    try:
        consent.allow(command, storage)
        run = Run.open(path)
        work(run, SearchConfig.from_run(run), parent=parent)
    except NasError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]))
