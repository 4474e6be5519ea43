"""Networks and other sources of embeddings, each in its own file; a name is loaded from there when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adq_wds.models.diffusion import Latent, SDEdit, load_scheduler, load_sdedit, load_unet

BUILTIN_NAMES = ("builtin", "builtin-free")
SHIPPED_ENCODERS = (*BUILTIN_NAMES, "thumbnail")

__all__ = [
    "BUILTIN_NAMES",
    "SHIPPED_ENCODERS",
    "Latent",
    "SDEdit",
    "load_scheduler",
    "load_sdedit",
    "load_unet",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'adq_wds.models' has no attribute {name!r}")
    return getattr(import_module("adq_wds.models.diffusion"), name)
