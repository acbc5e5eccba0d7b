"""The addresses of the Hub, and who needs what to use them."""

from __future__ import annotations

KIND = r"(?P<kind>models|datasets|spaces)"
PREFIX = r"(?:(?P<prefix>datasets|spaces)/)?"  # a model has none
NAME = r"(?P<repo>[^/]+/[^/]+)"
SLUG = r"(?P<slug>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/{KIND}/{NAME}", "info"),
    ("GET", rf"/api/{KIND}/{NAME}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/{KIND}/{NAME}/refs", "refs"),
    ("GET", rf"/api/{KIND}/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("POST", rf"/api/{KIND}/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{PREFIX}{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", rf"/lfs/{NAME}/(?P<oid>[0-9a-f]+)", "upload"),
    ("POST", rf"/lfs/{NAME}/(?P<oid>[0-9a-f]+)/verify", "verify"),
    ("GET", rf"/lfs/{NAME}/(?P<oid>[0-9a-f]+)", "large"),
    ("POST", rf"/api/{KIND}/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/{KIND}/{NAME}/tag/(?P<revision>[^/]+)", "tag"),
    ("POST", rf"/api/{KIND}/{NAME}/branch/(?P<revision>[^/]+)", "branch"),
    ("PUT", rf"/api/{KIND}/{NAME}/settings", "settings"),
    ("GET", r"/api/collections", "collections"),
    ("POST", r"/api/collections", "new_collection"),
    ("GET", rf"/api/collections/{SLUG}", "collection"),
    ("POST", rf"/api/collections/{SLUG}/items", "new_item"),
    ("PATCH", rf"/api/collections/{SLUG}/items/(?P<item>[^/]+)", "item"),
    ("HEAD", rf"/{PREFIX}{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{PREFIX}{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
WRITING = ("preupload", "batch", "commit", "tag", "branch", "settings")
SIGNED = ("upload", "verify", "large")  # their addresses are secret, so they ask for no token


class Answer(Exception):
    """Raised by a route that refuses."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code
