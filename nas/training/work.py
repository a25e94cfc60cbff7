"""Begin a full training or go on with one: of a network, or of all networks of a front."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import distributed, nn

from .. import defaults
from ..data import MAX_IMAGES, SPLIT_SEED
from ..errors import DataError, NasError, RunError, UsageError
from ..folders.files import locked_folder, write_file
from ..folders.run import Run
from ..folders.training import MANIFEST, Trained, is_training, load_weights
from ..folders.trial import Trial
from ..foreign_files import SIDE, is_file
from ..interval import Interval
from ..machine.description import describe_machine, describe_software, machine_name
from ..machine.devices import resolve_device, seeded
from ..models import create_backbone
from ..models.backbone import Backbone
from ..models.timm_models import create_network
from ..repeats import REPEATS
from ..results import RESULTS
from ..scoring.accuracy import trust
from ..targets import Target, resolve
from .images import Held, TrainingData, batch_size, default_workers, open_data, steps_per_epoch
from .loop import Loop, Processes, Step, Teacher, scaled_side
from .recipes import Auto, Recipe, parse_settings

log = logging.getLogger(__name__)

FEW_STEPS = 300
"""Steps below which a named recipe is said to take too few."""
FEWEST_COMPARED = 3
"""Networks from which on the order of a proxy is compared with that of full trainings."""


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, how and where.

    Args:
        target: see `nas.targets`; a training's folder that has not ended is gone on with.
        recipe: how; by default one that suits the images, see `auto_recipe`.
        data: the training split, see `nas.data`; None takes that of the target's run, or digits.
        test_data: another set whose images are the final test; None takes the split beside `data`, if any.
        data_root: where installed sets lie.
        classes: of a folder or an archive of images, the class folders; empty takes the run's, else finds them.
        input_size: side of the images; None takes the run's, else the data's own.
        seed: of all that is random.
        device: auto, cpu, cuda or cuda:i; of several processes each has its own GPU.
        workers: processes that read and augment images beside each that trains; None for as many as there are cores.
        init: what to start from: auto (trained weights where the target has some), scratch, or a safetensors file.
        teacher: a trained folder, an exported folder or `timm:NAME`, to learn from.
        teacher_weights: a safetensors file with those of `timm:NAME`.
        tensorboard: write logs for TensorBoard too.
        share_device: train without waiting for other processes that use the device.
        out: the folder; None makes `trained/KEY` in the run folder, for others one in `results`.
    """

    target: str
    recipe: Recipe | Auto = field(default_factory=Auto)
    data: str | None = None
    test_data: str | None = None
    data_root: str | None = None
    classes: tuple[str, ...] = ()
    input_size: int | None = None
    seed: int = defaults.SEED
    device: str = defaults.DEVICE
    workers: int | None = None
    init: str = "auto"
    teacher: str | None = None
    teacher_weights: str | None = None
    tensorboard: bool = False
    share_device: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what is not allowed."""
        if self.workers is not None and not 0 <= self.workers <= 256:
            raise UsageError(f"--workers {self.workers}: it must be from 0 to 256")
        if self.input_size is not None and self.input_size not in SIDE:
            raise UsageError(f"--input-size {self.input_size}: it must be from 1 to {SIDE[-1]}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: it must be from 0 to {2**32 - 1}")
        if (self.teacher or "").startswith("timm:") != (self.teacher_weights is not None):
            raise UsageError("--teacher timm:NAME and --teacher-weights FILE go together: nothing is downloaded")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError("--tensorboard needs TensorBoard: pip install 'mixnas[tensorboard]'")


def train(config: TrainConfig, on_step: Callable[[Step], None] | None = None) -> Trained:
    """Train a network to its end; a training that was interrupted goes on where it was saved last.

    Of several processes (`torchrun`) each calls this with the same arguments.

    Args:
        config: what, how and where.
        on_step: told after each step.

    Returns:
        The finished training, whose `result` has top-1 on the held-out part and the test split.

    Raises:
        UsageError: where something asked for is not allowed.
        DataError: where the images cannot be used.
        RunError: where the folder is another training's, or weights do not fit.
        NasError: where the training fails: the loss is not finite, or memory runs out.
    """
    begun = Path(config.target)
    if is_training(begun) and Trained.open(begun).result is None:
        config = _as_begun(Trained.open(begun), config)
    target = resolve(config.target)
    with together(config.device) as (processes, device):
        return _train(config, target, processes, device, on_step)


def _as_begun(trained: Trained, config: TrainConfig) -> TrainConfig:
    """The arguments of a training that is gone on with by its folder."""
    manifest = trained.manifest
    asked = manifest["asked"] | {"classes": tuple(manifest["asked"].get("classes", ()))}  # 0.1.0 kept none
    for name in _ASKED[1:]:
        given = getattr(config, name)
        if given not in (asked[name], getattr(TrainConfig(""), name)):
            raise UsageError(f"{trained.path} was begun with another --{name.replace('_', '-')}: leave it out to go on")
    recipe = Recipe.from_dict(dict(manifest["recipe"]))
    if config.recipe not in (Auto(), recipe) and not _chosen_before(config.recipe, manifest):
        raise UsageError(f"{trained.path} was begun with another recipe: leave --recipe and --set out to go on")
    if config.out is not None and config.out.resolve() != trained.path.resolve():
        raise UsageError(f"{trained.path} is not trained to its end: to go on, leave --out out")
    return replace(
        config,
        **{name: asked[name] for name in _ASKED},
        recipe=recipe,
        out=trained.path,
    )


_ASKED = (
    *("target", "data", "test_data", "data_root", "classes", "input_size"),
    *("seed", "init", "teacher", "teacher_weights"),
)


@contextlib.contextmanager
def together(device: str) -> Iterator[tuple[Processes, str]]:
    """This process among those that train together, and its device."""
    processes = Processes.of_environment()
    if processes.count == 1:
        place = resolve_device(device)
        if place != "cpu":
            torch.cuda.set_device(place)  # what is seeded step by step
        yield processes, place
        return
    if resolve_device(device) == "cpu":
        place, backend = "cpu", "gloo"
    else:
        place, backend = resolve_device(f"cuda:{processes.local_rank}"), "nccl"
    if distributed.is_initialized():
        yield processes, place
        return
    if place != "cpu":
        torch.cuda.set_device(place)
    distributed.init_process_group(backend, device_id=None if place == "cpu" else torch.device(place))
    yield processes, place
    distributed.destroy_process_group()  # not after an error: it may wait for others that wait for this one


def _train(
    config: TrainConfig,
    target: Target,
    processes: Processes,
    device: str,
    on_step: Callable[[Step], None] | None,
) -> Trained:
    config = _with_defaults(config, target)
    assert config.data is not None
    weights = _initial(config, target)
    known = target.data if weights is not None and weights == target.weights else {}
    if weights is not None and target.architecture is None and not known:
        known = timm.get_pretrained_cfg(target.model, allow_unregistered=True).to_dict()
    normalisation = (tuple(known["mean"]), tuple(known["std"])) if "mean" in known and "std" in known else None
    if weights is None and config.init == "auto" and target.run:
        told = f"The run keeps no weights of {target.name}, so its training begins from scratch."
        REPEATS.tell(log, "trainings that begin from scratch, without weights in the run", told)
    held = _held(config, target, weights)
    data = open_data(
        *(config.data, config.test_data, config.data_root, config.input_size, held, normalisation),
        classes=config.classes,
        untested=config.recipe.holdout is None,
    )
    anew = weights == target.weights and tuple(known.get("classes", data.classes)) != data.classes
    if anew:
        told = "other classes than its weights were trained on: the classifier begins anew"
        REPEATS.tell(log, "classifiers that begin from scratch, for other classes", told, level=logging.INFO)
    out = config.out or _place(config, target)
    with contextlib.ExitStack() as folder:
        if processes.first:
            folder.enter_context(locked_folder(out, MANIFEST, "training"))
            before = Trained.open(out) if is_training(out) and Trained.open(out).begun else None
            # weights of a search's short training are where it begins, not what a full training has learned
            recipe = _recipe(config.recipe, data, weights is not None and not _of_search(target, weights), before)
            manifest = _manifest(config, recipe, target, data, weights, device)
            if before is None:
                Trained.create(out, manifest)
            else:
                _check_same(before, manifest)
        if processes.count > 1:
            distributed.barrier()
        trained = Trained.open(out)
        if trained.result is not None:
            log.info("%s is trained to its end already", out)
            return trained
        recipe = Recipe.from_dict(dict(trained.manifest["recipe"]))
        with seeded(config.seed):
            model = _build(target, data, recipe.drop_path)
            if weights is not None:
                _fill(model, weights, anew)
        _check_sides(model, data, recipe, "the network")
        _check_batch(model, data, recipe, processes)
        teacher = _teacher(config, recipe, data, device) if config.teacher else None
        workers = default_workers(processes.count) if config.workers is None else config.workers
        if teacher is not None and isinstance(model, Backbone):
            model.set_distilled_training()
        loop = Loop(trained, model, data, recipe, config.seed, device, processes, workers, teacher, config.tensorboard)
        loop.share_device = config.share_device
        if loop.step and processes.first:
            log.info("%s goes on at step %d of %d", out, loop.step, recipe.epochs * loop.steps)
        loop.run(on_step if processes.first else None)
        if processes.count > 1:
            distributed.barrier()
    return trained


def _of_search(target: Target, weights: Path) -> bool:
    """Whether weights are those that a search trained."""
    return bool(target.run) and weights == target.weights


def _recipe(asked: Recipe | Auto, data: TrainingData, pretrained: bool, before: Trained | None) -> Recipe:
    """The recipe to train by; a training that has begun keeps what was chosen for it."""
    if isinstance(asked, Recipe):
        recipe = asked
        total = recipe.epochs * steps_per_epoch(data, recipe)
        if total < FEW_STEPS:
            log.warning(
                "recipe %s takes %d steps on these %s images, which is little to learn from: --recipe auto follows the "
                "number of images",
                *(recipe.name, total, f"{len(data.train):,}"),
            )
        return recipe
    if before is not None and _chosen_before(asked, before.manifest):
        return Recipe.from_dict(dict(before.manifest["recipe"]))
    recipe = replace(asked.choose(len(data.train), len(data.classes), pretrained), holdout=data.held.share)
    images = f"{len(data.train):,} images of {len(data.classes)} classes at {data.input_size[1]} pixels"
    start = "from weights" if pretrained else "from scratch"
    log.info("for %s, %s: %s", images, start, recipe.described(steps_per_epoch(data, recipe), batch_size(data, recipe)))
    return recipe


def _chosen_before(asked: Recipe | Auto, manifest: Mapping[str, Any]) -> bool:
    """Whether `auto` was asked for with the same settings by the training of a manifest."""
    settings = manifest["asked"].get("settings")
    return (
        isinstance(asked, Auto) and settings is not None and parse_settings(asked.settings) == parse_settings(settings)
    )


def _with_defaults(config: TrainConfig, target: Target) -> TrainConfig:
    """What is not said is as in the target's run, or as its weights know it."""
    if target.run and target.folder is not None:
        of_run = Run.open(target.folder).manifest["config"]
        if config.data is None:
            config = replace(config, data=of_run["data"], data_root=config.data_root or of_run["data_root"])
            config = replace(config, classes=config.classes or tuple(of_run.get("classes", ())))
    size = target.data["input_size"][1] if "input_size" in target.data else None
    return replace(config, data=config.data or "digits", input_size=config.input_size or size)


def _held(config: TrainConfig, target: Target, weights: Path | None) -> Held:
    """What is held out: nothing that the weights it starts from were trained on, as far as that is known."""
    share = config.recipe.holdout
    held = Held(Recipe.holdout if share is None else share, config.seed)
    if weights is None or weights != target.weights or target.folder is None:
        return held
    if target.run:
        of_run = Run.open(target.folder).manifest["config"]
        search = of_run.get("max_images", MAX_IMAGES), SPLIT_SEED
        return replace(held, search=search) if _same_data(config.data, of_run["data"]) else held
    if is_training(target.folder):
        before = Trained.open(target.folder).manifest["data"]
        return Held.from_dict(before["held"]) if _same_data(config.data, before["name"]) else held
    log.warning("what %s was trained on is not known: its held-out images may be among that", target.name)
    return held


def _same_data(name: str | None, other: str) -> bool:
    """Whether two names are of one data set, however its path is spelled."""
    return name == other or Path(name or "").expanduser().resolve() == Path(other).expanduser().resolve()


def _initial(config: TrainConfig, target: Target) -> Path | None:
    """The weights to start from; None for none."""
    if config.init == "scratch":
        return None
    if config.init == "auto":
        return target.weights
    file = Path(config.init)
    if not is_file(file, UsageError):
        raise UsageError(f"--init {config.init}: it must be auto, scratch or a .safetensors file")
    return file


def _place(config: TrainConfig, target: Target) -> Path:
    if target.run and target.folder is not None and target.architecture is not None:
        return target.folder / "trained" / target.architecture.key
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(target.name).name.replace("timm:", ""))
    return RESULTS / f"train-{plain}-{Path(config.data or '').stem}"


def _build(target: Target, data: TrainingData, drop_path: float) -> nn.Module:
    classes = len(data.classes)
    if target.architecture is not None:
        if data.input_size[1] < target.architecture.reduction:
            raise UsageError(
                f"images of {data.input_size[1]} pixels are too small for {target.name}: give an --input-size of "
                f"{target.architecture.reduction} or more"
            )
        return create_backbone(target.architecture, classes, drop_path_rate=drop_path)
    try:
        return create_network(target.model, classes, data.input_size, drop_path_rate=drop_path)
    except (TypeError, ValueError):
        log.info("%s knows no drop path: it is trained without", target.model)
        return create_network(target.model, classes, data.input_size)


def _fill(model: nn.Module, weights: Path, anew: bool) -> None:
    """Load weights; a classifier of other classes begins at zero, one of another number in any case.

    A random one sends large gradients into features that are good already. timm draws that of an EfficientNet for 6
    classes from ±0.41: with it EfficientNet-Lite0 reached 64 % on TrashNet at 64 pixels, from zero 81 %.
    """
    own = model.state_dict()
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifier = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))

    def fitting(found: dict[str, Any]) -> dict[str, Any]:
        ours = {n for n in found if n in own and n.startswith(classifier)}
        other = {n for n in ours if anew or found[n].shape != own[n].shape}
        return {n: torch.zeros_like(own[n]) if n in other else t for n, t in found.items()} if classifier else found

    load_weights(model, weights, fitting)


def _check_sides(model: nn.Module, data: TrainingData, recipe: Recipe, what: str) -> None:
    """Refuse sides that a network does not take, before a long training finds out."""
    for scale in recipe.scales:
        side = data.input_size[1] if scale == 1 else scaled_side(data.input_size[1], scale)
        try:
            with torch.inference_mode():
                nn.Module.__call__(model.eval(), torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            why = str(error).partition("\n")[0][:200]
            raise UsageError(f"{what} does not take images of {side} pixels ({why})") from None


def _check_batch(model: nn.Module, data: TrainingData, recipe: Recipe, processes: Processes) -> None:
    """Refuse batches of one image where a batch norm would then see one value a channel, whose deviation is 0."""
    count = processes.count
    if batch_size(data, recipe) // count > 1 or (recipe.sync_batch_norm and count > 1):
        return
    side = min(scaled_side(data.input_size[1], s) if s != 1 else data.input_size[1] for s in recipe.scales)
    try:
        with seeded(0), torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(1, 3, side, side))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        each = " for each process" if count > 1 else ""
        raise UsageError(
            f"one image a step{each} is too few: a batch norm of the network would see one value of each channel; "
            f"set a batch_size of {2 * count} or more"
        ) from None


def _teacher(config: TrainConfig, recipe: Recipe, data: TrainingData, device: str) -> Teacher:
    name = config.teacher or ""
    folder = Path(name)
    known: Mapping[str, Any]
    if is_training(folder):
        trained = Trained.open(folder)
        model, known = trained.load_model(), trained.manifest["data"]
    elif is_file(folder / "config.json", UsageError):
        exported = resolve(name)
        if exported.weights is None or "mean" not in exported.data or "std" not in exported.data:
            raise UsageError(f"--teacher {name}: it is no exported folder with weights")
        model, known = exported.build(), exported.data
        load_weights(model, exported.weights)
    elif name.startswith("timm:"):
        assert config.teacher_weights is not None
        model = create_network(name.removeprefix("timm:"), len(data.classes), data.input_size)
        load_weights(model, Path(config.teacher_weights))
        known = timm.get_pretrained_cfg(name.removeprefix("timm:"), allow_unregistered=True).to_dict()
    else:
        raise UsageError(f"--teacher {name}: give a trained folder, an exported folder or timm:NAME")
    count = int(getattr(model, "num_classes", 0))
    if count != len(data.classes):
        raise UsageError(f"--teacher {name} knows {count} classes, the images have {len(data.classes)}")
    if tuple(known.get("classes", data.classes)) != data.classes:
        raise UsageError(f"--teacher {name} knows other classes than the images have, or in another order")
    _check_sides(model, data, recipe, f"--teacher {name}")
    model = model.eval().requires_grad_(False).to(device)
    return Teacher(model, tuple(known["mean"]), tuple(known["std"]))


def _manifest(
    config: TrainConfig, recipe: Recipe, target: Target, data: TrainingData, weights: Path | None, device: str
) -> dict[str, Any]:
    ours = target.architecture is not None
    return {
        "target": target.name,
        "architecture": target.architecture.to_dict() if target.architecture is not None else None,
        "model": None if ours else target.model,
        "init": "scratch" if weights is None else str(weights),
        "teacher": config.teacher,
        "seed": config.seed,
        "recipe": recipe.to_dict(),
        "data": data.to_dict(),
        "asked": {name: getattr(config, name) for name in _ASKED}
        | {"settings": list(config.recipe.settings) if isinstance(config.recipe, Auto) else None},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device) | {"name": machine_name(device)},
        "software": describe_software(),
    }


def _check_same(trained: Trained, manifest: Mapping[str, Any]) -> None:
    """Refuse to go on with another training than the folder's."""
    there = trained.manifest
    for name in ("test_data", "teacher_weights"):
        if there["asked"][name] != manifest["asked"][name]:
            raise RunError(f"{trained.path} was begun with another --{name.replace('_', '-')}: give another --out")
    for name in ("architecture", "model", "init", "teacher", "seed"):
        if there.get(name) != manifest[name]:
            raise RunError(f"{trained.path} is a training with another {name}: give another --out")
    recipe = Recipe.from_dict(dict(there["recipe"])).to_dict()  # an older release kept fewer fields
    for name, value in manifest["recipe"].items():
        if (before := recipe[name]) != value:
            what = f"recipe {before}" if name == "name" else f"{name}={before}"
            raise RunError(
                f"{trained.path} was begun with {what}, not {value}: `mixnas train {trained.path}` goes on with it; "
                "another training needs another --out"
            )
    for name in ("fingerprint", "input_size"):
        if there["data"][name] != manifest["data"][name]:
            raise RunError(f"{trained.path} was begun on other images ({name}): give another --out")


def final_accuracy(trained: Trained) -> dict[str, Any] | None:
    """The accuracy that a finished training is judged by: on the test split, else on the held-out part."""
    result = trained.result
    return None if result is None else result["test"] or result["holdout"]


@dataclass(frozen=True)
class FrontTraining:
    """A front, trained to its end.

    Args:
        rows: a line for each point: key, the proxy's score, final accuracy with its interval, or the failure.
        kendall: of the proxy's order against the final one, with its 95 % interval; None for fewer than
            three networks.
    """

    rows: tuple[dict[str, Any], ...]
    kendall: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"rows": list(self.rows), "kendall": None if self.kendall is None else asdict(self.kendall)}


def train_front(
    config: TrainConfig,
    on_step: Callable[[Step], None] | None = None,
    on_point: Callable[[int, int, str], None] | None = None,
) -> FrontTraining:
    """Train every network of a run's front by one recipe, and compare the proxy's order with the final one.

    What is trained already is not trained again. A network whose training fails does not stop the others.

    Args:
        config: whose `target` is a run folder, and which says no `out`.
        on_step: told after each step.
        on_point: told before each network: its place, their number and its key.

    Raises:
        UsageError: where the target is no run with a front.
        NasError: as `train`, where not even the first step is possible for any network.
    """
    run = Run.open(config.target)
    front = run.front()
    if not front:
        raise UsageError(f"{config.target} has no front yet: no architecture is scored")
    if config.out is not None:
        raise UsageError(f"--out: a front is trained in its run folder, {run.path / 'trained'}")
    rows: list[dict[str, Any]] = []
    with together(config.device) as (processes, _):
        for i, trial in enumerate(front):
            if on_point is not None and processes.first:
                on_point(i, len(front), trial.key)
            row = {"key": trial.key, "proxy": _proxy(trial)}
            try:
                trained = train(replace(config, target=f"{config.target}@{trial.key}"), on_step)
                found = {"init": trained.manifest["init"], **(final_accuracy(trained) or {})}
            except (UsageError, DataError):
                raise
            except NasError as error:
                if processes.count > 1:
                    raise  # the others may be in the midst of a step: all end, and go on together
                log.warning("%s: %s", trial.key, error)
                rows.append(row | {"failure": str(error)})
            else:
                rows.append(row | found)
        told = FrontTraining(tuple(rows), _order(rows))
        if processes.first:
            write_file(run.path / "trained" / "front.json", json.dumps(told.to_dict(), indent=2) + "\n")
    return told


def _proxy(trial: Trial) -> float | None:
    scores = trial.scores
    return scores.accuracy if scores.accuracy is not None else scores.proxy


def _order(rows: list[dict[str, Any]]) -> Interval | None:
    both = [row for row in rows if row["proxy"] is not None and "accuracy" in row]
    if len({row["init"] == "scratch" for row in both}) > 1:  # which would be at a disadvantage
        both = [row for row in both if row["init"] != "scratch"]
    if len(both) < FEWEST_COMPARED:
        return None
    proxy, final = [row["proxy"] for row in both], [row["accuracy"] for row in both]
    figure = trust.bootstrap(partial(trust.kendall, proxy, final), len(both))
    return figure if math.isfinite(figure.value) else None
