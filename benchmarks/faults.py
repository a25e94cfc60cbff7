"""Workers killed at random moments over one shared study: what is lost, scored twice or left behind.

    python benchmarks/faults.py --storage sqlite --kills 100
    python benchmarks/faults.py --storage postgresql://user@host/empty --kills 100

Workers are processes of the search's own fleet (claims, beats, burials, repetitions) whose scoring is a short sleep, so
that most kills hit the book-keeping. Each is killed with SIGKILL at a random moment and replaced; in the end one more
goes on alone.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
from optuna.trial import TrialState

from nas.search.samplers.knobs import Knobs
from nas.search.samplers.problem import Problem
from nas.search.samplers.table import SAMPLERS
from nas.search.workers import claims
from nas.storage.connect import open_storage, storage_errors

KNOBS = Knobs({f"knob{i}": tuple(range(6)) for i in range(5)})
claims.BEAT_SECONDS, claims.GRACE_SECONDS = 0.2, 2.0


def member(folder: Path, url: str | None, name: str) -> claims.Fleet:
    known: set[tuple[int, ...]] = set()
    study = optuna.create_study(
        storage=open_storage(folder, url),
        study_name="faults",
        directions=["minimize", "maximize"],
        sampler=SAMPLERS["evolution"](KNOBS, Problem(("cost", "gain"), (True, False)), known, 0),
        load_if_exists=True,
    )
    return claims.Fleet(study, KNOBS, known, claims.Worker("here", os.getpid(), "cpu", False, name))


def work(folder: Path, url: str | None, trials: int) -> None:
    """Score until so many are complete, as the search's workers do."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own, rng = member(folder, url, f"{os.getpid()}-{time.time_ns()}"), random.Random(os.getpid())
    while sum(t.state == TrialState.COMPLETE for t in own.trials()) < trials:
        own.bury()
        trial, point = own.draw()
        try:
            trial.set_user_attr(claims.SETTLED, {})
            with own.beating(trial):
                time.sleep(rng.uniform(0.0, 0.1))
                # a line for each scoring, in one write: what was scored is known without the storage
                with (folder / "scored.log").open("a") as log:
                    log.write(f"{trial.number} {' '.join(map(str, point))}\n")
                values = (float(sum(point)), float(point[0] * point[1] - point[2] ** 2))
                own.study.tell(trial, values)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            continue  # it was given to another one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="sqlite")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    url = None if options.storage == "sqlite" else options.storage
    if options.work:
        work(Path(options.work[0]), url, int(options.work[1]))
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="faults-"))
    member(folder, url, "first")  # the study is there before its workers

    def begin(trials: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--storage", options.storage, "--work", str(folder), str(trials)]
        return subprocess.Popen(command, stderr=(folder / "errors.log").open("ab"))

    unending, crashed = 10**9, 0
    workers = [begin(unending) for _ in range(options.workers)]
    started, killed = time.monotonic(), 0
    while killed < options.kills:
        time.sleep(rng.uniform(0.0, 3.0))
        place = rng.randrange(len(workers))
        if workers[place].poll() is None:
            os.kill(workers[place].pid, signal.SIGKILL)
            killed += 1
        else:
            crashed += 1
        workers[place].wait()
        workers[place] = begin(unending)
    for worker in workers:
        worker.kill()
        worker.wait()
    killed += len(workers)
    done = sum(t.state == TrialState.COMPLETE for t in member(folder, url, "count").trials())
    resumed = begin(done + 20).wait()  # one goes on alone, over all that was left
    own = member(folder, url, "last")
    with storage_errors(folder):
        trials = own.trials()
    complete = collections.Counter(own.claim_of(t) for t in trials if t.state == TrialState.COMPLETE)
    repeats = {t.user_attrs[claims.RETRY]: t for t in trials if claims.RETRY in t.user_attrs}
    died = [t for t in trials if t.user_attrs.get("failure") == claims.DIED and claims.CLAIM in t.user_attrs]
    twice = [t for t in died if claims.RETRY in t.user_attrs]
    lost = [t.number for t in died if t.number not in repeats and t not in twice]
    scored = collections.Counter(line.split(" ", 1)[1] for line in (folder / "scored.log").read_text().splitlines())
    print(f"storage {options.storage.partition(':')[0]}, {options.workers} workers, seed {options.seed}")
    print(f"kills {killed} in {time.monotonic() - started:.0f} s; workers that ended by themselves {crashed}")
    print(
        f"trials {len(trials)}: "
        + ", ".join(f"{s.name} {n}" for s, n in collections.Counter(t.state for t in trials).items())
    )
    print(f"architectures complete more than once: {sum(n > 1 for n in complete.values())}")
    print(
        f"scored again after a death: {sum(n - 1 for n in scored.values())}; dead trials {len(died)}, "
        f"given up after two {len(twice)}"
    )
    print(f"lost beyond those in flight: {len(lost)}; resume after the last kill: exit {resumed}")
    errors = (folder / "errors.log").read_text()
    if errors.strip():
        print(f"said on standard error:\n{errors[-2000:]}")


if __name__ == "__main__":
    main()
