"""How does a network run? In which number type, in which order in memory, compiled or as it was written."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adq_wds.errors import AdqError

Pass = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

COMPILED_BATCH = {"cpu": 16}
"""Images in a compiled batch by device type; 64 on any other, which needs more of them to be busy."""

_compiling = threading.Lock()


@dataclass(frozen=True)
class ForwardOptions:
    """How an encoder's network runs; part of the encoder's revision.

    Attributes:
        amp: compute convolutions and matrix products in bfloat16 (torch's autocast); h and logits are float32 again.
            Faster where the processor has instructions for it, slower elsewhere. float16 is not offered: its largest number
            is 65,504, which activations of common networks exceed, and the embedding would be infinite; bfloat16
            has float32's range.
        channels_last: keep the colours of a pixel side by side in memory: convolutions are up to twice as fast, and
            the numbers the same but for the last bits.
        compile: let `torch.compile` (inductor) make one program of the network. Takes seconds to minutes at the
            first batch, and a C++ compiler; pays for large sets and networks (see `benchmarks/encoder_options.py`).
    """

    amp: bool = False
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if type(value) is not bool:
                raise ValueError(f"{option.name}={value!r}: expected True or False")

    @property
    def revision(self) -> str:
        """These options as the end of an encoder's revision.

        >>> ForwardOptions().revision, ForwardOptions(amp=True, channels_last=False, compile=True).revision
        ('dtype=float32', 'dtype=bfloat16;memory=channels_first;compile=inductor')
        """
        said = "dtype=bfloat16" if self.amp else "dtype=float32"
        if not self.channels_last:
            said += ";memory=channels_first"
        return said + (";compile=inductor" if self.compile else "")

    @property
    def memory_format(self) -> torch.memory_format:
        """The order in memory as torch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, network: torch.nn.Module, device: torch.device) -> None:
        """Freeze a network in evaluation mode, on the device, in this order in memory.

        Raises:
            ValueError: `amp`, and the device does not compute in bfloat16.
        """
        if self.amp:
            check_bfloat16(device)
        network.eval().requires_grad_(False).to(device).to(memory_format=self.memory_format)


@dataclass(frozen=True, eq=False)
class Forward:
    """A network's forward pass, run as the options say. May be called from several threads at once.

    A compiled pass always sees batches of one size (`COMPILED_BATCH`): larger ones are cut, the rest is filled with
    zeros. So the network is compiled once for each number of intra-op threads, whatever sizes come, and an image's
    answer does not depend on how many others came with it. (With a size left open, `dynamic=True`, torch compiles
    again where its own choice of kernels changes with the size, and again for one image.) The first call compiles,
    not the construction, since the program depends on the calling thread's number of intra-op threads; other threads
    wait for it.

    Attributes:
        name: the encoder's, for errors.
        network: from (B, 3, H, W) float32 on `device` to h (B, D) and logits (B, C) or None.
        options: see `ForwardOptions`.
        device: where the network is.

    Raises:
        AdqError: torch.compile does not work here; says why and what to do.
    """

    name: str
    network: Pass
    options: ForwardOptions
    device: torch.device
    _compiled: Pass | None = field(init=False, repr=False)
    _ready: set[int] = field(default_factory=set, init=False, repr=False)  # numbers of threads compiled for

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiled", self._compile() if self.options.compile else None)

    def __call__(self, x: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Embed normalised images; call it in torch's inference mode.

        Args:
            x: (B, 3, H, W) float32 on the device, B >= 1.

        Returns:
            h (B, D) float32, and logits (B, C) float32 or None.

        Raises:
            AdqError: the network cannot be compiled.
        """
        x = x.contiguous(memory_format=self.options.memory_format)
        with self._numbers():
            h, logits = self.network(x) if self._compiled is None else self._by_parts(self._compiled, x)
        return _float32(h), None if logits is None else _float32(logits)

    def _numbers(self) -> contextlib.AbstractContextManager[Any]:
        if not self.options.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _compile(self) -> Pass:
        try:
            # fullgraph: what cannot be compiled as a whole is an error, never run in another way without a word
            compiled: Pass = torch.compile(self.network, fullgraph=True, dynamic=False)
        except Exception as error:  # torch refuses Pythons and systems that it does not know
            raise self._not_compiled(error) from error
        return compiled

    def _by_parts(self, compiled: Pass, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = COMPILED_BATCH.get(self.device.type, 64)
        self._make_ready(compiled, (size, *x.shape[1:]))
        h, logits = [], []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            n = len(part)
            if n < size:
                part = self._zeros((size, *x.shape[1:]))
                part[:n] = x[start:]
            part_h, part_logits = compiled(part)
            h.append(part_h[:n])
            logits += [] if part_logits is None else [part_logits[:n]]
        return torch.cat(h), torch.cat(logits) if logits else None

    def _make_ready(self, compiled: Pass, shape: tuple[int, ...]) -> None:
        """Compile for the thread's number of intra-op threads, on zeros: what fails then is not the images' fault."""
        n_threads = torch.get_num_threads()
        if n_threads in self._ready:
            return
        with _compiling:
            if n_threads in self._ready:
                return
            try:
                compiled(self._zeros(shape))
            except (
                Exception
            ) as error:  # compilers, their caches and torch's tracer each fail in their own ways
                raise self._not_compiled(error) from error
            self._ready.add(n_threads)

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.empty(shape, device=self.device, memory_format=self.options.memory_format)
        return made.zero_()

    def _not_compiled(self, error: Exception) -> AdqError:
        text = " ".join(str(error).strip().split("\n\n")[0].split())[
            :240
        ]  # without torch's hints for developers
        return AdqError(
            f"encoder {self.name!r} cannot be compiled ({type(error).__name__}: {text}); torch.compile needs a C++ "
            "compiler (g++ or clang++, or the one that CXX names), and Triton on CUDA: install it, or leave compile off"
        )


def _float32(values: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array


def check_bfloat16(device: torch.device) -> None:
    """Raise `ValueError` unless the device computes in bfloat16 itself: torch may fall back without an error."""
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(
                f"amp=True: {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no "
                "bfloat16, which begins with 8.0; leave amp off, or take another device"
            )
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            one = torch.ones(1, 1, device=device)
            reached = torch.nn.functional.linear(one, one).dtype
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"amp=True: torch does not compute in bfloat16 on {device} ({' '.join(str(error).split())[:160]}); "
            "leave amp off, or take another device"
        ) from error
    if reached != torch.bfloat16:
        raise ValueError(
            f"amp=True: torch computes in {reached} on {device}, not in bfloat16; leave amp off, or take another device"
        )
