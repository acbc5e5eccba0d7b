"""A page in the browser: a few good photographs, new ones, and at once scores, verdicts and heatmaps.

`uploads`, `session`, `samples` and `showing` are plain functions without Gradio; `page` places the widgets, `gate`
stands between them and the network, `serving` starts the server.
"""
