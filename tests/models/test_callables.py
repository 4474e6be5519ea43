"""Is anybody's function or network an encoder, and are its answers checked?"""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from adq_wds.models.callables import CallableEncoder

IMAGES = [PIL.Image.new("RGB", (4 + i, 2), (i, 0, 255)) for i in range(2)]


def first_pixel(image: PIL.Image.Image) -> torch.Tensor:
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)


@pytest.mark.parametrize(
    "answer",
    [
        np.array([[1, 2], [3, 4]]),
        np.array([[1, 2], [3, 4]], dtype=np.float16),
        torch.tensor([[1.0, 2], [3, 4]], dtype=torch.bfloat16),
        torch.tensor([[1.0, 2], [3, 4]], requires_grad=True),
        [[1, 2], [3, 4]],
        [np.array([1, 2]), np.array([3, 4])],  # a list of two rows is not a pair (h, logits)
    ],
)
def test_any_array_of_rows_becomes_float32(answer: Any) -> None:
    h, logits = CallableEncoder(lambda images: answer, name="f")(IMAGES)
    assert h.dtype == np.float32
    assert h.tolist() == [[1, 2], [3, 4]]
    assert logits is None


def test_a_function_gets_the_images_and_may_give_logits() -> None:
    def f(images: list[PIL.Image.Image]) -> tuple[np.ndarray, torch.Tensor]:
        assert isinstance(images, list)
        return np.array([image.size for image in images]), torch.ones(len(images), 3)

    h, logits = CallableEncoder(f, name="f")(tuple(IMAGES))
    assert h.tolist() == [[4, 2], [5, 2]]
    assert logits is not None
    assert logits.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert logits.dtype == np.float32


def test_a_network_gets_its_transformed_images() -> None:
    network = torch.nn.Linear(3, 5).eval()
    h, logits = CallableEncoder(network, name="n", transform=first_pixel)(IMAGES)
    expected = network(torch.stack([first_pixel(image) for image in IMAGES])).detach().numpy()
    np.testing.assert_array_equal(h, expected)
    assert logits is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros(2), r"h has shape \(2,\), expected \(2, width\) for 2 images"),
        (np.zeros((3, 4)), r"h has shape \(3, 4\), expected \(2, width\)"),
        (np.zeros((2, 4, 7, 7)), r"h has shape \(2, 4, 7, 7\)"),
        ((np.zeros((2, 4)), np.zeros(2)), r"logits has shape \(2,\)"),
        ({"h": 1}, r"encoder 'f': h is a dict, not an array of numbers"),
        ([[1, 2], [3]], r"h is a list, not an array of numbers"),
        (None, r"encoder 'f': h "),
    ],
)
def test_an_answer_of_another_shape_or_kind_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CallableEncoder(lambda images: answer, name="f")(IMAGES)


def test_numbers_beyond_float32_become_inf_without_a_warning() -> None:
    h, _ = CallableEncoder(lambda images: np.full((2, 1), 1e300), name="f")(IMAGES)
    assert np.isinf(h).all()


def test_a_network_in_training_mode_is_refused() -> None:
    network = torch.nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"encoder 'n': the network is in training mode; call \.eval\(\)"):
        CallableEncoder(network, name="n", transform=first_pixel)
    encoder = CallableEncoder(network.eval(), name="n", transform=first_pixel)
    network.train()
    with pytest.raises(ValueError, match="training mode"):
        encoder(IMAGES)


def test_no_transform_no_name_and_no_function_are_refused() -> None:
    with pytest.raises(ValueError, match="a network needs transform="):
        CallableEncoder(torch.nn.Linear(3, 5).eval(), name="n")
    with pytest.raises(ValueError, match="name=''"):
        CallableEncoder(len, name="")
    with pytest.raises(TypeError, match="fn=3: expected a function"):
        CallableEncoder(3, name="n")  # type: ignore[arg-type]
