"""Declares a search space, searches it with the library, and prints the front.

Scores are exact here (MACs against the number of parameters), so it takes seconds. For real scores set
`objectives=("latency", "accuracy")` and leave out `proxy`.
"""

from pathlib import Path
from tempfile import mkdtemp

from nas.architecture import Additive, Hadamard, Stem, Strip
from nas.report.plots import plot
from nas.scoring.latency import LatencyConfig
from nas.search import SearchConfig, search
from nas.space import SearchSpace, StageChoices

space = SearchSpace(
    name="strips-late",
    description="convolutional mixers early, strip attention late: how wide, how compressed?",
    stem=Stem(stride=2),
    stages=(
        StageChoices(mixer=(Additive(), Hadamard()), depth=1, width=(16, 24, 32), options={"kernel_size": (3, 7)}),
        StageChoices(mixer=Strip(heads=4, kv_reduction=2), depth=(1, 2), width=(32, 48), compression=(1, 4)),
    ),
)
print(f"{space.name} has {space.size} architectures in {len(space.knobs)} knobs: {', '.join(space.knobs)}")

run = search(
    SearchConfig(
        space=space,
        objectives=("macs", "accuracy"),
        proxy="params",
        trials=20,
        sampler="nsga2",
        latency=(LatencyConfig(device="cpu"),),
        out=Path(mkdtemp()) / "run",
    )
)
for point in run.front():
    print(point.key, f"{point.scores.macs:,} MACs", f"{point.scores.params:,} parameters")
print(*plot([run]), sep="\n")
