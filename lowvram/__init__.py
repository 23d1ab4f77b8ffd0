"""Training in the memory of small GPUs, and the prediction of how much memory, arithmetic and disk a run takes."""
