"""A batch of a run: its photographs are scored, judged and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from downstream.inspection.entry import Entry
from downstream.inspection.findings import findings_of, write_map, write_mask
from downstream.inspection.inspector import Inspector, Scored
from downstream.inspection.photos import Photo, Unreadable
from downstream.inspection.picture_names import Heatmaps, mask_and_map, remove
from downstream.inspection.results import ANOMALOUS, UNREADABLE, Result
from downstream.regions import Region
from downstream.visualise import ColourScale, panel, save_png


@dataclass(frozen=True)
class Drawing:
    """Where the pictures of a run are written, in which colours, and of which photographs: those with a result that
    ``heatmaps`` names."""

    out: Path
    scale: ColourScale
    heatmaps: Heatmaps

    def shows(self, result: Result) -> bool:
        """Whether a photograph with this result has a heatmap and, if it has regions, a mask."""
        return self.heatmaps == "all" or (self.heatmaps == "anomalous" and result.verdict == ANOMALOUS)


def score_batch(
    inspector: Inspector,
    read: Sequence[Photo | Unreadable],
    names: Sequence[str],
    heatmaps: Sequence[str],
    drawing: Drawing,
) -> list[Entry]:
    """Score and draw a batch, in order; ``heatmaps`` are the paths, below the output folder, that pictures of these
    ``names`` have if they are drawn."""
    entries, scored = list[Entry](), list[tuple[Scored, Result, list[Region], str]]()
    for name, heatmap, item in zip(names, heatmaps, inspector.score(read), strict=True):
        if isinstance(item, Unreadable):
            entries.append(Entry(Result(name, None, None, UNREADABLE, reason=item.reason)))
            remove(drawing.out, heatmap)  # an interrupted run may have written some
        else:
            regions = inspector.regions(item)
            result = replace(inspector.judge(name, item), regions=len(regions))
            if drawing.shows(result):
                result = replace(result, heatmap=heatmap)
            entries.append(_entry(inspector, item, result, regions))
            scored.append((item, result, regions, heatmap))
    with ThreadPoolExecutor() as pool:  # compressing PNGs takes longer than scoring, and releases Python's lock
        list(pool.map(lambda one: _draw(one, drawing, inspector.options.maps), scored))
    return entries


def _entry(inspector: Inspector, scored: Scored, result: Result, regions: Sequence[Region]) -> Entry:
    photo = scored.photo
    return Entry(
        result,
        photo.size,
        tuple(findings_of(result.path, regions, photo.size)),
        inspector.has_odd_shape(photo),
        photo.saturated,
        1 - float(np.isnan(scored.map_HW).mean()),
    )


def _draw(made: tuple[Scored, Result, list[Region], str], drawing: Drawing, maps: bool) -> None:
    scored, result, regions, heatmap = made
    photo, out = scored.photo, drawing.out
    mask, values = mask_and_map(out, heatmap)
    if result.heatmap is not None:
        picture = panel(photo.shown, scored.map_HW, drawing.scale, title=result.title, regions=regions, seen=photo.seen)
        save_png(picture, out / heatmap)
        mask.unlink(missing_ok=True)
        if regions:
            write_mask(mask, regions, photo.size)
    if maps:
        write_map(values, scored.map_HW)
