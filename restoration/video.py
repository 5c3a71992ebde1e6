"""Videos frame by frame, with their times, length, sound and colours where PyAV is installed."""

import importlib.util
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vision_ssm.data.video import read_frames, video_info, video_writer
from vision_ssm.errors import UserError
from vision_ssm.files import replacing

WRITABLE = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")
"""Endings of the videos that can be written."""

_CODECS = {".webm": ("libvpx-vp9", {"crf": "20", "b": "0"}), ".avi": ("mpeg4", {"qscale": "2"})}
_USUAL_CODEC = ("libx264", {"crf": "14", "preset": "medium"})
_SPARE_CODEC = ("mpeg4", {"qscale": "2"})

RestoreFrame = Callable[[np.ndarray], np.ndarray]
"""(H, W, 3) uint8 or uint16 RGB -> (s H, s W, 3) of the same type."""


def restore_video(source: Path, target: Path, restore: RestoreFrame, say: Callable[[str], None]) -> int:
    """Restore every frame of a video.

    With PyAV: the times of the frames, every sound track (copied as it is), 10 bits where the video has them, its
    colour space. Without it: frames at an even rate and no sound, and that is said.

    Args:
        source: the video.
        target: with one of the `WRITABLE` endings; appears when it is complete.
        restore: what is done to a frame.
        say: gets what a person should know.

    Returns:
        Number of frames.

    Raises:
        UserError: not a video, damaged, without frames, or it cannot be written.
    """
    if importlib.util.find_spec("av") is None:
        say("written without sound and with evenly spaced frames; to keep both run: pip install 'vision-ssm[video]'")
        return _with_opencv(source, target, restore)
    return _with_pyav(source, target, restore, say)


def count_frames(source: Path) -> tuple[int, int, int]:
    """Height, width and number of frames by the header; 0 frames where it does not say.

    Raises:
        UserError: not a video.
    """
    info = video_info(source)
    return info.height, info.width, info.frames


def _with_opencv(source: Path, target: Path, restore: RestoreFrame) -> int:
    count = 0
    with video_writer(target, video_info(source).fps) as append:
        for frame in read_frames(source):
            append(restore(frame))
            count += 1
    return count


def _with_pyav(source: Path, target: Path, restore: RestoreFrame, say: Callable[[str], None]) -> int:
    import av

    try:
        with av.open(str(source)) as reader:
            if not reader.streams.video:
                raise UserError("cannot read the video: it has no picture track")
            with replacing(target) as temporary:
                with av.open(str(temporary), "w") as writer:
                    count = _Transcoder(reader, writer, target.suffix.lower(), say).run(restore)
                if not count:
                    raise UserError("cannot read the video: it has no frame that can be decoded")
            return count
    except av.FFmpegError as error:
        if isinstance(error, av.InvalidDataError | av.EOFError):
            raise UserError("cannot read the video: not a known video format, or damaged") from error
        raise UserError(f"cannot read or write the video: {error.strerror}") from error


class _Transcoder:
    """Copies a video to another file, its frames restored, everything else as it is."""

    def __init__(self, reader: Any, writer: Any, suffix: str, say: Callable[[str], None]) -> None:
        self.reader, self.writer, self.suffix, self.say = reader, writer, suffix, say
        self.video = reader.streams.video[0]
        self.video.thread_type = "AUTO"
        self.deep = any(part.bits > 8 for part in self.video.format.components)
        self.out: Any = None
        self.sounds: dict[int, Any] = {}
        self.waiting: list[Any] = []
        """Packets of sound before the first frame: all tracks must be known before anything is written."""
        others = [one for one in reader.streams if one.type not in ("audio", "video")]
        if others or len(reader.streams.video) > 1:
            say("only the first picture track and the sound are kept, not subtitles and further tracks")

    def run(self, restore: RestoreFrame) -> int:
        """Restore and write all frames; returns their number."""
        count = 0
        for packet in self.reader.demux(self.video, *self.reader.streams.audio):
            if packet.stream.index == self.video.index:
                for frame in packet.decode():
                    self._write(frame, restore)
                    count += 1
            elif packet.dts is not None:
                self.waiting.append(packet)
            self._write_sound()
        if self.out is not None:
            self.writer.mux(self.out.encode(None))
        return count

    def _write_sound(self) -> None:
        if self.out is None:
            return
        for packet in self.waiting:
            packet.stream = self.sounds[packet.stream.index]
            self.writer.mux(packet)
        self.waiting.clear()

    def _write(self, frame: Any, restore: RestoreFrame) -> None:
        import av

        colours = frame.colorspace
        rgb = frame.to_ndarray(format="rgb48le" if self.deep else "rgb24", src_colorspace=colours)
        turns = round(frame.rotation / 90) % 4
        result = restore(np.ascontiguousarray(np.rot90(rgb, turns)))
        made = av.VideoFrame.from_ndarray(result, format="rgb48le" if self.deep else "rgb24")
        if self.out is None:
            self.out = self._video_out(result.shape[0], result.shape[1])
            for track in self.reader.streams.audio:
                self.sounds[track.index] = self.writer.add_stream_from_template(track)
        made = made.reformat(format=self.out.pix_fmt, dst_colorspace=colours, dst_color_range=frame.color_range)
        made.pts, made.time_base = frame.pts, frame.time_base
        self.writer.mux(self.out.encode(made))

    def _video_out(self, height: int, width: int) -> Any:
        codec, options = self._codec()
        rate = self.video.average_rate or self.video.guessed_rate or Fraction(25)
        out = self.writer.add_stream(codec, rate=rate, options=options)
        out.width, out.height = width, height
        # Chroma at half resolution needs even sides.
        chroma = "420" if height % 2 == width % 2 == 0 or codec == "mpeg4" else "444"
        out.pix_fmt = f"yuv{chroma}p" + ("10le" if self.deep and codec != "mpeg4" else "")
        # MPEG-4 counts in steps of at most 1/65535 s, so its frames lie on the grid of their rate.
        step = 1 / Fraction(rate).limit_denominator(1001) if codec == "mpeg4" else self.video.time_base
        out.time_base = out.codec_context.time_base = step
        given, made = self.video.codec_context, out.codec_context
        made.colorspace, made.color_range = given.colorspace, given.color_range
        made.color_primaries, made.color_trc = given.color_primaries, given.color_trc
        return out

    def _codec(self) -> tuple[str, dict[str, str]]:
        import av

        codec, options = _CODECS.get(self.suffix, _USUAL_CODEC)
        try:
            av.Codec(codec, "w")
        except av.FFmpegError:
            self.say(f"this PyAV has no encoder {codec}; written with {_SPARE_CODEC[0]}")
            return _SPARE_CODEC
        return codec, options
