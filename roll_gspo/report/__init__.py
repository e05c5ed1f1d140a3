"""The report of a run: one self-contained HTML page. Plots and page frame are shared with `compare`."""
