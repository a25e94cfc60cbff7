"""Is this machine fit for a search, and is a run folder sound? Everything is looked at, nothing is changed.

A check is a function from a `Subject` to a `Finding` and a row of `ENVIRONMENT` or `FOLDER`. What a check needs is
imported in it, so that a package that is missing or broken is a finding and not the end.
"""

from .environment import ENVIRONMENT
from .examination import examine
from .findings import Finding
from .folder import FOLDER
from .patient import Subject

__all__ = ["ENVIRONMENT", "FOLDER", "Finding", "Subject", "examine"]
