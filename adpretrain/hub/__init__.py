"""Saved models on the Hugging Face Hub: found by name and fetched at one commit, published as one commit.

`huggingface_hub` does the talking. Here is what it leaves open: which files are ours, that every file is of the same
commit and has the content its digest says, what is tried again, and errors that name the fix.
"""

from adpretrain.hub.download import EMBEDDED, Located, locate
from adpretrain.hub.upload import Published, publish, publish_space

__all__ = ["EMBEDDED", "Located", "Published", "locate", "publish", "publish_space"]
