"""What a run did, from what it wrote, without a device: as text, as a page, as JSON."""
