"""Several runs beside each other: methods, ratios, and the benchmark."""
