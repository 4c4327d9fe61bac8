"""The families there are, and the family of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.families.base import CAUSAL_LM, Family
from pdtrim_deploy.models.families.latents import LATENT_KEY, latent_sizes
from pdtrim_deploy.models.families.plain_kv import check_plain


def read_family(file: Path) -> Family:
    """A family's file; ValueError names the key that is wrong."""
    try:
        return Family.model_validate(yaml.safe_load(file.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _read_all() -> dict[str, Family]:
    """In the files' order of names, dense families first."""
    families = [read_family(file) for file in sorted(Path(__file__).parent.glob("*.yaml"))]
    families.sort(key=lambda family: family.blocks is not None and family.blocks.experts is not None)
    return {family.architecture: family for family in families}


_FILES = _read_all()
FAMILIES: dict[str, Family] = {name: family for name, family in _FILES.items() if family.blocks}
"""Families whose blocks are known, by architecture."""
LATENT: dict[str, Family] = {name: family for name, family in _FILES.items() if family.latents}
"""Families with latent attention."""
WINDOWED: dict[str, Family] = {name: family for name, family in _FILES.items() if family.windows}
"""Families with sliding windows that are sent."""
STATEFUL: dict[str, Family] = {name: family for name, family in _FILES.items() if family.linear_attention}
"""Families with linear attention, whose states are sent."""


def known_family(architecture: str) -> Family:
    """The family of that architecture; one of which the KV alone is known where there is no file of it."""
    return _FILES.get(architecture) or Family(architecture=architecture)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that config.json names.

    Raises:
        UserError: no causal LM, or one whose KV is not plain: one sentence with what is missing.

    """
    named = config.get("architectures") or [f"none (model_type {config.get('model_type')!r})"]
    family = known_family(named[0])
    takes = {"takes_latents": family.latents is not None, "takes_states": family.linear_attention is not None}
    check_plain(config, where, takes_windows=family.takes_windows, **takes)
    if not CAUSAL_LM.fullmatch(named[0]):
        raise UserError(
            f"{where}: architecture {named[0]} is not supported: it is no causal LM; give a *ForCausalLM whose KV is "
            f"plain; blocks can be cut of {', '.join(FAMILIES)}"
        )
    family.block_windows(config, where)
    family.linear_states(config, where)
    if family.latents and latent_sizes(config) is None:
        raise UserError(f"{where}: key {LATENT_KEY} is missing, which {named[0]} has; get the model again")
    experts = family.blocks.experts if family.blocks else None
    for needs, reader in (
        (family.blocks.needs if family.blocks else {}, "the oracle computes"),
        (experts.needs if experts else {}, "SGLang reads"),
        (family.latents.implied if family.latents else {}, "SGLang and transformers both read"),
    ):
        for key, value in needs.items():
            if config.get(key, value) != value:
                raise UserError(
                    f"{where}: key {key} is {config[key]!r}; allowed for {named[0]}: {value!r}, as {reader} no other"
                )
    return family
