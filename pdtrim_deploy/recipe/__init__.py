"""What the user asks for: the recipe, its sections, and YAML files as people write them."""

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
