"""To the control plane, Prometheus and Loki."""
