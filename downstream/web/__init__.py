"""The demo: a web page that compares new photographs with a few good ones and shows scores, verdicts and heatmaps.

`session` does the work, without Gradio; `page` places the widgets and fills fragments.html; `serving` starts the server
and filters requests.
"""
