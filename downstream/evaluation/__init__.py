"""Compare detectors on labelled photographs: protocols, trials, tables, pictures. Nothing is chosen on test images."""
