"""Before a run: what a budget buys, whether a step fits a device, and programs compiled for devices elsewhere."""
