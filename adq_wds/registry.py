"""Finds encoders, scores, importances and allocations by name; a new one is a function and a line here.

The command reads the names before it runs anything, so torch, Pillow and Arrow are imported in functions.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from adq_wds.core.allocation import adaptive, published, uniform
from adq_wds.errors import AdqError, reason_of
from adq_wds.models import SHIPPED_ENCODERS

if TYPE_CHECKING:
    from adq_wds.protocols import Allocation, Encoder, Importance
    from adq_wds.score import Score

ALLOCATIONS: dict[str, Allocation] = {"adaptive": adaptive, "published": published, "uniform": uniform}
SCORES = ("texture", "diversity")  # both in every plan's bins
BUILT_IN_SCORES = (*SCORES, "difficulty")  # others are `Score`s of users
IMPORTANCES = ("gradcam++", "gradcam", "attention", "texture", "random")
Kernel = Literal["features", "gradient"]
BinsBy = Literal["graphcut", "difficulty"]
HEADS = ("none", "contrastive")
GONE = {  # names and flags that were offered once, and what took their place
    "paper": "it is gone, as an untrained head sees next to nothing: take contrastive or none",
    "--double-softmax": "it is gone: --logit-grad keeps the gradients of one softmax",
}
ENTRY_POINTS = "adq_wds"  # groups adq_wds.encoders, .scores and .importances of installed packages


def encoder(spec: str | Encoder | Callable[..., Any] = "builtin", **options: Any) -> Encoder:
    """The encoder for a name, an object or a function.

    Args:
        spec: ``builtin`` (a small network that comes with the package, trained with labels on CIFAR-10 train),
            ``builtin-free`` (the same, trained without labels), ``thumbnail`` (8×8 mean colours, no weights),
            any timm name (``resnet18.a1_in1k``, ``hf_hub:…``), an object that is an `Encoder` already, or a
            function of a list of PIL images that gives embeddings (B, D), or embeddings and logits.
        options: for the built-in networks: device, amp, channels_last, compile. For timm: these, and checkpoint,
            pretrained, head, image_size, allow_pickle, cache_dir. For a function: name (required), revision,
            preprocessing_hash, transform.

    Raises:
        ValueError: an unknown name (close ones are listed), or options that do not fit.
        AdqError: a checkpoint is damaged, does not fit, or cannot be fetched.
    """
    if not isinstance(spec, str):
        return _encoder_object(spec, options)
    if spec in SHIPPED_ENCODERS:
        return _shipped(spec, options)
    offered = _installed("encoders", spec)
    if offered is not None:
        return _encoder_object(_made("encoder", spec, offered, options), {})
    from adq_wds.models.timm_encoder import timm_encoder

    return timm_encoder(spec, **options)


def _shipped(name: str, options: dict[str, Any]) -> Encoder:
    """An encoder whose weights are in the package."""
    known = ["device"] if name == "thumbnail" else ["amp", "channels_last", "compile", "device"]
    _no_others(f"encoder {name!r} takes no options but {_as_arguments(known)}", options, known)
    if name == "thumbnail":
        from adq_wds.models.thumbnail import Thumbnail

        return Thumbnail()
    from adq_wds.models.builtin import builtin_encoder

    return builtin_encoder(name, **options)


def _no_others(rule: str, options: dict[str, Any], known: list[str]) -> None:
    """Raise `ValueError` if there are options beside those that are known."""
    if surplus := sorted(options.keys() - known):
        raise ValueError(f"{rule}, got {_as_arguments(surplus)}; leave them out")


def _as_arguments(names: list[str]) -> str:
    return ", ".join(f"{name}=" for name in names)


def _encoder_object(spec: Any, options: dict[str, Any]) -> Encoder:
    if not callable(spec):
        raise ValueError(f"encoder must be a name, an encoder or a function, got {spec!r}")
    if all(hasattr(spec, name) for name in ("name", "revision", "preprocessing_hash")):
        if options:
            raise ValueError(f"encoder {spec.name!r} is ready made; options {sorted(options)} do not apply")
        return spec  # type: ignore[no-any-return]
    if "name" not in options:
        raise ValueError("a function as encoder needs name=, which tells its features from others")
    from adq_wds.models.callables import CallableEncoder

    return CallableEncoder(spec, **options)


named_encoder = encoder  # where `encoder` is an argument


def score(spec: str | Score) -> Score:
    """The user's score for an object or a name.

    Args:
        spec: a `Score`, "FILE.parquet:COLUMN" for a `Column`, or the name under which an installed package offers
            one: an entry point of the group ``adq_wds.scores``, a `Score` or a class of them.

    Raises:
        ValueError: an unknown name, or a score that cannot be used.
        TypeError: not a score.
    """
    from adq_wds.score import check_score

    if not isinstance(spec, str):
        return check_score(spec)
    path, colon, column = spec.rpartition(":")
    if colon and path.endswith(".parquet"):
        from adq_wds.tables.column import Column

        return check_score(Column(path, column))
    offered = _installed("scores", spec)
    if offered is None:
        known = [*BUILT_IN_SCORES, *_installed_names("scores")]
        raise ValueError(unknown("score", spec, difflib.get_close_matches(spec, known) or known))
    made = check_score(_made("score", spec, offered) if isinstance(offered, type) else offered)
    if made.name != spec:
        raise ValueError(f"entry point {spec!r} of adq_wds.scores gives a score named {made.name!r}")
    return made


def importance(
    spec: str | Importance = "gradcam++",
    *,
    patch: int | None = None,
    encoder: str | Encoder | None = None,
    use_labels: bool = True,
    **options: Any,
) -> Importance:
    """The importance of patches for a name, a function or an object.

    Args:
        spec: ``gradcam++`` and ``gradcam`` (where a classifier looked), ``attention`` (where a vision transformer did),
            ``texture``, ``random``; the name of an installed package's entry point in ``adq_wds.importances``, a function
            of ``patch=`` and the options that makes one; or an `Importance`.
        patch: side P of a patch in pixels; 16 by default.
        encoder: the network: a timm name or an encoder, as `encoder` takes it. Without one, both CAMs use
            ``builtin``, a small classifier of the ten classes of CIFAR-10 that sees 32 × 32 pixels; for
            photographs name a better one, such as ``resnet18.a1_in1k``. ``attention`` needs a timm ViT.
        use_labels: explain the class of the label, where `DropPatches` reads one, instead of the predicted
            class.
        options: of the encoder, where it is a name: checkpoint, device, image_size, ...

    Raises:
        ValueError: an unknown name (close ones are listed), an encoder that cannot serve, or options that do not fit.
        AdqError: a checkpoint is damaged, does not fit, or cannot be fetched.

    >>> importance("texture", patch=8)
    TextureImportance(patch=8)
    """
    arguments = {"patch": patch, "encoder": encoder, "use_labels": None if use_labels else False, **options}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if not isinstance(spec, str):
        if isinstance(spec, type) or not callable(spec):
            raise ValueError(f"importance must be a name or an importance, got {spec!r}")
        if arguments:
            raise ValueError(f"importance {spec!r} is ready made; options {sorted(arguments)} do not apply")
        return spec
    from adq_wds.core.patches import PATCH

    arguments.setdefault("patch", PATCH)
    if spec in ("texture", "random"):
        from adq_wds.saliency.plain import RandomImportance, TextureImportance

        _no_others(f"importance {spec!r} looks through no network", arguments, ["patch"])
        return (TextureImportance if spec == "texture" else RandomImportance)(arguments["patch"])
    if spec in IMPORTANCES:
        return _network_importance(spec, **arguments)
    check_importance(spec)
    made = _made("importance", spec, _installed("importances", spec), arguments)
    if not callable(made):
        raise ValueError(
            f"entry point {spec!r} of adq_wds.importances gives {made!r}, which is no importance"
        )
    return made  # type: ignore[no-any-return]


def check_importance(name: str) -> None:
    """Raise `ValueError`, with close names, unless the package or an installed one offers this importance."""
    if name not in IMPORTANCES:
        look_up("importance", name, dict.fromkeys([*IMPORTANCES, *_installed_names("importances")]))


def _network_importance(
    name: str, *, patch: int, use_labels: bool = True, encoder: str | Encoder | None = None, **options: Any
) -> Importance:
    """An importance computed from a network."""
    from adq_wds.models.network_encoder import NetworkEncoder
    from adq_wds.saliency.attention import attention_importance
    from adq_wds.saliency.cam import cam_importance

    if name == "attention" and encoder is None:
        raise ValueError(
            "importance 'attention' needs a vision transformer: give encoder=, such as 'vit_small_patch16_224'"
        )
    if name == "attention" and not use_labels:
        raise ValueError("importance 'attention' explains no class; leave use_labels out")
    network = named_encoder("builtin" if encoder is None else encoder, **options)
    if not isinstance(network, NetworkEncoder):
        raise ValueError(
            f"importance {name!r} cannot look into the encoder {network.name!r}; take "
            + ("a ViT of timm" if name == "attention" else "builtin, or a timm network with a classifier")
        )
    if name == "attention":
        return attention_importance(network, patch=patch)
    return cam_importance(network, method=name, patch=patch, use_labels=use_labels)


def _made(kind: str, name: str, factory: Callable[..., Any], options: dict[str, Any] | None = None) -> Any:
    """The object that an installed package's factory makes; its errors become one line."""
    try:
        return factory(**options or {})
    except (AdqError, ValueError):
        raise
    except Exception as error:
        raise AdqError(f"{kind} {name!r} cannot be made: {reason_of(error)}") from error


def _installed_names(kind: str) -> list[str]:
    return sorted(point.name for point in importlib.metadata.entry_points(group=f"{ENTRY_POINTS}.{kind}"))


def _installed(kind: str, name: str) -> Any:
    """The object that an installed package offers under this name, loaded now; None without one.

    Raises:
        ValueError: two packages offer the name, or it cannot be loaded.
    """
    points = list(importlib.metadata.entry_points(group=f"{ENTRY_POINTS}.{kind}", name=name))
    if not points:
        return None
    if len({point.value for point in points}) > 1:
        raise ValueError(
            f"{kind[:-1]} {name!r} is offered by two packages: {points[0].value} and {points[1].value}; remove one"
        )
    try:
        return points[0].load()
    except Exception as error:
        raise ValueError(
            f"{kind[:-1]} {name!r} ({points[0].value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def look_up(kind: str, name: str, known: dict[str, Any]) -> Any:
    """`known[name]`, or a `ValueError` that lists close names."""
    if name in GONE and name not in known:
        raise ValueError(f"no {kind} {name!r}; {GONE[name]}")
    if name not in known:
        raise ValueError(unknown(kind, name, difflib.get_close_matches(str(name), known) or list(known)))
    return known[name]


def unknown(kind: str, name: object, close: Iterable[str]) -> str:
    """The error text for an unknown name."""
    return f"unknown {kind} {name!r}; did you mean {', '.join(close)}?"
