"""Torch modules and their training: arrays in, arrays out."""
