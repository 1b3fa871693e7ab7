"""Recovery of a running application from killed, stopped and broken processes."""
