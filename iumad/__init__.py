"""Incremental unified multimodal (RGB + depth) anomaly detection: IB-IUMAD on top of `iumad_kernels`."""
