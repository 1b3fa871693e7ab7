"""Load control and autoscaling in a simulated fleet."""
