"""Images for training: data sets by name, folders, shards, streams, augmentation."""

from resnet_func.app.data.augment import normalize
from resnet_func.app.data.decoding import DataError, decode
from resnet_func.app.data.folder import LAYOUT
from resnet_func.app.data.shards import write_shards
from resnet_func.app.data.sources import (
    NAMES,
    STREAM_STATISTICS_IMAGES,
    Dataset,
    Source,
    Splits,
    batches,
    channel_statistics,
    load,
    shuffled,
)
from resnet_func.app.data.stream import ImageBatch, Stream

__all__ = [
    "LAYOUT",
    "NAMES",
    "STREAM_STATISTICS_IMAGES",
    "DataError",
    "Dataset",
    "ImageBatch",
    "Source",
    "Splits",
    "Stream",
    "batches",
    "channel_statistics",
    "decode",
    "load",
    "normalize",
    "shuffled",
    "write_shards",
]
