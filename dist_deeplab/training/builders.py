"""What a run is made of: a section of the configuration in, an object of a package out; its data: `data_builders`."""

import logging
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from dist_deeplab.checkpointing.folder import CheckpointFolder
from dist_deeplab.config import RunConfig, config_to_dict, config_to_yaml
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.distributed.from_main import load_on_main
from dist_deeplab.distributed.parallel import prepare_model, separate_group, unwrap
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import TrainingSession, training_session
from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.flops import peak_flops, training_flops
from dist_deeplab.model.numerics import set_determinism
from dist_deeplab.model.sync_batch_norm import use_group
from dist_deeplab.model.weights import Variant, Weights, fit_weights, load_weights
from dist_deeplab.tracking.tracker import Reporting, Tracker, open_tracker, resolve_uri
from dist_deeplab.training.apex import INSTEAD_OF_AMP, INSTEAD_OF_SGD, require_apex
from dist_deeplab.training.apex_precision import ApexPrecision
from dist_deeplab.training.cuda_graph import graph_network
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.loss_window import LossWindow
from dist_deeplab.training.memory import explained_out_of_memory
from dist_deeplab.training.nonfinite import NonFiniteDump, NonFiniteMonitor
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.run import Run
from dist_deeplab.training.state import TrainState
from dist_deeplab.training.step import TrainStep
from dist_deeplab.training.summary import run_info

log = logging.getLogger(__name__)


def open_session(config: RunConfig, env: DistEnv) -> AbstractContextManager[TrainingSession]:
    """What lasts as long as training: the ranks' connection, the folder's lock, watchdog and signals."""
    set_determinism(config.deterministic)  # before any GPU is used
    if config.optim.implementation == "apex":
        require_apex("optim.implementation=apex", "optimizers", INSTEAD_OF_SGD)
    if config.precision.backend == "apex":
        require_apex("precision.backend=apex", "amp", INSTEAD_OF_AMP)
    limits = config.distributed
    return training_session(
        env,
        config.run_dir,
        startup_timeout_s=limits.startup_timeout_s,
        hang_timeout_s=limits.hang_timeout_s,
        max_hours=config.max_hours,
    )


def build_checkpoints(config: RunConfig, env: DistEnv) -> CheckpointFolder:
    """The run's checkpoints."""
    keep = config.checkpoint
    return CheckpointFolder(
        config.run_dir / "checkpoints",
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        is_writer=env.is_main,
    )


def build_tracker(run: Run) -> Tracker:
    """The tracker, which knows everything about the run that MLflow should show; every rank must call it."""
    config = run.config
    tracking = config.tracking
    reporting = Reporting(
        uri=resolve_uri(tracking.uri.real, config.output_dir),
        experiment=tracking.experiment,
        system_metrics=tracking.system_metrics,
        log_model=tracking.log_model,
        register_as=tracking.register_as,
        on_event=tracking.on_event,
    )
    return open_tracker(
        config.run_dir, env=run.env, reporting=reporting, config_yaml=config_to_yaml(config), run_info=run_info(run)
    )


def split_batch(config: RunConfig, env: DistEnv) -> BatchSplit:
    """The split of a step over ranks and micro-batches; with `batch.micro_size: auto` for now a rank's share at once.

    Raises:
        UserError: there are fewer images than ranks.
    """
    batch = config.batch
    micro_size = None if batch.micro_size == "auto" else batch.micro_size
    return BatchSplit.derive(
        global_size=batch.global_size,
        micro_size=micro_size,
        world_size=env.world_size,
        contiguous=config.data.shuffle == "blocks",
    )


def starting_weights(config: RunConfig, env: DistEnv) -> Weights | None:
    """The weights of `model.init`, which the main rank reads for all, or None where random ones are wanted.

    Every rank must call it.

    Raises:
        UserError: no such weights, or only the last layers are to be trained and nothing says on what backbone.
    """
    init = config.model.init.real
    found = load_on_main(env, lambda: load_weights(init).to_plain() if init else None)
    if found:
        return Weights.from_plain(found)
    if config.model.train_only == "head":
        raise UserError("model.train_only=head leaves the backbone as it is; give its weights by model.init=...")
    return None


def network_variant(config: RunConfig, base: Variant) -> Variant:
    """The weights' variant, with the mean colour of `model.mean_bgr` where it is given."""
    if not config.model.mean_bgr:
        return base
    blue, green, red = config.model.mean_bgr
    mean = (blue, green, red) if base.preprocessing.channels == "bgr" else (red, green, blue)
    return replace(base, preprocessing=replace(base.preprocessing, mean=mean))


def build_network(config: RunConfig, split: BatchSplit, variant: Variant, weights: Weights | None) -> DeepLabV2:
    """The network, with weights that depend on seed and `weights` alone.

    Raises:
        UserError: a batch norm that cannot be had here, or not with this split.
    """
    torch.manual_seed(config.seed)
    model = config.model
    if split.has_empty_parts and model.batch_norm_used == "sync" and (config.speed.compile or model.sync_bn == "torch"):
        what, instead = ("speed.compile", "false") if config.speed.compile else ("model.sync_bn", "own")
        raise UserError(
            f"synchronised batch norm with {what} takes no empty micro-batches, which "
            f"{format_count(split.global_size, 'image')} one by one on {split.world_size} processes have; "
            f"use batch.micro_size=2 or more, or {what}={instead}"
        )
    norm = norm_factory(model.batch_norm_used, sync_bn=model.sync_bn, accumulation=split.accumulation)
    net = DeepLabV2(
        model.backbone, config.data.num_classes, norm=norm, recompute=config.speed.recompute, **variant.geometry
    )
    if weights:
        log.info("weights from %s", fit_weights(net, weights, restore_last=model.restore_last))
    if model.train_only == "head":
        net.backbone.requires_grad_(False)
    return net


def build_model(config: RunConfig, env: DistEnv, net: DeepLabV2) -> nn.Module:
    """The network as it is trained: at all scales, on this rank's device, together with the other ranks."""
    speed = config.speed
    # Measured algorithms would be other ones after a restart.
    torch.backends.cudnn.benchmark = speed.cudnn_benchmark and not config.deterministic
    use_group(net, separate_group(env.device))
    return prepare_model(
        MultiScale(net, config.multi_scale.scales, full_grid=config.multi_scale.full_grid),
        env,
        channels_last=speed.channels_last,
        compile=speed.compile,
        compress_gradients=speed.compress_gradients,
        static_graph=speed.static_graph,
    )


def images_per_s_at_peak(run: Run, net: DeepLabV2) -> float | None:
    """How fast all GPUs together could be at their data sheet's rate; nobody knows that of a CPU."""
    config, env = run.config, run.env
    if env.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(env.device), config.precision.dtype)
    if peak is None:
        return None
    crop = config.data.crop_size
    flops = training_flops(MultiScale(net, config.multi_scale.scales), (crop, crop))
    return env.world_size * peak / flops


def build_precision(config: RunConfig, env: DistEnv, net: DeepLabV2, optimizer: Optimizer) -> Precision:
    """The arithmetic of forward, backward and update."""
    if config.precision.backend == "apex":
        return ApexPrecision(env.device, net, optimizer)
    return Precision(config.precision.dtype, env.device)


def build_loss_window(config: RunConfig, env: DistEnv) -> LossWindow:
    """The losses between two log lines; it also saves the samples of steps that were not finite."""
    dump = NonFiniteDump(config.run_dir / "nonfinite", {"config": config_to_dict(config)}, env.rank)
    return LossWindow(NonFiniteMonitor(config.precision.max_nonfinite_steps, dump))


def build_loss(config: RunConfig) -> CrossEntropy:
    """How the losses of a step's pixels are averaged; `follow_manifest` must have given the class weights."""
    assert config.loss.class_weights != "auto"
    return CrossEntropy(config.data.ignore_label, config.loss.class_weights, config.loss.average)


def build_step(run: Run, state: TrainState, model: nn.Module) -> TrainStep:
    """The optimizer update, warmed up where there are several ranks.

    Raises:
        TrainingError: out of memory.
    """
    config = run.config
    if config.speed.cuda_graph:  # the weights are the run's now, and so is what the graph has computed of them
        with explained_out_of_memory(config, run.split):
            graph_network(unwrap(model), _random_images(config, run), config.precision.dtype)
    step = TrainStep(
        model,
        state.optimizer,
        state.precision,
        run.variant.preprocessing,
        build_loss(config),
        config.optim.clip_norm,
    )
    if run.env.world_size > 1:
        with explained_out_of_memory(config, run.split):
            step.warm_up(micro_size=run.split.largest, crop_size=config.data.crop_size)
    return step


def _random_images(config: RunConfig, run: Run) -> torch.Tensor:
    """Normal numbers of the shape of a micro-batch, on the rank's device."""
    shape = (run.split.largest, 3, config.data.crop_size, config.data.crop_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(run.env.device)
