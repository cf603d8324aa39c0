"""What an engine directory holds, and the checks on it."""
