"""How a run begins: with which folder, weights, data and pictures of its own."""
