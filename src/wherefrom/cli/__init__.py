"""The command: arguments into calls of the library, and its errors into one line."""
