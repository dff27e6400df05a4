"""A video's frames, some a second, by PyAV (FFmpeg's libraries)."""

import os
from collections.abc import Iterator

from PIL import Image

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate.pictures import MAX_PIXELS

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

# FFmpeg goes by content, and a playlist could name files and addresses of its own: only plain containers are read.
ALLOWED = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"}


def is_video(address: str) -> bool:
    """Whether a path's name is one of a video."""
    return address.lower().endswith(SUFFIXES)


def frames_of(address: str, per_second: float) -> Iterator[tuple[int, Image.Image]]:
    """Frames as (milliseconds from the start, RGB picture), at most ``per_second`` of each second.

    The first frame, then each first one at or after the next multiple of ``1 / per_second``.

    Raises:
        UserError: no such file on this machine, no video in it, damaged, frames too large, or PyAV is not installed.
    """
    if not storage.is_local(address):
        raise UserError(f"{address}: videos are read from this machine; copy it here first")
    if not os.path.isfile(address):
        raise UserError(f"{address}: there is no such file")
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV; run: pip install 'pacl-scale[video]'") from error
    try:
        with av.open(address, options=ALLOWED) as container:
            if not container.streams.video:
                raise UserError(f"{address} holds no video")
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                raise UserError(f"{address} has frames of more than {MAX_PIXELS // 1_000_000} million pixels")
            stream.thread_type = "AUTO"
            due, start = 0.0, None
            for frame in container.decode(stream):
                start = frame.time if start is None else start
                seconds = (frame.time or 0.0) - (start or 0.0)
                if seconds + 1e-6 < due:
                    continue
                yield round(1000 * seconds), frame.to_image()
                due = (int(seconds * per_second + 1e-6) + 1) / per_second
    except av.FFmpegError as error:
        raise UserError(f"{address} cannot be read as a video ({error.strerror or error})") from error
