"""Compare runs on the same axes: one self-contained page, and plots as files for papers and slides."""
