"""Files from the network: `fetch` brings one into a folder, once per node, whole and verified."""

from dist_deeplab.downloads.fetching import DiskFullError, DownloadError, Expected, Progress, fetch
from dist_deeplab.downloads.urls import check_url, is_url, join_url, shown

__all__ = [
    "DiskFullError",
    "DownloadError",
    "Expected",
    "Progress",
    "check_url",
    "fetch",
    "is_url",
    "join_url",
    "shown",
]
