"""The feedback transformer: every layer sees all layers of the past."""

from feedback_transformer.model import FeedbackTransformer as FeedbackTransformer
from feedback_transformer.state import Memory as Memory

__version__ = "1.0.0"

__all__ = ["FeedbackTransformer", "Memory"]
