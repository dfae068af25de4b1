"""How many images a step may take at once, found out by trying, and what to set where memory was not enough."""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import torch

from dist_deeplab.config import RunConfig
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.distributed.parallel import place_model
from dist_deeplab.distributed.process_group import DistEnv, gather_to_all, ranks_on_host
from dist_deeplab.errors import TrainingError
from dist_deeplab.logs import format_count
from dist_deeplab.model.deeplabv2 import MultiScale
from dist_deeplab.model.weights import Variant
from dist_deeplab.training.memory_estimate import estimate_memory, temporary_network
from dist_deeplab.training.precision import Precision

log = logging.getLogger(__name__)

CPU_SHARE = 0.5  # of the free memory that activations may take: the loader, the gradients and others need some too
GPU_SPARE = 0.05  # of the GPU's memory that a dry run must leave free


def find_micro_batch_size(
    config: RunConfig, env: DistEnv, split: BatchSplit, variant: Variant, before: int = 0
) -> BatchSplit:
    """The split with `batch.micro_size: auto` found out, which is said; every rank calls it.

    It is the largest size that fits into every rank's memory: on a GPU by trying with a network that is thrown away,
    on the CPU (which has no such error, but starts to swap) by the count of activations against half of the memory that
    is free. A resumed run keeps the size it had `before`.
    """
    if config.batch.micro_size != "auto":
        return split
    if before:
        log.info("batch.micro_size=auto: at most %s at once, as before", format_count(before, "image"))
        return replace(split, micro_size=before)
    sizes = split.micro_sizes
    if env.device.type == "cuda":
        largest, how = largest_fitting(sizes, _gpu_trial(config, variant, env.device)), "by trying"
    else:
        needed = estimate_memory(config, variant).image_bytes
        allowed = CPU_SHARE * free_memory_bytes() / ranks_on_host()
        largest, how = largest_fitting(sizes, lambda size: size * needed <= allowed), "by half of the free memory"
    agreed = min(gather_to_all(largest))
    if not agreed:
        raise TrainingError(
            f"not even one image of {config.data.crop_size} fits into memory; {_remedies(config, smaller=0)}"
        )
    most = format_count(sizes[0], "image")
    log.info("batch.micro_size=auto: %d of at most %s of a rank at once (%s)", agreed, most, how)
    return replace(split, micro_size=agreed)


def largest_fitting(sizes: list[int], fits: Callable[[int], bool]) -> int:
    """The first of `sizes` (largest first) that fits, or 0; running out of memory means that it does not."""
    for size in sizes:
        try:
            if fits(size):
                return size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Not inside the except clause: the error's traceback holds what the trial had allocated.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


@contextlib.contextmanager
def explained_out_of_memory(config: RunConfig, split: BatchSplit) -> Iterator[None]:
    """Turn running out of memory inside this context into a sentence on what to set.

    Raises:
        TrainingError: instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        smaller = max((size for size in split.micro_sizes if size < split.largest), default=0)
        raise TrainingError(
            f"out of memory with micro-batches of {format_count(split.largest, 'image')} of {config.data.crop_size}; "
            f"{_remedies(config, smaller=smaller)}"
        ) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory of GPU or CPU is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _remedies(config: RunConfig, *, smaller: int) -> str:
    remedies = [f"batch.micro_size={smaller} (or auto; the images of a step stay the same)"] if smaller else []
    remedies += [] if config.speed.recompute else ["speed.recompute=true"]
    remedies += ["precision.dtype=bf16"] if config.precision.dtype in ("fp32", "tf32") else []
    remedies += ["fewer multi_scale.scales"] if config.multi_scale.scales else []
    return f"set {', '.join(remedies)}, more GPUs, or a smaller data.crop_size"


def free_memory_bytes() -> int:
    """Memory that the system would give away without swapping."""
    return int(psutil.virtual_memory().available)


def _gpu_trial(config: RunConfig, variant: Variant, device: torch.device) -> Callable[[int], bool]:
    """A function that tries whether a step with micro-batches of a size fits on the GPU; it draws no random numbers."""

    def fits(size: int) -> bool:
        crop = config.data.crop_size
        try:
            with torch.random.fork_rng([device]):
                net = temporary_network(config, variant)
                scales, channels_last = config.multi_scale.scales, config.speed.channels_last
                model = place_model(MultiScale(net, scales), device, channels_last=channels_last)
                precision = Precision(config.precision.dtype, device)
                # Momentum, and the buckets in which gradients are added up over the ranks, are as large as the weights.
                ballast = [torch.empty_like(p) for p in net.parameters() if p.requires_grad for _ in range(2)]
                with precision.autocast():
                    outputs = model(torch.zeros(size, 3, crop, crop, device=device))
                precision.backward(torch.stack([logits.float().square().mean() for logits in outputs.values()]).sum())
                del ballast
            free, total = torch.cuda.mem_get_info(device)
            return free >= GPU_SPARE * total
        finally:
            net = model = outputs = None  # type: ignore[assignment]

    return fits
