"""The recipe: its sections, and the YAML files that it is read from."""

from pdtrim_deploy.recipe.recipe import (
    CalibrationSection,
    EvaluationSection,
    PruningSection,
    Recipe,
)

__all__ = [
    "CalibrationSection",
    "EvaluationSection",
    "PruningSection",
    "Recipe",
]
