"""F46: an error of ours that a user's own function raises names shard and key, exactly once, wherever it is called."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.samples.whole_image import whole_image
from tests.conftest import MakeShard

KEY = "s00002"


class TwoPartError(adq.SampleError):
    """An error of a user's own, whose constructor takes what ours do not."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} {why}")


ERRORS: dict[str, Callable[[], Exception]] = {
    "SampleError": lambda: adq.SampleError("no good"),
    "ShardError": lambda: adq.ShardError("no good"),
    "a subclass": lambda: TwoPartError("no", "good"),
    "any other": lambda: KeyError("no good"),
    "text that begins alike": lambda: adq.SampleError("shard of glass: no good"),
    "placed already": lambda: adq.SampleError(f"shard t.tar, key '{KEY}': no good"),
}


class Encoder:
    name, revision, preprocessing_hash = "theirs", "1", ""

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.error = error

    def __call__(self, images: Sequence[Any]) -> tuple[Any, None]:
        if any(image.getpixel((0, 0))[2] == 2 for image in images):
            raise self.error()
        return np.ones((len(images), 3), np.float32), None


class Importance(Encoder):
    def __call__(self, images: Sequence[Any], labels: Any, seeds: Any) -> Any:  # type: ignore[override]
        super().__call__(images)
        return np.ones((len(images), 4), np.float32)


def refusing(error: Callable[[], Exception], answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def function(sample: Any) -> Any:
        if sample["__key__"] == KEY:
            raise error()
        return answer(sample)

    return function


def numbered(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with an image of which every pixel says its number."""
    from PIL import Image

    return {**sample, "image": Image.new("RGB", (32, 32), (0, 0, int(sample["__key__"][1:])))}


PLACES: dict[str, Callable[[Callable[[], Exception]], list[adq.Pipe]]] = {
    "Map": lambda error: [adq.Map(refusing(error, dict))],
    "image": lambda error: [adq.Decode(image=refusing(error, lambda s: s["jpg"]))],
    "label": lambda error: [adq.Decode(label=refusing(error, lambda s: 1))],
    "Embed": lambda error: [adq.Map(numbered), adq.Embed(Encoder(error), image="image")],
    "DropPatches": lambda error: [
        adq.Map(numbered),
        adq.DropPatches(Importance(error), keep=0.5, patch=16, image="image"),
    ],
}


def check(error: BaseException, kind: str) -> None:
    text = str(error)
    assert re.match(rf"shard t\.tar, key '{KEY}'[:,]", text), text
    assert text.count("t.tar") == text.count(KEY) == 1, text
    assert "no good" in text or "glass" in text
    if kind in ("SampleError", "ShardError", "a subclass"):
        assert isinstance(error, adq.AdqError)


def read_all(host: str, url: str, pipes: list[adq.Pipe]) -> None:
    plain, dataset = adq.ShardDataset(url), adq.ShardDataset(url, pipes=pipes)
    if host == "stage":
        stream: Any = plain
        for pipe in pipes:
            stream = pipe(stream)
        list(stream)
    elif host == "node":
        list(adq.as_node(plain, *pipes))
    elif host == "map":
        view = dataset.as_map()
        [view[i] for i in range(len(view))]
    else:
        list(adq.Loader(dataset, num_workers=2 * (host == "workers")))


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("host", ["stage", "data set", "workers", "node", "map"])
def test_shard_and_key_are_named_once(make_shard: MakeShard, place: str, kind: str, host: str) -> None:
    if host == "workers" and (place != "Map" or kind == "a subclass"):
        pytest.skip("one place is enough where processes are made, and that class does not pickle by itself")
    url = str(make_shard("t.tar", 5))
    pipes = PLACES[place](ERRORS[kind])
    with pytest.raises(adq.AdqError) as caught:
        read_all(host, url, pipes)
    check(caught.value, kind)


def test_a_reader_of_ours_in_a_function_names_the_place_once(make_shard: MakeShard) -> None:
    url = str(make_shard("t.tar", 5))

    def image(sample: Any) -> Any:
        return whole_image({**sample, "jpg": b"<html>" if sample["__key__"] == KEY else sample["jpg"]})[1]

    for pipe in (adq.Map(lambda s: {**s, "image": image(s)}), adq.Decode(image=image)):
        with pytest.raises(adq.SampleError, match="not an image") as caught:
            list(pipe(s for s in adq.ShardDataset(url) if s["__key__"] == KEY))
        assert str(caught.value).count("t.tar") == str(caught.value).count(KEY) == 1


@pytest.mark.parametrize("n_workers", [0, 2])
def test_collate_names_the_batch_by_its_first_sample(make_shard: MakeShard, n_workers: int) -> None:
    url = str(make_shard("t.tar", 5))

    def collate(samples: list[Any]) -> Any:
        if any(sample["__key__"] == "s00003" for sample in samples):
            raise adq.SampleError("no good")
        return samples

    dataset = adq.ShardDataset(url, batch_size=2, collate=collate)
    text = rf"^shard t\.tar, key '{KEY}': in the batch of 2 that begins here: no good"
    with pytest.raises(adq.SampleError, match=text):
        list(adq.Loader(dataset, num_workers=n_workers))


def test_what_on_error_raises_names_what_it_was_asked_about(make_shard: MakeShard) -> None:
    url = str(make_shard("t.tar", 5))

    def stop(error: adq.AdqError) -> bool:
        raise adq.PlanError("enough")

    def again(error: adq.AdqError) -> bool:
        raise error

    def refuse(sample: Any) -> Any:
        raise adq.SampleError("no good")

    for on_error, text in (
        (stop, r"^shard t\.tar, key 's00000': no good; on_error raised PlanError: enough$"),
        (again, r"^shard t\.tar, key 's00000': no good$"),
    ):
        for stream in (
            adq.ShardDataset(url, pipes=[adq.Map(refuse)], on_error=on_error),
            adq.Map(refuse, on_error=on_error)(adq.ShardDataset(url)),
        ):
            with pytest.raises(adq.AdqError, match=text) as caught:
                list(stream)
            assert isinstance(caught.value, adq.PlanError) == (on_error is stop)


def test_a_users_score_or_encoder_names_the_place(make_shard: MakeShard, tmp_path: Path) -> None:
    url = str(make_shard("t.tar", 3))

    class Always(Encoder):
        def __call__(self, images: Sequence[Any]) -> tuple[Any, None]:
            raise self.error()

    class Score(adq.Score):
        name, revision = "theirs", "1"

        def per_sample(self, image: Any, h: Any) -> float:
            raise adq.SampleError("no good")

        def per_bin(self, values: Any) -> Any:
            return np.ones(len(values))

    for more in ({"encoder": Always(ERRORS["SampleError"])}, {"encoder": "thumbnail", "scores": [Score()]}):
        with pytest.raises(adq.SampleError, match=r"shard t\.tar, key 's00000': .*no good") as caught:
            adq.embed_shards(url, out=tmp_path / "features", **more)  # type: ignore[arg-type]
        assert str(caught.value).count("t.tar") == str(caught.value).count("s00000") == 1
