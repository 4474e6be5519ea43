"""Builds timm networks by name, with the weights of a local checkpoint, checked strictly, or of timm's own loading."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch

from adq_wds.errors import AdqError, reason_of, shorten
from adq_wds.models import SHIPPED_ENCODERS
from adq_wds.models.checkpoints import State, common_prefix, load_weights, misfit

log = logging.getLogger("adq_wds")

HUB_PREFIXES = ("hf_hub:", "hf-hub:")


def load_pretrained(
    name: str, *, pretrained: bool, image_size: int | None, cache_dir: str | Path | None
) -> torch.nn.Module:
    """A timm network with timm's pretrained weights, or with random ones.

    Raises:
        AdqError: the weights cannot be fetched; states the source and the remedy.
    """
    config = _config(name, cache_dir)
    if not pretrained:
        log.warning("encoder %s has random weights (pretrained=False): for trying things out only", name)
    try:
        return _create(name, config, pretrained=pretrained, image_size=image_size, cache_dir=cache_dir)
    except Exception as error:  # hub clients, sockets and timm each fail in their own ways
        if not pretrained:
            raise
        raise _unfetched(name, config, error) from error


def load_checkpoint(
    name: str, path: Path, *, image_size: int | None, allow_pickle: bool, cache_dir: str | Path | None
) -> tuple[torch.nn.Module, str]:
    """A timm network with all its weights from a file, as many classes as the file's classifier, and its SHA-256.

    Weights in timm's own layout are taken as they are. Others (the authors' original files), and position
    embeddings when `image_size` asks for another grid, go through the network's converter in timm. Weights behind a
    prefix (``model.``, ``net.backbone.``) are matched by the network's names; a warning names what is left out.

    Raises:
        ValueError: the file is missing, of a refused kind, or of another network; lists the differences.
        AdqError: the file is damaged.
    """
    weights = load_weights(path, allow_pickle=allow_pickle)
    state = weights.state
    config = _config(name, cache_dir)

    def create(n_classes: int | None) -> torch.nn.Module:
        return _create(name, config, image_size=image_size, cache_dir=cache_dir, num_classes=n_classes)

    model, difference = _fitted(state, config, create, resize=image_size is not None)
    if difference and (inner := _inner_state(state, model, config, path)) is not None:
        model, difference = _fitted(inner, config, create, resize=image_size is not None)
    if difference:
        shared = common_prefix(state)
        prefix = f" (all names start with {shorten(shared)})" if shared else ""
        raise ValueError(
            f"checkpoint {path} does not fit {name!r}: {difference}{prefix}; name the network it was made for"
        )
    return model, weights.sha256


def _fitted(
    state: State, config: dict[str, Any], create: Callable[[int | None], torch.nn.Module], *, resize: bool
) -> tuple[torch.nn.Module, str]:
    """A network with all the weights of a state, and no misfit; or without them, and how the state differs."""
    n_classes = _count_classes(state, config)
    model = create(n_classes)
    if state.keys() != model.state_dict().keys() or (resize and misfit(model, state)):
        converted = _convert(state, model)
        if (n_converted := _count_classes(converted, config)) != n_classes:
            model = create(n_converted)
        if not misfit(model, converted):
            state = converted
    difference = misfit(model, state)
    if not difference:
        model.load_state_dict(state)
    return model, difference


def _inner_state(state: State, model: torch.nn.Module, config: dict[str, Any], path: Path) -> State | None:
    """The part of a state whose names are the network's behind a prefix (``model.``, ``backbone.``); None without one.

    Raises:
        ValueError: several parts fit, such as a student and its teacher.
    """
    classifier = config.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    names = [
        name
        for name in model.state_dict()
        if not name.startswith(heads) and not name.endswith("num_batches_tracked")
    ]
    prefixes = {key.removesuffix(names[0]) for key in state if f".{key}".endswith(f".{names[0]}")}
    parts = {
        prefix: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in sorted(prefixes)
        if all(prefix + name in state for name in names)
    }
    if len(parts) > 1:
        raise ValueError(
            f"checkpoint {path}: holds several such networks, behind {shorten(list(parts))}; save the weights of one"
        )
    if not parts:  # the authors' names behind a prefix, which timm's converter does not know
        prefix = common_prefix(state)
        return {key.removeprefix(prefix): value for key, value in state.items()} if prefix else None
    ((prefix, part),) = parts.items()
    if not prefix:  # nothing to look into: what else is there does not belong to the network
        return None
    if len(part) < len(state):
        others = sorted({key.split(".")[0] for key in state if not key.startswith(prefix)})
        log.warning(
            "checkpoint %s: the %d weights behind %s are taken, the %d of %s are not",
            path, len(part), shorten(prefix), len(state) - len(part), shorten(others),
        )  # fmt: skip
    return part


def _create(name: str, config: dict[str, Any], *, image_size: int | None, **options: Any) -> torch.nn.Module:
    # only networks built for one size (position embeddings, windows) take a size when they are made
    fixed = {"img_size": image_size} if image_size is not None and config.get("fixed_input_size") else {}
    create: Any = timm.create_model
    model: torch.nn.Module = create(name, **fixed, **options)
    return model


def _config(name: str, cache_dir: str | Path | None) -> dict[str, Any]:
    """timm's configuration of a model's weights: input size, classes, classifier layer, source.

    For a name with a hub prefix, the model's `config.json` is read from the Hub or its cache in `cache_dir`.
    """
    try:
        if name.startswith(HUB_PREFIXES):
            hub_id = name.partition(":")[2]
            return dict(timm.models.load_model_config_from_hf(hub_id, cache_dir=cache_dir)[0])
        config: Any = timm.get_pretrained_cfg(name)
        return config.to_dict() if config is not None else {}
    except Exception as error:  # hub clients and sockets each fail in their own ways
        raise _unfetched(name, {}, error) from error


def _unfetched(name: str, config: dict[str, Any], error: Exception) -> AdqError:
    source = config.get("hf_hub_id") or config.get("url") or name.partition(":")[2] or "no known source"
    return AdqError(
        f"timm model {name!r}: its weights or configuration cannot be loaded; tried {source} and the local cache "
        f"({reason_of(error)}); with the weights in a local file give checkpoint=FILE.safetensors"
    )


def _count_classes(state: State, config: dict[str, Any]) -> int | None:
    """Rows of the classifier in a state; 0 when it is not there, None (timm's default) when its name is unknown."""
    names = config.get("classifier")
    if not names:
        return None
    first = names if isinstance(names, str) else names[0]
    weight = state.get(f"{first}.weight")
    return 0 if weight is None else weight.shape[0]


def _convert(state: State, model: torch.nn.Module) -> State:
    """A state in timm's layout, made by timm's converter for this family of networks."""
    converter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if converter is None:
        return state
    try:
        return dict(converter(dict(state), model))
    except Exception as error:  # a converter met with another network's weights fails anywhere
        log.debug("timm's converter for %s: %s: %s", type(model).__name__, type(error).__name__, error)
        return state  # the caller lists how it differs


def check_timm_name(name: str) -> None:
    """Raise `ValueError` unless timm knows the name: a model, with or without a tag, or a hub id with prefix."""
    prefix, colon, rest = name.partition(":")
    architecture, dot, _ = name.partition(".")
    if prefix + colon in HUB_PREFIXES:
        known = bool(rest)
    elif (
        "/" in name or not timm.is_model(architecture) or architecture in timm.models.get_deprecated_models()
    ):
        known = False
    else:
        known = not dot or name in timm.list_models(f"{architecture}.*", include_tags=True)
    if not known:
        close = difflib.get_close_matches(name, SHIPPED_ENCODERS) + close_timm_names(name)
        if name.count("/") == 1:  # a model of the Hugging Face Hub?
            close.append(HUB_PREFIXES[0] + name)
        names = ", ".join(close) or f"{', '.join(SHIPPED_ENCODERS)}, or one of timm.list_models()"
        raise ValueError(f"unknown encoder {shorten(name)}; did you mean {names}?")


def close_timm_names(name: str, n: int = 5) -> list[str]:
    """Up to `n` timm names close to `name`, the closest first.

    >>> close_timm_names("resnet-18")[:2], close_timm_names("resnet18.tv")[:1]
    (['resnet18', 'resnetv2_18'], ['resnet18.tv_in1k'])
    """
    wanted = name.rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower().replace("-", "_")
    if renamed := timm.models.get_deprecated_models().get(wanted):
        return [renamed]
    architecture, dot, _ = wanted.partition(".")
    if dot and timm.is_model(architecture):
        tagged = timm.list_models(f"{architecture}.*", include_tags=True)
        return difflib.get_close_matches(wanted, tagged, n=n, cutoff=0.0)
    known = timm.list_models()
    containing = [each for each in known if architecture and architecture in each]
    return difflib.get_close_matches(architecture, known, n=n) or containing[:n]
