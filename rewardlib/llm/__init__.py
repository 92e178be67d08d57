"""Language models: loading, sampling, encoding; the files of steps 1 to 4."""
