"""Data: builders and readers, transforms, and batches as a pure function of the step."""
