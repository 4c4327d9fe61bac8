"""What a recipe's weights are stored in, where its model's folder is on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pdtrim_deploy.doctor.base import CheckContext, Finding, Job
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.quantized import read_quantized
from pdtrim_deploy.models.shape import config_of


@dataclass(frozen=True)
class Weights:
    """Names the format of quantised weights, and says whether it is read."""

    jobs: tuple[Job, ...] = ("build", "demo")

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line, where weights are quantised."""
        if context.recipe is None or not context.recipe.model.source.startswith("hf:"):
            return
        path = config_of(context.recipe.model.source)
        if path is None:
            return
        try:
            quantized = read_quantized(path.parent, read_config(path))
        except UserError as error:
            yield Finding(
                group="recipe",
                name="weights",
                status="missing",
                detail=str(error),
                mend="name another folder in the recipe's model.source",
                needed_by=self.jobs,
            )
            return
        if quantized is not None:
            yield Finding(group="recipe", name="weights", status="ok", detail=quantized.label)
