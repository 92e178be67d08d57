"""Reports: one HTML page each, made from the files that the steps wrote."""
