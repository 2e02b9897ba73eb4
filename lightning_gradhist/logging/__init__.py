"""What leaves the package: histograms, scalars, figures, texts and the record of a run."""
