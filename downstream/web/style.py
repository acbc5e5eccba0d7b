"""The page's style sheet. Fonts are those of the reader's system: nothing is fetched."""

from __future__ import annotations

STYLE = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container, .dark .gradio-container {
  --ad-bad: #b42318; --ad-bad-bg: #fee4e2; --ad-good: #05603a; --ad-good-bg: #d1fadf;
  --ad-open: #6941c6; --ad-open-bg: #ebe9fe; --ad-none: #475467; --ad-none-bg: #eaecf0; --ad-line: #d0d5dd;
  --ad-soft: #475467;
}
.dark .gradio-container {
  --ad-bad: #fda29b; --ad-bad-bg: #55160c; --ad-good: #6ce9a6; --ad-good-bg: #053321;
  --ad-open: #c3b5fd; --ad-open-bg: #3e1c96; --ad-none: #d0d5dd; --ad-none-bg: #344054; --ad-line: #475467;
  --ad-soft: #cbd5e1;
}
#ad-title h1 { font-size: 1.6rem; font-weight: 650; margin: .4rem 0 .3rem; line-height: 1.2; letter-spacing: -.01em; }
#ad-title p { color: var(--ad-soft); margin: 0; font-size: 1rem; line-height: 1.5; }
#ad-status { min-height: 84px; }
.ad-hint { color: var(--ad-soft); border: 1px dashed var(--ad-line); border-radius: 8px; padding: 28px 16px; margin: 0;
  text-align: center; }
.ad-drop { min-height: 190px; }
.ad-drop .file-preview-holder { max-height: 200px; overflow: auto; }
.ad-counts { display: flex; flex-wrap: wrap; gap: 12px; align-items: center; }
.ad-count { border-radius: 8px; padding: 8px 16px; display: flex; flex-direction: column; min-width: 110px; }
.ad-count b { font-size: 1.6rem; line-height: 1.2; color: inherit; }
.ad-count span { font-size: .85rem; color: inherit; }
.ad-promise { flex: 1 1 320px; margin: 0; line-height: 1.5; }
.anomalous.ad-count, .ad-badge.anomalous { background: var(--ad-bad-bg); color: var(--ad-bad); }
.normal.ad-count, .ad-badge.normal { background: var(--ad-good-bg); color: var(--ad-good); }
.undecided.ad-count, .ad-badge.undecided { background: var(--ad-open-bg); color: var(--ad-open); }
.unreadable.ad-count, .ad-badge.unreadable { background: var(--ad-none-bg); color: var(--ad-none); }
.ad-badge { border-radius: 999px; padding: 3px 10px; font-size: .82rem; font-weight: 600; white-space: nowrap; }
.ad-notes { border-left: 3px solid #dc8a04; padding: 2px 0 2px 12px; font-size: .9rem; line-height: 1.45; }
.ad-notes ul { margin: 2px 0 0; padding-left: 18px; list-style: disc; }
.ad-scroll { max-height: 600px; overflow: auto; border: 1px solid var(--ad-line); border-radius: 8px; }
.ad-table { width: 100%; border-collapse: collapse; font-size: .92rem; line-height: 1.3; }
.ad-table th { position: sticky; top: 0; z-index: 1; text-align: left; padding: 8px 10px; font-weight: 600;
  background: var(--background-fill-secondary); color: var(--ad-soft); font-size: .82rem; }
.ad-table td { padding: 7px 10px; border-top: 1px solid var(--ad-line); vertical-align: middle; }
.ad-table tbody tr { cursor: pointer; }
.ad-table tbody tr:hover { background: var(--background-fill-secondary); }
.ad-table tbody tr[aria-selected=true] { box-shadow: inset 4px 0 0 #2563eb;
  background: var(--background-fill-secondary); }
.ad-table tbody tr:focus-visible { outline: 2px solid #2563eb; outline-offset: -2px; }
.ad-name { display: flex; align-items: center; gap: 10px; min-width: 150px; overflow-wrap: anywhere; }
.ad-thumb { flex: 0 0 52px; height: 52px; border-radius: 5px; overflow: hidden; background: var(--ad-none-bg); }
.ad-thumb img { width: 52px; height: 52px; object-fit: cover; display: block; margin: 0; }
.ad-score, .ad-p { font-variant-numeric: tabular-nums; }
.ad-score { min-width: 92px; }
.ad-bar { position: relative; display: block; height: 5px; margin-top: 5px; border-radius: 3px;
  background: var(--ad-none-bg); }
.ad-bar > span { display: block; height: 5px; border-radius: 3px; background: #98a2b3; }
tr.anomalous .ad-bar > span { background: #d92d20; }
tr.normal .ad-bar > span { background: #12b76a; }
.ad-bar i { position: absolute; top: -3px; width: 2px; height: 11px; background: var(--body-text-color); }
.ad-reason { display: block; color: var(--ad-none); font-size: .8rem; line-height: 1.3; }
.ad-viewer { margin: 0; }
.ad-viewer figcaption { display: flex; justify-content: space-between; gap: 8px; align-items: center; font-weight: 600;
  overflow-wrap: anywhere; margin-bottom: 8px; }
.ad-stack { position: relative; border-radius: 8px; overflow: hidden; border: 1px solid var(--ad-line); }
.ad-stack img { display: block; width: 100%; margin: 0; max-width: none; }
.ad-stack .ad-heat { position: absolute; inset: 0; height: 100%; opacity: var(--heat, .8); }
.ad-numbers { margin: 8px 0; font-variant-numeric: tabular-nums; color: var(--ad-soft); }
.ad-legend { width: 100%; height: auto; margin: 0; border-radius: 4px; }
.ad-foot { color: var(--ad-soft); font-size: .85rem; line-height: 1.5; }
@media (max-width: 640px) {
  .ad-table td, .ad-table th { padding: 6px; }
  .ad-thumb { flex-basis: 52px; width: 52px; }
  .ad-name { min-width: 84px; gap: 4px; flex-direction: column; align-items: flex-start; font-size: .85rem; }
  .ad-score { min-width: 60px; }
  .ad-count { min-width: 90px; padding: 6px 12px; }
}
"""
