"""The report of a calibration: how far each estimator agrees with the truths, and which one to use.

A truth is the accuracy of an architecture after a long training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..defaults import GRAFT_EPOCHS
from ..errors import RunError
from ..folders.calibration import Calibration
from ..interval import Z95, Interval
from ..objectives.text import format_figure
from ..scoring.accuracy import ESTIMATORS, Ensemble, Fidelity, Rung, trust
from ..words import counted

POWER = ((Z95 + 0.84) / Z95) ** 2
"""Truths that show a difference in four cases of five, as a multiple of those whose interval just reaches 0."""

FEWEST = 10
"""Fewest truths for a report."""
LOW_SHARE, LOW_SHARE_OF_GRAFTS = 4, 2
"""Divisor of the epochs of a truth. A second training that is not repeated in full ends at the last rung within this
share."""
CHEAP_SHARE = 0.1
"""An estimator is cheap if it takes at most this share of the time of a truth."""
BANDS = ("fast", "middle", "slow")
ADDITIVE, ASSEMBLED = "additive", "assembled"
"""Estimators of grafts: the sum of the harms of single changes, and the accuracy of what was assembled."""
NAMES = (*ESTIMATORS, ADDITIVE)
BASELINES = ("params", "macs")
BASELINES_OF_GRAFTS = (*BASELINES, ADDITIVE, ASSEMBLED)
TRAINED, TUNED, TAUGHT = "train@", "tuned@", "taught@"
"""Beginnings of the names of short trainings, of short tunings, and of short trainings with a teacher. The number of
epochs follows."""
SCORES_OF_GRAFTS = (ASSEMBLED, f"{TUNED}{GRAFT_EPOCHS}")
"""What a search for grafts scores by: without training, and by default."""


@dataclass(frozen=True)
class _Column:
    """The scores of an estimator.

    Args:
        scores: one score for each architecture; NaN where it has none.
        seconds: mean seconds for an architecture.
    """

    scores: np.ndarray
    seconds: float

    @property
    def complete(self) -> bool:
        return bool(np.isfinite(self.scores).all())


def trust_report(found: Calibration, epochs: int) -> dict[str, Any]:
    """Compares every estimator with the truths of `epochs` epochs.

    Returns:
        `count`, `epochs`, `truth_seconds`, `ceiling` (truths against truths with another seed), `rows` (one for each
        estimator, best first), `choice` (the estimator chosen on each resample, and its agreement on the architectures
        that the resample leaves out), `recommended`, `verdict` (lines of text) and `ensemble`.

    Raises:
        RunError: if too few truths are known.
    """
    first = found.manifest.seed
    rungs = {seed: _rungs(found, seed) for seed in (first, first + 1)}
    final, again = (rungs[seed].get(epochs, {}) for seed in (first, first + 1))
    if len(final) < FEWEST:
        known = ", ".join(f"{len(part)} of {e}" for e, part in sorted(rungs[first].items())) or "none"
        raise RunError(
            f"{FEWEST} truths of {counted(epochs, 'epoch')} are needed, known are {known}: resume, or set `epochs` "
            "to fit"
        )
    latency = {row["key"]: float(row["latency_ms"]) for row in found.rows("pool") if not row["failure"]}
    if unknown := sorted(final.keys() - latency.keys()):
        raise RunError(f"{found.path} is damaged: its pool.csv has no latency of {unknown[0]}")
    keys = sorted(final, key=lambda key: latency[key])  # by latency: bands are thirds of this order
    truths = np.array([final[key].accuracy for key in keys])
    truth_seconds = float(np.mean([final[key].seconds for key in keys]))
    short = Fidelity(low_epochs(epochs, found.of_grafts)).rungs
    columns = _columns(found, keys, {e: rungs[first + 1].get(e, {}) for e in short})
    ensemble, cheap = _choosable(columns, truths, CHEAP_SHARE * truth_seconds, found.of_grafts)
    baselines = [name for name in (BASELINES_OF_GRAFTS if found.of_grafts else BASELINES) if name in columns]
    rows = [_row(name, column, columns, baselines, truths, truth_seconds) for name, column in columns.items()]
    rows.sort(key=lambda row: row["kendall"]["value"] if row["kendall"] else -math.inf, reverse=True)
    repeated = [key for key in keys if key in again]
    other, once = (np.array([part[key].accuracy for key in repeated]) for part in (again, final))
    report: dict[str, Any] = {
        "count": len(keys),
        "epochs": epochs,
        "truth_seconds": truth_seconds,
        "accuracy": [float(truths.min()), float(np.median(truths)), float(truths.max())],
        "ceiling": _agreement(other, once)
        | {"count": len(repeated), "std": float((other - once).std(ddof=1) / math.sqrt(2))},
        "rows": rows,
        "choice": _choice(cheap, {name: columns[name] for name in baselines}, truths),
        "ensemble": ensemble.to_dict() if ensemble else {},
    }
    report["recommended"] = max(cheap, key=lambda name: _known(trust.kendall(cheap[name].scores, truths)))
    verdict = [*_verdict(report, found.candidates), *_of_tunings(report), *_of_a_teacher(report)]
    if len(machines := found.manifest.machines) > 1:
        verdict.append(f"seconds are means over different machines or threads: {'; '.join(machines)}")
    return report | {"verdict": verdict}


def low_epochs(epochs: int, of_grafts: bool = False) -> int:
    """Returns the epochs of a second training that is not repeated in full.

    Args:
        epochs: epochs of a truth.
        of_grafts: whether grafts are tuned.
    """
    share = LOW_SHARE_OF_GRAFTS if of_grafts else LOW_SHARE
    return max(e for e in (1, *Fidelity(epochs).rungs) if e == 1 or e <= epochs // share)


def _rungs(found: Calibration, seed: int) -> dict[int, dict[str, Rung]]:
    """Collects the rungs of all trainings with a seed: epochs -> key -> rung."""
    rungs: dict[int, dict[str, Rung]] = {}
    for (key, its_seed), curve in found.truths().items():
        for rung in curve if its_seed == seed else ():
            rungs.setdefault(rung.epoch, {})[key] = rung
    return rungs


def _choosable(
    columns: dict[str, _Column], truths: np.ndarray, budget: float, of_grafts: bool
) -> tuple[Ensemble | None, dict[str, _Column]]:
    """Returns the estimators that may be recommended, and an ensemble of them, which becomes a column too.

    Only an estimator with a score for every architecture may be recommended. A search for grafts can use neither an
    ensemble nor a sum of harms, and its own two scores always take part.

    Args:
        columns: all estimators; the ensemble is added.
        truths: the truths.
        budget: most seconds of an estimator.
        of_grafts: whether grafts were tuned.
    """
    cheap = {name: column for name, column in columns.items() if column.seconds <= budget}
    if of_grafts:
        allowed = {**cheap, **{name: column for name, column in columns.items() if name in SCORES_OF_GRAFTS}}
        return None, {name: c for name, c in allowed.items() if c.complete and name != ADDITIVE}
    ensemble, columns["ensemble"] = _ensemble(cheap, truths, budget)
    cheap["ensemble"] = columns["ensemble"]
    return ensemble, {name: column for name, column in cheap.items() if column.complete}


def _columns(
    found: Calibration, keys: Sequence[str], trainings: Mapping[int, Mapping[str, Rung]]
) -> dict[str, _Column]:
    """Collects the scores of each estimator by its name.

    A short training counts as an estimator. It has another seed than the truth, as it would in a search.
    """
    columns = {}
    rows, training = found.rows("scores"), TUNED if found.of_grafts else TRAINED
    taught = sorted({row["estimator"] for row in rows if row["estimator"].startswith(TAUGHT)})
    for name in (*NAMES, *taught):
        mine = {row["key"]: row for row in rows if row["estimator"] == name and not row["failure"]}
        if mine:
            scores = [float(mine[key]["score"]) if key in mine else math.nan for key in keys]
            columns[name] = _Column(np.array(scores), float(np.mean([float(r["seconds"]) for r in mine.values()])))
    for epochs, rungs in trainings.items():
        if rungs:
            scores = [rungs[key].accuracy if key in rungs else math.nan for key in keys]
            columns[f"{training}{epochs}"] = _Column(
                np.array(scores), float(np.mean([r.seconds for r in rungs.values()]))
            )
    return columns


def _ensemble(cheap: Mapping[str, _Column], truths: np.ndarray, budget: float) -> tuple[Ensemble, _Column]:
    """Fits the ensemble on all truths; also returns its cross-validated scores (ten folds, ten times).

    Members are taken from the cheapest on, while together they cost at most `budget` seconds. Of several short
    trainings the longest is taken, because it contains the others. Trainings with a teacher are no members, because a
    search with an ensemble has none.
    """
    cheap = {name: column for name, column in cheap.items() if not name.startswith(TAUGHT)}
    whole: dict[str, _Column] = {}
    for name, column in sorted(cheap.items(), key=lambda item: item[1].seconds):
        others = {n: c for n, c in whole.items() if not (name.startswith(TRAINED) and n.startswith(TRAINED))}
        if column.complete and column.seconds + sum(c.seconds for c in others.values()) <= budget:
            whole = {**others, name: column}
    members, scores = list(whole), np.stack([column.scores for column in whole.values()], axis=1)
    rng, repeats = np.random.default_rng(0), 10
    predicted = np.zeros(len(truths))
    for _ in range(repeats):
        for fold in np.array_split(rng.permutation(len(truths)), 10):
            rest = np.setdiff1d(np.arange(len(truths)), fold)
            predicted[fold] += Ensemble.fit(members, scores[rest], truths[rest]).predict(scores[fold]) / repeats
    seconds = sum(column.seconds for name, column in whole.items())
    return Ensemble.fit(members, scores, truths), _Column(predicted, seconds)


def _row(
    name: str,
    column: _Column,
    columns: Mapping[str, _Column],
    baselines: Sequence[str],
    truths: np.ndarray,
    truth_seconds: float,
) -> dict[str, Any]:
    scores, known = _both(column.scores, truths)
    row: dict[str, Any] = {"estimator": name, "count": len(known), "seconds": column.seconds}
    row["share_of_truth"] = column.seconds / truth_seconds
    row |= _agreement(scores, known)
    row["bands"] = {
        band: _figure(trust.kendall, *_both(column.scores[part], truths[part]))
        for band, part in zip(BANDS, np.array_split(np.arange(len(truths)), len(BANDS)), strict=True)
    }
    without = name.replace(TAUGHT, TRAINED)
    others = [*baselines, *([without] if without in columns else [])]
    row["against"] = {
        other: _plain(_difference(column.scores, columns[other].scores, truths)) for other in others if other != name
    }
    return row


def _agreement(scores: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    statistics = {"kendall": trust.kendall, "spearman": trust.spearman, "top_recall": trust.top_recall}
    return {name: _figure(statistic, scores, truths) for name, statistic in statistics.items()}


def _figure(statistic: trust.Statistic, scores: np.ndarray, truths: np.ndarray) -> dict[str, float] | None:
    if len(scores) < 3:
        return None
    return _plain(trust.figure(statistic, scores, truths))


def _plain(figure: Interval) -> dict[str, float] | None:
    """Returns plain data; None if the statistic is not defined."""
    return asdict(figure) if math.isfinite(figure.value) else None


def _difference(scores: np.ndarray, others: np.ndarray, truths: np.ndarray) -> Interval:
    """Returns how much larger the Kendall correlation of `scores` with the truths is, on the same resamples."""
    known = np.isfinite(scores) & np.isfinite(others)
    a, b, t = scores[known], others[known], truths[known]
    if len(t) < 3:
        return Interval(math.nan, math.nan, math.nan)
    return trust.bootstrap(lambda counts: trust.kendall(a, t, counts) - trust.kendall(b, t, counts), len(t))


def _choice(
    cheap: Mapping[str, _Column], baselines: Mapping[str, _Column], truths: np.ndarray, resamples: int = 300
) -> dict[str, Any]:
    """Chooses the best estimator on each of many resamples, and scores it on the architectures that are not in it."""
    rng, count = np.random.default_rng(1), len(truths)
    names = list(cheap)
    chosen: dict[str, int] = dict.fromkeys(names, 0)
    found: list[float] = []
    against: dict[str, list[float]] = {name: [] for name, column in baselines.items() if column.complete}
    for _ in range(resamples):
        counts = rng.multinomial(count, np.full(count, 1 / count)).astype(float)
        out = counts == 0
        best = max(names, key=lambda name: _known(trust.kendall(cheap[name].scores, truths, counts)))
        chosen[best] += 1
        mine = trust.kendall(cheap[best].scores[out], truths[out])
        found.append(mine)
        for other, differences in against.items():
            differences.append(mine - trust.kendall(baselines[other].scores[out], truths[out]))
    return {
        "chosen": {name: number / resamples for name, number in chosen.items() if number},
        "kendall": _quantiles(found),
        "against": {name: _quantiles(differences) for name, differences in against.items()},
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    known = np.array([v for v in values if math.isfinite(v)])
    low, high = np.quantile(known, [0.025, 0.975])
    return asdict(Interval(float(known.mean()), float(low), float(high)))


def _verdict(report: Mapping[str, Any], what: str) -> list[str]:
    """Returns the recommendation, the noise of the truths, and comparisons with the baselines, as lines.

    Args:
        report: the report.
        what: what is ordered, in the plural.
    """
    name, choice = report["recommended"], report["choice"]
    row = next(row for row in report["rows"] if row["estimator"] == name)
    again = report["ceiling"]["kendall"]
    lines = [
        f"recommended: {name}, Kendall {format_figure(Interval.of(row['kendall']))} at "
        f"{100 * row['share_of_truth']:.1f} % "
        f"of a truth's time; chosen on some {what} and tested on the others, it is "
        f"{choice['kendall']['value']:.2f}",
        f"truth against truth with another seed ({report['ceiling']['count']} {what}): "
        f"{format_figure(Interval.of(again))}"
        + (f"; a score without noise could reach about {noiseless(again['value']):.2f}" if _above_0(again) else ""),
    ]
    for other, plain in row["against"].items():
        if plain is None or other not in choice["against"]:
            continue
        # the best of several looks better than it is, so the middle comes from architectures it was not chosen on
        middle = choice["against"][other]["value"]
        whole = Interval(**plain)
        difference = Interval(middle, middle - (whole.value - whole.low), middle + (whole.high - whole.value))
        if difference.low > 0:
            lines.append(f"it orders {what} better than {other} does: by {format_figure(difference)}")
        elif difference.high < 0:
            lines.append(f"it orders {what} worse than {other} does: by {format_figure(difference)}")
        else:
            width, value = difference.half_width, abs(middle)
            needed = math.ceil(report["count"] * POWER * (width / value) ** 2) if value > 1e-3 else None
            advice = (
                f"about {needed} truths would tell" if needed and needed < 10_000 else "no number of truths may tell"
            )
            lines.append(f"it is not shown to be better than {other}: {format_figure(difference)}; {advice}")
    if name in BASELINES:
        lines.append(f"no cheap estimator orders {what} better than counting does")
    return lines


def _of_tunings(report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each short tuning of grafts: whether it orders them better than no tuning does."""
    plain = next((row for row in report["rows"] if row["estimator"] == ASSEMBLED), None)
    tunings = [row for row in report["rows"] if row["estimator"].startswith(TUNED)]
    lines = []
    for row in sorted(tunings, key=lambda row: float(row["seconds"])):
        if plain is None or row["estimator"] == report["recommended"] or row["against"].get(ASSEMBLED) is None:
            continue
        difference, times = Interval(**row["against"][ASSEMBLED]), row["seconds"] / max(plain["seconds"], 1e-9)
        does = "orders" if difference.low > 0 else "is not shown to order"
        lines.append(
            f"{row['estimator']} {does} forms better than {ASSEMBLED} does: by {format_figure(difference)}, for "
            f"{times:.1f} times its seconds"
        )
    return lines


def _of_a_teacher(report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each short training with a teacher: what the teacher does to the order of architectures."""
    lines = []
    for row in sorted(report["rows"], key=lambda row: float(row["seconds"])):
        epochs = row["estimator"].removeprefix(TAUGHT)
        plain = row["against"].get(f"{TRAINED}{epochs}")
        if plain is None:
            continue
        difference = Interval(**plain)
        does = "orders architectures better" if difference.low > 0 else "orders architectures worse"
        if difference.low <= 0 <= difference.high:
            does = "is not shown to order architectures better or worse"
        lines.append(
            f"with the teacher, a training of {epochs} {'epoch' if epochs == '1' else 'epochs'} {does}: Kendall "
            f"{format_figure(Interval.of(row['kendall']))}, a difference of {format_figure(difference)}"
        )
    return lines


def noiseless(kendall: float) -> float:
    """Estimates the Kendall correlation with the truths of a score without noise: the mean of all possible truths.

    With normal errors, Kendall's correlation is 2/pi asin(r) between two sets of truths, and 2/pi asin(sqrt(r)) between
    truths and their means.

    Args:
        kendall: Kendall correlation between two sets of truths.
    """
    return 2 / math.pi * math.asin(math.sqrt(math.sin(math.pi / 2 * kendall)))


def _above_0(figure: Mapping[str, float] | None) -> bool:
    return figure is not None and figure["value"] > 0


def _both(scores: np.ndarray, truths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(scores)
    return scores[known], truths[known]


def _known(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
