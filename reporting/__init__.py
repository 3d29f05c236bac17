"""Reports of runs as self-contained HTML pages: reading a run folder, figures, page layout."""
