"""One of `--workers N`: `python -m nas.search.worker RUN PARENT`, started and ended by the search that it works for."""

from __future__ import annotations

import logging
import signal
import sys

from ..errors import NasError
from ..runs import Run
from .config import SearchConfig
from .study import work


def main(path: str, parent: int) -> int:
    """Work until the run is done; 143 where it was asked to stop."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("nas.data").setLevel(logging.ERROR)  # the search says what its images are, once for all
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run = Run.open(path)
        work(run, SearchConfig.from_run(run), parent=parent)
    except NasError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
