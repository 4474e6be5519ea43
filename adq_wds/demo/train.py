"""How do the demo's trainings run? Side by side in threads; those that were done before are not done again."""

from __future__ import annotations

import hashlib
import logging
import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.demo.arms import Training
from adq_wds.demo.net import DEFINITION, Images, accuracy_after
from adq_wds.engines.threads import cores
from adq_wds.files import canonical_json

logger = logging.getLogger("adq_wds")
MAX_THREADS = 4  # small networks spend much of their time holding the interpreter


def training_id(training: Training, test: Images) -> str:
    """SHA-256 over all that a training's accuracy follows from: equal ids, equal accuracy."""
    settings = [DEFINITION, torch.__version__, platform.machine(), training.seed]
    settings += [len(rows) for rows in training.epochs]
    digest = hashlib.sha256(canonical_json(settings).encode())
    for images in (training.images, test):
        digest.update(images.pixels.tobytes() + images.labels.tobytes())
    digest.update(np.concatenate(training.epochs).astype("<i8").tobytes())
    return digest.hexdigest()


def train_all(
    trainings: list[Training],
    test: Images,
    known: dict[str, float],
    save: Callable[[], None],
    *,
    progress: bool | None,
) -> list[float]:
    """The accuracy of each training, in [0, 1].

    Args:
        trainings: what is to be trained.
        test: what is counted on.
        known: accuracies by `training_id`, from an earlier run; new ones are added.
        save: called after each training, so that an interrupted run loses only those in work.
        progress: show a bar; only on a terminal by default.
    """
    ids = [training_id(training, test) for training in trainings]
    n_known = sum(name in known for name in ids)
    to_do = {name: training for name, training in zip(ids, trainings, strict=True) if name not in known}
    if n_known:
        logger.info("    %d of them are known from an earlier run", n_known)
    quiet = None if progress is None else not progress
    stop = threading.Event()
    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(_threads(), initializer=torch.set_num_threads, initargs=(1,))
    n_images = sum(training.n_seen for training in to_do.values())
    bar = tqdm(total=n_images, desc="train", unit=" images", unit_scale=True, disable=quiet)
    try:
        futures = {pool.submit(_accuracy, to_do[name], test, stop): name for name in to_do}
        for future in as_completed(futures):
            name = futures[future]
            known[name] = future.result()
            save()
            bar.update(to_do[name].n_seen)
    finally:
        bar.close()
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads_before)
    return [known[name] for name in ids]


def _threads() -> int:
    return min(MAX_THREADS, cores())


def _accuracy(training: Training, test: Images, stop: threading.Event) -> float:
    epochs = _until(training.epochs, stop)
    return accuracy_after(training.images, epochs, len(training.epochs), test, seed=training.seed)


def _until(epochs: Any, stop: threading.Event) -> Iterator[NDArray[np.int64]]:
    """The epochs; none any more once nobody waits for the answer."""
    for rows in epochs:
        if stop.is_set():
            return
        yield rows
