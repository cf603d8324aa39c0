"""The texts and questions that evaluation asks."""
