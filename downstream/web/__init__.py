"""A page in the browser: a few good photographs, new ones, and at once scores, verdicts and heatmaps.

`uploads` and `session` are plain functions without Gradio; `page` places the widgets and fills fragments.html, `gate`
stands between them and the network, `serving` starts the server.
"""
