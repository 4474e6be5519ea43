"""Are class activation maps those of their definitions, and closed only where the network allows it?"""

import pickle
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from numpy.typing import NDArray
from torch import nn

from adq_wds.core.importance import patch_means
from adq_wds.models.builtin import builtin_encoder
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.models.timm_encoder import timm_encoder
from adq_wds.protocols import Importance
from adq_wds.saliency.cam import CamImportance, cam_by_gradient, cam_importance, is_closed
from tests.conftest import pictures

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSED = ["resnet10t", "efficientnet_lite0", "regnetx_002", "densenet121"]
BY_GRADIENT = ["convnext_atto", "mobilenetv3_small_050", pytest.param("vgg11", marks=pytest.mark.slow)]
METHODS = ["gradcam", "gradcam++"]
SIZE = 64

each_method = pytest.mark.parametrize("method", METHODS)


@cache
def random_encoder(name: str, **options: Any) -> NetworkEncoder:
    size = None if "swin" in name else SIZE
    return timm_encoder(name, pretrained=False, image_size=size, **options)


def by_hooks(
    encoder: NetworkEncoder, layer: nn.Module, images: list[PIL.Image.Image], classes: list[int], method: str
) -> NDArray[np.float64]:
    """The slow oracle: one image at a time, the whole network backwards, the papers' formulas position by position."""
    found = []
    for image, wanted in zip(images, classes, strict=True):
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
        x = encoder.whole([image]).requires_grad_()
        z = encoder.model(x)
        handle.remove()
        (g,) = torch.autograd.grad(z[0, wanted], seen[-1])
        A, g = seen[-1][0].detach().double().numpy(), g[0].double().numpy()
        if method == "gradcam":
            weight = g.mean((1, 2))
        else:
            below = 2 * g**2 + A.sum((1, 2))[:, None, None] * g**3
            alpha = np.divide(g**2, below, out=np.zeros_like(g), where=below != 0)
            weight = (alpha * np.maximum(g, 0)).sum((1, 2))
        found.append(np.maximum((weight[:, None, None] * A).sum(0), 0))
    return np.stack(found)


def relative(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    assert expected.max() > 0
    return float(np.abs(found - expected).max() / expected.max())


@each_method
@pytest.mark.parametrize("name", CLOSED)
def test_the_closed_form_is_the_gradient_of_the_whole_network(name: str, method: str) -> None:
    encoder, images, classes = random_encoder(name), pictures(2), [7, 900]
    importance = cam_importance(encoder, method=method, patch=16)
    assert importance.closed
    layer = {
        "resnet10t": "layer4", "efficientnet_lite0": "bn2", "regnetx_002": "final_conv", "densenet121": "features",
    }[name]  # fmt: skip
    maps = by_hooks(encoder, encoder.model.get_submodule(layer), images, classes, method)
    expected = patch_means(maps.astype(np.float32), (4, 4), 16)
    assert relative(importance(images, classes, [0, 0]), expected) < 1e-5


def test_maps_with_channels_last_are_closed_too() -> None:
    encoder = random_encoder("swin_tiny_patch4_window7_224")
    importance = cam_importance(encoder, method="gradcam", patch=32)
    assert importance.closed  # its norm comes before the mean
    images = pictures(1, (224, 224))
    _, logits = encoder(images)
    assert logits is not None
    predicted = int(logits.argmax())
    with torch.no_grad():
        maps = importance._maps(encoder.whole(images))
    assert maps.shape == (1, 768, 7, 7)
    expected = cam_by_gradient(importance._logits, maps, np.array([predicted]), method="gradcam")
    assert relative(importance(images, [predicted], [0]), patch_means(expected, (7, 7), 32)) < 1e-5


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_head_that_is_not_plain_is_run_backwards(name: str) -> None:
    encoder = random_encoder(name)
    importance = cam_importance(encoder, patch=16)
    assert not importance.closed
    found = importance(pictures(2), [3, None], [0, 0])
    assert found.shape == (2, 16)
    assert np.isfinite(found).all()
    assert (found.max(1) > 0).all()


@each_method
def test_the_gradient_form_is_the_papers(method: str) -> None:
    encoder, images, classes = random_encoder("mobilenetv3_small_050"), pictures(2), [7, 900]
    maps = by_hooks(encoder, encoder.model.blocks, images, classes, method)
    found = cam_importance(encoder, method=method, patch=16)(images, classes, [0, 0])
    assert relative(found, patch_means(maps.astype(np.float32), (4, 4), 16)) < 1e-5


BETWEEN = {
    "nothing": lambda maps: maps.mean((2, 3)),
    "a norm": lambda maps: nn.functional.layer_norm(maps.mean((2, 3)), (4,)),
    "a scale": lambda maps: 1.001 * maps.mean((2, 3)),
    "a maximum": lambda maps: maps.amax((2, 3)),
    "a nonlinearity": lambda maps: torch.tanh(maps.mean((2, 3))),
    "weights of places": lambda maps: (maps * torch.arange(6.0).view(2, 3)).mean((2, 3)),
    "a softmax after": lambda maps: maps.mean((2, 3)),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_only_a_plain_head_is_closed(between: str) -> None:
    torch.manual_seed(0)
    last, maps = nn.Linear(4, 5), torch.rand(2, 4, 2, 3)

    def head(maps: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = last(BETWEEN[between](maps))
        return torch.softmax(logits, 1) if between == "a softmax after" else logits

    assert is_closed(head, maps, last) == (between == "nothing")
    for other in (None, nn.Linear(3, 5), nn.Linear(4, 6)):
        assert not is_closed(head, maps, other)


@each_method
@pytest.mark.parametrize("name", ["builtin", "convnext_atto"])
def test_the_class_is_the_label_else_the_prediction(name: str, method: str) -> None:
    encoder: NetworkEncoder = builtin_encoder() if name == "builtin" else random_encoder(name)
    side = 32 if name == "builtin" else SIZE
    images = pictures(4, (side, side))
    importance = cam_importance(encoder, method=method, patch=8)
    with torch.no_grad():
        predicted = importance._logits(importance._maps(encoder.whole(images))).argmax(1).tolist()
    other = [(p + 1) % 10 for p in predicted]
    by_label, by_prediction = (importance(images, [*labels], [0] * 4) for labels in (other, predicted))
    assert not np.allclose(by_label, by_prediction)
    mixed = importance(images, [other[0], None, None, other[3]], [0] * 4)
    np.testing.assert_allclose(mixed[[0, 3]], by_label[[0, 3]], rtol=1e-5)
    np.testing.assert_allclose(mixed[[1, 2]], by_prediction[[1, 2]], rtol=1e-5)
    ignoring = cam_importance(encoder, method=method, patch=8, use_labels=False)
    np.testing.assert_allclose(ignoring(images, [*other], [0] * 4), by_prediction, rtol=1e-5)
    assert np.array_equal(ignoring(images, ["cat"] * 4, [0] * 4), ignoring(images, [None] * 4, [0] * 4))


@pytest.mark.parametrize("label", [10, -1, "cat", 2.7])
def test_a_label_that_is_no_class_is_refused(label: Any) -> None:
    importance = cam_importance(builtin_encoder(), patch=4)
    with pytest.raises(ValueError, match=f"image 1 .*label {label!r}, .*0 to 9; .*use_labels=False"):
        importance(pictures(2, (32, 32)), [3, label], [0, 0])
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        importance(pictures(2, (32, 32)), [3], [0, 0])


def test_an_image_gets_the_same_answer_in_any_batch() -> None:
    importance = cam_importance(builtin_encoder(), patch=4)
    images, labels = pictures(9, (32, 32)), [*range(9)]
    whole = importance(images, labels, [0] * 9)
    for i in range(9):
        (alone,) = importance([images[i]], [labels[i]], [0])
        np.testing.assert_allclose(alone, whole[i], rtol=1e-4, atol=1e-7)
    assert importance([], [], []).size == 0


def test_networks_see_the_whole_image_at_their_own_size() -> None:
    encoder = random_encoder("resnet10t")
    image = PIL.Image.new("RGB", (128, 128), (255, 0, 0))
    image.paste((0, 0, 255), (16, 16, 112, 112))  # a frame that the middle seven eighths do not show
    x = encoder.whole([image])
    assert x.shape == (1, 3, SIZE, SIZE)
    config = timm.data.resolve_model_data_config(encoder.model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = 255 * (x * std + mean)
    for corner in (0, -1):
        assert pixels[0, :, corner, corner].tolist() == pytest.approx([255, 0, 0], abs=1)
    assert pixels[0, :, 32, 32].tolist() == pytest.approx([0, 0, 255], abs=1)


def test_bfloat16_moves_a_map_little() -> None:
    images = pictures(2)
    plain, fast = (
        cam_importance(timm_encoder("resnet10t", pretrained=False, image_size=SIZE, amp=amp), patch=16)
        for amp in (False, True)
    )
    assert fast.closed
    found, expected = (importance(images, [5, 6], [0, 0]) for importance in (fast, plain))
    assert found.dtype == np.float32
    assert not np.array_equal(found, expected)
    assert relative(found, expected) < 0.1


def test_it_pickles_and_leaves_the_encoder_as_it_was() -> None:
    encoder, images = random_encoder("resnet10t"), pictures(2)
    before = encoder(images)
    importance: Importance = cam_importance(encoder, method="gradcam", patch=8, use_labels=False)
    again = pickle.loads(pickle.dumps(importance))  # noqa: S301 - our own
    assert isinstance(again, CamImportance)
    assert (again.method, again.patch, again.use_labels, again.closed) == ("gradcam", 8, False, True)
    np.testing.assert_array_equal(again(images, [None] * 2, [0, 0]), importance(images, [None] * 2, [0, 0]))
    np.testing.assert_array_equal(encoder(images)[0], before[0])
    assert not any(p.requires_grad or p.grad is not None for p in encoder.model.parameters())


def test_it_runs_inside_a_callers_inference_mode() -> None:
    for name in ("resnet10t", "convnext_atto"):
        importance, images = cam_importance(random_encoder(name), patch=16), pictures(2)
        with torch.inference_mode():
            inside = importance(images, [1, 2], [0, 0])
        np.testing.assert_array_equal(inside, importance(images, [1, 2], [0, 0]))


def test_what_cannot_be_explained_is_refused() -> None:
    with pytest.raises(ValueError, match="encoder 'builtin-free' gives no logits, and gradcam explains them"):
        cam_importance(builtin_encoder("builtin-free"), method="gradcam", patch=4)
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' .*\(2, 17, 192\).*attention_importance"):
        cam_importance(random_encoder("vit_tiny_patch16_224"), patch=4)
    for patch in (0, 4.0, True):
        with pytest.raises(ValueError, match=f"patch must be an integer >= 1, got {patch!r}"):
            cam_importance(builtin_encoder(), patch=patch)  # type: ignore[arg-type]


def test_images_that_do_not_fit_are_refused() -> None:
    importance = cam_importance(builtin_encoder(), patch=16)
    with pytest.raises(ValueError, match="image 1 of the batch is 32 x 48, the first one 32 x 32"):
        importance([*pictures(1, (32, 32)), *pictures(1, (32, 48))], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="has mode 'L', not 'RGB'"):
        importance([PIL.Image.new("L", (32, 32))], [0], [0])
    for size in ((40, 32), (8, 8)):
        with pytest.raises(ValueError, match="does not fall into patches of 16 x 16"):
            importance(pictures(1, size), [0], [0])
