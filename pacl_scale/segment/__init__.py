"""Pictures and some words in, masks out: ``python -m pacl_scale.segment photo.jpg dog sofa``.

Every pixel goes to the word whose text vector is nearest to the embedded patches around it.
"""

from pacl_scale.segment.command import SegmentConfig, main, segment_file
from pacl_scale.segment.results import segment

__all__ = ["SegmentConfig", "main", "segment", "segment_file"]
