"""Whether a recipe's model is on this machine, where it is not fetched, and what its weights are stored in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pdtrim_deploy.doctor.base import CheckContext, Finding, Job
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.paths import expanded, resolved
from pdtrim_deploy.models.checkpoint import read_checkpoint
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.quantized import read_quantized


@dataclass(frozen=True)
class Weights:
    """Says what is wrong with a model's folder or file, and names the format of quantised weights."""

    jobs: tuple[Job, ...] = ("build", "demo")

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line of the model, and one of its weights where they are quantised; none of a model that is fetched."""
        if context.recipe is None:
            return
        kind, _, place = context.recipe.model.source.partition(":")
        if kind not in ("hf", "gguf"):
            return
        try:
            path = resolved(expanded(place))
            if (config := path / "config.json").is_file() and (quantized := read_quantized(path, read_config(config))):
                yield Finding(group="recipe", name="weights", status="ok", detail=quantized.label)
            if kind == "hf":
                detail = f"{read_checkpoint(path).facts.num_blocks} blocks in {path}"
            elif path.is_file():
                detail = str(path)
            else:
                raise UserError(f"{path}: no such file")
        except UserError as error:
            yield Finding(
                group="recipe",
                name="model",
                status="missing",
                detail=str(error),
                mend="put the model there, or name another place in the recipe's model.source",
                needed_by=self.jobs,
            )
        else:
            yield Finding(group="recipe", name="model", status="ok", detail=detail)
