"""Do the options of a forward pass change what they name, say so in the revision, and nothing else?"""

import contextlib
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.errors import AdqError
from adq_wds.models.builtin import builtin_encoder, weights_path
from adq_wds.models.checkpoints import load_weights, state_sha256
from adq_wds.models.forward import COMPILED_BATCH, ForwardOptions
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.models.timm_encoder import timm_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = COMPILED_BATCH["cpu"]
Make = Callable[..., NetworkEncoder]


def tiny_resnet(**options: Any) -> NetworkEncoder:
    return timm_encoder("test_resnet", pretrained=False, image_size=32, **options)


makers = pytest.mark.parametrize("make", [builtin_encoder, tiny_resnet], ids=["builtin", "timm"])


def noise(n: int, side: int = 40) -> list[PIL.Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(p) for p in pixels]


def first_convolution(encoder: NetworkEncoder) -> torch.nn.Conv2d:
    return next(m for m in encoder.model.modules() if isinstance(m, torch.nn.Conv2d))


def worst_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    x, y = (torch.from_numpy(h).double() for h in (a, b))
    return float(torch.cosine_similarity(x, y).min())


# What the options are called


def test_without_options_the_revision_is_the_old_one() -> None:
    expected = f"file-sha256={load_weights(weights_path('builtin')).sha256};definition=1;dtype=float32"
    assert builtin_encoder().revision == expected
    encoder = tiny_resnet()
    weights = state_sha256(encoder.model.state_dict().items())
    assert encoder.revision == f"weights-sha256={weights};timm={timm.__version__};dtype=float32"


@pytest.mark.parametrize("name", ["amp", "channels_last", "compile"])
@pytest.mark.parametrize("value", ["bf16", 1, None, "inductor"])
def test_an_option_that_is_not_true_or_false_is_refused(name: str, value: object) -> None:
    for make in (builtin_encoder, tiny_resnet):
        with pytest.raises(ValueError, match=rf"{name}={value!r}: expected True or False"):
            make(**{name: value})  # type: ignore[arg-type]


def test_the_names_of_encoders_take_them_and_thumbnail_none() -> None:
    assert "memory=channels_first" in adq.encoder("builtin-free", channels_last=False).revision
    assert "bfloat16" in adq.encoder("resnet18", pretrained=False, image_size=32, amp=True).revision
    for name in ("amp", "channels_last", "compile"):
        with pytest.raises(ValueError, match=rf"'thumbnail' takes no options but device=, got {name}="):
            adq.encoder("thumbnail", **{name: True})
    with pytest.raises(ValueError, match=r"'builtin' takes .*compile=, device=, got checkpoint="):
        adq.encoder("builtin", checkpoint="x", amp=True)


@makers
def test_a_pickle_carries_the_options(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    for options in ({"amp": True}, {"channels_last": False}, {"compile": True}, {}):
        encoder = make(**options)
        again = pickle.loads(pickle.dumps(encoder))  # noqa: S301 - our own
        assert again.revision == encoder.revision
        assert again.options == ForwardOptions(**options)
        np.testing.assert_array_equal(again(noise(2))[0], encoder(noise(2))[0])


@makers
def test_networks_are_frozen_and_random_state_stays(make: Make) -> None:
    before = torch.get_rng_state()
    encoder = make()
    encoder(noise(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in encoder.model.modules())
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}


# bfloat16 and order in memory


@makers
def test_amp_computes_in_bfloat16_and_answers_in_float32(make: Make) -> None:
    images = noise(6)
    encoder, usual = make(amp=True), make()
    seen: list[torch.dtype] = []
    first_convolution(encoder).register_forward_hook(lambda _m, _x, y: seen.append(y.dtype))
    h, logits = encoder(images)
    assert set(seen) == {torch.bfloat16}
    assert h.dtype == np.float32
    assert logits is not None
    assert logits.dtype == np.float32
    wanted, _ = usual(images)
    assert not np.array_equal(h, wanted)
    assert worst_cosine(h, wanted) > 0.999
    assert next(encoder.model.parameters()).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("channels_last", [True, False])
@makers
def test_channels_last_is_the_order_of_weights_and_input(make: Make, channels_last: bool) -> None:
    encoder = make(channels_last=channels_last)
    seen: list[torch.Tensor] = []
    convolution = first_convolution(encoder)
    convolution.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    h, _ = encoder(noise(3))
    order, other = torch.channels_last, torch.contiguous_format
    if not channels_last:
        order, other = other, order
    for tensor in (seen[-1], convolution.weight):
        assert tensor.is_contiguous(memory_format=order)
        assert not tensor.is_contiguous(memory_format=other)
    np.testing.assert_allclose(h, make()(noise(3))[0], rtol=1e-4, atol=1e-4)


def test_amp_on_a_device_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network, options = torch.nn.Linear(1, 1), ForwardOptions(amp=True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ValueError, match=r"amp=True: Tesla T4 \(compute capability 7\.5\) has no bfloat16"):
        options.freeze(network, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"does not compute in bfloat16 on meta \(.*\); leave amp off"):
        options.freeze(network, torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with pytest.raises(ValueError, match=r"computes in torch\.float32 on cpu, not in bfloat16"):
        options.freeze(network, torch.device("cpu"))


# Compiling


class FakeCompiler:
    """In place of torch.compile: the network itself, and a note of every call."""

    def __init__(self, seconds: float = 0.0, broken: int = 0) -> None:
        self.given: list[dict[str, Any]] = []
        self.calls: list[tuple[tuple[int, ...], bool, bool]] = []  # shape, whether all zero, whether bfloat16
        self.running = 0
        self.overlap_with_first = False
        self.seconds = seconds
        self.broken = broken  # first calls that fail
        self.lock = threading.Lock()

    def __call__(self, network: Any, **options: Any) -> Any:
        self.given.append(options)

        def run(x: torch.Tensor) -> Any:
            with self.lock:
                first = not self.calls
                self.calls.append((tuple(x.shape), not x.any().item(), torch.is_autocast_enabled("cpu")))
                self.running += 1
            if len(self.calls) <= self.broken:
                raise RuntimeError("No working C++\ncompiler found\n\nhints for developers")
            if first:
                time.sleep(self.seconds)
                self.overlap_with_first = self.running > 1
            answer = network(x)
            with self.lock:
                self.running -= 1
            return answer

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr(torch, "compile", fake)
    return fake


@makers
@pytest.mark.parametrize("amp", [False, True])
def test_a_compiled_network_sees_one_size_always(make: Make, amp: bool, compiler: FakeCompiler) -> None:
    images = noise(3 * SIZE + 1)
    usual, encoder = make(amp=amp), make(amp=amp, compile=True)
    assert compiler.calls == []  # the thread that embeds first compiles
    for n in (1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 1, 1):
        h, logits = encoder(images[:n])
        wanted_h, wanted_logits = usual(images[:n])
        assert logits is not None
        assert wanted_logits is not None
        tolerance = 0.05 if amp else 1e-4
        np.testing.assert_allclose(h, wanted_h, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(logits, wanted_logits, rtol=tolerance, atol=tolerance)
    assert {shape for shape, _, _ in compiler.calls} == {(SIZE, 3, 32, 32)}
    assert [zero for _, zero, _ in compiler.calls] == [True] + [False] * (1 + 1 + 1 + 2 + 4 + 1)
    assert {bfloat16 for _, _, bfloat16 in compiler.calls} == {amp}
    assert compiler.given == [{"fullgraph": True, "dynamic": False}]


@pytest.mark.parametrize("make", [partial(builtin_encoder, "builtin-free"), tiny_resnet])
def test_a_compiled_answer_does_not_depend_on_the_batch(make: Make, compiler: FakeCompiler) -> None:
    images = noise(SIZE + 3)
    encoder = make(compile=True)
    whole = encoder(images)[0]
    for start, stop in ((0, 1), (3, 9), (SIZE, SIZE + 3)):
        np.testing.assert_array_equal(encoder(images[start:stop])[0], whole[start:stop])
    assert encoder([])[0].shape == (0, encoder.width)
    np.testing.assert_allclose(whole, make()(images)[0], rtol=1e-4, atol=1e-5)


def test_threads_wait_for_the_one_that_compiles(compiler: FakeCompiler) -> None:
    compiler.seconds = 0.2
    encoder = builtin_encoder(compile=True)
    barrier = threading.Barrier(4)

    def start() -> None:
        torch.set_num_threads(1)
        barrier.wait(timeout=300)

    with ThreadPoolExecutor(4, initializer=start) as pool:
        answers = list(pool.map(lambda _: encoder(noise(3))[0], range(8)))
    assert [zero for _, zero, _ in compiler.calls].count(True) == 1
    assert not compiler.overlap_with_first
    for answer in answers:
        np.testing.assert_array_equal(answer, answers[0])


def test_another_number_of_threads_is_compiled_for_once_more(compiler: FakeCompiler) -> None:
    encoder = builtin_encoder(compile=True)
    for n_threads in (1, 2, 1, 2):
        torch.set_num_threads(n_threads)
        encoder(noise(2))
    assert [zero for _, zero, _ in compiler.calls] == [True, False, True, False, False, False]


FAILS = (
    r"encoder 'builtin' cannot be compiled \(RuntimeError: No working C\+\+ compiler found\); torch\.compile "
    r"needs a C\+\+ compiler .*leave compile off$"
)


def test_a_failed_compilation_is_one_line(compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.broken = 1
    encoder = builtin_encoder(compile=True)
    with pytest.raises(AdqError, match=FAILS) as info:
        encoder(noise(1))
    assert "\n" not in str(info.value)
    assert encoder(noise(1))[0].shape == (1, 256)  # it is tried again: a compiler may have been installed

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("torch.compile is not supported on this Python")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(AdqError, match=r"cannot be compiled \(RuntimeError: .* not supported on this Python"):
        builtin_encoder(compile=True)


def test_skipping_jobs_end_if_it_fails(compiler: FakeCompiler, make_shard: Any, tmp_path: Path) -> None:
    compiler.broken = 100
    encoder = builtin_encoder(compile=True)
    with pytest.raises(AdqError, match=FAILS):
        adq.embed_shards(make_shard("a.tar", 5), encoder, tmp_path / "f", on_error="skip", workers=2)


@pytest.fixture
def can_compile() -> None:
    """Skip where torch.compile cannot work, with its reason."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(3))
    except Exception as error:
        pytest.skip(f"torch.compile does not run here: {' '.join(str(error).split())[:200]}")


@pytest.mark.slow
@pytest.mark.usefixtures("can_compile")
@makers
@pytest.mark.parametrize("amp", [False, True])
def test_torchs_own_compiler_compiles_once(make: Make, amp: bool) -> None:
    from torch._dynamo.utils import counters

    images = noise(2 * SIZE + 5)
    usual, encoder = make(amp=amp), make(amp=amp, compile=True)
    before = counters["stats"]["unique_graphs"]
    barrier = threading.Barrier(3)

    def start() -> None:
        torch.set_num_threads(1)
        barrier.wait(timeout=300)

    sizes = (1, 2, 3, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 5)
    with ThreadPoolExecutor(3, initializer=start) as pool:
        answers = list(pool.map(lambda n: encoder(images[:n])[0], sizes))
    assert counters["stats"]["unique_graphs"] - before == 1
    for n, h in zip(sizes, answers, strict=True):
        np.testing.assert_array_equal(h, answers[-1][:n])
        assert worst_cosine(h, usual(images[:n])[0]) > (0.999 if amp else 0.999999)


@pytest.mark.slow
@pytest.mark.usefixtures("can_compile")
def test_without_a_compiler_torchs_own_failure_is_ours(tmp_path: Path) -> None:
    code = (
        "import PIL.Image, torch\n"
        "from adq_wds.models.builtin import builtin_encoder\n"
        "builtin_encoder(compile=True)([PIL.Image.new('RGB', (9, 9))])\n"
    )
    nowhere = {"CXX": "/nowhere/g++", "CC": "/nowhere/gcc", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    options: Any = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **nowhere}, **options)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"AdqError: encoder 'builtin' cannot be compiled \(.*compiler.*leave compile off$", last)


@pytest.mark.gpu
@makers
@pytest.mark.parametrize("options", [{"amp": True}, {"channels_last": False}, {"compile": True}])
def test_cuda_gives_nearly_what_the_cpu_gives(make: Make, options: dict[str, bool]) -> None:
    images = noise(70)
    wanted = make()(images)[0]
    encoder = make(device="cuda", **options)
    with ThreadPoolExecutor(3) as pool:
        for h, _ in pool.map(encoder, [images] * 6):
            assert worst_cosine(h, wanted) > 0.999
