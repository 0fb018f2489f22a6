"""What a person sees of a run: metrics on disk, the console, charts, the report."""
