"""Shapes of the files of a run and of a training, as far as this release reads them.

`nas.foreign_files` defines shapes. A field that only some releases wrote may be missing. Fields of later releases are
ignored.
"""

from __future__ import annotations

from dataclasses import fields

from ..foreign_files import COUNT, FIGURE, LINE, POSITIVE, SIDE
from ..objectives.latency import Latency
from ..objectives.objectives import FIGURES, Scores
from ..scoring.latency.config import IN_RUNS, SHAPES

STATISTIC = ({"value": FIGURE, "low": FIGURE, "high": FIGURE}, None)
"""An `Interval`, or null where it is not defined."""
TRUST = {"estimator": LINE, "count": COUNT, "kendall": STATISTIC, "ceiling": STATISTIC, "epochs": COUNT}
"""The verdict of a calibration on a proxy."""

LATENCY = {
    (f"{IN_RUNS[name[:-1]]}?" if name.endswith("?") else IN_RUNS.get(name, name)): shape
    for name, shape in SHAPES.items()
}
"""The latency targets, see `nas.scoring.latency.latency_in_run`."""
CONFIG = {
    "objectives": [LINE],
    "budgets": {str: FIGURE},
    "proxy": LINE,
    "storage": (str, None),
    "train_device?": (LINE, None),
    "workers?": range(1, 2**16),
    "engine?": LINE,
    "address?": LINE,
    "gpus_per_trial?": POSITIVE,
    "share_device?": bool,
    "only?": LINE,
    **LATENCY,
    "also?": [([LINE, LINE], [LINE, LINE, LINE])],
    "baselines?": [LINE],
    "start?": [dict],
    "data": str,
    "data_root": (str, None),
    "classes?": [str],
    "input_size": (SIDE, None),
    "max_images?": COUNT,
    "holdout_data?": (str, None),
    "unlabelled?": (str, None),
    "trials?": COUNT,
    "epochs": COUNT,
    "seed": COUNT,
    "profile?": (str, None),
    "cross_fit?": bool,
    "proxy_images?": (COUNT, None),
    "calibration?": (str, None),
    "teacher?": (str, None),
    "teacher_weights?": (str, None),
    "early_stopping?": bool,
    "finish_epochs?": (COUNT, None),
    "until?": (FIGURE, None),
    "tune_epochs?": COUNT,
    "tune_count?": COUNT,
    "control?": bool,
    "timeout_minutes?": (POSITIVE, None),
    "trial_timeout_minutes?": (POSITIVE, None),
}
DATA = {
    "name": str,
    "fingerprint": LINE,
    "classes": [str],
    "input_size": [range(3, 4), SIDE, SIDE],
    "interpolation": LINE,
    "mean": [FIGURE, FIGURE, FIGURE],
    "std": [FIGURE, FIGURE, FIGURE],
    "num_train": COUNT,
    "num_holdout": COUNT,
    "listing?": {"split": str, "images": [COUNT], "others": {str: COUNT}, "skipped": {str: COUNT}, "notes": [str]},
}
"""The data of a run or of a full training."""
MACHINE = {"cpu": LINE, "cores": COUNT, "platform": LINE, "device": LINE, "gpu?": LINE}
RUN = {
    "study": str,
    "created": LINE,
    "config": CONFIG,
    "space": {"name": LINE},
    "proxy_trained": bool,
    "reference": {str: FIGURE},
    "trust?": ({**TRUST, "calibration": str}, None),
    "latency_references?": {str: POSITIVE},
    "conditions": {
        **{"device": LINE, "threads": range(1, 2**16)},
        "unlabelled?": ({"fingerprint": LINE, "images": COUNT}, None),
    },
    "data": DATA,
    "machine": {**MACHINE, "threads": range(1, 2**16)},
    "software": {str: (LINE, None)},
}

_INTERVAL = {"ms": POSITIVE, "low_ms": FIGURE, "high_ms": FIGURE}
_LATENCY = {
    **_INTERVAL,
    **dict.fromkeys(("spread", "raw_ms", "q1_ms", "q3_ms", "drift", "waited", "prepare_seconds"), FIGURE),
    **{"passes": COUNT, "rounds": COUNT, "steady": bool, "delegated?": FIGURE},
}
_BY_TYPE = {"int | None": (COUNT, None), "float | None": (FIGURE, None), "bool | None": (bool, None)}
SCORES = {f"{f.name}?": _BY_TYPE[str(f.type)] for f in fields(Scores) if f.type in _BY_TYPE} | {
    **{f"{name}?": _BY_TYPE[str(f.type)] for f in fields(Latency) if (name := f"latency_{f.name}") in FIGURES},
    **{"latency_ms?": (POSITIVE, None), "latency_low_ms?": (FIGURE, None), "latency_high_ms?": (FIGURE, None)},
    "others?": {str: {**_INTERVAL, "spread?": FIGURE}},
    "uncounted?": [LINE],
    "form?": LINE,
    "hits?": str,
    "hits_fp32?": str,
    "curve?": [[COUNT, FIGURE]],
}
_FAILURE = {"failure": str}
_TUNED = {
    **{"accuracy": FIGURE, "accuracy_std": FIGURE, "epochs": COUNT, "curve?": [[COUNT, FIGURE]]},
    **{"num_images": COUNT, "hits": str, "hits_fp32?": str},
}
STUDY = {
    "manifest?": dict,
    "baselines?": {str: ({"scores": SCORES, "number?": COUNT}, {**_FAILURE, "number?": COUNT})},
    "remeasured?": {str: {str: (_LATENCY, _FAILURE)}},
    "elsewhere?": {str: {str: (_INTERVAL, _FAILURE)}},
    "raced?": {str: (_TUNED, _FAILURE)},
    "tuned?": {str: (_TUNED, _FAILURE)},
    "finished?": COUNT,
    "ended?": bool,
    "control?": ({"key": LINE, **_TUNED}, {"key": LINE, **_FAILURE}),
    "stages?": {str: {str: [{"part": LINE, **dict.fromkeys(_INTERVAL, POSITIVE)}]}},
}
"""Attributes of the study as a whole."""
TRIAL = {
    "architecture?": (dict, None),
    "scores?": SCORES,
    "failure?": str,
    "noise?": {str: FIGURE},
    "estimates?": {str: [FIGURE, FIGURE]},
}
"""Attributes of a trial."""

_TOP1 = {"accuracy": FIGURE, "low": FIGURE, "high": FIGURE, "num_images": COUNT}
TRAINED = {
    "epochs": COUNT,
    "seconds": FIGURE,
    "images_per_second": FIGURE,
    "holdout": (_TOP1, None),
    "test": ({"name": str, "chosen?": bool, **_TOP1}, None),
}
"""The result of a full training: its `result.json`."""
TRAINED_FRONT = {
    "rows": [{"key": LINE, "accuracy?": FIGURE}],
    "kendall": STATISTIC,
}
"""The results of training a whole front: `trained/front.json`."""
