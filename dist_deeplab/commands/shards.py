"""Pack a segmentation data set into WebDataset shards that dist_deeplab trains on, and look at such shards.

From VOC folders (a folder that holds JPEGImages, SegmentationClass and ImageSets), any number of splits at once:

    dist-deeplab shards --voc-root VOCdevkit/VOC2012 --split train val --out data/voc

From a folder of images and one of masks; from a tree as mmsegmentation, Cityscapes or CamVid have it:

    dist-deeplab shards --images photos --masks masks --class-names names.txt --split train --out data/mine
    dist-deeplab shards --tree data/ade20k --class-names names.txt --split train val --out data/mine

From a list file with one `image label` pair of paths a line (DrSleep's format):

    dist-deeplab shards --list my_train.txt --data-root /data/mine --class-names names.txt \\
        --split train --out data/mine

Masks hold class indices (greyscale or palette). If they hold other grey levels or colours, --label-map names a file of
`LEVEL name` or `R G B name` lines. All masks are counted first; --dry-run stops there.

Annotations (COCO or Roboflow JSON, labelme JSON, CVAT XML) become masks to look at, a list of pairs and class names:

    dist-deeplab shards masks annotations.json --images photos --out masks
    dist-deeplab shards --list masks/list.txt --class-names masks/names.txt --split train --out data/mine

Shards made elsewhere; is a set sound; what is in it (with a contact sheet to look at):

    dist-deeplab shards index data/other/*.tar --split train --class-names names.txt
    dist-deeplab shards verify data/voc/train.json
    dist-deeplab shards info data/voc/train.json --sheet train.png

How often images of rare classes come in an epoch with data.repeat_threshold=0.1; the file of which classes each sample
contains, which that needs, for a set packed before there was one:

    dist-deeplab shards info data/voc/train.json --repeat-threshold 0.1
    dist-deeplab shards add-classes data/voc/train.json

Writes OUT/SPLIT-000000.tar ..., OUT/SPLIT.index.npy, OUT/SPLIT.classes.npy and, last, OUT/SPLIT.json, the manifest that
`data.train` and `data.val` name. Every sample is decoded and checked before it is written; a killed run leaves no
manifest. Exit codes: 0 done, 2 wrong arguments or data.
"""

import sys
from collections.abc import Sequence

from dist_deeplab.commands.packing import look, masks, pack
from dist_deeplab.errors import one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argv[0] if argv else ""
    command = look if first in look.COMMANDS else masks if first in masks.COMMANDS else pack
    arguments = command.parse_arguments(argv, manual=__doc__ or "")
    try:
        command.run(arguments)
    except OSError as error:
        where = error.filename or getattr(arguments, "out", None) or "the shards"
        print(f"error: {error.strerror}: {where}; nothing that looks finished was left", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
