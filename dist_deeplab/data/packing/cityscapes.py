"""Facts about Cityscapes: the names of its 19 training classes.

Source: `labels.py` of cityscapesScripts, ordered by trainId; `*_labelTrainIds.png` holds these indices, 255 is void.
"""

CLASS_NAMES: tuple[str, ...] = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
