"""What is written and told about single requests: log lines, W3C trace context, OpenTelemetry."""
