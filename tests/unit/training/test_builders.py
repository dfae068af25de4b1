"""What cannot be built is refused with what to set instead."""

import pytest
import torch

from dist_deeplab.config import load_config
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.errors import UserError
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training.builders import build_network


@pytest.mark.parametrize("setting", ["model.sync_bn=torch", "speed.compile=true"])
def test_not_every_batch_norm_takes_empty_micro_batches(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = load_config(None, ["model.backbone=resnet_tiny", setting])
    name = setting.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"{name} .* 4 images .* on 3 processes .*batch\.micro_size=2 or more, or {name}="
    ):
        build_network(config, BatchSplit(4, 1, 3), SCRATCH, None)
    build_network(config, BatchSplit(4, 2, 3), SCRATCH, None)
    frozen = load_config(None, ["model.backbone=resnet_tiny", "model.batch_norm=frozen", setting])
    build_network(frozen, BatchSplit(4, 1, 3), SCRATCH, None)
