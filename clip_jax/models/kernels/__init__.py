"""Pallas kernels for TPUs: what a block needs beside its matrix products, in fast memory."""
