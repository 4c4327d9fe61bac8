"""Model families as data: of each file here the blocks are known; of any other plain causal LM, its KV."""

from pdtrim_deploy.models.families.base import Family
from pdtrim_deploy.models.families.registry import FAMILIES, LATENT, STATEFUL, WINDOWED, family_of, known_family
from pdtrim_deploy.models.families.sizes import attention_sizes

__all__ = ["FAMILIES", "LATENT", "STATEFUL", "WINDOWED", "Family", "attention_sizes", "family_of", "known_family"]
