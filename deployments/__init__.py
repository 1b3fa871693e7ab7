"""The Serve application: HTTP edge, engine replicas, load controller, command line."""
