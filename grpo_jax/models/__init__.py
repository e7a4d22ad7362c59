"""Language models: one decoder driven by its architecture, and weights from Hugging Face folders."""
