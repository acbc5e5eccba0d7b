"""The photographs of a run are shared by its processes, and what all of them have scored is one sequence.

The run's batches are numbered. Each process scores a span of those that are not yet recorded, writes their pictures,
and adds them to its own file of the record; the first process then reads all files. A batch has the same bytes whoever
scores it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from adpretrain.progress import Progress
from downstream.inspection.batch import Drawing, score_batch
from downstream.inspection.entry import Entry
from downstream.inspection.inspector import Inspector
from downstream.inspection.normals import Map, predict_photos
from downstream.inspection.photos import Photo, printable
from downstream.inspection.picture_names import Heatmaps, PictureNames
from downstream.inspection.resume import Place, Record, Stamp
from downstream.inspection.source import Photographs
from downstream.terminal import no_progress
from downstream.visualise import ColourScale

SCALE_SAMPLE = 64  # images that fix the colour scale if the normals cannot
KEPT = 64  # batches that are kept when they are read back, as neighbours by name are often neighbours in a batch


@dataclass(frozen=True)
class Share:
    """The share of one of several processes in a run: of what is to be done, the ``rank``-th of ``processes`` spans.

    ``wait`` returns when all processes have come to it.
    """

    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None

    def of(self, numbers: Sequence[int]) -> Sequence[int]:
        """This process's share of some numbers. A span, and not every so-manieth: shards are read from one end."""
        first, last = (len(numbers) * rank // self.processes for rank in (self.rank, self.rank + 1))
        return numbers[first:last]


ALONE = Share()


class Entries:
    """The entries of all photographs of a run, in the order of their names, read from the record each time."""

    def __init__(self, record: Record, photographs: Photographs, places: Sequence[Place], batch_size: int) -> None:
        self._record, self._photographs, self._places, self._size = record, photographs, places, batch_size

    def __len__(self) -> int:
        return len(self._photographs.names)

    def __iter__(self) -> Iterator[Entry]:
        batch = lru_cache(maxsize=KEPT)(self._record.batch)
        for number in self._photographs.order:
            yield batch(self._places[number // self._size])[number % self._size]


def score_images(
    inspector: Inspector,
    photographs: Photographs,
    record: Record,
    progress: Progress = no_progress,
    share: Share = ALONE,
    heatmaps: Heatmaps = "all",
) -> Entries:
    """Score photographs, draw those that ``heatmaps`` names, and return the entries of all.

    Panels are written below the record's folder. Batches in the record are taken from it; the others are scored and
    added to it. A photograph that is blank or has no finite score counts as unreadable. Of several processes, each
    scores its ``share``, and only what the first returns can be read. Raises ValueError if one has ended before its
    share was done; the same run with `resume` goes on.
    """
    pictures = PictureNames(photographs.names[number] for number in photographs.order)
    total, size = len(photographs.names), inspector.reader.batch_size
    spans = [range(start, min(start + size, total)) for start in range(0, total, size)]
    places = _recorded(photographs, record, spans, pictures)
    share.wait()  # so that all have seen the same batches as done, and have the same share in mind
    scale = inspector.scale or _scale_of_sample(inspector, photographs, record)
    drawing = Drawing(record.folder, scale, heatmaps)
    mine = share.of([number for number, place in enumerate(places) if place is None])
    done = total - sum(len(span) for span, place in zip(spans, places, strict=True) if place is None)
    progress("scoring", done, total)
    stamps = dict[int, list[Stamp]]()

    def stamped() -> Iterator[range]:
        for number in mine:  # before a file is read: if it changes then, it must be scored again
            stamps[number] = [photographs.stamp(one) for one in spans[number]]
            yield spans[number]

    read = inspector.reader.read(photographs.files(stamped()))
    for number, photos in zip(mine, read, strict=True):
        names = [photographs.names[one] for one in spans[number]]
        entries = score_batch(inspector, photos, names, [pictures.of(name) for name in names], drawing)
        record.add(number, stamps.pop(number), entries)
        done += len(entries)
        progress("scoring", done, total)
    share.wait()
    if share.rank == 0:
        for number, place in record.added():
            places[number] = place
    found = [place for place in places if place is not None]
    if share.rank == 0 and len(found) < len(places):
        missing = len(places) - len(found)
        raise ValueError(f"{missing} batches were not scored, because a process has ended: go on with --resume")
    return Entries(record, photographs, found, size)


def _recorded(
    photographs: Photographs, record: Record, spans: Sequence[range], pictures: PictureNames
) -> list[Place | None]:
    """Where the record of an interrupted run holds each batch, as the photographs are now."""
    if not record.has_batches:
        return [None] * len(spans)
    places = [
        record.scored([photographs.stamp(one) for one in span], [pictures.of(photographs.names[one]) for one in span])
        for span in spans
    ]
    if not any(places):
        warnings.warn(
            f"the unfinished run in {printable(record.folder)} has scored none of these {len(photographs.names)} "
            "images as they are now: all are scored anew",
            stacklevel=3,
        )
    return places


def _scale_of_sample(inspector: Inspector, photographs: Photographs, record: Record) -> ColourScale:
    """Fix the scale by the typical (median) image of an evenly spaced sample, as one reference gives no normal map."""
    step = max(1, len(photographs.names) // SCALE_SAMPLE)
    sample = [int(number) for number in photographs.order[::step][:SCALE_SAMPLE]]
    stamps = [photographs.stamp(number) for number in sample]
    if (earlier := record.scale(stamps)) is not None:
        return earlier
    size, maps = inspector.reader.batch_size, list[Map]()
    batches = (sample[start : start + size] for start in range(0, len(sample), size))
    for batch in inspector.reader.read(photographs.files(batches)):
        photos = [item for item in batch if isinstance(item, Photo)]
        found = predict_photos(inspector.detector, photos, inspector.device)
        maps += [one[1] for one in found if not isinstance(one, str)]
    scale = ColourScale.from_typical_map(maps, inspector.threshold)
    record.set_scale(stamps, scale)
    return scale
