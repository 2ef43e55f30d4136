"""Reporting to the control plane, Prometheus and Loki."""
