"""Options of a network's forward pass: device, number type, memory order, compilation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch

from adq_wds.errors import AdqError, reason_of

Pass = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""From (B, 3, H, W) to h (B, D), and logits (B, C) or None."""

COMPILED_BATCH = {"cpu": 16}
"""Images in a compiled batch by device type; 64 on any other, which needs more of them to be busy."""

_compiling = threading.Lock()


@dataclass(frozen=True)
class ForwardOptions:
    """Options of an encoder's forward pass; part of the encoder's revision.

    Attributes:
        amp: compute convolutions and matrix products in bfloat16 (torch's autocast); h and logits are float32 again.
            Faster where the processor has instructions for it, slower elsewhere. float16 is not offered: activations
            of common networks exceed its largest number, 65,504, while bfloat16 has float32's range.
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
        dtype = "dtype=bfloat16" if self.amp else "dtype=float32"
        memory = "" if self.channels_last else ";memory=channels_first"
        return dtype + memory + (";compile=inductor" if self.compile else "")

    @property
    def memory_format(self) -> torch.memory_format:
        """The order in memory as torch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def freeze(self, network: torch.nn.Module, device: torch.device) -> None:
        """Freeze a network in evaluation mode, on the device, in this order in memory.

        Raises:
            ValueError: `amp`, and the device does not compute in bfloat16.
        """
        if self.amp:
            check_bfloat16(device)
        network.eval().requires_grad_(False).to(device).to(memory_format=self.memory_format)


@dataclass(frozen=True, eq=False)
class CompiledPass:
    """A network's compiled forward pass. May be called from several threads at once.

    It always sees batches of one size (`COMPILED_BATCH`): larger ones are cut, the rest is filled with
    zeros. So the network is compiled once for each number of intra-op threads, whatever the batch sizes, and an
    image's answer does not depend on the size of its batch. (With a size left open, `dynamic=True`, torch compiles
    again where its own choice of kernels changes with the size, and again for one image.) The first call compiles,
    not the construction, since the program depends on the calling thread's number of intra-op threads; other threads
    wait for it.

    Attributes:
        name: the encoder's, for errors.
        network: what is compiled.
        device: where the network is.
        memory_format: the order in memory of its input.

    Raises:
        AdqError: torch.compile does not work here; says why and what to do.
    """

    name: str
    network: Pass
    device: torch.device
    memory_format: torch.memory_format
    _compiled: Pass = field(init=False, repr=False)
    _ready: set[int] = field(default_factory=set, init=False, repr=False)  # numbers of threads compiled for

    def __post_init__(self) -> None:
        try:
            # fullgraph: what cannot be compiled as a whole is an error, never run in another way without a word
            compiled = torch.compile(self.network, fullgraph=True, dynamic=False)
        except Exception as error:  # torch refuses Pythons and systems that it does not know
            raise self._not_compiled(error) from error
        object.__setattr__(self, "_compiled", compiled)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h and logits of (B, 3, H, W), B >= 1; call it in torch's inference mode.

        Raises:
            AdqError: the network cannot be compiled.
        """
        size = COMPILED_BATCH.get(self.device.type, 64)
        self._make_ready((size, *x.shape[1:]))
        h, logits = [], []
        for part in torch.split(x, size):
            n = len(part)
            if n < size:
                part = torch.cat([part, part.new_zeros(size - n, *part.shape[1:])])
                part = part.contiguous(memory_format=self.memory_format)
            part_h, part_logits = self._compiled(part)
            h.append(part_h[:n])
            logits += [] if part_logits is None else [part_logits[:n]]
        return torch.cat(h), torch.cat(logits) if logits else None

    def _make_ready(self, shape: tuple[int, ...]) -> None:
        """Compile for the thread's number of intra-op threads, on zeros, so that a failure is not caused by the
        images."""
        n_threads = torch.get_num_threads()
        if n_threads in self._ready:
            return
        with _compiling:
            if n_threads in self._ready:
                return
            try:
                self._compiled(
                    torch.zeros(shape, device=self.device).contiguous(memory_format=self.memory_format)
                )
            except Exception as error:  # compilers, caches and torch's tracer fail in their own ways
                raise self._not_compiled(error) from error
            self._ready.add(n_threads)

    def _not_compiled(self, error: Exception) -> AdqError:
        first = str(error).strip().split("\n\n")[0]  # without torch's hints for developers
        return AdqError(
            f"encoder {self.name!r} cannot be compiled ({type(error).__name__}: {' '.join(first.split())[:240]}); "
            "torch.compile needs a C++ compiler (g++ or clang++, or the one that CXX names), and Triton on CUDA: "
            "install it, or leave compile off"
        )


def check_bfloat16(device: torch.device) -> None:
    """Raise `ValueError` unless the device computes in bfloat16 natively; torch may fall back without an error."""
    why = ""
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            why = f"{name} (compute capability {major}.{minor}) has no bfloat16, which begins with 8.0"
    if not why:
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                one = torch.ones(1, 1, device=device)
                reached = torch.nn.functional.linear(one, one).dtype
            if reached != torch.bfloat16:
                why = f"torch computes in {reached} on {device}, not in bfloat16"
        except (RuntimeError, TypeError, NotImplementedError) as error:
            why = f"torch does not compute in bfloat16 on {device} ({reason_of(error)})"
    if why:
        raise ValueError(f"amp=True: {why}; leave amp off, or take another device")


def pick_device(device: str) -> torch.device:
    """The device of a name; `auto` is cuda when there is one, else cpu.

    Raises:
        ValueError: not a device, or one this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: expected 'cpu', 'cuda', 'cuda:N' or 'auto'") from error
    if made.type == "cuda" and (made.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices; use 'auto' or 'cpu'"
        )
    return made
