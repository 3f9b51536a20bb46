"""Time, memory and arithmetic of a call, as the commands, the demo and the benchmarks take them."""
