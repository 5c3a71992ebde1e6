"""Videos: every frame, its time, the sound and the colours; and what is said where PyAV is missing."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from restoration import video
from restoration.run import run_restore
from restoration.video import restore_video
from tests.restoration.tiny_weights import save_tiny
from vision_ssm.data.video import read_frames, video_info, video_writer
from vision_ssm.errors import UserError

FRAMES = 9


def drawn(index: int) -> np.ndarray:
    """A grey picture with a bar that moves."""
    frame = np.full((32, 48, 3), 90, np.uint8)
    frame[:, 4 * index : 4 * index + 6] = (220, 140, 40)
    return frame


@pytest.fixture
def silent(tmp_path) -> Path:
    """A video without sound."""
    with video_writer(tmp_path / "in.avi", 12) as append:
        for index in range(FRAMES):
            append(drawn(index))
    return tmp_path / "in.avi"


@pytest.fixture
def no_pyav(monkeypatch):
    """As if PyAV were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))


def test_without_pyav_it_is_said_that_sound_is_lost(silent, tmp_path, no_pyav):
    said: list[str] = []
    target = tmp_path / "out.mp4"
    assert restore_video(silent, target, lambda frame: frame, said.append) == FRAMES
    assert len(said) == 1
    assert "without sound" in said[0]
    assert "pip install" in said[0]
    assert (video_info(target).fps, video_info(target).frames) == (12, FRAMES)
    assert np.abs(np.stack(list(read_frames(target))).mean((1, 2, 3)) - drawn(0).mean()).max() < 6


def test_a_failure_half_way_leaves_no_file(silent, tmp_path, no_pyav):
    def fail(frame: np.ndarray) -> np.ndarray:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        restore_video(silent, tmp_path / "out.mp4", fail, print)
    assert {file.name for file in tmp_path.iterdir()} == {"in.avi"}


def test_run_takes_videos_and_pictures_together(silent, tmp_path, no_pyav, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"nonsense")
    weights = save_tiny(tmp_path / "weights")
    assert run_restore([silent, tmp_path / "broken.mp4"], output=tmp_path / "out", weights=weights, device="cpu") == 1
    said = capsys.readouterr()
    assert f"1 videos ({FRAMES} frames) restored, 1 failed" in said.out
    assert said.err.count("without sound") == 2  # once for each file, not for each frame
    assert "cannot read the video" in said.err
    assert len(list(read_frames(tmp_path / "out" / "in.avi"))) == FRAMES


@pytest.fixture
def with_sound(tmp_path) -> Path:
    """An H.264 video of HD colours with a pause after frame 4, and a tone."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "in.mp4"), "w") as file:
        track = file.add_stream("libx264", rate=25, options={"crf": "1"})
        track.width, track.height, track.pix_fmt = 48, 32, "yuv420p"
        track.time_base = track.codec_context.time_base = Fraction(1, 9000)
        track.codec_context.colorspace = 1
        sound = file.add_stream("aac", rate=44100)
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(drawn(index), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=1
            )
            frame.pts, frame.time_base = 360 * index + (450 if index > 4 else 0), Fraction(1, 9000)
            file.mux(track.encode(frame))
        file.mux(track.encode(None))
        for start in range(0, 16 * 1024, 1024):
            wave = np.sin(np.arange(start, start + 1024) * 0.1).astype(np.float32) * 0.3
            part = av.AudioFrame.from_ndarray(np.stack((wave, wave)), format="fltp", layout="stereo")
            part.sample_rate, part.pts, part.time_base = 44100, start, Fraction(1, 44100)
            file.mux(sound.encode(part))
        file.mux(sound.encode(None))
    return tmp_path / "in.mp4"


def contents(path: Path) -> tuple[list[Fraction], np.ndarray, list[bytes]]:
    """Times of the frames, their pixels, packets of sound."""
    import av

    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    with av.open(str(path)) as file:
        sound = [bytes(packet) for packet in file.demux(audio=0) if packet.size]
    times = [frame.pts * frame.time_base for frame in frames]
    return times, np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), sound


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_times_sound_and_colours_are_kept(with_sound, tmp_path, suffix):
    said: list[str] = []
    target = tmp_path / f"out{suffix}"
    assert restore_video(with_sound, target, lambda frame: frame, said.append) == FRAMES
    assert not said
    times, pixels, sound = contents(with_sound)
    new_times, new_pixels, new_sound = contents(target)
    # Matroska has no negative times, so there the sound's lead-in moves everything by the same 23 ms.
    assert [float(t - new_times[0]) for t in new_times] == pytest.approx([float(t) for t in times], abs=0.001)
    assert new_sound == sound
    assert np.abs(new_pixels.mean((1, 2)) - pixels.mean((1, 2))).max() < 2


def test_a_larger_result_with_odd_sides(with_sound, tmp_path):
    def larger(frame: np.ndarray) -> np.ndarray:
        return frame.repeat(2, axis=0).repeat(2, axis=1)[:-1, :-1]

    assert restore_video(with_sound, tmp_path / "out.mp4", larger, print) == FRAMES
    assert contents(tmp_path / "out.mp4")[1].shape == (FRAMES, 63, 95, 3)


def test_what_is_no_video_is_refused_with_pyav_too(tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed")
    (tmp_path / "a.mp4").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a known video format, or damaged"):
        restore_video(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda frame: frame, print)
    assert not (tmp_path / "b.mp4").exists()


def test_every_ending_that_is_offered_has_a_codec():
    assert set(video._CODECS) < set(video.WRITABLE)
