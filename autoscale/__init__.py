"""Load control: NVML probes, saturation, confidence thresholds, and the autoscaling policy."""
