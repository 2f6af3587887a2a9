"""Devices: meshes, where arrays lie on them, several processes, and what a chip can do."""
