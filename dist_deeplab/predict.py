"""Predict images: class masks, and what helps to look at them.

    python -m dist_deeplab.predict runs/voc_resnet101/checkpoints/best.pt photos/ --out predictions --side-by-side
    torchrun --nproc_per_node 8 -m dist_deeplab.predict CHECKPOINT 'JPEGImages/2008_*.jpg' --out DIR eval.flip=true
    ... --voc-submission comp5 --list VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt      # for the PASCAL server

Takes files, folders (searched to any depth) and quoted patterns of any kind of image; EXIF orientation is applied.
Writes OUT/<name>.png, class indices with VOC's palette, and on request OUT/overlay/<name>.jpg,
OUT/side_by_side/<name>.jpg and OUT/probabilities/<name>.npz (`prob`, float16 [classes, height, width]). Files that
can't be read are listed at the end. Exit codes: 0 done, 1 error or some files could not be read, 2 wrong arguments.
"""

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from dist_deeplab.checkpointing.checkpoint import Checkpoint, load_checkpoint
from dist_deeplab.command_line import command_name
from dist_deeplab.config import RunConfig
from dist_deeplab.data.image_file import MAX_PIXELS, DecodeOptions
from dist_deeplab.distributed.from_main import load_on_main, wait_for_main
from dist_deeplab.distributed.launcher import hard_exit, run_command
from dist_deeplab.distributed.process_group import DistEnv, gather_to_all, ranks_on_host
from dist_deeplab.distributed.session import Session, session
from dist_deeplab.errors import UserError
from dist_deeplab.evaluation import submission
from dist_deeplab.evaluation.crf import CrfPool, open_crf, require_crf
from dist_deeplab.evaluation.images import Source, find_images
from dist_deeplab.evaluation.inference import Predictor, inference_settings
from dist_deeplab.evaluation.prediction import Prediction, Workload, predict_images
from dist_deeplab.evaluation.result_files import EXTRAS, ResultFiles
from dist_deeplab.files import prepare_folder
from dist_deeplab.logs import format_count

_SHOWN = 50  # unreadable files listed in the terminal; unreadable.txt has all

log = logging.getLogger("dist_deeplab.predict")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda env: command(arguments, env))


def command(arguments: argparse.Namespace, env: DistEnv) -> int:
    """Check all that can be checked before any heavy work, then predict; the exit code."""
    with session(env) as ranks:
        checkpoint = load_checkpoint(env, arguments.checkpoint)
        settings = inference_settings(checkpoint, arguments.overrides)
        require_crf(settings.eval.crf)
        if arguments.voc_submission:
            submission.require_voc_classes(checkpoint.class_names)
        results = result_files(arguments, checkpoint.class_names)
        named = load_on_main(env, lambda: [(str(s.path), s.name) for s in wanted_images(results, arguments)])
        prepare_folder(arguments.out, remedy="choose another --out")
        sources = [Source(Path(path), name) for path, name in named]
        problems = predict(ranks, checkpoint, settings, sources, results, arguments)
        wait_for_main(env, lambda: report(problems, len(sources), arguments))
    return 1 if problems else 0


def predict(
    ranks: Session,
    checkpoint: Checkpoint,
    settings: RunConfig,
    sources: Sequence[Source],
    results: ResultFiles,
    arguments: argparse.Namespace,
) -> list[str]:
    """Predict this rank's share, write the results, and return what could not be read on any rank."""
    env = ranks.env
    predictor = Predictor.from_checkpoint(checkpoint, settings, env.device)
    own = sources[env.rank :: env.world_size]
    log.info("%s (%d on this rank) to %s", format_count(len(sources), "image"), len(own), arguments.out)
    work = Workload(
        env.device,
        batch_size=settings.eval.batch_size,
        num_threads=settings.data.num_workers,
        with_probabilities=settings.eval.crf or arguments.probabilities,
        decoding=DecodeOptions(max_pixels=round(arguments.max_megapixels * 1e6)),
    )
    predictions = predict_images(predictor, own, work)
    problems = []
    with open_crf(settings.eval.crf, settings.crf, ranks_on_host=ranks_on_host()) as crf, ThreadPoolExecutor(2) as pool:
        writing = None
        for done in with_progress(refined(predictions, crf), len(own), visible=env.is_main):
            ranks.progress.mark()
            if done.problem:
                problems.append(done.problem)
                continue
            if writing is not None:
                writing.result()  # at most one behind; a full disk is an error here
            writing = pool.submit(results.write, done)
        if writing is not None:
            writing.result()
    ranks.wait_for_all()
    return sorted(problem for rank in gather_to_all(problems) for problem in rank)


def wanted_images(results: ResultFiles, arguments: argparse.Namespace) -> list[Source]:
    """The images to predict: one rank looks for all, before any of them writes."""
    sources = find_images(arguments.images, outside=arguments.out)
    if arguments.list:
        sources = listed(sources, arguments.list)
    return results.wanted(sources, overwrite=arguments.overwrite, skip_existing=arguments.skip_existing)


def result_files(arguments: argparse.Namespace, class_names: Sequence[str]) -> ResultFiles:
    """The files that were asked for."""
    out, competition = arguments.out, arguments.voc_submission
    masks = submission.masks_folder(out, competition) if competition else out
    kinds = [kind for kind in EXTRAS if getattr(arguments, kind)]
    return ResultFiles(out, masks, kinds, class_names)


def refined(predictions: Iterable[Prediction], crf: CrfPool | None) -> Iterator[Prediction]:
    """Yield the predictions, refined by the CRF where there is one; what could not be read passes it by."""
    if crf is None:
        yield from predictions
        return
    problems: list[Prediction] = []

    def readable() -> Iterator[tuple[Prediction, np.ndarray, np.ndarray]]:
        for done in predictions:
            if done.problem:
                problems.append(done)
            else:
                yield done._replace(prob=done.prob[:0]), done.image, done.prob

    for done, prob in crf.refine(readable()):
        yield done._replace(prob=prob, pred=prob.argmax(0).astype(np.uint8))
    yield from problems


def listed(sources: Sequence[Source], list_file: Path) -> list[Source]:
    """The sources whose names are in a list, one per line; of a line that is not an image's name the first word.

    Raises:
        UserError: no such file, no name in it, or one that no image has.
    """
    try:
        lines = [line.strip() for line in list_file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the list {list_file}: {reason}; give a text file with a name per line") from None
    if not lines:
        raise UserError(f"the list {list_file} holds no name; give a text file with a name per line")
    there = {source.name for source in sources}
    names = {line if line in there else line.split()[0] for line in lines}
    missing = sorted(names - there)
    if missing:
        have = "has" if len(missing) == 1 else "have"
        of = format_count(len(names), "name")
        raise UserError(f"{len(missing):,} of {of} in {list_file} {have} no image, e.g. {missing[0]}")
    return [source for source in sources if source.name in names]


def with_progress(predictions: Iterable[Prediction], total: int, *, visible: bool) -> Iterator[Prediction]:
    """Yield the predictions under a progress bar on stderr; silent where that is not a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not (visible and console.is_terminal)) as progress:
        yield from progress.track(predictions, total=total, description="predicting")


def report(problems: Sequence[str], total: int, arguments: argparse.Namespace) -> None:
    """Pack the submission, and say what was done and what could not be read."""
    if arguments.voc_submission and not problems:
        log.info("packed %s", submission.pack(arguments.out))
    log.info("%s predicted, results in %s", format_count(total - len(problems), "image"), arguments.out)
    if problems:
        (arguments.out / "unreadable.txt").write_text("".join(f"{line}\n" for line in problems), encoding="utf-8")
        log.error(
            "%d of %s could not be read (all in %s):\n  %s",
            len(problems),
            format_count(total, "file"),
            arguments.out / "unreadable.txt",
            "\n  ".join(problems[:_SHOWN]),
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("predict"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt file with its .json beside it")
    add("images", nargs="+", metavar="IMAGE|DIR|GLOB", help="images; section.key=value overrides eval.* and crf.*")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--list", type=Path, metavar="FILE", help="predict only the names in this file, one per line")
    add("--overlay", action="store_true", help="also the image with the classes' colours over it")
    add("--side-by-side", action="store_true", help="also image, mask and overlay in a row, with a legend")
    add("--probabilities", action="store_true", help="also all classes' probabilities (large files)")
    add("--voc-submission", choices=("comp5", "comp6"), help="masks in the tree, and results.tar, that PASCAL takes")
    add("--overwrite", action="store_true", help="replace results that are there already")
    add("--skip-existing", action="store_true", help="leave images alone whose results are there already")
    add("--window", type=int, metavar="PIXELS", help="larger images go in windows; short for eval.window=PIXELS")
    add(
        "--overlap", type=int, metavar="PIXELS", help="by which windows overlap at least; short for eval.overlap=PIXELS"
    )
    limit = MAX_PIXELS / 1e6
    add("--max-megapixels", type=float, default=limit, metavar="N", help=f"refuse larger images (default: {limit:.0f})")
    arguments = parser.parse_intermixed_args(argv)
    is_override = [("=" in text and not Path(text).exists()) for text in arguments.images]
    arguments.overrides = [text for text, override in zip(arguments.images, is_override) if override]
    arguments.images = [text for text, override in zip(arguments.images, is_override) if not override]
    if arguments.overwrite and arguments.skip_existing:
        parser.error("--overwrite and --skip-existing are opposites; give one of them")
    if not arguments.images:
        parser.error("no images: give image files, folders of them or quoted patterns")
    short = {"window": arguments.window, "overlap": arguments.overlap}
    arguments.overrides += [f"eval.{key}={value}" for key, value in short.items() if value is not None]
    return arguments


if __name__ == "__main__":
    hard_exit(main())
