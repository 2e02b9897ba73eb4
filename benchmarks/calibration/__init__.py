"""The evidence for the calibration: real training runs over grids of batch size, learning rate and epsilon."""
