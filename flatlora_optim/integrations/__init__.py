"""Small helpers for single frameworks. Each module imports its framework; the core imports none."""
