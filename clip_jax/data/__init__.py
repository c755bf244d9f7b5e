"""Image-text pairs: source -> order -> decode -> batches of uint8 images and tokens."""
