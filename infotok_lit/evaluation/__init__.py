"""The benchmarks that the field reports: one file each, and what they share."""
