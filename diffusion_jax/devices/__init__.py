"""Devices: meshes, where arrays live on them, several processes, and what a chip can do."""
