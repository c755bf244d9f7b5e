"""Embeddings of images and captions in files, and search over them."""
