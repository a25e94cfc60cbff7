"""Names of the study's attributes that a run adds."""

BASELINES, REMEASURED, ELSEWHERE, STAGES = "baselines", "remeasured", "elsewhere", "stages"
"""Study attributes that `nas.search.remeasure` writes."""
WHOLE = "whole"
"""Name of the whole network among its measured parts."""
