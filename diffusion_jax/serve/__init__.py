"""The playground: a page on which a model is tried, served to this machine alone by default."""
