"""From indexed tars anywhere to batches on this rank: ordered by (seed, position) alone, resumable anywhere."""

from pacl_scale.data.captions import TextConfig
from pacl_scale.data.decode import PictureConfig
from pacl_scale.data.index import SampleIndex, build_index
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.stream import DataConfig, PairBatch, PairStream

__all__ = [
    "DataConfig",
    "PairBatch",
    "PairStream",
    "PictureConfig",
    "ReadConfig",
    "SampleIndex",
    "TextConfig",
    "build_index",
]
