"""Pictures from a model: drawing, saving and laying them out."""
