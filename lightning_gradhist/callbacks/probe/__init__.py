"""The probe: gradients at frozen weights, after which everything is as if it had not happened."""
