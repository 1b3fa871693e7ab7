"""Load control: NVML probes, saturation, thresholds, and the autoscaling policy."""
