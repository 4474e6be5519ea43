"""Which networks does timm know, and under which names?"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import timm.models

from adq_wds.errors import shorten

HUB_PREFIXES = ("hf_hub:", "hf-hub:")


def is_timm_name(name: str) -> bool:
    """Whether `timm_encoder` takes the name: a timm model, with or without a tag, or a hub id with prefix.

    >>> is_timm_name("resnet18"), is_timm_name("resnet18.a1_in1k"), is_timm_name("hf_hub:timm/resnet18.a1_in1k")
    (True, True, True)
    >>> is_timm_name("resnet-18"), is_timm_name("resnet18.a9"), is_timm_name("timm/resnet18.a1_in1k")
    (False, False, False)
    """
    prefix, colon, rest = name.partition(":")
    if prefix + colon in HUB_PREFIXES:
        return bool(rest)
    architecture, dot, _ = name.partition(".")
    if "/" in name or not timm.is_model(architecture) or architecture in timm.models.get_deprecated_models():
        return False
    return not dot or name in timm.list_models(f"{architecture}.*", include_tags=True)


def close_timm_names(name: str, n: int = 5) -> list[str]:
    """Up to `n` timm names that `name` may have meant, the likeliest first.

    >>> close_timm_names("resnet-18")[:2], close_timm_names("resnet18.tv")[:1]
    (['resnet18', 'resnetv2_18'], ['resnet18.tv_in1k'])
    """
    wanted = name.rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower().replace("-", "_")
    renamed = timm.models.get_deprecated_models().get(wanted)
    if renamed:
        return [renamed]
    architecture, dot, _ = wanted.partition(".")
    if dot and timm.is_model(architecture):
        tagged = timm.list_models(f"{architecture}.*", include_tags=True)
        return difflib.get_close_matches(wanted, tagged, n=n, cutoff=0.0)
    known = timm.list_models()
    if wanted in known:
        return [wanted]
    return (
        difflib.get_close_matches(architecture, known, n=n)
        or [k for k in known if architecture and architecture in k][:n]
    )


def check_timm_name(name: str) -> None:
    """Raise `ValueError` with close names unless timm knows `name`."""
    if is_timm_name(name):
        return
    close = ", ".join(close_timm_names(name))
    hub = (
        f", or {HUB_PREFIXES[0] + name!r} for a model of the Hugging Face Hub" if name.count("/") == 1 else ""
    )
    raise ValueError(
        f"unknown timm model {shorten(name)}; close names: {close or 'none'}{hub}; timm.list_models() lists all"
    )


def pretrained_config(name: str, *, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """What timm notes about a model's weights: input size, classes, classifier layer, where they come from.

    A name with a hub prefix asks the Hub, or its cache in `cache_dir`, for the model's `config.json`.
    """
    prefix, colon, rest = name.partition(":")
    if prefix + colon in HUB_PREFIXES:
        return dict(timm.models.load_model_config_from_hf(rest, cache_dir=cache_dir)[0])
    config: Any = timm.get_pretrained_cfg(name)
    return config.to_dict() if config is not None else {}
