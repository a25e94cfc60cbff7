"""How far the accuracies of a run can be trusted, as plain data for its report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from ..folders.attributes import TUNED
from ..folders.run import Run
from ..folders.trial import Trial
from ..folders.verdicts import is_trained_on
from ..interval import Interval
from ..objectives.objectives import wants_accuracy
from ..objectives.text import format_figure
from ..space import candidates_of, has_grafts


def trust(run: Run, front: Sequence[Trial], spell: Callable[[str], str]) -> dict[str, Any]:
    """Returns how far accuracies can be trusted, by a calibration, and whether the order of latencies was stable.

    `spell` changes the verdicts, in which arguments stand in backquotes.
    """
    told, config, grafts = run.manifest.trust, run.manifest.config, has_grafts(run.manifest.space)
    longer = config.finish_epochs if is_trained_on(run, front) else None
    tuned = _tuned_epochs(run, front) if grafts else None
    return {
        "wants_accuracy": wants_accuracy(config.objectives),
        "quantised": "accuracy_int8" in config.objectives,
        "trained": run.manifest.proxy_trained,
        "tuned": tuned is not None,
        "proxy": config.proxy,
        "epochs": tuned or longer or config.epochs,
        "told": told
        and {
            "kendall": format_figure(Interval.of(told["kendall"])),
            "ceiling": format_figure(Interval.of(told["ceiling"])),
            "epochs": told["epochs"],
            "count": told["count"],
            "what": candidates_of(run.manifest.space),
            "calibration": told["calibration"],
        },
        "calibrate": f"mixnas calibrate {shlex.quote(str(run.path))}" if grafts else "mixnas calibrate",
        "verdicts": [spell(line) for line in run.verdicts() if not line.startswith("proxy ")],
    }


def _tuned_epochs(run: Run, front: Sequence[Trial]) -> int | None:
    """Returns the epochs for which all forms of a front were tuned; None if they were not, or not all as long."""
    tuned = run.attributes.get(TUNED, {})
    lengths = {tuned.get(trial.key, {}).get("epochs") for trial in front}
    return lengths.pop() if len(lengths) == 1 else None
