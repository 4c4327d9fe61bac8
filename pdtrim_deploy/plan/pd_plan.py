"""What was decided: which blocks each stage keeps, and which prompt KV travels. Pure data: no torch.

Source of the rules: PDTrim (arXiv:2509.04467v1 to v3), removal sets nested across stages and token-aware KV sending.
Its v4 has no KV pruning.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan.blocks import Action, Keep
from pdtrim_deploy.plan.experts import KeptExperts
from pdtrim_deploy.plan.kv import KeyOffsetsFile, KVSend
from pdtrim_deploy.plan.kv_rules import KVRules
from pdtrim_deploy.plan.model_shape import ModelShape
from pdtrim_deploy.plan.stage_blocks import STAGES, Stage, kv_blocks_of

UNIFIED = "model"
"""Folder of the only checkpoint of a unified plan."""
CHECKPOINTS: tuple[str, ...] = (*STAGES, UNIFIED)
"""All folders that a bundle may have a checkpoint in; a plan has those of its `checkpoints`."""


class PDPlan(KVRules):
    """The one contract between building and serving.

    Attributes:
        experts: which experts each stage keeps, where one has fewer than the model; absent from JSON when none.
        unified: both stages are one model in one checkpoint, which prefills and decodes in the same worker, so that no
            KV travels; absent from JSON when false.

    """

    experts: KeptExperts | None = None
    unified: bool = False

    @model_serializer(mode="wrap")
    def _without_none(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans without what came later read as they did before: key offsets, fewer experts, one model, a tail."""
        later = {"key_offsets": None, "experts": None, "unified": False, "kv_only_tail": 0}
        return {key: value for key, value in serialise(self).items() if key not in later or value != later[key]}

    @model_validator(mode="after")
    def _experts_of_layers(self) -> PDPlan:
        if self.experts is not None:
            for stage in STAGES:
                self.experts.check_layers(stage, self.layers(stage))
        return self

    @model_validator(mode="after")
    def _one_model(self) -> PDPlan:
        if not self.unified:
            return self
        for block, (before, after) in enumerate(zip(self.prefill, self.decode, strict=True)):
            if before != after:
                raise ValueError(f"block {block} is {before.kind} in prefill and {after.kind} in decode of one model")
        if self.experts is not None and self.experts.prefill != self.experts.decode:
            raise ValueError("prefill and decode keep other experts of one model")
        for block, send in zip(self.decode_kv_blocks, self.kv, strict=True):
            if send != self.model.rule(block, KVSend()) or self.model.pool_dtype != "native":
                raise ValueError(f"block {block}: KV is cut or quantised, but that of one model goes nowhere")
        if self.key_offsets is not None:
            raise ValueError("key_offsets are of keys on a wire, but KV of one model goes nowhere")
        return self

    @property
    def checkpoints(self) -> dict[str, Stage]:
        """The checkpoints' folders in a bundle, and the stage whose blocks each has: one of a unified plan."""
        return {UNIFIED: "prefill"} if self.unified else {stage: stage for stage in STAGES}

    def folder(self, stage: Stage) -> str:
        """The folder of the checkpoint that runs `stage`."""
        return UNIFIED if self.unified else stage

    def kept_experts(self, stage: Stage) -> dict[int, tuple[int, ...]]:
        """By block, the experts that the stage keeps; empty where it keeps all."""
        return {} if self.experts is None else self.experts.by_block(stage)

    def with_kv(self, kv: tuple[KVSend, ...]) -> PDPlan:
        """The same blocks with other KV rules, validated; of a block with a window they give the wire dtype alone."""
        if len(kv) == len(self.decode_kv_blocks):
            kv = tuple(map(self.model.rule, self.decode_kv_blocks, kv))
        return self.with_parts(kv=kv)

    def with_windows(self, windows: tuple[int | None, ...]) -> PDPlan:
        """The same plan, had the model's blocks these windows: each layer keeps its wire dtype."""
        model = self.model.with_windows(windows)
        kv = tuple(model.rule(block, send) for block, send in zip(self.decode_kv_blocks, self.kv, strict=True))
        return self.with_parts(model=model, kv=kv)

    def with_key_offsets(self, key_offsets: KeyOffsetsFile | None) -> PDPlan:
        """The same blocks and KV rules with other key offsets, or none; validated."""
        return self.with_parts(key_offsets=key_offsets)

    def with_parts(self, **parts: Any) -> PDPlan:
        """The same plan with other values of some attributes, validated (a `model_copy` would keep cached digests)."""
        return PDPlan(**({name: getattr(self, name) for name in type(self).model_fields} | parts))

    def canonical_json(self) -> str:
        """The one text of this plan: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def __hash__(self) -> int:
        """Of the digest: a chunk's layout is looked up by its plan, many times a second."""
        return hash(self.digest)

    @classmethod
    def parse(cls, data: Any, where: str) -> PDPlan:
        """A plan from parsed JSON; UserError names `where` it came from and what is wrong."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{where}: not a valid plan: {place + ': ' if place else ''}{first['msg']}") from None

    @classmethod
    def load(cls, path: Path) -> PDPlan:
        """Read plan.json; UserError when missing, not JSON, or against the invariants."""
        try:
            return cls.parse(json.loads(path.read_text()), str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such plan; build the bundle first") from None
        except (ValueError, RecursionError) as error:  # of JSON, or of its bytes; nested without end
            raise UserError(f"{path}: not JSON ({error}); build the bundle again") from None

    @classmethod
    def dense(cls, model: ModelShape) -> PDPlan:
        """Nothing removed, everything sent: the control."""
        keep = (Keep(),) * model.num_blocks
        return cls.uncut(model, keep, keep)

    @classmethod
    def uncut(cls, model: ModelShape, prefill: tuple[Action, ...], decode: tuple[Action, ...]) -> PDPlan:
        """Stages that run these blocks, and are sent every row that decode reads."""
        kv = tuple(model.rule(block, KVSend()) for block in kv_blocks_of(model, decode))
        return cls(model=model, prefill=prefill, decode=decode, kv=kv)
