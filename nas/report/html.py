"""A report of one or several runs as one page that needs nothing else: no network, no server, no torch."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..folders.files import write_file
from ..folders.run import Run
from ..objectives.text import format_value
from ..space import has_grafts
from . import facts
from .confidence import trust
from .interactive import MIXER_SYMBOLS, RUN_STYLES, STYLE_WORDS, interactive
from .particulars import particulars
from .quantised import survival
from .scored import MIXER_COLOURS, differences, read_runs

PAGE = Path(__file__).parent / "page"


def report(runs: Sequence[Run], out: Path | None = None, spell: Callable[[str], str] = str) -> Path:
    """Writes one page with all that is known of the runs, and returns its path.

    Args:
        runs: runs with the same objectives.
        out: the file; None for `report.html` in the first run's folder.
        spell: changes notes, in which arguments stand in backquotes.

    Raises:
        UsageError: where the runs' objectives differ.
        RunError: where a run is damaged, or the file cannot be written.
    """
    path = runs[0].path / "report.html" if out is None else out
    write_file(path, _page(runs, spell))
    return path


def _page(runs: Sequence[Run], spell: Callable[[str], str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    scored, everything = read_runs(runs)
    drawn = any(trials for _, trials, _ in scored)
    figure = json.loads(interactive(scored).update_layout(template="none").to_json()) if drawn else {"data": []}
    for trace in figure["data"]:
        if "customdata" in trace:
            del trace["text"]  # the script writes the hovers: here they would be most of the page
    data = {
        **facts.architectures(scored),
        "objectives": [{"name": o.label, "minimize": o.minimize} for o in runs[0].objectives],
        "runs": [run.name for run in runs],
        "figure": figure,
        "growth": [facts.growth(run, trials) for run, trials in zip(runs, everything, strict=True)] if drawn else [],
        "dashes": [RUN_STYLES[i % len(RUN_STYLES)][1] for i in range(len(runs))],
        "colours": MIXER_COLOURS,
        "grouped": "change" if any("parent" in run.manifest.space for run in runs) else "mostly",
    }
    used = {row[facts.STAGE_FIELDS.index("mixer")] for row in data["stages"]["rows"]}
    scripts = [get_plotlyjs(), (PAGE / "page.js").read_text(encoding="utf-8")] if drawn else []
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        runs=[_panels(run, trials, front, spell) for (run, _, front), trials in zip(scored, everything, strict=True)],
        drawn=drawn,
        mixers=[
            {"name": name, "colour": MIXER_COLOURS[name], "symbol": MIXER_SYMBOLS[name]}
            for name in MIXER_SYMBOLS
            if any(point["mixer"] == name for point in data["points"])
        ],
        stage_mixers={name: MIXER_COLOURS[name] for name in MIXER_COLOURS if name in used},
        several=len(runs) > 1,
        grafts=data["grouped"] == "change",
        marks=[(run.name, STYLE_WORDS[i % len(STYLE_WORDS)]) for i, run in enumerate(runs)],
        differences=differences(runs),
        objectives=[o.label for o in runs[0].objectives],
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        policy=_policy(scripts),
        data=_inline(data),
    )


def _panels(run: Run, trials: list[Any], front: list[Any], spell: Callable[[str], str]) -> dict[str, Any]:
    """Returns the content of the page for one run."""
    scored, wanted = sum(t.scored for t in trials), run.manifest.config.trials
    return {
        "name": run.name,
        "what": f"{run.manifest.space_name} on {Path(run.manifest.data.name).name}",
        "timing": run.timing if run.targets else "",
        "machine": run.manifest.conditions.device,
        "created": run.manifest.created,
        "scored": scored,
        "wanted": wanted,
        "figures": facts.key_figures(run, trials, front),
        "reference": ", ".join(
            f"{o.label} {format_value(o, run.reference[o.name])}".replace(" ", "\u00a0") for o in run.objectives
        ),
        "mixers": facts.mixers_by_stage(trials, front),
        "grafts": has_grafts(run.manifest.space),
        "survival": survival(run, trials, front),
        "importance": facts.knob_importance(run),
        "trust": trust(run, front, spell),
        "endings": facts.endings(trials, wanted),
        "budgets": facts.budgets(run, trials),
        "baselines": facts.baselines(run, front),
        "trained": facts.trained(run, trials),
        "particulars": particulars(run),
        "resume": f"mixnas search --out {shlex.quote(str(run.path))}",
    }


def _inline(data: Any) -> str:
    """JSON that may stand in a script element, whatever its strings hold."""
    text = json.dumps(data, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy under which just these scripts run and nothing is fetched.

    Styles may stand anywhere: plotly makes its own.
    """
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
