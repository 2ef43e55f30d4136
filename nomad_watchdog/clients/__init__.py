"""The libraries that speak to other people's servers, one module each: nothing else imports them, and
nothing of them gets out. Every call has a timeout, and every error is one of `nomad_watchdog.errors`."""
