"""Names of the attributes that a run adds to its study."""

BASELINES, REMEASURED, ELSEWHERE, STAGES = "baselines", "remeasured", "elsewhere", "stages"
"""Study attributes that `nas.search.remeasure` writes."""
RACED, TUNED, CONTROL = "raced", "tuned", "control"
"""Study attributes that `nas.search.tune` writes."""
WHOLE = "whole"
"""Name of the whole network among its measured parts."""
