"""Devices and processes: the mesh, how a batch reaches it, several processes as one run, and their health."""
