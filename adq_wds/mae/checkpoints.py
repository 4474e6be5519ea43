"""Loads and saves masked autoencoders: ours, the authors' or the Hub's, recognised by their keys, loaded strictly."""

from __future__ import annotations

import json
import logging
import math
import operator
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm.layers
import torch

from adq_wds.errors import AdqError, shorten
from adq_wds.files import atomic_path
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.models.checkpoints import State, common_prefix, load_shipped, load_weights, with_weights
from adq_wds.models.forward import pick_device

log = logging.getLogger("adq_wds")

BUILTIN_MAE = Path(__file__).with_name("weights") / "builtin-mae.safetensors"
HEADER_ENTRY = "mae"
HEADS = {"heads": {768: 12, 1024: 16, 1280: 16}, "decoder_heads": {512: 16}}
"""Heads by width, of the published encoders (base, large and huge) and of the decoder they have in common."""
MAX_NUMBER = 2**63  # beside the tensors; an integer in JSON may have thousands of digits
MAX_BLOCKS = 128  # huge has 32; all that a file names are made before they are compared
_IN_SHAPES = ("width", "depth", "decoder_width", "decoder_depth", "patch")
# Settings beside the tensors: types by our name, and our names for entries of transformers' config.json.
_TYPES: dict[str, tuple[type, ...]] = {
    "heads": (int,), "decoder_heads": (int,), "norm_pix": (bool,), "norm_eps": (int, float), "image_size": (int, list),
    "mean": (list,), "std": (list,), "fill": (bool,),
}  # fmt: skip
_HUB_CONFIG = {
    "num_attention_heads": "heads", "decoder_num_attention_heads": "decoder_heads", "norm_pix_loss": "norm_pix",
    "layer_norm_eps": "norm_eps", "image_size": "image_size",
}  # fmt: skip


def load_mae(
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
    norm_pix: bool | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
) -> MaskedAutoencoder:
    """A trained masked autoencoder, frozen, in evaluation mode, float32.

    Args:
        path: ``builtin`` for the small one that comes with the package (32×32 images, 4×4 patches, trained on CIFAR-10
            train); a file that `save_mae` wrote; or the authors' `mae_visualize_vit_*.pth`; or weights of transformers'
            ViTMAEForPreTraining (`facebook/vit-mae-*`), with `config.json` beside them, or the folder of both.
        image_size: side, or (height, width), of the images to rebuild when not those it was trained for: position
            embeddings are interpolated.
        heads: of encoder and decoder, where the file lacks them and the widths are not those of base, large, huge.
        norm_pix: whether it was trained on normalised pixels, where the file lacks it (the authors' and the
            Hub's visualisation weights were not).
        device: `cpu`, `cuda`, `cuda:1`, ..., or `auto` (cuda when there is one, else cpu).
        allow_pickle: read PyTorch's pickle format too: tensors only, no code is run.

    Raises:
        ValueError: no such file, a refused kind, an encoder without its decoder, another network (lists the keys
            that do not fit), or a size or number of heads that cannot be.
        AdqError: the file, its header or `config.json` is damaged.

    Source: He et al. 2022 (arXiv 2111.06377); the built-in one is ours, see `examples/train_mae.py`.

    >>> mae = load_mae("builtin")
    >>> mae.reconstruct(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.ones(1, 64, dtype=torch.bool)).shape
    torch.Size([1, 32, 32, 3])
    """
    shipped = path == "builtin"
    if shipped and (image_size, heads, norm_pix, allow_pickle) != (None, None, None, False):
        raise ValueError(
            "the built-in network is as it is: image_size, heads, norm_pix, allow_pickle go with a file"
        )
    if heads is not None and (not isinstance(heads, tuple | list) or [type(n) for n in heads] != [int, int]):
        raise ValueError(f"heads={heads!r}: expected two integers, of encoder and decoder")
    if norm_pix is not None and type(norm_pix) is not bool:
        raise ValueError(f"norm_pix={norm_pix!r}: expected True or False")
    new_size = None if image_size is None else _pair(image_size)
    torch_device = pick_device(device)
    path = BUILTIN_MAE if shipped else _weights_file(Path(path))
    weights = load_shipped(path) if shipped else load_weights(path, allow_pickle=allow_pickle)
    state, entry = weights.state, weights.header.get(HEADER_ENTRY)
    is_hub = entry is None and any(key.startswith("vit.") for key in state)
    if is_hub:
        state = from_hub(state)
    if "decoder_pred.weight" not in state and (prefix := common_prefix(state)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    settings = _settings(path, entry, is_hub)
    if heads is not None:
        settings |= {"heads": heads[0], "decoder_heads": heads[1]}
    if norm_pix is not None:
        settings["norm_pix"] = norm_pix
    size = _size_of(state, settings, path)
    try:
        network = with_weights(lambda: MaskedAutoencoder(size), state)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is not a masked autoencoder of {size}: {error}") from error
    if entry is None:
        log.warning(
            "checkpoint %s has the layout of %s; Meta's released weights are under CC-BY-NC 4.0: not for commercial use",
            path,
            "transformers' ViTMAE" if is_hub else "the MAE authors",
        )
    if new_size is not None:
        network = _at_size(network, new_size)
    H, W = network.size.image_size
    network.revision = f"file-sha256={weights.sha256};image_size={H}x{W};norm_pix={network.size.norm_pix}"
    return network.eval().requires_grad_(False).to(torch_device)


def save_mae(network: MaskedAutoencoder, path: str | os.PathLike[str], header: dict[str, str]) -> None:
    """Write a network as float16 safetensors, whole or not at all.

    Parameters keep their names (the authors'); the entry `mae` of the header holds as JSON the settings that shapes
    do not show.

    Args:
        header: further entries of the file's header, for people.
    """
    settings = {k: v for k, v in asdict(network.size).items() if k not in _IN_SHAPES}
    state = {name: value.cpu().half().contiguous() for name, value in network.state_dict().items()}
    content = safetensors.torch.save(state, metadata={**header, HEADER_ENTRY: json.dumps(settings)})
    with atomic_path(path) as partial:  # `save_file` would make it readable for its owner alone
        Path(partial).write_bytes(content)


def _weights_file(path: Path) -> Path:
    """The file of weights in a folder as the Hub has them; a file is itself."""
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"checkpoint {path}: the folder holds neither model.safetensors nor pytorch_model.bin")


def _settings(path: Path, entry: str | None, is_hub: bool) -> dict[str, Any]:
    """The settings beside the tensors, under our names: from our header entry or transformers' `config.json`."""
    if entry is not None:
        return _checked(entry, f"checkpoint {path}: header entry {HEADER_ENTRY!r}", {n: n for n in _TYPES})
    config = path.with_name("config.json")
    if not is_hub or not config.is_file():
        return {}
    return _checked(config.read_text(encoding="utf-8", errors="replace"), str(config), _HUB_CONFIG)


def _checked(text: str, source: str, names: dict[str, str]) -> dict[str, Any]:
    """The known entries of a JSON object, checked by type, under our names."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdqError(f"{source}: not JSON ({shorten(str(error))}); fetch the file again") from error
    if not isinstance(content, dict):
        raise AdqError(f"{source}: {shorten(content)}, expected a JSON object; fetch the file again")
    settings = {}
    for name in content.keys() & names.keys():
        value, types = content[name], _TYPES[names[name]]
        items = value if isinstance(value, list) else [value]
        in_range = all(type(x) in (int, float) and abs(x) < MAX_NUMBER for x in items)  # no NaN either
        if type(value) not in types or not (in_range or bool in types):
            raise AdqError(f"{source}: {name} is {shorten(value)}; fetch the file again")
        settings[names[name]] = tuple(value) if isinstance(value, list) else value
    return settings


# From tensors to a network


def from_hub(state: State) -> State:
    """Tensors with the authors' names, of transformers' ViTMAEForPreTraining: as published, or of version 5."""
    renamed = {_authors_name(key): value for key, value in state.items()}
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


_HUB_BLOCK = re.compile(
    r"(?:vit\.(?:encoder\.layer|layers)|(decoder)\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)\.(weight|bias)"
)
_HUB_IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    **{f"attention.{a}": f"attn.{a[0]}" for a in ("q_proj", "k_proj", "v_proj")},
    **{f"attention.attention.{a}": f"attn.{a[0]}" for a in ("query", "key", "value")},
    "attention.o_proj": "attn.proj",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HUB_REST = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "vit.layernorm.": "norm.",
    "decoder.": "",
}


def _authors_name(key: str) -> str:
    if match := _HUB_BLOCK.fullmatch(key):
        decoder, number, inside, kind = match.groups()
        blocks = "decoder_blocks" if decoder else "blocks"
        return f"{blocks}.{number}.{_HUB_IN_BLOCK.get(inside, inside)}.{kind}"
    for theirs, ours in _HUB_REST.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _size_of(state: State, settings: dict[str, Any], path: Path) -> MaeSize:
    """The size of the network, from the shapes of its tensors and the settings beside them."""
    if "decoder_pred.weight" not in state:
        kind = "no masked autoencoder"
        if any("decoder" in key for key in state):
            kind = "a masked autoencoder of another layout than the authors' or transformers'"
        elif any("patch_embed" in key for key in state):  # timm's, the authors' and the Hub's names for it
            kind = "an encoder without its decoder"
        first = ", ".join(shorten(key, 40) for key in list(state)[:3])
        raise ValueError(
            f"checkpoint {path}: holds {kind} (keys {first}, ...), so it cannot rebuild images; take "
            "mae_visualize_vit_*.pth or facebook/vit-mae-*, which have both"
        )
    for key, n_dims in {"patch_embed.proj.weight": 4, "decoder_embed.weight": 2, "pos_embed": 3}.items():
        if key not in state or state[key].ndim != n_dims or not state[key].numel():
            shape = f"of shape {tuple(state[key].shape)}" if key in state else "missing"
            raise ValueError(f"checkpoint {path}: {key} is {shape}, expected {n_dims} dimensions, none empty")
    patch, L = state["patch_embed.proj.weight"].shape[2], state["pos_embed"].shape[1] - 1
    decoder_width, width = state["decoder_embed.weight"].shape
    try:
        sizes = {
            "patch": patch, "width": width, "depth": _count_blocks(state, "blocks"),
            "decoder_width": decoder_width, "decoder_depth": _count_blocks(state, "decoder_blocks"),
            "heads": HEADS["heads"].get(width), "decoder_heads": HEADS["decoder_heads"].get(decoder_width), **settings,
        }  # fmt: skip
        for name, of_width in (("heads", width), ("decoder_heads", decoder_width)):
            if sizes[name] is None:
                raise ValueError(
                    f"does not say how many {name} a width of {of_width} has; give heads=(encoder, decoder)"
                )
        sizes["image_size"] = _pair(sizes.get("image_size", math.isqrt(max(L, 0)) * patch))
        size = MaeSize(**sizes)
        if size.n_patches != L:
            raise ValueError(
                f"{L} position embeddings, {size.n_patches} patches of {patch} in {size.image_size}"
            )
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    return size


def _count_blocks(state: State, name: str) -> int:
    n = len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})
    if n > MAX_BLOCKS:
        raise ValueError(f"{n} {name}; expected at most {MAX_BLOCKS}")
    return n


def _pair(size: Any) -> tuple[int, int]:
    """(H, W) of a side or of both."""
    try:
        height, width = map(operator.index, (size, size) if isinstance(size, int | np.integer) else size)
    except (TypeError, ValueError):
        raise ValueError(f"image_size={size!r}: expected an integer, or two: height and width") from None
    return height, width


def _at_size(network: MaskedAutoencoder, image_size: tuple[int, int]) -> MaskedAutoencoder:
    """The same weights for images of another size, position embeddings interpolated (bicubic, as timm does)."""
    size = replace(network.size, image_size=image_size)
    if size == network.size:
        return network
    state = network.state_dict()
    layers: Any = timm.layers
    for name in ("pos_embed", "decoder_pos_embed"):
        state[name] = layers.resample_abs_pos_embed(state[name], list(size.grid), list(network.size.grid))
    return with_weights(lambda: MaskedAutoencoder(size), state)
