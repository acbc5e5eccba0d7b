"""Saved models on the Hugging Face Hub: found by name and fetched at one commit, published as one commit.

`huggingface_hub` sends the requests. This package chooses our files, checks that all are of one commit and match their
digests, retries failures that may pass, and raises errors that name the fix.
"""

from adpretrain.hub.download import EMBEDDED, Located, locate
from adpretrain.hub.upload import Published, publish, publish_space

__all__ = ["EMBEDDED", "Located", "Published", "locate", "publish", "publish_space"]
