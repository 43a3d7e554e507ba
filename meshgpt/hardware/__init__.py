"""The catalogue of devices: what can be rented, peak FLOP/s, memory, power and price, each with its source."""
