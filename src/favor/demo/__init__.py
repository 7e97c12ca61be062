"""The main job on the embedded model and data."""
