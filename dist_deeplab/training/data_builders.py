"""The data of a run: manifests that fit the configuration, and the stream of this rank's micro-batches."""

import logging

import torch

from dist_deeplab.command_line import command_name
from dist_deeplab.config import RunConfig
from dist_deeplab.data.blocks import BlockShuffle
from dist_deeplab.data.loader import StepSampler, TrainDataset, TrainLoader
from dist_deeplab.data.order import FullShuffle, SampleOrder
from dist_deeplab.data.repeat import RepeatShuffle, repeat_factors
from dist_deeplab.data.shards.cache import build_cache
from dist_deeplab.data.shards.checks import require_scorable, require_trainable
from dist_deeplab.data.shards.manifest import Manifest, check_sizes, load_manifest, require_fit
from dist_deeplab.data.shards.presence import read_presence
from dist_deeplab.data.stream import Place, StreamDataset, StreamLoader
from dist_deeplab.data.transforms import Augmentation
from dist_deeplab.distributed.from_main import load_on_main
from dist_deeplab.distributed.process_group import DistEnv, ranks_on_host
from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count
from dist_deeplab.training.loss import balanced_weights
from dist_deeplab.training.run import Run

log = logging.getLogger(__name__)


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
    if config.data.repeat_threshold:
        env.on_main(read_presence, manifests[0])  # there and sound, before anything is built
    weights = follow_manifest(config, manifests[0]).loss.class_weights
    if weights and len(weights) != manifests[0].num_classes:
        raise UserError(
            f"loss.class_weights has {format_count(len(weights), 'value')}, but {config.data.train} has "
            f"{format_count(manifests[0].num_classes, 'class', 'classes')}; give one weight for each, background "
            "included, or auto"
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


def build_augmentation(config: RunConfig) -> Augmentation:
    """What happens to every training sample."""
    data = config.data
    return Augmentation(
        data.crop_size, data.scale_range, data.flip, data.ignore_label, data.scale_step, data.photometric
    )


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
        sample_order=_build_order(config, run.env, run.train_set),
    )
    sampler = StepSampler(start, config.max_steps, split=run.split, rank=rank)
    return TrainLoader(dataset, sampler, num_workers=data.num_workers, pin_memory=pin_memory)


def _build_order(config: RunConfig, env: DistEnv, train_set: Manifest) -> SampleOrder:
    if config.data.shuffle == "blocks":
        return _build_blocks(config, train_set)
    if not config.data.repeat_threshold:
        return FullShuffle(train_set.num_samples, config.seed)
    presence = load_on_main(env, lambda: torch.tensor(read_presence(train_set))).numpy()
    factors = repeat_factors(presence, num_classes=train_set.num_classes, threshold=config.data.repeat_threshold)
    log.info("data.repeat_threshold=%g: %s", config.data.repeat_threshold, factors.describe(train_set.class_names))
    return RepeatShuffle(factors.samples, seed=config.seed)


def _build_blocks(config: RunConfig, train_set: Manifest) -> BlockShuffle:
    data = config.data
    return BlockShuffle(
        [shard.num_samples for shard in train_set.shards],
        seed=config.seed,
        window_shards=data.window_shards,
        groups=data.canonical_groups,
        global_size=config.batch.global_size,
    )
