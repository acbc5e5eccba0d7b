"""A small Hub on localhost for the unmodified huggingface_hub client, which breaks when a test asks it to."""

from hub_server.repository import Repository
from hub_server.server import Fault, Hub

__all__ = ["Fault", "Hub", "Repository"]
