"""Networks: arrays in, arrays out; no loss, no schedule and no config object."""
