"""What `eval` says of questions that a bundle's calibration text has, before it asks them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pdtrim_deploy.recipe import Recipe


def warn_of_calibrated(recipe: Recipe, tasks: Iterable[str]) -> None:
    """One line on stderr where tasks are judged by questions that the bundle was calibrated on.

    No refusal: the recipe's gates are refused, and what is measured is true of these questions.
    """
    if names := recipe.calibrated_on(tasks):
        click.echo(
            f"warning: {', '.join(names)}: the bundle's calibration text has some of these questions (corpus "
            "questions), so that the score may be too good; to judge by them, build with a calibration.mixture "
            "without questions",
            err=True,
        )
