"""A run folder. Only this module reads and writes it.

    run.json                configuration, machine and software versions
    study.db                Optuna's SQLite storage with all trials; absent if the storage is a server
    trials.csv              every trial, derived
    front.csv front.json    the Pareto set, derived
    weights/<key>.safetensors   proxy-trained weights of the front
    parent/                 the parent's training, in a search for grafts, with the layers of ours (`library`)
    parent/baselines/<name>/    trainings of other pretrained networks that stand beside the parent
    tuned/<key>.safetensors     weights of tuned grafts, and of candidates that were trained on after the search
    tuned/<key>.pt              state of an unfinished training of these
    exports/<key>/          networks that `export` wrote
    trained/<key>/          networks that `train` trained

You can delete derived files at any time. Every file is written under a temporary name and then renamed.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from .. import consent
from ..errors import RunError, UsageError, one_line
from ..foreign_files import is_file
from ..objectives.objectives import Objective, Scores, parse_objectives
from ..objectives.pareto import GrowingFront, hypervolume, non_dominated
from ..scoring.latency.config import LatencyConfig, run_latency, timing_in_words
from ..space import Space, space_from_dict
from ..storage.connect import check_database, damage_reported, no_study, open_storage, storage_errors
from ..streams import encodable
from .attributes import BASELINES, REMEASURED, STAGES, gathered
from .files import reading_manifest, write_file
from .manifest import FORMAT, Manifest
from .shapes import RUN
from .tables import columns, front_dict, table
from .trial import Trial, read_trial, remeasured_scores, remeasured_trial, with_tunings
from .verdicts import to_scale, verdicts

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest"
"""Study attribute with a copy of `run.json`, for workers that only see the storage."""


@dataclass(frozen=True)
class Run:
    """An existing run folder.

    Args:
        path: the folder.
        manifest: the content of `run.json`.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Reads a run folder's manifest.

        Raises:
            RunError: if the folder is not a run folder, or its manifest is damaged.
        """
        folder = Path(path)
        manifest = folder / "run.json"
        if not is_run(folder):
            raise RunError(
                f"{folder} is not a run folder: it has no run.json"
                + (
                    f" (mixnas search --out {shlex.quote(str(folder))} restores it from the study)"
                    if (folder / "study.db").is_file()
                    else ""
                )
                if folder.is_dir()
                else f"no run folder at {folder}"
            )
        with reading_manifest(manifest, FORMAT, "run", RUN) as data:
            run = cls(folder, Manifest.from_dict(data))
            _ = run.objectives, run.reference, run.latency
            return run

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> Run:
        """Writes `run.json`. This is the last step of creating a run, or an update when a run is resumed."""
        write_file(path / "run.json", json.dumps(manifest.to_dict(), indent=2) + "\n")
        return cls.open(path)

    def update(self, manifest: Manifest) -> Run:
        """Replaces the manifest, also in the study, where workers read it."""
        with self._study() as (storage, study_id):
            storage.set_study_user_attr(study_id, MANIFEST, manifest.to_dict())
        return Run.create(self.path, manifest)

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives of the run, in order."""
        config = self.manifest.config
        return parse_objectives(config.objectives, config.proxy, self.manifest.proxy_trained, self.targets or ("",))

    @cached_property
    def space(self) -> Space:
        """The search space. A damaged one raises a UsageError."""
        return space_from_dict(self.manifest.space)

    @cached_property
    def latency(self) -> tuple[LatencyConfig, ...]:
        """The conditions of latency measurement, one configuration for each target."""
        return run_latency(self.manifest.config.recorded)

    @property
    def targets(self) -> tuple[str, ...]:
        """Labels of the latency targets, such as `cpu-eager`; empty if latency is not measured."""
        return tuple(str(label) for label in self.manifest.latency_references)

    @cached_property
    def reference(self) -> dict[str, float]:
        """The hypervolume's reference point, fixed at creation: objective -> value."""
        given = self.manifest.reference
        if missing := [o.name for o in self.objectives if o.name not in given]:
            raise RunError(f"its reference lacks {', '.join(missing)}")
        return {o.name: float(given[o.name]) for o in self.objectives}

    @property
    def timing(self) -> str:
        """The timing conditions of all targets for people."""
        return timing_in_words(self.latency)

    @property
    def name(self) -> str:
        """Name of the folder. Bytes that are not text are escaped."""
        return encodable(self.path.resolve().name, "utf-8")

    def columns(self) -> dict[str, str]:
        """Name in `FIGURES` -> column of the tables. The column of an untrained proxy has the name of the proxy."""
        return columns(self)

    def storage(self) -> optuna.storages.BaseStorage:
        """The study's storage.

        Raises:
            RunError: if it is not the folder's own file, and the user did not name it (`nas.consent`).
        """
        consent.check_storage(self.manifest.config.storage, str(self.path))
        return open_storage(self.path, self.manifest.config.storage, create=False)

    @contextlib.contextmanager
    def study(self) -> Iterator[optuna.Study]:
        """Yields Optuna's study of the run. Errors of its storage become one line."""
        with self._study() as (storage, _), damage_reported(self.path):
            yield optuna.load_study(study_name=self.manifest.study, storage=storage)

    def trials(self, remeasured: bool = True, tuned: bool = True) -> list[Trial]:
        """Returns every trial of the study, in order.

        Args:
            remeasured: whether latencies that were measured again after the search replace the first ones.
            tuned: whether accuracies after tuning or a longer training replace those that the search scored, see
                `with_tunings`.

        Raises:
            RunError: if the storage is missing or damaged.
        """
        with self._study() as (storage, study_id), damage_reported(self.path):
            frozen = storage.get_all_trials(study_id, deepcopy=False)
        trials = [read_trial(t) for t in frozen]
        for trial in trials:
            if trial.state == "complete" and any(o.read(trial.scores) is None for o in self.objectives):
                raise RunError(f"trial {trial.number} of {self.path} is damaged: it is complete without its scores")
        attributes = self.attributes if remeasured or tuned else {}
        if tuned:
            trials = with_tunings(trials, attributes)
        again = attributes.get(REMEASURED, {}) if remeasured else {}
        if not again:
            return trials
        budget = self.manifest.config.budgets.get("latency")
        return [remeasured_trial(t, self.targets, again, budget) for t in trials]

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the study."""
        with self._study() as (storage, study_id), damage_reported(self.path):
            attributes = dict(storage.get_study_user_attrs(study_id))
        return gathered(attributes, f"the study of {self.path}")

    @contextlib.contextmanager
    def _study(self) -> Iterator[tuple[optuna.storages.BaseStorage, int]]:
        with storage_errors(self.path):
            consent.check_storage(self.manifest.config.storage, str(self.path))
            with damage_reported(self.path):
                check_database(self.path, self.manifest.config.storage)
                storage = self.storage()
            try:
                study_id = storage.get_study_id_from_name(self.manifest.study)
            except KeyError:
                raise no_study(self.path) from None
            yield storage, study_id

    def baselines(self) -> dict[str, Scores]:
        """Scores of the baselines, by name. Baselines that failed are left out."""
        attributes = self.attributes
        again = attributes.get(REMEASURED, {})
        return {
            name: remeasured_scores(name, Scores.from_dict(entry["scores"]), self.targets, again)
            for name, entry in attributes.get(BASELINES, {}).items()
            if "scores" in entry
        }

    def stage_latencies(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the latencies of the parts of the front's networks: key -> `part`, `ms`, `low_ms` and `high_ms`.

        They are latencies on the first target. Parts are `stem`, `stages.N` and `head`, in the order in which they run.
        Parts that could not be measured are left out. The whole network was timed with its parts, and all are scaled
        so that the whole has its latest known latency.
        """
        measured = self.attributes.get(STAGES, {}).get(self.targets[0], {}) if self.targets else {}
        known = {t.key: t.scores.figure("latency_ms") for t in self.trials()} if measured else {}
        return {key: to_scale(parts, known.get(key)) for key, parts in measured.items() if parts}

    def beaten(self, front: list[Trial], scores: Scores) -> list[str] | None:
        """Returns the keys of the front's points that certainly dominate a network with these scores.

        A score that is missing or only a lower bound may be arbitrarily bad. So a point that beats a lower bound beats
        the network. The result is None if no point certainly dominates the network, but some point may.
        """
        if not front:
            return []
        values = [o.read(scores) for o in self.objectives]
        exact = np.array(
            [v is not None and not o.at_least(scores) for o, v in zip(self.objectives, values, strict=True)]
        )
        best = np.array([-np.inf if v is None else o.loss(v) for o, v in zip(self.objectives, values, strict=True)])
        points = self.losses(front)
        certain = (points <= best).all(1) & (points < best).any(1)
        possible = (points <= best)[:, exact].all(1) & ((points < best)[:, exact].any(1) | ~exact.all())
        if possible.any() and not certain.any():
            return None
        return [front[i].key for i in np.flatnonzero(certain)]

    def unknowns(self, scores: Scores) -> list[str]:
        """Lists the reasons why a network with these scores cannot be compared. The list is empty if it can be."""
        missing = [f"{o.name} was not measured" for o in self.objectives if o.read(scores) is None]
        return missing + [f"{o.label} are a lower bound" for o in self.objectives if o.at_least(scores)]

    def failed_baselines(self) -> dict[str, str]:
        """Name of each baseline that could not be scored -> the reason."""
        entries = self.attributes.get(BASELINES, {})
        return {name: one_line(entry["failure"]) for name, entry in entries.items() if "failure" in entry}

    def verdicts(self) -> list[str]:
        """Returns sentences on how far to trust the front: its proxy, its order and its intervals."""
        return verdicts(self)

    def front(self, trials: list[Trial] | None = None) -> list[Trial]:
        """Returns the non-dominated complete trials, by the first objective from best to worst. Keeps equal points."""
        complete = [t for t in (self.trials() if trials is None else trials) if t.state == "complete"]
        if not complete:
            return []
        losses = self.losses(complete)
        chosen = np.flatnonzero(non_dominated(losses))
        return [complete[i] for i in sorted(chosen, key=lambda i: tuple(losses[i]))]

    def losses(self, trials: list[Trial]) -> np.ndarray:
        """Returns the objective values in loss space, of shape (trials, objectives)."""
        return np.array([[o.loss(_known(o.read(t.scores))) for o in self.objectives] for t in trials])

    def loss_intervals(self, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best and the worst losses within the latency intervals, each of shape (trials, objectives)."""
        best, worst = self.losses(list(trials)), self.losses(list(trials))
        for column, objective in ((c, o) for c, o in enumerate(self.objectives) if o.is_latency):
            for row, trial in enumerate(trials):
                if (interval := objective.interval(trial.scores)) is not None:
                    best[row, column], worst[row, column] = interval.ends
        return best, worst

    def bend(self, front: list[Trial]) -> Trial:
        """Returns the point of a front (not empty) that is nearest to the ideal point.

        The ideal point has the best value of each objective, and distances are shares of each objective's range. If
        two points are equally near, the one that is better in the later objectives is chosen.
        """
        losses = self.losses(front)
        reach = np.where(np.ptp(losses, axis=0) > 0, np.ptp(losses, axis=0), 1.0)
        distances = np.linalg.norm((losses - losses.min(0)) / reach, axis=1).round(9)
        return front[min(range(len(front)), key=lambda i: (distances[i], *losses[i][::-1]))]

    def hypervolume(self, front: list[Trial]) -> float:
        """Returns a front's hypervolume against the run's reference point, in the product of the objectives' units."""
        corner = [o.loss(self.reference[o.name]) for o in self.objectives]
        return hypervolume(self.losses(front) if front else np.empty((0, len(corner))), corner)

    def hypervolumes(self, trials: Sequence[Trial]) -> list[float]:
        """Returns the hypervolume of the front after each trial, against the run's reference point."""
        corner = [o.loss(self.reference[o.name]) for o in self.objectives]
        front, volumes = GrowingFront(corner), []
        for trial in trials:
            if trial.state == "complete":
                front.add(self.losses([trial])[0])
            volumes.append(front.hypervolume)
        return volumes

    def random_hypervolumes(self, trials: Sequence[Trial], orders: int = 100) -> list[float]:
        """Returns the hypervolume that random search would have after each trial, averaged over random orders.

        This is known only if the run scored every architecture of its space. Otherwise the list is empty.
        """
        complete = [t for t in trials if t.state == "complete"]
        if len(complete) < self.space.size:
            return []
        rng = np.random.default_rng(0)
        curves = [self.hypervolumes([complete[i] for i in rng.permutation(len(complete))]) for _ in range(orders)]
        return [float(value) for value in np.mean(curves, axis=0)]

    def write_tables(self) -> None:
        """Writes `trials.csv`, `front.csv` and `front.json` from the study."""
        trials = self.trials()
        front = self.front(trials)
        write_file(self.path / "trials.csv", self.table(trials))
        write_file(self.path / "front.csv", self.table(front, on_front=True))
        write_file(self.path / "front.json", json.dumps(self.front_dict(front), indent=2) + "\n")

    def table(self, trials: list[Trial], on_front: bool = False) -> str:
        """Formats trials as CSV, one per line. Empty columns are left out."""
        return table(self, trials, on_front)

    def front_dict(self, front: list[Trial]) -> dict[str, Any]:
        """Returns the front as plain data, with objectives, hypervolume and its reference point."""
        return front_dict(self, front)

    def find(self, key: str, trials: list[Trial] | None = None) -> Trial:
        """Finds the scored trial whose architecture's key is `key` or starts with it.

        Args:
            key: the key, or the start of it.
            trials: the trials to search; None reads them.

        Raises:
            UsageError: if no trial or several trials match.
        """
        trials = self.trials() if trials is None else trials
        found = {t.key: t for t in trials if t.architecture and t.key.startswith(key) and t.ended}
        if len(found) == 1:
            return next(iter(found.values()))
        if not found or not key:
            keys = ", ".join(t.key for t in self.front(trials)) or "(none)"
            raise UsageError(f"no architecture {key!r} in {self.path}: its front has {keys}")
        raise UsageError(f"{key!r} is ambiguous in {self.path}: {', '.join(found)}")

    def weights_file(self, key: str) -> Path:
        """Path of the weights of a network: those of its tuning, else those that the proxy trained."""
        tuned = self._weights(key, tuned=True)
        return tuned if tuned.is_file() else self._weights(key)

    def _weights(self, key: str, tuned: bool = False) -> Path:
        return self.path / ("tuned" if tuned else "weights") / f"{key}.safetensors"

    def save_weights(self, key: str, weights: Mapping[str, torch.Tensor], tuned: bool = False) -> None:
        """Writes the weights of a longer training (`tuned`), or those that the search's proxy trained."""
        from safetensors.torch import save

        write_file(self._weights(key, tuned), save(dict(weights)))

    def tuning_file(self, key: str) -> Path:
        """Path of the state of an unfinished training."""
        return self.path / "tuned" / f"{key}.pt"

    def unfinished_tunings(self) -> list[Path]:
        """Files with states of unfinished trainings."""
        return sorted(self.path.glob("tuned/*.pt"))

    def drop_weights(self, keys: set[str]) -> None:
        """Deletes the weights of these architectures only: other files may belong to another worker's trial."""
        for key in keys:
            self._weights(key).unlink(missing_ok=True)


def is_run(path: Path) -> bool:
    """Whether a folder holds a run's manifest.

    Raises:
        RunError: if the folder cannot be read.
    """
    return is_file(path / "run.json", RunError)


def _known(value: float | None) -> float:
    assert value is not None, "a complete trial lacks an objective's value"
    return value
