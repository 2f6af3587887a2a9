"""Models of a config out of files of other programs, and as such files."""
