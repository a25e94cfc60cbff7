"""Checks whether this machine can run a search and whether a run folder is intact. It changes nothing.

A check is a function that takes a `Patient` and returns a `Finding`. It has a row in `ENVIRONMENT` or in `FOLDER`. A
check imports what it needs inside its function, so that a missing or broken package becomes a finding and the other
checks still run.
"""

from .environment import ENVIRONMENT
from .examination import examine
from .findings import Finding
from .folder import FOLDER
from .patient import Patient

__all__ = ["ENVIRONMENT", "FOLDER", "Finding", "Patient", "examine"]
