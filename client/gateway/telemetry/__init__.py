"""What a gateway tells those that watch it: metrics for Prometheus, spans for OpenTelemetry."""
