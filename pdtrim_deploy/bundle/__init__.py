"""The bundle that a build writes: manifest and digests, its engines, and where it was built."""

from pdtrim_deploy.bundle.bundle import Bundle, engine_folder
from pdtrim_deploy.bundle.manifest import (
    CARD,
    COMPLETE,
    ENGINES,
    MANIFEST,
    PLAN,
    RECIPE,
    REPORTS,
    UNSEALED,
    WORK,
    Entry,
    Manifest,
    Step,
    entries,
    read_seal,
    seal,
)

__all__ = [
    "CARD",
    "COMPLETE",
    "ENGINES",
    "MANIFEST",
    "PLAN",
    "RECIPE",
    "REPORTS",
    "UNSEALED",
    "WORK",
    "Bundle",
    "Entry",
    "Manifest",
    "Step",
    "engine_folder",
    "entries",
    "read_seal",
    "seal",
]
