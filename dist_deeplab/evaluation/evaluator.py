"""Score a network on a validation set: each image once at its own size, whatever the number of ranks."""

import functools
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_deeplab.data.loader import Batch, EvalDataset, eval_batches, eval_loader
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.data.transforms import pad_to
from dist_deeplab.distributed.process_group import DistEnv, all_reduce_sum, gather_bytes, gather_to_all
from dist_deeplab.distributed.session import Session
from dist_deeplab.errors import TrainingError
from dist_deeplab.evaluation.accumulator import ConfusionAccumulator, ImageScore, band_map
from dist_deeplab.evaluation.confusion import count_pixels, image_mious
from dist_deeplab.evaluation.crf import CrfPool
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.evaluation.prediction import classes_of, classes_of_one, probabilities_of_one
from dist_deeplab.logs import format_count


@dataclass(frozen=True)
class Panel:
    """One validation image to look at: image uint8 [H, W, 3] RGB, label and pred uint8 [H, W], its own mean IoU."""

    key: str
    image: np.ndarray
    label: np.ndarray
    pred: np.ndarray
    iou: float = math.nan


@dataclass(frozen=True)
class Evaluation:
    """What all ranks saw together.

    confusion: int64 [classes, classes], rows label, columns prediction. panels: the set's first images to look at.
    trimap: int64 [len(TRIMAP_WIDTHS), classes, classes], the same of the pixels near borders only. images: each
    image's score, in the set's order.
    """

    confusion: np.ndarray
    num_images: int
    ignore_label: int
    panels: list[Panel]
    trimap: np.ndarray | None = None
    images: tuple[ImageScore, ...] = ()


@dataclass(frozen=True)
class Loading:
    """How images reach the network: loader processes per rank (0: none), and images per batch at most."""

    num_workers: int
    batch_size: int = 1


class EvaluationStopped(Exception):
    """A rank was asked to stop, so nothing was scored."""


def evaluate(
    predictor: Predictor,
    manifest: Manifest,
    session: Session,
    *,
    loading: Loading,
    num_panels: int = 0,
    crf: CrfPool | None = None,
) -> Evaluation:
    """The evaluation of a network on all images of a shard set; every rank must call it.

    Images of one size form batches, the same ones at any world size, and the ranks take turns at these: so the
    confusion matrix does not depend on the number of ranks, bit for bit.

    Args:
        predictor: the network, on the rank's device and not wrapped by DDP (ranks may have unequal numbers of
            batches), and how it is asked.
        manifest: the set; its void label is not scored.
        session: this rank among the ranks; its stop request is looked at after each batch.
        loading: how images reach the network.
        num_panels: how many images, spread over the set, to return for looking at.
        crf: refines the predictions; None: the network's own count.

    Raises:
        EvaluationStopped: on all ranks, where one was asked to stop.
        TrainingError: all ranks together saw more or fewer images than the set has.
        ShardError: a sample can't be read.
    """
    env = session.env
    bands = functools.partial(band_map, ignore_label=manifest.ignore_label)
    dataset = EvalDataset(manifest, num_classes=manifest.num_classes, ignore_label=manifest.ignore_label, bands=bands)
    all_batches = eval_batches(dataset, batch_size=loading.batch_size, padded=predictor.align_corners)
    batches = all_batches[env.rank :: env.world_size]
    accumulator = ConfusionAccumulator(manifest, env.device)
    stopped = False
    for batch, pred in _predictions(predictor, dataset, batches, env, num_workers=loading.num_workers, crf=crf):
        accumulator.add(batch, pred)
        accumulator.report_progress(out_of=sum(map(len, batches)))
        session.progress.mark()
        stopped = bool(session.stop)
        if stopped:
            break
    session.wait_for_all()
    if all_reduce_sum(torch.tensor(int(stopped))).item():
        raise EvaluationStopped
    images = _in_the_sets_order(accumulator.scores(), [index for indices in batches for index in indices], manifest)
    total = all_reduce_sum(accumulator.counts).cpu().numpy()
    return Evaluation(
        confusion=total.sum(0),
        num_images=len(images),
        ignore_label=manifest.ignore_label,
        panels=draw_panels(predictor, manifest, env, spread_over(manifest.num_samples, num_panels), crf=crf),
        trimap=total.cumsum(0)[:-1],
        images=images,
    )


def _in_the_sets_order(own: list[ImageScore], indices: list[int], manifest: Manifest) -> tuple[ImageScore, ...]:
    """The scores of all ranks, sorted by the images' indices in the set; `indices` are those of `own`.

    Raises:
        TrainingError: an image of the set is missing or was scored twice.
    """
    ranks = gather_to_all([(index, score.key, score.miou) for index, score in zip(indices, own, strict=True)])
    scored = sorted((index, ImageScore(key, miou)) for rank in ranks for index, key, miou in rank)
    if [index for index, _ in scored] != list(range(manifest.num_samples)):
        raise TrainingError(
            f"evaluation saw {format_count(len(scored), 'image')}, but {manifest.path} has {manifest.num_samples}; the "
            "score would be wrong"
        )
    return tuple(score for _, score in scored)


def spread_over(num_samples: int, count: int) -> list[int]:
    """Indices of `count` samples, evenly spread: neighbours, e.g. frames of a video, look alike."""
    count = min(count, num_samples)
    return [number * num_samples // count for number in range(count)]


def draw_panels(
    predictor: Predictor, manifest: Manifest, env: DistEnv, indices: Sequence[int], *, crf: CrfPool | None = None
) -> list[Panel]:
    """Panels of some of the set's images, in the order of `indices`; every rank must call it and gets all."""
    dataset = EvalDataset(manifest, num_classes=manifest.num_classes, ignore_label=manifest.ignore_label)
    own = list(indices)[env.rank :: env.world_size]
    panels = []
    predictions = _predictions(predictor, dataset, [[index] for index in own], env, num_workers=0, crf=crf)
    for index, (batch, pred) in zip(own, predictions, strict=True):
        image, label = content_of(batch, 0)
        shown = pred[0, : label.shape[0], : label.shape[1]].cpu().numpy()
        counts = count_pixels(
            torch.from_numpy(label)[None],
            torch.from_numpy(shown)[None],
            num_classes=manifest.num_classes,
            ignore_label=manifest.ignore_label,
        )
        panels.append((index, Panel(batch.keys[0], image, label, shown, image_mious(counts[:, 0]).item())))
    all_ranks = {index: panel for content in gather_bytes(_pack(panels)) for index, panel in _unpack(content)}
    return [all_ranks[index] for index in indices]


def _pack(panels: list[tuple[int, Panel]]) -> bytes:
    """Numbered panels as the bytes of an `.npz` file: no pickles travel between ranks."""
    buffer = io.BytesIO()
    fields = [(f"{index}.{name}", value) for index, panel in panels for name, value in vars(panel).items()]
    np.savez(buffer, **dict(fields))
    return buffer.getvalue()


def _unpack(content: bytes) -> Iterator[tuple[int, Panel]]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        for index in sorted({int(name.partition(".")[0]) for name in file.files}):
            image, label, pred = (file[f"{index}.{name}"] for name in ("image", "label", "pred"))
            yield index, Panel(str(file[f"{index}.key"]), image, label, pred, float(file[f"{index}.iou"]))


def content_of(batch: Batch, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [H, W, 3] and label uint8 [H, W] of one sample of a batch, without its padding."""
    height, width = batch.content[number].tolist()
    image = batch.image[number, :, :height, :width].permute(1, 2, 0)
    return np.ascontiguousarray(image.numpy()), np.ascontiguousarray(batch.label[number, :height, :width].numpy())


def _predictions(
    predictor: Predictor,
    dataset: EvalDataset,
    batches: list[list[int]],
    env: DistEnv,
    *,
    num_workers: int,
    crf: CrfPool | None,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield each batch with its classes, uint8 [B, H, W] on the device, and leave the network as it was."""
    loaded = eval_loader(dataset, batches, num_workers=num_workers, pin_memory=env.device.type == "cuda")
    was_training, benchmark = predictor.net.training, torch.backends.cudnn.benchmark
    predictor.net.eval()
    torch.backends.cudnn.benchmark = False  # 130 VOC images have 32 padded sizes, and tuning takes 1 s or so for each
    try:
        if crf is None:
            for batch in loaded:
                yield batch, _classes(predictor, batch, env.device)
        else:
            for batch, pred in crf.predict(_split_for_crf(predictor, loaded, env.device)):
                yield batch, torch.from_numpy(pred)[None].to(env.device)
    finally:
        predictor.net.train(was_training)
        torch.backends.cudnn.benchmark = benchmark


def _classes(predictor: Predictor, batch: Batch, device: torch.device) -> torch.Tensor:
    """The classes of a batch, uint8 [B, H, W] on the device; images that are too large go in windows, as in predict."""
    if not predictor.windows.needed_for(batch.content.max(dim=0).values.tolist()):
        return classes_of(predictor.logits(batch.image.to(device, non_blocking=True), batch.content))
    size = (batch.image.shape[2], batch.image.shape[3])
    images = [content_of(batch, number)[0] for number in range(len(batch.keys))]
    preds = [pad_to(classes_of_one(predictor, image, device), size, 0) for image in images]
    return torch.from_numpy(np.stack(preds)).to(device)


def _split_for_crf(
    predictor: Predictor, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Yield each image of the batches as a batch of one, with its image and probabilities, without padding."""
    for batch in batches:
        whole: np.ndarray | None = None
        if not predictor.windows.needed_for(batch.content.max(dim=0).values.tolist()):
            logits = predictor.logits(batch.image.to(device, non_blocking=True), batch.content)
            whole = logits.softmax(1).cpu().numpy()  # the host waits here; the CRF takes far longer
        for number, key in enumerate(batch.keys):
            image, label = content_of(batch, number)
            one = Batch(
                image=batch.image[number : number + 1],
                label=torch.from_numpy(label)[None],
                content=batch.content[number : number + 1],
                keys=[key],
                bands=None
                if batch.bands is None
                else batch.bands[number : number + 1, : label.shape[0], : label.shape[1]],
            )
            if whole is None:
                yield one, image, probabilities_of_one(predictor, image, device)
            else:
                yield one, image, np.ascontiguousarray(whole[number, :, : label.shape[0], : label.shape[1]])
