"""The verbs: what the commands do, joined from the parts and free of printing."""
