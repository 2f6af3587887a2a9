"""How close samples are to data: distances between features, coverage, copies of training data."""
