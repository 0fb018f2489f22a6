"""Learn how much each fine-tuning source should count, and train the model, at once."""

__version__ = "0.1.0"
