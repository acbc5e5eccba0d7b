"""Saved models on the Hugging Face Hub: found by name and fetched at one commit, published as one commit.

`huggingface_hub` sends the requests. This package chooses our files, checks that all are of one commit and match their
digests, retries failures that may pass, and raises errors that name the fix.
"""
