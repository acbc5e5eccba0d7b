"""The widgets of the page, their actions, and the pictures and tables they show. `session` does the work."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from adpretrain.extractor import ADExtractor
from downstream.inspection.inspector import Inspector
from downstream.inspection.report import TEMPLATES
from downstream.inspection.results import COLUMNS, counted
from downstream.inspection.spreadsheet import write_table
from downstream.visualise import colour_bar
from downstream.web.session import (
    RATE,
    Scored,
    Setup,
    Verdicts,
    heatmap,
    jpeg,
    score_uploads,
    verdicts,
)
from downstream.web.uploads import LIMITS, MEGA, SUFFIXES, Limits, Upload, uploads

EXAMPLES = Path(__file__).parent / "examples"  # rendered by recipes/products
KEPT_S = 30 * 60  # seconds that a visitor's scores are kept after the last click on Score
TITLE = "Visual inspection from a few good photographs"
EXPLAINED = (
    "Show the page 1 to 8 photographs of good products, then new ones: each gets a score, a verdict with a known "
    "false-alarm rate, and a heatmap of what is unusual. No training, no defects needed."
)
FOOT = (
    "Photographs stay on the machine that runs this page and are deleted after an hour or when it stops. The promised "
    "false-alarm rate holds for new photographs taken like the good ones: same product, camera and light."
)
TILES = "0 = the whole photograph at once; 256 finds marks of a few pixels on large photographs, and takes longer"
BORDER = "of the photograph, along all its edges"
MASK = "Mask of what is inspected: white on black"
FRAGMENTS: Any = TEMPLATES.get_template("web/fragments.html").module
THUMBNAIL = 112  # pixels, twice the displayed size, for high-resolution screens
HINT = '<p class="ad-hint">Scores, verdicts and heatmaps appear here.</p>'
# A click, Enter or the space bar on a row selects it; the row is marked at once, and the server sends the picture.
CHOOSE = """
const pick = event => {
  const row = event.target.closest('tr[data-place]');
  if (!row || (event.type === 'keydown' && event.key !== 'Enter' && event.key !== ' ')) return;
  event.preventDefault();
  element.querySelectorAll('tr[data-place]').forEach(other => other.setAttribute('aria-selected', other === row));
  trigger('click', {place: Number(row.dataset.place)});
};
element.addEventListener('click', pick);
element.addEventListener('keydown', pick);
"""
STRENGTH = "strength => { document.documentElement.style.setProperty('--heat', strength / 100); }"


@dataclass(frozen=True)
class Desk:
    """The actions of the widgets. Only files in ``folder``, which holds the uploads, are read."""

    models: Mapping[str, ADExtractor | Inspector]
    device: torch.device
    folder: Path
    limits: Limits = LIMITS

    def score(
        self,
        model: str,
        good: list[str] | None,
        new: list[str] | None,
        rate: float,
        tile: float = 0,
        border: float = 0,
        mask: str | None = None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Score all photographs and show the most unusual one."""
        if model not in self.models:
            raise gr.Error(f"There is no such extractor here; choose one of {', '.join(self.models)}.")
        try:
            scored = score_uploads(
                self.models[model],
                self.device,
                self._uploaded(good),
                self._uploaded(new),
                self.limits,
                lambda what, done, total: progress((done, total), desc=what.capitalize(), unit="photographs"),
                Setup(int(tile or 0), int(border or 0), next(iter(self._uploaded([mask] if mask else [])), None)),
            )
            chosen = verdicts(scored, _share(rate)).ranked()[0]
            return [scored, chosen, gr.update(visible=True), *self._shown(scored, chosen, rate)]
        except ValueError as error:
            raise gr.Error(str(error), title="Not scored") from None
        except Exception:
            traceback.print_exc(file=sys.stderr)
            raise gr.Error("The server failed; its log says why.", title="Not scored") from None

    def judge(self, scored: Scored | None, chosen: int, rate: float) -> list[Any]:
        """Update the verdicts for another false-alarm rate, without scoring again."""
        if scored is None:
            return [gr.skip()] * 5
        return self._shown(scored, chosen, rate)

    def choose(self, scored: Scored | None, rate: float, event: gr.EventData) -> list[Any]:
        """Show the image whose row was clicked."""
        place = event._data.get("place") if isinstance(event._data, dict) else None
        if scored is None or not isinstance(place, int) or not 0 <= place < len(scored.shots):
            return [gr.skip(), gr.skip()]
        return [place, viewer(scored, verdicts(scored, _share(rate)), place)]

    def samples(self) -> list[list[str]]:
        """Fill both fields with rendered photographs of good and damaged capsules, for visitors without photographs."""
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="samples-"))
        shutil.copytree(EXAMPLES, folder, dirs_exist_ok=True)
        return [sorted(str(path) for path in folder.glob(f"{kind}_*.jpg")) for kind in ("good", "part")]

    def _shown(self, scored: Scored, chosen: int, rate: float) -> list[Any]:
        found = verdicts(scored, _share(rate))
        csv = Path(tempfile.mkdtemp(dir=self.folder, prefix="scores-")) / "scores.csv"
        write_table(csv, (COLUMNS, found.results))
        shown = summary(scored, found), notes(found.warnings), table(scored, found, chosen)
        return [*shown, viewer(scored, found, chosen), str(csv)]

    def _uploaded(self, paths: Sequence[str] | None) -> list[Upload]:
        found = [Path(path).resolve() for path in paths or ()]
        if any(self.folder.resolve() not in path.parents for path in found):
            raise ValueError("Only photographs that were uploaded on this page are read.")
        return uploads(found)


def is_product(model: ADExtractor | Inspector) -> bool:
    """Say whether a model has good photographs of its own."""
    return isinstance(model, Inspector)


def _share(percent: float) -> float:
    return float(percent) / 100


def summary(scored: Scored, found: Verdicts) -> str:
    """Render how many images have each verdict, and the false-alarm rate that the threshold promises."""
    return str(FRAGMENTS.summary(counted(found.results), found.calibration, scored.references))


def notes(warnings: Sequence[str]) -> str:
    """Render the warnings as a list, or nothing if there are none."""
    return str(FRAGMENTS.notes(warnings)).strip()


def table(scored: Scored, found: Verdicts, chosen: int | None) -> str:
    """Render a row for each image, the highest score first; a click on a row selects its image."""
    top = max((result.score for result in found.results if result.score is not None), default=0.0) or 1.0

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * min(max(value / top, 0.0), 1.0), 1)

    rows = []
    for index in found.ranked():
        result, photo = found.results[index], scored.shots[index].photo
        thumbnail = photo and jpeg(Image.open(io.BytesIO(photo)), THUMBNAIL)
        rows.append((index, result, thumbnail, place(result.score)))
    return str(FRAGMENTS.table(rows, chosen, place(found.threshold)))


def viewer(scored: Scored, found: Verdicts, chosen: int) -> str:
    """Render the chosen photograph, its heatmap over it (the CSS variable --heat is its opacity), and the legend."""
    legend = io.BytesIO()
    colour_bar(found.scale, 480).save(legend, "PNG")
    photo, heat = scored.shots[chosen].photo, heatmap(scored, chosen, found)
    limits = found.threshold, found.pixel_limit
    pictures = photo, heat, legend.getvalue()
    return str(FRAGMENTS.viewer(chosen, found.results[chosen], limits, found.regions[chosen], pictures))


def build_page(desk: Desk) -> gr.Blocks:
    """Build the page of a desk; `serving` adds its style and theme."""
    limits = desk.limits
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        _html(f"<h1>{TITLE}</h1><p>{EXPLAINED}</p>", "ad-title")
        with gr.Row(equal_height=True):
            each = f"{limits.file_bytes / MEGA:.0f} MB each"
            good = _drop_zone(f"1 · Good photographs (1 to {limits.good}, {each})", "ad-good")
            new = _drop_zone(f"2 · Photographs to inspect (up to {limits.new}, {each})", "ad-new")
        with gr.Row(equal_height=True):
            names = list(desk.models)
            label = "Extractor, or product" if any(map(is_product, desk.models.values())) else "Extractor"
            model = gr.Dropdown(names, value=names[0], label=label, elem_id="ad-model", scale=2, min_width=220)
            rate = gr.Slider(
                1, 50, 100 * RATE, step=1, label="False-alarm rate, %", elem_id="ad-rate-slider", scale=2, min_width=260
            )
            with gr.Column(scale=2, min_width=220):
                press = gr.Button("Score", variant="primary", elem_id="ad-score-button")
                sample = gr.Button("Try with drawn sample photographs", size="sm", elem_id="ad-sample-button")
        with gr.Accordion("Small defects, and what is inspected", open=False, elem_id="ad-setup"), gr.Row():
            tile = gr.Number(0, label="Tile side in pixels", info=TILES, precision=0, minimum=0, elem_id="ad-tile")
            border = gr.Number(
                0, label="Ignored border in pixels", info=BORDER, precision=0, minimum=0, elem_id="ad-border"
            )
            mask = gr.File(label=MASK, file_types=list(SUFFIXES), height=150, elem_id="ad-mask", min_width=280)
        scored, chosen = gr.State(None, time_to_live=KEPT_S), gr.State(0)
        status = _html(HINT, "ad-status")
        with gr.Column(visible=False, elem_id="ad-results") as results:
            with gr.Row():
                with gr.Column(scale=6, min_width=300):
                    rows = _html("", "ad-table", CHOOSE)
                    csv = gr.DownloadButton("Download CSV", size="sm", elem_id="ad-csv")
                with gr.Column(scale=5, min_width=300):
                    picture = _html("", "ad-viewer")
                    strength = gr.Slider(0, 100, 80, step=1, label="Heatmap strength, %", elem_id="ad-strength")
            remarks = _html("", "ad-notes")
        _html(f'<p class="ad-foot">{FOOT}</p>', "ad-foot")

        shown = [status, remarks, rows, picture, csv]
        task: dict[str, Any] = {
            "fn": desk.score,
            "inputs": [model, good, new, rate, tile, border, mask],
            "outputs": [scored, chosen, results, *shown],
            "show_progress_on": status,
            "concurrency_limit": 1,
            "concurrency_id": "score",
            "api_visibility": "private",
        }
        quick: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 4, "api_visibility": "private"}
        press.click(**task)
        drawn = sample.click(
            desk.samples, None, [good, new], show_progress_on=status, concurrency_limit=1, api_visibility="private"
        )
        drawn.success(**task)
        rate.change(desk.judge, [scored, chosen, rate], shown, trigger_mode="always_last", **quick)
        rows.click(desk.choose, [scored, rate], [chosen, picture], trigger_mode="always_last", **quick)
        strength.change(None, strength, None, js=STRENGTH)
    return page.queue(max_size=16, api_open=False)


def _html(content: str, name: str, script: str | None = None) -> gr.HTML:
    return gr.HTML(content, js_on_load=script, apply_default_css=False, elem_id=name)


def _drop_zone(label: str, name: str) -> gr.File:
    return gr.File(
        label=label,
        file_count="multiple",
        file_types=list(SUFFIXES),
        height=190,
        elem_id=name,
        elem_classes="ad-drop",
        min_width=280,
    )
