"""How good and how fast a run is: losses, bits, metrics of samples, FLOPs."""
