"""Files that people put beside photographs although they are none yet, and how to turn them into photographs."""

from __future__ import annotations

from collections.abc import Collection

VIDEOS = (".avi", ".mkv", ".mov", ".mp4")
RAWS = (".arw", ".cr2", ".dng", ".nef", ".raw")  # a camera's raw data


def remedies(suffixes: Collection[str]) -> str:
    """Say how the videos and raw files among files with these lower-case suffixes become photographs, or nothing."""
    found = []
    if videos := [suffix for suffix in VIDEOS if suffix in suffixes]:
        found.append(
            f"Videos ({', '.join(videos)}) become photographs with ffmpeg, one for each frame: "
            f"ffmpeg -i clip{videos[0]} frames/%06d.png (into a folder frames that exists)."
        )
    if raws := [suffix for suffix in RAWS if suffix in suffixes]:
        found.append(
            f"A camera's raw files ({', '.join(raws)}) become photographs in a raw converter, such as that of the "
            "camera's maker: export them as TIFF or PNG, all with the same settings."
        )
    return " ".join(found)
