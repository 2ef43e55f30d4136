"""Pure decision functions: values and a `now` in, values out. No I/O, no clock, no randomness, no logging."""
