"""Worker groups of Ray actors; imported only with `execution: ray`."""
