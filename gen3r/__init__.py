"""Gen3R (arXiv 2601.04090): the model, readable PyTorch."""
