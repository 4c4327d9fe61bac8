"""What a worker is told beside SGLang's own options, in the one argument of SGLang that lets anything through.

`pdtrim-deploy serve` and the manifests write it, the plugin reads it: keys `pdtrim_NAME`, one for each field below, of
`--json-model-override-args`. SGLang also copies them into the model's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pdtrim_deploy.plan import Stage
from pdtrim_deploy.plan.blocks import Frozen
from pdtrim_deploy.worker.decode_pool import SplitPool
from pdtrim_deploy.worker.transport import TransportOptions

ARGUMENT = "--json-model-override-args"
PREFIX = "pdtrim_"


class EngineConfig(Frozen):
    """The engine that computes a stage.

    Attributes:
        executor: name in `pdtrim_sglang.executors.EXECUTORS`.
        path: folder of the stage's engine, as a target of `pdtrim_builders` wrote it.
        stage: which stage it must be an engine of.

    """

    executor: str
    path: str
    stage: Stage


class WorkerConfig(Frozen):
    """All that is ours; a field left out is the worker's default.

    Attributes:
        secret_file: the secret that all workers of a cluster share.
        transport: sizes, deadlines and addresses of its transport.
        decode_pool: requests for which a decode worker sizes the pools of cut layers; None: `SplitPool.of_pool`.
        send_by_layer: whether rows of finished layers leave while prefill's forward pass runs.
        engine: what computes its forward pass; None: SGLang's own model.

    """

    secret_file: str | None = None
    transport: TransportOptions = TransportOptions.model_validate({})
    decode_pool: SplitPool | None = None
    send_by_layer: bool = False
    engine: EngineConfig | None = None

    def override(self) -> dict[str, Any]:
        """What was set, under the keys that `of` reads."""
        settings = self.model_dump(mode="json", exclude_defaults=True)
        return {f"{PREFIX}{name}": value for name, value in settings.items()}

    @classmethod
    def parse(cls, override_args: str | None) -> WorkerConfig:
        """From the text of `--json-model-override-args`; RuntimeError, one sentence, when it is not valid."""
        return cls.of(json.loads(override_args or "{}"))

    @classmethod
    def of_model(cls, config: Any) -> WorkerConfig:
        """The same from the attributes of a model's configuration, where SGLang has no more to give."""
        return cls.of({name: getattr(config, name) for name in map(key, cls.model_fields) if hasattr(config, name)})

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> WorkerConfig:
        """From a mapping that may hold other keys too."""
        ours = {name.removeprefix(PREFIX): value for name, value in settings.items() if name.startswith(PREFIX)}
        try:
            return cls.model_validate(ours)
        except ValidationError as error:
            raise RuntimeError(_sentence(error)) from None


def key(field: str) -> str:
    """The key of a field of `WorkerConfig`."""
    return f"{PREFIX}{field}"


_SECTIONS: dict[str, type[Frozen]] = {"transport": TransportOptions, "decode_pool": SplitPool, "engine": EngineConfig}


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    section, *place = (str(part) for part in first["loc"])
    inside = _SECTIONS.get(section)
    valid = sorted(inside.model_fields) if inside else sorted(map(key, WorkerConfig.model_fields))
    return (
        f"pdtrim: {'.'.join((key(section), *place))} in {ARGUMENT}: {first['msg']}; valid: {', '.join(valid)}; "
        "or start workers with pdtrim-deploy serve"
    )
