"""Several runs on the same axes, as one self-contained page with figures for papers and slides."""
