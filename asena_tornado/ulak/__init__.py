"""`Ulak`, the courier: sends to namespaces by their path."""
