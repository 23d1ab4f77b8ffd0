"""The toy problem (circles to be filled) and the tiny base model that it is trained on."""
