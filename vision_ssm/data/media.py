"""Pictures and videos named by files, folders to any depth and glob patterns; and names for their results."""

import glob
from collections.abc import Sequence
from pathlib import Path

from vision_ssm.data.images import list_images
from vision_ssm.data.video import VIDEO_SUFFIXES
from vision_ssm.errors import UserError


def is_video(path: Path) -> bool:
    """Whether the ending is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def media_files(source: str | Path) -> list[Path]:
    """Pictures and videos named by a file, a folder (searched to any depth) or a glob pattern, sorted by path.

    Raises:
        UserError: nothing is there, or nothing of it is a picture or a video.
    """
    path = Path(source)
    if path.is_dir():
        candidates = path.rglob("*")
    elif path.exists():
        return [path]
    else:
        candidates = map(Path, glob.glob(str(source), recursive=True))
    videos = [file for file in candidates if is_video(file) and file.is_file()]
    try:
        return sorted([*list_images(source), *videos])
    except UserError:
        if not videos:
            raise
        return sorted(videos)


def named_files(sources: Sequence[str | Path], output: Path) -> dict[Path, Path]:
    """Each picture and video of the sources, once, with the name its result gets below the output folder.

    The name is the path below the folder that was given, else the file's name; a second one of the same name gets
    a number. What lies in the output folder is left out of folders and patterns.

    Raises:
        UserError: nothing is left to work on.
    """
    files: dict[Path, Path] = {}
    used: set[str] = set()
    for source in sources:
        root = Path(source)
        for path in media_files(source):
            if path in files or (path != root and path.resolve().is_relative_to(output.resolve())):
                continue
            name = path.relative_to(root) if root.is_dir() else Path(path.name)
            # Without endings, because results in another format of a.jpg and a.png would have the same name.
            stem, number = name.with_suffix(""), 1
            while str(stem).lower() in used:
                number += 1
                stem = name.with_name(f"{name.stem}_{number}")
            used.add(str(stem).lower())
            files[path] = stem.with_name(stem.name + name.suffix)
    if not files:
        raise UserError(f"nothing to look at in {', '.join(map(str, sources)) or 'no source'} outside {output}")
    return files
