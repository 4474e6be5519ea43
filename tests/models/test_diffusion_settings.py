"""Steps of a strength lose none to floats; foreign settings of a scheduler are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adq_wds as adq
from adq_wds.models import Latent, SDEdit, load_scheduler
from tests.models.test_diffusion import DDIMScheduler, Half, Pipeline, needs_diffusers

STRENGTHS = pytest.mark.parametrize(
    ("strength", "steps", "taken"), [(0.29, 100, 29), (1 / 49, 49, 1), (0.35, 10, 3), (1.0, 7, 7)]
)


@STRENGTHS
def test_a_product_of_floats_loses_no_step(strength: float, steps: int, taken: int) -> None:
    calls = []
    unet = Half()
    unet.register_forward_hook(lambda *of_call: calls.append(of_call))
    images = np.zeros((1, 3, 16, 16), np.float32)
    SDEdit(unet, DDIMScheduler(), strength, steps)(images, None, images)
    assert len(calls) == taken


class Img2Img(Pipeline):
    """The outer form of an img2img pipeline, which notes the steps that it takes."""

    unet, vae_scale_factor = Half(), 1

    def __call__(self, image: Any, strength: float, num_inference_steps: int, **options: Any) -> Any:  # type: ignore[override]
        assert 0 <= strength <= 1
        self.taken = int(num_inference_steps * strength)
        return self

    @property
    def images(self) -> torch.Tensor:
        return torch.zeros(1, 3, 16, 16)


@STRENGTHS
def test_a_pipeline_takes_as_many(strength: float, steps: int, taken: int) -> None:
    pipeline = Img2Img()
    Latent(pipeline, strength=strength, steps=steps)(
        np.zeros((1, 3, 16, 16), np.float32), None, np.zeros(1, np.uint64)
    )
    assert pipeline.taken == taken


@needs_diffusers
@pytest.mark.parametrize(
    "settings", ['{"beta_schedule": "mine"}', '{"num_train_timesteps": "many"}', "[" * 99_999, "{"]
)
def test_foreign_settings_of_a_scheduler_are_refused(settings: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text(settings)
    with pytest.raises(
        adq.AdqError, match=r"scheduler_config\.json: (no settings of a scheduler|cannot be read)"
    ):
        load_scheduler(tmp_path)
