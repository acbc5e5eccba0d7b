"""The page's pictures and tables as HTML. Every text that comes from outside passes through `escape`."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from downstream.calibration import percent
from downstream.inspection.results import ANOMALOUS, NORMAL, UNDECIDED, UNREADABLE, Result, counted
from downstream.visualise import colour_bar
from downstream.web.session import Scored, Shot, Verdicts, heatmap, jpeg

THUMBNAIL = 112  # pixels, twice what is shown, for dense screens
# A sign besides the colour, for the colour-blind and for paper.
SIGNS = {ANOMALOUS: "▲", NORMAL: "✓", UNDECIDED: "?", UNREADABLE: "✕"}


def summary(scored: Scored, found: Verdicts, rate: float) -> str:
    """How many images have which verdict, and what the threshold promises."""
    counts = counted(found.results)
    shown = [(verdict, count) for verdict, count in counts.items() if count or verdict in (ANOMALOUS, NORMAL)]
    if found.calibration is None:
        shown = [(verdict, count) for verdict, count in shown if count]
    tiles = "".join(
        f'<div class="ad-count {verdict}"><b>{count}</b><span>{SIGNS[verdict]} {verdict}</span></div>'
        for verdict, count in shown
    )
    return (
        f'<div class="ad-counts" id="ad-counts">{tiles}<p class="ad-promise">{_promise(scored, found, rate)}</p></div>'
    )


def _promise(scored: Scored, found: Verdicts, rate: float) -> str:
    if found.calibration is None:
        return "No threshold: with one good photograph the images are only ranked, the most unusual one first."
    calibration = found.calibration
    promised, asked = _percent(calibration.rate), _percent(rate)
    text = (
        f'Threshold <b id="ad-threshold">{calibration.threshold:.4g}</b>, from {scored.references} good photographs. '
        f'Promised false-alarm rate <b id="ad-rate">{promised}</b>'
    )
    if calibration.rate > rate * (1 + 1e-9):
        text += f" ({asked} asked for: more than {scored.references} good photographs can promise)"
    return f"{text}. With these very photographs it may be as high as {_percent(calibration.rate_upper)}."


def _percent(rate: float) -> str:
    return percent(rate).replace(" ", "\N{NO-BREAK SPACE}")


def notes(warnings: Sequence[str]) -> str:
    """The warnings as a list; empty without any."""
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<div class="ad-notes" role="note"><b>Good to know</b><ul>{items}</ul></div>'


def table(scored: Scored, found: Verdicts, chosen: int | None) -> str:
    """One row for each image, the highest score first; a click on a row chooses its image."""
    top = max((result.score for result in found.results if result.score is not None), default=0.0) or 1.0
    rows = "".join(
        _row(place, found.results[place], scored.shots[place], top, found.threshold, place == chosen)
        for place in found.ranked()
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Image", "Score", "p-value", "Verdict"))
    content = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="ad-scroll"><table class="ad-table">{content}</table></div>'


def _row(place: int, result: Result, shot: Shot, top: float, threshold: float | None, chosen: bool) -> str:
    thumbnail = ""
    if shot.photo is not None:
        thumbnail = f'<img alt="" src="{data_uri(jpeg(Image.open(io.BytesIO(shot.photo)), THUMBNAIL))}">'
    score = p_value = "–"
    if result.score is not None:
        mark = "" if threshold is None else f'<i style="left:{_share(threshold, top)}%"></i>'
        bar = f'<span class="ad-bar"><span style="width:{_share(result.score, top)}%"></span>{mark}</span>'
        score = f"{result.score:.4g}{bar}"
    if result.p_value is not None:
        p_value = f"{result.p_value:.3g}"
    reason = f'<small class="ad-reason">{escape(result.reason)}</small>' if result.reason else ""
    return (
        f'<tr class="{result.verdict}" data-place="{place}" tabindex="0" aria-selected="{str(chosen).lower()}">'
        f'<td><div class="ad-name"><span class="ad-thumb">{thumbnail}</span>'
        f"<span><span>{escape(result.path)}</span>{reason}</span></div></td>"
        f'<td class="ad-score">{score}</td><td class="ad-p">{p_value}</td><td>{badge(result.verdict)}</td></tr>'
    )


def badge(verdict: str) -> str:
    """A verdict as a word, a sign and a colour."""
    return f'<span class="ad-badge {verdict}">{SIGNS[verdict]} {verdict}</span>'


def viewer(scored: Scored, found: Verdicts, chosen: int) -> str:
    """The chosen photograph under its heatmap, whose strength is the page's variable --heat, and the legend."""
    result, shot = found.results[chosen], scored.shots[chosen]
    heat = heatmap(scored, chosen, found.scale)
    title = f"<figcaption><span>{escape(result.path)}</span>{badge(result.verdict)}</figcaption>"
    figure = f'<figure class="ad-viewer" data-place="{chosen}">{title}'
    if shot.photo is None or heat is None:
        return f'{figure}<p class="ad-reason">{escape(result.reason)}</p></figure>'
    numbers = f"score {result.score:.4g}"
    if result.p_value is not None:
        numbers += f" · p-value {result.p_value:.3g}"
    if found.threshold is not None:
        numbers += f" · threshold {found.threshold:.4g}"
    buffer = io.BytesIO()
    colour_bar(found.scale, 480).save(buffer, "PNG")
    return (
        f'{figure}<div class="ad-stack">'
        f'<img alt="photograph {escape(result.path)}" src="{data_uri(shot.photo)}">'
        f'<img alt="heatmap over it" class="ad-heat" src="{data_uri(heat)}"></div>'
        f'<p class="ad-numbers">{numbers}</p>'
        f'<img class="ad-legend" alt="colours: from normal over the limit, which the line in the picture follows, to '
        f'twice as far" src="{data_uri(buffer.getvalue(), "png")}"></figure>'
    )


def _share(value: float, top: float) -> float:
    return round(100 * min(max(value / top, 0.0), 1.0), 1)


def data_uri(content: bytes, kind: str = "jpeg") -> str:
    """A picture inside the page: nothing to fetch, nothing left on the server."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
