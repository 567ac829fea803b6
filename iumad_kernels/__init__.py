"""High-performance kernels for vision state-space models and information-bottleneck anomaly detection."""
