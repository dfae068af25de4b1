"""What a run is made of: a section of the configuration in, an object of a package out."""

import logging
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from dist_deeplab.checkpointing.folder import CheckpointFolder
from dist_deeplab.command_line import command_name
from dist_deeplab.config import RunConfig, config_to_dict, config_to_yaml
from dist_deeplab.data.blocks import BlockShuffle
from dist_deeplab.data.loader import StepSampler, TrainDataset, TrainLoader
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.cache import build_cache
from dist_deeplab.data.shards.checks import require_scorable, require_trainable
from dist_deeplab.data.shards.manifest import Manifest, check_sizes, load_manifest, require_fit
from dist_deeplab.data.stream import Place, StreamDataset, StreamLoader
from dist_deeplab.data.transforms import Augmentation
from dist_deeplab.distributed.parallel import prepare_model, separate_group
from dist_deeplab.distributed.process_group import DistEnv, ranks_on_host
from dist_deeplab.distributed.session import TrainingSession, training_session
from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.flops import peak_flops, training_flops
from dist_deeplab.model.numerics import set_determinism
from dist_deeplab.model.sync_batch_norm import use_group
from dist_deeplab.model.weights import Variant, Weights, fit_weights, load_weights
from dist_deeplab.tracking.tracker import Reporting, Tracker, open_tracker, resolve_uri
from dist_deeplab.training.apex import INSTEAD_OF_AMP, INSTEAD_OF_SGD, require_apex
from dist_deeplab.training.apex_precision import ApexPrecision
from dist_deeplab.training.loss import CrossEntropy, balanced_weights
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


def open_data(config: RunConfig, env: DistEnv) -> tuple[Manifest, Manifest | None]:
    """The manifests of training and (where configured) validation, checked against the configuration.

    One rank of each node looks at the size of every shard; the others check a shard when they open it.
    """
    if not config.data.train:
        raise UserError(
            f"no training data: make shards by `{command_name('shards')} --voc-root VOCdevkit/VOC2012 --split train "
            "--out data/voc` and add data.train=data/voc/train.json, or try `"
            f"{command_name('quickstart')}`, which draws some"
        )
    cache = build_cache(config.data.cache_dir, config.data.cache_gib)
    sets = [path.real for path in (config.data.train, config.data.val) if path]
    manifests = [load_manifest(path, cache=cache, check_shards=False) for path in sets]
    for manifest in manifests:
        env.on_each_node(check_sizes, manifest)
        expected = follow_manifest(config, manifests[0]).data
        require_fit(manifest, num_classes=expected.num_classes, ignore_label=expected.ignore_label)
    require_trainable(manifests[0])
    weights = follow_manifest(config, manifests[0]).loss.class_weights
    if weights and len(weights) != manifests[0].num_classes:
        raise UserError(
            f"loss.class_weights has {len(weights)} values, but {config.data.train} has {manifests[0].num_classes} "
            "classes; give one weight for each, background included, or auto"
        )
    if config.data.val:
        require_scorable(manifests[1])
    if manifests[-1].class_names != manifests[0].class_names:
        raise UserError(f"the class names of {config.data.train} and {config.data.val} differ; make both from one list")
    if cache:
        needed = [_cached_bytes(config, env, manifests[0]), *(manifest.size_bytes for manifest in manifests[1:])]
        cache.require_room(sum(size for size, manifest in zip(needed, manifests, strict=True) if manifest.cache))
    return manifests[0], manifests[1] if config.data.val else None


def follow_manifest(config: RunConfig, train_set: Manifest) -> RunConfig:
    """The configuration with what the training set says.

    The number of classes and the void label unless they were given, and the class weights if they are auto.
    """
    facts = {"num_classes": train_set.num_classes, "ignore_label": train_set.ignore_label}
    unsaid = {key: value for key, value in facts.items() if key not in config.data.model_fields_set}
    loss = config.loss
    if loss.class_weights == "auto":
        loss = loss.model_copy(update={"class_weights": balanced_weights(train_set.class_pixels)})
    return config.model_copy(update={"data": config.data.model_copy(update=unsaid), "loss": loss})


def _cached_bytes(config: RunConfig, env: DistEnv, train_set: Manifest) -> int:
    """Bytes of the training shards that a node's cache must hold at the same time."""
    if config.data.access == "stream":
        return 0
    if config.data.shuffle == "full":
        return train_set.size_bytes
    nodes = env.world_size // ranks_on_host() if env.launcher == "torchrun" else 1  # srun: unknown, so the most
    largest = max(shard.size_bytes for shard in train_set.shards)
    return min(train_set.size_bytes, largest * _build_blocks(config, train_set).cached_shards(max(1, nodes)))


def _build_blocks(config: RunConfig, train_set: Manifest) -> BlockShuffle:
    data = config.data
    return BlockShuffle(
        [shard.num_samples for shard in train_set.shards],
        seed=config.seed,
        window_shards=data.window_shards,
        groups=data.canonical_groups,
        global_size=config.batch.global_size,
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


def starting_weights(config: RunConfig) -> Weights | None:
    """The weights of `model.init`, or None where random ones are wanted.

    Raises:
        UserError: no such weights, or only the last layers are to be trained and nothing says on what backbone.
    """
    if config.model.init:
        return load_weights(config.model.init.real)
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
            f"synchronised batch norm with {what} takes no empty micro-batches, which {split.global_size} images one "
            f"by one on {split.world_size} processes have; use batch.micro_size=2 or more, or {what}={instead}"
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
    use_group(net, separate_group(env))
    return prepare_model(
        MultiScale(net, config.multi_scale.scales, full_grid=config.multi_scale.full_grid),
        env,
        channels_last=speed.channels_last,
        compile=speed.compile,
        compress_gradients=speed.compress_gradients,
        static_graph=speed.static_graph,
    )


def build_augmentation(config: RunConfig) -> Augmentation:
    """What happens to every training sample."""
    data = config.data
    return Augmentation(data.crop_size, data.scale_range, data.flip, data.ignore_label, data.scale_step)


def build_train_loader(run: Run, *, start: int) -> TrainLoader | StreamLoader:
    """The stream of this rank's micro-batches from step `start` on."""
    config, rank = run.config, run.env.rank
    data, pin_memory = config.data, run.env.device.type == "cuda"
    augmentation = build_augmentation(config)
    if data.access == "stream":
        if start:
            log.warning("data.access=stream: from step %d on other samples come than without the interruption", start)
        stream = StreamDataset(
            run.train_set,
            place=Place(config.seed, start, rank, run.env.world_size),
            sizes=run.split.sizes(rank),
            num_classes=data.num_classes,
            augmentation=augmentation,
            max_bad_samples=data.max_bad_samples,
        )
        return StreamLoader(stream, stop=config.max_steps, num_workers=data.num_workers, pin_memory=pin_memory)
    dataset = TrainDataset(
        run.train_set,
        seed=config.seed,
        num_classes=data.num_classes,
        augmentation=augmentation,
        max_bad_samples=data.max_bad_samples,
        sample_order=_build_blocks(config, run.train_set) if data.shuffle == "blocks" else None,
    )
    sampler = StepSampler(start, config.max_steps, split=run.split, rank=rank)
    return TrainLoader(dataset, sampler, num_workers=data.num_workers, pin_memory=pin_memory)


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
