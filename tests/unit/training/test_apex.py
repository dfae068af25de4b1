"""NVIDIA's apex is told from its namesake without running any of it, and its amp keeps to `Precision`'s signatures."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dist_deeplab.config import OptimConfig
from dist_deeplab.errors import UserError
from dist_deeplab.training import apex as apex_rules
from dist_deeplab.training.apex import find_apex, require_apex
from dist_deeplab.training.apex_precision import ApexPrecision
from dist_deeplab.training.optim import build_optimizer, set_lr, update_unless

NVIDIA = "PyTorch Extensions written by NVIDIA"
PYRAMID = "Pyramid toolkit to add velruse, Flash Messages, CSRF, ReCaptcha and Sessions"
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package named apex on the path that fails when it is imported, and what belongs to it."""

    def install(summary: str | None, *parts: str, extensions: bool = True) -> Path:
        for part in ("", *parts):
            folder = tmp_path / "apex" / part
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text("raise AssertionError('nobody may run this')\n")
        if "optimizers" in parts:
            (tmp_path / "apex" / "optimizers" / "fused_sgd.py").write_text("")
        if summary is not None:
            info = tmp_path / "apex-0.1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: 0.1\nSummary: {summary}\n")
        if extensions:
            (tmp_path / "amp_C.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return tmp_path

    yield install
    sys.modules.pop("amp_C", None)


def _refusal(key: str = "optim.implementation=apex", part: str = "optimizers") -> str:
    with pytest.raises(UserError) as caught:
        require_apex(key, part, "the other way")
    message = str(caught.value)
    assert message.startswith(key) and message.endswith("set the other way")
    assert "\n" not in message
    return message


def test_nvidias_apex_of_before_may_2025_has_both(install: Install) -> None:
    install(NVIDIA, "optimizers", "amp", "parallel")
    require_apex("a", "optimizers", "b")
    require_apex("a", "amp", "b")


def test_todays_apex_has_the_optimizer_and_the_removal_of_amp_is_told(install: Install) -> None:
    install(NVIDIA, "optimizers")
    require_apex("a", "optimizers", "b")
    message = _refusal("precision.backend=apex", "amp")
    assert "removed on 2025-05-08 (commit cb65b8ed)" in message


def test_the_namesake_from_pypi_is_named(install: Install) -> None:
    install(PYRAMID, "lib", "optimizers", "amp")
    message = _refusal()
    assert "apex 0.1 is another project (PyPI's toolkit for Pyramid)" in message
    assert "pip uninstall apex" in message
    assert "https://github.com/NVIDIA/apex" in message


def test_a_checkout_without_metadata_is_known_by_its_layout(install: Install) -> None:
    install(None, "optimizers")
    found = find_apex()
    assert found is not None
    assert found.is_nvidias
    assert found.version == ""


def test_another_folder_named_apex_is_not_nvidias(install: Install) -> None:
    install(None, "lib")
    assert "another project" in _refusal()


def test_without_apex_it_is_told_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apex_rules.importlib.util, "find_spec", lambda name: None)
    assert find_apex() is None
    assert "not installed" in _refusal()


def test_apex_without_its_extensions_is_told(install: Install) -> None:
    install(NVIDIA, "optimizers", extensions=False)
    assert "no CUDA extensions" in _refusal()


def test_an_extension_built_for_another_torch_is_one_sentence(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(NVIDIA, "optimizers")
    (folder / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c105ErrorC2E\\nmore lines')\n")
    assert f"does not work with torch {torch.__version__} (undefined symbol: _ZN3c105ErrorC2E)" in _refusal()


def test_apex_without_a_gpu_is_told(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(NVIDIA, "optimizers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in _refusal()


class FusedSGD(torch.optim.SGD):
    """SGD with the methods of apex's FusedSGD (6424da3b): `zero_grad` takes no argument, rates are floats."""

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert all(type(group["lr"]) is float for group in self.param_groups), "apex's kernel takes no tensor"
        super().step(closure)


def test_a_step_drives_apexs_optimizer_by_its_own_signatures(
    make_net: Any, make_step: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apex_rules, "require_apex", lambda *_: None)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedSGD=FusedSGD))
    nets = []
    for implementation in ("torch", "apex"):
        net = make_net()
        update = make_step(net, optim=OptimConfig(lr=0.01, implementation=implementation))
        assert isinstance(update.optimizer, FusedSGD) == (implementation == "apex")
        update.warm_up(micro_size=2, crop_size=65)
        for step in range(3):
            set_lr(update.optimizer, torch.tensor(0.01 / (1 + step), dtype=torch.float64))
            update([make_batch([0.1, 0.3], seed=step), make_batch([0.2], seed=9)])
        nets.append(net)
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or (lambda a: a is None or not a.is_nvidias)(find_apex()),
    reason="needs a GPU and NVIDIA apex with its extensions",
)
def test_fused_sgd_makes_the_update_of_torchs_sgd(make_net: Any) -> None:
    nets = [make_net("local").cuda() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        gradients = [torch.randn(p.shape, generator=generator).cuda() for p in nets[0].parameters()]
        for net, name in zip(nets, ("torch", "apex"), strict=True):
            if step == 0:
                net.optimizer = build_optimizer(net, OptimConfig(lr=0.01, implementation=name))
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            update_unless(net.optimizer, torch.tensor(step == 1, device="cuda"))
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- amp, against a stand-in that keeps to its documentation ----------------------------------------------------------


class StandIn(ModuleType):
    """What `apex.amp` promises at level O1, but for the half precision."""

    def __init__(self) -> None:
        super().__init__("apex.amp")
        self.scale = 2.0**10
        scaler = SimpleNamespace(loss_scale=lambda: self.scale)
        self._amp_state = SimpleNamespace(_amp_state=SimpleNamespace(loss_scalers=[scaler]))
        self.calls: list[bool] = []

    def initialize(self, net: nn.Module, optimizer: Any, *, opt_level: str, verbosity: int) -> tuple[Any, Any]:
        assert opt_level == "O1"
        optimizer._amp_stash = SimpleNamespace(already_patched=False)
        return net, optimizer

    @contextlib.contextmanager
    def scale_loss(self, loss: torch.Tensor, optimizer: Any, *, delay_unscale: bool) -> Iterator[torch.Tensor]:
        self.calls.append(delay_unscale)
        yield loss * self.scale
        if delay_unscale:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        for gradient in gradients:
            gradient /= self.scale
        if not all(torch.isfinite(gradient).all() for gradient in gradients):
            self.scale /= 2
            real = optimizer.step

            def skip() -> None:
                optimizer.step = real
                optimizer._amp_stash.already_patched = False

            optimizer.step = skip
            optimizer._amp_stash.already_patched = True

    def state_dict(self) -> dict[str, Any]:
        return {"loss_scaler0": {"loss_scale": self.scale}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = state["loss_scaler0"]["loss_scale"]


@pytest.fixture
def amp(install: Install, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    install(NVIDIA, "optimizers", "amp")
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.amp", stand_in)
    return stand_in


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_by_amp_is_that_of_float32_and_an_overflow_skips_it(amp: StandIn, fused: bool) -> None:
    torch.manual_seed(0)
    ours, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, fused=fused)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    with pytest.MonkeyPatch.context() as patch:  # what is installed was checked in the tests above
        patch.setattr("dist_deeplab.training.apex_precision.require_apex", lambda *_: None)
        precision = ApexPrecision(torch.device("cpu"), ours, optimizer)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        optimizer.zero_grad()
        factor = math.inf if step == 1 else 1.0
        precision.backward(ours(x[:2]).square().sum(), last=False)
        precision.backward(ours(x[2:]).square().sum() * factor, last=True)
        skipped, _ = precision.step(optimizer, 0.0)
        assert bool(skipped) == (step == 1)
        if step != 1:
            plain.zero_grad()
            reference(x).square().sum().backward()
            plain.step()
        for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one, other)
    assert amp.calls == [True, False] * 3
    assert float(precision.loss_scale()) == 2.0**9
    saved = precision.state_dict()
    amp.scale = 1.0
    precision.load_state_dict(saved)
    assert amp.scale == 2.0**9
