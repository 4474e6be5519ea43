"""Makes an encoder of any function or network: names it, and checks its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from adq_wds.protocols import Answer


@dataclass(frozen=True, eq=False)
class CallableEncoder:
    """An encoder from a function of a list of PIL images, or from a `torch.nn.Module`.

    Pickles when `fn` and `transform` do.

    Args:
        fn: takes a list of B RGB images; or a network in evaluation mode, which takes the stacked results of
            `transform` on its own device. Gives h (B, D), or the tuple (h, logits (B, C)), as NumPy arrays or torch
            tensors.
        name: stored with the features.
        revision: stored with the features; change it when `fn` changes, so that old features are not mixed with new.
        preprocessing_hash: stored with the features; anything that tells preprocessings apart.
        transform: for networks: a PIL image to a tensor.

    Raises:
        ValueError: no name, a network in training mode, or one without `transform`.
        TypeError: `fn` cannot be called.

    >>> h, _ = CallableEncoder(lambda images: [image.size for image in images], name="size")([
    ...     PIL.Image.new("RGB", (4, 2))])
    >>> h
    array([[4., 2.]], dtype=float32)
    """

    fn: Callable[..., Any]
    name: str
    revision: str = "0"
    preprocessing_hash: str = ""
    transform: Callable[[PIL.Image.Image], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn={self.fn!r}: expected a function of a list of images, or a torch.nn.Module")
        if not self.name:
            raise ValueError(
                f"name={self.name!r}: name the encoder, so that its features can be told from others"
            )
        if isinstance(self.fn, torch.nn.Module):
            self._check_mode(self.fn)
            if self.transform is None:
                raise ValueError(
                    f"encoder {self.name!r}: a network needs transform=, from a PIL image to its input tensor"
                )

    def __call__(self, images: Sequence[PIL.Image.Image]) -> Answer:
        """Embed a batch.

        Args:
            images: B RGB images of any sizes.

        Returns:
            h (B, D) float32, and logits (B, C) float32 or None.

        Raises:
            ValueError: the function's answer is not (B, D), or not a pair of (B, D) and (B, C); or a network is in
                training mode.
        """
        if isinstance(self.fn, torch.nn.Module):
            answer = self._run_network(self.fn, images)
        else:
            answer = self.fn(list(images))
        h, logits = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
        n = len(images)
        return self._matrix(h, "h", n), None if logits is None else self._matrix(logits, "logits", n)

    def _check_mode(self, network: torch.nn.Module) -> None:
        if network.training:  # dropout and batch statistics would make h depend on chance and neighbours
            raise ValueError(
                f"encoder {self.name!r}: the network is in training mode; call .eval() on it first"
            )

    def _run_network(self, network: torch.nn.Module, images: Sequence[PIL.Image.Image]) -> Any:
        self._check_mode(network)
        assert self.transform is not None
        parameter = next(network.parameters(), None)
        x = torch.stack([self.transform(image) for image in images])
        with torch.inference_mode():
            return network(x if parameter is None else x.to(parameter.device))

    def _matrix(self, values: Any, what: str, n_images: int) -> NDArray[np.float32]:
        if isinstance(values, torch.Tensor):
            values = values.detach().float().cpu().numpy()
        try:
            # float64 beyond float32 becomes Inf, which is refused where h is stored
            with np.errstate(over="ignore"):
                array = np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"encoder {self.name!r}: {what} is a {type(values).__name__}, not an array of numbers; "
                "return h, or (h, logits), as NumPy arrays or torch tensors"
            ) from error
        if array.ndim != 2 or len(array) != n_images:
            raise ValueError(
                f"encoder {self.name!r}: {what} has shape {array.shape}, expected ({n_images}, width) "
                f"for {n_images} images"
            )
        return array
