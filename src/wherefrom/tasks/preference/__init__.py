"""Tasks whose examples are compared: completions of a prompt, by preference or reward. It knows nothing of layers."""
