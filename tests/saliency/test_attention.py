"""Is the importance the attention that the network itself computes, and is the network left as it was?"""

import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from adq_wds.core.importance import patch_means
from adq_wds.models.builtin import builtin_encoder
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.models.timm_encoder import timm_encoder
from adq_wds.protocols import Importance
from adq_wds.saliency.attention import attention_importance
from tests.conftest import pictures

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64


@cache
def random_encoder(name: str) -> NetworkEncoder:
    return timm_encoder(name, pretrained=False, image_size=SIZE)


def opened(encoder: NetworkEncoder, images: list[PIL.Image.Image]) -> NDArray[np.float64]:
    """The oracle, (B, N, N): queries and keys of the last block's input, by hand."""
    model = encoder.model
    seen: list[torch.Tensor] = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(encoder.whole(images))
        handle.remove()
        attention = model.blocks[-1].attn
        B, N, D = seen[0].shape
        heads = attention.num_heads
        q, k, _ = attention.qkv(seen[0]).view(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4).double()
    weights = torch.softmax(q @ k.transpose(2, 3) / (D // heads) ** 0.5, dim=3)
    found: NDArray[np.float64] = weights.mean(1).numpy()
    return found


@pytest.mark.parametrize(
    ("name", "n_prefix", "has_class"),
    [
        ("vit_tiny_patch16_224", 1, True),
        ("deit_tiny_distilled_patch16_224", 2, True),
        ("vit_wee_patch16_reg1_gap_256", 1, False),
    ],
)
def test_importance_is_the_last_blocks_attention(name: str, n_prefix: int, has_class: bool) -> None:
    encoder, images = random_encoder(name), pictures(2)
    assert encoder.model.num_prefix_tokens == n_prefix
    weights = opened(encoder, images)
    expected = weights[:, 0, n_prefix:] if has_class else weights[:, n_prefix:, n_prefix:].mean(1)
    found = attention_importance(encoder, patch=16)(images, [None, 3], [0, 0])
    assert (found.shape, found.dtype) == ((2, 16), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.std() > 1e-6


def test_patches_of_another_size_take_the_mean_of_the_map() -> None:
    encoder, images = random_encoder("vit_tiny_patch16_224"), pictures(2)
    own = attention_importance(encoder, patch=16)(images, [None] * 2, [0, 0])
    for patch, grid in ((32, (2, 2)), (8, (8, 8))):
        found = attention_importance(encoder, patch=patch)(images, [None] * 2, [0, 0])
        np.testing.assert_allclose(found, patch_means(own.reshape(2, 4, 4), grid, patch), rtol=1e-5)


def test_an_image_of_another_size_is_seen_whole() -> None:
    encoder, images = random_encoder("vit_tiny_patch16_224"), pictures(1, (96, 48))
    found = attention_importance(encoder, patch=24)(images, [None], [0])
    small = images[0].resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
    own = attention_importance(encoder, patch=16)([small], [None], [0])
    np.testing.assert_allclose(found, patch_means(own.reshape(1, 4, 4), (2, 4), 24), rtol=1e-5)


def test_rotary_positions_play_their_part() -> None:
    encoder, images = random_encoder("vit_small_patch16_rope_224"), pictures(2)
    found = attention_importance(encoder, patch=16)(images, [None] * 2, [0, 0])
    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert (found.sum(1) <= 1 + 1e-5).all()
    assert not np.allclose(found, opened(encoder, images)[:, 0, 1:], rtol=1e-3)  # what it were without them


def test_the_encoder_is_left_as_it_was_and_pickles_come_back() -> None:
    encoder, images = random_encoder("vit_tiny_patch16_224"), pictures(2)
    before = encoder(images)[0]
    importance: Importance = attention_importance(encoder, patch=16)
    first = importance(images, [None] * 2, [0, 0])
    again = pickle.loads(pickle.dumps(importance))  # noqa: S301 - our own
    np.testing.assert_array_equal(again(images, [None] * 2, [0, 0]), first)
    np.testing.assert_array_equal(encoder(images)[0], before)
    attention = encoder.model.blocks[-1].attn
    assert attention.fused_attn
    assert not attention._forward_pre_hooks
    assert importance([], [], []).size == 0


def test_a_hook_that_torch_calls_without_keywords_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does when another thread takes its own hook away at that moment."""
    encoder = random_encoder("vit_tiny_patch16_224")
    importance = attention_importance(encoder, patch=16)
    images = pictures(1)
    expected = importance(images, [None], [0])
    with_keywords = torch.nn.Module.register_forward_pre_hook

    def register(module: Any, hook: Any, **options: Any) -> Any:
        return with_keywords(module, lambda m, args: hook(m, args))

    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", register)
    np.testing.assert_array_equal(importance(images, [None], [0]), expected)


def test_threads_that_share_the_network_do_not_meet() -> None:
    encoder = random_encoder("vit_tiny_patch16_224")
    importance = attention_importance(encoder, patch=16)
    batches = [pictures(2, seed=seed) for seed in range(12)]
    expected = [importance(batch, [None] * 2, [0, 0]) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda batch: importance(batch, [None] * 2, [0, 0]), batches)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_weights_that_change_are_seen() -> None:
    encoder = timm_encoder("vit_tiny_patch16_224", pretrained=False, image_size=SIZE)
    importance = attention_importance(encoder, patch=16)
    images = pictures(1)
    before = importance(images, [None], [0])
    with torch.no_grad():
        encoder.model.blocks[-1].attn.qkv.weight.mul_(3)
    anew = attention_importance(encoder, patch=16)(images, [None], [0])
    np.testing.assert_allclose(importance(images, [None], [0]), anew)
    assert not np.allclose(before, importance(images, [None], [0]))


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "builtin"])
def test_a_network_without_global_attention_is_refused(name: str) -> None:
    encoder = builtin_encoder() if name == "builtin" else timm_encoder(name, pretrained=False)
    with pytest.raises(ValueError, match=f"encoder '{name}' has no attention .*take a ViT"):
        attention_importance(encoder, patch=16)
    with pytest.raises(ValueError, match="patch must be an integer >= 1, got -1"):
        attention_importance(encoder, patch=-1)
