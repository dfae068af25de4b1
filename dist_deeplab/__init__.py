"""DeepLab-v2 semantic segmentation, trained with PyTorch DDP on one GPU, one node or many."""

__version__ = "0.2.0"
