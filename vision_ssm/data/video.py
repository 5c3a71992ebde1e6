"""Video files as RGB frames, and back."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vision_ssm.errors import UserError
from vision_ssm.files import replacing

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")

_CODECS = {".avi": "MJPG", ".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v"}
_USUAL_FPS = 25.0


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video file says.

    Attributes:
        width: Columns of a frame.
        height: Rows of a frame.
        fps: Frames per second; 25 where the file does not say.
        frames: Number of frames; an estimate in some formats, 0 where the file does not say.
    """

    width: int
    height: int
    fps: float
    frames: int


def video_info(path: str | Path) -> VideoInfo:
    """Size, rate and length of a video.

    Raises:
        UserError: The file is missing or is no video that OpenCV can decode.
    """
    with _opened(path) as capture:
        fps = capture.get(cv2.CAP_PROP_FPS)
        return VideoInfo(
            width=int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
            height=int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
            fps=fps if 0 < fps < 1000 else _USUAL_FPS,
            frames=max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0),
        )


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Every frame of a video in order, (H, W, 3) uint8 RGB; one frame is in memory at a time.

    Raises:
        UserError: The file is missing, is no video that OpenCV can decode, or has no frame.
    """
    with _opened(path) as capture:
        ok, frame = capture.read()
        if not ok:
            raise UserError(f"cannot read the video {path}: it has no frame that can be decoded")
        while ok:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            ok, frame = capture.read()


def read_frame(path: str | Path, index: int) -> np.ndarray:
    """Frame `index` (from 0) of a video, (H, W, 3) uint8 RGB.

    The frames before it are decoded too, because jumping is inexact in many formats.

    Raises:
        UserError: The file cannot be read, or has no such frame.
    """
    with _opened(path) as capture:
        if all(capture.grab() for _ in range(index + 1)):
            ok, frame = capture.retrieve()
            if ok:
                return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    raise UserError(f"the video {path} has no frame {index}")


@contextlib.contextmanager
def video_writer(path: str | Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a video frame by frame; the file appears under its name when the block ends without an error.

    Args:
        path: Ending in .mp4, .m4v, .mov or .mkv (MPEG-4) or .avi (motion JPEG).
        fps: Frames per second.

    Yields:
        A function that appends one frame, (H, W, 3) uint8 RGB; the first one sets the size.

    Raises:
        UserError: Another ending, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _CODECS:
        raise UserError(f"cannot write a video to {path}: the ending must be one of {' '.join(_CODECS)}")
    with replacing(path) as temporary:
        writer = cv2.VideoWriter()

        def append(frame: np.ndarray) -> None:
            height, width = frame.shape[:2]
            if not writer.isOpened():
                codec = cv2.VideoWriter.fourcc(*_CODECS[suffix])
                if not writer.open(str(temporary), codec, fps, (width, height)):
                    raise UserError(f"cannot write the video {path}: OpenCV has no encoder for it; try a .avi name")
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

        try:
            yield append
        finally:
            writer.release()


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[cv2.VideoCapture]:
    if not Path(path).is_file():
        raise UserError(f"the video {path} does not exist")
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise UserError(f"cannot read the video {path}: not a known video format, or damaged")
        yield capture
    finally:
        capture.release()
