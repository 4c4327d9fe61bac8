"""A model's shape from config.json alone: a user's file, or the facts of well-known models that we ship."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.paths import expanded
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.families import attention_sizes, family_of, known_family
from pdtrim_deploy.models.families.latents import latent_sizes
from pdtrim_deploy.plan import ExpertShape, ModelShape, NativeDtype

FACTS = Path(__file__).parent / "facts"  # a link to recipes/facts


@dataclass(frozen=True)
class Sized:
    """A shape without weights.

    Attributes:
        label: the model's name for a reader.
        origin: the file it came from.
        kv_dtype: of the weights, hence of a KV pool; None where config.json does not say.
        config: config.json's keys and values.
        experts: None where blocks have none, or are not known.

    """

    label: str
    origin: str
    architecture: str
    num_blocks: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    kv_dtype: NativeDtype | None
    experts: ExpertShape | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def shape(self, kv_dtype: NativeDtype) -> ModelShape:
        """As a plan needs it; the fingerprint says that no weights were seen."""
        return shape_of(self.config, self.label, kv_dtype)


def shape_of(config: Mapping[str, Any], label: str, kv_dtype: NativeDtype) -> ModelShape:
    """The same of config.json's keys and values."""
    _, kv_heads, head_dim = attention_sizes(config)
    return ModelShape(
        architecture=config["architectures"][0],
        fingerprint=f"config-only:{label}",
        num_blocks=config["num_hidden_layers"],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        kv_dtype=kv_dtype,
        windows=known_family(config["architectures"][0]).block_windows(config),
        rope_dim=latents.rope if (latents := latent_sizes(config)) else None,
        states=known_family(config["architectures"][0]).linear_states(config, dtype=kv_dtype),
    )


def shipped() -> dict[str, Path]:
    """Names and files of the models whose facts we ship."""
    return {file.stem: file for file in sorted(FACTS.glob("*.json"))}


def find_config(text: str) -> Path | None:
    """The file that `text` means: a config.json, a folder with one, or a shipped name in any case; else None."""
    path = expanded(text)
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    return shipped().get(text.lower())


def shipped_for(source: str) -> Path | None:
    """The facts of the model that a recipe's `model.source` names."""
    return next((f for f in shipped().values() if source in json.loads(f.read_text())["_facts"]["sources"]), None)


def config_of(source: str) -> Path | None:
    """The config.json of the model that a recipe names, where it is here or shipped: nothing is fetched."""
    kind, _, place = source.partition(":")
    if kind == "hf" and (local := expanded(place) / "config.json").is_file():
        return local
    return shipped_for(source)


def read_sized(path: Path) -> Sized:
    """The shape that a config.json gives.

    Raises:
        UserError: not a model's config.json, KV that is not plain, a stage of a bundle, or no such dtype of KV.

    """
    config = read_config(path)
    family = family_of(config, str(path))
    if "pdtrim" in config:
        raise UserError(f"{path}: one stage of a bundle; give the bundle's folder {path.parent.parent}")
    ours = path in shipped().values()
    _, kv_heads, head_dim = attention_sizes(config)
    return Sized(
        label=path.resolve().parent.name if path.name == "config.json" else path.stem,
        origin=f"shipped facts of {config['_facts']['model']}" if ours else str(path),
        architecture=family.architecture,
        num_blocks=config["num_hidden_layers"],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=config["max_position_embeddings"],
        kv_dtype=_dtype(config, path),
        experts=family.expert_shape(config),
        config=config,
    )


def _dtype(config: dict[str, Any], path: Path) -> NativeDtype | None:
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None and dtype not in get_args(NativeDtype):
        raise UserError(f"{path}: dtype is {dtype!r}; a KV pool is one of {', '.join(get_args(NativeDtype))}")
    return dtype
