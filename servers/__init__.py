"""Real servers on this machine, for `nomad-watchdog demo` and for the tests: on 127.0.0.1 only, on
free ports, and removed when their owner stops them."""
