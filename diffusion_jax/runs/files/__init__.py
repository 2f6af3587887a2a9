"""Models between runs and the files of other programs."""
