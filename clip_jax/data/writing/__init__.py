"""Tar shards and scores, written so that a killed command goes on."""
