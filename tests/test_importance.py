"""What does the name of an importance stand for? `adq.importance`, its options, and what installed packages offer."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
from PIL import Image

import adq_wds as adq
from adq_wds.registry import IMPORTANCES
from adq_wds.saliency.attention import AttentionImportance
from adq_wds.saliency.cam import CamImportance
from adq_wds.saliency.plain import RandomImportance, TextureImportance

VIT = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"pretrained": False, "image_size": 64}


def pictures(n: int = 2) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]


class Mine:
    """An importance of a user."""

    def __init__(self, patch: int, power: int = 1) -> None:
        self.patch, self.power = patch, power

    def __call__(self, images: Any, labels: Any, seeds: Any) -> Any:
        return np.zeros((len(images), 4), np.float32)


def broken(**_: Any) -> None:
    raise RuntimeError("no\n such thing")


def nothing(**_: Any) -> int:
    return 7


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = {"mine": f"{__name__}:Mine", "broken": f"{__name__}:broken", "nothing": f"{__name__}:nothing"}
    offered["gone"] = "no_such_module:x"
    group = "adq_wds.importances"
    points = [importlib.metadata.EntryPoint(name, value, group) for name, value in offered.items()]

    def entry_points(**asked: str) -> list[importlib.metadata.EntryPoint]:
        name = asked.get("name")
        return [p for p in points if asked["group"] == group and name in (None, p.name)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_every_name_gives_an_importance_of_its_patches() -> None:
    for name in IMPORTANCES:
        options = {"encoder": VIT, **SMALL} if name == "attention" else {}
        importance = adq.importance(name, patch=8, **options)
        scores = importance(pictures(), [None, None], [1, 2])
        assert (scores.shape, scores.dtype) == ((2, 16), np.float32)
        assert np.isfinite(scores).all()


def test_the_kinds_are_these() -> None:
    assert adq.importance("texture") == TextureImportance(16)
    assert adq.importance("random", patch=4) == RandomImportance(4)
    for name in ("gradcam", "gradcam++"):
        made = adq.importance(name, patch=4)
        assert isinstance(made, CamImportance)
        assert (made.method, made.patch, made.use_labels, made.encoder.name) == (name, 4, True, "builtin")
    assert isinstance(adq.importance(patch=4), CamImportance)
    assert adq.importance(patch=4).method == "gradcam++"  # type: ignore[attr-defined]


def test_options_reach_encoder_and_map(tmp_path: Path) -> None:
    made: Any = adq.importance("gradcam", patch=8, encoder="resnet10t", use_labels=False, **SMALL)
    assert (made.encoder.name, made.use_labels, made.patch) == ("resnet10t", False, 8)
    network = timm.create_model("resnet10t", num_classes=3)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    made = adq.importance("gradcam", encoder="resnet10t", checkpoint=tmp_path / "w.safetensors")
    assert made.encoder.n_classes == 3
    ready = adq.encoder("resnet10t", **SMALL)
    made = adq.importance("gradcam", encoder=ready)
    assert made.encoder is ready
    vit: Any = adq.importance("attention", encoder=VIT, **SMALL)
    assert isinstance(vit, AttentionImportance)


def test_an_object_is_taken_as_it_is() -> None:
    mine = Mine(8)
    assert adq.importance(mine) is mine
    with pytest.raises(ValueError, match=r"is ready made; options \['device', 'patch'\] do not apply"):
        adq.importance(mine, patch=8, device="cpu")
    for what in (7, Mine):
        with pytest.raises(ValueError, match="importance must be a name or an importance, got"):
            adq.importance(what)  # type: ignore[arg-type]


def test_installed_packages_offer_importances(offer: None) -> None:
    made: Any = adq.importance("mine", power=2)
    assert (made.patch, made.power) == (16, 2)
    with pytest.raises(adq.AdqError, match="importance 'broken' cannot be made: RuntimeError: no such thing"):
        adq.importance("broken")
    with pytest.raises(ValueError, match=r"entry point 'nothing' .*gives 7"):
        adq.importance("nothing")
    with pytest.raises(ValueError, match=r"'gone' \(no_such_module:x\) .*ModuleNotFoundError"):
        adq.importance("gone")
    with pytest.raises(ValueError, match="unknown importance 'mime'; did you mean mine"):
        adq.importance("mime")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("gradcam+", {}, r"unknown importance 'gradcam\+'; did you mean gradcam\+\+, gradcam\?"),
        ("zzz", {}, r"did you mean gradcam\+\+, gradcam, attention, texture, random\?"),
        ("texture", {"encoder": "builtin"}, r"looks through no network, got encoder=; leave"),
        ("random", {"use_labels": False}, r"got use_labels="),
        ("texture", {"patch": 0}, "patch must be a positive integer"),
        ("gradcam", {"patch": 0}, "patch must be an integer >= 1, got 0"),
        ("gradcam", {"encoder": "resnet81"}, "unknown encoder 'resnet81'; did you mean"),
        ("gradcam", {"encoder": "builtin-free"}, "gives no logits, .*take one with a head"),
        ("gradcam", {"encoder": "thumbnail"}, "encoder 'thumbnail'; take builtin, or a timm network"),
        ("gradcam", {"encoder": VIT, **SMALL}, "for a ViT take attention_importance"),
        ("gradcam", {"power": 2}, r"takes no options but .*, got power="),
        ("attention", {}, "needs a vision transformer: give encoder=, such as 'vit_small_patch16_224'"),
        ("attention", {"encoder": "builtin"}, "encoder 'builtin' has no attention over all patches"),
        ("attention", {"encoder": "thumbnail"}, "encoder 'thumbnail'; take a ViT of timm"),
        ("attention", {"encoder": VIT, "use_labels": False}, "explains no class; leave use_labels out"),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        adq.importance(name, **options)
