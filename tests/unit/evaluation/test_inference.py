"""Several scales, mirroring and half-pixel resizing equal plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.config import EvalConfig, RunConfig, config_from_dict, config_to_dict
from dist_deeplab.errors import UserError
from dist_deeplab.evaluation.inference import (
    Predictor,
    inference_name,
    inference_settings,
    load_network,
    nearest_grid_size,
)
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale, scaled_length
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights import SCRATCH
from tests.networks import discerning_network

NUM_CLASSES = 5


@pytest.fixture(scope="module")
def net() -> DeepLabV2:
    return discerning_network(NUM_CLASSES)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 9, 9), generator=rng).float()
    return F.interpolate(coarse, (65, 97), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def content(image: torch.Tensor) -> torch.Tensor:
    return torch.tensor([image.shape[2:]] * len(image))


@torch.no_grad()
def _plain(net: DeepLabV2, image: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    logits = net(CAFFE.normalize(image, content))
    return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=True)


def test_one_scale_is_the_network_upsampled_with_corners_aligned(
    net: DeepLabV2, image: torch.Tensor, content: torch.Tensor
) -> None:
    logits = Predictor(net, CAFFE).logits(image, content)
    assert logits.shape == (2, NUM_CLASSES, 65, 97)
    assert torch.equal(logits, _plain(net, image, content))


@torch.no_grad()
def test_the_maximum_over_scales_is_the_one_that_is_trained(
    net: DeepLabV2, image: torch.Tensor, content: torch.Tensor
) -> None:
    scales = (0.5, 0.75, 1.0)
    fused = MultiScale(net, scales)(CAFFE.normalize(image, content))["fused"]
    expected = F.interpolate(fused, (65, 97), mode="bilinear", align_corners=True)
    # Training resizes by matrix products, which a GPU adds up in a fixed order: equal but for rounding.
    torch.testing.assert_close(Predictor(net, CAFFE, scales).logits(image, content), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, _plain(net, image, content), rtol=1e-2)


@torch.no_grad()
def test_the_mean_over_scales_is_taken_on_the_finest_grid(
    net: DeepLabV2, image: torch.Tensor, content: torch.Tensor
) -> None:
    x = CAFFE.normalize(image, content)
    fine = net(F.interpolate(x, (97, 145), mode="bilinear", align_corners=True))
    coarse = F.interpolate(net(x), fine.shape[2:], mode="bilinear", align_corners=True)
    expected = F.interpolate((fine + coarse) / 2, (65, 97), mode="bilinear", align_corners=True)
    torch.testing.assert_close(Predictor(net, CAFFE, (1.0, 1.5), fusion="mean").logits(image, content), expected)


def test_flipping_averages_two_predictions_and_commutes_with_a_flipped_image(
    net: DeepLabV2, image: torch.Tensor, content: torch.Tensor
) -> None:
    predictor = Predictor(net, CAFFE, flip=True)
    logits = predictor.logits(image, content)
    expected = (_plain(net, image, content) + _plain(net, image.flip(3), content).flip(3)) / 2
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predictor.logits(image.flip(3), content).flip(3), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 2.0])
@pytest.mark.parametrize("length", [9, 65, 97, 321, 505])
def test_scaled_sizes_keep_logits_on_pixels_and_are_the_trained_ones_where_these_do(length: int, scale: float) -> None:
    size = nearest_grid_size(length, scale)
    assert size % 8 == 1
    assert abs(size - scaled_length(length, scale)) <= 4
    if scaled_length(length, scale) % 8 == 1:
        assert size == scaled_length(length, scale)


@pytest.mark.parametrize("length", [1, 9])
def test_however_small_an_image_two_logits_lie_on_each_axis_at_any_scale(length: int) -> None:
    """A single logit could not be resized: the corners of its axis would be one point."""
    assert nearest_grid_size(length, 0.25) == nearest_grid_size(length, 0.5) == 9


@torch.no_grad()
def test_half_pixel_resizing_takes_the_image_unpadded_as_kazuto1011s_evaluation(
    net: DeepLabV2, image: torch.Tensor
) -> None:
    content = torch.tensor([[59, 90]] * 2)
    x = CAFFE.normalize(image, content)[:, :, :59, :90]
    full = net(x)
    fused = full
    for scale in (0.5, 0.75):
        small = net(F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False))
        fused = torch.maximum(fused, F.interpolate(small, full.shape[2:], mode="bilinear", align_corners=False))
    expected = F.interpolate(fused, (59, 90), mode="bilinear", align_corners=False)
    predictor = Predictor(net, CAFFE, (0.5, 0.75, 1.0), align_corners=False)
    torch.testing.assert_close(predictor.logits(image, content), expected)
    with pytest.raises(ValueError, match="one size"):
        predictor.logits(image, torch.tensor([[59, 90], [58, 90]]))


def test_padding_does_not_reach_beyond_what_the_network_sees(net: DeepLabV2, image: torch.Tensor) -> None:
    content = torch.tensor([[59, 90]] * 2)
    noisy = image.clone()
    noisy[:, :, 59:] = 255
    predictor = Predictor(net, CAFFE, (0.5, 1.0), flip=True)
    assert torch.equal(predictor.logits(noisy, content), predictor.logits(image, content))


def test_a_checkpoint_gives_back_its_network(net: DeepLabV2, image: torch.Tensor, content: torch.Tensor) -> None:
    config = RunConfig.model_validate({"model": {"backbone": "resnet_tiny"}, "data": {"num_classes": NUM_CLASSES}})
    saved = Checkpoint({"model": net.state_dict()}, config, SCRATCH, ())
    again = load_network(saved)
    assert not again.training
    assert torch.equal(Predictor(again, CAFFE).logits(image, content), _plain(net, image, content))
    changed = inference_settings(saved, ["eval.scales=[0.5,1.0]", "eval.crf=true", "crf.bi_w=5"])
    assert (changed.eval.scales, changed.eval.crf, changed.crf.bi_w) == ((0.5, 1.0), True, 5.0)
    for override in ("optim.lr=1", "eval.every=3", "max_steps=3"):
        with pytest.raises(UserError, match="no meaning here"):
            inference_settings(saved, [override])


def test_a_checkpoint_does_not_say_where_files_go_nor_how_much_of_the_machine_is_used() -> None:
    config = config_to_dict(RunConfig.model_validate({"eval": {"scales": [0.5, 1.0]}, "data": {"num_classes": 5}}))
    config["data"] |= {"cache_dir": "/home/you", "cache_gib": 1e-9, "num_workers": 256}
    config["crf"]["num_workers"], config["eval"]["batch_size"] = 1000, 10**9
    config["output_dir"], config["tracking"]["uri"] = "/home/you/runs", "https://host/store"
    stranger = Checkpoint({}, config_from_dict(config, where="the test"), SCRATCH, ())
    settings = inference_settings(stranger, [])
    defaults = RunConfig()
    assert (settings.data.cache_dir, settings.data.cache_gib) == ("", defaults.data.cache_gib)
    assert (settings.data.num_workers, settings.crf.num_workers) == (defaults.data.num_workers, None)
    assert (settings.eval.batch_size, settings.output_dir, settings.tracking.uri) == (4, "runs", "")
    assert (settings.eval.scales, settings.data.num_classes) == ((0.5, 1.0), 5), "what a score depends on stays"
    assert inference_settings(stranger, ["data.cache_dir=/scratch"]).data.cache_dir == "/scratch"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, ""),
        ({"fusion": "mean"}, ""),
        ({"scales": (0.5, 0.75, 1.0), "flip": True, "crf": True}, "_s0.5-0.75-1_flip_crf"),
        ({"scales": (1.0, 0.5), "fusion": "mean", "align_corners": False}, "_s1-0.5_mean_halfpixel"),
    ],
)
def test_each_way_of_asking_has_a_name(keys: dict[str, object], name: str) -> None:
    assert inference_name(EvalConfig.model_validate(keys)) == name


@pytest.mark.parametrize("scales", [[], [1.0, 1.0], [0.0], [-1]])
def test_scales_that_cannot_be_are_refused(scales: list[float]) -> None:
    with pytest.raises(ValueError, match="scales"):
        EvalConfig.model_validate({"scales": scales})


@pytest.mark.parametrize("size", [(1, 1), (3, 40)])
def test_half_pixel_scales_of_a_image_of_a_few_pixels_have_at_least_one(
    net: DeepLabV2, image: torch.Tensor, size: tuple[int, int]
) -> None:
    predictor = Predictor(net, CAFFE, (0.25, 1.0), align_corners=False)
    logits = predictor.logits(image[:1], torch.tensor([size]))
    assert logits.shape == (1, NUM_CLASSES, *size)
    assert logits.isfinite().all()
