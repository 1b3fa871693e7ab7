"""Load control and autoscaling on simulated replicas."""
